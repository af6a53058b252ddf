"""Choose which pending jobs a worker tries to claim next. These are only hints: the append of the claim decides.

An idle worker takes a new job from its `JobSubmitted` event, without a query. With a backlog, it takes rows from the
view `queue`, by priority, then age, many at a time.

No job waits forever. Everything that makes a job claimable is an event. When the views have reached the event, the
worker queries the queue. A due time sets a timer, and so does a job that was deferred to another worker.

Workers avoid conflicts by rank: for each job, a hash of both names ranks the workers. The first one claims immediately.
The others wait a moment per rank, and skip the job when they observe its claim. Usually, one append claims a job.
If the first worker is busy, the job starts milliseconds later. A job of higher priority is always tried before one of
lower priority. Jobs of equal priority in one query may change their order.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar

from jobledger.ledger.domain.commands import ClaimJob
from jobledger.ledger.domain.errors import LedgerUnavailable, UnreadableEvent
from jobledger.ledger.domain.events import ClaimVia, RecordedEvent
from jobledger.ledger.domain.job import Job
from jobledger.ledger.store.command_handler import StreamState, load_stream_states
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import CheckpointFollower
from jobledger.projections.views import queue
from jobledger.workers.claims.claim_ranking import ClaimDelay, list_higher_ranked

CLAIMABLE_EVENT_TYPES: Final = frozenset(
    {"JobSubmitted", "JobAttemptFailed", "JobLeaseExpired", "JobReleased", "JobRestarted", "JobUpdated"}
    | {"BatchResumed", "BatchDeleted"}
)
"""Types of events that may make a job claimable."""
CLAIMER_EVENT_TYPES: Final = CLAIMABLE_EVENT_TYPES | {"JobClaimed", "BatchPaused"}
_MAX_RANKS: Final = 5
"""Workers of later ranks do not wait longer."""
_DEFER_SECONDS: Final = 0.25
"""A queued job is deferred to higher-ranked workers for this time, and longer while any of them is claiming."""
_MAX_OUTDATED_SECONDS: Final = 2.0
"""A job is deferred for this time at most because the views are behind, and may not show its claim."""
_CLAIMING_SECONDS: Final = 1.0
"""A worker that has claimed within this time counts as claiming.

It may be about to claim this job, too. On a busy machine, a third of a second passes between the claims of a worker,
and each job taken from it costs a version conflict.
"""
_CLOCK_RETRY_SECONDS: Final = 0.1
_DUE_FIELDS: Final = {"JobSubmitted": "not_before", "JobAttemptFailed": "retry_at"}
"""The fields of events that say when a job is due."""
_MIN_DUE_LATER_SECONDS: Final = 1.0
_MAX_DUE_LATER: Final = 1000
"""For more jobs that are due later, the queue is queried, which sets one timer for all."""
_MAX_ROWS: Final = 500
_MAX_SHARED_ROWS: Final = 100
"""Number of rows per query, and of those that are read regardless of ranks. Streams are loaded when rows are taken.

Few large queries are better: each one scans the index entries of recently deleted rows, which the database keeps for
a while.
"""
_MIN_ROWS_AHEAD: Final = 100
"""Number of rows whose streams are loaded together, even if the worker has fewer slots."""
_ROWS_TTL_SECONDS: Final = 5.0
_CHANGED_ROWS_TTL_SECONDS: Final = 0.1
"""How long the rows of a query are used, without and with a change since.

