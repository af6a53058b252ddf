"""tests: whole pages of several kinds and encodings become the Markdown a person would have made of them.

Beside each page in `pages/` lies what is expected, gone through by hand. `pages/README.md` says where they come from.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from jobledger.workers.processors.session.page import read_page

PAGES = Path(__file__).parent / "pages"
URL = "https://conference.example/2025/talks/page.html"

KINDS = {
    # page: (what the server says, title, language)
    "schedule": ("text/html; charset=utf-8", "Append-only and proud: “ledgers” & the art of not forgetting", "en"),
    "pretalx": ("text/html", "Debugging with a rubber duck 🦆", "en"),
    "wordpress": ("text/html", "Wie man Bücher rückwärts liest", "de-AT"),
    "hugo": ("text/html; charset=UTF-8", "Des index plus petits", "fr"),
    "nineties": ("text/html", "Talk: Coffee & Compilers", None),
    "sphinx": ("text/html", "bisect — Array bisection algorithm", "en"),
    "apache-ko": ("text/html", "DNS와 아파치와 관련된 사항", "ko"),
    "apache-de": ("text/html", "An Adressen und Ports binden", "de"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_becomes_what_a_person_would_have_made_of_it(kind: str) -> None:
    content_type, title, language = KINDS[kind]
    body = (PAGES / f"{kind}.html").read_bytes()
    page = read_page(body, content_type=content_type, url=URL, session_title=title)
    assert (page.title, page.language, page.warnings) == (title, language, [])
    assert page.markdown + "\n" == (PAGES / f"{kind}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_expected_is_commonmark_that_begins_below_the_title(kind: str) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse((PAGES / f"{kind}.md").read_text(encoding="utf-8"))
    assert {"h1"}.isdisjoint(token.tag for token in tokens)
    assert not any(token.type in ("html_block", "html_inline") for token in tokens)
    fences = [token for token in tokens if token.type == "fence"]
    assert len(fences) >= {"schedule": 1, "pretalx": 1, "hugo": 1, "nineties": 1, "sphinx": 4}.get(kind, 0)
