"""workers: which waiting jobs a worker tries to claim next. Hints only: the claiming append decides.

An idle worker takes a fresh job from its own event, without any query. With a backlog, rows are taken from the view
`queue`, by priority, then age, many at a time. Why no job waits for ever: whatever makes a job claimable is an event,
and once the views have reached it, its row can be read; that is when we look. A due time sets a timer, and so does a
job that was left to somebody else.

Many workers keep out of each other's way by ranking themselves for each job, by a hash of both names. The first in
rank tries at once; the others give it a moment for each rank, and give up when they hear of its claim. So a job is
claimed once by one append as a rule, and a first that is busy costs it milliseconds. A more urgent job is never passed
over for a less urgent one; among equally urgent ones, those of a look may change places.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar
from zlib import crc32

from jobledger.ledger.domain.errors import LedgerUnavailable, UnreadableEvent
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.domain.job import Job
from jobledger.ledger.store.command_handler import StreamState, load_stream_states
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import Checkpoint
from jobledger.projections.views import queue

CLAIMABLE_EVENT_TYPES: Final = frozenset(
    {"JobSubmitted", "JobAttemptFailed", "JobLeaseExpired", "JobReleased", "JobRestarted", "JobUpdated"}
    | {"BatchResumed", "BatchDeleted"}
)
"""The types of events after which a job may be claimable that was not before."""
CLAIMER_EVENT_TYPES: Final = CLAIMABLE_EVENT_TYPES | {"JobClaimed", "BatchPaused"}
_RANK_SECONDS: Final = 0.01
_MAX_RANK_SECONDS: Final = 0.25
"""How long a moment is: longer than a claim takes to be heard of, which each worker sees for itself, within bounds."""
_MAX_RANKS: Final = 5  # who comes later does not wait longer
_DEFER_SECONDS: Final = 0.25
"""So long a job in the queue is left to those who come first, and longer while any of them is claiming."""
_CLAIMING_SECONDS: Final = 1.0
"""Who has claimed something within this time may have a hundred jobs at hand and not yet have come to this one: on a
busy machine a third of a second passes between a worker's claims, and each of those taken from it is a lost race."""
_CLOCK_RETRY_SECONDS: Final = 0.1
_ROWS: Final = 500
_MAX_ROWS: Final = 2000
"""How many rows are read at once, for each worker; their streams are loaded when they are taken. Few large looks: each
passes over the rows that were deleted lately, which the database keeps for a while where the oldest jobs stand."""
_ROWS_TTL_SECONDS: Final = 2.0
_CHANGED_ROWS_TTL_SECONDS: Final = 0.1
"""After so long the rows of a look are forgotten; sooner if something has come since, which may be more urgent; and at
once if a worker has come or gone, for that changes the ranks."""


def list_higher_ranked(worker_id: str, workers: Collection[str], job_id: str) -> list[str]:
    """Return the workers that come before this one for a job, in any order. Every worker finds the same ranks."""
    seed = crc32(job_id.encode())
    mine = crc32(worker_id.encode(), seed)
    return [other for other in workers if crc32(other.encode(), seed) > mine]


class ClaimDelay:
    """How long to leave a fresh job to those who come before us: half as long again as their claims took lately."""

    def __init__(self) -> None:
        self.seconds = _RANK_SECONDS
        self._since: dict[str, tuple[float, str]] = {}

    def start_timing(self, job_id: str, first: str) -> None:
        """We have heard of a job, and leave it to `first`."""
        if len(self._since) >= _ROWS:  # never claimed, or by others
            self._since.clear()
        self._since[job_id] = time.monotonic(), first

    def record_claim(self, job_id: str, worker_id: str) -> None:
        """The job was claimed: if by whom it was left to, that took as long as claims take now."""
        since, first = self._since.pop(job_id, (0.0, ""))
        if worker_id == first:
            took = 1.5 * (time.monotonic() - since)
            # Longer ones count at once, and are forgotten slowly: a claim too many costs more than a moment.
            self.seconds = min(max(took, 0.95 * self.seconds, _RANK_SECONDS), _MAX_RANK_SECONDS)


