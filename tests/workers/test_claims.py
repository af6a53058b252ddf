"""Claims: workers keep out of each other's way, and leave nothing lying."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.ledger.domain.commands import ClaimJob
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.domain.events import EventMetadata, JobClaimed
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.command_handler import handle_command, load_stream_states
from jobledger.ledger.store.envelope import VOID_STREAM
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.views import queue
from jobledger.projections.views.queue import QueueEntry
from jobledger.workers import claim_queue as claiming
from jobledger.workers.claim_queue import ClaimQueue
from jobledger.workers.claim_ranking import ClaimDelay, list_higher_ranked
from jobledger.workers.processor import JobContext, Results
from tests.support.ledger_setup import load_event_documents
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process
from tests.workers.inline_processor import install_processor

names = st.text("abcdefgh0123456789-", min_size=1, max_size=12)


# Ranks ----------------------------------------------------------------------------------------------------------------


@given(job_id=names, workers=st.sets(names, min_size=1, max_size=8))
def test_for_each_job_every_worker_has_a_rank_of_its_own(job_id: str, workers: set[str]) -> None:
    ranks = {worker: len(list_higher_ranked(worker, workers, job_id)) for worker in workers}
    assert sorted(ranks.values()) == list(range(len(workers)))
    for worker in workers:
        assert {other for other in workers if ranks[other] < ranks[worker]} == set(
            list_higher_ranked(worker, workers, job_id)
        )


def test_each_of_many_workers_is_the_first_for_about_as_many_jobs() -> None:
    workers = [f"host-{number}-abc" for number in range(8)]
    firsts = Counter(
        worker
        for n in range(8000)
        for worker in workers
        if not list_higher_ranked(worker, workers, f"job-6741{n:020x}")
    )
    assert sum(firsts.values()) == 8000
    assert min(firsts.values()) > 800
    assert max(firsts.values()) < 1200


# Rows that are ours, and those that are left to others for a moment -----------------------------------------------


@pytest.fixture
async def claims(connection: Connection, store: Path) -> ClaimQueue:
    async with run_roles_in_process(connection, store) as here:
        claims = ClaimQueue(
            here.event_store,
            here.checkpoint,
            job_types={"echo"},
            slots=5,
            eligible_workers=lambda: WORKERS,
            free_slots=lambda job_type: 1,
            pending_claims=tuple,
            wake=lambda: None,
        )
        claims.worker_id = "w1"
        return claims


WORKERS = ("w1", "w2", "w3")
OURS = [job_id for n in range(60) if not list_higher_ranked("w1", WORKERS, job_id := f"job-{n}")]
OTHERS = [job_id for n in range(60) if list_higher_ranked("w1", WORKERS, job_id := f"job-{n}")]


def rows(*jobs: tuple[str, int]) -> list[QueueEntry]:
    return [QueueEntry(job_id, "echo", None, priority) for job_id, priority in jobs]


def chosen(claims: ClaimQueue, found: list[QueueEntry]) -> list[str]:
    return [row.job_id for row in claims._filter_by_rank(found, WORKERS)]


async def test_only_those_are_tried_at_once_that_are_ours(claims: ClaimQueue) -> None:
    found = rows((OTHERS[0], 1), (OURS[0], 1), (OTHERS[1], 1), (OURS[1], 1))
    assert chosen(claims, found) == OURS[:2]


async def test_nothing_less_urgent_is_tried_before_something_that_is_left_to_others(claims: ClaimQueue) -> None:
    found = rows((OURS[0], 9), (OTHERS[0], 5), (OURS[1], 5), (OURS[2], 1))
    assert chosen(claims, found) == OURS[:2]


async def test_what_others_have_left_lying_is_tried_after_a_moment(
    claims: ClaimQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("jobledger.workers.claim_queue.time.monotonic", lambda: now)
    found = rows((OTHERS[0], 5), (OURS[0], 1))
    assert chosen(claims, found) == []
    now += 0.2
    assert chosen(claims, found) == []
    now += 0.1
    assert chosen(claims, found) == [OTHERS[0], OURS[0]]


async def test_as_long_as_who_comes_first_is_claiming_it_is_not_disturbed(
    claims: ClaimQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("jobledger.workers.claim_queue.time.monotonic", lambda: now)
    found = rows((OTHERS[0], 1))
    for position in range(1, 10):
        for worker in list_higher_ranked("w1", WORKERS, OTHERS[0]):
            document = {
                "_id": position,
                "stream": f"job-x{position}",
                "type": "JobClaimed",
                "data": {"worker_id": worker},
            }
            claims.handle_event(document)
        now += 0.9
        assert chosen(claims, found) == []
    now += 0.2
    assert chosen(claims, found) == [OTHERS[0]]


# How long a moment is -------------------------------------------------------------------------------------------------


def test_a_moment_is_as_long_as_claims_take_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("jobledger.workers.claim_queue.time.monotonic", lambda: now)
    moment = ClaimDelay()

    def claimed(job_id: str, took: float, by: str = "w1") -> float:
        nonlocal now
        moment.start_timing(job_id, "w1")
        now += took
        moment.record_claim(job_id, by)
        return moment.seconds

    assert claimed("job-1", 0.002) == 0.01
    assert claimed("job-2", 0.04) == pytest.approx(0.06)
    assert claimed("job-3", 0.002) == pytest.approx(0.057)  # one quick one says little
    assert claimed("job-4", 3, by="w2") == pytest.approx(0.057)  # the first was busy: that says nothing
    assert claimed("job-5", 3) == 0.25
    for number in range(100):
        claimed(f"job-{number}", 0.002)
    assert moment.seconds == 0.01


# Real workers ---------------------------------------------------------------------------------------------------------


async def voided(here: RunningRoles) -> int:
    return len(await load_event_documents(here.db, {"stream": VOID_STREAM}))


async def test_idle_workers_do_not_race_for_a_fresh_job(connection: Connection, store: Path) -> None:
    async with (
        run_roles_in_process(connection, store, projector=True) as here,
        run_roles_in_process(connection, store, worker=WorkerOptions(), worker_events_only=True),
        run_roles_in_process(connection, store, worker=WorkerOptions(), worker_events_only=True),
        run_roles_in_process(connection, store, worker=WorkerOptions(), worker_events_only=True),
    ):
        await asyncio.sleep(0.3)  # until all three have heard of each other
        for _ in range(40):
            await here.wait_until_finished(await here.submit())
        events = [event.event for event in await here.read_all_events()]
        assert len({event.worker_id for event in events if isinstance(event, JobClaimed)}) == 3
        # At most 1.2 tries a job, as promised; a few more until they know how long a claim takes on this machine.
        assert await voided(here) <= 8 + 3


async def test_a_job_whose_first_worker_is_busy_is_done_by_another_at_once(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = asyncio.Event()

    async def work(job: JobContext) -> Results:
        await busy.wait()
        return Results()

    install_processor(monkeypatch, work)
    one = WorkerOptions(slots=1)
    async with (
        run_roles_in_process(connection, store, projector=True) as here,
        run_roles_in_process(connection, store, worker=one, worker_events_only=True),
        run_roles_in_process(connection, store, worker=one, worker_events_only=True),
    ):
        blocking = await here.submit(job_type="test")
        await here.wait_for_event(JobClaimed, blocking)
        for _ in range(10):  # about half of them are for the busy one first
            begun = asyncio.get_running_loop().time()
            await here.wait_until_finished(await here.submit())
            assert asyncio.get_running_loop().time() - begun < 2
        busy.set()
        await here.wait_until_finished(blocking)


async def test_a_job_that_comes_while_the_worker_looks_is_not_overlooked(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look has begun before the job is in the queue, and ends after the worker was told that it is there."""
    looking, told = asyncio.Event(), asyncio.Event()
    candidates = queue.find_candidates

    async def slowly(*given: Any, **named: Any) -> list[QueueEntry]:
        found = await candidates(*given, **named)
        looking.set()
        await told.wait()
        return found

    monkeypatch.setattr(queue, "find_candidates", slowly)
    async with (
        run_roles_in_process(connection, store, projector=True) as here,
        run_roles_in_process(connection, store, worker=WorkerOptions()) as there,
    ):
        async with asyncio.timeout(20):
            await looking.wait()
        job_id = await here.submit()
        await there.wait_for_views(await here.event_store.head_position())
        told.set()
        await here.wait_until_finished(job_id, seconds=5)


