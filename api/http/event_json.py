"""api: an event as JSON. Of one that was damaged in the database a stub is answered, so that others are still read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import orjson

from jobledger.api.auth.redaction import Viewer, redact_event
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.store.storage_format import ENVELOPE_FIELDS, find_data_deviation

_OPTIONS: Final = orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def encode_event(event: RecordedEvent, viewer: Viewer) -> bytes:
    """Return an event as the viewer sees it, or what can be said of it and why it cannot be shown."""
    if (broken := _broken_field(event)) is not None:
        return _stub(event, f"its {broken} is missing or damaged")
    try:
        return orjson.dumps(redact_event(event, viewer), option=_OPTIONS)
    except (TypeError, ValueError, LookupError, AttributeError):
        return _stub(event, find_data_deviation(event.document) or "its content is damaged")


def _broken_field(event: RecordedEvent) -> str | None:
    document = event.document
    for name, kind in ENVELOPE_FIELDS.items():
        if not isinstance(document.get(name), kind):
            return name
    return None


def _stub(event: RecordedEvent, why: str) -> bytes:
    def of(name: str, kind: type, otherwise: Any) -> Any:
        value = event.document.get(name)
        return value if isinstance(value, kind) else otherwise

    stub = {
        "position": event.position,
        "event_id": of("event_id", str, ""),
        "stream": of("stream", str, ""),
        "version": of("version", int, 0),
        "type": of("type", str, ""),
        "time": of("time", datetime, EPOCH),
        "schema": of("schema", int, 0),
        "data": {},
        "meta": {"actor": ""},
        "hash": None,
        "unreadable": f"This event was changed in the database: {why}. `jobledger log verify` says more.",
    }
    return orjson.dumps(stub, option=_OPTIONS)
