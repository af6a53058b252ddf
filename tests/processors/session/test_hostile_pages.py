"""Pages that are built to exhaust the parser: they are read within seconds, or rejected as EMPTY_PAGE."""

from __future__ import annotations

import time

import pytest

from jobledger.workers.processor import ProcessorError
from jobledger.workers.processors.session.page import MAX_CHARACTERS, read_page
from tests.support.soak_only import IS_SOAK_RUN

MEBIBYTE = 1024 * 1024
PART = 1 if IS_SOAK_RUN else 5
"""Pages of many elements, of which the first 30,000 are read, have a fifth of these elements in a normal run."""
_START = "<html><body><h1>A talk</h1><p>These are some words about the talk.</p>"


def make_body(repeated: str, *, size: int = 10 * MEBIBYTE, start: str = _START) -> bytes:
    return (start + repeated * (size // len(repeated))).encode()


@pytest.mark.parametrize(
    ("body", "max_cpu_seconds"),
    [
        (make_body("<b>"), 10),
        (make_body("<blockquote>" * 100 + "word " * 100), 10),
        (make_body("<table><tr><td>x"), 10),
        (make_body("<p>x", size=MEBIBYTE // 8 // PART), 60 / PART),
        (make_body("<tr><td colspan=1000 rowspan=9999>x", start="<body><table>", size=MEBIBYTE // 8), 60),
        (make_body(" a=1", start="<body>text <p "), 10),
        (make_body("&lt;script&gt;"), 20),
        (make_body("*_[`<!--"), 10),
        (make_body("\x00"), 10),
        (make_body("x" * 66 + "<hr>", size=2 * MEBIBYTE // PART), 60 / PART),
        (make_body("text<input>", size=MEBIBYTE // 3 // PART), 60 / PART),
        (make_body("<p>word ", start=_START + "<blockquote>" * 240, size=MEBIBYTE // 4), 15),
        (make_body("<div id=ads>", start=f"{_START}<h1>{'title ' * 100_000}</h1>", size=MEBIBYTE), 30),
        (make_body("<h1>A</h1>", size=MEBIBYTE // 3 // PART), 60 / PART),
        (make_body("<table><tr><td>a<td>b</table>", size=MEBIBYTE // 4 // PART), 60 / PART),
        (make_body("<svg aria-label='a b c d'></svg>", start=f"{_START}<a href=/x>", size=MEBIBYTE), 15),
    ],
    ids=[
        *("nested", "quotes", "tables", "paragraphs", "spans", "attributes", "escapes", "markers", "null characters"),
        *("rules", "controls", "paragraphs in quotes", "names", "titles", "small tables", "drawings in a link"),
    ],
)
def test_hostile_page_is_read_or_rejected_in_time(body: bytes, max_cpu_seconds: float) -> None:
    started = time.process_time()  # the time on the clock depends on other processes
    text = read_markdown_or_error_code(body)
    assert time.process_time() - started < max_cpu_seconds
    assert text == "EMPTY_PAGE" or 0 < len(text) <= MAX_CHARACTERS + 100
    assert "<script" not in text.replace("\\<script", "")


def read_markdown_or_error_code(body: bytes) -> str:
    try:
        return read_page(body, content_type="text/html", url="https://conference.example/", session_title="A").markdown
    except ProcessorError as error:
        return error.code
