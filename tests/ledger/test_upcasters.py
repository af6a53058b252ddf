"""Payloads of other versions: older ones are brought up to date when they are read, newer ones are left alone."""

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
from jobledger.ledger.store.command_handler import load_stream_state, new_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.ledger.store.hash_chain import hash_input
from jobledger.ledger.store.verification import verify_log
from tests.support import golden_events
from tests.support.event_examples import NOON
from tests.support.ledger_setup import (
    DEADLINE_SECONDS,
    EVENT_METADATA,
    Ledger,
    check_log,
    load_event_documents,
    read_all_events,
    read_first_events,
    take_events,
)

EVERY_TYPE = sorted(EVENT_TYPES.values(), key=lambda event: event.__name__)
GOLDEN = {(document["type"], document["schema"]) for document in golden_events.load_golden_events()}


def by_name(kind: type[Event]) -> str:
    return kind.__name__


# The table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY_TYPE, ids=by_name)
def test_there_is_a_step_from_every_older_schema_to_the_next(kind: type[Event]) -> None:
    steps = UPCASTERS.get(kind.__name__, ())
    assert kind.schema_version == 1 + len(steps), (
        f"{kind.__name__} is at schema {kind.schema_version}, and UPCASTS has {len(steps)} steps for it"
    )


@pytest.mark.parametrize("kind", EVERY_TYPE, ids=by_name)
def test_there_is_a_golden_history_of_every_schema_there_ever_was(kind: type[Event]) -> None:
    kept = {(kind.__name__, schema) for schema in range(1, kind.schema_version + 1)}
    assert kept <= GOLDEN, "what was recorded is kept for ever; the new one: python -m tests.support.golden_events"


def test_steps_are_only_for_types_that_exist_and_so_are_golden_histories() -> None:
    """A type that was given a new name would leave its steps behind, and its events unreadable."""
    assert UPCASTERS.keys() <= EVENT_TYPES.keys()
    assert {name for name, _ in GOLDEN} == EVENT_TYPES.keys()
    assert all(schema <= EVENT_TYPES[name].schema_version for name, schema in GOLDEN)


# The mechanism, on a type that is made up -------------------------------------------------------------------------


def room_booked(schema: int, **fields: Any) -> type[Event]:
    kind = create_model("RoomBooked", __base__=Event, **fields)
    kind.schema_version = schema
    return kind


AT_FIRST = room_booked(1, room=(str, ...))
LATER = room_booked(2, building=(str, ...), number=(int, ...))
NOW = room_booked(3, place=(dict[str, Any], ...), seats=(int | None, None))


def _taken_apart(data: dict[str, Any]) -> dict[str, Any]:
    building, number = data["room"].split()
    return {"building": building, "number": int(number)}


def _put_together(data: dict[str, Any]) -> dict[str, Any]:
    data["place"] = {"building": data.pop("building"), "number": data.pop("number")}
    return data


STEPS: Sequence[Upcaster] = (_taken_apart, _put_together)


def known_as(monkeypatch: pytest.MonkeyPatch, kind: type[Event], steps: Sequence[Upcaster] = STEPS) -> None:
    """Have this version of the program know RoomBooked so."""
    monkeypatch.setitem(EVENT_TYPES, "RoomBooked", kind)
    monkeypatch.setitem(UPCASTERS, "RoomBooked", steps)


async def append(ledger: Ledger, *events: Event, stream: str = "room-1", head: StreamHead | None = None) -> None:
    await ledger.event_store.append(StreamAppend(stream, head or StreamHead(), events, EVENT_METADATA, NOON))


