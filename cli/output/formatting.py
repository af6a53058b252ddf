"""Format timestamps, durations, events and state changes for people."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

from jobledger.cli.output.terminal_text import escape_line

if TYPE_CHECKING:
    from jobledger.ledger.domain.events import RecordedEvent

_CLAIM_VIA: Final = {"dispatched": "with its submission", "fresh": "as a new job", "queue": "from the queue"}
_MAX_VALUE_CHARACTERS: Final = 80
_FAILURE_EVENTS: Final = frozenset(
    {"JobFailed", "JobAttemptFailed", "JobLeaseExpired", "WorkerFenced", "DeliveryAbandoned"}
)
_SUCCESS_EVENTS: Final = frozenset({"JobCompleted", "BatchFinished", "DeliverySucceeded"})
_OMITTED_DATA: Final = frozenset(
    {"parameters", "access_control", "webhook", "job_ids", "schema_version", "output", "outputs", "key", "body_sha256"}
)
_OMITTED_FIELDS: Final = frozenset(
    {"_id", "version", "position", "updated_at", "list_keys", "search_keys", "created_at", "needs_reopen"}
)


def format_timestamp(time: datetime, precision: str = "milliseconds") -> str:
    """Return a time as local time with its UTC offset. Options such as `--as-of` accept this form.

    Args:
        time: A time with an offset.
        precision: The argument `timespec` of `datetime.isoformat`.
    """
    with suppress(OverflowError):  # the first and last day of the calendar keep their offset
        time = time.astimezone()
    return time.isoformat(" ", precision)


def format_duration(seconds: float) -> str:
    """Return a duration with its two largest units: `0.8s`, `42s`, `7m5s`, `2h3m`, `5d4h`. Options accept this form."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f}s"
    rest = round(seconds)
    units = (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1))
    for (unit, size), (smaller_unit, smaller_size) in pairwise(units):
        if rest >= size:
            smaller = rest % size // smaller_size
            return f"{rest // size}{unit}" + (f"{smaller}{smaller_unit}" if smaller else "")
    return f"{rest}s"


def format_age(seconds: float) -> str:
    """Return a duration with its largest unit: `42s`, `7m`, `2h`, `5d`."""
    rest = max(0, int(seconds))
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if rest >= size:
            return f"{rest // size}{unit}"
    return f"{rest}s"


def format_count(count: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun: `1 job`, `2,000 jobs`. The default plural adds an `s`."""
    return f"{count:,} {singular if count == 1 else plural or f'{singular}s'}"


def format_event(event: RecordedEvent, *, with_stream: bool = True) -> Text:
    """Return an event as one line: position, time, stream, type, description and actor."""
    time = format_timestamp(event.time) if isinstance(event.document.get("time"), datetime) else "?"
    style = "red" if event.type in _FAILURE_EVENTS else "green" if event.type in _SUCCESS_EVENTS else "bold"
    parts = [(f"{event.position:>8} ", "dim"), (f"{time} ", "dim")]
    if with_stream:
        parts.append((escape_line(f"{event.stream} "), "cyan"))
    parts += [
        (escape_line(f"{event.type} "), style),
        (escape_line(_describe_or_explain(event)), ""),
        (escape_line(f"  ({event.meta.actor})"), "dim"),
    ]
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _describe_or_explain(event: RecordedEvent) -> str:
    try:
        return describe_event(event)
    except (AttributeError, IndexError, LookupError, TypeError, ValueError):
        return "unreadable, run `jobledger log verify`"


def describe_event(event: RecordedEvent) -> str:
    """Return the data of an event as a short text."""
    data = event.data
    match event.type:
        case "JobSubmitted":
            title = data.get("job_name") or data.get("parameters", {}).get("session") or ""
            return f"{data['job_type']} {title!r} by {data['user_id']}"
        case "BatchSubmitted":
            return (
                f"{data.get('batch_name') or ''!r} with {format_count(data['total_jobs'], 'job')} by {data['user_id']}"
            )
        case "JobClaimed":
            via = f" ({_CLAIM_VIA[data['via']]})" if data.get("via") in _CLAIM_VIA else ""
            return f"attempt {data['attempt']} on {data['worker_id']}{via}"
        case "WorkerStarted":
            slots = format_count(data["slots"], "slot")
            return f"{slots} for {', '.join(data['job_types'])} on {data['host']}, version {data['software_version']}"
        case "WorkerStopped":
            return str(data["reason"])
        case "JobProgressed":
            message = data.get("message") or ""
            return f"{data['percent']:g} % {data['step']} {message}".rstrip()
        case "JobLogged":
            entries = data["entries"]
            count = format_count(len(entries), "entry", "entries")
            return f"{count}: {entries[0]['message']}" if entries else count
        case "StepCompleted":
            reused = f", reused from {data['reused_from']}" if data.get("reused_from") else ""
            return f"{data['step']} in {data['duration_s']:g} s{reused}"
        case "JobCompleted":
            return format_count(len(data["results"]["files"]), "file")
        case "JobAttemptFailed" | "JobFailed":
            retry_at = data.get("retry_at")
            retry = f"; retry at {format_timestamp(retry_at)}" if isinstance(retry_at, datetime) else ""
            return f"{data['error']['code']}: {data['error']['message']}{retry}"
        case "JobUpdated" if data.get("difference"):
            shown = {name: value for name, value in data.items() if name not in ("parameters", "difference")}
            changes = ", ".join(_format_parameter_change(change) for change in data["difference"])
            return ", ".join(part for part in (changes, _format_fields(shown)) if part)
        case _:
            return _format_fields(data)


def _format_fields(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_format_value(value)}" for name, value in data.items() if name not in _OMITTED_DATA)


def _format_parameter_change(change: Mapping[str, Any]) -> str:
    if change["kind"] == "removed":
        return f"{change['name']} removed"
    before, after = (_format_value(change[name]) for name in ("before", "after"))
    return f"{change['name']} {after}" if change["kind"] == "added" else f"{change['name']} {before} → {after}"


def _format_value(value: Any) -> str:
    if isinstance(value, datetime):
        return format_timestamp(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} {_format_value(item)}" for name, item in value.items()) + "}"
    text = str(value)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[: _MAX_VALUE_CHARACTERS - 1]}…"


def format_changes(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """Return the changes between two states as one line, such as `status pending → processing, worker_id w1`."""
    if after is None:
        return "" if before is None else "removed"
    changes = []
    for name, value in after.items():
        old = (before or {}).get(name)
        if name in _OMITTED_FIELDS or value == old or (before is None and value in (None, [], {}, False, 0)):
            continue
        if isinstance(value, dict | list):
            text = _format_value(value)
            changes.append(f"{name} {text if len(text) <= _MAX_VALUE_CHARACTERS else _format_size(value)}")
        elif before is None or old is None:
            changes.append(f"{name} {_format_value(value)}")
        else:
            changes.append(f"{name} {_format_value(old)} → {_format_value(value)}")
    return escape_line(", ".join(changes))


def _format_size(value: dict[str, Any] | list[Any]) -> str:
    return f"{{{len(value)}}}" if isinstance(value, dict) else f"[{len(value)}]"
