"""Verification with a real database: an intact log is valid, and each manipulation is reported with its position."""

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
from jobledger.ledger.mongo.connection import Connection, Database, Document
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

PAGE_EVENTS = 7
SHORT_GAP_LIMITS = EventStoreLimits(gap_timeout_seconds=0.02)
"""For logs that do not change during verification."""


@pytest.fixture
async def short_gap_ledger(connection: Connection) -> AsyncIterator[Ledger]:
    async with open_ledger(connection, SHORT_GAP_LIMITS, with_change_stream=False) as ledger:
        yield ledger


class SmallPageStore(EventStore):
    """An event store that reads small pages, so that few events make a long log."""

    async def read_documents(self, *, after: int, limit: int) -> list[StoredDocument]:
        return await super().read_documents(after=after, limit=min(limit, PAGE_EVENTS))


async def create_history(ledger: Ledger) -> list[Document]:
    """Append two jobs alternately, a batch in one transaction, and two gaps of a dead appender. The log is valid."""
    first, second = await ledger.submit_job(), await ledger.submit_job()  # positions 1 and 2
    streams = [submitted.events[0].stream for submitted in (first, second)]
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


LAST_POSITION = 11
DIGEST_MISMATCH = "the log up to here does not match the expected digest, although its hashes are correct"


async def append_every_type(ledger: Ledger) -> list[Document]:
    """Append one event of each type, with all its fields."""
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


def add_hash(document: Document) -> Document:
    return document | {"hash": sha256(hash_input(document)).digest()}


def compute_digest(documents: Sequence[Document]) -> tuple[int, bytes]:
    """Return the position and digest that a verification up to the last of these documents returns."""
    digest = GENESIS_HASH
    for document in documents:
        digest = sha256(digest + document["hash"]).digest()
    return documents[-1]["_id"], digest


def get_digest(result: VerificationResult) -> tuple[int, bytes] | None:
    return (result.position, result.digest) if result.events and result.digest is not None else None


async def replace_documents(ledger: Ledger, *documents: Document) -> None:
    """Store these documents at their positions, in place of others."""
    for document in documents:
        await ledger.db.events.delete_one({"_id": document["_id"]})
    await ledger.db.events.insert_many([{"_id": document["_id"], **document} for document in documents])


async def move_document(ledger: Ledger, document: Document, position: Any) -> None:
    await ledger.db.events.delete_one({"_id": document["_id"]})
    await ledger.db.events.insert_one(document | {"_id": position})


def check_valid(result: VerificationResult) -> VerificationResult:
    assert result.problem is None, str(result.problem)
    return result


def check_problem_at(result: VerificationResult, document: Document, *words: str, after: int = 0) -> IntegrityProblem:
    """Check that the first problem is at this event, and that all events before it are valid."""
    problem = result.problem
    assert problem is not None, f"no problem was detected, expected {words} at {document['_id']}"
    assert (problem.position, problem.stream, problem.version) == (
        document["_id"],
        document["stream"],
        document["version"],
    ), str(problem)
    assert (result.events, result.position) == (document["_id"] - 1 - after, document["_id"] - 1)
    for word in words:
        assert word in problem.description, str(problem)
    assert f"position {document['_id']} ({document['stream']}, version {document['version']}): " in str(problem)
    return problem


def check_missing_at(result: VerificationResult, position: int) -> None:
    problem = result.problem
    assert problem is not None
    assert (problem.position, problem.stream, problem.version) == (position, None, None), str(problem)
    assert problem.description.startswith("missing")
    assert (result.events, result.position) == (position - 1, position - 1)


# Valid logs -------------------------------------------------------------------------------------------------------


