"""Tests of the claim queue: workers do not compete for jobs, and no job stays unclaimed."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from datetime import UTC, datetime, timedelta
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
from jobledger.projections.views.queue import QueueRow
from jobledger.workers.claims import claim_queue as claiming
from jobledger.workers.claims.claim_queue import ClaimQueue
from jobledger.workers.claims.claim_ranking import ClaimDelay, list_higher_ranked
from jobledger.workers.processor import JobContext, Results
from tests.support.ledger_setup import load_event_documents
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process
from tests.workers.inline_processor import ConcurrencyProbe, install_processor

names = st.text("abcdefgh0123456789-", min_size=1, max_size=12)


# Ranks ----------------------------------------------------------------------------------------------------------------


@given(job_id=names, workers=st.sets(names, min_size=1, max_size=8).map(sorted))
def test_rank_of_each_worker_is_unique_per_job(job_id: str, workers: list[str]) -> None:
    ranks = {worker: len(list_higher_ranked(worker, workers, job_id)) for worker in workers}
    assert sorted(ranks.values()) == list(range(len(workers)))
    for worker in workers:
        higher_ranked = sorted((name for name in workers if ranks[name] < ranks[worker]), key=ranks.__getitem__)
        assert higher_ranked == list(list_higher_ranked(worker, workers, job_id))


@pytest.mark.parametrize("names", ["host-{:d}-abc", "host-4711-{:06x}", "worker{:03d}"])
def test_ranks_are_spread_evenly_over_workers(names: str) -> None:
    workers = sorted(names.format(number * 7919) for number in range(8))
    firsts, seconds = Counter[str](), Counter[str]()
    for number in range(8000):
        ranks = {worker: list_higher_ranked(worker, workers, f"job-6741{number:020x}") for worker in workers}
        firsts.update(worker for worker in workers if not ranks[worker])
        seconds.update(worker for worker in workers if len(ranks[worker]) == 1)
    for counter in (firsts, seconds):
        assert sum(counter.values()) == 8000
        assert 800 < min(counter.values()) <= max(counter.values()) < 1200


# Own rows, and rows left to other workers during the claim delay ---------------------------------------------------


@pytest.fixture
async def claims(connection: Connection, store: Path) -> ClaimQueue:
    async with run_roles_in_process(connection, store) as roles:
        claims = ClaimQueue(
            roles.event_store,
            roles.checkpoint,
            job_types={"echo"},
            slots=5,
            eligible_workers=lambda: WORKERS,
            free_slots=lambda job_type: 1,
            wake=lambda: None,
        )
        claims.worker_id = "w1"
        return claims


WORKERS = ("w1", "w2", "w3")
OWN_JOBS = [job_id for n in range(60) if not list_higher_ranked("w1", WORKERS, job_id := f"job-{n}")]
JOBS_OF_OTHERS = [job_id for n in range(60) if list_higher_ranked("w1", WORKERS, job_id := f"job-{n}")]


def make_rows(*jobs: tuple[str, int]) -> list[QueueRow]:
    return [QueueRow(job_id, "echo", None, priority, number) for number, (job_id, priority) in enumerate(jobs)]


def select_jobs(claims: ClaimQueue, rows: list[QueueRow], views_position: int = 1000) -> list[str]:
    return [row.job_id for row in claims._filter_by_rank(rows, WORKERS, views_position)]


async def test_claim_queue_tries_jobs_of_own_first_rank_at_once(claims: ClaimQueue) -> None:
    rows = make_rows((JOBS_OF_OTHERS[0], 1), (OWN_JOBS[0], 1), (JOBS_OF_OTHERS[1], 1), (OWN_JOBS[1], 1))
    assert select_jobs(claims, rows) == OWN_JOBS[:2]


async def test_job_of_lower_priority_waits_for_jobs_left_to_other_workers(claims: ClaimQueue) -> None:
    rows = make_rows((OWN_JOBS[0], 9), (JOBS_OF_OTHERS[0], 5), (OWN_JOBS[1], 5), (OWN_JOBS[2], 1))
    assert select_jobs(claims, rows) == OWN_JOBS[:2]


async def test_job_left_to_other_workers_is_tried_after_the_claim_delay(
    claims: ClaimQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("jobledger.workers.claims.claim_queue.time.monotonic", lambda: now)
    rows = make_rows((JOBS_OF_OTHERS[0], 5), (OWN_JOBS[0], 1))
    assert select_jobs(claims, rows) == []
    now += 0.2
    assert select_jobs(claims, rows) == []
    now += 0.1
    assert select_jobs(claims, rows) == [JOBS_OF_OTHERS[0], OWN_JOBS[0]]


async def test_job_is_left_to_higher_ranked_workers_while_they_claim(
    claims: ClaimQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("jobledger.workers.claims.claim_queue.time.monotonic", lambda: now)
    rows = make_rows((JOBS_OF_OTHERS[0], 1))
    for position in range(1, 10):
        for worker in list_higher_ranked("w1", WORKERS, JOBS_OF_OTHERS[0]):
            document = {
                "_id": position,
                "stream": f"job-x{position}",
                "type": "JobClaimed",
                "data": {"worker_id": worker},
            }
            claims.handle_event(document)
        now += 0.9
        assert select_jobs(claims, rows) == []
    now += 0.2
    assert select_jobs(claims, rows) == [JOBS_OF_OTHERS[0]]


@pytest.mark.parametrize("is_own_event", [True, False])
async def test_job_is_left_to_others_while_the_views_may_lack_its_claim(
    claims: ClaimQueue, is_own_event: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("jobledger.workers.claims.claim_queue.time.monotonic", lambda: now)
    rows = make_rows((JOBS_OF_OTHERS[0], 1))
    if is_own_event:
        claims.mark_claimed(OWN_JOBS[0], 50)
    else:
        claims.handle_event({"_id": 50, "stream": "batch-1", "type": "BatchPaused", "data": {}})
    assert select_jobs(claims, rows, views_position=10) == []
    claims.mark_claimed(OWN_JOBS[1], 90)  # later claims do not matter
    now += 1
    assert select_jobs(claims, rows, views_position=49) == []
    assert select_jobs(claims, rows, views_position=50) == [JOBS_OF_OTHERS[0]]


async def test_job_is_not_left_to_others_forever_because_the_views_are_behind(
    claims: ClaimQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("jobledger.workers.claims.claim_queue.time.monotonic", lambda: now)
    rows = make_rows((JOBS_OF_OTHERS[0], 1))
    claims.mark_claimed(OWN_JOBS[0], 50)
    assert select_jobs(claims, rows, views_position=10) == []
    now += 1.9
    assert select_jobs(claims, rows, views_position=10) == []
    now += 0.2
    assert select_jobs(claims, rows, views_position=10) == [JOBS_OF_OTHERS[0]]


async def test_times_of_deferred_jobs_of_different_priorities_run_at_once(
    claims: ClaimQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("jobledger.workers.claims.claim_queue.time.monotonic", lambda: now)
    first, second = JOBS_OF_OTHERS[:2]
    rows = make_rows((first, 9), (OWN_JOBS[0], 5), (second, 1))
    assert select_jobs(claims, rows) == []
    now += 0.3
    assert select_jobs(claims, rows) == [first, OWN_JOBS[0], second]
    [urgent, *_] = JOBS_OF_OTHERS[2:]
    assert select_jobs(claims, make_rows((urgent, 9), (second, 1))) == []
    now += 0.3
    assert select_jobs(claims, make_rows((urgent, 9), (second, 1))) == [urgent, second]


async def test_end_of_the_log_is_known_after_a_resync(claims: ClaimQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("jobledger.workers.claims.claim_queue.time.monotonic", lambda: now)
    rows = make_rows((JOBS_OF_OTHERS[0], 1))
    claims.resync(50)
    assert select_jobs(claims, rows, views_position=10) == []
    now += 0.3
    assert select_jobs(claims, rows, views_position=49) == []
    assert select_jobs(claims, rows, views_position=50) == [JOBS_OF_OTHERS[0]]


# Queries --------------------------------------------------------------------------------------------------------------


class Backlog:
    """A claim queue that reads given rows instead of the view, and jobs whose streams exist."""

    def __init__(self, roles: RunningRoles, monkeypatch: pytest.MonkeyPatch, workers: Sequence[str] = ("w1",)) -> None:
        self.roles = roles
        self.rows: list[QueueRow] = []
        self.free_slots = {"echo": 1000, "other": 1000}
        self.wakes = 0
        self.limits: list[int] = []
        self.claims = ClaimQueue(
            roles.event_store,
            roles.checkpoint,
            job_types={"echo", "other"},
            slots=1000,
            eligible_workers=lambda: workers,
            free_slots=lambda job_type: self.free_slots.get(job_type, 0),
            wake=self._count_wake,
        )
        self.claims.worker_id = "w1"
        monkeypatch.setattr(queue, "find_rows", self._find_rows)

    def _count_wake(self) -> None:
        self.wakes += 1

    async def _find_rows(
        self,
        _views: Any,
        *,
        job_types: Collection[str],
        excluded_job_ids: Collection[str],
        excluded_batch_ids: Collection[str],
        limit: int,
        share: queue.Share | None = None,
        **_: Any,
    ) -> list[QueueRow]:
        self.limits.append(limit)
        rows = [
            row
            for row in self.rows
            if row.job_type in job_types
            and row.job_id not in excluded_job_ids
            and row.batch_id not in excluded_batch_ids
        ]
        if share is not None:
            rows = [row for row in rows if queue.compute_hash(row.job_id) % share.divisor == share.remainder]
        return sorted(rows, key=queue.get_urgency)[:limit]

    async def submit(self, count: int, priority: int = 1) -> list[str]:
        """Submit jobs, and add their rows."""
        job_ids = [await self.roles.submit() for _ in range(count)]
        self.rows += [QueueRow(job_id, "echo", None, priority, len(self.rows) + n) for n, job_id in enumerate(job_ids)]
        return job_ids

    async def take(self) -> list[str]:
        return [candidate.job_id for candidate in await self.claims.take_candidates()]


async def test_excluded_jobs_are_not_claimed_and_cause_no_further_queries(backlog: Backlog) -> None:
    [excluded, other] = await backlog.submit(2)
    backlog.claims.excluded_job_ids = [excluded]
    assert await backlog.take() == [other]
    backlog.claims.pending_claims[other] = "echo"
    backlog.wakes = 0
    for _ in range(5):
        assert await backlog.take() == []
    assert (backlog.wakes, len(backlog.limits)) == (0, 2)
    backlog.claims.excluded_job_ids = []
    backlog.claims.request_query()
    assert await backlog.take() == [excluded]


async def test_row_that_was_read_before_its_job_is_excluded_is_not_claimed(backlog: Backlog) -> None:
    first, second, third = await backlog.submit(3)
    backlog.free_slots = {"echo": 1}
    assert await backlog.take() == [first]
    backlog.claims.pending_claims[first] = "echo"
    backlog.claims.excluded_job_ids = [second]
    assert await backlog.take() == [third]


@pytest.fixture
async def backlog(connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Backlog]:
    async with run_roles_in_process(connection, store) as roles:
        backlog = Backlog(roles, monkeypatch)
        yield backlog
        backlog.claims.close()


async def test_queue_is_read_again_when_others_have_claimed_all_rows(backlog: Backlog) -> None:
    for job_id in await backlog.submit(3):
        await backlog.roles.claim(job_id)
    assert await backlog.take() == []
    assert backlog.wakes == 1
    [job_id] = await backlog.submit(1)
    assert await backlog.take() == [job_id]


async def test_job_whose_stream_was_loaded_too_early_is_tried(backlog: Backlog) -> None:
    """Another worker ran it then, and has released it since."""
    [job_id] = await backlog.submit(1)
    await backlog.roles.claim(job_id)
    backlog.claims._rows.extend(backlog.rows)
    backlog.claims._rows_expire_at = math.inf
    backlog.claims._rows_workers = frozenset({"w1"})
    backlog.claims._loaded_states = dict(await load_stream_states(backlog.roles.event_store, [job_id]))
    backlog.roles.checkpoint.position = 1000
    assert await backlog.take() == [job_id]


async def test_job_that_changes_between_two_queries_is_taken_once(
    backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "_MAX_SHARED_ROWS", 3)
    job_ids = await backlog.submit(20)
    backlog.claims._eligible_workers = lambda: ("w1", "w2")
    find_rows, calls = queue.find_rows, 0

    async def find_changed_rows(*arguments: Any, **options: Any) -> Sequence[QueueRow]:
        nonlocal calls
        calls += 1
        rows = await find_rows(*arguments, **options)
        return [row._replace(priority=5) for row in rows] if calls > 1 else rows

    monkeypatch.setattr(queue, "find_rows", find_changed_rows)
    taken = await backlog.take()
    assert 0 < len(taken) == len(set(taken)) < len(job_ids)


async def test_less_urgent_jobs_of_the_share_wait_for_urgent_jobs_that_were_not_read(
    backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "_MAX_SHARED_ROWS", 3)
    backlog.claims._eligible_workers = lambda: ("w1", "w2")
    urgent = await backlog.submit(20, priority=9)
    await backlog.submit(20)
    assert set(await backlog.take()) <= set(urgent)


async def test_worker_without_share_reads_as_many_rows_of_others(
    backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "_MAX_SHARED_ROWS", 3)
    backlog.claims._eligible_workers = lambda: ("w1", "w2")
    await backlog.submit(30)
    backlog.rows = [row for row in backlog.rows if queue.compute_hash(row.job_id) % 2 == 1]
    assert len(backlog.rows) > 3
    await backlog.take()
    assert backlog.limits[-1] == claiming._MAX_ROWS


async def test_rest_of_the_share_is_found_behind_many_rows_of_others(
    backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "_MAX_SHARED_ROWS", 3)
    monkeypatch.setattr(claiming, "_MAX_ROWS", 20)
    backlog.claims._eligible_workers = lambda: ("w1", "w2")
    own = [job_id for job_id in await backlog.submit(40) if queue.compute_hash(job_id) % 2 == 0][:2]
    others = [row for row in make_rows(*((f"job-{n}", 1) for n in range(100))) if queue.compute_hash(row.job_id) % 2]
    backlog.rows = others + [QueueRow(job_id, "echo", None, 1, 1000) for job_id in own]
    assert len(others) > 20
    assert await backlog.take() == own


async def test_deferred_jobs_cause_no_queries_until_the_views_may_show_their_claims(
    backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "_MAX_OUTDATED_SECONDS", 1000.0)
    backlog.claims._eligible_workers = lambda: WORKERS
    await backlog.submit(1)
    backlog.rows = make_rows((JOBS_OF_OTHERS[0], 1))
    backlog.claims.mark_claimed("job-own", 50)
    assert await backlog.take() == []
    backlog.wakes = 0
    await asyncio.sleep(3 * claiming._DEFER_SECONDS)
    assert backlog.wakes == 0
    backlog.roles.checkpoint.position = 50
    await poll_until(lambda: backlog.wakes == 1, "the timer fires")
    queries = len(backlog.limits)
    await backlog.take()
    assert len(backlog.limits) == queries + 1


async def test_deferred_jobs_cause_a_query_although_the_views_stay_behind(
    backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "_MAX_OUTDATED_SECONDS", 0.3)
    job_id = await defer_job(backlog)
    backlog.wakes = 0
    await poll_until(lambda: backlog.wakes == 1, "the timer fires")
    assert await backlog.take() == [job_id]


async def defer_job(backlog: Backlog) -> str:
    """Let the only job be deferred until the views reach position 50, because another worker ranks first."""
    backlog.claims._eligible_workers = lambda: WORKERS
    job_ids = await backlog.submit(30)
    [job_id, *_] = [job_id for job_id in job_ids if list_higher_ranked("w1", WORKERS, job_id)]
    backlog.rows = [row for row in backlog.rows if row.job_id == job_id]
    backlog.claims.mark_claimed("job-own", 50)
    assert await backlog.take() == []
    return job_id


async def test_later_query_does_not_defer_a_job_for_longer(backlog: Backlog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "_MAX_OUTDATED_SECONDS", 1000.0)
    job_id = await defer_job(backlog)
    backlog.claims.mark_claimed("job-later", 90)
    backlog.rows += make_rows((JOBS_OF_OTHERS[0], 0))
    assert await backlog.take() == []
    backlog.wakes = 0
    backlog.roles.checkpoint.position = 50
    await poll_until(lambda: backlog.wakes == 1, "the timer fires")
    assert await backlog.take() == [job_id]


async def test_deferred_jobs_are_tried_when_their_worker_is_gone(
    backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "_MAX_OUTDATED_SECONDS", 1000.0)
    job_id = await defer_job(backlog)
    backlog.wakes = 0
    backlog.claims._eligible_workers = lambda: ("w1",)
    await poll_until(lambda: backlog.wakes == 1, "the timer fires")
    assert await backlog.take() == [job_id]


async def test_views_that_advance_during_a_query_cause_another_one(
    backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a resync, any job may have been missed."""
    backlog.claims.resync(1000)
    find_rows = queue.find_rows

    async def find_rows_while_views_advance(*arguments: Any, **options: Any) -> Sequence[QueueRow]:
        rows = await find_rows(*arguments, **options)
        backlog.roles.checkpoint.position = 10
        backlog.claims._on_views_advanced()
        return rows

    monkeypatch.setattr(queue, "find_rows", find_rows_while_views_advance)
    backlog.wakes = 0
    assert await backlog.take() == []
    assert backlog.wakes == 1
    [job_id] = await backlog.submit(1)
    assert await backlog.take() == [job_id]


