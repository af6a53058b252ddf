"""Extract the text of a web page as Markdown, without navigation and other boilerplate. Pure."""

from __future__ import annotations

import re
from contextlib import suppress
from itertools import pairwise
from typing import Any

import lxml.etree  # type: ignore[import-untyped]  # it ships no types
import lxml.html  # type: ignore[import-untyped]  # nor does this part of it
from pydantic import BaseModel, ConfigDict

from jobledger.workers.processor import ProcessorError
from jobledger.workers.processors.session.boilerplate import remove_boilerplate, remove_non_text_elements
from jobledger.workers.processors.session.html_markdown import convert_html_to_markdown
from jobledger.workers.processors.session.safe_markdown import COMMONMARK, sanitize_markdown

MAX_CHARACTERS = 200_000
MAX_ELEMENTS = 30_000
MAX_READ_CHARACTERS = 2_000_000
MAX_TAGS = 250_000
"""Further tags are not parsed. A tree of the millions of tags that fit in a page would need a gigabyte."""
MAX_INTRO = 400

_HTML_TYPES = {"text/html", "application/xhtml+xml"}
_LOOKS_LIKE_HTML = re.compile(rb"<(!doctype html|html|head|body|title|h1|div|p)\b", re.IGNORECASE)
_CHARSET = re.compile(r"""charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE | re.ASCII)
_META_CHARSET = re.compile(f"<meta[^>]*?{_CHARSET.pattern}", re.IGNORECASE | re.ASCII)
_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
_TEXT_CODECS = re.compile(r"(utf|iso-8859|windows|cp|koi8|gb|big5|euc|shift|x-sjis|mac|tis|us-ascii|ascii|latin|ks_c)")
# Encodings that browsers use for these labels: https://encoding.spec.whatwg.org/#names-and-labels
_READ_AS = {
    **dict.fromkeys(("iso-8859-1", "iso8859-1", "latin1", "latin-1", "us-ascii", "ascii"), "windows-1252"),
    **dict.fromkeys(("gb2312", "gbk"), "gb18030"),
    **dict.fromkeys(("shift_jis", "shift-jis", "x-sjis"), "cp932"),
    **dict.fromkeys(("euc-kr", "ks_c_5601-1987"), "cp949"),
    "iso-8859-9": "windows-1254",
}


class PageText(BaseModel):
    """The text of a page. `markdown` is safe to include in another document. Its headings start at level 2."""

    model_config = ConfigDict(frozen=True)

    url: str
    title: str | None
    language: str | None
    intro: str | None
    keywords: list[str]
    markdown: str
    warnings: list[str] = []


def require_html_type(media_type: str) -> None:
    """Reject a media type that is not HTML.

    Raises:
        ProcessorError: NOT_HTML.
    """
    if media_type and media_type not in _HTML_TYPES:
        raise ProcessorError("NOT_HTML", f"The page is not HTML but {media_type}.", details={"media_type": media_type})


def read_page(body: bytes, *, content_type: str, url: str, session_title: str) -> PageText:
    """Read the HTML `body` of `url`. Headings that repeat `session_title` are removed.

    Raises:
        ProcessorError: NOT_HTML, or EMPTY_PAGE if the page has no text.
    """
    if not content_type and not _LOOKS_LIKE_HTML.search(body[:4096]):
        raise ProcessorError("NOT_HTML", "The page is not HTML.", details={"url": url})
    tree = _parse_html(decode_html(body, content_type))
    if tree is None:
        raise _make_empty_page_error(url)
    warnings: list[str] = []
    remove_non_text_elements(tree)
    if _truncate(tree.find("body"), MAX_ELEMENTS, MAX_READ_CHARACTERS):
        warnings.append("The page is too long. Only its beginning was read.")
    title = _find_title(tree)
    if not remove_boilerplate(tree):
        warnings.append("The main text of the page could not be identified. All visible text is used.")
    is_truncated = _truncate(tree.find("body"), MAX_ELEMENTS, MAX_CHARACTERS)
    text = convert_html_to_markdown(tree.find("body"), url=url, base=next(iter(tree.xpath("//base/@href")), ""))
    if is_truncated or len(text) > MAX_CHARACTERS:
        warnings.append(f"The page is too long. Only its first {MAX_CHARACTERS:,} characters are used.")
        text = re.sub(r"\s\S{0,1000}\Z", "", text[:MAX_CHARACTERS])
    text = _normalize_headings(sanitize_markdown(text), session_title)
    if not text.strip():
        raise _make_empty_page_error(url)
    return PageText(
        url=url,
        title=title,
        language=_find_language(tree),
        intro=_find_meta(tree, "description", "og:description"),
        keywords=[word.strip() for word in (_find_meta(tree, "keywords") or "").split(",") if word.strip()][:20],
        markdown=text,
        warnings=warnings,
    )


def _truncate(body: Any, max_elements: int, max_characters: int) -> bool:
    """Remove everything after the given number of elements or characters. Return whether anything was removed."""
    removed: list[Any] = []
    number, remaining = 0, max_characters
    for event, element in lxml.etree.iterwalk(body, events=("start", "end")):
        if event == "start":
            number += 1
            if number > max_elements or remaining <= 0:
                removed.append(element)
        text = (element.text if event == "start" else element.tail) or ""
        if len(text) > max(0, remaining):
            setattr(element, "text" if event == "start" else "tail", text[: max(0, remaining)])
        remaining -= len(text.strip())
    for element in removed:
        if element.getparent() is not None:
            element.getparent().remove(element)
    return bool(removed) or remaining < 0


def decode_html(body: bytes, content_type: str) -> str:
    """Decode `body` by its byte order mark, the HTTP header, the page's `meta` element, or as UTF-8, in this order."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if body.startswith(mark):
            return body[len(mark) :].decode(encoding, "replace")
    labels = _CHARSET.findall(content_type)[:1]
    # A page with a readable `meta` element is not UTF-16 (HTML standard, 13.2.3.3).
    meta_labels = _META_CHARSET.findall(body[:4096].decode("latin-1"))[:1]
    labels += ["utf-8" if label.lower().startswith("utf-16") else label for label in meta_labels]
    for label in map(str.lower, labels):
        if _TEXT_CODECS.match(label):
            with suppress(LookupError, UnicodeError):
                return body.decode(_READ_AS.get(label, label), "replace")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        return body.decode("windows-1252", "replace")


def _parse_html(text: str) -> Any:
    """Parse the page and remove `noscript` elements (`Please enable JavaScript`)."""
    if text.count("<") > MAX_TAGS:
        text = "<".join(text.split("<", MAX_TAGS)[:MAX_TAGS])
    parser = lxml.html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    try:
        # Pass bytes: lxml rejects a str that starts with an XML declaration, which XHTML has.
        tree = lxml.html.document_fromstring(text.replace("\x00", "").encode("utf-8", "replace"), parser=parser)
    except lxml.etree.ParserError:
        return None
    for element in tree.xpath("//noscript"):
        element.drop_tree()
    return tree if tree.find("body") is not None else None


def _make_empty_page_error(url: str) -> ProcessorError:
    return ProcessorError("EMPTY_PAGE", f"The page {url} has no text.", details={"url": url})


def _find_title(tree: Any) -> str | None:
    title = _find_meta(tree, "og:title")
    for path in ("//h1", "//title"):
        for element in tree.xpath(path):
            title = title or " ".join("".join(element.itertext()).split())
    return title[:500] if title else None


def _find_meta(tree: Any, *names: str) -> str | None:
    for name in names:
        for content in tree.xpath("//meta[@name=$name or @property=$name or @http-equiv=$name]/@content", name=name):
            if words := " ".join(str(content).split()):
                return words if len(words) <= MAX_INTRO else words[:MAX_INTRO].rsplit(" ", 1)[0] + " …"
    return None


def _find_language(tree: Any) -> str | None:
    language = (
        next(iter(tree.xpath("//html/@lang | //html/@xml:lang")), "") or _find_meta(tree, "content-language") or ""
    )
    is_valid = re.fullmatch(r"\s*[A-Za-z]{2,3}([-_][A-Za-z0-9]{1,8})*\s*", language)
    return language.strip().replace("_", "-") if is_valid else None


def _normalize_text(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().casefold()


def _normalize_headings(text: str, title: str) -> str:
    """Shift headings so that the highest has level 2, and remove headings that repeat `title`."""
    lines = text.split("\n")
    tokens = COMMONMARK.parse(text)
    levels: dict[int, int] = {}
    for opening, content in pairwise(tokens):
        if opening.type == "heading_open" and not opening.level and opening.map:
            if _normalize_text(content.content) == _normalize_text(title):
                lines[opening.map[0]] = ""
            else:
                levels[opening.map[0]] = int(opening.tag[1])
    shift = 2 - min(levels.values(), default=2)
    for number, level in levels.items():
        lines[number] = f"{'#' * min(6, level + shift)} {lines[number].lstrip('#').lstrip()}"
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
