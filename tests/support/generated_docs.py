"""Reference pages generated from the code. `make reference` writes them, and a test compares them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.cli import get_docs_for_click

from jobledger.cli import main
from jobledger.ledger.domain.events import BATCH_EVENTS, DELIVERY_EVENTS, JOB_EVENTS, VALUE_TYPES, PositionVoided

DOCS = Path(__file__).parents[2] / "docs"
_EXIT_CODES = """\
## Exit codes

- 0: success
- 1: the operation failed, or a check found a problem
- 2: wrong arguments or settings
- 3: a service is unreachable
- 4: a port, disk, lock or limit of this machine is temporarily unavailable
- 130: interrupted by Ctrl-C; roles exit with 130 only at the second Ctrl-C or SIGTERM
"""


def render_commands() -> str:
    """Return the reference of all commands and options."""
    command: Any = typer.main.get_command(main.app)
    context = typer.Context(command, info_name="jobledger")
    text = get_docs_for_click(obj=command, ctx=context, name="jobledger", title="Reference: commands")
    text = _with_full_summaries(text, command)
    return "\n".join(line.rstrip() for line in f"{text.strip()}\n\n{_EXIT_CODES}".splitlines()) + "\n"


def _with_full_summaries(text: str, command: Any) -> str:
    """Return the text with complete summaries in lists of commands. Typer truncates them."""
    for name, subcommand in getattr(command, "commands", {}).items():
        summary = subcommand.get_short_help_str(limit=1000)
        text = text.replace(f"* `{name}`: {subcommand.get_short_help_str()}\n", f"* `{name}`: {summary}\n")
        text = _with_full_summaries(text, subcommand)
    return text


def render_events() -> str:
    """Return the reference of all events and fields."""
    parts = [
        "# Reference: events",
        "An event is a document of the collection `events`. Its type determines the fields of `data`, listed\n"
        "below. The other fields are the same for all events: `_id` (the position in the log), `event_id`,\n"
        "`stream`, `version` (of the stream), `type`, `schema` (the version of the payload), `time`, `meta` (actor\n"
        "and cause), `prev` (the hash of the stream's previous event) and `hash`.",
    ]
    for title, models in (
        ("Job events", JOB_EVENTS),
        ("Batch events", BATCH_EVENTS),
        ("Delivery events", DELIVERY_EVENTS),
        ("Log events", (PositionVoided,)),
        ("Value types", VALUE_TYPES),
    ):
        parts.append(f"## {title}")
        for model in models:
            parts.append(f"### {model.__name__}")
            parts.append(" ".join((model.__doc__ or "").split()))
            parts.append(_fields(model))
    return "\n\n".join(part for part in parts if part) + "\n"


def _fields(model: type[BaseModel]) -> str:
    rows = [f"| `{name}` | {_type(field)} | {_default(field)} |" for name, field in model.model_fields.items()]
    return "\n".join(["| field | type | default |", "|---|---|---|", *rows]) if rows else ""


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
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"`{value!r}`" if isinstance(value, str | int | float | bool | list | dict | None) else "model default"


GENERATED_FILES = {DOCS / "reference" / "commands.md": render_commands, DOCS / "reference" / "events.md": render_events}

if __name__ == "__main__":
    for path, make in GENERATED_FILES.items():
        path.write_text(make(), encoding="utf-8")
        sys.stdout.write(f"{path}\n")
