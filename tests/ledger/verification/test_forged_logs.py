"""Verification detects removed, moved and forged events, some only by the digest of an earlier verification."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import bson
import pytest
from bson import Decimal128, ObjectId

from jobledger.ledger.domain.commands import ChangeAccess
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.store.envelope import build_void_document
from jobledger.ledger.store.hash_chain import GENESIS_HASH
from jobledger.ledger.store.verification import IntegrityProblem, verify_log
from tests.ledger.verification.conftest import (
    DIGEST_MISMATCH,
    LAST_POSITION,
    add_hash,
    check_missing_at,
    check_problem_at,
    check_valid,
    compute_digest,
    create_history,
    get_digest,
    move_document,
    replace_documents,
)
from tests.support.event_examples import ACCESS
from tests.support.ledger_setup import EVENT_METADATA, Ledger, load_event_documents

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
