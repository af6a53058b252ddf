"""tests: the parts of the reference that are made of the program: `make reference` writes them, a test compares."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer
from pydantic.fields import FieldInfo
from typer.cli import get_docs_for_click

from jobledger.cli import main
from jobledger.ledger.domain.events import BATCH_EVENTS, DELIVERY_EVENTS, JOB_EVENTS, Event, PositionVoided

DOCS = Path(__file__).parents[2] / "docs"


def render_commands() -> str:
    """All commands with their options, from the command line's own definitions."""
    command: Any = typer.main.get_command(main.app)
    context = typer.Context(command, info_name="jobledger")
    text = get_docs_for_click(obj=command, ctx=context, name="jobledger", title="Reference: the commands")
    codes = (
        "Exit codes: 0 success, 1 the operation failed or a check found a problem, 2 wrong arguments or settings, "
        "3 a service is unreachable, 4 a port, disk, lock or limit of this machine is not usable now."
    )
    return "\n".join(line.rstrip() for line in f"{text.strip()}\n\n{codes}\n".splitlines()) + "\n"


def render_events() -> str:
    """All events with their fields, from their models."""
    parts = [
        "# Reference: the events",
        "What can happen, as it stands in `data` of a document of the collection `events`. Beside it: `_id` (the\n"
        "position), `event_id`, `stream`, `version`, `type`, `schema` (the version of the payload), `time`, `meta`\n"
        "(who and why), `prev` and `hash`.",
    ]
    for title, kinds in (
        ("Of a job", JOB_EVENTS),
        ("Of a batch", BATCH_EVENTS),
        ("Of a delivery", DELIVERY_EVENTS),
        ("Of the log itself", (PositionVoided,)),
    ):
        parts.append(f"## {title}")
        for event in kinds:
            parts.append(f"### {event.__name__}")
            parts.append(" ".join((event.__doc__ or "").split()))
            parts.append(_fields(event))
    return "\n\n".join(part for part in parts if part) + "\n"


def _fields(event: type[Event]) -> str:
    rows = [f"| `{name}` | {_type(field)} | {_default(field)} |" for name, field in event.model_fields.items()]
    return "\n".join(["| field | type | without it |", "|---|---|---|", *rows]) if rows else ""


def _type(field: FieldInfo) -> str:
    name = getattr(field.annotation, "__name__", None)
    text = str(field.annotation) if name is None or "[" in str(field.annotation) else name
    for module in ("jobledger.ledger.domain.events.", "typing.", "datetime.", "collections.abc."):
        text = text.replace(module, "")
    text = re.sub(r"Annotated\[([^,]+), [^\]]*\]", r"\1", text)
    text = re.sub(r"Optional\[([^\]]+)\]", r"\1 | None", text)
    return f"`{text}`".replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "is always there"
    value = field.get_default(call_default_factory=True)
    return f"`{value!r}`" if isinstance(value, str | int | float | bool | list | dict | None) else "as the model has it"


GENERATED_FILES = {DOCS / "commands.md": render_commands, DOCS / "events.md": render_events}

if __name__ == "__main__":
    for path, make in GENERATED_FILES.items():
        path.write_text(make(), encoding="utf-8")
        sys.stdout.write(f"{path}\n")
