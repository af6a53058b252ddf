"""cli: text from jobs, users and servers, made safe for a terminal and for a log file.

Such a text could move the cursor, change the clipboard, reorder what is displayed (U+202E), or forge a line of output.
`visible` shows every character that does such things as an escape sequence, in the way of Python: `\\x1b`, `\\u202e`.
"""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterable, MutableMapping
from typing import IO, Any, Final

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# Categories Cc, Cf, Cs, Zl and Zp of Unicode, and letters without a shape.
_DANGEROUS: Final = (
    "\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u180e\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\U000110bd\U000110cd"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_IN_LINE: Final = re.compile(f"[{_DANGEROUS}]")
_IN_TEXT: Final = re.compile(f"(?!\n)[{_DANGEROUS}]")
_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def escape_line(text: str) -> str:
    """Return a text in one line, with all characters that do something shown as escape sequences."""
    return _IN_LINE.sub(_escaped, text)


def escape_text(text: str) -> str:
    """Return a text of several lines likewise; only the line breaks stay as they are."""
    return _IN_TEXT.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    if character in _SHORT:
        return _SHORT[character]
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def echo(*lines: str, err: bool = False) -> None:
    """Print lines. Whatever data they contain, each stays one line."""
    typer.echo("\n".join(map(escape_line, lines)), err=err)


def echo_text(text: str, *, err: bool = False) -> None:
    """Print a text whose line breaks are wanted. Lines after the first are indented, so none looks like our own."""
    typer.echo(escape_text(text).replace("\n", "\n  "), err=err)


def echo_json(content: bytes | str) -> None:
    """Print JSON that says exactly the same, with the dangerous characters in its texts as `\\uXXXX`."""
    text = content.decode() if isinstance(content, bytes) else content
    typer.echo(_IN_TEXT.sub(_escaped_json, text))


def _escaped_json(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", errors="surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


class SafeConsole(Console):
    """A console that prints text as it is: without markup, emoji codes, and control sequences in the text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})
        self.push_render_hook(_Escaping())

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts in one line each, and tables."""
        super().print(*(_in_one_line(it) for it in objects), **options)


class SafeTable(Table):
    """A table without borders whose cells have one line each, whatever data they contain."""

    def __init__(self, *headers: str, **options: Any) -> None:
        super().__init__(*headers, **{"box": None, **options})

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row of texts."""
        super().add_row(*(_in_one_line(cell) for cell in cells), **options)


def _in_one_line(value: Any) -> Any:
    if isinstance(value, str):
        return escape_line(value)
    if isinstance(value, Text) and (shown := escape_line(value.plain)) != value.plain:
        return Text(shown, style=value.style)
    return value


class _Escaping(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


class _Escaped:
    """Escapes the text of segments. rich's own control sequences are in control segments and styles, not in text."""

    def __init__(self, renderable: ConsoleRenderable) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._renderable, options):
            yield segment if segment.control else Segment(escape_text(segment.text), segment.style)


class SafeStream(io.TextIOBase):
    """A text stream whose failures (a full disk, a closed pipe) do not end the program that logs to it."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or lose the text."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        """Flush, or lose the text."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return self._stream.isatty()


def escape_log_entry(_logger: Any, _method: str, entry: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Make an entry of the log safe for the console: one line, but for the traceback of an exception."""
    for key, value in entry.items():
        if isinstance(value, str):
            entry[key] = escape_text(value) if key == "exception" else escape_line(value)
        elif not isinstance(value, int | float | bool | None):
            entry[key] = escape_line(repr(value))
    return entry


class SafeFormatter(logging.Formatter):
    """Formats records of other libraries for the log."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record; a traceback keeps its lines."""
        text = super().format(record)
        return escape_text(text) if record.exc_info else escape_line(text)


def configure_output_encoding(streams: Iterable[IO[str] | None] = (sys.stdout, sys.stderr)) -> None:
    """Have characters that the encoding of an output lacks printed as escape sequences, not as a traceback."""
    for stream in streams:
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