class ClaimCandidate(NamedTuple):
    """A job that waits, as far as it is known."""

    job_id: str
    stream_state: StreamState
    job_type: str
    batch_id: str | None


_Job = TypeVar("_Job", ClaimCandidate, queue.QueueEntry)


class ClaimQueue:
    """What one worker knows of jobs that wait.

    `slots` is how many jobs may be run, `room` how many more of a type now; `alive` are the workers, `claiming` the
    jobs that we are about to claim; `wake` is called when there may be something to take.
    """

    def __init__(
        self,
        log: EventStore,
        checkpoint: Checkpoint,
        *,
        job_types: Collection[str],
        slots: int,
        eligible_workers: Callable[[], Collection[str]],
        free_slots: Callable[[str], int],
        pending_claims: Callable[[], Collection[str]],
        wake: Callable[[], None],
    ) -> None:
        self._log = log
        self._checkpoint = checkpoint
        self._job_types = job_types
        self._slots = slots
        self._alive = eligible_workers
        self._room = free_slots
        self._claiming = pending_claims
        self._wake = wake
        self.worker_id = ""
        self._fresh: dict[str, ClaimCandidate] = {}
        self._delayed: dict[str, asyncio.TimerHandle] = {}
        self._claim_delay = ClaimDelay()
        self._rows: deque[queue.QueueEntry] = deque()
        self._loaded_states: dict[str, StreamState | UnreadableEvent] = {}
        self._rows_expire_at = 0.0
        self._rows_workers: frozenset[str] = frozenset()
        self._may_have_more = True
        self._change_count = 0
        self._relevant_position = 0
        self._queried_position = 0
        self._claimed_positions: dict[str, int] = {}
        self._skipped: set[str] = set()
        self._paused: dict[str, int] = {}
        self._deferred_since: dict[str, float] = {}
        self._claimed_at: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._clock_retry_timer: asyncio.TimerHandle | None = None
        checkpoint.add_listener(self._on_views_advanced)

    def close(self) -> None:
        """Set no more timers."""
        for timer in (self._timer, self._clock_retry_timer, *self._delayed.values()):
            if timer is not None:
                timer.cancel()

    # Hearing ------------------------------------------------------------------------------------------------------

    def resync(self, head: int) -> None:
        """Something up to `head` may have been missed: look at the queue now, and when the views have got there."""
        self._skipped.clear()
        self._rows.clear()
        self._relevant_position = max(self._relevant_position, head)
        self._request_query()

    def handle_event(self, document: Mapping[str, Any]) -> None:
        """An event was written."""
        stream, kind = document["stream"], document["type"]
        if kind == "JobClaimed":
            self._claimed_at[document["data"]["worker_id"]] = time.monotonic()
            self._claim_delay.record_claim(stream, document["data"]["worker_id"])
            self.mark_claimed(stream, document["_id"])
        elif kind == "BatchPaused":  # rows of its jobs may be at hand, and in the queue until the views have got here
            self._paused[stream] = document["_id"]
            self._relevant_position = max(self._relevant_position, document["_id"])
        elif kind in CLAIMABLE_EVENT_TYPES:
            self._skipped.discard(stream)
            self._claimed_positions.pop(stream, None)
            self._paused.pop(stream, None)
            if kind != "JobSubmitted" or not self._try_fresh(document):
                self._relevant_position = max(self._relevant_position, document["_id"])

    def mark_claimed(self, job_id: str, position: int) -> None:
        """The job is somebody's since `position`; its row is in the way until the views have got there."""
        self._fresh.pop(job_id, None)
        if (timer := self._delayed.pop(job_id, None)) is not None:
            timer.cancel()
        self._claimed_positions.pop(job_id, None)  # so that the dictionary stays in the order of positions
        if position > self._checkpoint.position:
            self._claimed_positions[job_id] = position

    async def handle_rejection(self, job_id: str) -> None:
        """The rules say that it cannot be claimed now. The views will say so too, or are wrong, and we leave it."""
        head = await self._log.head_position()
        if head > self._checkpoint.position:
            self.mark_claimed(job_id, head)
        else:
            self.skip(job_id)

    def handle_not_due(self) -> None:
        """A job was claimed too early: our clock was corrected since we looked. We look again.

        This has a timer of its own, because a look that is on its way may replace the other one.
        """
        if self._clock_retry_timer is not None:
            self._clock_retry_timer.cancel()
        self._clock_retry_timer = asyncio.get_running_loop().call_later(_CLOCK_RETRY_SECONDS, self._request_query)

    def skip(self, job_id: str) -> None:
        """Try no more to claim this job before something is heard of it."""
        self._skipped.add(job_id)

    def _try_fresh(self, document: Mapping[str, Any]) -> bool:
        """Keep a fresh job if a slot is free and nothing waits before it; else its row in `queue` stands for it."""
        job_id, job_type = document["stream"], document["data"]["job_type"]
        if job_type not in self._job_types:
            return True  # nothing to us, now or later
        kept = len(self._fresh) + len(self._delayed)
        if "not_before" in document["data"] or self._may_have_more or kept >= self._room(job_type):
            return False
        try:
            known = StreamState().apply([RecordedEvent(document)])
            waiting = ClaimCandidate(job_id, known, job_type, document["data"].get("batch_id"))
        except UnreadableEvent:  # left to workers of the version that has written it
            return False
        others = list_higher_ranked(self.worker_id, self._alive(), job_id)
        if not others:
            self._add_fresh(waiting, document["_id"])
        else:
            self._claim_delay.start_timing(
                job_id, next(other for other in others if not list_higher_ranked(other, others, job_id))
            )
            loop, pause = asyncio.get_running_loop(), min(len(others), _MAX_RANKS) * self._claim_delay.seconds
            self._delayed[job_id] = loop.call_later(pause, self._add_fresh, waiting, document["_id"])
        return True

    def _add_fresh(self, waiting: ClaimCandidate, position: int) -> None:
        self._delayed.pop(waiting.job_id, None)
        if self._may_have_more:  # others wait before it by now: its row stands for it
            self._relevant_position = max(self._relevant_position, position)
        else:
            self._fresh[waiting.job_id] = waiting
        self._wake()

    def _on_views_advanced(self) -> None:
        position = self._checkpoint.position
        while self._claimed_positions and (oldest := next(iter(self._claimed_positions.items())))[1] <= position:
            del self._claimed_positions[oldest[0]]
        self._paused = {batch_id: at for batch_id, at in self._paused.items() if at > position}
        if self._relevant_position > self._queried_position:
            self._rows_expire_at = min(self._rows_expire_at, time.monotonic() + _CHANGED_ROWS_TTL_SECONDS)
            self._request_query()

    # Taking -------------------------------------------------------------------------------------------------------

    async def take_candidates(self) -> list[ClaimCandidate]:
        """Return jobs to claim now, as many as there is room for; none if there is nothing to try.

        Raises:
            LedgerUnavailable: the database failed; there may be more.
        """
        room = {job_type: room for job_type in self._job_types if (room := self._room(job_type)) > 0}
        if not room:
            return []
        if self._fresh:
            fresh = deque(self._fresh.values())
            self._fresh.clear()
            taken = self._take_fitting(room, fresh)
            for left in fresh:  # their rows stand for them, now or when the views have got there
                self._relevant_position = max(self._relevant_position, left.stream_state.head.position)
                self._request_query()
            return taken
        if not self._rows or time.monotonic() > self._rows_expire_at or self._rows_workers != frozenset(self._alive()):
            if not self._may_have_more:
                return []
            await self._query_queue(room)
        while rows := self._take_fitting(dict(room), self._rows):
            if waiting := await self._load(rows):
                return waiting
        return []

    def _take_fitting(self, room: dict[str, int], waiting: deque[_Job]) -> list[_Job]:
        """Take from the jobs that wait what there is room for; what there is none for stays."""
        most = max(room.values())
        taken: list[_Job] = []
        stay: list[_Job] = []
        while waiting and len(taken) < most:
            job = waiting.popleft()
            if self._is_excluded(job):
                continue
            if room.get(job.job_type, 0) > 0:
                room[job.job_type] -= 1
                taken.append(job)
            else:
                stay.append(job)
        waiting.extendleft(reversed(stay))
        return taken

    def _is_excluded(self, job: ClaimCandidate | queue.QueueEntry) -> bool:
        job_id = job.job_id
        return (
            job_id in self._claimed_positions
            or job_id in self._skipped
            or job_id in self._claiming()
            or job.batch_id in self._paused
        )

    async def _load(self, rows: Sequence[queue.QueueEntry]) -> list[ClaimCandidate]:
        """Return what is known of the jobs of these rows, without those that were taken meanwhile."""
        wanted = [row.job_id for row in rows if row.job_id not in self._loaded_states]
        if wanted:  # and some of those that will be next
            wanted += [row.job_id for row in islice(self._rows, self._slots) if row.job_id not in self._loaded_states]
            try:
                self._loaded_states |= await load_stream_states(self._log, wanted)
            except LedgerUnavailable:
                self._rows.extendleft(reversed(rows))
                raise
        waiting: list[ClaimCandidate] = []
        for row in rows:
            known = self._loaded_states.pop(row.job_id)
            if not isinstance(known, StreamState) or not isinstance(known.state, Job):
                self.skip(row.job_id)
            elif not self._is_excluded(row):
                waiting.append(ClaimCandidate(row.job_id, known, row.job_type, row.batch_id))
        return waiting

    async def _query_queue(self, room: Mapping[str, int]) -> None:
        """Read rows of the queue, and choose those that we may try now."""
        self._rows.clear()
        self._loaded_states.clear()
        looked, news = self._checkpoint.position, self._change_count
        workers = self._rows_workers = frozenset(self._alive())
        limit = min(_ROWS * max(1, len(workers)), _MAX_ROWS)
        now = await self._log.server_time()
        # All that may stand in the way of others: of jobs that run, the views may still say that they wait.
        without = [*self._claimed_positions, *self._skipped, *self._claiming()]
        views = self._checkpoint.views
        rows = await queue.find_candidates(views, job_types=room.keys(), excluded_job_ids=without, now=now, limit=limit)
        self._queried_position = max(self._queried_position, looked)
        self._rows.extend(self._filter_by_rank(rows, workers))
        if not rows:
            self._wake_at(await queue.get_next_due_at(views, now=now))
            # Of types that there is no room for there may be more; and what came while we looked we have not seen.
            self._may_have_more = len(room) < len(self._job_types) or self._change_count != news
        elif not self._rows:
            self._wake_in(_DEFER_SECONDS)
        self._rows_expire_at = time.monotonic() + _ROWS_TTL_SECONDS

    def _filter_by_rank(self, rows: Sequence[queue.QueueEntry], workers: Collection[str]) -> list[queue.QueueEntry]:
        """Leave rows to workers that come before us while these are claiming; then everything less urgent, too."""
        now, passed = time.monotonic(), self._deferred_since
        self._deferred_since = {}
        self._claimed_at = {worker: at for worker, at in self._claimed_at.items() if worker in workers}
        claiming = [worker for worker, at in self._claimed_at.items() if now - at < _CLAIMING_SECONDS]
        chosen: list[queue.QueueEntry] = []
        waits: int | None = None
        for row in rows:
            if waits is not None and row.priority < waits:
                break
            first = list_higher_ranked(self.worker_id, workers, row.job_id)
            since = passed.get(row.job_id, now)
            if not first or (now - since >= _DEFER_SECONDS and not any(worker in claiming for worker in first)):
                chosen.append(row)
            else:
                self._deferred_since[row.job_id] = since
                waits = row.priority
        return chosen

    def _request_query(self) -> None:
        self._change_count += 1
        self._may_have_more = True
        self._wake()

    def _wake_at(self, due: datetime | None) -> None:
        """Look again when the server's clock says so. It is asked again and again: a timer may be wrong by then."""
        if due is not None:
            self._set_timer(self._log.clock.sleep_seconds_until(due), self._when_due, due)
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _when_due(self, due: datetime) -> None:
        if self._log.clock.is_uncertain or self._log.clock.seconds_until(due) == 0:
            self._request_query()
        else:
            self._wake_at(due)

    def _wake_in(self, seconds: float) -> None:
        self._set_timer(seconds, self._request_query)

    def _set_timer(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, call, *arguments)