async def test_rows_of_a_query_are_used_only_briefly_if_a_change_came_meanwhile(
    backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "_CHANGED_ROWS_TTL_SECONDS", 0.0)
    first, _ = await backlog.submit(2)
    backlog.free_slots = {"echo": 1}
    find_rows = queue.find_rows

    async def find_rows_during_change(*arguments: Any, **options: Any) -> Sequence[QueueRow]:
        backlog.claims.request_query()
        return await find_rows(*arguments, **options)

    monkeypatch.setattr(queue, "find_rows", find_rows_during_change)
    assert await backlog.take() == [first]
    backlog.claims.pending_claims[first] = "echo"
    [urgent] = await backlog.submit(1, priority=9)
    assert await backlog.take() == [urgent]


async def test_worker_with_a_full_type_queries_whenever_the_views_advance_after_a_resync(backlog: Backlog) -> None:
    backlog.free_slots = {"echo": 0, "other": 1}
    backlog.claims.resync(1000)
    assert await backlog.take() == []
    [job_id] = await backlog.submit(1)
    backlog.rows = [row._replace(job_type="other") for row in backlog.rows]
    backlog.wakes = 0
    backlog.roles.checkpoint.position = 10
    backlog.claims._on_views_advanced()
    assert backlog.wakes == 1
    assert await backlog.take() == [job_id]


