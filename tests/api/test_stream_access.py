"""Test which events of the log a principal sees, live and in pages, also after access has changed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from jobledger.api.auth.stream_access import _IRRELEVANT_EVENT_TYPES, StreamAccessCache
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.commands import CancelJob, ChangeAccess, Delete, SubmitJob
from jobledger.ledger.domain.events import EVENT_TYPES, AccessControl, EventMetadata, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store.command_handler import Command, create_job_id, handle_command
from jobledger.ledger.store.envelope import VOID_STREAM
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import CheckpointFollower
from tests.api.conftest import Api
from tests.support.ledger_setup import Ledger, open_ledger
from tests.support.polling import DEADLINE_SECONDS
from tests.support.role_runner import make_echo_job

pytestmark = pytest.mark.usefixtures("header_auth")
PRIVATE = AccessControl()
FOR_BOB = {"read_access": ["bob"]}


class StreamReader:
    """Reads a live stream and keeps its events."""

    def __init__(self, api: Api, query: dict[str, Any]) -> None:
        self._api = api
        self._query = query
        self._changed = asyncio.Event()
        self.events: list[tuple[str, str]] = []
        """Stream and type of the events."""
        self.has_ended = False

    async def run(self) -> None:
        async with aclosing(self._api.stream_events(**self._query)) as events:
            async for event in events:
                self.events.append((event["stream"], event["type"]))
                self._changed.set()
        self.has_ended = True
        self._changed.set()

    async def wait_for(self, stream: str, event_type: str) -> None:
        """Wait until an event has arrived."""
        await self._wait_until(lambda: (stream, event_type) in self.events)

    async def wait_for_end(self) -> None:
        await self._wait_until(lambda: self.has_ended)

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def read_stream(api: Api, **query: Any) -> AsyncIterator[StreamReader]:
    """Read a live stream from the start of the log in the background."""
    reader = StreamReader(api, {"after": 0, **query})
    task = asyncio.create_task(reader.run())
    try:
        yield reader
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def load_pages(api: Api, **query: Any) -> list[tuple[str, str]]:
    """Return stream and type of the events on all pages of the log."""
    events: list[tuple[str, str]] = []
    after, head = 0, 1
    while after < head:
        response = await api.http.get(
            "/api/ledger/events", params={"after": after, **query}, headers=api.principal_headers
        )
        assert response.status_code == 200, response.text
        content = response.json()
        events += [(event["stream"], event["type"]) for event in content["events"]]
        assert content["last_position"] > after
        after, head = content["last_position"], content["head"]
    return events


# Visible events -----------------------------------------------------------------------------------------------------


async def test_principal_sees_only_events_of_readable_jobs(api_without_worker: Api) -> None:
    alice = api_without_worker.as_user("alice", ["team-a"])
    jobs = {
        name: await alice.submit(access_control=access)
        for name, access in {
            "private": {},
            "team": {"visibility": "team"},
            "public": {"visibility": "public"},
            "bob": FOR_BOB,
            "group": {"write_access": ["team-b"]},
        }.items()
    }
    marker = await api_without_worker.submit(access_control={"visibility": "public"})
    callers: dict[str, tuple[Api, Collection[str]]] = {
        "owner": (alice, jobs.keys()),
        "admin": (api_without_worker, jobs.keys()),
        "user in read_access": (api_without_worker.as_user("bob"), {"public", "bob"}),
        "group in write_access": (api_without_worker.as_user("bea", ["team-b"]), {"public", "group"}),
        "team of the owner": (api_without_worker.as_user("ann", ["team-a"]), {"public", "team"}),
        "monitor": (api_without_worker.as_user("mona", roles=["monitor"]), {"public"}),
        "anonymous": (api_without_worker.as_user(), {"public"}),
    }
    for caller, (caller_api, visible) in callers.items():
        expected = {jobs[name] for name in visible} | {marker}
        async with read_stream(caller_api) as reader:
            await reader.wait_for(marker, "JobSubmitted")
            assert {stream for stream, _ in reader.events} == expected, caller
        assert {stream for stream, _ in await load_pages(caller_api)} == expected, caller
        for name, job_id in jobs.items():
            status = 200 if name in visible else 404
            response = await caller_api.get(f"/api/ledger/events?stream={job_id}")
            assert response.status_code == status, (caller, name, response.text)


async def test_unreadable_and_missing_streams_get_the_same_response(api_without_worker: Api) -> None:
    alice, bob = api_without_worker.as_user("alice"), api_without_worker.as_user("bob")
    job_id = await alice.submit()
    batch_id = (await alice.submit_batch({}))["batch_id"]
    for path, existing, missing in (
        ("/api/ledger/stream?job_id=", job_id, create_job_id()),
        ("/api/ledger/stream?batch_id=", batch_id, "batch-" + "0" * 24),
        ("/api/ledger/events?stream=", job_id, create_job_id()),
        ("/api/ledger/events?stream=", batch_id, "batch-" + "0" * 24),
        ("/api/ledger/events?stream=", "positions", "position"),
    ):
        responses = [await bob.get(path + stream) for stream in (existing, missing)]
        assert [response.status_code for response in responses] == [404, 404], path
        first, second = (
            response.text.replace(stream, "") for response, stream in zip(responses, (existing, missing), strict=True)
        )
        assert first == second
    assert (await api_without_worker.get(f"/api/ledger/stream?job_id={create_job_id()}")).status_code == 404


async def test_batch_stream_hides_events_of_unreadable_jobs(api_without_worker: Api) -> None:
    alice, bob = api_without_worker.as_user("alice"), api_without_worker.as_user("bob")
    jobs = [
        {"job_type": "echo", "parameters": {}, "access_control": {}},
        {"job_type": "echo", "parameters": {}, "access_control": FOR_BOB},
    ]
    response = await alice.post("/api/events/batches", {"jobs": jobs, "access_control": FOR_BOB})
    batch_id, (hidden, visible) = response.json()["batch_id"], response.json()["job_ids"]
    await api_without_worker.handle_commands(hidden, CancelJob("user:alice"))
    await api_without_worker.handle_commands(visible, CancelJob("user:alice"))
    async with read_stream(bob, batch_id=batch_id) as reader:
        await reader.wait_for(batch_id, "BatchFinished")
        assert {stream for stream, _ in reader.events} == {batch_id, visible}
        types = [event_type for stream, event_type in reader.events if stream == visible]
        assert types == ["JobSubmitted", "JobCancelled"]


async def test_events_without_job_are_visible_to_admins_only(api_without_worker: Api) -> None:
    # A writer that reserves a position and exits, so that the position is voided.
    await api_without_worker.event_store._appender.reserve_positions(1)
    marker = await api_without_worker.submit(access_control={"visibility": "public"})
    bob = api_without_worker.as_user("bob")
    async with (
        read_stream(api_without_worker, types="PositionVoided,JobSubmitted") as admin,
        read_stream(bob) as reader,
    ):
        await admin.wait_for(VOID_STREAM, "PositionVoided")
        await reader.wait_for(marker, "JobSubmitted")
    assert await load_pages(api_without_worker, types="PositionVoided") == [(VOID_STREAM, "PositionVoided")]
    assert await load_pages(bob, types="PositionVoided") == []
    assert (await api_without_worker.get(f"/api/ledger/events?stream={VOID_STREAM}")).json()["last_position"] == 1
    assert (await bob.get(f"/api/ledger/events?stream={VOID_STREAM}")).status_code == 404


# Losing access ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [ChangeAccess("user:alice", PRIVATE), Delete("user:alice")], ids=["access change", "deletion"]
)
async def test_job_stream_ends_when_access_is_lost(api_without_worker: Api, command: Command) -> None:
    alice, bob = api_without_worker.as_user("alice"), api_without_worker.as_user("bob")
    job_id = await alice.submit(access_control=FOR_BOB)
    async with read_stream(bob, job_id=job_id) as reader:
        await reader.wait_for(job_id, "JobSubmitted")
        [last_event] = await api_without_worker.handle_commands(job_id, command)
        await reader.wait_for_end()
        types = [event_type for _, event_type in reader.events]
    # Former readers see that a job was deleted, but not that they lost access to it.
    assert types == (["JobSubmitted", "JobDeleted"] if last_event.type == "JobDeleted" else ["JobSubmitted"])
    response = await bob.get(f"/api/ledger/stream?job_id={job_id}", **{"Last-Event-ID": str(last_event.position)})
    assert (response.status_code, response.json()["code"]) == (404, "job_not_found")


async def test_batch_stream_ends_when_batch_is_deleted(api_without_worker: Api) -> None:
    alice, bob = api_without_worker.as_user("alice"), api_without_worker.as_user("bob")
    batch = await alice.submit_batch({}, access_control=FOR_BOB)
    batch_id, [job_id] = batch["batch_id"], batch["job_ids"]
    async with (
        read_stream(bob, batch_id=batch_id) as reader,
        read_stream(api_without_worker, batch_id=batch_id) as admin,
    ):
        await api_without_worker.handle_commands(job_id, CancelJob("user:alice"))
        await reader.wait_for(batch_id, "BatchFinished")
        response = await api_without_worker.http.delete(
            f"/api/events/batches/{batch_id}", headers=alice.principal_headers
        )
        assert response.status_code == 200, response.text
        await reader.wait_for_end()
        assert reader.events[-2:] == [(job_id, "JobDeleted"), (batch_id, "BatchDeleted")]
        await admin.wait_for(batch_id, "BatchDeleted")
        assert not admin.has_ended


async def test_global_stream_continues_without_job_whose_access_is_lost(
    api_without_worker: Api,
) -> None:
    alice, bob = api_without_worker.as_user("alice"), api_without_worker.as_user("bob")
    job_id, shared_job_id = [await alice.submit(access_control=FOR_BOB) for _ in range(2)]
    async with read_stream(bob) as reader:
        await reader.wait_for(shared_job_id, "JobSubmitted")
        await api_without_worker.handle_commands(job_id, ChangeAccess("user:alice", PRIVATE), CancelJob("user:alice"))
        await api_without_worker.handle_commands(shared_job_id, CancelJob("user:alice"))
        await reader.wait_for(shared_job_id, "JobCancelled")
        assert reader.events == [
            (job_id, "JobSubmitted"),
            (shared_job_id, "JobSubmitted"),
            (shared_job_id, "JobCancelled"),
        ]
        public = AccessControl(visibility="public")
        await api_without_worker.handle_commands(job_id, ChangeAccess("user:alice", public))
        await reader.wait_for(job_id, "JobAccessChanged")  # access is granted again


async def test_history_is_hidden_after_access_is_lost(api_without_worker: Api) -> None:
    alice, bob = api_without_worker.as_user("alice"), api_without_worker.as_user("bob")
    taken, deleted, marker = [await alice.submit(access_control=FOR_BOB) for _ in range(3)]
    assert len(await load_pages(bob)) == 3  # loads the access of the jobs into the cache
    commands: list[tuple[str, Command]] = [
        (taken, ChangeAccess("user:alice", PRIVATE)),
        (taken, CancelJob("user:alice")),
        (deleted, CancelJob("user:alice")),
        (deleted, Delete("user:alice")),
        (marker, CancelJob("user:alice")),
    ]
    for stream, command in commands:
        await api_without_worker.handle_commands(stream, command)

    visible = [(marker, "JobSubmitted"), (deleted, "JobDeleted"), (marker, "JobCancelled")]
    assert await load_pages(bob) == visible
    async with read_stream(bob) as reader:
        await reader.wait_for(marker, "JobCancelled")
        assert reader.events == visible
    assert len(await load_pages(api_without_worker)) == 8


# Races --------------------------------------------------------------------------------------------------------------


class ConcurrentCommandStore(EventStore):
    """Handles a command after the access of a job was read, and lets it be processed before the result is stored."""

    concurrent_command: Command | None = None
    stream_access: StreamAccessCache

    async def iterate_stream_batches(
        self, streams: Collection[str], *, exclude_types: Collection[str] = (), data_expression: Document | None = None
    ) -> AsyncGenerator[list[RecordedEvent], None]:
        chunks = super().iterate_stream_batches(streams, exclude_types=exclude_types, data_expression=data_expression)
        async for chunk in chunks:
            yield chunk
        if (command := self.concurrent_command) is not None:
            self.concurrent_command = None
            recorded = (await handle_command(self, next(iter(streams)), command, meta=EventMetadata("test"))).events
            await self.stream_access.wait_for_position(recorded[-1].position)


@asynccontextmanager
async def run_stream_access(ledger: Ledger) -> AsyncIterator[StreamAccessCache]:
    stream_access = StreamAccessCache(ledger.event_store, CheckpointFollower(ledger.db))
    task = asyncio.create_task(stream_access.run())
    try:
        yield stream_access
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def open_ledger_with_stream_access(uri: str, db_name: str) -> AsyncIterator[tuple[Ledger, StreamAccessCache]]:
    async with (
        asyncio.timeout(DEADLINE_SECONDS),
        open_ledger(Connection(uri, db_name)) as ledger,
        run_stream_access(ledger) as stream_access,
    ):
        yield ledger, stream_access


async def submit_job(event_store: EventStore, **fields: Any) -> RecordedEvent:
    command = SubmitJob(make_echo_job(**fields))
    return (await handle_command(event_store, create_job_id(), command, meta=EventMetadata("test"))).events[0]


async def test_access_change_during_load_is_not_lost(
    mongodb_uri: str, db_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.api.auth.stream_access._MAX_STREAMS", 1)
    async with (
        asyncio.timeout(DEADLINE_SECONDS),
        open_ledger(Connection(mongodb_uri, db_name), store_class=ConcurrentCommandStore) as ledger,
    ):
        event_store = ledger.event_store
        assert isinstance(event_store, ConcurrentCommandStore)
        async with run_stream_access(ledger) as stream_access:
            event_store.stream_access = stream_access
            event = await submit_job(event_store, access_control=AccessControl(**FOR_BOB))
            await stream_access.wait_for_position(
                (await submit_job(event_store)).position
            )  # the first job leaves the cache
            event_store.concurrent_command = ChangeAccess("user:alice", PRIVATE)
            assert not await stream_access.get_viewer(Principal("bob"), event)


async def test_late_event_does_not_undo_newer_access(mongodb_uri: str, db_name: str) -> None:
    async with open_ledger_with_stream_access(mongodb_uri, db_name) as (ledger, stream_access):
        event = await submit_job(ledger.event_store)
        for access in (AccessControl(visibility="public"), PRIVATE):
            await handle_command(
                ledger.event_store, event.stream, ChangeAccess("user:alice", access), meta=EventMetadata("test")
            )
        await stream_access.wait_for_position(event.position + 2)
        _, public, _ = await ledger.event_store.read_stream(event.stream)
        stream_access._access.clear()
        assert not await stream_access.get_viewer(Principal("bob"), event)
        stream_access._process_event(public)
        assert not await stream_access.get_viewer(Principal("bob"), event)


async def test_get_viewer_waits_for_earlier_events(mongodb_uri: str, db_name: str) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS), open_ledger(Connection(mongodb_uri, db_name)) as ledger:
        stream_access = StreamAccessCache(ledger.event_store, CheckpointFollower(ledger.db))
        event = await submit_job(ledger.event_store, access_control=AccessControl(visibility="public"))
        viewer = asyncio.create_task(stream_access.get_viewer(Principal("bob"), event))
        await asyncio.wait({viewer}, timeout=0.2)
        assert not viewer.done()
        processing = asyncio.create_task(stream_access.run())
        assert await viewer
        processing.cancel()


async def test_unknown_event_type_hides_job_from_all_but_admins(mongodb_uri: str, db_name: str) -> None:
    async with open_ledger_with_stream_access(mongodb_uri, db_name) as (ledger, stream_access):
        event = await submit_job(ledger.event_store, access_control=AccessControl(visibility="public"))
        assert await stream_access.get_viewer(Principal("bob"), event)
        [(stored, _)] = await ledger.event_store.read_documents(after=0, limit=1)
        unknown_event = {**stored, "_id": 2, "version": 2, "type": "JobHidden", "event_id": "later"}
        await ledger.db.events.insert_one(unknown_event)
        await stream_access.wait_for_position(2)
        assert not await stream_access.get_viewer(Principal("bob"), event)
        stream_access._access.clear()
        assert not await stream_access.get_viewer(Principal("bob"), event)
        assert await stream_access.get_viewer(Principal("root", roles=frozenset({"admin"})), event)


def test_relevant_event_types_are_those_that_change_access() -> None:
    assert set(EVENT_TYPES) - _IRRELEVANT_EVENT_TYPES == {
        "JobSubmitted",
        "JobAccessChanged",
        "JobDeleted",
        "BatchSubmitted",
        "BatchAccessChanged",
        "BatchDeleted",
    }
