"""Encode events as JSON. A damaged event becomes a stub, so that the other events can still be read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import orjson

from jobledger.api.auth.redaction import Viewer, redact_event
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.store.storage_format import ENVELOPE_FIELDS, find_data_deviation

_OPTIONS: Final = orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_STUB_DEFAULTS: Final = {"event_id": "", "stream": "", "version": 0, "type": "", "time": EPOCH, "schema": 0}
"""Values of a stub for fields that are missing or have another type."""


def encode_event(event: RecordedEvent, viewer: Viewer) -> bytes:
    """Return an event as the viewer sees it. For a damaged event, return a stub with the reason."""
    document = event.document
    for field, kind in ENVELOPE_FIELDS.items():
        if not isinstance(document.get(field), kind):
            return _build_stub(event, f"its {field} is missing or damaged")
    try:
        return orjson.dumps(redact_event(event, viewer), option=_OPTIONS)
    except (TypeError, ValueError, LookupError, AttributeError):
        return _build_stub(event, find_data_deviation(event.document) or "its content is damaged")


def _build_stub(event: RecordedEvent, reason: str) -> bytes:
    stub: dict[str, Any] = {"position": event.position}
    for name, default in _STUB_DEFAULTS.items():
        value = event.document.get(name)
        stub[name] = value if isinstance(value, type(default)) else default
    stub |= {"data": {}, "meta": {"actor": ""}, "hash": None}
    stub["unreadable"] = f"This event was changed in the database: {reason}. Run `jobledger log verify`."
    return orjson.dumps(stub, option=_OPTIONS)
