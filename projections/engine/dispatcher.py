"""Submit single jobs, and claim each for a free worker in the same insert if possible.

The worker starts such a job as soon as it receives both events. Otherwise, it would receive the submission, append a
claim and wait for the write. A choice is only a hint, and may be outdated: the worker releases a job that it cannot
start, and the lease reaper frees the jobs of a worker that has died.

A job is left to the queue, as if there were no dispatcher, if

* another job became claimable within the last second and no claim of it was observed: then the workers decide, by
  priority and age;
* it belongs to a batch, because batches can be paused, or it is due later;
* it has only one attempt, which it would lose if the worker has just died;
* no worker with a free slot accepts jobs of its type. A worker says so in its lease document: it accepts no types that
  it limits, and none at all while it is unhealthy, stopping, or has not emptied the queue.

The running jobs of each worker are counted from the events, and from the views when the change stream is opened.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.commands import SubmitJob
from jobledger.ledger.domain.errors import CommandRejected, InvalidEvent, LedgerBusy
from jobledger.ledger.domain.events import EventMetadata, JobClaimed, JobSubmitted, RecordedEvent
from jobledger.ledger.mongo.connection import Database, Document, translate_errors
from jobledger.ledger.mongo.lease import MISSED_HEARTBEAT_SHARE, WORKERS_COLLECTION
from jobledger.ledger.store.change_stream import CallbackListener, ChangeStream
from jobledger.ledger.store.command_handler import create_claimed_job, create_streams
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import CheckpointFollower
from jobledger.projections.engine.view_registry import PROJECTION_VERSION
from jobledger.projections.views import job_list, queue

_log = structlog.get_logger()
DISPATCH_VERSION: Final = f"{PROJECTION_VERSION}.{JobSubmitted.schema_version}.{JobClaimed.schema_version}"
"""Processes of other versions may be unable to read a job that is submitted here, or the views."""
_LEASE_FIELDS: Final = ("slots", "accepted_job_types", "dispatch_version", "seconds", "released")
_ENDS_OF_ATTEMPTS: Final = frozenset(
    {"JobCompleted", "JobFailed", "JobCancelled", "JobAttemptFailed", "JobLeaseExpired", "JobReleased"}
)
_CLAIMABLE_AGAIN: Final = frozenset({"JobLeaseExpired", "JobReleased", "JobRestarted", "JobUpdated"})
_NO_LONGER_CLAIMABLE: Final = frozenset({"JobClaimed", "JobCompleted", "JobFailed", "JobCancelled", "JobDeleted"})
_WAITING_SECONDS: Final = 1.0
"""How long a job that nobody claims keeps others from being dispatched. Workers with a backlog refuse jobs by then."""
_MAX_WAITING: Final = 1000
_MAX_ENDED_WHILE_LOADING: Final = 10_000
_DISPATCH_SECONDS: Final = 2.0
"""How long a dispatched job takes a slot if its claim is not observed: it was not written."""
_RETRY_SECONDS: Final = 1.0
_NOT_WRITTEN: Final = (CommandRejected, InvalidEvent, LedgerBusy)
"""After these errors, nothing of a submission was written, by this request or another one."""


@dataclass(slots=True)
class _WorkerLease:
    slots: int = 0
    accepted_job_types: Collection[str] = ()
    dispatch_version: str = ""
    seconds: float = 0.0
    released: bool = False
    extended_at: float = -math.inf
    """When this process observed its last extension, on the monotonic clock."""

    def update(self, fields: Mapping[str, Any]) -> None:
        for name in _LEASE_FIELDS:
            if name in fields:
                setattr(self, name, fields[name])

    def accepts(self, job_type: str) -> bool:
        is_alive = time.monotonic() - self.extended_at < MISSED_HEARTBEAT_SHARE * self.seconds
        is_usable = is_alive and not self.released and self.dispatch_version == DISPATCH_VERSION
        return is_usable and job_type in self.accepted_job_types


class Dispatcher:
    """Chooses workers for new jobs. Needs a change stream that delivers all events."""

    def __init__(
        self, db: Database, event_store: EventStore, checkpoint: CheckpointFollower, change_stream: ChangeStream
    ) -> None:
        self._db = db
        self._event_store = event_store
        self._checkpoint = checkpoint
        self._leases: dict[str, _WorkerLease] = {}
        self._running: dict[str, str] = {}
        """The worker of each running job."""
        self._running_counts: Counter[str] = Counter()
        self._ended_while_loading: set[str] | None = set()
        """Jobs whose attempts have ended since the change stream was opened; None when the running jobs are known."""
        self._last_position = 0
        """The largest position of an event that was observed."""
        self._dispatched: dict[str, tuple[str, float]] = {}
        """Worker and time of the jobs that were dispatched here and whose claims have not been observed."""
        self._waiting: dict[str, float] = {}
        """The times at which jobs became claimable, on the monotonic clock, oldest first."""
        self._no_dispatch_until = 0.0
        """Until when nothing is dispatched, on the monotonic clock."""
        self._loading: asyncio.Task[None] | None = None
        change_stream.add_listener(CallbackListener(WORKERS_COLLECTION, self._on_lease_change, self._resync))
        change_stream.add_listener(CallbackListener("events", self._on_event, _ignore_resync))

    async def submit_job(self, job_id: str, command: SubmitJob, *, meta: EventMetadata) -> RecordedEvent:
        """Begin the stream of a job, and claim it for a free worker if possible. Return the first event.

        Raises:
            VersionConflict: The stream already exists.
            CommandRejected, InvalidEvent, LedgerBusy, LedgerUnavailable: As `create_streams`.
        """
        if (worker_id := self.choose_worker(job_id, command.job)) is None:
            with self.expect_jobs({job_id: command.job}):
                return (await create_streams(self._event_store, [(job_id, command)], meta=meta))[0]
        try:
            return await create_claimed_job(self._event_store, job_id, command, worker_id, meta=meta)
        except _NOT_WRITTEN:
            self._dispatched.pop(job_id, None)
            raise

    def choose_worker(self, job_id: str, job: JobSubmitted) -> str | None:
        """Return the worker to claim a new job for, and count the job as one of its jobs. None: no worker.

        Call it directly before the job is submitted.
        """
        now = time.monotonic()
        self._remove_old_entries(now)
        if (
            self._ended_while_loading is not None
            or self._checkpoint.version != PROJECTION_VERSION
            or self._waiting
            or now < self._no_dispatch_until
            or not _may_dispatch(job)
        ):
            return None
        used = self._running_counts + Counter(worker for worker, _ in self._dispatched.values())
        free = {
            worker_id: lease.slots - used[worker_id]
            for worker_id, lease in self._leases.items()
            if lease.slots > used[worker_id] and lease.accepts(job.job_type)
        }
        if not free:
            return None
        most = max(free.values())
        best = sorted(worker_id for worker_id, slots in free.items() if slots == most)
        worker_id = best[queue.compute_hash(job_id) % len(best)]
        self._dispatched[job_id] = worker_id, now
        return worker_id

    @contextmanager
    def expect_jobs(self, jobs: Mapping[str, JobSubmitted]) -> Iterator[None]:
        """Dispatch nothing before these jobs, by ID, which are submitted without a claim in the block."""
        due = [job_id for job_id, job in jobs.items() if job.not_before is None]
        for job_id in due:
            self._add_waiting(job_id)
        try:
            yield
        except _NOT_WRITTEN:
            for job_id in due:
                self._waiting.pop(job_id, None)
            raise

    def close(self) -> None:
        """Stop loading the running jobs."""
        if self._loading is not None:
            self._loading.cancel()

    def _remove_old_entries(self, now: float) -> None:
        while self._waiting and now - next(iter(self._waiting.values())) > _WAITING_SECONDS:
            del self._waiting[next(iter(self._waiting))]
        while self._dispatched and now - next(iter(self._dispatched.values()))[1] > _DISPATCH_SECONDS:
            del self._dispatched[next(iter(self._dispatched))]

    # Leases -------------------------------------------------------------------------------------------------------

    async def _resync(self, session: AsyncClientSession) -> None:
        self._running.clear()
        self._running_counts.clear()
        with translate_errors("reading the leases of workers"):
            leases = await self._db[WORKERS_COLLECTION].find({}, session=session).to_list()
        self._leases = {lease["_id"]: _WorkerLease() for lease in leases}
        for lease in leases:
            self._leases[lease["_id"]].update(lease)
        self._start_loading(await self._event_store.read_head_position(session))

    def _on_lease_change(self, change: Mapping[str, Any]) -> None:
        worker_id = change["documentKey"]["_id"]
        if change["operationType"] == "delete":
            self._leases.pop(worker_id, None)
            return
        fields = change.get("fullDocument") or change.get("updateDescription", {}).get("updatedFields", {})
        lease = self._leases.setdefault(worker_id, _WorkerLease())
        lease.update(fields)
        if "heartbeat" in fields:
            lease.extended_at = time.monotonic()

    # Running and waiting jobs -------------------------------------------------------------------------------------

    def _start_loading(self, head: int) -> None:
        self.close()
        self._ended_while_loading = set()
        self._loading = asyncio.create_task(self._load_running(head), name="load-running-jobs")

    async def _load_running(self, head: int) -> None:
        """Load the running jobs when the views have reached this head of the log. Later events are observed."""
        await self._checkpoint.wait_for_position(head)
        jobs = await self._find_running()
        ended, self._ended_while_loading = self._ended_while_loading or set(), None
        for job in jobs:
            if job["_id"] not in ended and job["_id"] not in self._running:
                self._add_running(job["_id"], job["worker_id"])

    async def _find_running(self) -> Sequence[Document]:
        while True:
            try:
                return await job_list.find_running_jobs(self._checkpoint.views)
            except Exception as error:  # noqa: BLE001 - nothing would be dispatched any more
                _log.warning("cannot count the jobs of workers yet", error=repr(error))
            await asyncio.sleep(_RETRY_SECONDS)

    def _on_event(self, change: Mapping[str, Any]) -> None:
        if change["operationType"] != "insert":
            return
        document: Document = change["fullDocument"]
        self._last_position = max(self._last_position, document["_id"])
        stream, event_type = document["stream"], document["type"]
        if event_type == "JobClaimed":
            self._dispatched.pop(stream, None)
            self._add_running(stream, document["data"]["worker_id"])
            if self._ended_while_loading is not None:
                self._ended_while_loading.discard(stream)
        elif event_type in _ENDS_OF_ATTEMPTS:
            self._remove_running(stream)
            if self._ended_while_loading is not None:
                self._ended_while_loading.add(stream)
                if len(self._ended_while_loading) > _MAX_ENDED_WHILE_LOADING:  # the views are far behind
                    self._start_loading(self._last_position)
        if event_type in _NO_LONGER_CLAIMABLE:
            self._waiting.pop(stream, None)
        elif event_type in _CLAIMABLE_AGAIN or (event_type == "JobSubmitted" and "not_before" not in document["data"]):
            self._add_waiting(stream)
        elif event_type == "BatchResumed":
            self._no_dispatch_until = time.monotonic() + _WAITING_SECONDS

    def _add_waiting(self, job_id: str) -> None:
        now = time.monotonic()
        self._waiting.pop(job_id, None)  # keeps the dictionary ordered by time
        self._waiting[job_id] = now
        if len(self._waiting) > _MAX_WAITING:
            self._waiting.clear()
            self._no_dispatch_until = now + _WAITING_SECONDS

    def _add_running(self, job_id: str, worker_id: str) -> None:
        self._remove_running(job_id)
        self._running[job_id] = worker_id
        self._running_counts[worker_id] += 1

    def _remove_running(self, job_id: str) -> None:
        if (worker_id := self._running.pop(job_id, None)) is not None:
            self._running_counts[worker_id] -= 1
            if not self._running_counts[worker_id]:
                del self._running_counts[worker_id]


def _may_dispatch(job: JobSubmitted) -> bool:
    return job.batch_id is None and job.not_before is None and job.max_attempts > 1


async def _ignore_resync(_session: AsyncClientSession) -> None:
    """The listener of the lease documents resyncs both."""
