"""Events of a newer version are shown as stored, and the API keeps working beside them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import create_model

from jobledger.ledger.domain.events import Event, EventMetadata, JobSubmitted
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import create_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.ledger.store.event_store import EventStore
from tests.api.conftest import WITHOUT_WORKER, Api, run_api
from tests.support.ledger_setup import load_event_documents

UNKNOWN: type[Event] = create_model("JobRepainted", __base__=Event, colour=(str, ...))
NEWER = create_model("JobSubmitted", __base__=JobSubmitted)
NEWER.schema_version = JobSubmitted.schema_version + 1
DAMAGED: type[Event] = create_model("JobClaimed", __base__=Event, attempt=(str, ...))


async def append_unchecked(event_store: EventStore, stream: str, *events: Event) -> None:
    """Append to a stream without decoding its events."""
    stored = await event_store.read_stream(stream)
    head = StreamHead(stored[-1].version, stored[-1].position, stored[-1].hash) if stored else StreamHead()
    await event_store.append(StreamAppend(stream, head, events, EventMetadata("user:tomorrow"), datetime.now(UTC)))


@pytest.fixture
async def job_id(mongodb_uri: str, db_name: str, tmp_path: Path) -> str:
    """ID of a job that is in the views."""
    job_ids = []
    async for api in run_api(mongodb_uri, db_name, tmp_path, WITHOUT_WORKER):
        job_ids.append(await api.submit({"text": "hello"}))
        assert (await api.get(f"/api/events/jobs/{job_ids[0]}", 1)).status_code == 200
    return job_ids[0]


@pytest.fixture
async def older_api(mongodb_uri: str, db_name: str, tmp_path: Path, job_id: str) -> AsyncIterator[Api]:
    """An API without projector over a log to which a newer version has appended."""
    async for api in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api"})):
        damaged = DAMAGED.model_validate({"attempt": "invalid"})
        await append_unchecked(api.event_store, job_id, UNKNOWN.model_validate({"colour": "red"}), damaged)
        newer = NEWER.model_validate({"job_type": "echo", "parameters": {}, "user_id": "alice"})
        await append_unchecked(api.event_store, create_job_id(), newer)
        yield api


def format_event(document: Document) -> Document:
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


def assert_same_event(event: Document, document: Document) -> None:
    """Compare an event of a response with a stored document. Times may have three or six decimals."""
    expected = format_event(document)
    assert datetime.fromisoformat(event["time"]) == document["time"]
    assert {**event, "time": expected["time"]} == expected


async def test_history_shows_newer_events_as_stored(older_api: Api, job_id: str) -> None:
    response = await older_api.get(f"/api/events/jobs/{job_id}/history")
    assert response.status_code == 200
    events = response.json()["events"]
    assert [event["type"] for event in events] == ["JobSubmitted", "JobRepainted", "JobClaimed"]
    assert events[1]["data"] == {"colour": "red"}
    for event, document in zip(events, await load_event_documents(older_api.db, {"stream": job_id}), strict=True):
        assert_same_event(event, document)


async def test_live_stream_shows_newer_events_as_stored(older_api: Api, job_id: str) -> None:
    documents = await load_event_documents(older_api.db)
    events = await older_api.take_events(4, after=0)
    for event, document in zip(events, documents, strict=True):
        assert event.pop("sse_id") == str(document["_id"])
        assert_same_event(event, document)
    assert [event["type"] for event in await older_api.take_events(3, after=0, job_id=job_id)] == [
        "JobSubmitted",
        "JobRepainted",
        "JobClaimed",
    ]
    live = asyncio.create_task(older_api.take_events(2, after=4))
    await append_unchecked(older_api.event_store, job_id, UNKNOWN.model_validate({"colour": "blue"}))
    submitted = await older_api.submit()
    assert [(event["type"], event["stream"]) for event in await live] == [
        ("JobRepainted", job_id),
        ("JobSubmitted", submitted),
    ]


async def test_jobs_lists_and_submissions_work_beside_newer_events(older_api: Api, job_id: str) -> None:
    for path in (f"/api/events/jobs/{job_id}", "/api/events/jobs", "/api/monitoring/events/stats", "/readyz"):
        assert (await older_api.get(path)).status_code == 200, path
    assert (await older_api.get(f"/api/events/jobs/{await older_api.submit()}")).status_code == 200


async def test_command_on_stream_with_newer_events_is_rejected_with_reason(older_api: Api, job_id: str) -> None:
    before = await older_api.event_store.read_head_position()
    newer_stream = (await load_event_documents(older_api.db))[-1]["stream"]
    for response in (
        await older_api.post(f"/api/events/jobs/{job_id}/cancel"),
        await older_api.get(f"/api/events/jobs/{newer_stream}"),
        await older_api.get(f"/api/events/jobs/{newer_stream}/history"),
    ):
        assert (response.status_code, response.json()["code"]) == (500, "unreadable_event")
        assert "which this version of Jobledger does not know" in response.json()["message"]
    assert await older_api.event_store.read_head_position() == before
