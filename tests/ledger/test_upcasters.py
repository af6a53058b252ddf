"""Upcasters: older payloads are converted when they are read. Newer payloads stay as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from copy import deepcopy
from hashlib import sha256
from typing import Any

import pytest
from pydantic import create_model

from jobledger.ledger.domain.errors import ConfigurationError, UnreadableEvent
from jobledger.ledger.domain.events import (
    EVENT_TYPES,
    UPCASTERS,
    Event,
    JobClaimed,
    JobSubmitted,
    PositionVoided,
    RecordedEvent,
    Upcaster,
)
from jobledger.ledger.store.command_handler import create_job_id, load_stream_state
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.ledger.store.hash_chain import build_hash_input
from jobledger.ledger.store.verification import verify_log
from tests.support import golden_events
from tests.support.decider_spec import type_name
from tests.support.event_examples import NOON
from tests.support.ledger_setup import (
    EVENT_METADATA,
    Ledger,
    check_log,
    load_event_documents,
    read_all_events,
    read_first_events,
    take_events,
)
from tests.support.polling import DEADLINE_SECONDS

ALL_EVENT_TYPES = sorted(EVENT_TYPES.values(), key=lambda event: event.__name__)
GOLDEN_SCHEMAS = {(document["type"], document["schema"]) for document in golden_events.load_golden_events()}


# The table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_EVENT_TYPES, ids=type_name)
def test_every_older_schema_has_an_upcaster(kind: type[Event]) -> None:
    steps = UPCASTERS.get(kind.__name__, ())
    assert kind.schema_version == 1 + len(steps), (
        f"{kind.__name__} is at schema {kind.schema_version}, and UPCASTERS has {len(steps)} steps for it"
    )


@pytest.mark.parametrize("kind", ALL_EVENT_TYPES, ids=type_name)
def test_every_schema_has_a_golden_event(kind: type[Event]) -> None:
    required = {(kind.__name__, schema) for schema in range(1, kind.schema_version + 1)}
    assert required <= GOLDEN_SCHEMAS, (
        "keep all golden events; record the new one: python -m tests.support.golden_events"
    )


def test_upcasters_and_golden_events_have_known_types() -> None:
    """A renamed type would lose its upcasters, and its events would be unreadable."""
    assert UPCASTERS.keys() <= EVENT_TYPES.keys()
    assert {name for name, _ in GOLDEN_SCHEMAS} == EVENT_TYPES.keys()
    assert all(schema <= EVENT_TYPES[name].schema_version for name, schema in GOLDEN_SCHEMAS)


# Upcasting of an invented type ------------------------------------------------------------------------------------


def create_room_booked(schema: int, **fields: Any) -> type[Event]:
    kind = create_model("RoomBooked", __base__=Event, **fields)
    kind.schema_version = schema
    return kind


SCHEMA_1 = create_room_booked(1, room=(str, ...))
SCHEMA_2 = create_room_booked(2, building=(str, ...), number=(int, ...))
SCHEMA_3 = create_room_booked(3, place=(dict[str, Any], ...), seats=(int | None, None))


def _split_room(data: dict[str, Any]) -> dict[str, Any]:
    building, number = data["room"].split()
    return {"building": building, "number": int(number)}


def _build_place(data: dict[str, Any]) -> dict[str, Any]:
    data["place"] = {"building": data.pop("building"), "number": data.pop("number")}
    return data


STEPS: Sequence[Upcaster] = (_split_room, _build_place)


def register_type(monkeypatch: pytest.MonkeyPatch, kind: type[Event], steps: Sequence[Upcaster] = STEPS) -> None:
    """Register a version of RoomBooked and its upcasters."""
    monkeypatch.setitem(EVENT_TYPES, "RoomBooked", kind)
    monkeypatch.setitem(UPCASTERS, "RoomBooked", steps)


async def append(ledger: Ledger, *events: Event, stream: str = "room-1", head: StreamHead | None = None) -> None:
    await ledger.event_store.append(StreamAppend(stream, head or StreamHead(), events, EVENT_METADATA, NOON))


async def test_old_payloads_are_upcast_on_read_and_stay_stored(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = [
        SCHEMA_1.model_validate({"room": "K 3"}),
        SCHEMA_2.model_validate({"building": "H", "number": 1302}),
        SCHEMA_3.model_validate({"place": {"building": "AW", "number": 1}, "seats": 5}),
    ]
    await append(unstreamed_ledger, *written)
    before = await load_event_documents(unstreamed_ledger.db)
    assert [document["schema"] for document in before] == [1, 2, 3]
    register_type(monkeypatch, SCHEMA_3)

    events = await unstreamed_ledger.event_store.read()

    assert [event.event for event in events] == [
        SCHEMA_3.model_validate({"place": {"building": "K", "number": 3}}),
        SCHEMA_3.model_validate({"place": {"building": "H", "number": 1302}}),
        written[2],
    ]
    assert [event.schema for event in events] == [1, 2, 3]
    assert [event.data for event in events] == [event.to_payload() for event in written]
    assert await load_event_documents(unstreamed_ledger.db) == before
    check_log(before)
    assert (await verify_log(unstreamed_ledger.event_store)).problem is None


def build_document(data: Any, *, name: str = "RoomBooked", schema: Any = 1) -> dict[str, Any]:
    return {
        "_id": 7,
        "event_id": "01a209d5-0be5-70bb-a8c6-9560ad79fa4f",
        "stream": "room-1",
        "version": 2,
        "type": name,
        "schema": schema,
        "time": NOON,
        "data": data,
        "meta": {"actor": "user:alice"},
        "prev": bytes(32),
        "hash": b"\7" * 32,
    }


def add_hash(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with the hash of its content."""
    return {**document, "hash": sha256(build_hash_input(document)).digest()}


