"""The parsed HTML of a fetched page, with its scripts, for all that looks at more than its text. Pure."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import lxml.html  # type: ignore[import-untyped]  # it ships no types

from jobledger.workers.processors.session.charsets import decode_page
from jobledger.workers.processors.session.fetcher import FetchResult
from jobledger.workers.processors.session.page import parse_html

_MAX_CHARACTERS: Final = 3_000_000
"""The rest of a longer page is not looked at."""
_MAX_SCRIPT_CHARACTERS: Final = 50_000
_MARKUP_ATTRIBUTES: Final = ("id", "class", "src", "action", "name")
_NOT_SHOWN: Final = frozenset({"script", "style", "template", "noscript", "head", "title", "svg", "iframe", "object"})
_HIDDEN_STYLE: Final = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)


@dataclass(frozen=True)
class PageSource:
    """A page. `url` is its URL after redirects. `html` is its decoded source."""

    url: str
    html: str

    @cached_property
    def tree(self) -> Any:
        """The root element. An empty page has an empty `html` element."""
        tree = parse_html(self.html)
        return tree if tree is not None else lxml.html.Element("html")

    @cached_property
    def text(self) -> str:
        """The text that a reader sees without JavaScript."""
        body = self.tree.find("body")
        return " ".join(_iterate_shown_text(body)) if body is not None else ""

    @cached_property
    def words(self) -> list[str]:
        """The words of `text`, normalized by `split_words`."""
        return split_words(self.text)

    @cached_property
    def markup(self) -> str:
        """Identifiers, classes and addresses of elements, and the code of scripts. Not the text."""
        parts: list[str] = []
        for element in self.tree.iter():
            parts += [f'{name}="{element.get(name)}"' for name in _MARKUP_ATTRIBUTES if element.get(name)]
            if element.tag == "script" and not _is_data(element):
                parts.append((element.text or "")[:_MAX_SCRIPT_CHARACTERS])
        return "\n".join(parts)

    @cached_property
    def noscript_text(self) -> str:
        """The text for readers without JavaScript."""
        return " ".join(" ".join(element.itertext()) for element in self.tree.iter("noscript"))

    @cached_property
    def title(self) -> str:
        """The text of the element `title`."""
        return next((_get_text(element) for element in self.tree.xpath("//title")), "")

    @cached_property
    def main_headings(self) -> list[str]:
        """The headings of the first level."""
        return [_get_text(element) for element in self.tree.xpath("//h1")[:2]]

    @cached_property
    def headings(self) -> list[str]:
        """The headings of the first two levels."""
        return [_get_text(element) for element in self.tree.xpath("//h1 | //h2")[:6]]


def parse_page(response: FetchResult) -> PageSource:
    """Decode a page. It is parsed when it is first needed."""
    return PageSource(response.url, decode_page(response.body, response.content_type).text[:_MAX_CHARACTERS])


def _get_text(element: Any) -> str:
    return " ".join(" ".join(element.itertext()).split())


def _is_data(script: Any) -> bool:
    return "json" in (script.get("type") or "")


def split_words(text: str) -> list[str]:
    """Return the words in lower case, without accents."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return re.findall(r"\w+", plain)


def _iterate_shown_text(body: Any) -> list[str]:
    texts: list[str] = []
    pending: list[Any] = [body]
    while pending:  # not recursive: a page may be nested deeply
        item = pending.pop()
        if isinstance(item, str):
            texts.append(item)
            continue
        if (
            item.tag not in _NOT_SHOWN
            and item.get("hidden") is None
            and not _HIDDEN_STYLE.search(item.get("style", ""))
        ):
            for child in reversed(item):
                pending += [child.tail or "", child]
            pending.append(item.text or "")
    return texts
