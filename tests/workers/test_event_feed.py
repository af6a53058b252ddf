"""During a flood, a worker reads the events that it observes from the log, and hears of new jobs when it needs some."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import CancelJob, PauseBatch
from jobledger.ledger.mongo.connection import Connection
from jobledger.workers import event_feed
from jobledger.workers.event_feed import EventFeed
from jobledger.workers.worker import SUBSCRIBED_EVENT_TYPES
from tests.support.polling import poll_until
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process


class Subject:
    """An event feed whose change stream and worker are under the control of a test."""

    def __init__(self, roles: RunningRoles) -> None:
        self.is_paused = self.needs_jobs = False
        self.handled: list[tuple[str, str]] = []
        self.feed = EventFeed(
            roles.event_store,
            roles.checkpoint,
            event_types=SUBSCRIBED_EVENT_TYPES,
            pause_stream=self.pause,
            needs_jobs=lambda: self.needs_jobs,
            handle=self.handle,
        )

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def handle(self, document: Mapping[str, Any]) -> None:
        self.handled.append((document["stream"], document["type"]))

    def begin_flood(self, position: int) -> None:
        """Deliver changes until the feed considers them a flood."""
        change = {"operationType": "insert", "fullDocument": {"_id": position, "stream": "job-0", "type": "JobClaimed"}}
        for _ in range(1000):
            self.feed.on_change(change)
        self.feed._counted_since = asyncio.get_running_loop().time() - 1.0
        self.feed.on_change(change)
        self.handled.clear()


@pytest.fixture
async def subject(connection: Connection, store: Path) -> AsyncIterator[tuple[RunningRoles, Subject]]:
    async with run_roles_in_process(connection, store) as roles:
        subject = Subject(roles)
        running = asyncio.create_task(subject.feed.run())
        await asyncio.sleep(0)
        yield roles, subject
        running.cancel()


async def test_flood_is_read_from_the_log_without_most_claims(subject: tuple[RunningRoles, Subject]) -> None:
    roles, feed = subject
    batch_id, job_ids = await roles.submit_batch(*({} for _ in range(40)))
    feed.begin_flood(await roles.event_store.read_head_position())
    await poll_until(lambda: feed.is_paused)
    for job_id in job_ids:
        await roles.claim(job_id)
    await roles.handle_commands(job_ids[0], CancelJob("user-1"))
    await roles.handle_commands(batch_id, PauseBatch("user-1"))
    await poll_until(lambda: (batch_id, "BatchPaused") in feed.handled)
    assert (job_ids[0], "JobCancelRequested") in feed.handled
    assert 9 <= [event_type for _, event_type in feed.handled].count("JobClaimed") <= 11  # every fourth
    count = len(feed.handled)
    await asyncio.sleep(0.5)
    assert len(feed.handled) == count


async def test_damaged_event_in_a_flood_is_skipped(
    subject: tuple[RunningRoles, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    roles, feed = subject
    handle = feed.handle

    def fail_for_submissions(document: Mapping[str, Any]) -> None:
        if document["type"] == "JobSubmitted":
            raise KeyError("job_type")
        handle(document)

    monkeypatch.setattr(feed.feed, "_handle", fail_for_submissions)
    batch_id, _ = await roles.submit_batch({})
    feed.begin_flood(await roles.event_store.read_head_position())
    await poll_until(lambda: feed.is_paused)
    await roles.submit()
    await roles.handle_commands(batch_id, PauseBatch("user-1"))
    await poll_until(lambda: (batch_id, "BatchPaused") in feed.handled)


async def test_flood_ends_at_once_when_the_worker_needs_jobs(
    subject: tuple[RunningRoles, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_feed, "_READ_SECONDS", 3600.0)
    _, feed = subject
    feed.begin_flood(1)
    await poll_until(lambda: feed.is_paused)
    feed.needs_jobs = True
    feed.feed.hurry()
    await poll_until(lambda: not feed.is_paused)
    feed.begin_flood(1)
    await asyncio.sleep(0.1)
    assert not feed.is_paused


async def test_change_stream_is_opened_again_after_a_while(
    subject: tuple[RunningRoles, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_feed, "_MAX_FLOOD_SECONDS", 0.3)
    _, feed = subject
    feed.begin_flood(1)
    await poll_until(lambda: feed.is_paused)
    await poll_until(lambda: not feed.is_paused)


async def test_few_events_are_no_flood(subject: tuple[RunningRoles, Subject]) -> None:
    _, feed = subject
    change = {"operationType": "insert", "fullDocument": {"_id": 1, "stream": "job-0", "type": "JobClaimed"}}
    for _ in range(20):
        feed.feed.on_change(change)
        await asyncio.sleep(0.05)
    assert not feed.is_paused


async def test_jobs_run_once_and_are_cancelled_during_floods(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_feed, "_FLOOD_EVENTS_PER_SECOND", 0)
    monkeypatch.setattr(event_feed, "_MEASURE_SECONDS", 0.01)
    options = WorkerOptions(max_concurrent=10)
    async with (
        run_roles_in_process(connection, store, projector=True) as roles,
        run_roles_in_process(connection, store, worker=options, is_worker_process=True) as first,
        run_roles_in_process(connection, store, worker=options, is_worker_process=True) as second,
    ):
        paused = [count_pauses(one, monkeypatch) for one in (first, second)]
        long_ids = [await roles.submit({"seconds": 600}) for _ in range(2)]
        _, job_ids = await roles.submit_batch(*({"seconds": 0.02, "file": False} for _ in range(300)))
        await poll_until(lambda: all(paused), "both workers have paused their change streams")
        for job_id in long_ids:
            await roles.handle_commands(job_id, CancelJob("user-1"))
        await roles.wait_until_finished(*job_ids, *long_ids)
        counts = [len(counted) for counted in paused]
        job_ids += [await roles.submit({"file": False}) for _ in range(5)]
        _, more_ids = await roles.submit_batch(*({"seconds": 0.02, "file": False} for _ in range(300)))
        job_ids += more_ids
        await poll_until(
            lambda: any(len(counted) > count for counted, count in zip(paused, counts, strict=True)),
            "a later flood is recognized, too",
        )
        await roles.wait_until_finished(*job_ids, *long_ids)
        for job_id in job_ids:
            types = [name for name in await roles.read_event_types(job_id) if name != "JobProgressed"]
            assert types == ["JobSubmitted", "JobClaimed", "JobCompleted"]
        assert [(await roles.load_job(job_id))["status"] for job_id in long_ids] == ["cancelled"] * 2
        await roles.wait_until_finished(*[await roles.submit({"file": False}) for _ in range(3)])


def count_pauses(roles: RunningRoles, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each pause of the worker's change stream."""
    counted: list[int] = []
    assert roles.worker is not None
    pause = roles.worker._event_feed._pause_stream
    assert pause is not None

    @contextmanager
    def pause_and_count() -> Iterator[None]:
        counted.append(1)
        with pause():
            yield

    monkeypatch.setattr(roles.worker._event_feed, "_pause_stream", pause_and_count)
    return counted
