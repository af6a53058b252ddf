"""Reference pages generated from the code. `make reference` writes them, and a test compares them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jobledger.cli import main
from jobledger.ledger.domain.events import BATCH_EVENTS, DELIVERY_EVENTS, JOB_EVENTS, VALUE_TYPES, PositionVoided

DOCS = Path(__file__).parents[2] / "docs"
_HELP_WIDTH = 100


def render_commands() -> str:
    """Return the reference of all commands: their help pages."""
    parts = ["# Reference: commands", "This page contains the help pages of all commands, as `--help` prints them."]
    for name, page in list_help_pages():
        parts += [f"## {name}", f"```text\n{page}\n```"]
    return "\n\n".join(parts) + "\n"


def list_help_pages(width: int = _HELP_WIDTH) -> list[tuple[str, str]]:
    """Return the names of all commands and groups, and their help pages at a width of the terminal."""
    command: Any = typer.main.get_command(main.app)
    settings = {**command.context_settings, "terminal_width": width}
    return list(_iterate_help_pages(typer.Context(command, info_name="jobledger", **settings)))


def _iterate_help_pages(ctx: Any) -> Iterator[tuple[str, str]]:
    page = "\n".join(line.rstrip() for line in ctx.get_help().splitlines())
    yield ctx.command_path, page
    for name, command in getattr(ctx.command, "commands", {}).items():
        yield from _iterate_help_pages(typer.Context(command, info_name=name, parent=ctx))


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
