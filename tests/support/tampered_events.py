"""Events with fields changed in the database to another BSON type, often with the same JSON."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from bson import Binary, Code, DBRef, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.datetime_ms import DatetimeMS

from jobledger.ledger.domain.events import JobSubmitted
from tests.support.event_examples import NOON

ORIGINAL_EVENT = JobSubmitted(
    job_type="echo",
    parameters={
        "text": "deadbeef",
        "at": "2025-02-01T12:00:00.123Z",
        "numbers": [1, 2.5, -7],
        "flag": True,
        "nothing": None,
        "inner": {"a": 1, "b": "x"},
    },
    user_id="alice",
    not_before=NOON,
)
TIMESTAMP = datetime(2025, 2, 1, 12, 0, 0, 123000, tzinfo=UTC)
TAMPERED_FIELDS: dict[str, tuple[str, Any, str]] = {
    "text to bytes with the same JSON": (
        "data.parameters.text",
        b"\xde\xad\xbe\xef",
        "data.parameters.text is a bytes",
    ),
    "text to bytes of another subtype": (
        "data.parameters.text",
        Binary(b"\xde\xad\xbe\xef", 5),
        "data.parameters.text is a Binary",
    ),
    "text to a UUID": ("data.parameters.text", Binary(bytes(16), 4), "data.parameters.text is a Binary"),
    "text to code": ("data.parameters.text", Code("deadbeef"), "data.parameters.text is a Code"),
    "text to code with a scope": ("data.parameters.text", Code("deadbeef", {}), "data.parameters.text is a Code"),
    "text to a regular expression": ("data.parameters.text", Regex("deadbeef"), "data.parameters.text is a Regex"),
    "text to an ObjectId": ("data.parameters.text", ObjectId("de" * 12), "data.parameters.text is a ObjectId"),
    "text to a time": ("data.parameters.at", TIMESTAMP, "data.parameters.at is a datetime"),
    "text to a time outside the calendar": (
        "data.parameters.at",
        DatetimeMS(2**60),
        "data.parameters.at is a DatetimeMS",
    ),
    "text to a timestamp": ("data.parameters.at", Timestamp(1, 1), "data.parameters.at is a Timestamp"),
    "text to MinKey": ("data.parameters.text", MinKey(), "data.parameters.text is a MinKey"),
    "text to MaxKey": ("data.parameters.text", MaxKey(), "data.parameters.text is a MaxKey"),
    "an object to a DBRef": ("data.parameters.inner", DBRef("jobs", 1), "data.parameters.inner is a DBRef"),
    "a number to an Int64": ("data.parameters.numbers.0", Int64(1), "data.parameters.numbers.0 is a Int64"),
    "a number to a decimal": (
        "data.parameters.numbers.1",
        Decimal128("2.5"),
        "data.parameters.numbers.1 is a Decimal128",
    ),
    "a field's integer to a float": ("data.priority", 1.0, "data.priority is a float"),
    "a field's integer to an Int64": ("data.priority", Int64(1), "data.priority is a Int64"),
    "a field's integer to a decimal": ("data.priority", Decimal128("1"), "data.priority is a Decimal128"),
    "a field's whole number to a float": ("data.timeout_s", 3600.0, "data.timeout_s is a float"),
    "a field's text to bytes": ("data.user_id", b"\xaa", "data.user_id is a bytes"),
    "a field's text to code": ("data.job_type", Code("echo"), "data.job_type is a Code"),
    "a field's time to its text": ("data.not_before", "2025-02-01T12:00:00.123Z", "hash"),
    "actor to code": ("meta.actor", Code("user:alice"), "meta.actor is a Code"),
    "actor to bytes": ("meta.actor", b"\xab", "meta.actor is a bytes"),
    "actor to a time": ("meta.actor", TIMESTAMP, "meta.actor is a datetime"),
    **{
        f"{name} of the envelope to {type(value).__name__}": (name, value, f"its {name} is a {type(value).__name__}")
        for name in ("event_id", "stream", "type", "version", "schema", "time", "data", "meta", "prev", "hash")
        for value in (
            Code("x"),
            Binary(b"x", 5),
            Int64(7),
            7.0,
            Decimal128("7"),
            ObjectId(),
            Regex("x"),
            Timestamp(1, 1),
            MinKey(),
            DBRef("x", 1),
            DatetimeMS(2**60),
        )
    },
}
"""Path in ORIGINAL_EVENT, the changed value, and the message of `log verify`."""