async def test_known_rows_are_used_until_the_views_show_the_first_change(backlog: Backlog) -> None:
    first, second, *_ = await backlog.submit(5)
    backlog.free_slots = {"echo": 1}
    assert await backlog.take() == [first]
    backlog.claims.pending_claims[first] = "echo"
    for position in (200, 100, 300):
        backlog.claims.handle_event({"_id": position, "stream": "job-new", "type": "JobRestarted", "data": {}})
    changes, queries = backlog.claims._change_count, len(backlog.limits)
    for position in (98, 99):
        backlog.roles.checkpoint.position = position
        backlog.claims._on_views_advanced()
    assert backlog.claims._change_count == changes
    assert await backlog.take() == [second]
    assert len(backlog.limits) == queries
    backlog.roles.checkpoint.position = 100
    backlog.claims._on_views_advanced()
    assert backlog.claims._change_count == changes + 1


async def test_changes_between_the_first_and_the_last_one_are_queried(backlog: Backlog) -> None:
    await backlog.submit(3)
    backlog.free_slots = {"echo": 1}
    for position in (100, 200, 300):
        backlog.claims.handle_event({"_id": position, "stream": "job-new", "type": "JobRestarted", "data": {}})
    backlog.roles.checkpoint.position = 150
    backlog.claims._on_views_advanced()
    await backlog.take()
    changes = backlog.claims._change_count
    for position in (200, 300):
        backlog.roles.checkpoint.position = position
        backlog.claims._on_views_advanced()
        backlog.claims._rows.clear()
        await backlog.take()
    assert backlog.claims._change_count == changes + 2
    backlog.roles.checkpoint.position = 301
    backlog.claims._on_views_advanced()
    assert backlog.claims._change_count == changes + 2


