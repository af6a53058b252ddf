"""Run the roles against the database of a test, in the test's process or as subprocesses.

    async with run_roles_in_process(connection, tmp_path, projector=True, worker=WorkerOptions()) as roles:
        job_id = await roles.submit({"text": "hello"})
        job = await roles.wait_until_finished(job_id)

`python -m tests.support.role_runner URI DB_NAME STORE ROLES [key=value …]` runs the same in a process.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from pydantic import Field

from jobledger.ledger.domain.commands import ClaimJob, SubmitBatch, SubmitJob
from jobledger.ledger.domain.events import BatchSubmitted, Event, EventMetadata, JobClaimed, JobSubmitted, RecordedEvent
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.gridfs import GridFSStore
from jobledger.ledger.files.store_marker import StoreMarker
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.command_handler import (
    Command,
    create_batch_id,
    create_job_id,
    create_streams,
    handle_command,
)
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import CheckpointFollower
from jobledger.projections.engine.dispatcher import Dispatcher
from jobledger.projections.engine.projector import Projector
from jobledger.projections.views import batches, jobs
from jobledger.workers.child.containment import new_event_loop
from jobledger.workers.settings import WebhookSettings, WorkerSettings
from jobledger.workers.webhooks.deliverer import Deliverer
from jobledger.workers.worker import SUBSCRIBED_EVENT_TYPES, Worker
from tests.support.polling import DEADLINE_SECONDS
from tests.support.suspension import suspend

TERMINAL_EVENT_TYPES = ("JobCompleted", "JobFailed", "JobCancelled")


class WorkerOptions(WorkerSettings):
    """Settings of a worker in a test, with short timeouts."""

    max_concurrent_per_type: dict[str, int] = Field({})  # also for job types that are not installed
    shutdown_grace_seconds: float = 10.0
    retry_base_seconds: float = 0.1
    processors: dict[str, dict[str, Any]] = Field({})
    gridfs: bool = False
    """Whether result files are stored in the database."""


STORE_ID = "5" * 32
FAST_WEBHOOKS = WebhookSettings(
    retry_delays_seconds=[0, 0.2, 0.2, 0.2, 0.2], jitter=0, timeout_seconds=3, allowed_private_hosts=["127.0.0.1"]
)
"""Webhook settings for endpoints on this machine with short retry delays."""


@dataclass(slots=True)
class RunningRoles:
    """The objects of one process: client, event store, change stream and running roles."""

    connection: Connection
    db: Database
    event_store: EventStore
    checkpoint: CheckpointFollower
    changes: ChangeStream
    store: DirectoryStore
    dispatcher: Dispatcher | None = None
    projector: Projector | None = None
    worker: Worker | None = None
    projector_task: asyncio.Task[None] | None = None
    worker_task: asyncio.Task[None] | None = None
    webhooks_task: asyncio.Task[None] | None = None
    changes_task: asyncio.Task[None] | None = None

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """The tasks of the running roles and of the change stream. None of them ends unless it fails or is stopped."""
        tasks = (self.projector_task, self.worker_task, self.webhooks_task, self.changes_task)
        return {task for task in tasks if task is not None}

    # Commands --------------------------------------------------------------------------------------------------

    async def submit(self, parameters: Mapping[str, Any] | None = None, **fields: Any) -> str:
        """Submit an `echo` job, with `fields` as overrides, and return its ID."""
        job_id, command = create_job_id(), SubmitJob(make_echo_job(parameters, **fields))
        if self.dispatcher is not None:
            await self.dispatcher.submit_job(job_id, command, meta=EventMetadata("test"))
        else:
            await self.handle_commands(job_id, command)
        return job_id

    async def submit_batch(self, *parameters: Mapping[str, Any], **fields: Any) -> tuple[str, list[str]]:
        """Submit a batch with one `echo` job for each of the `parameters`. `fields` apply to every job."""
        batch_id, job_ids = create_batch_id(), [create_job_id() for _ in parameters]
        batch = BatchSubmitted(total_jobs=len(job_ids), job_ids=job_ids, user_id="user-1")
        commands: list[tuple[str, Command]] = [(batch_id, SubmitBatch(batch))]
        for job_id, job_parameters in zip(job_ids, parameters, strict=True):
            commands.append((job_id, SubmitJob(make_echo_job(job_parameters, batch_id=batch_id, **fields))))
        await create_streams(self.event_store, commands, meta=EventMetadata("test"))
        return batch_id, job_ids

    async def handle_commands(self, stream: str, *commands: Command) -> list[RecordedEvent]:
        """Handle commands one after the other and return all their events."""
        recorded = []
        for command in commands:
            recorded += (await handle_command(self.event_store, stream, command, meta=EventMetadata("test"))).events
        return recorded

    async def claim(self, job_id: str, worker_id: str = "worker-1") -> int:
        """Claim a job as a worker and return the attempt."""
        recorded = await self.handle_commands(job_id, ClaimJob(worker_id, datetime.now(UTC)))
        claimed = recorded[-1].event
        assert isinstance(claimed, JobClaimed)
        return claimed.attempt

    # Waiting and reading ---------------------------------------------------------------------------------------

    async def wait_for_event(
        self,
        types: type[Event] | tuple[type[Event], ...],
        stream: str | None = None,
        *,
        after: int = 0,
        predicate: Callable[[Any], bool] = lambda event: True,
        seconds: float = DEADLINE_SECONDS,
    ) -> RecordedEvent:
        """Wait for the first event of these types after a position and return it."""
        event_types = types if isinstance(types, tuple) else (types,)
        async with asyncio.timeout(seconds), self.event_store.subscribe(after=after, types=event_types) as events:
            async for event in events:
                if stream in (None, event.stream) and predicate(event.event):
                    return event
        raise AssertionError("the subscription ended")

    async def wait_until_finished(self, *job_ids: str, seconds: float = DEADLINE_SECONDS) -> Document:
        """Wait until the jobs finished and the views contain this. Return the document of the first job."""
        unfinished, position = set(job_ids), 0
        try:
            async with asyncio.timeout(seconds), self.event_store.subscribe(after=0) as events:
                async for event in events:
                    position = event.position
                    if event.type in TERMINAL_EVENT_TYPES:
                        unfinished.discard(event.stream)
                    if not unfinished:
                        break
        except TimeoutError:
            histories = [await self.describe_history(job_id) for job_id in sorted(unfinished)[:5]]
            raise AssertionError(f"{len(unfinished)} jobs did not finish within {seconds} s: {histories}") from None
        await self.wait_for_views(position)
        return await self.load_job(job_ids[0])

    async def wait_for_views(self, position: int | None = None, *, seconds: float = DEADLINE_SECONDS) -> None:
        """Wait until the views reach a position. Default: the current head of the log."""
        async with asyncio.timeout(seconds):
            await self.checkpoint.wait_for_position(
                await self.event_store.read_head_position() if position is None else position
            )

    async def load_job(self, job_id: str) -> Document:
        job = await jobs.get(self.checkpoint.views, self.event_store, job_id)
        assert job is not None, f"{job_id} is not in the view"
        return job

    async def load_batch(self, batch_id: str) -> Document:
        batch = await batches.get(self.checkpoint.views, self.event_store, batch_id)
        assert batch is not None, f"{batch_id} is not in the view"
        return batch

    async def read_event_types(self, stream: str) -> list[str]:
        """Return the event types of a stream in order."""
        return [event.type for event in await self.event_store.read_stream(stream)]

    async def describe_history(self, stream: str) -> list[str]:
        """Return times, types and errors of a stream's events, for the message of a failing test."""
        return [
            f"{event.time:%M:%S.%f} {event.type} {event.data.get('error') or event.data.get('reason') or ''}"
            for event in await self.event_store.read_stream(stream)
        ]

    async def read_all_events(self) -> list[RecordedEvent]:
        """Return all events of the log."""
        events: list[RecordedEvent] = []
        while page := await self.event_store.read(after=len(events)):
            events += page
        return events