A change may be a more urgent job. A worker that comes or goes changes the ranks, so the rows are dropped immediately.
"""


class ClaimCandidate(NamedTuple):
    """A pending job that the worker may try to claim: a row of the queue or a new job, with its stream state."""

    job_id: str
    stream_state: StreamState
    job_type: str
    batch_id: str | None
    via: ClaimVia


class _Deferral(NamedTuple):
    """When a row was first deferred: the time on the monotonic clock, and the known end of the log."""

    at: float
    log_position: int


class _DelayedJob(NamedTuple):
    candidate: ClaimCandidate
    timer: asyncio.TimerHandle


_CandidateOrRow = TypeVar("_CandidateOrRow", ClaimCandidate, queue.QueueRow)


class ClaimQueue:
    """The pending jobs that one worker may try to claim.

    Args:
        job_types: The job types that the worker can run.
        slots: The number of jobs that the worker runs concurrently.
        eligible_workers: Returns the workers that may claim jobs.
        free_slots: Returns how many more jobs of a type the worker may run now.
        wake: Called when there may be candidates.
    """

    def __init__(
        self,
        event_store: EventStore,
        checkpoint: CheckpointFollower,
        *,
        job_types: Collection[str],
        slots: int,
        eligible_workers: Callable[[], Collection[str]],
        free_slots: Callable[[str], int],
        wake: Callable[[], None],
    ) -> None:
        self._event_store = event_store
        self._checkpoint = checkpoint
        self._job_types = job_types
        self._slots = slots
        self._eligible_workers = eligible_workers
        self._free_slots = free_slots
        self.wake = wake
        self.worker_id = ""
        """The ID of the worker. Each of its leases has its own ID."""
        self.pending_claims: dict[str, str] = {}
        """Job types of the jobs that the worker is claiming, by job ID."""
        self.excluded_job_ids: Collection[str] = ()
        """Jobs that the worker must not claim now."""
        # New jobs, taken from their `JobSubmitted` events, by job ID
        self._new_jobs: dict[str, ClaimCandidate] = {}
        self._delayed: dict[str, _DelayedJob] = {}
        """Timers of new jobs that a higher-ranked worker may claim first."""
        self._claim_delay = ClaimDelay()
        # Queued jobs, from the last query
        self._rows: deque[queue.QueueRow] = deque()
        self._loaded_states: dict[str, StreamState | UnreadableEvent] = {}
        """Streams that were loaded ahead, by job ID."""
        self._claimed_during_load: set[str] | None = None
        """IDs of jobs whose claims were observed while streams are being loaded."""
        self._rows_expire_at = 0.0
        self._rows_workers: frozenset[str] = frozenset()
        """The workers that were eligible at the query. If others are, the ranks have changed."""
        # When to query again
        self._may_have_more = True
        """Whether the queue may contain jobs that the last query did not return."""
        self._is_rest_of_full_types = False
        """Whether jobs that the last query did not return can only be of types for which no slot was free."""
        self._change_count = 0
        """Number of requests for a query. If it changes during a query, another one follows."""
        self._first_change_position = 0
        self._last_change_position = 0
        """Positions of the first and the last event that may have added jobs, and that no query has seen.

        When the views reach the first one, a query follows. There may be others in between, and after a resync before
        it. So a worker that knows no jobs queries each time the views advance, until they reach the last one.
        """
        self._queried_position = 0
        """Position of the views at the last query."""
        # Jobs that the views may show as pending and that the worker must not try
        self._claimed_positions: dict[str, int] = {}
        """Positions of claims that the views have not reached, by job ID, in ascending order."""
        self._skipped: set[str] = set()
        """IDs of jobs that cannot be claimed until an event changes them."""
        self._paused: dict[str, int] = {}
        """Positions of `BatchPaused` events that the views have not reached, by batch ID."""
        # Ranks of queued jobs
        self._deferrals: dict[str, _Deferral] = {}
        """Jobs that are deferred to higher-ranked workers, by job ID."""
        self._log_position = 0
        """The largest position of an event that the worker has observed or written."""
        self._claimed_at: dict[str, float] = {}
        """Times, on the monotonic clock, of the last claim of each worker, by worker ID."""
        self._timer: asyncio.TimerHandle | None = None
        """Fires when the next job is due, or when deferred jobs may be tried."""
        self._due_later: dict[int, datetime] = {}
        """Times at which jobs are due, by the position of the event, for which a timer is set."""
        self._due_later_timer: asyncio.TimerHandle | None = None
        self._due_later_at: datetime | None = None
        """When the timer fires, on the server's clock."""
        self._clock_retry_timer: asyncio.TimerHandle | None = None
        """Fires shortly after a claim that came too early. See `handle_not_due`."""
        checkpoint.add_listener(self._on_views_advanced)

    @property
    def is_exhausted(self) -> bool:
        """Whether it knows no job for which a slot is free, and only an event can make one known."""
        if self._may_have_more and not self._is_rest_of_full_types:
            return False
        if self._rows and self._free_slots(self._rows[0].job_type) > 0:  # nearly always
            return False
        return not any(self._free_slots(job_type) > 0 for job_type in {row.job_type for row in self._rows})

    def close(self) -> None:
        """Cancel all timers."""
        for timer in (
            self._timer,
            self._clock_retry_timer,
            self._due_later_timer,
            *(it.timer for it in self._delayed.values()),
        ):
            if timer is not None:
                timer.cancel()

    # Events -------------------------------------------------------------------------------------------------------

    def resync(self, head: int) -> None:
        """Query the queue now, and again when the views reach `head`: events up to there may have been missed."""
        self._log_position = max(self._log_position, head)
        self._skipped.clear()
        self._rows.clear()
        self._query_when_views_reach(head)
        self.request_query()

    def handle_event(self, document: Mapping[str, Any]) -> None:
        """Handle a new event."""
        stream, event_type = document["stream"], document["type"]
        self._log_position = max(self._log_position, document["_id"])
        if event_type == "JobClaimed":
            self._claimed_at[document["data"]["worker_id"]] = time.monotonic()
            self._claim_delay.record_claim(stream, document["data"]["worker_id"])
            self.mark_claimed(stream, document["_id"])
            if self._claimed_during_load is not None:
                self._claimed_during_load.add(stream)
        elif event_type == "BatchPaused":  # its rows may be loaded, and stay in the view until it reaches this event
            self._paused[stream] = document["_id"]
            self._query_when_views_reach(document["_id"])
        elif event_type in CLAIMABLE_EVENT_TYPES:
            self._skipped.discard(stream)
            self._claimed_positions.pop(stream, None)
            self._paused.pop(stream, None)
            is_done = self._wait_until_due(document) or (event_type == "JobSubmitted" and self._try_new_job(document))
            if not is_done:
                self._query_when_views_reach(document["_id"])

    def build_claim(self, candidate: ClaimCandidate) -> ClaimJob:
        """Return the command that claims a job for this worker, with what the worker knows now."""
        return ClaimJob(
            self.worker_id,
            self._event_store.clock.estimate(),
            via=candidate.via,
            seen=self._log_position,
            free_slots=self._free_slots(candidate.job_type),
        )

    def mark_claimed(self, job_id: str, position: int) -> None:
        """Exclude a job that was claimed at `position`, until the views have reached the position."""
        self._new_jobs.pop(job_id, None)
        if (delayed := self._delayed.pop(job_id, None)) is not None:
            delayed.timer.cancel()
        self._log_position = max(self._log_position, position)
        self._claimed_positions.pop(job_id, None)  # keeps the dictionary ordered by position
        if position > self._checkpoint.position:
            self._claimed_positions[job_id] = position

    def get_new_job(self, job_id: str) -> StreamState | None:
        """Return a job after its submission if it is one of the new jobs."""
        if (candidate := self._new_jobs.get(job_id)) is not None:
            return candidate.stream_state
        return self._delayed[job_id].candidate.stream_state if job_id in self._delayed else None

    async def handle_rejection(self, job_id: str) -> None:
        """Exclude a job whose claim was rejected, until the views show why. If they are up to date, skip the job."""
        head = await self._event_store.read_head_position()
        if head > self._checkpoint.position:
            self.mark_claimed(job_id, head)
        else:
            self.skip(job_id)

    def handle_not_due(self) -> None:
        """Query again soon, because a job was claimed too early: the clock was corrected since the query.

        This has its own timer, because a pending query may replace the other one.
        """
        if self._clock_retry_timer is not None:
            self._clock_retry_timer.cancel()
        self._clock_retry_timer = asyncio.get_running_loop().call_later(_CLOCK_RETRY_SECONDS, self.request_query)

    def skip(self, job_id: str) -> None:
        """Do not try to claim a job until an event makes it claimable again."""
        self._skipped.add(job_id)

    def _wait_until_due(self, document: Mapping[str, Any]) -> bool:
        """Set a timer if a job is due later. No query is needed before, when the views have reached the event."""
        data = document["data"]
        due_at = data.get(_DUE_FIELDS.get(document["type"]))
        if (
            not isinstance(due_at, datetime)
            or data.get("job_type", next(iter(self._job_types), "")) not in self._job_types
            or len(self._due_later) >= _MAX_DUE_LATER
            or self._event_store.clock.compute_seconds_until(due_at) < _MIN_DUE_LATER_SECONDS
        ):
            return False
        self._due_later[document["_id"]] = due_at
        if self._due_later_timer is None or self._due_later_at is None or due_at < self._due_later_at:
            self._set_due_later_timer(due_at)
        return True

    def _set_due_later_timer(self, due_at: datetime) -> None:
        if self._due_later_timer is not None:
            self._due_later_timer.cancel()
        self._due_later_at = due_at
        seconds = self._event_store.clock.compute_sleep_seconds(due_at)
        self._due_later_timer = asyncio.get_running_loop().call_later(seconds, self._query_due_later)

    def _query_due_later(self) -> None:
        """Query for the jobs that are due now, also when the views have reached their events."""
        self._due_later_timer = None
        clock = self._event_store.clock
        for position, due_at in list(self._due_later.items()):
            if clock.is_uncertain or clock.compute_seconds_until(due_at) == 0:
                del self._due_later[position]
                self._query_when_views_reach(position)
                self.request_query()
        if self._due_later:
            self._set_due_later_timer(min(self._due_later.values()))

    def _try_new_job(self, document: Mapping[str, Any]) -> bool:
        """Keep a new job if a slot is free and no others wait. Otherwise, its row in `queue` represents it."""
        job_id, job_type = document["stream"], document["data"].get("job_type")
        if job_type is None:  # read without its payload, in a flood
            return False
        if job_type not in self._job_types:
            return True  # this worker never runs it
        new_count = len(self._new_jobs) + len(self._delayed)
        if "not_before" in document["data"] or self._may_have_more or new_count >= self._free_slots(job_type):
            return False
        try:
            state = StreamState().apply([RecordedEvent(document)])
            candidate = ClaimCandidate(job_id, state, job_type, document["data"].get("batch_id"), "fresh")
        except UnreadableEvent:  # workers of the version that wrote it will claim it
            return False
        higher_ranked = list_higher_ranked(self.worker_id, sorted(self._eligible_workers()), job_id)
        if not higher_ranked:
            self._add_new_job(candidate, document["_id"])
        else:
            self._claim_delay.start_timing(job_id, higher_ranked[0])
            loop, delay = asyncio.get_running_loop(), min(len(higher_ranked), _MAX_RANKS) * self._claim_delay.seconds
            timer = loop.call_later(delay, self._add_new_job, candidate, document["_id"])
            self._delayed[job_id] = _DelayedJob(candidate, timer)
        return True

    def _add_new_job(self, candidate: ClaimCandidate, position: int) -> None:
        self._delayed.pop(candidate.job_id, None)
        if self._may_have_more:  # others wait before it now, and its row represents it
            self._query_when_views_reach(position)
        else:
            self._new_jobs[candidate.job_id] = candidate
        self.wake()

    def _query_when_views_reach(self, position: int) -> None:
        """Query again when the views show an event that may have added jobs."""
        has_others = self._last_change_position > self._queried_position
        self._first_change_position = min(self._first_change_position, position) if has_others else position
        self._last_change_position = max(self._last_change_position, position)

    def _on_views_advanced(self) -> None:
        position = self._checkpoint.position
        while self._claimed_positions and (oldest := next(iter(self._claimed_positions.items())))[1] <= position:
            del self._claimed_positions[oldest[0]]
        self._paused = {batch_id: at for batch_id, at in self._paused.items() if at > position}
        self._query_visible_changes()

    def _query_visible_changes(self) -> None:
        """Query again if the views may show changes that the last query has not seen."""
        has_changes = self._last_change_position > self._queried_position
        if has_changes and (self._checkpoint.position >= self._first_change_position or self.is_exhausted):
            self._rows_expire_at = min(self._rows_expire_at, time.monotonic() + _CHANGED_ROWS_TTL_SECONDS)
            self.request_query()

    # Candidates ---------------------------------------------------------------------------------------------------

    async def take_candidates(self) -> list[ClaimCandidate]:
        """Return as many jobs to claim as slots are free; none if there are no candidates.

        Raises:
            LedgerUnavailable: The database failed. There may be more candidates.
        """
        free_slots = {name: free for name in self._job_types if (free := self._free_slots(name)) > 0}
        if not free_slots:
            return []
        if self._new_jobs:
            new_jobs = deque(self._new_jobs.values())
            self._new_jobs.clear()
            taken = self._take_fitting(free_slots, new_jobs)
            for candidate in new_jobs:  # their rows represent them, now or when the views have reached them
                self._query_when_views_reach(candidate.stream_state.head.position)
                self.request_query()
            return taken
        if (
            not self._rows
            or time.monotonic() > self._rows_expire_at
            or self._rows_workers != frozenset(self._eligible_workers())
        ):
            if not self._may_have_more:
                return []
            await self._query_queue(free_slots)
        had_rows = bool(self._rows)
        candidates = await self._take_rows(free_slots)
        if not candidates and self._rows:  # all of them are of types without free slots, and hide rows of others
            await self._query_queue(free_slots)
            candidates = await self._take_rows(free_slots)
        if not candidates and had_rows and not self._rows and self._may_have_more:
            self.wake()  # others have claimed the rows, and the next query excludes these jobs
        return candidates

    async def _take_rows(self, free_slots: Mapping[str, int]) -> list[ClaimCandidate]:
        while rows := self._take_fitting(dict(free_slots), self._rows):
            if candidates := await self._load(rows):
                return self._drop_surplus(candidates)
        return []

    def _drop_surplus(self, candidates: list[ClaimCandidate]) -> list[ClaimCandidate]:
        """Leave out jobs whose slots were taken while their streams were loaded. Their rows are read again."""
        surplus = deque(candidates)
        fitting = self._take_fitting({name: self._free_slots(name) for name in self._job_types}, surplus)
        if surplus:
            self._rows.clear()
            self.request_query()
        return fitting

    def _take_fitting(self, free_slots: dict[str, int], candidates: deque[_CandidateOrRow]) -> list[_CandidateOrRow]:
        """Take jobs from the deque for which slots are free. The others stay."""
        max_jobs = max(free_slots.values())
        taken: list[_CandidateOrRow] = []
        remaining: list[_CandidateOrRow] = []
        while candidates and len(taken) < max_jobs:
            candidate = candidates.popleft()
            if self._is_excluded(candidate):
                continue
            if free_slots.get(candidate.job_type, 0) > 0:
                free_slots[candidate.job_type] -= 1
                taken.append(candidate)
            else:
                remaining.append(candidate)
        candidates.extendleft(reversed(remaining))
        return taken

    def _is_excluded(self, job: ClaimCandidate | queue.QueueRow) -> bool:
        job_id = job.job_id
        return (
            job_id in self._claimed_positions
            or job_id in self._skipped
            or job_id in self.pending_claims
            or job_id in self.excluded_job_ids
            or job.batch_id in self._paused
        )

    async def _load(self, rows: Sequence[queue.QueueRow]) -> list[ClaimCandidate]:
        """Load the streams of these rows. Leave out jobs that were claimed since the query."""
        missing = [row.job_id for row in rows if row.job_id not in self._loaded_states]
        if missing:  # also load some of the next rows
            ahead = islice(self._rows, max(self._slots, _MIN_ROWS_AHEAD))
            missing += [row.job_id for row in ahead if row.job_id not in self._loaded_states]
            claimed = self._claimed_during_load = set()
            try:
                self._loaded_states |= await load_stream_states(self._event_store, missing)
            except LedgerUnavailable:
                self._rows.extendleft(reversed(rows))
                raise
            finally:
                self._claimed_during_load = None
            rows = [row for row in rows if row.job_id not in claimed]
        candidates: list[ClaimCandidate] = []
        for row in rows:
            state = self._loaded_states.pop(row.job_id)
            if not isinstance(state, StreamState) or not isinstance(state.aggregate, Job):
                self.skip(row.job_id)
            elif state.aggregate.status != "pending" and state.head.position > self._checkpoint.position:
                self.mark_claimed(row.job_id, state.head.position)
            elif not self._is_excluded(row):
                candidates.append(ClaimCandidate(row.job_id, state, row.job_type, row.batch_id, "queue"))
        return candidates

    async def _query_queue(self, free_slots: Mapping[str, int]) -> None:
        """Read rows of the queue, and choose those that this worker may try now."""
        self._rows.clear()
        self._loaded_states.clear()
        position, change_count = self._checkpoint.position, self._change_count
        workers = self._rows_workers = frozenset(self._eligible_workers())
        now = await self._event_store.read_server_time()
        rows = await self._find_rows(free_slots.keys(), sorted(workers), now)
        self._queried_position = max(self._queried_position, position)
        self._first_change_position = max(self._first_change_position, position + 1)
        self._rows.extend(self._filter_by_rank(rows, workers, position))
        if not rows:
            self._wake_at(await queue.get_next_due_at(self._checkpoint.views, now=now))
            # There may be more jobs of types without free slots, or jobs that came during the query.
            self._is_rest_of_full_types = self._change_count == change_count
            self._may_have_more = len(free_slots) < len(self._job_types) or self._change_count != change_count
            if self._checkpoint.position > position:  # the views advanced when the result was not known yet
                self._query_visible_changes()
        else:
            self._is_rest_of_full_types = False
            if not self._rows:
                self._set_timer(_DEFER_SECONDS, self._query_deferred_rows, min(self._deferrals.values()))
        is_changed = self._change_count != change_count
        self._rows_expire_at = time.monotonic() + (_CHANGED_ROWS_TTL_SECONDS if is_changed else _ROWS_TTL_SECONDS)

    async def _find_rows(
        self, job_types: Collection[str], workers: Sequence[str], now: datetime
    ) -> Sequence[queue.QueueRow]:
        """Return the most urgent rows, and of the next ones those for which this worker ranks first.

        If all workers read the rows of all, each row would be read once by each worker.
        """
        find_rows = partial(
            queue.find_rows,
            self._checkpoint.views,
            job_types=job_types,
            # Rows that would take the place of others. The views may still show running jobs as pending.
            excluded_job_ids=[
                *self._claimed_positions,
                *self._skipped,
                *self.pending_claims,
                *self.excluded_job_ids,
            ],
            excluded_batch_ids=list(self._paused),
            now=now,
        )
        if len(workers) < 2 or self.worker_id not in workers:
            return await find_rows(limit=_MAX_ROWS)
        rows = await find_rows(limit=_MAX_SHARED_ROWS)
        if len(rows) < _MAX_SHARED_ROWS:
            return rows
        own = await find_rows(limit=_MAX_ROWS, share=queue.Share(len(workers), workers.index(self.worker_id)))
        if len(own) < _MAX_SHARED_ROWS:
            rows = await find_rows(limit=_MAX_ROWS)
        # Before a less urgent row, there may be more urgent ones of other workers that were not read.
        own = [row for row in own if not rows or row.priority >= rows[-1].priority]
        by_id = {row.job_id: row for row in (*rows, *own)}  # a job may have changed between the two queries
        return sorted(by_id.values(), key=queue.get_urgency)

    def _filter_by_rank(
        self, rows: Sequence[queue.QueueRow], workers: Collection[str], views_position: int
    ) -> list[queue.QueueRow]:
        """Defer rows to higher-ranked workers that are claiming, and with them all less urgent rows.

        While the views are behind, most jobs of others that they show as pending are claimed. So a row is also deferred
        until the views show what was in the log when it was first deferred. The time of each row starts with its first
        query, whatever waits before it.
        """
        now, deferrals = time.monotonic(), self._deferrals
        self._deferrals = {}
        self._claimed_at = {worker: at for worker, at in self._claimed_at.items() if worker in workers}
        claiming_workers = [worker for worker, at in self._claimed_at.items() if now - at < _CLAIMING_SECONDS]
        ranked_workers = sorted(workers)
        eligible: list[queue.QueueRow] = []
        deferred_priority: int | None = None
        for row in rows:
            is_too_early = deferred_priority is not None and row.priority < deferred_priority
            higher_ranked = list_higher_ranked(self.worker_id, ranked_workers, row.job_id)
            if higher_ranked:
                deferral = self._deferrals[row.job_id] = deferrals.get(row.job_id) or _Deferral(now, self._log_position)
                waited = now - deferral.at
                if (
                    waited < _DEFER_SECONDS
                    or (views_position < deferral.log_position and waited < _MAX_OUTDATED_SECONDS)
                    or any(worker in claiming_workers for worker in higher_ranked)
                ):
                    deferred_priority = row.priority if deferred_priority is None else deferred_priority
                    continue
            if not is_too_early:
                eligible.append(row)
        return eligible

    def _query_deferred_rows(self, first: _Deferral) -> None:
        """Query when the first of the deferred rows may be tried. An earlier query would find the same."""
        if (
            self._checkpoint.position >= first.log_position
            or time.monotonic() - first.at >= _MAX_OUTDATED_SECONDS
            or self._rows_workers != frozenset(self._eligible_workers())
        ):
            self.request_query()
        else:
            self._set_timer(_DEFER_SECONDS, self._query_deferred_rows, first)

    def request_query(self) -> None:
        """Query the queue again: there may be more jobs."""
        self._change_count += 1
        self._may_have_more = True
        self._is_rest_of_full_types = False
        self.wake()

    def _wake_at(self, due: datetime | None) -> None:
        """Query again at a time of the server's clock. The clock is read again then: it may have been corrected."""
        if due is not None:
            self._set_timer(self._event_store.clock.compute_sleep_seconds(due), self._when_due, due)
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _when_due(self, due: datetime) -> None:
        if self._event_store.clock.is_uncertain or self._event_store.clock.compute_seconds_until(due) == 0:
            self.request_query()
        else:
            self._wake_at(due)

    def _set_timer(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, call, *arguments)
