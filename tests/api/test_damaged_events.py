"""Test that an event damaged in the database is returned as a stub and does not hide other events."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from jobledger.ledger.domain.events import EventMetadata, JobArchived
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import create_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from tests.api.conftest import Api
from tests.support.event_examples import NOON
from tests.support.polling import DEADLINE_SECONDS
from tests.support.tampered_events import ORIGINAL_EVENT, TAMPERED_FIELDS


async def append_job(api: Api, *later_events: Any) -> list[Document]:
    """Append a job with these events after its submission. Return the stored documents."""
    events = await api.event_store.append(
        StreamAppend(create_job_id(), StreamHead(), [ORIGINAL_EVENT, *later_events], EventMetadata("user:local"), NOON)
    )
    await api.get("/api/monitoring/events/stats", events[-1].position)
    return [dict(event.document) for event in events]


@pytest.mark.timeout(300)
async def test_damaged_event_does_not_hide_other_events(api_without_worker: Api) -> None:
    [first] = await append_job(api_without_worker)
    damaged, archived = await append_job(api_without_worker, JobArchived(by="user:local"))
    [last] = await append_job(api_without_worker)
    positions = [document["_id"] for document in (first, damaged, archived, last)]
    job = damaged["stream"]
    for field, value, _ in TAMPERED_FIELDS.values():
        if field in ("stream", "version"):  # such an event belongs to no stream or has another version
            continue
        await api_without_worker.db.events.update_one({"_id": damaged["_id"]}, {"$set": {field: value}})
        response = await api_without_worker.get("/api/ledger/events?limit=1000")
        assert response.status_code == 200, (field, value, response.text)
        assert [event["position"] for event in response.json()["events"]] == positions
        for path in (
            f"/api/ledger/events?stream={job}",
            f"/api/events/jobs/{job}/history",
            f"/api/events/jobs/{job}/logs",
            f"/api/events/jobs/{job}",
            f"/api/events/jobs/{last['stream']}",
            "/api/events/jobs",
            "/monitoring/events/log",
            f"/monitoring/events/jobs/{job}",
        ):
            response = await api_without_worker.get(path)
            assert response.status_code == 200, (field, value, path, response.text)
        for as_of in (archived["_id"], "2030-01-01T00:00:00Z"):
            response = await api_without_worker.get(f"/api/events/jobs/{job}?as_of={as_of}")
            assert response.status_code in (200, 404, 409), (field, value, response.text)
        async with asyncio.timeout(DEADLINE_SECONDS), aclosing(api_without_worker.stream_events(after=0)) as events:
            assert [(await anext(events))["position"] for _ in positions] == positions
        await api_without_worker.db.events.replace_one({"_id": damaged["_id"]}, damaged)


async def test_stub_of_damaged_event_names_the_field(api_without_worker: Api) -> None:
    [damaged] = await append_job(api_without_worker)
    await api_without_worker.db.events.update_one(
        {"_id": damaged["_id"]}, {"$set": {"data.parameters.text": b"\xde\xad\xbe\xef"}}
    )
    [event] = (await api_without_worker.get("/api/ledger/events")).json()["events"]
    assert (event["position"], event["type"], event["data"]) == (damaged["_id"], "JobSubmitted", {})
    assert "its data.parameters.text is a bytes" in event["unreadable"]