def make_echo_job(parameters: Mapping[str, Any] | None = None, **fields: Any) -> JobSubmitted:
    """Return a valid `echo` job with `fields` as overrides."""
    return JobSubmitted(**{"job_type": "echo", "user_id": "user-1", "parameters": dict(parameters or {}), **fields})


@asynccontextmanager
async def run_roles_in_process(
    connection: Connection,
    store: Path,
    *,
    projector: bool = False,
    worker: WorkerOptions | None = None,
    webhooks: WebhookSettings | None = None,
    projector_lease_seconds: float = 10.0,
    is_worker_process: bool = False,
    store_class: type[EventStore] = EventStore,
    projector_class: type[Projector] = Projector,
    projector_pauses_stream: bool = False,
    dispatches: bool = False,
) -> AsyncIterator[RunningRoles]:
    """Run roles inside the block and stop them after it. A failing role fails the test.

    With `is_worker_process`, the roles read the change stream as in a process that is only a worker. With
    `projector_pauses_stream`, the projector pauses the change stream in a flood, as in a process of its own. With
    `dispatches`, `submit` claims jobs for workers, as the API does.
    """
    async with AsyncExitStack() as stack:
        client = connection.create_client()
        stack.push_async_callback(client.close)
        db = client[connection.db_name]
        log, checkpoint = store_class(db), CheckpointFollower(db)
        changes = ChangeStream(db, event_types=SUBSCRIBED_EVENT_TYPES if is_worker_process else None)
        results = DirectoryStore(store, marker=StoreMarker(STORE_ID, is_new=True))
        roles = RunningRoles(connection, db, log, checkpoint, changes, results)
        roles.store.prepare()
        await log.prepare()
        stack.push_async_callback(log.aclose)
        leader = projector_class(
            db,
            log,
            connection,
            checkpoint,
            holder=f"test-{os.getpid()}",
            lease_seconds=projector_lease_seconds,
            pause_stream=changes.pause if projector_pauses_stream else None,
        )
        await leader.prepare()
        changes.add_listener(checkpoint)
        if not is_worker_process:
            changes.add_listener(log)
        if dispatches:
            roles.dispatcher = Dispatcher(db, log, checkpoint, changes)
            stack.callback(roles.dispatcher.close)
        if projector:
            roles.projector = leader
            leader.register_listeners(changes)
        if worker is not None:
            if worker.gridfs:
                await GridFSStore(db).prepare()
            roles.worker = _create_worker(roles, worker, may_pause_stream=is_worker_process)
        deliverer = None
        if webhooks is not None:
            deliverer = Deliverer(
                db,
                log,
                checkpoint,
                changes,
                connection,
                roles.store,
                settings=webhooks,
                base_url="",
                holder=f"test-{os.getpid()}",
            )
        roles.changes_task = await stack.enter_async_context(changes.keep_open())
        if projector:
            roles.projector_task = asyncio.create_task(leader.run(), name="projector")
            stack.push_async_callback(_stop, roles.projector_task)
        if deliverer is not None:
            roles.webhooks_task = asyncio.create_task(deliverer.run(), name="webhooks")
            stack.push_async_callback(_stop, roles.webhooks_task)
        if roles.worker is not None:
            roles.worker_task = asyncio.create_task(roles.worker.run(), name="worker")
            stack.push_async_callback(_stop_worker, roles.worker, roles.worker_task)
        yield roles