async def test_intact_log_is_valid(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    assert await verify_log(unstreamed_ledger.event_store) == VerificationResult(
        LAST_POSITION, 2, LAST_POSITION, compute_digest(documents)[1], None
    )


async def test_log_with_every_event_type_is_valid(unstreamed_ledger: Ledger) -> None:
    documents = await append_every_type(unstreamed_ledger)
    assert check_valid(await verify_log(unstreamed_ledger.event_store)).events == len(documents)


async def test_empty_log_is_valid(unstreamed_ledger: Ledger) -> None:
    assert await verify_log(unstreamed_ledger.event_store) == VerificationResult(0, 0, 0, GENESIS_HASH, None)


async def test_verification_writes_nothing(unstreamed_ledger: Ledger) -> None:
    await create_position_gap(unstreamed_ledger.db)
    await unstreamed_ledger.submit_job()
    before = await load_event_documents(unstreamed_ledger.db)
    await verify_log(unstreamed_ledger.event_store)
    assert await load_event_documents(unstreamed_ledger.db) == before


async def test_log_is_valid_during_concurrent_appends(connection: Connection) -> None:
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
                previous = check_valid(await verify_log(checker))
                for _ in range(15):
                    head = await checker.head_position()
                    following = check_valid(await verify_log(checker, expected_digest=get_digest(previous)))
                    assert following.position >= max(head, previous.position)
                    assert following.events == following.position
                    previous = following
            finally:
                stop.set()
        assert check_valid(await verify_log(checker)).events == await checker.head_position()


# Changed events ---------------------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[int, Document]] = {
    "a field of the payload": (3, {"$set": {"data.worker_id": "mallory"}}),
    "a number of the payload by a tiny amount": (10, {"$set": {"data.percent": 12.500000000000002}}),
    "an integer of the payload to a fraction": (3, {"$set": {"data.attempt": 1.5}}),
    "a number of the payload to text": (3, {"$set": {"data.attempt": "1"}}),
    "a number of the payload to true": (3, {"$set": {"data.attempt": True}}),
    "text of the payload to null": (10, {"$set": {"data.message": None}}),
    "one more field in the payload": (4, {"$set": {"data.admin": True}}),
    "one more field in the payload, null": (1, {"$set": {"data.batch_id": None}}),
    "one field of the payload fewer": (1, {"$unset": {"data.user_id": 1}}),
    "one job fewer in a batch": (7, {"$pop": {"data.job_ids": 1}}),
    "the actor": (2, {"$set": {"meta.actor": "user:mallory"}}),
    "one more field in meta": (2, {"$set": {"meta.causation_id": "x"}}),
    "one field of meta fewer": (2, {"$unset": {"meta.actor": 1}}),
    "the time by a millisecond": (9, {"$set": {"time": NOON + timedelta(milliseconds=1)}}),
    "the type": (10, {"$set": {"type": "JobLogged"}}),
    "the type to an unknown one": (10, {"$set": {"type": "JobFrobnicated"}}),
    "the schema": (8, {"$set": {"schema": 2}}),
    "the stream": (11, {"$set": {"stream": "job-other"}}),
    "the version": (11, {"$set": {"version": 7}}),
    "the event ID": (11, {"$set": {"event_id": "01a209d5-0be5-70bb-a8c6-9560ad79fa4f"}}),
    "the link": (4, {"$set": {"prev": GENESIS_HASH}}),
    "the hash": (4, {"$set": {"hash": GENESIS_HASH}}),
    "the time of a voided position": (5, {"$set": {"time": NOON}}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_changed_event_is_detected(unstreamed_ledger: Ledger, change: tuple[int, Document]) -> None:
    position, update = change
    await create_history(unstreamed_ledger)
    assert (await unstreamed_ledger.db.events.update_one({"_id": position}, update)).modified_count == 1
    [document] = await load_event_documents(unstreamed_ledger.db, {"_id": position})
    problem = check_problem_at(await verify_log(unstreamed_ledger.event_store), document)
    assert problem.description.startswith(("its hash does not match its content", "its data.message is a NoneType"))


async def test_value_without_json_form_is_detected(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    for value in (ObjectId(), Decimal128("1.5"), b"\1", bson.Regex("x"), 2**60, float("nan")):
        for field in ("data", "meta"):
            await replace_documents(unstreamed_ledger, replace_value(documents[2], (field, "worker_id"), value))
            check_problem_at(await verify_log(unstreamed_ledger.event_store), documents[2])


FIELDS = ("event_id", "stream", "version", "type", "schema", "time", "data", "meta", "prev", "hash")


@pytest.mark.parametrize("name", FIELDS)
async def test_missing_envelope_field_is_detected(unstreamed_ledger: Ledger, name: str) -> None:
    await create_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.update_one({"_id": 3}, {"$unset": {name: 1}})
    result = await verify_log(unstreamed_ledger.event_store)
    assert result.problem is not None
    assert (result.problem.position, result.problem.description) == (3, f"lacks the field {name}")
    [stored] = await load_event_documents(unstreamed_ledger.db, {"_id": 3})
    assert (result.problem.stream, result.problem.version) == (stored.get("stream"), stored.get("version"))


async def test_envelope_field_of_other_type_is_detected(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    for name in FIELDS:
        for value in (True, 2.0, ["x"], None, ObjectId(), Decimal128("2")):
            await replace_documents(unstreamed_ledger, documents[2] | {name: value})
            result = await verify_log(unstreamed_ledger.event_store)
            assert result.problem is not None
            assert (result.problem.position, result.problem.description) == (
                3,
                f"its {name} is a {type(value).__name__}",
            )


async def test_text_in_place_of_time_or_hash_is_detected(
    unstreamed_ledger: Ledger,
) -> None:
    documents = await create_history(unstreamed_ledger)
    for name, text in {
        "time": canonical_json(documents[2]["time"]).decode().strip('"'),
        "prev": documents[2]["prev"].hex(),
        "hash": documents[2]["hash"].hex(),
    }.items():
        await replace_documents(unstreamed_ledger, documents[2] | {name: text})
        check_problem_at(await verify_log(unstreamed_ledger.event_store), documents[2], f"its {name} is a str")


async def test_unknown_envelope_field_is_detected(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.update_one({"_id": 3}, {"$set": {"signed_by": "mallory", "and": 1}})
    check_problem_at(
        await verify_log(unstreamed_ledger.event_store), documents[2], "has unknown fields: and, signed_by"
    )


@pytest.mark.parametrize("content", ["time beyond the calendar", "bytes that are not text"])
async def test_undecodable_field_is_detected(unstreamed_ledger: Ledger, content: str) -> None:
    documents = await create_history(unstreamed_ledger)
    if "time" in content:
        await unstreamed_ledger.db.events.update_one(
            {"_id": 3}, {"$set": {"time": DatetimeMS(253402300800000)}}
        )  # the year 10000
    else:
        marked = bson.encode(documents[2] | {"meta": {"actor": "MARK"}})
        await unstreamed_ledger.db.events.delete_one({"_id": 3})
        await unstreamed_ledger.db.command(
            {"insert": "events", "documents": [RawBSONDocument(marked.replace(b"MARK", b"\xff\xfe\xff\xfe"))]}
        )
    result = await verify_log(unstreamed_ledger.event_store)
    assert result.problem is not None
    assert result.problem.position == 3


async def submit_original(ledger: Ledger) -> Document:
    await ledger.submit_job()
    await ledger.submit_job(ORIGINAL_EVENT)
    await ledger.submit_job()
    return (await load_event_documents(ledger.db))[1]


async def test_payload_field_of_other_bson_type_is_detected_and_named(unstreamed_ledger: Ledger) -> None:
    document = await submit_original(unstreamed_ledger)
    for field_path, value, what in TAMPERED_FIELDS.values():
        path = tuple(int(name) if name.isdecimal() else name for name in field_path.split("."))
        await replace_documents(unstreamed_ledger, replace_value(document, path, value))
        result = await verify_log(unstreamed_ledger.event_store)
        assert result.problem is not None, f"{field_path}: {value!r} was not detected"
        assert (result.problem.position, result.events) == (2, 1)
        if not isinstance(value, str):
            assert f"its {what.removeprefix('its ')}" in result.problem.description
        else:
            assert what in result.problem.description or "is a str" in result.problem.description
    await replace_documents(unstreamed_ledger, document)
    check_valid(await verify_log(unstreamed_ledger.event_store))


RAW_CHANGES: dict[str, tuple[bytes, bytes, str]] = {
    "symbol": (b"\x02text\0", b"\x0etext\0", "its data.parameters.text is encoded"),
    "undefined": (b"\x0anothing\0", b"\x06nothing\0", "its data.parameters.nothing is encoded"),
    "duplicate name": (
        b"\x02c\0\x07\0\0\0forged\0",
        b"\x02b\0\x07\0\0\0forged\0",
        "its data.parameters.inner is encoded",
    ),
    "bytes that are not text": (
        b"deadbeef",
        b"\xff\xfe\xff\xfe\xff\xfe\xff\xfe",
        "its data.parameters.text is encoded",
    ),
}


@pytest.mark.parametrize("case", RAW_CHANGES.values(), ids=RAW_CHANGES.keys())
async def test_encoding_hidden_by_decoding_is_detected_and_named(
    unstreamed_ledger: Ledger, case: tuple[bytes, bytes, str]
) -> None:
    document = await submit_original(unstreamed_ledger)
    old, new, what = case
    inner = ("data", "parameters", "inner")
    if b"forged" in old:  # two fields `b`: decoding keeps the second one, and the hash matches it
        document = add_hash(replace_value(document, inner, {"b": "x"}))
        document = replace_value(document, inner, {"c": "forged", "b": "x"})
    encoded = bson.encode(document)
    assert encoded.count(old) == 1
    await unstreamed_ledger.db.events.delete_one({"_id": 2})
    await unstreamed_ledger.db.command({"insert": "events", "documents": [RawBSONDocument(encoded.replace(old, new))]})
    check_problem_at(await verify_log(unstreamed_ledger.event_store), document, what)


async def test_reordered_envelope_is_detected(unstreamed_ledger: Ledger) -> None:
    document = await submit_original(unstreamed_ledger)
    await replace_documents(unstreamed_ledger, {"_id": 2, **dict(reversed(document.items()))})
    check_problem_at(await verify_log(unstreamed_ledger.event_store), document, "its fields are in the wrong order")


@given(parameters=OBJECTS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_submitted_json_is_stored_in_valid_form(unstreamed_ledger: Ledger, parameters: Document) -> None:
    await unstreamed_ledger.submit_job(ORIGINAL_EVENT.model_copy(update={"parameters": parameters}))
    check_valid(await verify_log(unstreamed_ledger.event_store))


@pytest.mark.parametrize("value", [TIMESTAMP, b"x", Code("x"), Int64(1)], ids=["time", "bytes", "code", "long"])
async def test_append_of_non_json_type_is_rejected(unstreamed_ledger: Ledger, value: Any) -> None:
    with pytest.raises(InvalidEvent, match=r"its data\.parameters\.deep\.0 is a "):
        await unstreamed_ledger.submit_job(ORIGINAL_EVENT.model_copy(update={"parameters": {"deep": [value]}}))
    assert not await load_event_documents(unstreamed_ledger.db)


FieldPath = tuple[str | int, ...]


def iterate_values(value: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Yield every value in a document with its path, outer values before inner ones."""
    if path:
        yield path, value
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from iterate_values(inner, (*path, name))


def replace_value(document: Document, path: FieldPath, value: Any) -> Document:
    """Return a copy of the document with another value at a path."""
    changed = deepcopy(document)
    holder: Any = changed
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = value
    return changed


def remove_field(document: Document, path: FieldPath) -> Document:
    changed = deepcopy(document)
    holder: Any = changed
    for name in path[:-1]:
        holder = holder[name]
    del holder[path[-1]]
    return changed


def change_slightly(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case str():
            return f"{value} "
        case int() | float():
            return value + 1000  # larger than every version, because the unique index would reject duplicates
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


async def test_any_changed_or_removed_field_of_any_type_is_detected(
    unstreamed_ledger: Ledger,
) -> None:
    documents = await append_every_type(unstreamed_ledger)
    assert {document["type"] for document in documents} == {type(example).__name__ for example in EVENT_EXAMPLES}
    checked = 0
    for document in documents:
        for path, value in iterate_values({name: item for name, item in document.items() if name != "_id"}):
            forgeries = [replace_value(document, path, change_slightly(value))]
            if len(path) > 1:
                forgeries.append(remove_field(document, path))
            for forged in forgeries:
                await replace_documents(unstreamed_ledger, forged)
                result = await verify_log(
                    unstreamed_ledger.event_store, after=document["_id"] - 1, up_to=document["_id"]
                )
                assert result.problem is not None, (document["type"], path, value)
                assert result.problem.position == document["_id"]
                checked += 1
        await replace_documents(unstreamed_ledger, document)
    assert checked > 500
    check_valid(await verify_log(unstreamed_ledger.event_store))


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_replaced_value_is_detected(unstreamed_ledger: Ledger, data: st.DataObject) -> None:
    documents = await load_event_documents(unstreamed_ledger.db) or await create_history(unstreamed_ledger)
    document = data.draw(st.sampled_from(documents), "event")
    inner = dict(iterate_values({name: value for name, value in document.items() if name != "_id"}))
    path = data.draw(st.sampled_from(list(inner)), "field")
    value = data.draw(JSON, "instead")
    assume(canonical_json({"value": value}) != canonical_json({"value": inner[path]}))
    assume(path != ("version",) or value not in range(LAST_POSITION + 1))  # the unique index would reject it
    await replace_documents(unstreamed_ledger, replace_value(document, path, value))
    try:
        result = await verify_log(unstreamed_ledger.event_store)
        assert result.problem is not None
        assert result.problem.position == document["_id"]
        assert result.events == document["_id"] - 1
    finally:
        await replace_documents(unstreamed_ledger, document)


# Removed, moved and forged events ---------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [1, 3, 5, 7, 9, 10])
async def test_removed_event_is_detected(unstreamed_ledger: Ledger, position: int) -> None:
    await create_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.delete_one({"_id": position})
    check_missing_at(await verify_log(unstreamed_ledger.event_store), position)


async def test_event_replaced_by_voided_position_is_detected(
    unstreamed_ledger: Ledger,
) -> None:
    documents = await create_history(unstreamed_ledger)
    await replace_documents(unstreamed_ledger, build_void_document(3))
    assert documents[9]["stream"] == documents[2]["stream"]
    check_problem_at(
        await verify_log(unstreamed_ledger.event_store),
        documents[9],
        "version 1 precedes it: version 2 is missing",
    )


async def test_removed_event_with_shifted_positions_is_detected(unstreamed_ledger: Ledger) -> None:
    first = (await unstreamed_ledger.submit_job()).events[0].stream
    for name in ("alice", "bob", "carol"):
        await handle_command(unstreamed_ledger.event_store, first, ChangeAccess(name, ACCESS), meta=EVENT_METADATA)
    documents = await load_event_documents(unstreamed_ledger.db)
    await unstreamed_ledger.db.events.delete_one({"_id": 4})
    await replace_documents(unstreamed_ledger, *(document | {"_id": document["_id"] - 1} for document in documents[2:]))
    check_problem_at(
        await verify_log(unstreamed_ledger.event_store),
        documents[2] | {"_id": 2},
        "version 1 precedes it: version 2 is missing",
    )


async def test_removed_start_of_stream_is_detected(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    await replace_documents(unstreamed_ledger, build_void_document(1))
    check_problem_at(
        await verify_log(unstreamed_ledger.event_store), documents[2], "no event precedes it: version 1 is missing"
    )


async def test_swapped_events_of_stream_are_detected(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    third, tenth = documents[2], documents[9]
    await replace_documents(
        unstreamed_ledger, build_void_document(10)
    )  # the unique index on (stream, version) prevents a swap in one step
    await replace_documents(unstreamed_ledger, build_void_document(3), third | {"_id": 10})
    await replace_documents(unstreamed_ledger, tenth | {"_id": 3})
    check_problem_at(
        await verify_log(unstreamed_ledger.event_store),
        tenth | {"_id": 3},
        "version 1 precedes it: version 2 is missing",
    )


async def test_swapped_events_with_new_hashes_are_detected_by_links(
    unstreamed_ledger: Ledger,
) -> None:
    documents = await create_history(unstreamed_ledger)
    third, tenth = documents[2], documents[9]
    now_third = add_hash(tenth | {"_id": 3, "version": 2})
    now_tenth = add_hash(third | {"_id": 10, "version": 3})
    await replace_documents(unstreamed_ledger, build_void_document(10))
    await replace_documents(unstreamed_ledger, now_third)
    await replace_documents(unstreamed_ledger, now_tenth)
    check_problem_at(await verify_log(unstreamed_ledger.event_store), now_third, "is not linked to the event before it")


@pytest.mark.parametrize(("forged_position", "expected_position"), [(1, 3), (2, 4), (3, 10), (4, 11)])
async def test_forged_event_with_new_hash_is_detected_by_next_link(
    unstreamed_ledger: Ledger, forged_position: int, expected_position: int
) -> None:
    documents = await create_history(unstreamed_ledger)
    original = documents[forged_position - 1]
    await replace_documents(unstreamed_ledger, add_hash(original | {"data": original["data"] | {"user_id": "mallory"}}))
    assert documents[expected_position - 1]["stream"] == original["stream"]
    check_problem_at(
        await verify_log(unstreamed_ledger.event_store),
        documents[expected_position - 1],
        "is not linked to the event before it in its stream",
    )


async def test_duplicate_version_is_detected(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.drop_indexes()
    await unstreamed_ledger.db.events.insert_one(documents[-1] | {"_id": LAST_POSITION + 1})
    result = await verify_log(unstreamed_ledger.event_store)
    assert result.problem is not None
    assert "the unique index on (stream, version) is missing" in result.problem.description


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
async def test_forged_voided_position_is_detected(unstreamed_ledger: Ledger, changes: Document) -> None:
    documents = await create_history(unstreamed_ledger)
    forged = add_hash(documents[4] | changes)
    await replace_documents(unstreamed_ledger, forged)
    check_problem_at(
        await verify_log(unstreamed_ledger.event_store), forged, "is neither an event nor a voided position"
    )


# Manipulations that only a digest reveals -------------------------------------------------------------------------


async def test_earlier_digest_matches_after_later_appends(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    assert get_digest(check_valid(await verify_log(unstreamed_ledger.event_store, up_to=7))) == compute_digest(
        documents[:7]
    )
    for end in range(1, LAST_POSITION + 1):
        check_valid(await verify_log(unstreamed_ledger.event_store, expected_digest=compute_digest(documents[:end])))
        check_valid(
            await verify_log(unstreamed_ledger.event_store, up_to=end, expected_digest=compute_digest(documents[:end]))
        )


@pytest.mark.parametrize(("after", "up_to"), [(1, None), (1, 7), (0, 6)])
async def test_expected_digest_outside_range_is_rejected(
    unstreamed_ledger: Ledger, after: int, up_to: int | None
) -> None:
    documents = await create_history(unstreamed_ledger)
    with pytest.raises(ValueError, match="all events up to position 7"):
        await verify_log(
            unstreamed_ledger.event_store, after=after, up_to=up_to, expected_digest=compute_digest(documents[:7])
        )


async def test_forged_last_event_is_detected_by_digest_only(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    await replace_documents(unstreamed_ledger, add_hash(documents[-1] | {"meta": {"actor": "user:mallory"}}))
    check_valid(await verify_log(unstreamed_ledger.event_store))
    result = await verify_log(unstreamed_ledger.event_store, expected_digest=compute_digest(documents))
    assert result.problem == IntegrityProblem(LAST_POSITION, DIGEST_MISMATCH)


async def test_removed_end_is_detected_by_digest_only(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.delete_many({"_id": {"$gt": 8}})
    assert check_valid(await verify_log(unstreamed_ledger.event_store)).position == 8
    check_valid(await verify_log(unstreamed_ledger.event_store, expected_digest=compute_digest(documents[:8])))
    for end in range(9, LAST_POSITION + 1):
        result = await verify_log(unstreamed_ledger.event_store, expected_digest=compute_digest(documents[:end]))
        assert result.problem is not None
        assert result.problem.position == end
        assert "the log ends at position 8" in result.problem.description
    await unstreamed_ledger.db.events.delete_many({})
    result = await verify_log(unstreamed_ledger.event_store, expected_digest=compute_digest(documents))
    assert "the log ends at position 0" in str(result.problem)


async def test_replaced_end_is_detected_by_digest_only(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.delete_many({"_id": {"$gt": 8}})
    await unstreamed_ledger.db.counters.update_one({"_id": "events"}, {"$set": {"next": 8}})
    for _ in range(6):
        await unstreamed_ledger.submit_job()
    check_valid(await verify_log(unstreamed_ledger.event_store))
    result = await verify_log(unstreamed_ledger.event_store, expected_digest=compute_digest(documents))
    assert result.problem == IntegrityProblem(LAST_POSITION, DIGEST_MISMATCH)


async def test_missing_event_with_expected_digest_is_detected(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.delete_one({"_id": 9})
    result = await verify_log(unstreamed_ledger.event_store, expected_digest=compute_digest(documents[:9]))
    assert result.problem is not None
    assert result.problem.position == 9


async def forge_stream(ledger: Ledger, documents: Sequence[Document]) -> None:
    """Forge a whole stream with valid links."""
    forged = add_hash(documents[0] | {"data": documents[0]["data"] | {"user_id": "mallory"}})
    following = add_hash(documents[2] | {"prev": forged["hash"]})
    await replace_documents(ledger, forged, following, add_hash(documents[9] | {"prev": following["hash"]}))


async def void_last_event(ledger: Ledger, documents: Sequence[Document]) -> None:
    """Replace the last event of a stream by a voided position."""
    await replace_documents(ledger, build_void_document(documents[8]["_id"]))


async def swap_positions(ledger: Ledger, documents: Sequence[Document]) -> None:
    """Swap the positions of events of two streams."""
    await ledger.db.events.delete_many({"_id": {"$in": [3, 4]}})
    await replace_documents(ledger, documents[2] | {"_id": 4}, documents[3] | {"_id": 3})


Forgery = Callable[[Ledger, Sequence[Document]], Awaitable[None]]


@pytest.mark.parametrize("forgery", [forge_stream, void_last_event, swap_positions])
async def test_forged_stream_is_detected_by_digest_only(unstreamed_ledger: Ledger, forgery: Forgery) -> None:
    documents = await create_history(unstreamed_ledger)
    earlier = check_valid(await verify_log(unstreamed_ledger.event_store))
    await forgery(unstreamed_ledger, documents)
    check_valid(await verify_log(unstreamed_ledger.event_store))
    assert (
        await verify_log(unstreamed_ledger.event_store, expected_digest=get_digest(earlier))
    ).problem == IntegrityProblem(LAST_POSITION, DIGEST_MISMATCH)


# Invalid positions ------------------------------------------------------------------------------------------------

INVALID_POSITIONS: dict[str, Any] = {
    "zero": 0,
    "negative": -1,
    "minus infinity": float("-inf"),
    "text": "12",
    "an ObjectId": ObjectId(),
    "true": True,
    "null": None,
    "a document": {"position": 3},
    "MaxKey": bson.MaxKey(),
    "a fraction": 2.5,
    "a fraction at the end": LAST_POSITION + 0.5,
    "not a number": float("nan"),
    "infinity": float("inf"),
    "a decimal fraction": Decimal128("2.5"),
    "a large decimal": Decimal128("100"),
    "a decimal that is not a number": Decimal128("NaN"),
}


@pytest.mark.parametrize("position", INVALID_POSITIONS.values(), ids=INVALID_POSITIONS.keys())
async def test_event_at_invalid_position_is_detected(unstreamed_ledger: Ledger, position: Any) -> None:
    await create_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.insert_one(
        add_hash((await load_event_documents(unstreamed_ledger.db))[0] | {"_id": position, "stream": "job-x"})
    )
    result = await verify_log(unstreamed_ledger.event_store)
    assert result.problem is not None
    assert f"{position!r}, which is not a valid position" in result.problem.description


async def test_float_position_is_detected(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    await move_document(unstreamed_ledger, documents[2], 3.0)
    result = await verify_log(unstreamed_ledger.event_store)
    assert result.problem is not None
    assert (
        "its _id is a float" in result.problem.description
        or "3.0, which is not a valid position" in result.problem.description
    )


@pytest.mark.parametrize("position", [9, 5], ids=["the only event of its stream", "a voided position"])
async def test_event_moved_between_positions_is_detected(unstreamed_ledger: Ledger, position: int) -> None:
    documents = await create_history(unstreamed_ledger)
    await move_document(unstreamed_ledger, documents[position - 1], position - 0.5)
    result = await verify_log(unstreamed_ledger.event_store)
    assert result.problem is not None
    assert result.problem.position == position or "which is not a valid position" in result.problem.description


async def drop_index(ledger: Ledger) -> None:
    await ledger.db.events.drop_indexes()


async def make_index_non_unique(ledger: Ledger) -> None:
    await ledger.db.events.drop_indexes()
    await ledger.db.events.create_index([("stream", 1), ("version", 1)])


async def make_index_partial(ledger: Ledger) -> None:
    await ledger.db.events.drop_indexes()
    only_late = {"version": {"$gt": 1_000_000}}
    await ledger.db.events.create_index([("stream", 1), ("version", 1)], unique=True, partialFilterExpression=only_late)


@pytest.mark.parametrize("damage_index", [drop_index, make_index_non_unique, make_index_partial])
async def test_missing_unique_index_is_detected(
    unstreamed_ledger: Ledger, damage_index: Callable[[Ledger], Awaitable[None]]
) -> None:
    await create_history(unstreamed_ledger)
    await damage_index(unstreamed_ledger)
    result = await verify_log(unstreamed_ledger.event_store)
    assert result.problem is not None
    assert "the unique index on (stream, version) is missing" in result.problem.description
    await unstreamed_ledger.db.events.drop_indexes()
    await unstreamed_ledger.event_store.prepare()
    check_valid(await verify_log(unstreamed_ledger.event_store))


# Ranges -----------------------------------------------------------------------------------------------------------


async def test_every_range_of_intact_log_is_valid(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    for after in range(LAST_POSITION + 2):
        for up_to in (*range(after, LAST_POSITION + 1), LAST_POSITION + 5, None):
            result = check_valid(await verify_log(unstreamed_ledger.event_store, after=after, up_to=up_to))
            stored = documents[after:up_to]
            assert result.events == len(stored)
            assert result.voided == sum(document["stream"] == "void" for document in stored)
            if stored:
                assert result.position == stored[-1]["_id"]
            # A range that starts later has no digest, because it would look like a digest of the whole log.
            assert result.digest == (None if after else compute_digest(stored)[1] if stored else GENESIS_HASH)


async def test_range_detects_problems_inside_only(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    for position in (1, 4, 6, 9, LAST_POSITION):
        forged = documents[position - 1] | {"time": NOON - timedelta(days=1)}
        await replace_documents(unstreamed_ledger, forged)
        for after in range(LAST_POSITION):
            for up_to in range(after + 1, LAST_POSITION + 1):
                result = await verify_log(unstreamed_ledger.event_store, after=after, up_to=up_to)
                if after < position <= up_to:
                    check_problem_at(result, forged, "its hash", after=after)
                else:
                    check_valid(result)
        await replace_documents(unstreamed_ledger, documents[position - 1])


@pytest.mark.parametrize("after", range(10))
async def test_broken_link_to_event_before_range_is_detected(unstreamed_ledger: Ledger, after: int) -> None:
    documents = await create_history(unstreamed_ledger)
    await replace_documents(unstreamed_ledger, add_hash(documents[2] | {"meta": {"actor": "user:mallory"}}))
    check_problem_at(
        await verify_log(unstreamed_ledger.event_store, after=after), documents[9], "is not linked", after=after
    )


async def test_misplaced_earlier_version_in_range_is_detected(
    unstreamed_ledger: Ledger,
) -> None:
    documents = await create_history(unstreamed_ledger)
    third, tenth = documents[2], documents[9]
    await replace_documents(unstreamed_ledger, build_void_document(10))
    await replace_documents(unstreamed_ledger, build_void_document(3), third | {"_id": 10})
    await replace_documents(unstreamed_ledger, tenth | {"_id": 3})
    for after in (1, 2):
        check_problem_at(
            await verify_log(unstreamed_ledger.event_store, after=after),
            tenth | {"_id": 3},
            "no event precedes it: version 2 is missing, or in the wrong place",
            after=after,
        )


async def test_gap_is_detected_only_inside_range(unstreamed_ledger: Ledger) -> None:
    await create_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.delete_one({"_id": 9})
    check_valid(await verify_log(unstreamed_ledger.event_store, after=9))
    check_valid(await verify_log(unstreamed_ledger.event_store, up_to=8))
    result = await verify_log(unstreamed_ledger.event_store, after=7, up_to=10)
    assert result.problem is not None
    assert (result.problem.position, result.events, result.position) == (9, 1, 8)


async def test_link_to_event_without_hash_before_range_is_detected(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.update_one({"_id": 3}, {"$unset": {"hash": 1}})
    check_problem_at(await verify_log(unstreamed_ledger.event_store, after=5), documents[9], after=5)


async def test_on_progress_receives_position_and_end(connection: Connection) -> None:
    async with open_ledger(
        connection, SHORT_GAP_LIMITS, with_change_stream=False, store_class=SmallPageStore
    ) as ledger:
        await create_history(ledger)
        progress: list[tuple[int, int]] = []
        await verify_log(ledger.event_store, on_progress=lambda position, up_to: progress.append((position, up_to)))
        assert progress == [(PAGE_EVENTS, LAST_POSITION), (LAST_POSITION, LAST_POSITION)]
        progress.clear()
        await verify_log(
            ledger.event_store,
            after=2,
            up_to=10,
            on_progress=lambda position, up_to: progress.append((position, up_to)),
        )
        assert progress == [(9, 10), (10, 10)]


# Memory -----------------------------------------------------------------------------------------------------------

STREAMS, ROUNDS, MAX_STREAMS = 30, 4, 5


class MeasuredDict(OrderedDict[str, StreamHead]):
    """A dictionary that records its largest size."""

    largest = 0

    def __setitem__(self, name: str, head: StreamHead) -> None:
        super().__setitem__(name, head)
        MeasuredDict.largest = max(MeasuredDict.largest, len(self))


@pytest.fixture
def low_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_MAX_CACHED_HEADS", MAX_STREAMS)


async def append_alternately(ledger: Ledger) -> list[Document]:
    """Append to many streams in turn, so that each continues after all others."""
    jobs = [await ledger.submit_job() for _ in range(STREAMS)]
    for _ in range(ROUNDS - 1):
        for number, job in enumerate(jobs):
            changed = ChangeAccess("alice", ACCESS)
            jobs[number] = await handle_command(
                ledger.event_store, job.events[0].stream, changed, meta=EVENT_METADATA, stream_state=job.stream_state
            )
    return await load_event_documents(ledger.db)


@pytest.mark.usefixtures("low_memory_limit")
@pytest.mark.parametrize("kind", [EventStore, SmallPageStore], ids=["one page", "many pages"])
async def test_more_streams_than_memory_limit_are_valid(connection: Connection, kind: type[EventStore]) -> None:
    async with open_ledger(connection, SHORT_GAP_LIMITS, with_change_stream=False, store_class=kind) as ledger:
        documents = await append_alternately(ledger)
        assert check_valid(await verify_log(ledger.event_store)).events == len(documents) == STREAMS * ROUNDS
        for after in (1, STREAMS - 3, STREAMS * 2 + 1):
            check_valid(await verify_log(ledger.event_store, after=after))


async def test_one_stream_above_memory_limit_is_valid(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used stream continues right after the first stream above the limit."""
    monkeypatch.setattr(verification, "_MAX_CACHED_HEADS", 2 * PAGE_EVENTS)
    async with open_ledger(
        connection, SHORT_GAP_LIMITS, with_change_stream=False, store_class=SmallPageStore
    ) as ledger:
        first, *_ = [await ledger.submit_job() for _ in range(2 * PAGE_EVENTS)]
        await ledger.submit_job()
        await handle_command(
            ledger.event_store, first.events[0].stream, ChangeAccess("alice", ACCESS), meta=EVENT_METADATA
        )
        check_valid(await verify_log(ledger.event_store))


@pytest.mark.usefixtures("low_memory_limit")
@pytest.mark.parametrize("position", [STREAMS // 2, STREAMS, STREAMS + 4, 3 * STREAMS - 1])
async def test_evicted_stream_is_still_verified(connection: Connection, position: int) -> None:
    async with open_ledger(
        connection, SHORT_GAP_LIMITS, with_change_stream=False, store_class=SmallPageStore
    ) as ledger:
        documents = await append_alternately(ledger)
        original, following = documents[position - 1], documents[position - 1 + STREAMS]
        assert following["stream"] == original["stream"]
        await replace_documents(ledger, add_hash(original | {"meta": {"actor": "user:mallory"}}))
        check_problem_at(await verify_log(ledger.event_store), following, "is not linked to the event before it")
        await replace_documents(ledger, build_void_document(position))
        check_problem_at(await verify_log(ledger.event_store), following, f"version {original['version']} is missing")


@pytest.mark.usefixtures("low_memory_limit")
async def test_remembered_streams_are_bounded_by_limit_and_page(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "OrderedDict", MeasuredDict)
    MeasuredDict.largest = 0
    async with open_ledger(
        connection, SHORT_GAP_LIMITS, with_change_stream=False, store_class=SmallPageStore
    ) as ledger:
        for _ in range(10 * PAGE_EVENTS):
            await ledger.submit_job()
        check_valid(await verify_log(ledger.event_store))
    assert 0 < MeasuredDict.largest <= MAX_STREAMS + PAGE_EVENTS


# Gaps -------------------------------------------------------------------------------------------------------------


class GapWatchingStore(EventStore):
    """An event store that pauses at the second read that begins with a gap, until the test has filled the gap."""

    def __init__(self, db: Database, limits: EventStoreLimits) -> None:
        super().__init__(db, limits)
        self.gap_reads = 0
        self.is_waiting = asyncio.Event()
        self.is_filled = asyncio.Event()

    async def read_documents(self, *, after: int, limit: int) -> list[StoredDocument]:
        documents = await super().read_documents(after=after, limit=limit)
        if documents and documents[0][0]["_id"] != after + 1:
            self.gap_reads += 1
            if self.gap_reads == 2:
                self.is_waiting.set()
                await self.is_filled.wait()
        return documents

    async def fill_gap(self, document: Document) -> None:
        """Wait until the verification has read the gap twice, then insert the missing event."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self.is_waiting.wait()
        await self.db.events.insert_one(document)
        self.gap_reads = 0
        self.is_waiting.clear()
        self.is_filled.set()
        self.is_filled = asyncio.Event()


async def test_gap_of_dead_appender_is_reported_until_filled(unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.submit_job()
    await create_position_gap(unstreamed_ledger.db)
    await unstreamed_ledger.submit_job()
    result = await verify_log(unstreamed_ledger.event_store)
    check_missing_at(result, 2)
    assert "no reader has filled the gap yet" in str(result.problem)
    await read_all_events(unstreamed_ledger.event_store)
    assert check_valid(await verify_log(unstreamed_ledger.event_store)).voided == 1


async def test_gap_closed_during_verification_is_valid(short_gap_ledger: Ledger) -> None:
    documents = await create_history(short_gap_ledger)
    await short_gap_ledger.db.events.delete_one({"_id": 9})
    store = GapWatchingStore(short_gap_ledger.db, SHORT_GAP_LIMITS)
    verifying = asyncio.create_task(verify_log(store))
    await store.fill_gap(documents[8])
    assert not verifying.done()
    assert check_valid(await verifying).events == LAST_POSITION


async def test_timeout_applies_to_each_gap(short_gap_ledger: Ledger) -> None:
    """Each gap has its own timeout, because a slow appender may have reserved many positions."""
    documents = await create_history(short_gap_ledger)
    await short_gap_ledger.db.events.delete_many({"_id": {"$in": [2, 4, 6, 8]}})
    store = GapWatchingStore(short_gap_ledger.db, SHORT_GAP_LIMITS)
    verifying = asyncio.create_task(verify_log(store))
    for position in (2, 4, 6, 8):
        await store.fill_gap(documents[position - 1])
    assert check_valid(await verifying).events == LAST_POSITION


async def test_events_after_start_of_verification_are_ignored(connection: Connection) -> None:
    async with open_ledger(
        connection, SHORT_GAP_LIMITS, with_change_stream=False, store_class=SmallPageStore
    ) as ledger:
        await create_history(ledger)
        progress: list[tuple[int, int]] = []

        class AppendingStore(SmallPageStore):
            async def head_position(self, session: AsyncClientSession | None = None) -> int:
                head = await super().head_position(session)
                await create_position_gap(ledger.db)
                await ledger.submit_job()
                return head

        log = AppendingStore(ledger.db, SHORT_GAP_LIMITS)
        result = check_valid(
            await verify_log(log, on_progress=lambda position, up_to: progress.append((position, up_to)))
        )
        assert (result.events, result.position) == (LAST_POSITION, LAST_POSITION)
        assert progress[-1] == (LAST_POSITION, LAST_POSITION)


def test_problem_text_names_place() -> None:
    assert str(IntegrityProblem(3, "odd", "job-1", 2)) == "position 3 (job-1, version 2): odd"
    assert str(IntegrityProblem(3, "odd")) == "position 3: odd"
