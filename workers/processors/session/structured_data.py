"""Read what a page says about the talk in JSON-LD or microdata (schema.org). Pure.

Only the object whose name is the title of the talk counts: pages also describe the conference, its site and its venue.
"""

from __future__ import annotations

import html
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from jobledger.workers.processors.session.page_source import PageSource, split_words

_MAX_SCRIPT_CHARACTERS: Final = 1_000_000
_MAX_NODES: Final = 20_000
_MAX_TEXT: Final = 50_000
_MAX_ITEMS: Final = 50
_TITLE_SHARE: Final = 0.7
_DESCRIPTIONS: Final = ("description", "abstract", "articleBody", "text")
_NAMES: Final = ("name", "headline", "title", "alternateName")
_TALK_TYPES: Final = re.compile(
    r"Event|VideoObject|PresentationDigitalDocument|CreativeWork|Article|Course|Lecture|Recording"
)
_COMMENT: Final = re.compile(r'("(?:[^"\\]|\\.)*(?:"|\Z))|/\*.*?(?:\*/|\Z)|//[^\n]*', re.DOTALL)
_TRAILING_COMMA: Final = re.compile(r'("(?:[^"\\]|\\.)*(?:"|\Z))|,(?=\s*[}\]])', re.DOTALL)
_LANGUAGE: Final = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{1,8})*")


@dataclass(frozen=True, slots=True)
class TalkData:
    """What structured data say about the talk. `description` may be HTML."""

    title: str
    description: str = ""
    language: str | None = None
    keywords: list[str] = field(default_factory=list)
    video_url: str | None = None


def find_talk_data(source: PageSource, title: str) -> TalkData | None:
    """Return the data of the object whose name is most like `title`, or None."""
    wanted = split_words(title)
    best: tuple[float, int, dict[str, Any]] | None = None
    for node in _iterate_nodes(source):
        score = max((_compare(wanted, split_words(name)) for name in _get_texts(node, _NAMES)), default=0.0)
        is_talk_type = any(_TALK_TYPES.search(kind) for kind in _get_texts(node, ("@type",)))
        if score >= _TITLE_SHARE and is_talk_type:
            candidate = (score, len(_get_text(node, _DESCRIPTIONS)), node)
            if best is None or candidate[:2] > best[:2]:
                best = candidate
    return _read_talk(best[2]) if best else None


def _read_talk(node: dict[str, Any]) -> TalkData:
    language = _get_text(node, ("inLanguage",)).strip()
    video = _get_text(node, ("contentUrl", "embedUrl"))
    for nested in _as_list(node.get("recordedIn")) + _as_list(node.get("video")) + _as_list(node.get("workFeatured")):
        video = video or (_get_text(nested, ("contentUrl", "embedUrl", "url")) if isinstance(nested, dict) else "")
    keywords = [word.strip() for text in _get_texts(node, ("keywords",)) for word in text.split(",")]
    return TalkData(
        title=" ".join(_get_text(node, _NAMES).split()),
        description=_get_text(node, _DESCRIPTIONS)[:_MAX_TEXT].strip(),
        language=language.replace("_", "-") if _LANGUAGE.fullmatch(language) else None,
        keywords=[word for word in dict.fromkeys(keywords) if 0 < len(word) <= 100][:20],
        video_url=video if video.startswith(("http://", "https://")) else None,
    )


def _compare(wanted: Sequence[str], found: Sequence[str]) -> float:
    """Return how much two titles have in common, from 0 to 1."""
    if not wanted or not found:
        return 0.0
    common = len({*wanted} & {*found})
    return common / max(len({*wanted}), min(len({*found}), 2 * len({*wanted})))


def _iterate_nodes(source: PageSource) -> Iterator[dict[str, Any]]:
    """Yield all objects of JSON-LD, outermost first, and of microdata."""
    pending: deque[Any] = deque(_load_scripts(source))
    for _ in range(_MAX_NODES):
        if not pending:
            break
        value = pending.popleft()
        if isinstance(value, dict):
            yield value
            pending.extend(nested for nested in value.values() if isinstance(nested, dict | list))
        else:
            pending.extend(nested for nested in value if isinstance(nested, dict | list))
    yield from _iterate_microdata(source)


def _load_scripts(source: PageSource) -> Iterator[Any]:
    remaining = _MAX_SCRIPT_CHARACTERS
    for script in source.tree.iter("script"):
        text = script.text or ""
        if (script.get("type") or "").partition(";")[0].strip().lower() != "application/ld+json":
            continue
        remaining -= len(text)
        if remaining < 0:
            return
        value = _load_json(text)
        if isinstance(value, dict | list):
            yield value


def _load_json(text: str) -> Any:
    """Load JSON that may have comments, trailing commas, line breaks in strings, or HTML entities."""
    text = re.sub(
        r"^\s*(<!--|//\s*<!\[CDATA\[|/\*\s*<!\[CDATA\[\s*\*/|<!\[CDATA\[)|(-->|(//\s*|/\*\s*)?\]\]>(\s*\*/)?)\s*$",
        "",
        text,
    )
    for candidate in (text, _mend(text), _mend(html.unescape(text))):
        try:
            return json.loads(candidate, strict=False)
        except (ValueError, RecursionError):
            continue
    return None


def _mend(text: str) -> str:
    without_comments = _COMMENT.sub(lambda match: match[1] or "", text)
    return _TRAILING_COMMA.sub(lambda match: match[1] or "", without_comments).strip().rstrip(";")


def _iterate_microdata(source: PageSource) -> Iterator[dict[str, Any]]:
    for item in source.tree.xpath("//*[@itemscope][@itemtype]")[:_MAX_ITEMS]:
        node: dict[str, Any] = {"@type": [kind.rpartition("/")[2] for kind in item.get("itemtype").split()]}
        for element in item.xpath(".//*[@itemprop]")[:1000]:
            if _get_scope(element) is not item:
                continue
            for name in element.get("itemprop").split():
                node.setdefault(name, []).append(_get_microdata_value(element, name))
        yield node


def _get_scope(element: Any) -> Any:
    return next((parent for parent in element.iterancestors() if parent.get("itemscope") is not None), None)


def _get_microdata_value(element: Any, name: str) -> str:
    for attribute in ("content", "href", "src", "datetime"):
        if element.get(attribute) is not None and (attribute != "href" or name not in _NAMES):
            return str(element.get(attribute))
    if element.get("itemscope") is not None:
        names = element.xpath(".//*[contains(concat(' ', @itemprop, ' '), ' name ')]")
        return " ".join(" ".join(names[0].itertext()).split()) if names else ""
    if name in _DESCRIPTIONS:
        return "\n\n".join(text.strip() for text in element.itertext() if text.strip())
    return " ".join(" ".join(element.itertext()).split())


def _get_text(node: dict[str, Any], keys: Sequence[str]) -> str:
    return next((text for text in _get_texts(node, keys) if text.strip()), "")


def _get_texts(node: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """Return the texts of the keys: of strings, language maps, and the names of objects."""
    texts: list[str] = []
    for key in keys:
        for value in _as_list(node.get(key))[:_MAX_ITEMS]:
            inner = value
            if isinstance(value, dict):
                inner = next(
                    (value[name] for name in ("@value", "name", "@id", "alternateName") if name in value), None
                )
            if isinstance(inner, str):
                texts.append(html.unescape(inner) if key not in _DESCRIPTIONS else inner)
    return texts


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
