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
from jobledger.ledger.domain.events import Recorded
from jobledger.ledger.domain.job import Job
from jobledger.ledger.store.command_handler import Known, load_all
from jobledger.ledger.store.event_store import EventLog
from jobledger.projections.engine.checkpoint import Checkpoint
from jobledger.projections.views import queue

CLAIMABLE: Final = frozenset(
    {"JobSubmitted", "JobAttemptFailed", "JobLeaseExpired", "JobReleased", "JobRestarted", "JobUpdated"}
    | {"BatchResumed", "BatchDeleted"}
)
"""The types of events after which a job may be claimable that was not before."""
HEARD: Final = CLAIMABLE | {"JobClaimed", "BatchPaused"}
_RANK_SECONDS: Final = 0.01
_LONGEST_RANK_SECONDS: Final = 0.25
"""How long a moment is: longer than a claim takes to be heard of, which each worker sees for itself, within bounds."""
_RANKS: Final = 5  # who comes later does not wait longer
_PATIENCE_SECONDS: Final = 0.25
"""So long a job in the queue is left to those who come first, and longer while any of them is claiming."""
_CLAIMING_SECONDS: Final = 1.0
"""Who has claimed something within this time may have a hundred jobs at hand and not yet have come to this one: on a
busy machine a third of a second passes between a worker's claims, and each of those taken from it is a lost race."""
_CORRECTED_SECONDS: Final = 0.1
_ROWS: Final = 500
_MOST_ROWS: Final = 2000
"""How many rows are read at once, for each worker; their streams are loaded when they are taken. Few large looks: each
passes over the rows that were deleted lately, which the database keeps for a while where the oldest jobs stand."""
_GOOD_FOR_SECONDS: Final = 2.0
_GOOD_WITH_NEWS_SECONDS: Final = 0.1
"""After so long the rows of a look are forgotten; sooner if something has come since, which may be more urgent; and at
once if a worker has come or gone, for that changes the ranks."""


def before(worker_id: str, workers: Collection[str], job_id: str) -> list[str]:
    """Return the workers that come before this one for a job, in any order. Every worker finds the same ranks."""
    seed = crc32(job_id.encode())
    mine = crc32(worker_id.encode(), seed)
    return [other for other in workers if crc32(other.encode(), seed) > mine]


class Moment:
    """How long to leave a fresh job to those who come before us: half as long again as their claims took lately."""

    def __init__(self) -> None:
        self.seconds = _RANK_SECONDS
        self._since: dict[str, tuple[float, str]] = {}

    def begins(self, job_id: str, first: str) -> None:
        """We have heard of a job, and leave it to `first`."""
        if len(self._since) >= _ROWS:  # never claimed, or by others
            self._since.clear()
        self._since[job_id] = time.monotonic(), first

    def ends(self, job_id: str, worker_id: str) -> None:
        """The job was claimed: if by whom it was left to, that took as long as claims take now."""
        since, first = self._since.pop(job_id, (0.0, ""))
        if worker_id == first:
            took = 1.5 * (time.monotonic() - since)
            # Longer ones count at once, and are forgotten slowly: a claim too many costs more than a moment.
            self.seconds = min(max(took, 0.95 * self.seconds, _RANK_SECONDS), _LONGEST_RANK_SECONDS)


class Waiting(NamedTuple):
    """A job that waits, as far as it is known."""

    job_id: str
    known: Known
    job_type: str
    batch_id: str | None


_Job = TypeVar("_Job", Waiting, queue.Row)