async def test_worker_without_jobs_queries_whenever_the_views_advance_after_a_resync(backlog: Backlog) -> None:
    """Events up to the head of the log may have been missed, at any position."""
    backlog.claims.resync(1000)
    assert await backlog.take() == []
    [job_id] = await backlog.submit(1)
    assert await backlog.take() == []
    backlog.roles.checkpoint.position = 10
    backlog.claims._on_views_advanced()
    assert await backlog.take() == [job_id]


async def test_jobs_of_a_full_type_do_not_make_others_less_urgent(backlog: Backlog) -> None:
    await backlog.submit(5)
    backlog.free_slots = {"echo": 0, "other": 1}
    assert await backlog.take() == []
    assert await backlog.take() == []
    backlog.rows.clear()
    assert await backlog.take() == []
    assert backlog.claims.is_exhausted
    backlog.free_slots["echo"] = 1
    backlog.claims._rows.extend([QueueRow("job-1", "echo", None, 1, 1)])
    assert not backlog.claims.is_exhausted


async def test_paused_batch_causes_no_queries_and_hides_no_other_jobs(backlog: Backlog) -> None:
    await backlog.submit(3)
    backlog.rows = [row._replace(batch_id="batch-1") for row in backlog.rows]
    backlog.claims.handle_event({"_id": 1000, "stream": "batch-1", "type": "BatchPaused", "data": {}})
    assert await backlog.take() == []
    assert backlog.wakes == 0
    [job_id] = await backlog.submit(1)
    backlog.claims.request_query()
    assert await backlog.take() == [job_id]