async def test_a_job_that_is_claimed_by_another_while_its_stream_is_read_is_left_alone(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, told = asyncio.Event(), asyncio.Event()

    async def slowly(log: EventStore, streams: list[str]) -> Any:
        known = await load_stream_states(log, streams)
        reading.set()
        await told.wait()
        return known

    monkeypatch.setattr(claiming, "load_stream_states", slowly)
    async with run_roles_in_process(connection, store, projector=True) as here:
        mine, theirs = await here.submit(), await here.submit()
        await here.wait_for_views()
        async with run_roles_in_process(connection, store, worker=WorkerOptions()) as there:
            async with asyncio.timeout(20):
                await reading.wait()
            claimed = await handle_command(
                here.event_store, theirs, ClaimJob("another", datetime.now(UTC)), meta=EventMetadata("worker:another")
            )
            async with asyncio.timeout(20), there.event_store.subscribe(after=0) as heard:
                while heard.position < claimed.events[0].position:
                    await heard.next_chunk()
            told.set()
            await here.wait_until_finished(mine)
        assert await voided(here) == 0, "a claim was tried that could not succeed"


async def test_rows_whose_streams_could_not_be_read_keep_their_place(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [LedgerUnavailable("away")]

    async def badly(log: EventStore, streams: list[str]) -> Any:
        if failures:
            raise failures.pop()
        return await load_stream_states(log, streams)

    monkeypatch.setattr(claiming, "load_stream_states", badly)
    async with run_roles_in_process(connection, store, projector=True) as here:
        jobs = [await here.submit() for _ in range(3)]
        await here.wait_for_views()
        async with run_roles_in_process(connection, store, worker=WorkerOptions(slots=1)):
            await here.wait_until_finished(*jobs)
        assert [event.stream for event in await here.read_all_events() if isinstance(event.event, JobClaimed)] == jobs
    assert not failures


async def test_of_a_job_type_no_more_run_than_its_limit_and_others_are_not_held_up(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most = 0, 0

    async def work(job: JobContext) -> Results:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return Results()

    install_processor(monkeypatch, work)
    async with run_roles_in_process(connection, store, projector=True) as here:
        limited = [await here.submit(job_type="test", priority=5) for _ in range(20)]
        others = [await here.submit() for _ in range(20)]
        await here.wait_for_views()
        async with run_roles_in_process(connection, store, worker=WorkerOptions(slots=8, slots_of_type={"test": 2})):
            limited += [await here.submit(job_type="test") for _ in range(5)]
            await here.wait_until_finished(*limited, *others)
        ends = [event.stream for event in await here.read_all_events() if event.type == "JobCompleted"]
        assert most == 2
        assert ends.index(others[-1]) < ends.index(limited[19]), "there was room for the others all the time"
