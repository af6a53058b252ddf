"""Verification detects each changed, removed or added field of an event and names its position."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from datetime import datetime, timedelta
from typing import Any

import bson
import pytest
from bson import Code, Decimal128, Int64, ObjectId
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jobledger.ledger.domain.canonical_json import encode_canonical_json
from jobledger.ledger.domain.errors import InvalidEvent
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.hash_chain import GENESIS_HASH
from jobledger.ledger.store.verification import verify_log
from tests.ledger.verification.conftest import (
    LAST_POSITION,
    FailedCases,
    add_hash,
    append_every_type,
    check_problem_at,
    check_valid,
    create_history,
    replace_documents,
)
from tests.support.event_examples import EVENT_EXAMPLES, NOON
from tests.support.ledger_setup import Ledger, load_event_documents
from tests.support.strategies import JSON, OBJECTS
from tests.support.tampered_events import ORIGINAL_EVENT, TAMPERED_FIELDS, TIMESTAMP

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


async def test_changed_event_is_detected(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    failed = FailedCases()
    for change, (position, update) in CHANGES.items():
        with failed.collect(change):
            assert (await unstreamed_ledger.db.events.update_one({"_id": position}, update)).modified_count == 1
            [document] = await load_event_documents(unstreamed_ledger.db, {"_id": position})
            problem = check_problem_at(await verify_log(unstreamed_ledger.event_store), document)
            assert problem.description.startswith(
                ("its hash does not match its content", "its data.message is a NoneType")
            )
        await replace_documents(unstreamed_ledger, documents[position - 1])
    failed.check_empty()
    check_valid(await verify_log(unstreamed_ledger.event_store))


async def test_value_without_json_form_is_detected(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    for value in (ObjectId(), Decimal128("1.5"), b"\1", bson.Regex("x"), 2**60, float("nan")):
        for field in ("data", "meta"):
            await replace_documents(unstreamed_ledger, replace_value(documents[2], (field, "worker_id"), value))
            check_problem_at(await verify_log(unstreamed_ledger.event_store), documents[2])


FIELDS = ("event_id", "stream", "version", "type", "schema", "time", "data", "meta", "prev", "hash")


async def test_missing_envelope_field_is_detected(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    failed = FailedCases()
    for name in FIELDS:
        await unstreamed_ledger.db.events.update_one({"_id": 3}, {"$unset": {name: 1}})
        [stored] = await load_event_documents(unstreamed_ledger.db, {"_id": 3})
        problem = (await verify_log(unstreamed_ledger.event_store)).problem
        with failed.collect(name):
            assert problem is not None
            assert (problem.position, problem.description) == (3, f"lacks the field {name}")
            assert (problem.stream, problem.version) == (stored.get("stream"), stored.get("version"))
        await replace_documents(unstreamed_ledger, documents[2])
    failed.check_empty()
    check_valid(await verify_log(unstreamed_ledger.event_store))


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
        "time": encode_canonical_json(documents[2]["time"]).decode().strip('"'),
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


async def test_encoding_hidden_by_decoding_is_detected_and_named(unstreamed_ledger: Ledger) -> None:
    original = await submit_original(unstreamed_ledger)
    inner = ("data", "parameters", "inner")
    failed = FailedCases()
    for name, (old, new, what) in RAW_CHANGES.items():
        document = original
        if b"forged" in old:  # two fields `b`: decoding keeps the second one, and the hash matches it
            document = add_hash(replace_value(document, inner, {"b": "x"}))
            document = replace_value(document, inner, {"c": "forged", "b": "x"})
        encoded = bson.encode(document)
        assert encoded.count(old) == 1, name
        await unstreamed_ledger.db.events.delete_one({"_id": 2})
        await unstreamed_ledger.db.command(
            {"insert": "events", "documents": [RawBSONDocument(encoded.replace(old, new))]}
        )
        with failed.collect(name):
            check_problem_at(await verify_log(unstreamed_ledger.event_store), document, what)
    failed.check_empty()
    await replace_documents(unstreamed_ledger, original)
    check_valid(await verify_log(unstreamed_ledger.event_store))


async def test_reordered_envelope_is_detected(unstreamed_ledger: Ledger) -> None:
    document = await submit_original(unstreamed_ledger)
    await replace_documents(unstreamed_ledger, {"_id": 2, **dict(reversed(document.items()))})
    check_problem_at(await verify_log(unstreamed_ledger.event_store), document, "its fields are in the wrong order")


@given(parameters=OBJECTS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_submitted_json_is_stored_in_valid_form(unstreamed_ledger: Ledger, parameters: Document) -> None:
    await unstreamed_ledger.submit_job(ORIGINAL_EVENT.model_copy(update={"parameters": parameters}))
    check_valid(await verify_log(unstreamed_ledger.event_store))


async def test_append_of_non_json_type_is_rejected(unstreamed_ledger: Ledger) -> None:
    failed = FailedCases()
    for value in (TIMESTAMP, b"x", Code("x"), Int64(1)):
        name = type(value).__name__
        with failed.collect(name):
            with pytest.raises(InvalidEvent, match=rf"its data\.parameters\.deep\.0 is a.* {name}"):
                await unstreamed_ledger.submit_job(ORIGINAL_EVENT.model_copy(update={"parameters": {"deep": [value]}}))
            assert not await load_event_documents(unstreamed_ledger.db)
    failed.check_empty()


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
                await unstreamed_ledger.db.events.replace_one({"_id": document["_id"]}, forged)
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
    assume(encode_canonical_json({"value": value}) != encode_canonical_json({"value": inner[path]}))
    assume(path != ("version",) or value not in range(LAST_POSITION + 1))  # the unique index would reject it
    await replace_documents(unstreamed_ledger, replace_value(document, path, value))
    try:
        result = await verify_log(unstreamed_ledger.event_store)
        assert result.problem is not None
        assert result.problem.position == document["_id"]
        assert result.events == document["_id"] - 1
    finally:
        await replace_documents(unstreamed_ledger, document)
