"""Complete pages of several kinds and encodings give the expected Markdown.

The expected Markdown is next to each page in `pages/`. It was reviewed by hand. `pages/README.md` lists the sources.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from jobledger.workers.processors.session.page import read_page

PAGES = Path(__file__).parent / "pages"
URL = "https://conference.example/2025/talks/page.html"

PAGE_PROPERTIES = {
    # page: (Content-Type header, title, language)
    "schedule": ("text/html; charset=utf-8", "Append-only and proud: “ledgers” & the art of not forgetting", "en"),
    "pretalx": ("text/html", "Debugging with a rubber duck 🦆", "en"),
    "wordpress": ("text/html", "Wie man Bücher rückwärts liest", "de-AT"),
    "hugo": ("text/html; charset=UTF-8", "Des index plus petits", "fr"),
    "nineties": ("text/html", "Talk: Coffee & Compilers", "en"),
    "sphinx": ("text/html", "bisect — Array bisection algorithm", "en"),
    "apache-ko": ("text/html", "DNS와 아파치와 관련된 사항", "ko"),
    "apache-de": ("text/html", "An Adressen und Ports binden", "de"),
}


@pytest.mark.parametrize("name", PAGE_PROPERTIES)
def test_example_page_gives_expected_markdown(name: str) -> None:
    content_type, title, language = PAGE_PROPERTIES[name]
    body = (PAGES / f"{name}.html").read_bytes()
    page = read_page(body, content_type=content_type, url=URL, session_title=title)
    assert (page.title, page.language, page.warnings) == (title, language, [])
    assert page.markdown + "\n" == (PAGES / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGE_PROPERTIES)
def test_expected_markdown_is_commonmark_without_top_heading(name: str) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse((PAGES / f"{name}.md").read_text(encoding="utf-8"))
    assert {"h1"}.isdisjoint(token.tag for token in tokens)
    assert not any(token.type in ("html_block", "html_inline") for token in tokens)
    fences = [token for token in tokens if token.type == "fence"]
    assert len(fences) >= {"schedule": 1, "pretalx": 1, "hugo": 1, "nineties": 1, "sphinx": 4}.get(name, 0)