def test_upcasters_before_stored_schema_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    applied_steps: list[int] = []

    def step(number: int) -> Upcaster:
        def record_step(data: dict[str, Any]) -> dict[str, Any]:
            applied_steps.append(number)
            return data

        return record_step

    register_type(monkeypatch, create_room_booked(4), [step(1), step(2), step(3)])
    for schema, expected in [(1, [1, 2, 3]), (2, [2, 3]), (3, [3]), (4, [])]:
        applied_steps.clear()
        event = RecordedEvent(build_document({}, schema=schema))
        assert (event.event, event.event) == (event.event, event.event)
        assert applied_steps == expected


def test_upcaster_that_mutates_payload_keeps_original(monkeypatch: pytest.MonkeyPatch) -> None:
    def change_place(data: dict[str, Any]) -> dict[str, Any]:
        data["place"]["building"] = "K"
        return data

    register_type(monkeypatch, create_room_booked(2, place=(dict[str, Any], ...)), [change_place])
    document = build_document({"place": {"building": "H"}})
    original = deepcopy(document)
    event = RecordedEvent(document)
    assert event.event.to_payload() == {"place": {"building": "K"}}
    assert event.data == original["data"]
    assert document == original


# Newer, unknown and damaged events --------------------------------------------------------------------------------


def check_unreadable(document: Mapping[str, Any]) -> str:
    """Check that only the payload is unreadable. Return the error message."""
    event = RecordedEvent(document)
    with pytest.raises(UnreadableEvent) as raised:
        _ = event.event
    with pytest.raises(UnreadableEvent):
        _ = event.event
    assert isinstance(raised.value, ConfigurationError)
    assert (event.position, event.stream, event.version) == (7, "room-1", 2)
    assert (event.type, event.schema, event.data) == (document["type"], document["schema"], document["data"])
    assert (event.event_id, event.time, event.hash) == (document["event_id"], NOON, document["hash"])
    assert event.meta.actor == "user:alice"
    message = str(raised.value)
    assert message.startswith(f"At position 7 of the log (room-1, version 2) is a {document['type']} ")
    return message


def test_unknown_type_error_suggests_upgrade() -> None:
    message = check_unreadable(add_hash(build_document({"anything": 1}, name="RoomRepainted")))
    assert "with schema 1, which this version of Jobledger does not know" in message
    assert "Upgrade" in message


def test_newer_schema_error_suggests_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    register_type(monkeypatch, SCHEMA_3)
    message = check_unreadable(add_hash(build_document({"place": {}}, schema=4)))
    assert "with schema 4, which this version of Jobledger does not know" in message
    assert "Upgrade" in message
    for kind in ALL_EVENT_TYPES:
        check_unreadable(build_document({}, name=kind.__name__, schema=kind.schema_version + 1))


@pytest.mark.parametrize(("name", "schema"), [("RoomRepainted", 1), ("JobClaimed", 257)])
def test_unknown_event_with_wrong_hash_is_reported_as_damaged(name: str, schema: int) -> None:
    document = build_document({"worker_id": "w1", "attempt": 1}, name=name, schema=schema)
    assert "Upgrade" in check_unreadable(add_hash(document))
    assert "its hash is wrong" in check_unreadable(document)


