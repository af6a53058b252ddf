"""Commands print control characters and markup as visible escape sequences."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import sys
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.text import Text

import jobledger.cli
from jobledger.cli.administration import view_maintenance
from jobledger.cli.administration.view_maintenance import ViewComparison
from jobledger.cli.checks.result import CheckResult, build_result_rows
from jobledger.cli.commands.log_state import print_changes, print_state
from jobledger.cli.commands.overview import build_error_rows, build_parameter_rows
from jobledger.cli.commands.resources import print_details
from jobledger.cli.commands.submit import print_finished_job
from jobledger.cli.commands.webhooks import build_delivery_rows, build_endpoint_rows
from jobledger.cli.hosting.logging_setup import configure_logging
from jobledger.cli.output.formatting import format_changes, format_event
from jobledger.cli.output.terminal_text import (
    SafeConsole,
    SafeFormatter,
    SafeStream,
    echo,
    echo_json,
    echo_text,
    escape_line,
    escape_text,
    print_table,
)
from jobledger.cli.settings import LoggingSettings
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.store.verification import IntegrityProblem, VerificationResult
from jobledger.projections.engine.comparison import Difference
from jobledger.projections.engine.file_verification import FileProblem, FileVerificationResult
from tests.support.event_examples import NOON

UNSAFE_TEXT = "\x1b]0;title\x07\x1b[2J\x9b31m\u202egnp.exe\u2066\u200b\ufeff\u2028\u2029\r\n\t\ud800[red]x[/red][link=file:///]:skull:\x7f\x00"


@pytest.mark.parametrize("category", ["Cc", "Cf", "Cs", "Zl", "Zp"])
def test_escape_line_unsafe_category_is_escaped(category: str) -> None:
    characters = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) == category]
    assert [character for character in characters if escape_line(character) == character] == []


@given(st.text())
def test_escape_line_any_text_is_printable_and_keeps_ordinary_text(text: str) -> None:
    escaped = escape_line(text)
    assert not any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in escaped)
    if text.isprintable() and not set(text) & set("\u115f\u1160\u3164\uffa0"):
        assert escaped == text


def is_safe(printed: str) -> bool:
    return escape_text(printed) == printed


LONG_CELL = "x" * 300


def test_tables_not_on_a_terminal_are_not_truncated_or_wrapped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    SafeConsole().print(Text(LONG_CELL, no_wrap=True, overflow="ellipsis"), soft_wrap=True)
    print_table([("A", "B"), (LONG_CELL, LONG_CELL)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.count(LONG_CELL) for line in lines] == [1, 0, 2]


def test_print_table_on_terminal_fits_its_width_except_ids_and_headers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SafeConsole, "has_terminal", True)
    monkeypatch.setenv("COLUMNS", "60")
    rows = [("ID", "STATUS", "NAME"), ("i" * 20, "s" * 10, LONG_CELL)]
    print_table(rows)
    print_table(rows, fits_terminal=False)
    print_table([("ID", "STATUS"), ("i" * 100, "s" * 10)])
    lines = capsys.readouterr().out.splitlines()
    counts = [(line.count("i"), line.count("s"), line.count("x")) for line in lines if "ID" not in line]
    assert counts == [(20, 10, 25), (20, 10, 300), (100, 5, 0)]


@given(st.text() | st.just(UNSAFE_TEXT))
def test_echo_json_unsafe_text_is_escaped_and_equal(text: str) -> None:
    written = json.dumps({"text": text}, ensure_ascii=False)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        echo_json(written)
    assert is_safe(out.getvalue())
    assert json.loads(out.getvalue()) == {"text": text}


def test_console_unsafe_text_prints_no_sequences_or_markup() -> None:
    out = io.StringIO()
    console = SafeConsole(file=out, width=500)
    for renderable in (UNSAFE_TEXT, Text(UNSAFE_TEXT)):
        console.print(renderable)
    assert is_safe(out.getvalue())
    assert out.getvalue().count("[red]x[/red][link=file:///]:skull:") == 2


def test_echo_unsafe_text_prints_one_line_per_argument(capsys: pytest.CaptureFixture[str]) -> None:
    echo("first", UNSAFE_TEXT)
    printed = capsys.readouterr().out
    assert is_safe(printed)
    assert printed.count("\n") == 2


def test_echo_text_several_lines_are_indented(capsys: pytest.CaptureFixture[str]) -> None:
    echo_text(f"first\nsecond {UNSAFE_TEXT}")
    printed = capsys.readouterr().out
    assert is_safe(printed)
    assert [line for line in printed.splitlines() if not line.startswith("  ")] == ["first"]


def make_state(name: str) -> dict[str, Any]:
    job = dict.fromkeys(("job_id", "job_name", "job_type", "batch_id", "worker_id"), name)
    batch = {"batch_id": name, "batch_name": name, "status": "processing", "paused": False, "jobs": {name: 1}}
    return {
        "position": 1,
        "time": NOON,
        "jobs": {name: 1},
        "waiting_for": {"worker": 1},
        "oldest_pending_submitted_at": NOON,
        "running": [{**job, "attempt": 1, "claimed_at": NOON}],
        "batches": [batch],
    }


def make_delivery(name: str) -> dict[str, Any]:
    fields = dict.fromkeys(("delivery_id", "type", "host"), name)
    return {
        **fields,
        "status": "pending",
        "next_attempt_at": name,
        "attempt": 1,
        "attempts": [{"error": {"message": name}, "status_code": None}],
    }


def make_endpoint(name: str) -> dict[str, Any]:
    fields = ("endpoint_id", "user_id", "url", "created_at", "rotated_at", "previous_secret_expires_at")
    return {**dict.fromkeys(fields, name), "revoked": False}


def make_event(name: str) -> RecordedEvent:
    data = {"worker_id": name, "attempt": 1}
    return RecordedEvent(
        {
            "_id": 1,
            "stream": name,
            "version": 1,
            "type": "JobClaimed",
            "time": NOON,
            "data": data,
            "meta": {"actor": name},
        }
    )


def make_comparison(name: str) -> ViewComparison:
    comparison = ViewComparison(9)
    for live, fresh in (({"a": name, name: 1}, {"a": 2}), (None, {}), ({}, None)):
        comparison.add(Difference("jobs", name, live, fresh))
    return comparison


def print_all(*renderables: Any) -> None:
    console = SafeConsole(width=10_000)
    for renderable in renderables:
        console.print(renderable)


PRINTED: dict[str, Callable[[str], None]] = {
    "log verify: the log": lambda name: echo(
        *view_maintenance.format_verification(
            VerificationResult(1, 0, 1, None, IntegrityProblem(2, f"its data.{name} is a Code", name, 3))
        )
    ),
    "log verify: views": lambda name: echo(*view_maintenance.format_comparison(make_comparison(name))),
    "log verify: files": lambda name: echo(
        *view_maintenance.format_file_verification(
            FileVerificationResult(1, 1, 0, 1, 2, [FileProblem(name, name, name)])
        )
    ),
    "log history": lambda name: print_all(
        format_event(make_event(name)), format_changes({"a": 1}, {"a": name, name: name})
    ),
    "log state --as-of": lambda name: print_state(make_state(name)),
    "log state --until": lambda name: print_changes({"jobs": {name: 0}}, make_state(name), {name: [name, name]}),
    "doctor": lambda name: print_table(build_result_rows([CheckResult(name, is_ok=False, detail=name, advice=name)])),
    "webhooks": lambda name: print_table(build_delivery_rows([make_delivery(name)])),
    "webhooks endpoints": lambda name: print_table(build_endpoint_rows([make_endpoint(name)])),
    "submit": lambda name: print_finished_job(
        SafeConsole(width=10_000), name, "JobFailed", {"error": {"message": name}}
    ),
    "errors ls": lambda name: print_table(
        build_error_rows([{"code": name, "jobs": 1, "last_at": None, "job_id": name, "message": name}])
    ),
    "types get": lambda name: print_table(
        build_parameter_rows(
            [{"name": name, "type": name, "required": True, "default": name, "description": f"{name}."}]
        )
    ),
    "jobs": lambda name: print_table([["id", "name"], [name, name]]),
    "jobs get": lambda name: print_details(name, Text(name), iter([(name, name)])),
}


@pytest.mark.parametrize("print_for", PRINTED.values(), ids=PRINTED.keys())
@given(name=st.text(max_size=20) | st.just(f"x\nThe views match the log up to position 9999.\n{UNSAFE_TEXT}"))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_printed_unsafe_name_adds_no_line(
    print_for: Callable[[str], None], name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    capsys.readouterr()
    print_for("name")
    expected = capsys.readouterr().out.count("\n")
    print_for(name)
    printed = capsys.readouterr().out
    assert is_safe(printed)
    assert printed.count("\n") == expected


@pytest.mark.parametrize("format_", ["console", "json"])
def test_log_entry_unsafe_text_is_one_line(format_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    before = structlog.get_config()
    try:
        configure_logging(LoggingSettings(format=format_))
        structlog.get_logger().warning(
            f"event {UNSAFE_TEXT}", job=UNSAFE_TEXT, jobs=[UNSAFE_TEXT], at=datetime.now(UTC)
        )
    finally:
        structlog.configure(**before)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert is_safe(lines[0])


def test_log_record_of_library_is_one_line() -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 1, "%s", (UNSAFE_TEXT,), None)
    assert escape_line(written := SafeFormatter("%(message)s").format(record)) == written


class FullDiskStream(io.StringIO):
    """A log stream on a full disk."""

    def write(self, _text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_safe_stream_write_error_is_ignored() -> None:
    stream = SafeStream(FullDiskStream())
    assert stream.write("text") == 4
    stream.flush()


@pytest.mark.parametrize(
    "module", sorted(Path(jobledger.cli.__file__).parent.rglob("*.py")), ids=lambda path: path.name
)
def test_module_prints_only_by_safe_functions(module: Path) -> None:
    source = module.read_text(encoding="utf-8")
    if module.name != "terminal_text.py":
        assert not re.search(
            r"typer\.echo\(|\bprint\(|(?<!Safe)Console\(|(?<!Safe)Table\(",
            re.sub(r"console\.print\(|\)\.print\(", "", source),
        )


@pytest.mark.parametrize(
    "module", sorted(Path(jobledger.cli.__file__).parent.rglob("*.py")), ids=lambda path: path.name
)
def test_module_echoes_no_text_with_line_break(module: Path) -> None:
    """`echo` and `print` escape line breaks. `echo_text` prints texts of several lines."""
    calls = [node for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    named = [(getattr(call.func, "attr", getattr(call.func, "id", "")), call) for call in calls]
    texts = [
        text.value
        for name, call in named
        if name in ("echo", "print") and module.name != "terminal_text.py"
        for argument in call.args
        for text in ast.walk(argument)
        if isinstance(text, ast.Constant) and isinstance(text.value, str)
    ]
    assert [text for text in texts if "\n" in text] == []