async def test_older_payloads_are_brought_up_to_date_step_by_step_and_stay_as_they_were_written(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = [
        AT_FIRST.model_validate({"room": "K 3"}),
        LATER.model_validate({"building": "H", "number": 1302}),
        NOW.model_validate({"place": {"building": "AW", "number": 1}, "seats": 5}),
    ]
    await append(unstreamed_ledger, *written)
    before = await load_event_documents(unstreamed_ledger.db)
    assert [document["schema"] for document in before] == [1, 2, 3]
    known_as(monkeypatch, NOW)

    events = await unstreamed_ledger.event_store.read()

    assert [event.event for event in events] == [
        NOW.model_validate({"place": {"building": "K", "number": 3}}),
        NOW.model_validate({"place": {"building": "H", "number": 1302}}),
        written[2],
    ]
    assert [event.schema for event in events] == [1, 2, 3]
    assert [event.data for event in events] == [event.to_payload() for event in written]
    assert await load_event_documents(unstreamed_ledger.db) == before
    check_log(before)
    assert (await verify_log(unstreamed_ledger.event_store)).problem is None


def document_of(data: Any, *, name: str = "RoomBooked", schema: Any = 1) -> dict[str, Any]:
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


def intact(document: dict[str, Any]) -> dict[str, Any]:
    """Return an event with the hash of its content."""
    return {**document, "hash": sha256(hash_input(document)).digest()}


def test_a_step_is_not_taken_for_a_payload_that_is_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def step(number: int) -> Upcaster:
        def noted(data: dict[str, Any]) -> dict[str, Any]:
            taken.append(number)
            return data

        return noted

    known_as(monkeypatch, room_booked(4), [step(1), step(2), step(3)])
    for schema, expected in [(1, [1, 2, 3]), (2, [2, 3]), (3, [3]), (4, [])]:
        taken.clear()
        event = RecordedEvent(document_of({}, schema=schema))
        assert (event.event, event.event) == (event.event, event.event)
        assert taken == expected


def test_a_step_that_changes_what_lies_within_leaves_the_payload_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(data: dict[str, Any]) -> dict[str, Any]:
        data["place"]["building"] = "K"
        return data

    known_as(monkeypatch, room_booked(2, place=(dict[str, Any], ...)), [moved])
    document = document_of({"place": {"building": "H"}})
    original = deepcopy(document)
    event = RecordedEvent(document)
    assert event.event.to_payload() == {"place": {"building": "K"}}
    assert event.data == original["data"]
    assert document == original


# Newer, unknown, damaged ------------------------------------------------------------------------------------------


def unreadable(document: Mapping[str, Any]) -> str:
    """Check that there is no reading the payload, but all else; return what is said of it."""
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


def test_a_type_that_nobody_knows_yet_is_said_to_be_from_a_later_version() -> None:
    message = unreadable(intact(document_of({"anything": 1}, name="RoomRepainted")))
    assert "with schema 1, which this version of Jobledger does not know" in message
    assert "Upgrade" in message


def test_a_schema_that_nobody_knows_yet_is_said_to_be_from_a_later_version(monkeypatch: pytest.MonkeyPatch) -> None:
    known_as(monkeypatch, NOW)
    message = unreadable(intact(document_of({"place": {}}, schema=4)))
    assert "with schema 4, which this version of Jobledger does not know" in message
    assert "Upgrade" in message
    for kind in EVERY_TYPE:
        unreadable(document_of({}, name=kind.__name__, schema=kind.schema_version + 1))


@pytest.mark.parametrize(("name", "schema"), [("RoomRepainted", 1), ("JobClaimed", 257)])
def test_an_event_whose_hash_is_wrong_is_damaged_and_not_of_a_later_version(name: str, schema: int) -> None:
    document = document_of({"worker_id": "w1", "attempt": 1}, name=name, schema=schema)
    assert "Upgrade" in unreadable(intact(document))
    assert "its hash is wrong" in unreadable(document)


DAMAGED: dict[str, Any] = {
    "a field is missing": {},
    "a field is of another type": {"worker_id": "w1", "attempt": "often"},
    "nothing is there": None,
    "text is there": "w1",
    "a list is there": ["w1", 1],
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_payload_cannot_be_read_and_is_still_there(data: Any) -> None:
    message = unreadable(document_of(data, name=JobClaimed.__name__))
    assert "that cannot be read" in message
    assert "Upgrade" not in message, "that would not help"


@pytest.mark.parametrize("data", [{"worker_id": "w1"}, None], ids=str)
def test_what_cannot_be_read_can_still_be_shown_in_a_message(data: Any) -> None:
    shown = repr(RecordedEvent(document_of(data, name="JobClaimed")))
    assert "JobClaimed" in shown
    assert repr(data) in shown


@pytest.mark.parametrize("data", [{}, {"room": "K"}, {"room": "K three"}, None, [1]], ids=str)
def test_an_old_payload_that_a_step_can_make_nothing_of_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, data: Any
) -> None:
    known_as(monkeypatch, NOW)
    assert "that cannot be read" in unreadable(document_of(data))


def test_an_old_payload_with_nothing_where_a_step_expects_text_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    known_as(monkeypatch, NOW)
    assert "that cannot be read" in unreadable(document_of({"room": None}))


@pytest.mark.parametrize("schema", [0, "1", None], ids=repr)
def test_a_schema_that_never_was_cannot_be_read(monkeypatch: pytest.MonkeyPatch, schema: Any) -> None:
    known_as(monkeypatch, NOW)
    with pytest.raises(UnreadableEvent):
        _ = RecordedEvent(document_of({"building": "H", "number": 1302}, schema=schema)).event


# Who only passes them on ------------------------------------------------------------------------------------------

UNKNOWN: type[Event] = create_model("JobRepainted", __base__=Event, colour=(str, ...))
NEWER = create_model("JobSubmitted", __base__=JobSubmitted)
NEWER.schema_version = JobSubmitted.schema_version + 1
DAMAGED_CLAIM: type[Event] = create_model("JobClaimed", __base__=Event, attempt=(str, ...))


async def a_log_from_the_future(ledger: Ledger) -> None:
    """A job, what this version cannot read (in its stream and in others), and another job."""
    submitted = await ledger.submit_job()
    [event] = submitted.events
    head = submitted.stream_state.head
    later = [UNKNOWN.model_validate({"colour": "red"}), DAMAGED_CLAIM.model_validate({"attempt": "often"})]
    await append(ledger, *later, stream=event.stream, head=head)
    newer = NEWER.model_validate({"job_type": "echo", "parameters": {}, "user_id": "alice"})
    await append(ledger, newer, stream=new_job_id())
    await append(ledger, UNKNOWN.model_validate({"colour": "blue"}), stream="painting-1")
    await ledger.submit_job()


TYPES = ["JobSubmitted", "JobRepainted", "JobClaimed", "JobSubmitted", "JobRepainted", "JobSubmitted"]


async def test_the_log_is_read_past_what_cannot_be_read_and_shows_it_as_it_was_stored(
    unstreamed_ledger: Ledger,
) -> None:
    await a_log_from_the_future(unstreamed_ledger)
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


async def test_a_log_with_what_cannot_be_read_is_still_what_was_written(unstreamed_ledger: Ledger) -> None:
    await a_log_from_the_future(unstreamed_ledger)
    verdict = await verify_log(unstreamed_ledger.event_store)
    assert (verdict.problem, verdict.events) == (None, len(TYPES))
    await unstreamed_ledger.db.events.update_one({"_id": 2}, {"$set": {"data.colour": "green"}})
    verdict = await verify_log(unstreamed_ledger.event_store)
    assert verdict.problem is not None
    assert verdict.problem.position == 2


@pytest.mark.parametrize("live", [False, True], ids=["from history", "as they happen"])
async def test_a_subscriber_passes_over_what_it_has_no_use_for(ledger: Ledger, *, live: bool) -> None:
    if not live:
        await a_log_from_the_future(ledger)
    async with (
        ledger.event_store.subscribe(after=0) as everything,
        ledger.event_store.subscribe(after=4, types=[JobSubmitted, PositionVoided]) as wanted,
    ):
        if live:
            await a_log_from_the_future(ledger)
        [event] = await take_events(wanted, 1)
        assert (event.position, event.type) == (6, "JobSubmitted")
        assert isinstance(event.event, JobSubmitted)
        assert [event.type for event in await take_events(everything, len(TYPES))] == TYPES
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert [event.type for event in await read_first_events(ledger.event_store, len(TYPES))] == TYPES


async def test_a_decision_is_never_based_on_what_cannot_be_read(unstreamed_ledger: Ledger) -> None:
    await a_log_from_the_future(unstreamed_ledger)
    for stream in {event.stream for event in (await read_all_events(unstreamed_ledger.event_store))[:4]}:
        with pytest.raises(UnreadableEvent):
            await load_stream_state(unstreamed_ledger.event_store, stream)