def _create_worker(roles: RunningRoles, options: WorkerOptions, *, may_pause_stream: bool) -> Worker:
    return Worker(
        roles.db,
        roles.event_store,
        roles.checkpoint,
        roles.changes,
        roles.connection,
        GridFSStore(roles.db) if options.gridfs else roles.store,
        settings=options,
        processor_settings=options.processors,
        may_pause_stream=may_pause_stream,
    )


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _stop_worker(worker: Worker, task: asyncio.Task[None]) -> None:
    worker.stop()
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await task
    except asyncio.CancelledError:
        if not task.cancelled():  # a test may have cancelled it
            raise


# Subprocesses -----------------------------------------------------------------------------------------------------


class RolesSubprocess:
    """Roles in a subprocess that leads its own process group, so that all its descendants can be killed."""

    def __init__(
        self, connection: Connection, store: Path, *roles: str, env: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        arguments = [connection.uri, connection.db_name, str(store), ",".join(roles)]
        arguments += [f"{name}={value}" for name, value in options.items()]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.role_runner", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    async def wait_until_started(self) -> None:
        """Wait until all roles run."""
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE_SECONDS):
            line = await asyncio.to_thread(self.process.stdout.readline)
        assert line == "running\n", "the process exited during startup"

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal. SIGSTOP returns after all threads have stopped."""
        if number == signal.SIGSTOP:
            suspend(self.pid)
        else:
            self.process.send_signal(number)

    async def print_stacks(self) -> None:
        """Let the process print the stacks of its threads and tasks to standard error, after a timeout of a test."""
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            self.process.send_signal(number)
            await asyncio.sleep(0.5)

    async def wait_for_exit(self, seconds: float = DEADLINE_SECONDS) -> int:
        """Wait for the exit and return the exit code."""
        return await asyncio.to_thread(self.process.wait, seconds)


@contextmanager
def run_roles_subprocess(connection: Connection, store: Path, *roles: str, **options: Any) -> Iterator[RolesSubprocess]:
    """Run roles in a subprocess. It and its descendants are killed after the block."""
    running = RolesSubprocess(connection, store, *roles, **options)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        for pid in list_live_processes_in_session(running.pid):
            os.kill(pid, signal.SIGKILL)
        assert running.process.stdout is not None
        running.process.stdout.close()


def list_live_processes_in_session(leader: int) -> list[int]:
    """Return the running processes of a session, without zombies."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, _group, session = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == leader and state != "Z":
            pids.append(int(stat.parent.name))
    return pids


