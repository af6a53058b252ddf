"""Cleaning of the text of slides."""

from __future__ import annotations

import pytest

from jobledger.workers.processors.session.slide_text import (
    TextLine,
    build_slide_texts,
    clean_line,
    clean_notes,
    format_numbers,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufb01rst e\ufb03cient o\ufb04ine", "first efficient offline"),
        ("soft\xadhyphen", "softhyphen"),
        ("docu\ufffement and Event\ufffeSourcing", "document and Event-Sourcing"),
        ("docu\x02ment, page\x022", "document, page-2"),
        ("\uf0b7 bullet\u202e and\x07 bell", "bullet and bell"),
        ("x² ½ 👩\u200d💻 ﷲ", "x² ½ 👩\u200d💻 ﷲ"),
        (" many   spaces\t", "many spaces"),
    ],
)
def test_clean_line(text: str, expected: str) -> None:
    assert clean_line(text) == expected


def test_clean_notes_drops_empty_lines() -> None:
    assert clean_notes("one\r\n\r\n  two ") == "one\ntwo"


def test_line_of_the_bottom_margin_is_last() -> None:
    assert build_slide_texts({1: [TextLine("12", 0.95), TextLine("Title", 0.2)]}) == {1: "Title\n12"}


def test_repeated_line_is_kept_on_first_page() -> None:
    pages = {number: [TextLine(f"Page {number}", 0.97), TextLine(f"Step {number}", 0.3)] for number in (1, 2, 3)}
    assert build_slide_texts(pages) == {1: "Step 1\nPage 1", 2: "Step 2", 3: "Step 3"}


def test_line_on_few_pages_is_kept() -> None:
    pages = {number: [TextLine("Source: OECD", 0.95)] if number < 3 else [] for number in range(1, 7)}
    assert [text for text in build_slide_texts(pages).values() if text] == ["Source: OECD"] * 2


def test_text_is_limited() -> None:
    texts = build_slide_texts({number: [TextLine("x" * 9_000, 0.5)] for number in range(1, 201)})
    assert len(texts[1]) == 4_000
    assert sum(map(len, texts.values())) == 500_000


def test_format_numbers() -> None:
    assert [format_numbers(numbers) for numbers in ([2], [1, 2], [1, 3, 4, 5])] == ["2", "1–2", "1, 3–5"]
