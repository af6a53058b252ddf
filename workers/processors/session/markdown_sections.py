"""Split Markdown into sections that a language model can translate one at a time. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from markdown_it.token import Token

from jobledger.workers.processors.session.safe_markdown import COMMONMARK
from jobledger.workers.processors.session.translation_checks import has_words

_MAX_INLINE_VERBATIM_CHARACTERS: Final = 200
"""A longer block without words, such as code, is not sent. A shorter one is sent as part of its section."""
_MAX_TITLE_CHARACTERS: Final = 60
_INDIVISIBLE: Final = re.compile(r"(`+)(?!`).{1,2000}?\1|!?\[[^\]]{0,500}\]\([^)]{0,2000}\)|\$[^$\n]{1,1000}\$|\S{40,}")
_SENTENCE_END: Final = re.compile(r"(?<=[.!?…])[\"'”’»)\]*_]{0,4}(\s+)(?=\S)|(?<=[。！？])()(?=\S)")
_SPACE: Final = re.compile(r"(\s+)(?=\S)")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a text.

    Attributes:
        text: The Markdown, with `repeated_lines` of the section before it: the head of a table that was split.
        title: The heading that the section belongs to, or its first words.
        separator: What is between the section before and this one.
        needs_model: Whether there are words to translate.
    """

    text: str
    title: str
    separator: str = "\n\n"
    needs_model: bool = True
    repeated_lines: int = 0


@dataclass(frozen=True, slots=True)
class _Piece:
    """A block, or a part of a block that is too long."""

    text: str
    heading: str | None = None
    separator: str = "\n\n"
    repeated_lines: int = 0


def split_markdown(markdown: str, max_characters: int, title: str = "") -> list[Section]:
    """Split a text into sections of at most `max_characters`, at headings, blocks, items, rows or sentences.

    Only an indivisible part, such as a long list item, gives a longer section. `title` is the heading before the text.
    """
    packer = _Packer(max_characters, title)
    for piece in _split_blocks(markdown, max_characters):
        packer.add(piece)
    return packer.finish()


def join_sections(sections: Sequence[Section], texts: Sequence[str]) -> str:
    """Return the whole text of which `texts` are the sections."""
    parts: list[str] = []
    for section, text in zip(sections, texts, strict=True):
        own_lines = "\n".join(text.strip("\n").split("\n")[section.repeated_lines :])
        parts += [section.separator if parts else "", own_lines]
    return "".join(parts)


class _Packer:
    """Joins pieces to sections."""

    def __init__(self, max_characters: int, title: str) -> None:
        self._max_characters = max_characters
        self._heading = title
        self._pieces: list[_Piece] = []
        self._length = 0
        self._sections: list[Section] = []

    def add(self, piece: _Piece) -> None:
        is_verbatim = len(piece.text) > _MAX_INLINE_VERBATIM_CHARACTERS and not has_words(piece.text)
        is_full = self._length + len(piece.text) > self._max_characters
        is_new_topic = piece.heading is not None and self._length > self._max_characters / 2
        if is_verbatim or is_full or is_new_topic or piece.separator != "\n\n" or piece.repeated_lines:
            self._flush(keep_heading=not is_verbatim and piece.separator == "\n\n")
        self._pieces.append(piece)
        self._length += len(piece.text) + 2
        if is_verbatim:
            self._flush()

    def finish(self) -> list[Section]:
        self._flush()
        return self._sections

    def _flush(self, *, keep_heading: bool = False) -> None:
        """Make a section of the pieces. A heading at their end belongs to the next section if `keep_heading`."""
        pieces = self._pieces
        kept: list[_Piece] = []
        while keep_heading and pieces and pieces[-1].heading is not None:
            kept.insert(0, pieces.pop())
        if pieces:
            text = pieces[0].text + "".join(f"{piece.separator}{piece.text}" for piece in pieces[1:])
            headings = [piece.heading for piece in pieces if piece.heading]
            title = (headings or [self._heading])[0] or " ".join(text.split())
            if len(title) > _MAX_TITLE_CHARACTERS:
                title = f"{title[:_MAX_TITLE_CHARACTERS]}…"
            first = pieces[0]
            self._sections.append(Section(text, title, first.separator, has_words(text), first.repeated_lines))
            self._heading = headings[-1] if headings else self._heading
        self._pieces = kept
        self._length = sum(len(piece.text) + 2 for piece in kept)


