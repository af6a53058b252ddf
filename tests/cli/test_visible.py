"""What a terminal would obey is shown instead, in everything the commands print."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import unicodedata
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

import cli.visible
from cli.settings import LoggingSettings
from cli.visible import SafeConsole, SafeFormatter, SafeStream, echo, echo_json, visible, visible_lines
from cli.wiring import set_up_logging

NASTY = "\x1b]0;title\x07\x1b[2J\x9b31m\u202egnp.exe\u2066\u200b\ufeff\u2028\u2029\r\n\t\ud800[red]x[/red][link=file:///]:skull:\x7f\x00"


@pytest.mark.parametrize("category", ["Cc", "Cf", "Cs", "Zl", "Zp"])
def test_visible_escapes_every_character_of_a_dangerous_category(category: str) -> None:
    found = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) == category]
    assert [character for character in found if visible(character) == character] == []


@given(st.text())
def test_visible_is_one_printable_line_and_keeps_ordinary_text(text: str) -> None:
    shown = visible(text)
    assert not any(unicodedata.category(it) in ("Cc", "Cf", "Cs", "Zl", "Zp") for it in shown)
    if text.isprintable() and not set(text) & set("\u115f\u1160\u3164\uffa0"):
        assert shown == text


def is_safe(printed: str) -> bool:
    return visible_lines(printed) == printed


@given(st.text() | st.just(NASTY))
def test_json_says_the_same_without_dangerous_characters(text: str) -> None:
    written = json.dumps({"text": text}, ensure_ascii=False)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        echo_json(written)
    assert is_safe(out.getvalue())
    assert json.loads(out.getvalue()) == {"text": text}


def test_a_console_interprets_neither_control_sequences_nor_markup() -> None:
    table = Table("name", box=None)
    table.add_row(visible(NASTY))
    out = io.StringIO()
    console = SafeConsole(file=out, width=500)
    for renderable in (NASTY, table):
        console.print(renderable)
    assert is_safe(out.getvalue())
    assert out.getvalue().count("[red]x[/red][link=file:///]:skull:") == 2


def test_echo_keeps_line_breaks_only(capsys: pytest.CaptureFixture[str]) -> None:
    echo(f"first\n{NASTY}")
    assert is_safe(capsys.readouterr().out)


@pytest.mark.parametrize("format_", ["console", "json"])
def test_an_entry_of_the_log_is_one_line(format_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    before = structlog.get_config()
    try:
        set_up_logging(LoggingSettings(format=format_))
        structlog.get_logger().warning(f"event {NASTY}", job=NASTY, jobs=[NASTY], at=datetime.now(UTC))
    finally:
        structlog.configure(**before)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert is_safe(lines[0])


def test_a_record_of_another_library_is_one_line() -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 1, "%s", (NASTY,), None)
    assert visible(written := SafeFormatter("%(message)s").format(record)) == written


class Broken(io.StringIO):
    """A log on a full disk."""

    def write(self, _text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    stream = SafeStream(Broken())
    assert stream.write("text") == 4
    stream.flush()


@pytest.mark.parametrize("module", sorted(Path(cli.visible.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_commands_print_by_these_functions_only(module: Path) -> None:
    source = module.read_text(encoding="utf-8")
    if module.name != "visible.py":
        assert not re.search(
            r"typer\.echo\(|\bprint\(|(?<!Safe)Console\(", re.sub(r"console\.print\(|\)\.print\(", "", source)
        )