async def test_rows_of_a_full_type_hide_no_jobs_of_others(backlog: Backlog) -> None:
    first, *_ = await backlog.submit(5)
    [other] = await backlog.submit(1)
    backlog.rows[-1] = backlog.rows[-1]._replace(job_type="other")
    backlog.free_slots = {"echo": 1, "other": 0}
    assert await backlog.take() == [first]
    backlog.claims.pending_claims[first] = "echo"
    backlog.free_slots = {"echo": 0, "other": 1}
    assert await backlog.take() == [other]


# Jobs that are due later ----------------------------------------------------------------------------------------------


def make_due_event(position: int, seconds: float) -> dict[str, Any]:
    not_before = datetime.now(UTC) + timedelta(seconds=seconds)
    data = {"job_type": "echo", "not_before": not_before}
    return {"_id": position, "stream": f"job-{position}", "type": "JobSubmitted", "data": data}


async def test_job_that_is_due_later_causes_a_query_only_when_it_is_due(
    backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "_MIN_DUE_LATER_SECONDS", 0.05)
    await backlog.take()  # finds nothing
    queries = len(backlog.limits)
    backlog.claims.handle_event(make_due_event(1, 600))
    backlog.claims.handle_event(make_due_event(2, 0.4))
    backlog.claims.handle_event(make_due_event(3, 60))
    backlog.roles.checkpoint.position = 3
    backlog.claims._on_views_advanced()
    assert backlog.claims.is_exhausted
    assert await backlog.take() == []
    assert len(backlog.limits) == queries
    wakes = backlog.wakes
    await poll_until(lambda: backlog.wakes > wakes, "the timer of the second job fires")
    await backlog.take()
    assert len(backlog.limits) == queries + 1
    assert list(backlog.claims._due_later) == [1, 3]


