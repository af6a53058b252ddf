"""Escape text from jobs, users and servers for terminals and log files.

Such text could move the cursor, change the clipboard, reorder the display (U+202E), or forge a line of output.
`escape_line` replaces every such character with a Python escape sequence: `\\x1b`, `\\u202e`.
"""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterable, MutableMapping, Sequence
from itertools import chain
from typing import IO, Any, Final

import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Unicode categories Cc, Cf, Cs, Zl and Zp, and letters without a glyph.
_DANGEROUS: Final = (
    "\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u180e\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\U000110bd\U000110cd"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_UNSAFE_IN_LINE: Final = re.compile(f"[{_DANGEROUS}]")
_UNSAFE_IN_TEXT: Final = re.compile(f"(?!\n)[{_DANGEROUS}]")
_UNLIMITED_WIDTH: Final = 1_000_000
"""Columns of output that is no terminal."""
_SHORT_ESCAPES: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def escape_line(text: str) -> str:
    """Return text as one line, with all unsafe characters as escape sequences."""
    return _UNSAFE_IN_LINE.sub(_escape_character, text)


def escape_text(text: str) -> str:
    """Like `escape_line`, but keep line breaks."""
    return _UNSAFE_IN_TEXT.sub(_escape_character, text)


def _escape_character(match: re.Match[str]) -> str:
    character = match[0]
    if character in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[character]
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def echo(*lines: str, err: bool = False) -> None:
    """Print lines. Each argument is printed as exactly one line."""
    typer.echo("\n".join(map(escape_line, lines)), err=err)


def echo_text(text: str, *, err: bool = False) -> None:
    """Print text of several lines. Lines after the first are indented, so that none looks like other output."""
    typer.echo(escape_text(text).replace("\n", "\n  "), err=err)


def echo_json(content: bytes | str) -> None:
    """Print JSON with the same value, in which unsafe characters are written as `\\uXXXX`."""
    text = content.decode() if isinstance(content, bytes) else content
    typer.echo(_UNSAFE_IN_TEXT.sub(_escape_json_character, text))


def _escape_json_character(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", errors="surrogatepass")
    return "".join(f"\\u{units[index]:02x}{units[index + 1]:02x}" for index in range(0, len(units), 2))


def print_json(content: Any) -> None:
    """Print a value as JSON. Values of other types, such as those of MongoDB, become text."""
    echo_json(orjson.dumps(content, default=str, option=orjson.OPT_UTC_Z))


def print_result(content: Any, *lines: str, as_json: bool) -> None:
    """Print the result of a command: `content` as JSON for programs, or `lines` for people."""
    if as_json:
        print_json(content)
    else:
        echo(*lines)


def print_table(rows: Iterable[Sequence[str | Text]], *, max_cell_length: int | None = None) -> None:
    """Print a header and rows, each as one line.

    Args:
        rows: The header and the rows.
        max_cell_length: Truncate longer cells on a terminal. Output to a file or pipe is never truncated.
    """
    console = SafeConsole()
    cells = [[Text(escape_line(cell)) if isinstance(cell, str) else cell for cell in row] for row in rows]
    if max_cell_length is not None and console.is_terminal:
        for cell in chain.from_iterable(cells):
            cell.truncate(max_cell_length, overflow="ellipsis")
    widths = [max(cell.cell_len for cell in column) for column in zip(*cells, strict=True)]
    cells[0] = [Text(cell.plain, style="bold") for cell in cells[0]]
    for row in cells:
        for cell, width in zip(row[:-1], widths, strict=False):
            cell.pad_right(width - cell.cell_len)
        console.print(Text("  ").join(row), soft_wrap=True)


class SafeConsole(Console):
    """A console that prints text literally: it interprets no markup, emoji codes or control sequences.

    Output to a file or pipe is not wrapped or truncated.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})
        if not self.is_terminal and "width" not in options:
            self.width = _UNLIMITED_WIDTH

    def print(self, *objects: Any, **options: Any) -> None:
        """Print strings as one line each, and tables."""
        super().print(*(_escape_cell(value) for value in objects), **options)


class SafeTable(Table):
    """A table without borders, whose cells are wrapped on a terminal. Each cell is escaped as one line."""

    def __init__(self, *headers: str, **options: Any) -> None:
        super().__init__(*headers, **{"box": None, **options})

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row of strings or `Text`."""
        super().add_row(*(_escape_cell(cell) for cell in cells), **options)


def _escape_cell(value: Any) -> Any:
    if isinstance(value, str):
        return escape_line(value)
    if isinstance(value, Text) and (shown := escape_line(value.plain)) != value.plain:
        return Text(shown, style=value.style)
    return value


class SafeStream(io.TextIOBase):
    """A text stream that ignores failures such as a full disk, so that logging cannot end the program."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text. Drop it on failure."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        """Flush the stream. Ignore failures."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream.isatty()


def escape_log_entry(_logger: Any, _method: str, entry: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Escape a log entry for the console. Only tracebacks keep their line breaks."""
    for key, value in entry.items():
        if isinstance(value, str):
            entry[key] = escape_text(value) if key == "exception" else escape_line(value)
        elif not isinstance(value, int | float | bool | None):
            entry[key] = escape_line(repr(value))
    return entry


class SafeFormatter(logging.Formatter):
    """Formats and escapes log records of other libraries."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text. Only tracebacks keep their line breaks."""
        text = super().format(record)
        return escape_text(text) if record.exc_info else escape_line(text)


def configure_output_encoding(streams: Iterable[IO[str] | None] = (sys.stdout, sys.stderr)) -> None:
    """Print characters that an output's encoding lacks as escape sequences, instead of raising an exception."""
    for stream in streams:
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