def _print_tasks() -> None:
    for task in asyncio.all_tasks():
        print(task.get_name(), file=sys.stderr)
        awaited: Any = task.get_coro()
        while (frame := getattr(awaited, "cr_frame", None)) is not None:
            print(f"  {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}", file=sys.stderr)
            awaited = awaited.cr_await
        print(f"  {awaited!r}", file=sys.stderr, flush=True)


async def _main(uri: str, db_name: str, store: str, roles: str, *arguments: str) -> None:
    options = {name: float(value) for name, _, value in (item.partition("=") for item in arguments)}
    worker = WorkerOptions(
        max_concurrent=int(options.get("slots", 5)),
        lease_seconds=options.get("lease_seconds", 10.0),
        shutdown_grace_seconds=options.get("shutdown_grace_seconds", 10.0),
        processors={"session": {"allowed_private_hosts": ["127.0.0.1"]}},
        confinement="auto" if options.get("confinement", 1) else "off",
    )
    webhooks = FAST_WEBHOOKS.model_copy(update={"lease_seconds": worker.lease_seconds})
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # a full pipe would block
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    faulthandler.register(signal.SIGUSR1)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, _print_tasks)
    async with run_roles_in_process(
        Connection(uri, db_name),
        Path(store),
        projector="projector" in roles,
        worker=worker if "worker" in roles else None,
        webhooks=webhooks if "webhooks" in roles else None,
        projector_lease_seconds=options.get("lease_seconds", 10.0),
        is_worker_process=not {"projector"} & set(roles.split(",")),
    ) as running:
        print("running", flush=True)
        stopping = asyncio.create_task(stop.wait())
        ended, _ = await asyncio.wait({stopping, *running.tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:  # a failing role ends the process, as in a real one
            await task


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_main(*sys.argv[1:]))
