"""tests: pages made to hurt take seconds, not minutes, and end in text or in a clear error."""

from __future__ import annotations

import time

import pytest

from jobledger.workers.processor import ProcessorError
from jobledger.workers.processors.session.page import MAX_CHARACTERS, read_page

MEBIBYTE = 1024 * 1024
_BEGIN = "<html><body><h1>A talk</h1><p>These are some words about the talk.</p>"


def page_of(repeated: str, *, size: int = 10 * MEBIBYTE, begin: str = _BEGIN) -> bytes:
    return (begin + repeated * (size // len(repeated))).encode()


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        (page_of("<b>"), 10),
        (page_of("<blockquote>" * 100 + "word " * 100), 10),
        (page_of("<table><tr><td>x"), 10),
        (page_of("<p>x"), 60),
        (page_of("<tr><td colspan=1000 rowspan=9999>x", begin="<body><table>", size=MEBIBYTE // 8), 60),
        (page_of(" a=1", begin="<body>text <p "), 10),
        (page_of("&lt;script&gt;"), 20),
        (page_of("*_[`<!--"), 10),
        (page_of("\x00"), 10),
    ],
    ids=["nested", "quotes", "tables", "paragraphs", "spans", "attributes", "escapes", "marks", "zeros"],
)
def test_a_page_made_to_hurt_is_read_or_refused_in_time(body: bytes, seconds: float) -> None:
    begun = time.monotonic()
    text = outcome_of(body)
    assert time.monotonic() - begun < seconds
    assert text == "EMPTY_PAGE" or 0 < len(text) <= MAX_CHARACTERS + 100
    assert "<script" not in text.replace("\\<script", "")


def outcome_of(body: bytes) -> str:
    try:
        return read_page(body, content_type="text/html", url="https://conference.example/", session_title="A").markdown
    except ProcessorError as refused:
        return refused.code
