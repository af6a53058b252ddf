"""Jobs that are claimed for a worker when they are submitted: each claim is started once, or released.

The simulation runs `DispatchedClaims` against a log, views and change streams in memory, with their steps in any order.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from datetime import datetime
from functools import partial
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobledger.ledger.domain.commands import CancelJob, ClaimJob, ExpireLease, JobCommand, ReleaseJob, ReportEvent
from jobledger.ledger.domain.errors import VersionConflict
from jobledger.ledger.domain.events import Event, EventMetadata, JobCompleted, RecordedEvent
from jobledger.ledger.domain.job import Job, decide
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import DISPATCH_ACTOR, StreamState
from jobledger.ledger.store.envelope import StreamAppend, build_documents
from jobledger.projections.views import job_list
from jobledger.workers.claims.claimer import ClaimedJob
from jobledger.workers.claims.dispatched_claims import DispatchedClaims
from tests.support.event_examples import NOON, make_results
from tests.support.role_runner import make_echo_job
from tests.support.soak_only import IS_SOAK_RUN

WORKER, OTHER_WORKER = "worker-1", "worker-2"


class Log:
    """The log. Reads take their result when the server executes them, and arrive later."""

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.clock = self
        self.requests: list[tuple[str, asyncio.Future[list[RecordedEvent]]]] = []
        self.responses: list[tuple[list[RecordedEvent], asyncio.Future[list[RecordedEvent]]]] = []
        self._folded: dict[tuple[str, int], StreamState] = {}

    def estimate(self) -> datetime:
        return NOON

    def write(self, stream: str, events: Sequence[Event], actor: str) -> None:
        state = self.fold(stream)
        documents: list[Document] = []
        build_documents(StreamAppend(stream, state.head, events, EventMetadata(actor), NOON), documents)
        for document in documents:
            document["_id"] = len(self.documents) + 1
            self.documents.append(document)

    def handle(self, stream: str, command: JobCommand, actor: str) -> None:
        aggregate = self.fold(stream).aggregate
        assert isinstance(aggregate, Job)
        self.write(stream, decide(command, aggregate), actor)

    def select(self, stream: str) -> list[RecordedEvent]:
        return [RecordedEvent(document) for document in self.documents if document["stream"] == stream]

    def fold(self, stream: str, position: int = 1_000_000) -> StreamState:
        key = stream, min(position, len(self.documents))
        if key not in self._folded:
            events = (event for event in self.select(stream) if event.position <= position)
            self._folded[key] = StreamState().apply(events)
        return self._folded[key]

    # The methods of the event store -------------------------------------------------------------------------------

    async def append(self, append: StreamAppend) -> list[RecordedEvent]:
        if append.head.version != self.fold(append.stream).head.version:
            raise VersionConflict(append.stream, append.head.version, self.fold(append.stream).head.version)
        self.write(append.stream, append.events, append.meta.actor)
        return self.select(append.stream)[-len(append.events) :]

    async def iterate_stream(self, stream: str, *, after_version: int = 0) -> AsyncIterator[RecordedEvent]:
        response: asyncio.Future[list[RecordedEvent]] = asyncio.get_running_loop().create_future()
        self.requests.append((stream, response))
        for event in (await response)[after_version:]:
            yield event


class Simulation:
    """One worker, its change stream and its views."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, max_jobs: int, slots: int, reopenings: int, max_events: int
    ) -> None:
        self.log = Log()
        self.max_jobs = max_jobs
        self.reopenings_left = reopenings
        self.max_events = max_events
        """Number of events after which only the worker itself writes more."""
        self.jobs: list[str] = []
        self.running: list[str] = []
        self.pending_claims: dict[str, int] = {}
        """Jobs that the worker is claiming itself, and the attempts."""
        self.settled = asyncio.Event()
        self.excluded_job_ids: Collection[str] = ()
        self.request_query = lambda: None
        self.started: list[tuple[str, int]] = []
        """Jobs and attempts that the worker has started."""
        self.undelivered: list[Document] = []
        self.new_jobs: dict[str, StreamState] = {}
        self.views = None
        self.views_position = 0
        self.views_changed = asyncio.Event()
        self.worker_id = WORKER
        monkeypatch.setattr(job_list, "find_jobs_of_worker", self.find_jobs_of_worker)
        self.claims = DispatchedClaims(
            cast("Any", self.log),
            cast("Any", self),
            cast("Any", self),
            can_start=lambda _type: len(self.running) < slots,
            is_running=self.running.__contains__,
            wait_until_settled=self.wait_until_settled,
            start_jobs=self.start_jobs,
            on_unreadable=self.fail,
        )
        self.claims.resync(0)

    def start_jobs(self, claimed: Sequence[ClaimedJob]) -> None:
        for job_id, stream_state in claimed:
            job = stream_state.aggregate
            assert isinstance(job, Job)
            assert job.worker_id == WORKER
            assert job.cancel_request is None, "a cancelled job was started"
            self.start(job_id, job.attempt)

    def start(self, job_id: str, attempt: int) -> None:
        assert (job_id, attempt) not in self.started, "an attempt was started twice"
        self.started.append((job_id, attempt))
        self.running.append(job_id)

    def fail(self, error: Exception) -> None:
        raise error

    async def wait_until_settled(self, job_id: str) -> None:
        while job_id in self.pending_claims:
            self.settled.clear()
            await self.settled.wait()

    async def wait_for_position(self, position: int) -> None:
        while self.views_position < position:
            self.views_changed.clear()
            await self.views_changed.wait()

    async def find_jobs_of_worker(self, _views: object, worker_id: str) -> list[Document]:
        return [{"_id": job_id} for job_id in self.jobs if self.has(worker_id, self.fold(job_id, self.views_position))]

    def has(self, worker_id: str, job: Job | None) -> bool:
        return job is not None and job.status == "processing" and job.worker_id == worker_id

    def fold(self, job_id: str, position: int = 1_000_000) -> Job | None:
        job = self.log.fold(job_id, position).aggregate
        assert job is None or isinstance(job, Job)
        return job

    # Steps --------------------------------------------------------------------------------------------------------

    def list_steps(self) -> list[Callable[[], None]]:
        steps: list[Callable[[], None]] = []
        if self.reopenings_left:
            steps += [partial(self.reopen, count) for count in range(3)]
        if len(self.jobs) < self.max_jobs:
            steps += [partial(self.submit, is_dispatched=True), partial(self.submit, is_dispatched=False)]
        for job_id in self.jobs if len(self.log.documents) < self.max_events else ():
            job = self.fold(job_id)
            assert job is not None
            if job.status == "pending":
                steps.append(partial(self.log.handle, job_id, ClaimJob(OTHER_WORKER, NOON), "worker:x"))
            elif self.has(WORKER, job) and job.cancel_request is None:
                steps.append(partial(self.log.handle, job_id, CancelJob("user"), "user"))
            if self.has(OTHER_WORKER, job):
                steps.append(partial(self.log.handle, job_id, ExpireLease(OTHER_WORKER, job.attempt), "worker:x"))
        for job_id in self.jobs:
            job = self.fold(job_id)
            assert job is not None
            is_busy = job_id in self.running or job_id in self.pending_claims or job_id in self.excluded_job_ids
            if not is_busy and (job_id in self.new_jobs or job.status == "pending"):
                steps += [partial(self.begin_claim, job_id, is_row=is_row) for is_row in (True, False)]
        for job_id in self.running:
            job = self.fold(job_id)
            assert job is not None
            steps.append(partial(self.complete, job_id, job.attempt))
        return steps + self.list_steps_to_rest()

    def list_steps_to_rest(self) -> list[Callable[[], None]]:
        """Return the steps that are left if nothing new happens."""
        steps: list[Callable[[], None]] = [
            *(partial(self.execute_read, index) for index in range(len(self.log.requests))),
            *(partial(self.respond, index) for index in range(len(self.log.responses))),
            *(partial(self.end_claim, it, is_first_try=first) for it in self.pending_claims for first in (True, False)),
        ]
        if self.undelivered:
            steps.append(self.deliver)
        if self.views_position < len(self.log.documents):
            steps += [partial(self.advance_views, it) for it in {self.views_position + 1, len(self.log.documents)}]
        return steps

    def submit(self, *, is_dispatched: bool) -> None:
        job_id = f"job-{len(self.jobs)}"
        self.jobs.append(job_id)
        before = len(self.log.documents)
        self.log.write(job_id, [make_echo_job(max_attempts=9)], "user")
        if is_dispatched:
            self.log.handle(job_id, ClaimJob(WORKER, NOON), DISPATCH_ACTOR)
        self.undelivered += self.log.documents[before:]

    def begin_claim(self, job_id: str, *, is_row: bool) -> None:
        """Begin a claim of the worker itself, as `Claimer` does. If `is_row`, the job may stay one of the new ones."""
        stream_state = self.new_jobs.get(job_id)
        job = stream_state.aggregate if stream_state is not None else self.fold(job_id)
        if not is_row:
            self.new_jobs.pop(job_id, None)
        assert isinstance(job, Job)
        self.pending_claims[job_id] = job.attempt + 1

    def end_claim(self, job_id: str, *, is_first_try: bool) -> None:
        """End it with success or a rejection.

        If the outcome of the first try was unknown, `handle_command_with_retries` accepts an equal claim as its own.
        """
        job = self.fold(job_id)
        assert job is not None
        is_own = job.status == "pending"
        if is_own:
            self.log.handle(job_id, ClaimJob(WORKER, NOON), f"worker:{WORKER}")
            job = self.fold(job_id)
            assert job is not None
        elif not is_first_try:
            is_own = self.has(WORKER, job) and job.attempt == self.pending_claims[job_id]
        del self.pending_claims[job_id]
        self.settled.set()
        if is_own:  # `ClaimQueue.mark_claimed`
            self.new_jobs.pop(job_id, None)
        if is_own and job.cancel_request is None:
            self.start(job_id, job.attempt)
        elif is_own:  # `Worker._cancel_versions` cancels it at once
            self.log.handle(job_id, ReleaseJob(WORKER, job.attempt, reason="cancelled"), f"worker:{WORKER}")

    def complete(self, job_id: str, attempt: int) -> None:
        result = JobCompleted(attempt=attempt, results=make_results())
        self.log.handle(job_id, ReportEvent(WORKER, result), f"worker:{WORKER}")
        self.running.remove(job_id)

    def deliver(self) -> None:
        document = self.undelivered.pop(0)
        if document["type"] == "JobSubmitted":
            self.new_jobs[document["stream"]] = StreamState().apply([RecordedEvent(document)])
        else:
            self.claims.handle_claim(document, self.new_jobs.pop(document["stream"], None))

    def reopen(self, count: int) -> None:
        """Lose the events that were not delivered. Up to `count` of the last ones will arrive, perhaps again."""
        self.reopenings_left -= 1
        last = self.log.documents[len(self.log.documents) - count :]
        self.undelivered = [it for it in last if it["type"] == "JobSubmitted" or it["meta"]["actor"] == DISPATCH_ACTOR]
        self.new_jobs.clear()
        self.claims.resync(len(self.log.documents))

    def advance_views(self, position: int) -> None:
        self.views_position = position
        self.views_changed.set()

    def execute_read(self, index: int) -> None:
        stream, response = self.log.requests.pop(index)
        self.log.responses.append((self.log.select(stream), response))

    def respond(self, index: int) -> None:
        events, response = self.log.responses.pop(index)
        if not response.done():
            response.set_result(events)

    def describe(self) -> object:
        """Return a key that is equal for equal states."""
        return (
            tuple((document["stream"], document["type"], document["meta"]["actor"]) for document in self.log.documents),
            tuple(document["_id"] for document in self.undelivered),
            tuple(self.new_jobs),
            tuple((stream, response.done()) for stream, response in self.log.requests),
            tuple((len(events), response.done()) for events, response in self.log.responses),
            tuple(self.running),
            tuple(self.started),
            tuple(self.pending_claims),
            self.views_position,
            self.reopenings_left,
            (self.claims._head, *self.claims._checks, *self.claims._found_job_ids),
            self.claims._search is not None and self.claims._search.done(),
        )

    async def take_steps(self, choices: Sequence[int]) -> None:
        for choice in choices:
            if not (steps := self.list_steps()):
                return
            steps[choice % len(steps)]()
            await run_tasks()

    async def come_to_rest(self) -> None:
        while steps := self.list_steps_to_rest():
            steps[0]()
            await run_tasks()
        for job_id in self.jobs:
            assert self.has(WORKER, self.fold(job_id)) == (job_id in self.running), f"{job_id} hangs"


