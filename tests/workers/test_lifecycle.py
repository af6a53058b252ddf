"""The start and the end of each worker, and what it knew at each claim, are in the log."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.events import JobClaimed, RecordedEvent
from jobledger.ledger.domain.worker import build_worker_stream
from jobledger.ledger.mongo.connection import Connection
from jobledger.workers import lifecycle
from jobledger.workers.worker import Worker
from tests.support.polling import poll_until
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process, run_roles_subprocess

LEASE = 1.5


async def read_workers(roles: RunningRoles) -> dict[str, list[RecordedEvent]]:
    """Return the events of workers by the ID of the worker."""
    found: dict[str, list[RecordedEvent]] = {}
    for event in await roles.event_store.read():
        if event.stream.startswith("worker-"):
            found.setdefault(event.stream.removeprefix("worker-"), []).append(event)
    return found


def list_types(events: list[RecordedEvent]) -> list[str]:
    return [event.type for event in events]


async def test_start_and_stop_of_worker_are_recorded_with_its_capacity(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        async with run_roles_in_process(connection, store, worker=WorkerOptions(max_concurrent=3)):
            job = await roles.wait_until_finished(await roles.submit())
        [(worker_id, events)] = (await read_workers(roles)).items()
        assert worker_id == job["worker_id"]
        assert list_types(events) == ["WorkerStarted", "WorkerStopped"]
        started: dict[str, Any] = dict(events[0].data)
        assert started["slots"] == 3
        assert {"echo", "session"} <= set(started["job_types"])
        assert len(started["settings_digest"]) == 64
        assert events[1].data == {"reason": "stopped"}
        claims = [event for event in await roles.event_store.read() if event.type == "JobClaimed"]
        assert all(events[0].position < claim.position < events[1].position for claim in claims)
        assert {event.meta.actor for event in events} == {f"worker:{worker_id}"}


async def test_workers_with_equal_settings_have_equal_digests(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        for slots in (2, 2, 4):
            async with run_roles_in_process(connection, store, worker=WorkerOptions(max_concurrent=slots)):
                await roles.wait_until_finished(await roles.submit())
        first, second, third = [events[0].data["settings_digest"] for events in (await read_workers(roles)).values()]
        assert first == second != third


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "suspended"])
async def test_lost_worker_is_recorded_once_by_the_first_of_several_reapers(
    connection: Connection, store: Path, end: signal.Signals
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        with run_roles_subprocess(connection, store, "worker", lease_seconds=LEASE) as dead:
            await dead.wait_until_started()
            job_id = await roles.submit({"seconds": 5})
            await roles.wait_for_event(JobClaimed, job_id)
            [lost_id] = await read_workers(roles)
            dead.send_signal(end)
            options = WorkerOptions(lease_seconds=LEASE)
            async with (
                run_roles_in_process(connection, store, worker=options),
                run_roles_in_process(connection, store, worker=options),
            ):
                await roles.wait_until_finished(job_id)
                workers = await read_workers(roles)
                others = workers.keys() - {lost_id}
                assert list_types(workers[lost_id]) == ["WorkerStarted", "WorkerLost"]
                assert workers[lost_id][1].data["declared_by"] in others
                [expired] = [event for event in await roles.event_store.read() if event.type == "JobLeaseExpired"]
                assert workers[lost_id][1].position < expired.position
                if end == signal.SIGSTOP:  # it returns under a new ID, and does not stop what is lost
                    dead.send_signal(signal.SIGCONT)

                    async def has_returned() -> bool:
                        return len(await read_workers(roles)) == 4

                    await poll_until(has_returned, "the worker has a new lease")
        assert list_types((await read_workers(roles))[lost_id]) == ["WorkerStarted", "WorkerLost"]


async def test_released_lease_without_recorded_end_counts_as_lost(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_arguments: object) -> None:
        """As if the process was killed before."""

    async with run_roles_in_process(connection, store, projector=True) as roles:
        with monkeypatch.context() as patched:
            patched.setattr("jobledger.workers.worker.record_stop", fail)
            async with run_roles_in_process(connection, store, worker=WorkerOptions(lease_seconds=LEASE)):
                await roles.wait_until_finished(await roles.submit())
        [stopped_id] = await read_workers(roles)
        async with run_roles_in_process(connection, store, worker=WorkerOptions(lease_seconds=LEASE)):

            async def is_lost() -> bool:
                return list_types((await read_workers(roles))[stopped_id])[-1] == "WorkerLost"

            await poll_until(is_lost, "the end of the worker is recorded", seconds=20)


async def test_worker_whose_start_cannot_be_recorded_runs_jobs(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_arguments: object, **_options: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(lifecycle, "handle_command", hang)
    monkeypatch.setattr(lifecycle, "_SECONDS", 0.1)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        job = await roles.wait_until_finished(await roles.submit())
        assert job["status"] == "completed"
        assert await read_workers(roles) == {}


async def test_worker_that_an_error_ends_records_that_it_failed(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_worker: Worker) -> None:
        raise ZeroDivisionError

    async def run_worker() -> None:
        async with run_roles_in_process(connection, store, worker=WorkerOptions()):
            await roles.submit()
            await poll_until(has_ended, "the worker has ended")

    async def has_ended() -> bool:
        return any(len(events) == 2 for events in (await read_workers(roles)).values())

    async with run_roles_in_process(connection, store, projector=True) as roles:
        monkeypatch.setattr(Worker, "_claim_available", fail)
        with pytest.raises(ZeroDivisionError):
            await run_worker()
        [events] = (await read_workers(roles)).values()
        assert events[-1].data == {"reason": "failed"}


async def test_claim_records_how_the_worker_found_the_job(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        queued = [await roles.submit() for _ in range(3)]
        async with run_roles_in_process(connection, store, worker=WorkerOptions(max_concurrent=2)):
            for job_id in queued:
                await roles.wait_until_finished(job_id)
            fresh = await roles.submit()
            await roles.wait_until_finished(fresh)
        claims = {event.stream: event for event in await roles.event_store.read() if event.type == "JobClaimed"}
        assert [claims[job_id].data["via"] for job_id in (*queued, fresh)] == ["queue", "queue", "queue", "fresh"]
        assert {claims[job_id].data["free_slots"] for job_id in (*queued, fresh)} <= {1, 2}
        for claim in claims.values():
            first = (await roles.event_store.read_stream(claim.stream, limit=1))[0]
            assert first.position <= claim.data["seen"] < claim.position


def test_worker_stream_is_named_after_the_worker() -> None:
    assert build_worker_stream("host-17-a1b2c3") == "worker-host-17-a1b2c3"
