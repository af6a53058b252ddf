"""Verification against a real database: what was written is right, and whatever was done to it behind our back is found
and named, at the place where it stands."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from copy import deepcopy
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any

import bson
import pytest
from bson import Code, Decimal128, Int64, ObjectId
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.canonical_json import canonical_json
from jobledger.ledger.domain.commands import ChangeAccess, ClaimJob, ReportProgress, SubmitBatch, SubmitJob
from jobledger.ledger.domain.delivery import delivery_id_for
from jobledger.ledger.domain.errors import InvalidEvent
from jobledger.ledger.domain.events import BATCH_EVENTS, DELIVERY_EVENTS, JOB_EVENTS, BatchSubmitted
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store import verification
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.command_handler import create_streams, handle_command, new_batch_id, new_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead, build_void_document
from jobledger.ledger.store.event_store import EventStore, StoredDocument
from jobledger.ledger.store.hash_chain import GENESIS_HASH, hash_input
from jobledger.ledger.store.verification import IntegrityProblem, VerificationResult, verify_log
from tests.support.event_examples import ACCESS, EVENT_EXAMPLES, NOON, make_job_submitted
from tests.support.ledger_setup import (
    DEADLINE_SECONDS,
    EVENT_METADATA,
    Ledger,
    create_position_gap,
    load_event_documents,
    open_ledger,
    read_all_events,
)
from tests.support.strategies import JSON, OBJECTS
from tests.support.tampered_events import ORIGINAL_EVENT, TAMPERED_FIELDS, TIMESTAMP

PAGE = 7
HASTY = EventStoreLimits(gap_timeout_seconds=0.02)
"""Hardly any patience with holes: for logs to which nobody writes while they are checked."""
PATIENT = EventStoreLimits(gap_timeout_seconds=0.6)


@pytest.fixture
async def quiet(connection: Connection) -> AsyncIterator[Ledger]:
    async with open_ledger(connection, HASTY, with_change_stream=False) as ledger:
        yield ledger


class SmallPages(EventStore):
    """A log that is read in so many steps that a test's few events make a long one."""

    async def read_documents(self, *, after: int, limit: int) -> list[StoredDocument]:
        return await super().read_documents(after=after, limit=min(limit, PAGE))


async def a_history(ledger: Ledger) -> list[Document]:
    """Two jobs by turns, a batch in one transaction, and two positions whose writer has died. All of it is right."""
    one, two = await ledger.submit_job(), await ledger.submit_job()  # positions 1 and 2
    streams = [submitted.events[0].stream for submitted in (one, two)]
    for stream in streams:  # 3 and 4
        await handle_command(ledger.event_store, stream, ClaimJob("w1", NOON), meta=EVENT_METADATA)
    assert await create_position_gap(ledger.db, 2) == 5  # 5 and 6
    batch_id, job_ids = new_batch_id(), [new_job_id(), new_job_id()]
    batch = SubmitBatch(BatchSubmitted(total_jobs=2, job_ids=job_ids, user_id="alice"))
    await create_streams(  # 7 to 9
        ledger.event_store,
        [(batch_id, batch), *((job_id, SubmitJob(make_job_submitted())) for job_id in job_ids)],
        meta=EVENT_METADATA,
    )
    for stream in streams:  # 10 and 11
        await handle_command(
            ledger.event_store, stream, ReportProgress("w1", 1, "page", 12.5, "half"), meta=EVENT_METADATA
        )
    await read_all_events(ledger.event_store)
    documents = await load_event_documents(ledger.db)
    assert [document["type"] for document in documents[4:6]] == ["PositionVoided"] * 2
    assert [document["_id"] for document in documents] == list(range(1, 12))
    return documents


LAST = 11
NOT_AS_NOTED = "what stands up to here is not what was noted; each event fits the others"


async def every_type(ledger: Ledger) -> list[Document]:
    """One event of each type, with all that it can say."""
    for stream, members in (
        (new_job_id(), JOB_EVENTS),
        (new_batch_id(), BATCH_EVENTS),
        (delivery_id_for("job-1", 5), DELIVERY_EVENTS),
    ):
        events = [example for example in EVENT_EXAMPLES if type(example) in members]
        await ledger.event_store.append(StreamAppend(stream, StreamHead(), events, EVENT_METADATA, NOON))
    await create_position_gap(ledger.db)
    await ledger.submit_job()
    await read_all_events(ledger.event_store)
    return await load_event_documents(ledger.db)


def with_its_hash(document: Document) -> Document:
    return document | {"hash": sha256(hash_input(document)).digest()}


def noted(documents: Sequence[Document]) -> tuple[int, bytes]:
    """What a check of the whole log up to the last of these would have had noted."""
    digest = GENESIS_HASH
    for document in documents:
        digest = sha256(digest + document["hash"]).digest()
    return documents[-1]["_id"], digest


def note_of(verdict: VerificationResult) -> tuple[int, bytes] | None:
    return (verdict.position, verdict.digest) if verdict.events and verdict.digest is not None else None


async def put(ledger: Ledger, *documents: Document) -> None:
    """Have these stand where they say, whatever stood there."""
    for document in documents:
        await ledger.db.events.delete_one({"_id": document["_id"]})
    await ledger.db.events.insert_many([{"_id": document["_id"], **document} for document in documents])


async def move(ledger: Ledger, document: Document, position: Any) -> None:
    await ledger.db.events.delete_one({"_id": document["_id"]})
    await ledger.db.events.insert_one(document | {"_id": position})


def right(verdict: VerificationResult) -> VerificationResult:
    assert verdict.problem is None, str(verdict.problem)
    return verdict