async def run_tasks() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


def explore(slots: int, *, reopenings: int, max_events: int) -> int:
    """Run every order of steps of one job, and return the number of states that were reached."""
    seen: set[object] = set()
    waiting: deque[tuple[int, ...]] = deque([()])
    with pytest.MonkeyPatch.context() as monkeypatch, asyncio.Runner() as runner:

        async def visit(path: tuple[int, ...]) -> None:
            simulation = Simulation(monkeypatch, max_jobs=1, slots=slots, reopenings=reopenings, max_events=max_events)
            await simulation.take_steps(path)
            if (state := simulation.describe()) not in seen:
                seen.add(state)
                waiting.extend((*path, index) for index in range(len(simulation.list_steps())))
                await simulation.come_to_rest()
            await simulation.claims.cancel()

        while waiting:
            runner.run(visit(waiting.popleft()))
    return len(seen)


@pytest.mark.parametrize("slots", [0, 1])
def test_each_claim_of_one_job_is_started_once_or_released_in_every_order(slots: int) -> None:
    assert explore(slots, reopenings=2 if IS_SOAK_RUN else 1, max_events=4 if IS_SOAK_RUN else 3) > 1000


async def test_search_ends_although_the_stream_is_opened_again_before_the_views_catch_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulation = Simulation(monkeypatch, max_jobs=4, slots=2, reopenings=10, max_events=100)
    simulation.submit(is_dispatched=False)
    simulation.submit(is_dispatched=True)
    for _ in range(2):  # the views always lack the last event
        simulation.reopen(0)
        await run_tasks()
        position = len(simulation.log.documents)
        simulation.submit(is_dispatched=False)
        simulation.reopen(0)
        await run_tasks()
        simulation.advance_views(position)
        await run_tasks()
    simulation.execute_read(0)
    simulation.respond(0)
    await run_tasks()
    assert simulation.started == [("job-1", 1)]


