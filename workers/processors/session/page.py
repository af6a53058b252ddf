"""Extract the text of a web page as Markdown, without navigation and other boilerplate. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from urllib.parse import urljoin

import lxml.etree  # type: ignore[import-untyped]  # it ships no types
import lxml.html  # type: ignore[import-untyped]  # nor does this part of it
from pydantic import BaseModel, ConfigDict

from jobledger.workers.processor import ProcessorError, SavedFile
from jobledger.workers.processors.session.boilerplate import remove_boilerplate
from jobledger.workers.processors.session.charsets import decode_page
from jobledger.workers.processors.session.embedded_media import VideoTrack, find_video_tracks, mark_featured_image
from jobledger.workers.processors.session.html_markdown import convert_html_to_markdown, flatten_deep_elements
from jobledger.workers.processors.session.page_metadata import (
    find_intro,
    find_keywords,
    find_language,
    find_title,
    normalize_text,
)
from jobledger.workers.processors.session.result_layout import ResultLayout
from jobledger.workers.processors.session.safe_markdown import COMMONMARK, sanitize_markdown
from jobledger.workers.processors.session.visible_text import remove_non_text_elements

MAX_CHARACTERS = 200_000
MAX_ELEMENTS = 30_000
MAX_READ_CHARACTERS = 2_000_000
_MAX_OMITTED_SHARE = 0.1
MAX_TAGS = 250_000
"""Further tags are not parsed. A tree of the millions of tags that fit in a page would need a gigabyte."""

_IMAGE = re.compile(r"!\[(?:[^\[\]\\]|\\.)*\]\([^()\s]*\)")
_CLOSING_TAGS = re.compile(r"</(?:body|html)\s*>", re.IGNORECASE)
_HTML_TYPES = {"text/html", "application/xhtml+xml"}
_LOOKS_LIKE_HTML = re.compile(rb"<(!doctype html|html|head|body|title|h1|div|p)\b", re.IGNORECASE)


class PageText(BaseModel):
    """The text of a page. `markdown` is safe to include in another document. Its headings start at level 2."""

    model_config = ConfigDict(frozen=True)

    url: str
    title: str | None
    language: str | None
    intro: str | None
    keywords: list[str]
    markdown: str
    image_urls: list[str] = []
    """Images that are not downloaded yet. The target of the first in `markdown` is `assets/page-image-1`."""
    images: list[SavedFile] = []
    video_tracks: list[VideoTrack] = []
    warnings: list[str] = []
    may_change: bool = False
    """Whether the cause of a warning may be gone when the job is restarted."""

    def with_result_paths(self, layout: ResultLayout) -> PageText:
        """Return a copy whose files have the paths of this job. Their names, and thus the Markdown, stay the same."""
        paths = [layout.build_asset_path(image.path.rpartition("/")[2]) for image in self.images]
        images = [image.model_copy(update={"path": path}) for image, path in zip(self.images, paths, strict=True)]
        return self.model_copy(update={"images": images})


def require_html_type(media_type: str) -> None:
    """Reject a media type that is not HTML.

    Raises:
        ProcessorError: NOT_HTML.
    """
    if media_type and media_type not in _HTML_TYPES:
        raise ProcessorError("NOT_HTML", f"The page is not HTML but {media_type}.", details={"media_type": media_type})


def read_page(
    body: bytes, *, content_type: str, url: str, session_title: str, speakers: Sequence[str] = ()
) -> PageText:
    """Read the HTML `body` of `url`. Headings that repeat `session_title` are removed, and `speakers` are kept.

    Raises:
        ProcessorError: NOT_HTML, or EMPTY_PAGE if the page has no text.
    """
    if not content_type and not _LOOKS_LIKE_HTML.search(body[:4096]):
        raise ProcessorError("NOT_HTML", "The page is not HTML.", details={"url": url})
    decoded = decode_page(body, content_type)
    tree = parse_html(decoded.text)
    if tree is None or not _merge_bodies(tree):
        raise _make_empty_page_error(url)
    warnings = list(decoded.warnings)
    remove_non_text_elements(tree)
    flatten_deep_elements(tree.find("body"))
    if _truncate(tree.find("body"), MAX_ELEMENTS, MAX_READ_CHARACTERS):
        warnings.append("The page is too long. Only its beginning was read.")
    title = find_title(tree, session_title)
    base = next(iter(tree.xpath("//base/@href")), "")
    video_tracks = find_video_tracks(tree, _join_urls(url, base))
    mark_featured_image(tree, _join_urls(url, base), session_title)
    selection = remove_boilerplate(tree, speakers)
    if not selection.is_identified:
        warnings.append("The main text of the page could not be identified. All visible text is used.")
    elif selection.omitted_share > _MAX_OMITTED_SHARE:
        warnings.append(
            f"About {selection.omitted_share:.0%} of the page's prose was not used. It does not seem to belong to "
            f"the talk. Compare the document with the page. The longest omitted text begins: “{selection.omitted_text}”"
        )
    is_truncated = _truncate(tree.find("body"), MAX_ELEMENTS, MAX_CHARACTERS)
    text, image_urls = convert_html_to_markdown(tree.find("body"), url=url, base=base)
    if is_truncated or len(text) > MAX_CHARACTERS:
        warnings.append(f"The page is too long. Only its first {MAX_CHARACTERS:,} characters are used.")
        text = re.sub(r"\s\S{0,1000}\Z", "", text[:MAX_CHARACTERS])
    text = _normalize_headings(sanitize_markdown(text), session_title)
    if not re.search(r"\w", _IMAGE.sub("", text)):
        raise _make_empty_page_error(url)
    return PageText(
        url=url,
        title=title,
        language=find_language(tree, text),
        intro=find_intro(tree, text, session_title),
        keywords=find_keywords(tree),
        markdown=text,
        image_urls=image_urls,
        video_tracks=video_tracks,
        warnings=warnings,
    )


def _join_urls(url: str, base: str) -> str:
    try:
        return urljoin(url, base)
    except ValueError:
        return url


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


def parse_html(text: str) -> Any:
    """Return the root element of a page, or None if it is empty. What follows a closing `body` belongs to it."""
    if text.count("<") > MAX_TAGS:
        text = "<".join(text.split("<", MAX_TAGS)[:MAX_TAGS])
    text = _CLOSING_TAGS.sub("", text.replace("\x00", ""))
    parser = lxml.html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    try:
        # Pass bytes: lxml rejects a str that starts with an XML declaration, which XHTML has.
        return lxml.html.document_fromstring(text.encode("utf-8", "replace"), parser=parser)
    except lxml.etree.ParserError:
        return None


def _merge_bodies(tree: Any) -> bool:
    """Move everything after the first body into it. A damaged page has several. Return whether there is one."""
    body = tree.find("body")
    if body is not None:
        for element in list(body.itersiblings()):
            element.tag = "div" if element.tag == "body" else element.tag
            body.append(element)
    return body is not None


def _make_empty_page_error(url: str) -> ProcessorError:
    return ProcessorError("EMPTY_PAGE", f"The page {url} has no text.", details={"url": url})


def _normalize_headings(text: str, title: str) -> str:
    """Shift headings so that the highest has level 2, and remove headings that repeat `title`."""
    lines = text.split("\n")
    levels: dict[int, int] = {}
    repeated: set[int] = set()
    for opening, content in pairwise(COMMONMARK.parse(text)):
        if opening.type == "heading_open" and not opening.level and opening.map:
            if normalize_text(content.content) == normalize_text(title):
                repeated.add(opening.map[0])
            else:
                levels[opening.map[0]] = int(opening.tag[1])
    shift = 2 - min(levels.values(), default=2)
    for number, level in levels.items():
        lines[number] = f"{'#' * min(6, level + shift)} {lines[number].lstrip('#').lstrip()}"
    repeated |= {number + 1 for number in repeated if number + 1 < len(lines) and not lines[number + 1]}
    return "\n".join(line for number, line in enumerate(lines) if number not in repeated).strip("\n")