def wrong_at(verdict: VerificationResult, document: Document, *words: str, after: int = 0) -> IntegrityProblem:
    """Check that the first wrong event is this one, and that those before it were found right."""
    wrong = verdict.problem
    assert wrong is not None, f"nothing was found, expected {words} at {document['_id']}"
    assert (wrong.position, wrong.stream, wrong.version) == (
        document["_id"],
        document["stream"],
        document["version"],
    ), str(wrong)
    assert (verdict.events, verdict.position) == (document["_id"] - 1 - after, document["_id"] - 1)
    for word in words:
        assert word in wrong.description, str(wrong)
    assert f"position {document['_id']} ({document['stream']}, version {document['version']}): " in str(wrong)
    return wrong


def missing_at(verdict: VerificationResult, position: int) -> None:
    wrong = verdict.problem
    assert wrong is not None
    assert (wrong.position, wrong.stream, wrong.version) == (position, None, None), str(wrong)
    assert wrong.description.startswith("missing")
    assert (verdict.events, verdict.position) == (position - 1, position - 1)


# What was written is right ----------------------------------------------------------------------------------------


async def test_what_was_written_is_right(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    assert await verify_log(unstreamed_ledger.event_store) == VerificationResult(
        LAST, 2, LAST, noted(documents)[1], None
    )


async def test_every_type_of_event_as_full_as_it_gets_is_right(unstreamed_ledger: Ledger) -> None:
    documents = await every_type(unstreamed_ledger)
    assert right(await verify_log(unstreamed_ledger.event_store)).events == len(documents)


async def test_in_an_empty_log_nothing_is_wrong(unstreamed_ledger: Ledger) -> None:
    assert await verify_log(unstreamed_ledger.event_store) == VerificationResult(0, 0, 0, GENESIS_HASH, None)


async def test_verification_writes_nothing(unstreamed_ledger: Ledger) -> None:
    await create_position_gap(unstreamed_ledger.db)
    await unstreamed_ledger.submit_job()
    before = await load_event_documents(unstreamed_ledger.db)
    await verify_log(unstreamed_ledger.event_store)
    assert await load_event_documents(unstreamed_ledger.db) == before


async def test_while_others_write_what_is_there_is_right(connection: Connection) -> None:
    async with AsyncExitStack() as stack:
        ledgers = [await stack.enter_async_context(open_ledger(connection, with_change_stream=False)) for _ in range(3)]
        shared = (await ledgers[0].submit_job()).events[0].stream
        stop = asyncio.Event()

        async def write(ledger: Ledger) -> None:
            while not stop.is_set():
                submitted = await ledger.submit_job()
                await handle_command(
                    ledger.event_store, submitted.events[0].stream, ClaimJob("w1", NOON), meta=EVENT_METADATA
                )
                await handle_command(ledger.event_store, shared, ChangeAccess("alice", ACCESS), meta=EVENT_METADATA)

        checker = ledgers[-1].event_store
        async with asyncio.timeout(4 * DEADLINE_SECONDS), asyncio.TaskGroup() as writing:
            try:
                for ledger in ledgers[:2]:
                    for _ in range(3):
                        writing.create_task(write(ledger))
                seen = right(await verify_log(checker))
                for _ in range(15):
                    head = await checker.head_position()
                    later = right(await verify_log(checker, expected_digest=note_of(seen)))
                    assert later.position >= max(head, seen.position)
                    assert later.events == later.position
                    seen = later
            finally:
                stop.set()
        assert right(await verify_log(checker)).events == await checker.head_position()


# One event was changed --------------------------------------------------------------------------------------------

CHANGED: dict[str, tuple[int, Document]] = {
    "a field of the payload": (3, {"$set": {"data.worker_id": "mallory"}}),
    "a number of the payload by very little": (10, {"$set": {"data.percent": 12.500000000000002}}),
    "a whole number of the payload to a fraction": (3, {"$set": {"data.attempt": 1.5}}),
    "a number of the payload to text": (3, {"$set": {"data.attempt": "1"}}),
    "a number of the payload to true": (3, {"$set": {"data.attempt": True}}),
    "text of the payload to nothing": (10, {"$set": {"data.message": None}}),
    "one more field in the payload": (4, {"$set": {"data.admin": True}}),
    "one more field in the payload, with nothing in it": (1, {"$set": {"data.batch_id": None}}),
    "one field of the payload fewer": (1, {"$unset": {"data.user_id": 1}}),
    "one job fewer in a batch": (7, {"$pop": {"data.job_ids": 1}}),
    "who did it": (2, {"$set": {"meta.actor": "user:mallory"}}),
    "one more field in meta": (2, {"$set": {"meta.causation_id": "x"}}),
    "one field of meta fewer": (2, {"$unset": {"meta.actor": 1}}),
    "the time by a millisecond": (9, {"$set": {"time": NOON + timedelta(milliseconds=1)}}),
    "the type": (10, {"$set": {"type": "JobLogged"}}),
    "the type to one that nobody knows": (10, {"$set": {"type": "JobFrobnicated"}}),
    "the schema": (8, {"$set": {"schema": 2}}),
    "the stream": (11, {"$set": {"stream": "job-other"}}),
    "the version": (11, {"$set": {"version": 7}}),
    "the event's id": (11, {"$set": {"event_id": "01a209d5-0be5-70bb-a8c6-9560ad79fa4f"}}),
    "the link": (4, {"$set": {"prev": GENESIS_HASH}}),
    "the hash": (4, {"$set": {"hash": GENESIS_HASH}}),
    "the time of a voided position": (5, {"$set": {"time": NOON}}),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED.keys())
async def test_a_change_of_an_event_is_found(unstreamed_ledger: Ledger, change: tuple[int, Document]) -> None:
    position, update = change
    await a_history(unstreamed_ledger)
    assert (await unstreamed_ledger.db.events.update_one({"_id": position}, update)).modified_count == 1
    [document] = await load_event_documents(unstreamed_ledger.db, {"_id": position})
    wrong = wrong_at(await verify_log(unstreamed_ledger.event_store), document)
    assert wrong.description.startswith(("its hash is not that of its content", "its data.message is a NoneType"))


async def test_a_value_that_no_event_can_hold_is_found(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    for value in (ObjectId(), Decimal128("1.5"), b"\1", bson.Regex("x"), 2**60, float("nan")):
        for field in ("data", "meta"):
            await put(unstreamed_ledger, with_another(documents[2], (field, "worker_id"), value))
            wrong_at(await verify_log(unstreamed_ledger.event_store), documents[2])


FIELDS = ("event_id", "stream", "version", "type", "schema", "time", "data", "meta", "prev", "hash")


@pytest.mark.parametrize("name", FIELDS)
async def test_a_missing_field_of_the_envelope_is_found(unstreamed_ledger: Ledger, name: str) -> None:
    await a_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.update_one({"_id": 3}, {"$unset": {name: 1}})
    verdict = await verify_log(unstreamed_ledger.event_store)
    assert verdict.problem is not None
    assert (verdict.problem.position, verdict.problem.description) == (3, f"lacks the field {name}")
    [there] = await load_event_documents(unstreamed_ledger.db, {"_id": 3})
    assert (verdict.problem.stream, verdict.problem.version) == (there.get("stream"), there.get("version"))


async def test_a_field_of_the_envelope_that_is_of_another_type_is_found(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    for name in FIELDS:
        for value in (True, 2.0, ["x"], None, ObjectId(), Decimal128("2")):
            await put(unstreamed_ledger, documents[2] | {name: value})
            verdict = await verify_log(unstreamed_ledger.event_store)
            assert verdict.problem is not None
            assert (verdict.problem.position, verdict.problem.description) == (
                3,
                f"its {name} is a {type(value).__name__}",
            )


async def test_texts_in_place_of_times_and_hashes_are_found_although_their_json_is_the_same(
    unstreamed_ledger: Ledger,
) -> None:
    documents = await a_history(unstreamed_ledger)
    for name, text in {
        "time": canonical_json(documents[2]["time"]).decode().strip('"'),
        "prev": documents[2]["prev"].hex(),
        "hash": documents[2]["hash"].hex(),
    }.items():
        await put(unstreamed_ledger, documents[2] | {name: text})
        wrong_at(await verify_log(unstreamed_ledger.event_store), documents[2], f"its {name} is a str")


async def test_a_field_that_no_event_has_is_found(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.update_one({"_id": 3}, {"$set": {"signed_by": "mallory", "and": 1}})
    wrong_at(
        await verify_log(unstreamed_ledger.event_store), documents[2], "has fields that no event has: and, signed_by"
    )


@pytest.mark.parametrize("what", ["a time beyond the calendar", "bytes that are no text"])
async def test_what_the_driver_cannot_read_is_found(unstreamed_ledger: Ledger, what: str) -> None:
    documents = await a_history(unstreamed_ledger)
    if "time" in what:
        await unstreamed_ledger.db.events.update_one(
            {"_id": 3}, {"$set": {"time": DatetimeMS(253402300800000)}}
        )  # the year 10000
    else:
        marked = bson.encode(documents[2] | {"meta": {"actor": "MARK"}})
        await unstreamed_ledger.db.events.delete_one({"_id": 3})
        await unstreamed_ledger.db.command(
            {"insert": "events", "documents": [RawBSONDocument(marked.replace(b"MARK", b"\xff\xfe\xff\xfe"))]}
        )
    verdict = await verify_log(unstreamed_ledger.event_store)
    assert verdict.problem is not None
    assert verdict.problem.position == 3


async def submitted_in(ledger: Ledger) -> Document:
    await ledger.submit_job()
    await ledger.submit_job(ORIGINAL_EVENT)
    await ledger.submit_job()
    return (await load_event_documents(ledger.db))[1]


async def test_a_field_stored_in_another_type_is_found_and_named(unstreamed_ledger: Ledger) -> None:
    document = await submitted_in(unstreamed_ledger)
    for place, value, what in TAMPERED_FIELDS.values():
        path = tuple(int(name) if name.isdecimal() else name for name in place.split("."))
        await put(unstreamed_ledger, with_another(document, path, value))
        verdict = await verify_log(unstreamed_ledger.event_store)
        assert verdict.problem is not None, f"{place}: {value!r} was not found"
        assert (verdict.problem.position, verdict.events) == (2, 1)
        if not isinstance(value, str):
            assert f"its {what.removeprefix('its ')}" in verdict.problem.description
        else:
            assert what in verdict.problem.description or "is a str" in verdict.problem.description
    await put(unstreamed_ledger, document)
    right(await verify_log(unstreamed_ledger.event_store))


RAW: dict[str, tuple[bytes, bytes, str]] = {
    "a symbol": (b"\x02text\0", b"\x0etext\0", "its data.parameters.text is stored"),
    "an undefined": (b"\x0anothing\0", b"\x06nothing\0", "its data.parameters.nothing is stored"),
    "a name twice": (b"\x02c\0\x07\0\0\0forged\0", b"\x02b\0\x07\0\0\0forged\0", "its data.parameters.inner is stored"),
    "bytes that are no text": (b"deadbeef", b"\xff\xfe\xff\xfe\xff\xfe\xff\xfe", "its data.parameters.text is stored"),
}


@pytest.mark.parametrize("case", RAW.values(), ids=RAW.keys())
async def test_a_field_in_an_encoding_that_decoding_hides_is_found_and_named(
    unstreamed_ledger: Ledger, case: tuple[bytes, bytes, str]
) -> None:
    document = await submitted_in(unstreamed_ledger)
    old, new, what = case
    inner = ("data", "parameters", "inner")
    if b"forged" in old:  # two fields b of which decoding keeps the second, for which there is a right hash
        document = with_its_hash(with_another(document, inner, {"b": "x"}))
        document = with_another(document, inner, {"c": "forged", "b": "x"})
    encoded = bson.encode(document)
    assert encoded.count(old) == 1
    await unstreamed_ledger.db.events.delete_one({"_id": 2})
    await unstreamed_ledger.db.command({"insert": "events", "documents": [RawBSONDocument(encoded.replace(old, new))]})
    wrong_at(await verify_log(unstreamed_ledger.event_store), document, what)


async def test_an_envelope_in_another_order_is_found(unstreamed_ledger: Ledger) -> None:
    document = await submitted_in(unstreamed_ledger)
    await put(unstreamed_ledger, {"_id": 2, **dict(reversed(document.items()))})
    wrong_at(await verify_log(unstreamed_ledger.event_store), document, "its fields are in another order")


@given(parameters=OBJECTS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_json_is_submitted_is_stored_in_its_form(
    unstreamed_ledger: Ledger, parameters: Document
) -> None:
    await unstreamed_ledger.submit_job(ORIGINAL_EVENT.model_copy(update={"parameters": parameters}))
    right(await verify_log(unstreamed_ledger.event_store))


@pytest.mark.parametrize("value", [TIMESTAMP, b"x", Code("x"), Int64(1)], ids=["time", "bytes", "code", "long"])
async def test_a_value_of_another_type_than_json_has_is_not_appended(unstreamed_ledger: Ledger, value: Any) -> None:
    with pytest.raises(InvalidEvent, match=r"its data\.parameters\.deep\.0 is a "):
        await unstreamed_ledger.submit_job(ORIGINAL_EVENT.model_copy(update={"parameters": {"deep": [value]}}))
    assert not await load_event_documents(unstreamed_ledger.db)


Path = tuple[str | int, ...]


def inner_values(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every value in a document and where it stands, the outer before the inner ones."""
    if path:
        yield path, value
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from inner_values(inner, (*path, name))


def with_another(document: Document, path: Path, value: Any) -> Document:
    """Return the document with another value at a place."""
    changed = deepcopy(document)
    holder: Any = changed
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = value
    return changed


def without(document: Document, path: Path) -> Document:
    changed = deepcopy(document)
    holder: Any = changed
    for name in path[:-1]:
        holder = holder[name]
    del holder[path[-1]]
    return changed


def slightly_changed(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case str():
            return f"{value} "
        case int() | float():
            return value + 1000  # past every version there is: the unique index is in the way of forgers, too
        case datetime():
            return value + timedelta(milliseconds=1)
        case bytes():
            return bytes([value[0] ^ 1]) + value[1:]
        case dict():
            return {**value, "more": None}
        case list():
            return [*value, None]
        case None:
            return False
        case _:
            raise AssertionError(f"an event holds a {type(value).__name__}")


async def test_whatever_is_changed_removed_or_added_in_whatever_type_of_event_is_found(
    unstreamed_ledger: Ledger,
) -> None:
    documents = await every_type(unstreamed_ledger)
    assert {document["type"] for document in documents} == {type(example).__name__ for example in EVENT_EXAMPLES}
    tried = 0
    for document in documents:
        for path, value in inner_values({name: it for name, it in document.items() if name != "_id"}):
            forgeries = [with_another(document, path, slightly_changed(value))]
            if len(path) > 1:
                forgeries.append(without(document, path))
            for forged in forgeries:
                await put(unstreamed_ledger, forged)
                verdict = await verify_log(
                    unstreamed_ledger.event_store, after=document["_id"] - 1, up_to=document["_id"]
                )
                assert verdict.problem is not None, (document["type"], path, value)
                assert verdict.problem.position == document["_id"]
                tried += 1
        await put(unstreamed_ledger, document)
    assert tried > 500
    right(await verify_log(unstreamed_ledger.event_store))


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_is_put_in_place_of_whatever_field_is_found(
    unstreamed_ledger: Ledger, data: st.DataObject
) -> None:
    documents = await load_event_documents(unstreamed_ledger.db) or await a_history(unstreamed_ledger)
    document = data.draw(st.sampled_from(documents), "event")
    inner = dict(inner_values({name: value for name, value in document.items() if name != "_id"}))
    path = data.draw(st.sampled_from(list(inner)), "field")
    value = data.draw(JSON, "instead")
    assume(canonical_json({"it": value}) != canonical_json({"it": inner[path]}))
    assume(path != ("version",) or value not in range(LAST + 1))  # the unique index is in the way
    await put(unstreamed_ledger, with_another(document, path, value))
    try:
        verdict = await verify_log(unstreamed_ledger.event_store)
        assert verdict.problem is not None
        assert verdict.problem.position == document["_id"]
        assert verdict.events == document["_id"] - 1
    finally:
        await put(unstreamed_ledger, document)


# Events were removed, moved, made anew ----------------------------------------------------------------------------


@pytest.mark.parametrize("position", [1, 3, 5, 7, 9, 10])
async def test_a_removed_event_is_found(unstreamed_ledger: Ledger, position: int) -> None:
    await a_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.delete_one({"_id": position})
    missing_at(await verify_log(unstreamed_ledger.event_store), position)


async def test_a_removed_event_is_found_even_if_a_voided_position_stands_in_its_place(
    unstreamed_ledger: Ledger,
) -> None:
    documents = await a_history(unstreamed_ledger)
    await put(unstreamed_ledger, build_void_document(3))
    assert documents[9]["stream"] == documents[2]["stream"]
    wrong_at(
        await verify_log(unstreamed_ledger.event_store),
        documents[9],
        "version 1 stands before it: version 2 is missing",
    )


async def test_a_removed_event_is_found_even_if_those_behind_it_move_up(unstreamed_ledger: Ledger) -> None:
    one = (await unstreamed_ledger.submit_job()).events[0].stream
    for name in ("alice", "bob", "carol"):
        await handle_command(unstreamed_ledger.event_store, one, ChangeAccess(name, ACCESS), meta=EVENT_METADATA)
    documents = await load_event_documents(unstreamed_ledger.db)
    await unstreamed_ledger.db.events.delete_one({"_id": 4})
    await put(unstreamed_ledger, *(document | {"_id": document["_id"] - 1} for document in documents[2:]))
    wrong_at(
        await verify_log(unstreamed_ledger.event_store),
        documents[2] | {"_id": 2},
        "version 1 stands before it: version 2 is missing",
    )


async def test_the_removed_beginning_of_a_stream_is_found(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    await put(unstreamed_ledger, build_void_document(1))
    wrong_at(
        await verify_log(unstreamed_ledger.event_store), documents[2], "nothing stands before it: version 1 is missing"
    )


async def test_two_events_of_a_stream_in_each_others_place_are_found(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    third, tenth = documents[2], documents[9]
    await put(
        unstreamed_ledger, build_void_document(10)
    )  # the index on (stream, version) lets nobody do it in one step
    await put(unstreamed_ledger, build_void_document(3), third | {"_id": 10})
    await put(unstreamed_ledger, tenth | {"_id": 3})
    wrong_at(
        await verify_log(unstreamed_ledger.event_store),
        tenth | {"_id": 3},
        "version 1 stands before it: version 2 is missing",
    )


async def test_events_that_were_put_in_another_order_with_new_hashes_are_found_by_their_links(
    unstreamed_ledger: Ledger,
) -> None:
    documents = await a_history(unstreamed_ledger)
    third, tenth = documents[2], documents[9]
    now_third = with_its_hash(tenth | {"_id": 3, "version": 2})
    now_tenth = with_its_hash(third | {"_id": 10, "version": 3})
    await put(unstreamed_ledger, build_void_document(10))
    await put(unstreamed_ledger, now_third)
    await put(unstreamed_ledger, now_tenth)
    wrong_at(await verify_log(unstreamed_ledger.event_store), now_third, "is not linked to the event before it")


@pytest.mark.parametrize(("forged", "found"), [(1, 3), (2, 4), (3, 10), (4, 11)])
async def test_an_event_made_anew_with_its_hash_is_found_by_the_link_of_the_next(
    unstreamed_ledger: Ledger, forged: int, found: int
) -> None:
    documents = await a_history(unstreamed_ledger)
    original = documents[forged - 1]
    await put(unstreamed_ledger, with_its_hash(original | {"data": original["data"] | {"user_id": "mallory"}}))
    assert documents[found - 1]["stream"] == original["stream"]
    wrong_at(
        await verify_log(unstreamed_ledger.event_store),
        documents[found - 1],
        "is not linked to the event before it in its stream",
    )


async def test_an_event_at_a_version_twice_is_found(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.drop_indexes()
    await unstreamed_ledger.db.events.insert_one(documents[-1] | {"_id": LAST + 1})
    verdict = await verify_log(unstreamed_ledger.event_store)
    assert verdict.problem is not None
    assert "the unique index on (stream, version) is missing" in verdict.problem.description


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"stolen": 1}},
        {"version": 12},
        {"type": "JobArchived"},
        {"prev": b"\1" + GENESIS_HASH[1:]},
        {"stream": "job-1", "version": 1},
    ],
    ids=["with content", "at another version", "of another type", "with a link", "in a job's stream"],
)
async def test_a_voided_position_that_is_none_is_found(unstreamed_ledger: Ledger, changes: Document) -> None:
    documents = await a_history(unstreamed_ledger)
    forged = with_its_hash(documents[4] | changes)
    await put(unstreamed_ledger, forged)
    wrong_at(await verify_log(unstreamed_ledger.event_store), forged, "is neither an event nor a voided position")


# What only a note can tell ----------------------------------------------------------------------------------------


async def test_a_log_is_what_was_noted_however_much_was_written_since(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    assert note_of(right(await verify_log(unstreamed_ledger.event_store, up_to=7))) == noted(documents[:7])
    for end in range(1, LAST + 1):
        right(await verify_log(unstreamed_ledger.event_store, expected_digest=noted(documents[:end])))
        right(await verify_log(unstreamed_ledger.event_store, up_to=end, expected_digest=noted(documents[:end])))


@pytest.mark.parametrize(("after", "upto"), [(1, None), (1, 7), (0, 6)])
async def test_a_note_needs_the_events_it_stands_for(unstreamed_ledger: Ledger, after: int, upto: int | None) -> None:
    documents = await a_history(unstreamed_ledger)
    with pytest.raises(ValueError, match="all events up to position 7"):
        await verify_log(unstreamed_ledger.event_store, after=after, up_to=upto, expected_digest=noted(documents[:7]))


async def test_a_last_event_made_anew_is_found_only_by_what_was_noted(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    await put(unstreamed_ledger, with_its_hash(documents[-1] | {"meta": {"actor": "user:mallory"}}))
    right(await verify_log(unstreamed_ledger.event_store))
    verdict = await verify_log(unstreamed_ledger.event_store, expected_digest=noted(documents))
    assert verdict.problem == IntegrityProblem(LAST, NOT_AS_NOTED)


async def test_an_end_that_was_taken_away_is_found_only_by_what_was_noted(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.delete_many({"_id": {"$gt": 8}})
    assert right(await verify_log(unstreamed_ledger.event_store)).position == 8
    right(await verify_log(unstreamed_ledger.event_store, expected_digest=noted(documents[:8])))
    for end in range(9, LAST + 1):
        verdict = await verify_log(unstreamed_ledger.event_store, expected_digest=noted(documents[:end]))
        assert verdict.problem is not None
        assert verdict.problem.position == end
        assert "the log ends at position 8" in verdict.problem.description
    await unstreamed_ledger.db.events.delete_many({})
    verdict = await verify_log(unstreamed_ledger.event_store, expected_digest=noted(documents))
    assert "the log ends at position 0" in str(verdict.problem)


async def test_an_end_that_was_taken_away_and_grew_again_is_found_by_what_was_noted(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.delete_many({"_id": {"$gt": 8}})
    await unstreamed_ledger.db.counters.update_one({"_id": "events"}, {"$set": {"next": 8}})
    for _ in range(6):
        await unstreamed_ledger.submit_job()
    right(await verify_log(unstreamed_ledger.event_store))
    verdict = await verify_log(unstreamed_ledger.event_store, expected_digest=noted(documents))
    assert verdict.problem == IntegrityProblem(LAST, NOT_AS_NOTED)


async def test_a_noted_event_that_is_missing_is_found(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.delete_one({"_id": 9})
    verdict = await verify_log(unstreamed_ledger.event_store, expected_digest=noted(documents[:9]))
    assert verdict.problem is not None
    assert verdict.problem.position == 9


async def made_anew(ledger: Ledger, documents: Sequence[Document]) -> None:
    """Forge a whole stream, link by link."""
    forged = with_its_hash(documents[0] | {"data": documents[0]["data"] | {"user_id": "mallory"}})
    following = with_its_hash(documents[2] | {"prev": forged["hash"]})
    await put(ledger, forged, following, with_its_hash(documents[9] | {"prev": following["hash"]}))


async def voided(ledger: Ledger, documents: Sequence[Document]) -> None:
    """Take away the last event of a stream, and leave a voided position."""
    await put(ledger, build_void_document(documents[8]["_id"]))


async def in_another_order(ledger: Ledger, documents: Sequence[Document]) -> None:
    """Exchange the places of events of two streams."""
    await ledger.db.events.delete_many({"_id": {"$in": [3, 4]}})
    await put(ledger, documents[2] | {"_id": 4}, documents[3] | {"_id": 3})


Forgery = Callable[[Ledger, Sequence[Document]], Awaitable[None]]


@pytest.mark.parametrize("forgery", [made_anew, voided, in_another_order])
async def test_what_was_done_to_other_streams_is_found_by_what_was_noted(
    unstreamed_ledger: Ledger, forgery: Forgery
) -> None:
    documents = await a_history(unstreamed_ledger)
    earlier = right(await verify_log(unstreamed_ledger.event_store))
    await forgery(unstreamed_ledger, documents)
    right(await verify_log(unstreamed_ledger.event_store))
    assert (
        await verify_log(unstreamed_ledger.event_store, expected_digest=note_of(earlier))
    ).problem == IntegrityProblem(LAST, NOT_AS_NOTED)


# Beyond the positions ---------------------------------------------------------------------------------------------

BEYOND: dict[str, Any] = {
    "zero": 0,
    "negative": -1,
    "minus infinity": float("-inf"),
    "text": "12",
    "an id of the database": ObjectId(),
    "true": True,
    "nothing": None,
    "a document": {"position": 3},
    "the largest key": bson.MaxKey(),
    "a fraction": 2.5,
    "a fraction at the end": LAST + 0.5,
    "not a number": float("nan"),
    "infinity": float("inf"),
    "a decimal fraction": Decimal128("2.5"),
    "a large decimal": Decimal128("100"),
    "a decimal that is not a number": Decimal128("NaN"),
}


@pytest.mark.parametrize("place", BEYOND.values(), ids=BEYOND.keys())
async def test_an_event_where_no_position_is_is_found(unstreamed_ledger: Ledger, place: Any) -> None:
    await a_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.insert_one(
        with_its_hash((await load_event_documents(unstreamed_ledger.db))[0] | {"_id": place, "stream": "job-x"})
    )
    verdict = await verify_log(unstreamed_ledger.event_store)
    assert verdict.problem is not None
    assert f"{place!r}, which is no position" in verdict.problem.description


async def test_a_position_that_is_no_whole_number_to_the_database_is_found(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    await move(unstreamed_ledger, documents[2], 3.0)
    verdict = await verify_log(unstreamed_ledger.event_store)
    assert verdict.problem is not None
    assert (
        "its _id is a float" in verdict.problem.description
        or "3.0, which is no position" in verdict.problem.description
    )


@pytest.mark.parametrize("position", [9, 5], ids=["the only one of its stream", "a voided position"])
async def test_an_event_that_was_moved_between_two_positions_is_found(unstreamed_ledger: Ledger, position: int) -> None:
    documents = await a_history(unstreamed_ledger)
    await move(unstreamed_ledger, documents[position - 1], position - 0.5)
    verdict = await verify_log(unstreamed_ledger.event_store)
    assert verdict.problem is not None
    assert verdict.problem.position == position or "which is no position" in verdict.problem.description


async def drop(ledger: Ledger) -> None:
    await ledger.db.events.drop_indexes()


async def make_it_weak(ledger: Ledger) -> None:
    await ledger.db.events.drop_indexes()
    await ledger.db.events.create_index([("stream", 1), ("version", 1)])


async def make_it_partial(ledger: Ledger) -> None:
    await ledger.db.events.drop_indexes()
    only_late = {"version": {"$gt": 1_000_000}}
    await ledger.db.events.create_index([("stream", 1), ("version", 1)], unique=True, partialFilterExpression=only_late)


@pytest.mark.parametrize("harm", [drop, make_it_weak, make_it_partial])
async def test_a_log_whose_versions_are_not_kept_unique_is_wrong(
    unstreamed_ledger: Ledger, harm: Callable[[Ledger], Awaitable[None]]
) -> None:
    await a_history(unstreamed_ledger)
    await harm(unstreamed_ledger)
    verdict = await verify_log(unstreamed_ledger.event_store)
    assert verdict.problem is not None
    assert "the unique index on (stream, version) is missing" in verdict.problem.description
    await unstreamed_ledger.db.events.drop_indexes()
    await unstreamed_ledger.event_store.prepare()
    right(await verify_log(unstreamed_ledger.event_store))


# Ranges -----------------------------------------------------------------------------------------------------------


async def test_every_range_of_a_right_log_is_right(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    for after in range(LAST + 2):
        for upto in (*range(after, LAST + 1), LAST + 5, None):
            verdict = right(await verify_log(unstreamed_ledger.event_store, after=after, up_to=upto))
            there = documents[after:upto]
            assert verdict.events == len(there)
            assert verdict.voided == sum(document["stream"] == "void" for document in there)
            if there:
                assert verdict.position == there[-1]["_id"]
            # What does not begin at the beginning yields no digest: it would look like one of the whole log.
            assert verdict.digest == (None if after else noted(there)[1] if there else GENESIS_HASH)


async def test_a_range_finds_what_is_wrong_in_it_and_nothing_else(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    for position in (1, 4, 6, 9, LAST):
        forged = documents[position - 1] | {"time": NOON - timedelta(days=1)}
        await put(unstreamed_ledger, forged)
        for after in range(LAST):
            for upto in range(after + 1, LAST + 1):
                verdict = await verify_log(unstreamed_ledger.event_store, after=after, up_to=upto)
                if after < position <= upto:
                    wrong_at(verdict, forged, "its hash", after=after)
                else:
                    right(verdict)
        await put(unstreamed_ledger, documents[position - 1])


@pytest.mark.parametrize("after", range(10))
async def test_a_broken_link_to_what_stands_before_the_range_is_found(unstreamed_ledger: Ledger, after: int) -> None:
    documents = await a_history(unstreamed_ledger)
    await put(unstreamed_ledger, with_its_hash(documents[2] | {"meta": {"actor": "user:mallory"}}))
    wrong_at(await verify_log(unstreamed_ledger.event_store, after=after), documents[9], "is not linked", after=after)


async def test_a_stream_whose_earlier_event_comes_only_after_the_range_began_is_in_the_wrong_order(
    unstreamed_ledger: Ledger,
) -> None:
    documents = await a_history(unstreamed_ledger)
    third, tenth = documents[2], documents[9]
    await put(unstreamed_ledger, build_void_document(10))
    await put(unstreamed_ledger, build_void_document(3), third | {"_id": 10})
    await put(unstreamed_ledger, tenth | {"_id": 3})
    for after in (1, 2):
        wrong_at(
            await verify_log(unstreamed_ledger.event_store, after=after),
            tenth | {"_id": 3},
            "nothing stands before it: version 2 is missing, or in the wrong place",
            after=after,
        )


async def test_a_hole_in_the_range_is_found_and_one_before_it_is_not(unstreamed_ledger: Ledger) -> None:
    await a_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.delete_one({"_id": 9})
    right(await verify_log(unstreamed_ledger.event_store, after=9))
    right(await verify_log(unstreamed_ledger.event_store, up_to=8))
    verdict = await verify_log(unstreamed_ledger.event_store, after=7, up_to=10)
    assert verdict.problem is not None
    assert (verdict.problem.position, verdict.events, verdict.position) == (9, 1, 8)


async def test_a_link_to_an_event_before_the_range_that_has_no_hash_is_found(unstreamed_ledger: Ledger) -> None:
    documents = await a_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.update_one({"_id": 3}, {"$unset": {"hash": 1}})
    wrong_at(await verify_log(unstreamed_ledger.event_store, after=5), documents[9], after=5)


async def test_whoever_waits_is_told_how_far_it_has_come(connection: Connection) -> None:
    async with open_ledger(connection, HASTY, with_change_stream=False, store_class=SmallPages) as ledger:
        await a_history(ledger)
        told: list[tuple[int, int]] = []
        await verify_log(ledger.event_store, on_progress=lambda position, upto: told.append((position, upto)))
        assert told == [(PAGE, LAST), (LAST, LAST)]
        told.clear()
        await verify_log(
            ledger.event_store, after=2, up_to=10, on_progress=lambda position, upto: told.append((position, upto))
        )
        assert told == [(9, 10), (10, 10)]


# Memory -----------------------------------------------------------------------------------------------------------

STREAMS, ROUNDS, REMEMBERED = 30, 4, 5


class Measured(OrderedDict[str, StreamHead]):
    """Knows how large it ever was."""

    largest = 0

    def __setitem__(self, name: str, head: StreamHead) -> None:
        super().__setitem__(name, head)
        Measured.largest = max(Measured.largest, len(self))


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_REMEMBERED_STREAMS", REMEMBERED)


async def by_turns(ledger: Ledger) -> list[Document]:
    """Many streams, each of which goes on after all others have."""
    jobs = [await ledger.submit_job() for _ in range(STREAMS)]
    for _ in range(ROUNDS - 1):
        for number, job in enumerate(jobs):
            changed = ChangeAccess("alice", ACCESS)
            jobs[number] = await handle_command(
                ledger.event_store, job.events[0].stream, changed, meta=EVENT_METADATA, stream_state=job.stream_state
            )
    return await load_event_documents(ledger.db)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("kind", [EventStore, SmallPages], ids=["in one page", "in many pages"])
async def test_more_streams_than_can_be_remembered_are_right(connection: Connection, kind: type[EventStore]) -> None:
    async with open_ledger(connection, HASTY, with_change_stream=False, store_class=kind) as ledger:
        documents = await by_turns(ledger)
        assert right(await verify_log(ledger.event_store)).events == len(documents) == STREAMS * ROUNDS
        for after in (1, STREAMS - 3, STREAMS * 2 + 1):
            right(await verify_log(ledger.event_store, after=after))


async def test_one_stream_more_than_can_be_remembered_is_no_fault(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is remembered longest goes on right behind the one that is too many."""
    monkeypatch.setattr(verification, "_REMEMBERED_STREAMS", 2 * PAGE)
    async with open_ledger(connection, HASTY, with_change_stream=False, store_class=SmallPages) as ledger:
        first, *_ = [await ledger.submit_job() for _ in range(2 * PAGE)]
        await ledger.submit_job()
        await handle_command(
            ledger.event_store, first.events[0].stream, ChangeAccess("alice", ACCESS), meta=EVENT_METADATA
        )
        right(await verify_log(ledger.event_store))


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("position", [STREAMS // 2, STREAMS, STREAMS + 4, 3 * STREAMS - 1])
async def test_a_stream_that_was_forgotten_meanwhile_is_still_checked(connection: Connection, position: int) -> None:
    async with open_ledger(connection, HASTY, with_change_stream=False, store_class=SmallPages) as ledger:
        documents = await by_turns(ledger)
        original, following = documents[position - 1], documents[position - 1 + STREAMS]
        assert following["stream"] == original["stream"]
        await put(ledger, with_its_hash(original | {"meta": {"actor": "user:mallory"}}))
        wrong_at(await verify_log(ledger.event_store), following, "is not linked to the event before it")
        await put(ledger, build_void_document(position))
        wrong_at(await verify_log(ledger.event_store), following, f"version {original['version']} is missing")


@pytest.mark.usefixtures("forgetful")
async def test_no_more_streams_are_remembered_than_were_to_be_and_a_page_has(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "OrderedDict", Measured)
    Measured.largest = 0
    async with open_ledger(connection, HASTY, with_change_stream=False, store_class=SmallPages) as ledger:
        for _ in range(10 * PAGE):
            await ledger.submit_job()
        right(await verify_log(ledger.event_store))
    assert 0 < Measured.largest <= REMEMBERED + PAGE


# Holes ------------------------------------------------------------------------------------------------------------


class Watched(EventStore):
    """A log that knows how often the check has stood before a hole."""

    looks = 0
    standing: asyncio.Event

    async def read_documents(self, *, after: int, limit: int) -> list[StoredDocument]:
        documents = await super().read_documents(after=after, limit=limit)
        if documents and documents[0][0]["_id"] != after + 1:
            self.looks += 1
            if self.looks == 2:
                self.standing.set()
        return documents


async def test_a_hole_left_by_a_dead_writer_is_named_until_a_reader_has_filled_it(unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.submit_job()
    await create_position_gap(unstreamed_ledger.db)
    await unstreamed_ledger.submit_job()
    verdict = await verify_log(unstreamed_ledger.event_store)
    missing_at(verdict, 2)
    assert "no reader has been there since" in str(verdict.problem)
    await read_all_events(unstreamed_ledger.event_store)
    assert right(await verify_log(unstreamed_ledger.event_store)).voided == 1


async def test_a_hole_that_a_slow_writer_closes_during_the_check_is_no_fault(connection: Connection) -> None:
    async with open_ledger(connection, PATIENT, with_change_stream=False, store_class=Watched) as ledger:
        assert isinstance(ledger.event_store, Watched)
        ledger.event_store.standing = asyncio.Event()
        documents = await a_history(ledger)
        late = documents[8]
        await ledger.db.events.delete_one({"_id": 9})
        checking = asyncio.create_task(verify_log(ledger.event_store))
        async with asyncio.timeout(DEADLINE_SECONDS):
            await ledger.event_store.standing.wait()
            assert not checking.done()
            await ledger.db.events.insert_one(late)
            assert right(await checking).events == LAST


async def test_many_holes_that_close_one_after_the_other_are_each_waited_for(connection: Connection) -> None:
    """Patience is for each hole, not for all together: a slow writer may have taken many numbers."""
    async with open_ledger(connection, PATIENT, with_change_stream=False, store_class=Watched) as ledger:
        assert isinstance(ledger.event_store, Watched)
        ledger.event_store.standing = asyncio.Event()
        documents = await a_history(ledger)
        await ledger.db.events.delete_many({"_id": {"$in": [2, 4, 6, 8]}})
        checking = asyncio.create_task(verify_log(ledger.event_store))
        async with asyncio.timeout(DEADLINE_SECONDS):
            for position in (2, 4, 6, 8):
                await ledger.event_store.standing.wait()
                ledger.event_store.standing.clear()
                ledger.event_store.looks = 0
                await ledger.db.events.insert_one(documents[position - 1])
            assert right(await checking).events == LAST


async def test_what_is_written_after_the_check_began_is_not_waited_for(connection: Connection) -> None:
    async with open_ledger(connection, HASTY, with_change_stream=False, store_class=SmallPages) as ledger:
        await a_history(ledger)
        told: list[tuple[int, int]] = []

        class Interrupted(SmallPages):
            async def head_position(self, session: AsyncClientSession | None = None) -> int:
                head = await super().head_position(session)
                await create_position_gap(ledger.db)
                await ledger.submit_job()
                return head

        log = Interrupted(ledger.db, HASTY)
        verdict = right(await verify_log(log, on_progress=lambda position, upto: told.append((position, upto))))
        assert (verdict.events, verdict.position) == (LAST, LAST)
        assert told[-1] == (LAST, LAST)


def test_what_is_wrong_says_where() -> None:
    assert str(IntegrityProblem(3, "odd", "job-1", 2)) == "position 3 (job-1, version 2): odd"
    assert str(IntegrityProblem(3, "odd")) == "position 3: odd"
