"""cli: events in a line each, for people."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

from jobledger.cli.terminal_text import escape_line

if TYPE_CHECKING:
    from jobledger.ledger.domain.events import RecordedEvent

_LONGEST: Final = 80
_BAD: Final = frozenset({"JobFailed", "JobAttemptFailed", "JobLeaseExpired", "WorkerFenced", "DeliveryAbandoned"})
_GOOD: Final = frozenset({"JobCompleted", "BatchFinished", "DeliverySucceeded"})
_LEFT_OUT: Final = frozenset(
    {"parameters", "access_control", "webhook", "job_ids", "schema_version", "output", "outputs", "key", "body_sha256"}
)


def format_timestamp(time: datetime, precision: str = "milliseconds") -> str:
    """Return a time as it is on the clocks here, with its offset from UTC, as options take it.

    Args:
        time: a time with an offset.
        precision: what `datetime.isoformat` calls `timespec`.
    """
    with suppress(OverflowError):  # at the ends of the calendar it stays as it is
        time = time.astimezone()
    return time.isoformat(" ", precision)


def format_duration(seconds: float) -> str:
    """Return how long something took: `0.8 s`, `42 s`, `7 min 5 s`, `2 h 3 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_event(event: RecordedEvent, *, with_stream: bool = True) -> Text:
    """Return an event as a line: where it is, when it was, what happened, and by whom."""
    kind, when = event.type, format_timestamp(event.time) if isinstance(event.document.get("time"), datetime) else "?"
    style = "red" if kind in _BAD else "green" if kind in _GOOD else "bold"
    parts = [(f"{event.position:>8} ", "dim"), (f"{when} ", "dim")]
    if with_stream:
        parts.append((escape_line(f"{event.stream} "), "cyan"))
    parts += [
        (escape_line(f"{kind} "), style),
        (escape_line(_said_or_why_not(event)), ""),
        (escape_line(f"  ({event.meta.actor})"), "dim"),
    ]
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _said_or_why_not(event: RecordedEvent) -> str:
    try:
        return describe_event(event)
    except (AttributeError, IndexError, LookupError, TypeError, ValueError):
        return "cannot be read: `jobledger log verify` says more"


def describe_event(event: RecordedEvent) -> str:
    """Return what an event says, in a few words."""
    data = event.data
    match event.type:
        case "JobSubmitted":
            title = data.get("job_name") or data.get("parameters", {}).get("session") or ""
            return f"{data['job_type']} {title!r} of {data['user_id']}"
        case "BatchSubmitted":
            return f"{data.get('batch_name') or ''!r} with {data['total_jobs']} jobs of {data['user_id']}"
        case "JobClaimed":
            return f"attempt {data['attempt']} by {data['worker_id']}"
        case "JobProgressed":
            message = data.get("message") or ""
            return f"{data['percent']:g} % {data['step']} {message}".rstrip()
        case "JobLogged":
            lines = data["entries"] if "entries" in data else data.get("lines", ())
            return f"{len(lines)} lines: {lines[0]['message']}" if lines else "nothing"
        case "StepCompleted":
            reused = f", taken from {data['reused_from']}" if data.get("reused_from") else ""
            return f"{data['step']} in {data['duration_s']:g} s{reused}"
        case "JobCompleted":
            return f"{len(data['results']['files'])} files"
        case "JobAttemptFailed" | "JobFailed":
            again = (
                f"; again at {format_timestamp(data['retry_at'])}" if isinstance(data.get("retry_at"), datetime) else ""
            )
            return f"{data['error']['code']}: {data['error']['message']}{again}"
        case _:
            return ", ".join(f"{name} {_short(value)}" for name, value in data.items() if name not in _LEFT_OUT)


def _short(value: Any) -> str:
    if isinstance(value, datetime):
        return format_timestamp(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} {_short(item)}" for name, item in value.items()) + "}"
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def format_changes(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """Return in a line what an event has made of a document: `status pending → processing, worker_id w1`."""
    if after is None:
        return "removed"
    told = []
    for name, value in after.items():
        old = (before or {}).get(name)
        if name in _OMITTED_FIELDS or value == old or (before is None and value in (None, [], {}, False, 0)):
            continue
        if isinstance(value, dict | list):
            short = _short(value)
            told.append(f"{name} {short if len(short) <= _LONGEST else _size(value)}")
        elif before is None or old is None:
            told.append(f"{name} {_short(value)}")
        else:
            told.append(f"{name} {_short(old)} → {_short(value)}")
    return escape_line(", ".join(told))


_OMITTED_FIELDS: Final = frozenset(
    {"_id", "version", "position", "updated_at", "list_keys", "search_keys", "created_at", "needs_reopen"}
)


def _size(value: dict[str, Any] | list[Any]) -> str:
    return f"{{{len(value)}}}" if isinstance(value, dict) else f"[{len(value)}]"
