"""What a later version has written is shown as it was stored, and the API goes on answering."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import create_model

from jobledger.ledger.domain.events import Event, EventMetadata, JobSubmitted
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import new_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.ledger.store.event_store import EventStore
from tests.api.conftest import Api, run_api
from tests.support.ledger_setup import load_event_documents

UNKNOWN: type[Event] = create_model("JobRepainted", __base__=Event, colour=(str, ...))
NEWER = create_model("JobSubmitted", __base__=JobSubmitted)
NEWER.schema_version = JobSubmitted.schema_version + 1
DAMAGED: type[Event] = create_model("JobClaimed", __base__=Event, attempt=(str, ...))


async def go_on(log: EventStore, stream: str, *events: Event) -> None:
    """Append to a stream without reading what stands there."""
    there = await log.read_stream(stream)
    head = StreamHead(there[-1].version, there[-1].position, there[-1].hash) if there else StreamHead()
    await log.append(StreamAppend(stream, head, events, EventMetadata("user:tomorrow"), datetime.now(UTC)))


@pytest.fixture
async def job_id(mongodb_uri: str, db_name: str, tmp_path: Path) -> str:
    """A job that is in the views."""
    submitted = []
    async for api in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api", "projector"})):
        submitted.append(await api.submit({"text": "hello"}))
        assert (await api.get(f"/api/events/jobs/{submitted[0]}", 1)).status_code == 200
    return submitted[0]


@pytest.fixture
async def older(mongodb_uri: str, db_name: str, tmp_path: Path, job_id: str) -> AsyncIterator[Api]:
    """The API alone, as this version has it, over a log to which a later one has written since."""
    async for api in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api"})):
        damaged = DAMAGED.model_validate({"attempt": "often"})
        await go_on(api.event_store, job_id, UNKNOWN.model_validate({"colour": "red"}), damaged)
        newer = NEWER.model_validate({"job_type": "echo", "parameters": {}, "user_id": "alice"})
        await go_on(api.event_store, new_job_id(), newer)
        yield api


def as_shown(document: Document) -> Document:
    return {
        "position": document["_id"],
        "event_id": document["event_id"],
        "stream": document["stream"],
        "version": document["version"],
        "type": document["type"],
        "time": document["time"].isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "schema": document["schema"],
        "data": document["data"],
        "meta": document["meta"],
        "hash": document["hash"].hex(),
    }


def same(event: Document, document: Document) -> None:
    """A whole number of milliseconds may be written with three digits or with six."""
    shown = as_shown(document)
    assert datetime.fromisoformat(event["time"]) == document["time"]
    assert {**event, "time": shown["time"]} == shown


async def test_the_history_of_a_job_shows_what_this_version_cannot_read(older: Api, job_id: str) -> None:
    answer = await older.get(f"/api/events/jobs/{job_id}/history")
    assert answer.status_code == 200
    events = answer.json()["events"]
    assert [event["type"] for event in events] == ["JobSubmitted", "JobRepainted", "JobClaimed"]
    assert events[1]["data"] == {"colour": "red"}
    for event, document in zip(events, await load_event_documents(older.db, {"stream": job_id}), strict=True):
        same(event, document)


async def test_the_live_stream_shows_what_this_version_cannot_read(older: Api, job_id: str) -> None:
    documents = await load_event_documents(older.db)
    events = await older.take_events(4, after=0)
    for event, document in zip(events, documents, strict=True):
        assert event.pop("sse_id") == str(document["_id"])
        same(event, document)
    assert [event["type"] for event in await older.take_events(3, after=0, job_id=job_id)] == [
        "JobSubmitted",
        "JobRepainted",
        "JobClaimed",
    ]
    live = asyncio.create_task(older.take_events(2, after=4))
    await go_on(older.event_store, job_id, UNKNOWN.model_validate({"colour": "blue"}))
    later = await older.submit()
    assert [(event["type"], event["stream"]) for event in await live] == [
        ("JobRepainted", job_id),
        ("JobSubmitted", later),
    ]


async def test_the_job_itself_the_lists_and_new_jobs_are_still_answered(older: Api, job_id: str) -> None:
    for path in (f"/api/events/jobs/{job_id}", "/api/events/jobs", "/api/monitoring/events/stats", "/readyz"):
        assert (await older.get(path)).status_code == 200, path
    assert (await older.get(f"/api/events/jobs/{await older.submit()}")).status_code == 200


async def test_what_cannot_be_decided_on_is_refused_with_the_reason(older: Api, job_id: str) -> None:
    before = await older.event_store.head_position()
    newer = (await load_event_documents(older.db))[-1]["stream"]
    for answer in (
        await older.post(f"/api/events/jobs/{job_id}/cancel"),
        await older.get(f"/api/events/jobs/{newer}"),
        await older.get(f"/api/events/jobs/{newer}/history"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (500, "unreadable_event")
        assert "which this version of Jobledger does not know" in answer.json()["message"]
    assert await older.event_store.head_position() == before
