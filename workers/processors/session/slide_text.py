"""Clean the text of slides: characters without a shape, hyphens at line ends, repeated headers and footers. Pure."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

MAX_SLIDE_CHARACTERS: Final = 4_000
MAX_TOTAL_CHARACTERS: Final = 500_000
_LINE_END_HYPHEN: Final = re.compile("[\x02\ufffe]")
"""PDFium replaces a hyphen at the end of a line and the line end by one of these characters."""
_LIGATURES: Final = re.compile("[\ufb00-\ufb06]")
_JOINERS: Final = "\u200c\u200d"
_HEADER_END: Final = 0.08
_FOOTER_START: Final = 0.9
_MIN_REPEATED_PAGES: Final = 3


class TextLine(NamedTuple):
    """A line of a slide with its vertical position: 0 is the top of the page, 1 the bottom."""

    text: str
    top: float

    @property
    def is_in_margin(self) -> bool:
        return self.top < _HEADER_END or self.top > _FOOTER_START


def clean_line(text: str) -> str:
    """Return the text with letters instead of ligatures, without soft hyphens, control and private characters."""
    text = _LIGATURES.sub(lambda match: unicodedata.normalize("NFKC", match.group()), text)
    text = re.sub(rf"{_LINE_END_HYPHEN.pattern}(?=[A-Z\d])", "-", text)
    text = _LINE_END_HYPHEN.sub("", text).replace("\xad", "").replace("\uffff", "")
    characters = (_clean_character(character) for character in text)
    return " ".join("".join(characters).split())


def _clean_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cc":
        return " "
    return "" if category in ("Cf", "Co", "Cs") and character not in _JOINERS else character


def clean_notes(text: str) -> str:
    """Return the non-empty lines of speaker notes."""
    return "\n".join(words for line in text.splitlines() if (words := clean_line(line)))[:MAX_SLIDE_CHARACTERS]


def build_slide_texts(pages: Mapping[int, Sequence[TextLine]]) -> dict[int, str]:
    """Return the text of each page, by page number.

    Lines in the top or bottom margin that are on at least half of the pages are kept only on the first of them. Digits
    in them may differ, as in `12/30`. Other lines of the bottom margin are moved to the end.
    """
    cleaned = {
        number: [line._replace(text=text) for line in lines if (text := clean_line(line.text))]
        for number, lines in pages.items()
    }
    margin_keys = {
        number: {_make_key(line) for line in lines if line.is_in_margin} for number, lines in cleaned.items()
    }
    counts = Counter(key for keys in margin_keys.values() for key in keys)
    repeated = {key for key, count in counts.items() if count >= max(_MIN_REPEATED_PAGES, len(pages) / 2)}
    texts, seen, remaining = {}, set[str](), MAX_TOTAL_CHARACTERS
    for number, lines in cleaned.items():
        kept = [line for line in lines if not (line.is_in_margin and _make_key(line) in repeated & seen)]
        kept.sort(key=lambda line: line.top > _FOOTER_START)
        texts[number] = "\n".join(line.text for line in kept)[: min(MAX_SLIDE_CHARACTERS, remaining)]
        remaining -= len(texts[number])
        seen |= margin_keys[number]
    return texts


def _make_key(line: TextLine) -> str:
    return re.sub(r"\d+", "#", line.text).casefold()


def format_numbers(numbers: list[int]) -> str:
    """Return ascending numbers as text, such as `1, 3–5`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ", ".join("–".join(map(str, part)) for part in ranges)


def format_slides(numbers: list[int]) -> str:
    """Return the slides as text, such as `slide 2` or `slides 1, 3–5`."""
    return f"slide{'s' if len(numbers) > 1 else ''} {format_numbers(numbers)}"