DAMAGED: dict[str, Any] = {
    "missing field": {},
    "field of another type": {"worker_id": "w1", "attempt": "often"},
    "none": None,
    "text": "w1",
    "list": ["w1", 1],
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_payload_is_unreadable_and_kept(data: Any) -> None:
    message = check_unreadable(build_document(data, name=JobClaimed.__name__))
    assert "that cannot be read" in message
    assert "Upgrade" not in message, "an upgrade would not help"


@pytest.mark.parametrize("data", [{"worker_id": "w1"}, None], ids=str)
def test_repr_of_unreadable_event_shows_payload(data: Any) -> None:
    text = repr(RecordedEvent(build_document(data, name="JobClaimed")))
    assert "JobClaimed" in text
    assert repr(data) in text


@pytest.mark.parametrize("data", [{}, {"room": "K"}, {"room": "K three"}, None, [1]], ids=str)
def test_payload_that_fails_in_upcaster_is_unreadable(monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    register_type(monkeypatch, SCHEMA_3)
    assert "that cannot be read" in check_unreadable(build_document(data))


def test_none_where_upcaster_expects_text_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    register_type(monkeypatch, SCHEMA_3)
    assert "that cannot be read" in check_unreadable(build_document({"room": None}))


@pytest.mark.parametrize("schema", [0, "1", None], ids=repr)
def test_invalid_schema_is_unreadable(monkeypatch: pytest.MonkeyPatch, schema: Any) -> None:
    register_type(monkeypatch, SCHEMA_3)
    with pytest.raises(UnreadableEvent):
        _ = RecordedEvent(build_document({"building": "H", "number": 1302}, schema=schema)).event


# Readers of unreadable events -------------------------------------------------------------------------------------

UNKNOWN: type[Event] = create_model("JobRepainted", __base__=Event, colour=(str, ...))
NEWER = create_model("JobSubmitted", __base__=JobSubmitted)
NEWER.schema_version = JobSubmitted.schema_version + 1
DAMAGED_CLAIM: type[Event] = create_model("JobClaimed", __base__=Event, attempt=(str, ...))


async def append_unreadable_events(ledger: Ledger) -> None:
    """Append a job, events that this version cannot read (in its stream and in others), and another job."""
    submitted = await ledger.submit_job()
    [event] = submitted.events
    head = submitted.stream_state.head
    later = [UNKNOWN.model_validate({"colour": "red"}), DAMAGED_CLAIM.model_validate({"attempt": "often"})]
    await append(ledger, *later, stream=event.stream, head=head)
    newer = NEWER.model_validate({"job_type": "echo", "parameters": {}, "user_id": "alice"})
    await append(ledger, newer, stream=create_job_id())
    await append(ledger, UNKNOWN.model_validate({"colour": "blue"}), stream="painting-1")
    await ledger.submit_job()


TYPES = ["JobSubmitted", "JobRepainted", "JobClaimed", "JobSubmitted", "JobRepainted", "JobSubmitted"]


async def test_read_returns_unreadable_events_as_stored(
    unstreamed_ledger: Ledger,
) -> None:
    await append_unreadable_events(unstreamed_ledger)
    documents = await load_event_documents(unstreamed_ledger.db)
    events = await read_all_events(unstreamed_ledger.event_store)
    assert [event.type for event in events] == TYPES
    assert [event.data for event in events] == [document["data"] for document in documents]
    assert [event.hash for event in events] == [document["hash"] for document in documents]
    assert events[1].data == {"colour": "red"}
    assert events[3].schema == 2
    assert [event.type for event in await unstreamed_ledger.event_store.read_stream(events[0].stream)] == TYPES[:3]
    for position in (2, 3, 4, 5):
        with pytest.raises(UnreadableEvent, match=f"At position {position} of the log"):
            _ = events[position - 1].event


async def test_verification_accepts_unreadable_events(unstreamed_ledger: Ledger) -> None:
    await append_unreadable_events(unstreamed_ledger)
    result = await verify_log(unstreamed_ledger.event_store)
    assert (result.problem, result.events) == (None, len(TYPES))
    await unstreamed_ledger.db.events.update_one({"_id": 2}, {"$set": {"data.colour": "green"}})
    result = await verify_log(unstreamed_ledger.event_store)
    assert result.problem is not None
    assert result.problem.position == 2


@pytest.mark.parametrize("live", [False, True], ids=["history", "live"])
async def test_subscription_passes_unreadable_events(ledger: Ledger, *, live: bool) -> None:
    if not live:
        await append_unreadable_events(ledger)
    async with (
        ledger.event_store.subscribe(after=0) as all_events,
        ledger.event_store.subscribe(after=4, types=[JobSubmitted, PositionVoided]) as submissions,
    ):
        if live:
            await append_unreadable_events(ledger)
        [event] = await take_events(submissions, 1)
        assert (event.position, event.type) == (6, "JobSubmitted")
        assert isinstance(event.event, JobSubmitted)
        assert [event.type for event in await take_events(all_events, len(TYPES))] == TYPES
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert [event.type for event in await read_first_events(ledger.event_store, len(TYPES))] == TYPES


async def test_stream_state_with_unreadable_event_raises(unstreamed_ledger: Ledger) -> None:
    await append_unreadable_events(unstreamed_ledger)
    for stream in {event.stream for event in (await read_all_events(unstreamed_ledger.event_store))[:4]}:
        with pytest.raises(UnreadableEvent):
            await load_stream_state(unstreamed_ledger.event_store, stream)