def _split_blocks(markdown: str, max_characters: int) -> Iterator[_Piece]:
    """Yield the top-level blocks. A list, table or fence is one block, unless it is too long."""
    lines = markdown.splitlines()
    tokens = COMMONMARK.parse(markdown)
    starts = [
        (token.map[0], number)
        for number, token in enumerate(tokens)
        if token.map and token.level == 0 and token.nesting >= 0
    ]
    ends = [*(start for start, _ in starts[1:]), len(lines)]
    for (start, number), end in zip(starts, ends, strict=True):
        text, token = "\n".join(lines[start:end]).strip("\n"), tokens[number]
        if token.type == "heading_open":
            yield _Piece(text, heading=tokens[number + 1].content)
        elif len(text) <= max_characters:
            yield _Piece(text)
        elif token.type in ("bullet_list_open", "ordered_list_open"):
            yield from _split_list(lines[:end], tokens[number:], max_characters)
        elif token.type == "table_open":
            yield from _split_table(text.split("\n"), max_characters)
        elif token.type == "paragraph_open":
            yield from _split_paragraph(text, max_characters)
        else:
            yield _Piece(text)


def _split_list(lines: Sequence[str], tokens: Sequence[Token], max_characters: int) -> Iterator[_Piece]:
    """Yield groups of the items of the first list."""
    starts = []
    for token in tokens:
        if token.type == "list_item_open" and token.level == 1 and token.map:
            starts.append(token.map[0])
        if token.type in ("bullet_list_close", "ordered_list_close") and not token.level:
            break
    items = ["\n".join(lines[start:end]) for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]
    parts = [(item.rstrip("\n"), item[len(item.rstrip("\n")) :] + "\n") for item in items]
    yield from _group(parts, max_characters)


def _split_table(lines: Sequence[str], max_characters: int) -> Iterator[_Piece]:
    """Yield groups of rows, each with the head of the table."""
    head = "\n".join(lines[:2])
    rows = [(line, "\n") for line in lines[2:]]
    for number, piece in enumerate(_group(rows, max(1, max_characters - len(head)))):
        text = f"{head}\n{piece.text}"
        yield _Piece(text, separator="\n", repeated_lines=2) if number else _Piece(text)


def _split_paragraph(text: str, max_characters: int) -> Iterator[_Piece]:
    """Yield groups of sentences, or of words if a sentence is too long."""
    parts: list[tuple[str, str]] = []
    for sentence, space in _split_at(text, _SENTENCE_END):
        words = [(sentence, "")] if len(sentence) <= max_characters else list(_split_at(sentence, _SPACE))
        parts += [*words[:-1], (words[-1][0], space)]
    yield from _group(parts, max_characters)


def _split_at(text: str, end: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Yield parts and the space after each. A link, code or formula is not split."""
    protected = [match.span() for match in _INDIVISIBLE.finditer(text)]
    begin, index = 0, 0
    for match in end.finditer(text):
        start, stop = match.span(1) if match[1] is not None else match.span(2)
        while index < len(protected) and protected[index][1] <= start:
            index += 1
        if index < len(protected) and protected[index][0] < start:
            continue
        yield text[begin:start], text[start:stop]
        begin = stop
    yield text[begin:], ""


def _group(parts: Sequence[tuple[str, str]], max_characters: int) -> Iterator[_Piece]:
    """Join parts to pieces of at most `max_characters`. Each part has the space after it."""
    group, space, separator = "", "", "\n\n"
    for text, following in parts:
        if group and len(group) + len(space) + len(text) > max_characters:
            yield _Piece(group, separator=separator)
            group, separator = text, space
        else:
            group = f"{group}{space}{text}" if group else text
        space = following
    yield _Piece(group, separator=separator)
