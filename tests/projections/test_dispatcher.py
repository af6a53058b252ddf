"""The choice of a worker for a new job: it accepts the job and has a free slot, and no other job waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import ReleaseJob, SubmitJob
from jobledger.ledger.domain.errors import InvalidEvent
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.command_handler import create_job_id
from jobledger.projections.engine import dispatcher
from jobledger.projections.engine.dispatcher import Dispatcher
from jobledger.projections.engine.view_registry import PROJECTION_VERSION
from tests.support.polling import poll_until
from tests.support.role_runner import RunningRoles, make_echo_job, run_roles_in_process

LEASE = {
    "slots": 2,
    "accepted_job_types": ["echo"],
    "dispatch_version": dispatcher.DISPATCH_VERSION,
    "seconds": 10.0,
    "released": False,
    "heartbeat": 1,
}


class Subject:
    """A dispatcher, and the lease documents and jobs that it observes."""

    def __init__(self, roles: RunningRoles) -> None:
        assert roles.dispatcher is not None
        self.roles = roles
        self.dispatcher: Dispatcher = roles.dispatcher

    async def add_worker(self, worker_id: str = "w1", **fields: Any) -> None:
        """Insert a lease document, and wait until the dispatcher knows it."""
        await self.roles.db.workers.insert_one({"_id": worker_id, **LEASE, **fields})
        await poll_until(lambda: worker_id in self.dispatcher._leases, "the worker is known")

    async def update_worker(self, worker_id: str, **fields: Any) -> None:
        await self.roles.db.workers.update_one({"_id": worker_id}, {"$set": fields})

    def choose(self, **fields: Any) -> str | None:
        return self.dispatcher.choose_worker(create_job_id(), make_echo_job(**{"max_attempts": 3, **fields}))

    async def choose_soon(self) -> str:
        """Wait until a worker is chosen."""
        await poll_until(self._is_chosen, "a worker is chosen")
        return str(self._chosen)

    def _is_chosen(self) -> bool:
        self._chosen = self.choose()
        return self._chosen is not None


@pytest.fixture
async def subject(connection: Connection, store: Path) -> AsyncIterator[Subject]:
    async with run_roles_in_process(connection, store, projector=True, dispatches=True) as roles:
        yield Subject(roles)


async def test_worker_with_most_free_slots_is_chosen_until_all_are_used(subject: Subject) -> None:
    await subject.add_worker("w1", slots=1)
    await subject.add_worker("w2", slots=3)
    first = await subject.choose_soon()
    chosen = [first, *(subject.choose() for _ in range(3))]
    assert chosen[:2] == ["w2", "w2"]
    assert sorted(map(str, chosen[2:])) == ["w1", "w2"]
    assert subject.choose() is None


@pytest.mark.parametrize(
    "fields",
    [
        {"accepted_job_types": []},
        {"accepted_job_types": ["session"]},
        {"released": True},
        {"dispatch_version": "0.0.0"},
        {"seconds": 0.0},  # the last heartbeat is too long ago
        {"slots": 0},
    ],
    ids=str,
)
async def test_worker_that_does_not_accept_the_job_is_not_chosen(subject: Subject, fields: dict[str, Any]) -> None:
    await subject.add_worker("w1", **fields)
    await subject.add_worker("w2", slots=1)
    assert await subject.choose_soon() == "w2"
    assert subject.choose() is None


async def test_worker_is_chosen_after_its_next_heartbeat_only(connection: Connection, store: Path) -> None:
    """Whether an earlier heartbeat is recent is unknown when the change stream is opened."""
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.db.workers.insert_one({"_id": "w1", **LEASE})
        async with run_roles_in_process(connection, store, dispatches=True) as submitter:
            subject = Subject(submitter)
            await poll_until(lambda: subject.dispatcher._ended_while_loading is None, "the running jobs are known")
            await subject.update_worker("w1", accepted_job_types=["echo", "session"])
            await poll_until(lambda: len(subject.dispatcher._leases["w1"].accepted_job_types) == 2)
            assert subject.choose() is None
            await subject.update_worker("w1", heartbeat=2)
            assert await subject.choose_soon() == "w1"


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_id": "batch-1"},
        {"not_before": datetime.now(UTC) + timedelta(seconds=60)},
        {"max_attempts": 1},
        {"job_type": "session"},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_job_with_other_rules_is_left_to_the_queue(subject: Subject, fields: dict[str, Any]) -> None:
    await subject.add_worker(slots=100)
    await subject.choose_soon()
    assert subject.choose(**fields) is None
    assert subject.choose() == "w1"


async def test_waiting_job_prevents_dispatch(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    await subject.add_worker(slots=100)
    await subject.choose_soon()
    job_id = await subject.roles.submit(max_attempts=1)
    await poll_until(lambda: subject.choose() is None, "the waiting job is known")
    await subject.roles.claim(job_id)
    assert await subject.choose_soon() == "w1"
    await subject.roles.handle_commands(job_id, ReleaseJob("worker-1", 1, reason="test"))
    await poll_until(lambda: subject.choose() is None, "the released job is known")
    monkeypatch.setattr(dispatcher, "_WAITING_SECONDS", 0.0)  # no worker can run it
    assert subject.choose() == "w1"


async def test_expected_job_prevents_dispatch(subject: Subject) -> None:
    await subject.add_worker(slots=100)
    await subject.choose_soon()
    job_id, due_later = create_job_id(), make_echo_job(not_before=datetime.now(UTC) + timedelta(seconds=60))
    with subject.dispatcher.expect_jobs({create_job_id(): due_later}):
        assert subject.choose() == "w1"
    with subject.dispatcher.expect_jobs({job_id: make_echo_job()}):
        await subject.roles.handle_commands(job_id, SubmitJob(make_echo_job()))
    assert subject.choose() is None
    await subject.roles.claim(job_id)
    assert await subject.choose_soon() == "w1"


async def test_claimed_job_no_longer_prevents_dispatch(subject: Subject) -> None:
    await subject.add_worker(slots=100)
    await subject.choose_soon()
    for _ in range(5):
        job_id = await subject.roles.submit(max_attempts=1)
        await subject.roles.claim(job_id)
        await poll_until(lambda: not subject.dispatcher._waiting, "the claim is known")
        assert subject.choose() == "w1"


async def test_backlog_that_is_too_long_to_remember_is_not_overtaken(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "_MAX_WAITING", 5)
    await subject.add_worker(slots=100)
    await subject.choose_soon()
    await subject.roles.submit_batch(*({} for _ in range(6)))
    await poll_until(lambda: subject.choose() is None, "the backlog is known")
    assert len(subject.dispatcher._waiting) <= 5


async def test_slot_of_a_dispatched_job_whose_claim_was_not_written_becomes_free(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    await subject.add_worker(slots=1)
    await subject.choose_soon()
    assert subject.choose() is None
    monkeypatch.setattr(dispatcher, "_DISPATCH_SECONDS", 0.0)
    assert subject.choose() == "w1"


async def test_running_jobs_use_slots_and_ended_attempts_free_them(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        before = await roles.submit()
        await roles.claim(before, "w1")
        await roles.wait_for_views()
        async with run_roles_in_process(connection, store, dispatches=True) as submitter:
            subject = Subject(submitter)
            await subject.add_worker("w1", slots=2)
            await poll_until(lambda: subject.dispatcher._running == {before: "w1"}, "running jobs are loaded")
            after = await roles.submit()
            await roles.claim(after, "w1")
            await poll_until(lambda: subject.dispatcher._running_counts["w1"] == 2, "the claim is counted")
            assert subject.choose() is None
            await roles.handle_commands(before, ReleaseJob("w1", 1, reason="test"))
            await roles.claim(before, "w2")
            assert await subject.choose_soon() == "w1"
            assert subject.dispatcher._running == {before: "w2", after: "w1"}


async def test_attempt_that_ends_before_running_jobs_are_loaded_uses_no_slot(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store) as roles:
        job_id = await roles.submit()
        await roles.claim(job_id, "w1")
        async with run_roles_in_process(connection, store, dispatches=True) as submitter:
            subject = Subject(submitter)
            await subject.add_worker("w1", slots=1)
            await roles.handle_commands(job_id, ReleaseJob("w1", 1, reason="test"))
            await poll_until(lambda: subject.dispatcher._ended_while_loading == {job_id}, "the release is known")
            assert subject.choose() is None  # the running jobs are unknown: the views have not reached the log
            async with run_roles_in_process(connection, store, projector=True):
                await poll_until(lambda: subject.dispatcher._ended_while_loading is None, "running jobs are loaded")
            assert subject.dispatcher._running_counts["w1"] == 0


@pytest.mark.parametrize("fields", [{}, {"max_attempts": 1}], ids=["dispatched", "queued"])
async def test_rejected_submission_takes_no_slot_and_prevents_no_dispatch(
    subject: Subject, fields: dict[str, Any]
) -> None:
    await subject.add_worker(slots=2)
    await subject.choose_soon()
    with pytest.raises(InvalidEvent):
        await subject.roles.submit({"object": object()}, **fields)
    assert subject.choose() == "w1"


async def test_nothing_is_dispatched_while_the_views_have_another_version(subject: Subject) -> None:
    await subject.add_worker(slots=100)
    await subject.choose_soon()
    await subject.roles.db.checkpoints.update_one({"_id": "views"}, {"$set": {"version": PROJECTION_VERSION + 1}})
    await poll_until(lambda: subject.roles.checkpoint.version != PROJECTION_VERSION, "the version is known")
    assert subject.choose() is None


async def test_running_jobs_are_loaded_again_if_too_many_attempts_end_meanwhile(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "_MAX_ENDED_WHILE_LOADING", 3)
    async with run_roles_in_process(connection, store) as roles:
        job_ids = [await roles.submit() for _ in range(10)]
        for job_id in job_ids:
            await roles.claim(job_id, "w1")
        async with run_roles_in_process(connection, store, dispatches=True) as submitter:
            subject = Subject(submitter)
            for job_id in job_ids[1:]:
                await roles.handle_commands(job_id, ReleaseJob("w1", 1, reason="test"))
            head = await roles.event_store.read_head_position()
            await poll_until(lambda: subject.dispatcher._last_position == head, "all events are observed")
            assert len(subject.dispatcher._ended_while_loading or ()) <= 3
            async with run_roles_in_process(connection, store, projector=True):
                await poll_until(lambda: subject.dispatcher._ended_while_loading is None, "running jobs are loaded")
            assert subject.dispatcher._running == {job_ids[0]: "w1"}


async def test_interrupted_change_stream_reloads_leases_and_running_jobs(subject: Subject) -> None:
    await subject.add_worker(slots=1)
    job_id = await subject.roles.submit(max_attempts=1)
    await subject.roles.claim(job_id, "w1")
    await poll_until(lambda: subject.dispatcher._running == {job_id: "w1"}, "the claim is counted")
    with subject.roles.changes.pause():
        await asyncio.sleep(0.2)
        await subject.roles.handle_commands(job_id, ReleaseJob("w1", 1, reason="test"))
        await subject.roles.db.workers.delete_one({"_id": "w1"})
    await poll_until(lambda: not subject.dispatcher._leases, "the leases are loaded again")
    await poll_until(lambda: subject.dispatcher._ended_while_loading is None, "the running jobs are loaded again")
    assert subject.dispatcher._running == {}
