"""Entries of a job's log, from its events."""

from __future__ import annotations

from typing import Any, Final

from jobledger.ledger.domain import events
from jobledger.ledger.domain.events import LogEntry, RecordedEvent
from jobledger.ledger.mongo.connection import Document

MAX_LOG_ENTRIES: Final = 100
"""The document contains the newest entries. The job's history contains all of them."""
MAX_LOG_ENTRY_CHARACTERS: Final = 10_000
"""Maximum length of an entry in the document: a hundred entries have to fit."""
LOG_EVENT_TYPES: Final[tuple[type[events.Event], ...]] = (
    events.JobLogged,
    events.JobAttemptFailed,
    events.JobFailed,
    events.JobLeaseExpired,
    events.JobReleased,
)
"""The events that add entries to the job's log."""


def build_log_entries(event: RecordedEvent) -> list[LogEntry]:
    """Return the log entries of an event, for readers of the job.

    Raises:
        UnreadableEvent: As `RecordedEvent.event`.
    """
    payload = event.event
    match payload:
        case events.JobLogged():
            return payload.entries
        case events.JobAttemptFailed():
            message = f"Attempt {payload.attempt} failed and will be retried: {payload.error.message}"
            return [_build_entry(event, message)]
        case events.JobFailed():
            return [_build_entry(event, f"Failed: {payload.error.message}", "error")]
        case events.JobLeaseExpired():
            message = "The worker stopped sending heartbeats; another worker picks up the job."
            return [_build_entry(event, message)]
        case events.JobReleased():
            # Readers of the job see this entry, so it names neither the worker nor the error of its machine.
            reason = "its machine cannot run it" if payload.is_machine_failure else payload.reason
            return [_build_entry(event, f"The worker released the job: {reason}", "info")]
        case _:
            return []


def append_log_entries(job: Document, event: RecordedEvent) -> Document:
    """Return the field `logs` of a job with the entries of one more event."""
    entries = build_log_entries(event)
    return {
        "logs": [*job["logs"], *(_truncate_entry(entry) for entry in entries[-MAX_LOG_ENTRIES:])][-MAX_LOG_ENTRIES:]
    }


def _build_entry(event: RecordedEvent, message: str, level: Any = "warning") -> LogEntry:
    return LogEntry(timestamp=event.time, level=level, message=message)


def _truncate_entry(entry: LogEntry) -> Document:
    text = entry.message
    message = text if len(text) <= MAX_LOG_ENTRY_CHARACTERS else f"{text[:MAX_LOG_ENTRY_CHARACTERS]} …"
    return {**entry.model_dump(), "message": message}