async def test_claim_is_not_started_with_the_next_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(monkeypatch, max_jobs=1, slots=1, reopenings=0, max_events=100)
    simulation.submit(is_dispatched=True)
    simulation.undelivered.pop(0)
    simulation.deliver()
    await run_tasks()
    simulation.execute_read(0)
    simulation.worker_id = "worker-3"
    simulation.respond(0)
    await run_tasks()
    assert not simulation.started
    assert not simulation.excluded_job_ids


async def test_event_of_a_claim_that_the_search_has_found_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(monkeypatch, max_jobs=2, slots=2, reopenings=1, max_events=100)
    simulation.submit(is_dispatched=False)
    simulation.reopen(0)
    await run_tasks()
    simulation.submit(is_dispatched=True)
    simulation.advance_views(3)
    await run_tasks()
    simulation.execute_read(0)
    simulation.respond(0)
    await run_tasks()
    assert simulation.running == ["job-1"]
    simulation.complete("job-1", 1)
    await simulation.come_to_rest()
    assert simulation.started == [("job-1", 1)]


@given(
    max_jobs=st.integers(1, 3),
    slots=st.integers(0, 2),
    choices=st.lists(st.integers(0, 10_000), min_size=5, max_size=60),
)
@settings(max_examples=20_000 if IS_SOAK_RUN else 500, deadline=None)
def test_each_claim_is_started_once_or_released_in_every_order(max_jobs: int, slots: int, choices: list[int]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:

        async def simulate() -> None:
            simulation = Simulation(monkeypatch, max_jobs=max_jobs, slots=slots, reopenings=10, max_events=100)
            await simulation.take_steps(choices)
            await simulation.come_to_rest()

        asyncio.run(simulate())
