"""The log for many: each sees the events of jobs that they may read, by what the log says now, live and in pages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from jobledger.api.auth.visibility import _IRRELEVANT_EVENT_TYPES, Visibility
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.commands import CancelJob, ChangeAccess, Delete, SubmitJob
from jobledger.ledger.domain.events import EVENT_TYPES, AccessControl, EventMetadata, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store.command_handler import Command, handle_command, new_job_id
from jobledger.ledger.store.envelope import VOID_STREAM
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import Checkpoint
from tests.api.conftest import DEADLINE_SECONDS, Api
from tests.support.ledger_setup import Ledger, open_ledger
from tests.support.role_runner import make_echo_job

pytestmark = pytest.mark.usefixtures("header_auth")
PRIVATE = AccessControl()
FOR_BOB = {"read_access": ["bob"]}


class Watcher:
    """What somebody has seen of a live stream so far."""

    def __init__(self, api: Api, query: dict[str, Any]) -> None:
        self._api = api
        self._query = query
        self._more = asyncio.Event()
        self.seen: list[dict[str, Any]] = []
        self.ended = False

    async def watch(self) -> None:
        async with aclosing(self._api.stream_events(**self._query)) as events:
            async for event in events:
                self.seen.append(event)
                self._more.set()
        self.ended = True
        self._more.set()

    async def until(self, stream: str, kind: str) -> None:
        """Wait until an event has been seen."""
        await self._until(lambda: (stream, kind) in self.kinds())

    async def until_the_end(self) -> None:
        await self._until(lambda: self.ended)

    async def _until(self, there: Any) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not there():
                self._more.clear()
                await self._more.wait()

    def kinds(self) -> list[tuple[str, str]]:
        return [(event["stream"], event["type"]) for event in self.seen]


@asynccontextmanager
async def watching(api: Api, **query: Any) -> AsyncIterator[Watcher]:
    watcher = Watcher(api, {"after": 0, **query})
    task = asyncio.create_task(watcher.watch())
    try:
        yield watcher
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def do(api: Api, stream: str, command: Command) -> RecordedEvent:
    return (await handle_command(api.event_store, stream, command, meta=EventMetadata("user:alice"))).events[-1]


async def page(api: Api, **query: Any) -> list[tuple[str, str]]:
    """Return stream and type of all events that somebody finds page by page."""
    found: list[tuple[str, str]] = []
    after, head = 0, 1
    while after < head:
        response = await api.http.get(
            "/api/ledger/events", params={"after": after, **query}, headers=api.principal_headers
        )
        assert response.status_code == 200, response.text
        content = response.json()
        found += [(event["stream"], event["type"]) for event in content["events"]]
        assert content["last_position"] > after
        after, head = content["last_position"], content["head"]
    return found


# Who sees what ----------------------------------------------------------------------------------------------------


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
    people: dict[str, tuple[Api, Collection[str]]] = {
        "the owner": (alice, jobs.keys()),
        "an admin": (api_without_worker, jobs.keys()),
        "named": (api_without_worker.as_user("bob"), {"public", "bob"}),
        "in a named group": (api_without_worker.as_user("bea", ["team-b"]), {"public", "group"}),
        "in the owner's team": (api_without_worker.as_user("ann", ["team-a"]), {"public", "team"}),
        "for statistics": (api_without_worker.as_user("mona", roles=["monitor"]), {"public"}),
        "without a name": (api_without_worker.as_user(), {"public"}),
    }
    for who, (asking, visible) in people.items():
        expected = {jobs[name] for name in visible} | {marker}
        async with watching(asking) as watcher:
            await watcher.until(marker, "JobSubmitted")
            assert {stream for stream, _ in watcher.kinds()} == expected, who
        assert {stream for stream, _ in await page(asking)} == expected, who
        for name, job_id in jobs.items():
            status = 200 if name in visible else 404
            response = await asking.get(f"/api/ledger/events?stream={job_id}")
            assert response.status_code == status, (who, name, response.text)


async def test_unreadable_and_missing_streams_get_the_same_response(api_without_worker: Api) -> None:
    alice, bob = api_without_worker.as_user("alice"), api_without_worker.as_user("bob")
    job_id = await alice.submit()
    batch_id = (await alice.submit_batch({}))["batch_id"]
    for path, there, missing in (
        ("/api/ledger/stream?job_id=", job_id, new_job_id()),
        ("/api/ledger/stream?batch_id=", batch_id, "batch-" + "0" * 24),
        ("/api/ledger/events?stream=", job_id, new_job_id()),
        ("/api/ledger/events?stream=", batch_id, "batch-" + "0" * 24),
        ("/api/ledger/events?stream=", "positions", "position"),
    ):
        responses = [await bob.get(path + stream) for stream in (there, missing)]
        assert [response.status_code for response in responses] == [404, 404], path
        first, second = (
            response.text.replace(stream, "") for response, stream in zip(responses, (there, missing), strict=True)
        )
        assert first == second
    assert (await api_without_worker.get(f"/api/ledger/stream?job_id={new_job_id()}")).status_code == 404


async def test_batch_stream_hides_events_of_unreadable_jobs(api_without_worker: Api) -> None:
    alice, bob = api_without_worker.as_user("alice"), api_without_worker.as_user("bob")
    jobs = [
        {"job_type": "echo", "parameters": {}, "access_control": {}},
        {"job_type": "echo", "parameters": {}, "access_control": FOR_BOB},
    ]
    response = await alice.post("/api/events/batches", {"jobs": jobs, "access_control": FOR_BOB})
    batch_id, (hidden, shown) = response.json()["batch_id"], response.json()["job_ids"]
    await do(api_without_worker, hidden, CancelJob("user:alice"))
    await do(api_without_worker, shown, CancelJob("user:alice"))
    async with watching(bob, batch_id=batch_id) as watcher:
        await watcher.until(batch_id, "BatchFinished")
        assert {stream for stream, _ in watcher.kinds()} == {batch_id, shown}
        assert [kind for stream, kind in watcher.kinds() if stream == shown] == ["JobSubmitted", "JobCancelled"]


async def test_events_without_job_are_visible_to_admins_only(api_without_worker: Api) -> None:
    # A writer reserves a position and dies, so the position is voided.
    await api_without_worker.event_store._appender.reserve_positions(1)
    marker = await api_without_worker.submit(access_control={"visibility": "public"})
    bob = api_without_worker.as_user("bob")
    async with watching(api_without_worker, types="PositionVoided,JobSubmitted") as admin, watching(bob) as watcher:
        await admin.until(VOID_STREAM, "PositionVoided")
        await watcher.until(marker, "JobSubmitted")
    assert await page(api_without_worker, types="PositionVoided") == [(VOID_STREAM, "PositionVoided")]
    assert await page(bob, types="PositionVoided") == []
    assert (await api_without_worker.get(f"/api/ledger/events?stream={VOID_STREAM}")).json()["last_position"] == 1
    assert (await bob.get(f"/api/ledger/events?stream={VOID_STREAM}")).status_code == 404


# Losing access ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [ChangeAccess("user:alice", PRIVATE), Delete("user:alice")])
async def test_job_stream_ends_when_access_is_lost(api_without_worker: Api, lost: Command) -> None:
    alice, bob = api_without_worker.as_user("alice"), api_without_worker.as_user("bob")
    job_id = await alice.submit(access_control=FOR_BOB)
    async with watching(bob, job_id=job_id) as watcher:
        await watcher.until(job_id, "JobSubmitted")
        taken = await do(api_without_worker, job_id, lost)
        await watcher.until_the_end()
        kinds = [kind for _, kind in watcher.kinds()]
    # Of a deletion its readers are told; who may read the job from now on is no business of who may not.
    assert kinds == (["JobSubmitted", "JobDeleted"] if taken.type == "JobDeleted" else ["JobSubmitted"])
    again = await bob.get(f"/api/ledger/stream?job_id={job_id}", **{"Last-Event-ID": str(taken.position)})
    assert (again.status_code, again.json()["code"]) == (404, "job_not_found")


async def test_batch_stream_ends_when_batch_is_deleted(api_without_worker: Api) -> None:
    alice, bob = api_without_worker.as_user("alice"), api_without_worker.as_user("bob")
    batch = await alice.submit_batch({}, access_control=FOR_BOB)
    batch_id, [job_id] = batch["batch_id"], batch["job_ids"]
    async with watching(bob, batch_id=batch_id) as watcher, watching(api_without_worker, batch_id=batch_id) as admin:
        await do(api_without_worker, job_id, CancelJob("user:alice"))
        await watcher.until(batch_id, "BatchFinished")
        response = await api_without_worker.http.delete(
            f"/api/events/batches/{batch_id}", headers=alice.principal_headers
        )
        assert response.status_code == 200, response.text
        await watcher.until_the_end()
        assert watcher.kinds()[-2:] == [(job_id, "JobDeleted"), (batch_id, "BatchDeleted")]
        await admin.until(batch_id, "BatchDeleted")
        assert not admin.ended


async def test_global_stream_continues_without_job_whose_access_is_lost(
    api_without_worker: Api,
) -> None:
    alice, bob = api_without_worker.as_user("alice"), api_without_worker.as_user("bob")
    job_id, other = [await alice.submit(access_control=FOR_BOB) for _ in range(2)]
    async with watching(bob) as watcher:
        await watcher.until(other, "JobSubmitted")
        await do(api_without_worker, job_id, ChangeAccess("user:alice", PRIVATE))
        await do(api_without_worker, job_id, CancelJob("user:alice"))
        await do(api_without_worker, other, CancelJob("user:alice"))
        await watcher.until(other, "JobCancelled")
        assert watcher.kinds() == [(job_id, "JobSubmitted"), (other, "JobSubmitted"), (other, "JobCancelled")]
        await do(api_without_worker, job_id, ChangeAccess("user:alice", AccessControl(visibility="public")))
        await watcher.until(job_id, "JobAccessChanged")  # given back: from here on it is there again


async def test_history_is_hidden_after_access_is_lost(api_without_worker: Api) -> None:
    alice, bob = api_without_worker.as_user("alice"), api_without_worker.as_user("bob")
    taken, deleted, marker = [await alice.submit(access_control=FOR_BOB) for _ in range(3)]
    assert len(await page(bob)) == 3  # so that who may see them is known here
    commands: list[tuple[str, Command]] = [
        (taken, ChangeAccess("user:alice", PRIVATE)),
        (taken, CancelJob("user:alice")),
        (deleted, CancelJob("user:alice")),
        (deleted, Delete("user:alice")),
        (marker, CancelJob("user:alice")),
    ]
    for stream, command in commands:
        await do(api_without_worker, stream, command)

    visible = [(marker, "JobSubmitted"), (deleted, "JobDeleted"), (marker, "JobCancelled")]
    assert await page(bob) == visible
    async with watching(bob) as watcher:
        await watcher.until(marker, "JobCancelled")
        assert watcher.kinds() == visible
    assert len(await page(api_without_worker)) == 8


# Why none is overlooked -------------------------------------------------------------------------------------------


class Interrupted(EventStore):
    """Something happens to a job just when it has been read who may see it, and is heard before that is noted."""

    meanwhile: Command | None = None
    visibility: Visibility

    async def iterate_stream_batches(
        self, streams: Collection[str], *, exclude_types: Collection[str] = (), data_expression: Document | None = None
    ) -> AsyncGenerator[list[RecordedEvent], None]:
        parts = super().iterate_stream_batches(streams, exclude_types=exclude_types, data_expression=data_expression)
        async for part in parts:
            yield part
        if (command := self.meanwhile) is not None:
            self.meanwhile = None
            recorded = (await handle_command(self, next(iter(streams)), command, meta=EventMetadata("test"))).events
            await self.visibility.wait_for_position(recorded[-1].position)


@asynccontextmanager
async def visibility_of(ledger: Ledger) -> AsyncIterator[Visibility]:
    visibility = Visibility(ledger.event_store, Checkpoint(ledger.db))
    task = asyncio.create_task(visibility.run())
    try:
        yield visibility
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def following(uri: str, db_name: str) -> AsyncIterator[tuple[Ledger, Visibility]]:
    async with (
        asyncio.timeout(DEADLINE_SECONDS),
        open_ledger(Connection(uri, db_name)) as ledger,
        visibility_of(ledger) as visibility,
    ):
        yield ledger, visibility


async def submitted(log: EventStore, **fields: Any) -> RecordedEvent:
    recorded = await handle_command(log, new_job_id(), SubmitJob(make_echo_job(**fields)), meta=EventMetadata("test"))
    return recorded.events[0]


async def test_access_change_during_load_is_not_lost(
    mongodb_uri: str, db_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.api.auth.visibility._MAX_STREAMS", 1)
    async with (
        asyncio.timeout(DEADLINE_SECONDS),
        open_ledger(Connection(mongodb_uri, db_name), store_class=Interrupted) as ledger,
    ):
        log = ledger.event_store
        assert isinstance(log, Interrupted)
        async with visibility_of(ledger) as visibility:
            log.visibility = visibility
            event = await submitted(log, access_control=AccessControl(**FOR_BOB))
            await visibility.wait_for_position((await submitted(log)).position)  # and the first is known no more
            log.meanwhile = ChangeAccess("user:alice", PRIVATE)
            assert not await visibility.get_viewer(Principal("bob"), event)


async def test_late_event_does_not_undo_newer_access(mongodb_uri: str, db_name: str) -> None:
    async with following(mongodb_uri, db_name) as (ledger, visibility):
        event = await submitted(ledger.event_store)
        for access in (AccessControl(visibility="public"), PRIVATE):
            await handle_command(
                ledger.event_store, event.stream, ChangeAccess("user:alice", access), meta=EventMetadata("test")
            )
        await visibility.wait_for_position(event.position + 2)
        _, public, _ = await ledger.event_store.read_stream(event.stream)
        visibility._access.clear()
        assert not await visibility.get_viewer(Principal("bob"), event)
        visibility._process_event(public)
        assert not await visibility.get_viewer(Principal("bob"), event)


async def test_get_viewer_waits_for_earlier_events(mongodb_uri: str, db_name: str) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS), open_ledger(Connection(mongodb_uri, db_name)) as ledger:
        visibility = Visibility(ledger.event_store, Checkpoint(ledger.db))
        event = await submitted(ledger.event_store, access_control=AccessControl(visibility="public"))
        judged = asyncio.create_task(visibility.get_viewer(Principal("bob"), event))
        await asyncio.wait({judged}, timeout=0.2)
        assert not judged.done()
        passing = asyncio.create_task(visibility.run())
        assert await judged
        passing.cancel()


async def test_unknown_event_type_hides_job_from_all_but_admins(mongodb_uri: str, db_name: str) -> None:
    async with following(mongodb_uri, db_name) as (ledger, visibility):
        event = await submitted(ledger.event_store, access_control=AccessControl(visibility="public"))
        assert await visibility.get_viewer(Principal("bob"), event)
        [(stored, _)] = await ledger.event_store.read_documents(after=0, limit=1)
        later = {**stored, "_id": 2, "version": 2, "type": "JobHidden", "event_id": "later"}
        await ledger.db.events.insert_one(later)
        await visibility.wait_for_position(2)
        assert not await visibility.get_viewer(Principal("bob"), event)
        visibility._access.clear()
        assert not await visibility.get_viewer(Principal("bob"), event)
        assert await visibility.get_viewer(Principal("root", roles=frozenset({"admin"})), event)


def test_relevant_event_types_are_those_that_change_access() -> None:
    assert set(EVENT_TYPES) - _IRRELEVANT_EVENT_TYPES == {
        "JobSubmitted",
        "JobAccessChanged",
        "JobDeleted",
        "BatchSubmitted",
        "BatchAccessChanged",
        "BatchDeleted",
    }
