"""A log with a known history, changes to its documents, and checks of the result of a verification."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import pytest

from jobledger.ledger.domain.commands import ClaimJob, SubmitBatch, SubmitJob
from jobledger.ledger.domain.delivery import build_delivery_id
from jobledger.ledger.domain.events import BATCH_EVENTS, DELIVERY_EVENTS, JOB_EVENTS, WORKER_EVENTS, BatchSubmitted
from jobledger.ledger.domain.worker import build_worker_stream
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.command_handler import create_batch_id, create_job_id, create_streams, handle_command
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.ledger.store.event_store import EventStore, StoredDocument
from jobledger.ledger.store.hash_chain import GENESIS_HASH, build_hash_input
from jobledger.ledger.store.verification import IntegrityProblem, VerificationResult
from tests.support.event_examples import EVENT_EXAMPLES, NOON, make_job_submitted
from tests.support.ledger_setup import (
    EVENT_METADATA,
    Ledger,
    create_position_gap,
    load_event_documents,
    open_ledger,
    read_all_events,
)
from tests.support.worker_reports import report_progress

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
    batch_id, job_ids = create_batch_id(), [create_job_id(), create_job_id()]
    batch = SubmitBatch(BatchSubmitted(total_jobs=2, job_ids=job_ids, user_id="alice"))
    await create_streams(  # 7 to 9
        ledger.event_store,
        [(batch_id, batch), *((job_id, SubmitJob(make_job_submitted())) for job_id in job_ids)],
        meta=EVENT_METADATA,
    )
    for stream in streams:  # 10 and 11
        await handle_command(
            ledger.event_store, stream, report_progress("w1", 1, "page", 12.5, "half"), meta=EVENT_METADATA
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
        (create_job_id(), JOB_EVENTS),
        (create_batch_id(), BATCH_EVENTS),
        (build_delivery_id("job-1", 5), DELIVERY_EVENTS),
        (build_worker_stream("host-1"), WORKER_EVENTS),
    ):
        events = [example for example in EVENT_EXAMPLES if type(example) in members]
        await ledger.event_store.append(StreamAppend(stream, StreamHead(), events, EVENT_METADATA, NOON))
    await create_position_gap(ledger.db)
    await ledger.submit_job()
    await read_all_events(ledger.event_store)
    return await load_event_documents(ledger.db)


def add_hash(document: Document) -> Document:
    return document | {"hash": sha256(build_hash_input(document)).digest()}


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
    await ledger.db.events.delete_many({"_id": {"$in": [document["_id"] for document in documents]}})
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


class FailedCases(dict[str, str]):
    """Failed assertions by the name of their case. A test with several cases calls `check_empty` at its end."""

    @contextmanager
    def collect(self, name: str) -> Iterator[None]:
        try:
            yield
        except (AssertionError, pytest.fail.Exception) as error:
            self[name] = str(error)

    def check_empty(self) -> None:
        assert not self, "\n".join(f"{name}: {error}" for name, error in self.items())


def check_missing_at(result: VerificationResult, position: int) -> None:
    problem = result.problem
    assert problem is not None
    assert (problem.position, problem.stream, problem.version) == (position, None, None), str(problem)
    assert problem.description.startswith("missing")
    assert (result.events, result.position) == (position - 1, position - 1)