async def test_due_job_is_found_although_the_views_were_behind(
    backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "_MIN_DUE_LATER_SECONDS", 0.01)
    await backlog.take()
    backlog.claims.handle_event(make_due_event(7, 0.1))
    await poll_until(lambda: not backlog.claims._due_later)
    await backlog.take()  # the views do not have the job yet
    assert backlog.claims.is_exhausted
    [job_id] = await backlog.submit(1)
    backlog.roles.checkpoint.position = 7
    backlog.claims._on_views_advanced()
    assert await backlog.take() == [job_id]


async def test_many_jobs_that_are_due_later_are_left_to_the_queue(
    backlog: Backlog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "_MAX_DUE_LATER", 2)
    await backlog.take()
    for position in (1, 2, 3):
        backlog.claims.handle_event(make_due_event(position, 600))
    backlog.roles.checkpoint.position = 3
    backlog.claims._on_views_advanced()
    assert not backlog.claims.is_exhausted


# Claim delay ----------------------------------------------------------------------------------------------------------


def test_claim_delay_follows_recent_claim_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("jobledger.workers.claims.claim_queue.time.monotonic", lambda: now)
    delay = ClaimDelay()

    def record_claim(job_id: str, seconds: float, by: str = "w1") -> float:
        nonlocal now
        delay.start_timing(job_id, "w1")
        now += seconds
        delay.record_claim(job_id, by)
        return delay.seconds

    assert record_claim("job-1", 0.002) == 0.01
    assert record_claim("job-2", 0.04) == pytest.approx(0.06)
    assert record_claim("job-3", 0.002) == pytest.approx(0.057)  # one fast claim changes the delay little
    assert record_claim("job-4", 3, by="w2") == pytest.approx(
        0.057
    )  # the first worker was busy, so this claim is not measured
    assert record_claim("job-5", 3) == 0.25
    for number in range(100):
        record_claim(f"job-{number}", 0.002)
    assert delay.seconds == 0.01