class Claims:
    """What one worker knows of jobs that wait.

    `slots` is how many jobs may be run, `room` how many more of a type now; `alive` are the workers, `claiming` the
    jobs that we are about to claim; `wake` is called when there may be something to take.
    """

    def __init__(
        self,
        log: EventLog,
        checkpoint: Checkpoint,
        *,
        job_types: Collection[str],
        slots: int,
        alive: Callable[[], Collection[str]],
        room: Callable[[str], int],
        claiming: Callable[[], Collection[str]],
        wake: Callable[[], None],
    ) -> None:
        self._log = log
        self._checkpoint = checkpoint
        self._job_types = job_types
        self._slots = slots
        self._alive = alive
        self._room = room
        self._claiming = claiming
        self._wake = wake
        self.worker_id = ""
        self._fresh: dict[str, Waiting] = {}
        self._in_turn: dict[str, asyncio.TimerHandle] = {}
        self._moment = Moment()
        self._rows: deque[queue.Row] = deque()
        self._known: dict[str, Known | UnreadableEvent] = {}
        self._rows_until = 0.0
        self._rows_among: frozenset[str] = frozenset()
        self._more = True
        self._news = 0
        self._heard = 0
        self._looked = 0
        self._taken: dict[str, int] = {}
        self._left: set[str] = set()
        self._paused: dict[str, int] = {}
        self._passed: dict[str, float] = {}
        self._claimed_at: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._corrected: asyncio.TimerHandle | None = None
        checkpoint.on_move(self._views_moved)

    def close(self) -> None:
        """Set no more timers."""
        for timer in (self._timer, self._corrected, *self._in_turn.values()):
            if timer is not None:
                timer.cancel()

    # Hearing ------------------------------------------------------------------------------------------------------

    def resync(self, head: int) -> None:
        """Something up to `head` may have been missed: look at the queue now, and when the views have got there."""
        self._left.clear()
        self._rows.clear()
        self._heard = max(self._heard, head)
        self._look_again()

    def heard(self, document: Mapping[str, Any]) -> None:
        """An event was written."""
        stream, kind = document["stream"], document["type"]
        if kind == "JobClaimed":
            self._claimed_at[document["data"]["worker_id"]] = time.monotonic()
            self._moment.ends(stream, document["data"]["worker_id"])
            self.taken(stream, document["_id"])
        elif kind == "BatchPaused":  # rows of its jobs may be at hand, and in the queue until the views have got here
            self._paused[stream] = document["_id"]
            self._heard = max(self._heard, document["_id"])
        elif kind in CLAIMABLE:
            self._left.discard(stream)
            self._taken.pop(stream, None)
            self._paused.pop(stream, None)
            if kind != "JobSubmitted" or not self._try_fresh(document):
                self._heard = max(self._heard, document["_id"])

    def taken(self, job_id: str, position: int) -> None:
        """The job is somebody's since `position`; its row is in the way until the views have got there."""
        self._fresh.pop(job_id, None)
        if (timer := self._in_turn.pop(job_id, None)) is not None:
            timer.cancel()
        self._taken.pop(job_id, None)  # so that the dictionary stays in the order of positions
        if position > self._checkpoint.position:
            self._taken[job_id] = position

    async def refused(self, job_id: str) -> None:
        """The rules say that it cannot be claimed now. The views will say so too, or are wrong, and we leave it."""
        head = await self._log.head()
        if head > self._checkpoint.position:
            self.taken(job_id, head)
        else:
            self.leave(job_id)

    def not_due(self) -> None:
        """A job was claimed too early: our clock was corrected since we looked. We look again.

        This has a timer of its own, because a look that is on its way may replace the other one.
        """
        if self._corrected is not None:
            self._corrected.cancel()
        self._corrected = asyncio.get_running_loop().call_later(_CORRECTED_SECONDS, self._look_again)

    def leave(self, job_id: str) -> None:
        """Try no more to claim this job before something is heard of it."""
        self._left.add(job_id)

    def _try_fresh(self, document: Mapping[str, Any]) -> bool:
        """Keep a fresh job if a slot is free and nothing waits before it; else its row in `queue` stands for it."""
        job_id, job_type = document["stream"], document["data"]["job_type"]
        if job_type not in self._job_types:
            return True  # nothing to us, now or later
        kept = len(self._fresh) + len(self._in_turn)
        if "not_before" in document["data"] or self._more or kept >= self._room(job_type):
            return False
        try:
            known = Known().after([Recorded(document)])
            waiting = Waiting(job_id, known, job_type, document["data"].get("batch_id"))
        except UnreadableEvent:  # left to workers of the version that has written it
            return False
        others = before(self.worker_id, self._alive(), job_id)
        if not others:
            self._our_turn(waiting, document["_id"])
        else:
            self._moment.begins(job_id, next(other for other in others if not before(other, others, job_id)))
            loop, pause = asyncio.get_running_loop(), min(len(others), _RANKS) * self._moment.seconds
            self._in_turn[job_id] = loop.call_later(pause, self._our_turn, waiting, document["_id"])
        return True

    def _our_turn(self, waiting: Waiting, position: int) -> None:
        self._in_turn.pop(waiting.job_id, None)
        if self._more:  # others wait before it by now: its row stands for it
            self._heard = max(self._heard, position)
        else:
            self._fresh[waiting.job_id] = waiting
        self._wake()

    def _views_moved(self) -> None:
        position = self._checkpoint.position
        while self._taken and (oldest := next(iter(self._taken.items())))[1] <= position:
            del self._taken[oldest[0]]
        self._paused = {batch_id: at for batch_id, at in self._paused.items() if at > position}
        if self._heard > self._looked:
            self._rows_until = min(self._rows_until, time.monotonic() + _GOOD_WITH_NEWS_SECONDS)
            self._look_again()

    # Taking -------------------------------------------------------------------------------------------------------

    async def take(self) -> list[Waiting]:
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
            taken = self._within(room, fresh)
            for left in fresh:  # their rows stand for them, now or when the views have got there
                self._heard = max(self._heard, left.known.head.position)
                self._look_again()
            return taken
        if not self._rows or time.monotonic() > self._rows_until or self._rows_among != frozenset(self._alive()):
            if not self._more:
                return []
            await self._look(room)
        while rows := self._within(dict(room), self._rows):
            if waiting := await self._load(rows):
                return waiting
        return []

    def _within(self, room: dict[str, int], waiting: deque[_Job]) -> list[_Job]:
        """Take from the jobs that wait what there is room for; what there is none for stays."""
        most = max(room.values())
        taken: list[_Job] = []
        stay: list[_Job] = []
        while waiting and len(taken) < most:
            job = waiting.popleft()
            if self._is_not_for_us(job):
                continue
            if room.get(job.job_type, 0) > 0:
                room[job.job_type] -= 1
                taken.append(job)
            else:
                stay.append(job)
        waiting.extendleft(reversed(stay))
        return taken

    def _is_not_for_us(self, job: Waiting | queue.Row) -> bool:
        job_id = job.job_id
        return (
            job_id in self._taken or job_id in self._left or job_id in self._claiming() or job.batch_id in self._paused
        )

    async def _load(self, rows: Sequence[queue.Row]) -> list[Waiting]:
        """Return what is known of the jobs of these rows, without those that were taken meanwhile."""
        wanted = [row.job_id for row in rows if row.job_id not in self._known]
        if wanted:  # and some of those that will be next
            wanted += [row.job_id for row in islice(self._rows, self._slots) if row.job_id not in self._known]
            try:
                self._known |= await load_all(self._log, wanted)
            except LedgerUnavailable:
                self._rows.extendleft(reversed(rows))
                raise
        waiting: list[Waiting] = []
        for row in rows:
            known = self._known.pop(row.job_id)
            if not isinstance(known, Known) or not isinstance(known.state, Job):
                self.leave(row.job_id)
            elif not self._is_not_for_us(row):
                waiting.append(Waiting(row.job_id, known, row.job_type, row.batch_id))
        return waiting

    async def _look(self, room: Mapping[str, int]) -> None:
        """Read rows of the queue, and choose those that we may try now."""
        self._rows.clear()
        self._known.clear()
        looked, news = self._checkpoint.position, self._news
        workers = self._rows_among = frozenset(self._alive())
        limit = min(_ROWS * max(1, len(workers)), _MOST_ROWS)
        now = await self._log.now()
        # All that may stand in the way of others: of jobs that run, the views may still say that they wait.
        without = [*self._taken, *self._left, *self._claiming()]
        views = self._checkpoint.views
        rows = await queue.candidates(views, job_types=room.keys(), without=without, now=now, limit=limit)
        self._looked = max(self._looked, looked)
        self._rows.extend(self._chosen(rows, workers))
        if not rows:
            self._wake_at(await queue.next_due(views, now=now))
            # Of types that there is no room for there may be more; and what came while we looked we have not seen.
            self._more = len(room) < len(self._job_types) or self._news != news
        elif not self._rows:
            self._wake_in(_PATIENCE_SECONDS)
        self._rows_until = time.monotonic() + _GOOD_FOR_SECONDS

    def _chosen(self, rows: Sequence[queue.Row], workers: Collection[str]) -> list[queue.Row]:
        """Leave rows to workers that come before us while these are claiming; then everything less urgent, too."""
        now, passed = time.monotonic(), self._passed
        self._passed = {}
        self._claimed_at = {worker: at for worker, at in self._claimed_at.items() if worker in workers}
        claiming = [worker for worker, at in self._claimed_at.items() if now - at < _CLAIMING_SECONDS]
        chosen: list[queue.Row] = []
        waits: int | None = None
        for row in rows:
            if waits is not None and row.priority < waits:
                break
            first = before(self.worker_id, workers, row.job_id)
            since = passed.get(row.job_id, now)
            if not first or (now - since >= _PATIENCE_SECONDS and not any(worker in claiming for worker in first)):
                chosen.append(row)
            else:
                self._passed[row.job_id] = since
                waits = row.priority
        return chosen

    def _look_again(self) -> None:
        self._news += 1
        self._more = True
        self._wake()

    def _wake_at(self, due: datetime | None) -> None:
        """Look again when the server's clock says so. It is asked again and again: a timer may be wrong by then."""
        if due is not None:
            self._set_timer(self._log.clock.nap_until(due), self._when_due, due)
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _when_due(self, due: datetime) -> None:
        if self._log.clock.is_uncertain or self._log.clock.seconds_until(due) == 0:
            self._look_again()
        else:
            self._wake_at(due)

    def _wake_in(self, seconds: float) -> None:
        self._set_timer(seconds, self._look_again)

    def _set_timer(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, call, *arguments)
