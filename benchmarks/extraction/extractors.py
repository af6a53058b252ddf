"""The extractors that are compared. Each returns the main text of a page without markup."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Final

import lxml.html  # type: ignore[import-untyped]  # it ships no types
import trafilatura
from markdown_it import MarkdownIt

from benchmarks.extraction.marked_pages import MarkedPage
from jobledger.workers.processors.session.charsets import decode_page
from jobledger.workers.processors.session.page import read_page

_MARKDOWN: Final = MarkdownIt("commonmark").enable("table")


def extract_with_jobledger(body: bytes, page: MarkedPage) -> str:
    """Extract the text like a job of the type `session`."""
    text = read_page(
        body, content_type=page.content_type, url=page.url, session_title=page.title, speakers=page.speakers
    )
    return render_text(text.markdown)


def extract_with_trafilatura(body: bytes, page: MarkedPage) -> str:
    """Extract the text with trafilatura and its default options, without comments."""
    return trafilatura.extract(decode_page(body, page.content_type).text, include_comments=False) or ""


def extract_with_readability(body: bytes, page: MarkedPage) -> str:
    """Extract the text with readability-lxml."""
    import readability

    summary = readability.Document(decode_page(body, page.content_type).text).summary()
    return str(lxml.html.fromstring(summary).text_content())


def extract_with_markitdown(body: bytes, page: MarkedPage) -> str:
    """Convert the whole page with MarkItDown."""
    import markitdown

    html = decode_page(body, page.content_type).text.encode()
    return render_text(markitdown.MarkItDown().convert_stream(io.BytesIO(html), file_extension=".html").text_content)


EXTRACTORS: Final[dict[str, Callable[[bytes, MarkedPage], str]]] = {
    "jobledger": extract_with_jobledger,
    "trafilatura": extract_with_trafilatura,
    "readability": extract_with_readability,
    "markitdown": extract_with_markitdown,
}


def render_text(markdown: str) -> str:
    """Return the text that readers of the Markdown see."""
    html = _MARKDOWN.render(markdown)
    return str(lxml.html.fromstring(f"<div>{html}</div>").text_content()) if html.strip() else ""