# Running workers ------------------------------------------------------------------------------------------------------


async def wait_for_healthy_workers(roles: RunningRoles, count: int) -> None:
    worker = roles.worker
    assert worker is not None
    await poll_until(lambda: len(worker._lease_reaper.healthy_workers) == count, f"{count} workers are known")


async def count_voided_appends(roles: RunningRoles) -> int:
    return len(await load_event_documents(roles.db, {"stream": VOID_STREAM}))


async def test_idle_workers_do_not_compete_for_a_new_job(connection: Connection, store: Path) -> None:
    async with (
        run_roles_in_process(connection, store, projector=True) as roles,
        run_roles_in_process(connection, store, worker=WorkerOptions(), is_worker_process=True) as first,
        run_roles_in_process(connection, store, worker=WorkerOptions(), is_worker_process=True) as second,
        run_roles_in_process(connection, store, worker=WorkerOptions(), is_worker_process=True) as third,
    ):
        workers = (first, second, third)
        for worker_roles in workers:
            await wait_for_healthy_workers(worker_roles, len(workers))
        for _ in range(40):
            await roles.wait_until_finished(await roles.submit())
        events = [event.event for event in await roles.read_all_events()]
        assert len({event.worker_id for event in events if isinstance(event, JobClaimed)}) == 3
        # At most 1.2 tries per job, as promised, and a few more until the workers have measured the claim times.
        assert await count_voided_appends(roles) <= 8 + 3


