"""Find the title, language, description and keywords of a talk in its page. Pure.

Templates declare these for the whole site, or with the site's name. The title and the text of the talk decide what
belongs to it.
"""

from __future__ import annotations

import re
from typing import Any, Final

from jobledger.workers.processors.session.language import SCRIPT_LANGUAGES, detect_language

MAX_INTRO: Final = 400
_MAX_TITLE: Final = 500
_MAX_KEYWORDS: Final = 20
_SEPARATOR: Final = re.compile(r"\s+[|·•–—»«:-]+\s+|\s*[|»«]\s*|::")
_SEPARATOR_EDGE: Final = re.compile(r"^[\s|·•–—»«:-]+|[\s|·•–—»«:-]+$")
_MIN_LETTERS_TO_CONTRADICT: Final = 120
_SIMILAR_LANGUAGES: Final = (
    frozenset({"no", "nb", "nn", "da"}),
    frozenset({"bs", "hr", "sr", "sh", "cnr", "me"}),
    frozenset({"id", "ms", "in"}),
    frozenset({"zh", "yue", "wuu", "cmn"}),
    frozenset({"pt", "gl"}),
    frozenset({"es", "gl", "ca", "ast", "an"}),
    frozenset({"af", "nl"}),
    frozenset({"cs", "sk"}),
    frozenset({"he", "iw", "yi"}),
    frozenset({"fil", "tl"}),
)
"""Languages that detection may mix up, and old codes. Between these, the declared language is right."""
_OWN_SHARE: Final = 0.5
_STOP_WORD_LENGTH: Final = 3
_NO_SPACES: Final = re.compile(r"[\u3041-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]")


def find_title(tree: Any, session_title: str) -> str | None:
    """Return the title of the talk: from the page, or `session_title` if the page repeats it.

    Titles of the page can be that of the site, or contain its name.
    """
    headings = [text for element in tree.iter("h1") if (text := _get_text(element))]
    titles = [
        title
        for title in (find_meta(tree, "og:title", "twitter:title"), *headings, *_get_texts(tree, "title"))
        if title
    ]
    if not titles:
        return None
    site = find_site_name(tree)
    wanted = normalize_text(session_title)
    parts = [part for title in titles for part in (title, *_split_title(title))]
    if repeated := [part for part in parts if wanted and normalize_text(part) == wanted]:
        return max(repeated, key=len)[:_MAX_TITLE]  # one of them may lack an emoji
    own = [title for title in titles if not site or normalize_text(title) != normalize_text(site)] or titles
    return _remove_site_name(own[0], site, headings)[:_MAX_TITLE]


def _remove_site_name(title: str, site: str | None, headings: list[str]) -> str:
    """Remove the name of the site from a title such as `My talk | ExampleConf 2025`."""
    parts = _split_title(title)
    for heading in headings:
        if len(heading) < len(title) and normalize_text(heading) in map(normalize_text, parts):
            return heading
    if site and len(parts) > 1:
        for position in (-1, 0):
            if _is_part_of(parts[position], site):
                start, _, end = title.rpartition(parts[-1]) if position else title.partition(parts[0])
                rest = start if position else end
                return _SEPARATOR_EDGE.sub("", rest).strip() or title
    return title


def _is_part_of(part: str, site: str) -> bool:
    first, second = normalize_text(part), normalize_text(site)
    return bool(first) and bool(second) and (first in second or second in first)


def _split_title(title: str) -> list[str]:
    parts = [part.strip() for part in _SEPARATOR.split(title) if part.strip()]
    return parts if len(parts) > 1 else []


def find_site_name(tree: Any) -> str | None:
    """Return the name of the site, as the page declares it."""
    return find_meta(tree, "og:site_name", "application-name", "apple-mobile-web-app-title")


def find_intro(tree: Any, text: str, session_title: str) -> str | None:
    """Return the description of the page if it describes the talk with `text`, and not the site."""
    for name in ("description", "og:description", "twitter:description"):
        if (description := find_meta(tree, name)) and _describes(
            description, text, session_title, find_site_name(tree)
        ):
            return description
    return None


def _describes(description: str, text: str, session_title: str, site: str | None) -> bool:
    """Return whether at least half of the significant words of the description are in the text or the title."""
    if site and normalize_text(description) == normalize_text(site):
        return False
    words = _get_significant_words(description)
    if not words:
        return False
    found = words & (_get_significant_words(text) | _get_significant_words(session_title))
    title_words = _get_significant_words(session_title)
    is_about_title = len(title_words) > 1 and title_words <= words
    return is_about_title or len(found) >= _OWN_SHARE * len(words)


def _get_significant_words(text: str) -> set[str]:
    """Return the longer words of a text, or pairs of characters in scripts without spaces."""
    words = re.findall(r"\w+", text.casefold())
    pairs = {word[index : index + 2] for word in words if _NO_SPACES.search(word) for index in range(len(word) - 1)}
    return pairs | {word for word in words if len(word) > _STOP_WORD_LENGTH and not _NO_SPACES.search(word)}


def find_keywords(tree: Any) -> list[str]:
    """Return the keywords that the page declares."""
    words = [word.strip() for word in (find_meta(tree, "keywords") or "").split(",")]
    return [word for word in words if word][:_MAX_KEYWORDS]


def find_meta(tree: Any, *names: str) -> str | None:
    """Return the content of the first `meta` element with one of the names, on one line and shortened."""
    for name in names:
        for content in tree.xpath("//meta[@name=$name or @property=$name or @http-equiv=$name]/@content", name=name):
            if words := " ".join(str(content).split()):
                return words if len(words) <= MAX_INTRO else words[:MAX_INTRO].rsplit(" ", 1)[0] + " …"
    return None


def find_language(tree: Any, text: str) -> str | None:
    """Return the language of `text`: as the page declares it, unless the text is certainly in another language."""
    declared = _find_declared_language(tree)
    detected = detect_language(text)
    if declared is None or detected is None:
        return declared or detected
    subtag = declared.partition("-")[0].lower()
    is_similar = subtag == detected or any({subtag, detected} <= group for group in _SIMILAR_LANGUAGES)
    is_certain = detected in SCRIPT_LANGUAGES or sum(map(str.isalpha, text)) >= _MIN_LETTERS_TO_CONTRADICT
    return detected if is_certain and not is_similar else declared


def _find_declared_language(tree: Any) -> str | None:
    attributes = tree.xpath("//html/@lang | //html/@xml:lang | //body/@lang")
    language = next(iter(attributes), "") or find_meta(tree, "content-language") or find_meta(tree, "og:locale") or ""
    is_valid = re.fullmatch(r"\s*[A-Za-z]{2,3}([-_][A-Za-z0-9]{1,8})*\s*", language)
    return language.strip().replace("_", "-") if is_valid else None


def normalize_text(text: str) -> str:
    """Return the words of a text for comparisons."""
    return re.sub(r"\W+", " ", text).strip().casefold()


def _get_texts(tree: Any, tag: str) -> list[str]:
    return [text for element in tree.iter(tag) if (text := _get_text(element))]


def _get_text(element: Any) -> str:
    return " ".join("".join(element.itertext()).split())
