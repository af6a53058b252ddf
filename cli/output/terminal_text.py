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
from typing import IO, Any, Final

import orjson
import typer
from rich.console import Console
from rich.text import Text

# Unicode categories Cc, Cf, Cs, Zl and Zp, and letters without a glyph.
_DANGEROUS: Final = (
    "\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u180e\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\U000110bd\U000110cd"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_UNSAFE_IN_LINE: Final = re.compile(f"[{_DANGEROUS}]")
_UNSAFE_IN_TEXT: Final = re.compile(f"(?!\n)[{_DANGEROUS}]")
_NARROW_COLUMN: Final = 10
"""Width of a column, such as the status, that is kept as long as other columns are wider."""
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


def echo_page(text: str) -> None:
    """Print text of this program, such as a help page, as it is."""
    typer.echo(text)


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


def print_yaml(content: Any) -> None:
    """Print a value as YAML, in which unsafe characters are escaped. The value must consist of JSON types."""
    import yaml

    class SafeYamlDumper(yaml.SafeDumper):
        """A dumper that puts text with unsafe characters into quotation marks."""

    def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        style = '"' if _UNSAFE_IN_LINE.search(text) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    SafeYamlDumper.add_representer(str, represent_text)
    text = yaml.dump(content, Dumper=SafeYamlDumper, sort_keys=False, allow_unicode=True, width=_UNLIMITED_WIDTH)
    typer.echo(_UNSAFE_IN_TEXT.sub(_escape_character, text), nl=False)


def print_table(rows: Iterable[Sequence[str | Text]], *, fits_terminal: bool = True) -> None:
    """Print a header and rows, each as one line.

    Args:
        rows: The header and the rows. The first column has IDs or names, which are never truncated.
        fits_terminal: Truncate cells if a terminal is too narrow. Output to a file or pipe is never truncated.
    """
    console = SafeConsole()
    cells = [[Text(escape_line(cell)) if isinstance(cell, str) else cell for cell in row] for row in rows]
    widths = [max(cell.cell_len for cell in column) for column in zip(*cells, strict=True)]
    if fits_terminal and console.has_terminal:
        _shrink(widths, [cell.cell_len for cell in cells[0]], console.width)
    cells[0] = [Text(cell.plain, style="bold") for cell in cells[0]]
    for row in cells:
        for cell, width in zip(row, widths, strict=True):
            cell.truncate(width, overflow="ellipsis")
        for cell, width in zip(row[:-1], widths, strict=False):
            cell.pad_right(width - cell.cell_len)
        line = Text("  ").join(row)
        line.rstrip()
        console.print(line, soft_wrap=True)


def _shrink(widths: list[int], min_widths: Sequence[int], terminal_width: int) -> None:
    """Make columns after the first narrower until all fit, but none narrower than its header.

    First the widest columns become narrower, until none is wide. Then the last ones do: the first ones matter most.
    """
    for _ in range(sum(widths) + 2 * (len(widths) - 1) - terminal_width):
        shrinkable = [index for index in range(1, len(widths)) if widths[index] > min_widths[index]]
        wide = [index for index in shrinkable if widths[index] > _NARROW_COLUMN]
        if not shrinkable:
            return
        widths[max(wide, key=widths.__getitem__) if wide else shrinkable[-1]] -= 1


class SafeConsole(Console):
    """A console that prints text literally: it interprets no markup, emoji codes or control sequences.

    Output to a file or pipe is not wrapped or truncated.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})
        if not self.has_terminal and "width" not in options:
            self.width = _UNLIMITED_WIDTH

    @property
    def has_terminal(self) -> bool:
        """Whether the output is a terminal. With FORCE_COLOR, `is_terminal` is true for a file or pipe, too."""
        return self.is_terminal and self.file.isatty()

    def on_broken_pipe(self) -> None:
        """Raise the error again, so that the command ends as after any other output to a closed pipe."""
        raise

    def print(self, *objects: Any, **options: Any) -> None:
        """Print strings as one line each, or texts with styles."""
        super().print(*(_escape_cell(value) for value in objects), **options)


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