async def test_job_whose_first_worker_is_busy_runs_on_another_worker(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()

    async def work(job: JobContext) -> Results:
        await release.wait()
        return Results()

    install_processor(monkeypatch, work)
    options = WorkerOptions(max_concurrent=1)
    async with (
        run_roles_in_process(connection, store, projector=True) as roles,
        run_roles_in_process(connection, store, worker=options, is_worker_process=True),
        run_roles_in_process(connection, store, worker=options, is_worker_process=True),
    ):
        blocking = await roles.submit(job_type="test")
        await roles.wait_for_event(JobClaimed, blocking)
        started_at = asyncio.get_running_loop().time()
        for _ in range(10):  # for about half of them, the busy worker has the first rank
            await roles.wait_until_finished(await roles.submit())
        assert asyncio.get_running_loop().time() - started_at < 10 * 2
        release.set()
        await roles.wait_until_finished(blocking)


async def test_job_that_arrives_during_a_query_is_found(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The query starts before the job is in the queue, and ends after the worker received the job's event."""
    querying, release = asyncio.Event(), asyncio.Event()
    find_rows = queue.find_rows

    async def find_slowly(*arguments: Any, **options: Any) -> list[QueueRow]:
        rows = await find_rows(*arguments, **options)
        querying.set()
        await release.wait()
        return rows

    monkeypatch.setattr(queue, "find_rows", find_slowly)
    async with (
        run_roles_in_process(connection, store, projector=True) as roles,
        run_roles_in_process(connection, store, worker=WorkerOptions()) as worker_roles,
    ):
        async with asyncio.timeout(DEADLINE_SECONDS):
            await querying.wait()
        job_id = await roles.submit()
        await worker_roles.wait_for_views(await roles.event_store.read_head_position())
        release.set()
        await roles.wait_until_finished(job_id)


async def test_job_claimed_by_another_worker_during_the_load_is_not_tried(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, release = asyncio.Event(), asyncio.Event()

    async def load_slowly(event_store: EventStore, streams: list[str]) -> Any:
        states = await load_stream_states(event_store, streams)
        loading.set()
        await release.wait()
        return states

    monkeypatch.setattr(claiming, "load_stream_states", load_slowly)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        free, claimed_elsewhere = await roles.submit(), await roles.submit()
        await roles.wait_for_views()
        async with run_roles_in_process(connection, store, worker=WorkerOptions()) as worker_roles:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await loading.wait()
            claimed = await handle_command(
                roles.event_store,
                claimed_elsewhere,
                ClaimJob("another", datetime.now(UTC)),
                meta=EventMetadata("worker:another"),
            )
            assert worker_roles.worker is not None
            queue_of_worker = worker_roles.worker._claim_queue
            await poll_until(lambda: claimed_elsewhere in (queue_of_worker._claimed_during_load or ()))
            await roles.wait_for_views(claimed.events[0].position)
            release.set()
            await roles.wait_until_finished(free)
        assert await count_voided_appends(roles) == 0, "a claim was tried that could not succeed"


async def test_rows_keep_their_order_after_a_failed_load(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [LedgerUnavailable("the database is unavailable")]

    async def fail_first(event_store: EventStore, streams: list[str]) -> Any:
        if failures:
            raise failures.pop()
        return await load_stream_states(event_store, streams)

    monkeypatch.setattr(claiming, "load_stream_states", fail_first)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        jobs = [await roles.submit() for _ in range(3)]
        await roles.wait_for_views()
        async with run_roles_in_process(connection, store, worker=WorkerOptions(max_concurrent=1)):
            await roles.wait_until_finished(*jobs)
        assert [event.stream for event in await roles.read_all_events() if isinstance(event.event, JobClaimed)] == jobs
    assert not failures


async def test_slots_per_type_limit_one_type_and_delay_no_others(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, probe = asyncio.Event(), ConcurrencyProbe(seconds=0.02)

    async def work(job: JobContext) -> Results:
        await release.wait()
        return await probe.run(job)

    install_processor(monkeypatch, work)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        limited = [await roles.submit(job_type="test", priority=5) for _ in range(20)]
        unlimited = [await roles.submit() for _ in range(20)]
        await roles.wait_for_views()
        async with run_roles_in_process(
            connection, store, worker=WorkerOptions(max_concurrent=8, max_concurrent_per_type={"test": 2})
        ):
            limited += [await roles.submit(job_type="test") for _ in range(5)]
            await roles.wait_until_finished(*unlimited)  # they have free slots, although no limited job has finished
            release.set()
            await roles.wait_until_finished(*limited)
        assert probe.maximum == 2
