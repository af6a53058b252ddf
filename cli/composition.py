"""cli: the composition root. Puts the rooms together and runs the roles of a process until somebody stops it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Final, Literal, TextIO, cast

import structlog

from jobledger.cli.embedded_supervisor import start_when_space_available
from jobledger.cli.loop_watchdog import watch_event_loop
from jobledger.cli.role_tasks import failure_callback, run_in_background
from jobledger.cli.settings import LoggingSettings, MetricsSettings, Settings
from jobledger.cli.terminal_text import SafeFormatter, SafeStream, escape_log_entry
from jobledger.ledger.domain.errors import LedgerUnavailable, ResourceUnavailable, classify_os_error
from jobledger.ledger.files import store_marker
from jobledger.ledger.files.directory import DirectoryStore, FileStore
from jobledger.ledger.files.gridfs import GridFSStore
from jobledger.ledger.files.store_marker import StoreMarker
from jobledger.ledger.mongo.connection import OPLOG_ADVICE, Connection, Database, check_server, read_oplog_window
from jobledger.ledger.mongo.embedded import EmbeddedServer, find_running_server
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine import rebuild
from jobledger.projections.engine.checkpoint import Checkpoint
from jobledger.projections.engine.projector import Projector
from jobledger.projections.slots import Views
from jobledger.projections.views.files import has_any_file
from jobledger.workers import executor
from jobledger.workers.child import confinement
from jobledger.workers.child.confinement import ConfinementSettings
from jobledger.workers.cleanup import Cleanup
from jobledger.workers.registry import check_plugins, unusable_job_types
from jobledger.workers.scratch import ScratchDirectory
from jobledger.workers.webhooks import deliverer
from jobledger.workers.webhooks.deliverer import Deliverer
from jobledger.workers.webhooks.schedule import DeliveryLimits
from jobledger.workers.worker import SUBSCRIBED_EVENT_TYPES, Worker

_log = structlog.get_logger()
Role = Literal["api", "projector", "worker", "webhooks"]
ALL_ROLES: Final[frozenset[Role]] = frozenset({"api", "projector", "worker", "webhooks"})
_READS_THE_LOG: Final[frozenset[Role]] = frozenset({"api", "projector"})
_USES_PROCESSORS: Final[frozenset[Role]] = frozenset({"api", "worker"})
_MOST_FILES: Final = 65_536
SHUTDOWN_MARGIN_SECONDS: Final = 6.0
"""How much longer than the grace of running jobs a stop may take: last words to the database, and open requests."""
_CLOSE_SECONDS: Final = 1.0


def configure_logging(settings: LoggingSettings) -> None:
    """Log to standard error, for people or for machines."""
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    safe: list[structlog.typing.Processor] = []  # JSON escapes by itself
    if settings.format == "console":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        safe = [escape_log_entry]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,  # the request's id
            structlog.processors.add_log_level,
            _time_stamper(settings.format),
            structlog.processors.format_exc_info,
            *safe,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", SafeStream(sys.stderr))),
    )
    handler = logging.StreamHandler(SafeStream(sys.stderr))
    handler.setFormatter(SafeFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _time_stamper(kind: str) -> structlog.processors.TimeStamper:
    """Return what adds the time: on the clocks here for people, in UTC for machines, always with the offset."""
    if kind == "console":
        return structlog.processors.TimeStamper(fmt="%H:%M:%S%z", utc=False)
    return structlog.processors.TimeStamper(fmt="iso", utc=True)


@contextmanager
def open_database_server(settings: Settings, *, start: bool) -> Iterator[tuple[str, EmbeddedServer | None]]:
    """Yield the URI of the database, starting the embedded server if that is ours to do.

    Raises:
        DatabaseUnsuitable, LedgerUnavailable: there is none; the message says what to do.
    """
    mongodb = settings.mongodb
    if not mongodb.is_embedded:
        yield mongodb.uri.get_secret_value(), None
        return
    if not start:
        uri = find_running_server(mongodb.data_dir)
        if uri is None:
            raise LedgerUnavailable(
                f"No embedded MongoDB server is running on {mongodb.data_dir}: start `jobledger up` first, "
                "or set mongodb.uri to a replica set."
            )
        yield uri, None
        return
    with start_when_space_available(mongodb.data_dir, oplog_mb=mongodb.embedded_oplog_mb) as server:
        yield server.uri, server


def tune_garbage_collector() -> None:
    """Tell the garbage collector that what is loaded by now stays, and that many short-lived objects are normal here.

    By default it looks through young objects after every 700th and, each time they have grown by a quarter, through all
    modules ever imported: a tenth to a fifth of what an append costs (docs/decisions/0014).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@dataclass(frozen=True, slots=True)
class RunningProcess:
    """A process at work. `url` is where its API answers, None if it has none."""

    db: Database
    log: EventStore
    url: str | None


@asynccontextmanager
async def open_database(connection: Connection) -> AsyncIterator[Database]:
    """Yield the checked database.

    Raises:
        DatabaseUnsuitable, LedgerUnavailable: it cannot be used or reached.
    """
    client = connection.client()
    try:
        db = client[connection.db_name]
        await check_server(db)
        if (window := await read_oplog_window(db)) is not None and window.is_too_short:
            _log.warning(f"the oplog reaches back {window.hours:.1f} hours only", advice=OPLOG_ADVICE)
        yield db
    finally:
        await _at_most(client.close())


async def open_file_store(settings: Settings, db: Database) -> FileStore:
    """Return the store for result files; also a directory that cannot be written to now.

    A role starts all the same: reading does not need it, and a worker claims nothing until it can write.

    Raises:
        ConfigurationError: the directory cannot be written to.
        LedgerUnavailable: the database failed.
    """
    if isinstance(settings.results.store, Path):
        return await _directory_store(settings.results.store, db)
    grid = GridFSStore(db)
    await grid.prepare()
    return grid


async def _directory_store(root: Path, db: Database) -> DirectoryStore:
    """Return the store in a directory. It is created for a new ledger only: see `ledger/files/store_marker.py`."""
    marker = await find_store_marker(root, db)
    if marker.store_id:
        marker = await store_marker.record_marker(db, marker, created=False)
    store = DirectoryStore(root, marker=marker)
    try:
        await asyncio.to_thread(store.prepare)
    except ResourceUnavailable as error:
        _log.warning("result files cannot be stored now: workers wait, everything else runs", problem=str(error))
    else:
        await store_marker.record_marker(db, marker, created=True)
    return store


async def find_store_marker(root: Path, db: Database) -> StoreMarker:
    """Return by which marker a directory is recognized as the result store. Writes nothing.

    Raises:
        ConfigurationError, ResourceUnavailable: the directory cannot be read.
        LedgerUnavailable: the database failed.
    """
    live = await rebuild.load_checkpoint(db)
    try:
        return await store_marker.find_marker(db, root, has_files=partial(has_any_file, Views(db, live.get("slots"))))
    except OSError as error:
        raise classify_os_error(error, f"results.store: cannot read {root}: {error.strerror}") from error


async def _at_most(closing: Coroutine[None, None, None]) -> None:
    """Close something; give up after a second, because a database that does not answer would hold it up."""
    with suppress(TimeoutError):
        await asyncio.wait_for(closing, _CLOSE_SECONDS)


@asynccontextmanager
async def start_roles(
    settings: Settings,
    connection: Connection,
    selected: frozenset[Role],
    *,
    on_failure: Callable[[BaseException], None],
) -> AsyncIterator[RunningProcess]:
    """Run roles inside the block and stop them in good order behind it.

    `failed` is called when one of them ends although nobody stopped it.
    """
    # Only now: it takes long to load, and most commands run nothing.
    from jobledger.api.auth import browser_sessions
    from jobledger.api.routes import webhook_echo
    from jobledger.cli.server import build_context, open_listener, raise_open_file_limit, serve_api

    tune_garbage_collector()
    if "worker" in selected:
        await asyncio.to_thread(check_plugins, settings.event_worker.pass_environment)
    if selected & _USES_PROCESSORS:
        for job_type, why in unusable_job_types().items():
            _log.error("job type not available in this process", job_type=job_type, problem=why)
    if "api" in selected:
        raise_open_file_limit()
    async with AsyncExitStack() as stack:
        stack.enter_context(watch_event_loop(settings.event_worker.lease_seconds))
        listening = (
            stack.enter_context(open_listener(settings.api.host, settings.api.port)) if "api" in selected else None
        )
        db = await stack.enter_async_context(open_database(connection))
        store = await open_file_store(settings, db)
        log = EventStore(db)
        checkpoint = Checkpoint(db)
        changes = ChangeStream(db, event_types=None if selected & _READS_THE_LOG else SUBSCRIBED_EVENT_TYPES)
        changes.add_listener(checkpoint)
        await log.prepare()
        stack.push_async_callback(lambda: _at_most(log.aclose()))
        holder = f"{socket.gethostname()}-{os.getpid()}"
        cleanup = Cleanup(db, log, store, checkpoint, holder=holder)
        projector = Projector(db, log, connection, checkpoint, holder=holder, leader_task=cleanup.run)
        await projector.prepare()
        if selected & _READS_THE_LOG:
            changes.add_listener(log)
        if "projector" in selected:
            projector.register_listeners(changes)
        serves = build_context(settings, db, log, checkpoint, changes, store) if "api" in selected else None
        if serves is not None and serves.browser_sessions is not None:
            await browser_sessions.create_indexes(db)
        if serves is not None and serves.webhook_options.echo_enabled:
            await webhook_echo.create_indexes(db)
        worker = _worker(settings, db, log, checkpoint, changes, connection, store) if "worker" in selected else None
        sends = None
        if "webhooks" in selected:
            sends = _deliverer(settings, db, log, store, checkpoint, changes, connection)
        if settings.metrics.port is not None and "api" not in selected:
            stack.enter_context(serve_metrics(settings.metrics, log, changes))
        stream = await stack.enter_async_context(changes.running())
        stream.add_done_callback(failure_callback(on_failure))
        if "projector" in selected:
            await stack.enter_async_context(run_in_background(projector.run(), on_failure))
        if worker is not None:
            await stack.enter_async_context(_working(worker, on_failure))
        if sends is not None:
            await stack.enter_async_context(run_in_background(sends.run(), on_failure))
        url = None
        if listening is not None and serves is not None:
            await stack.enter_async_context(run_in_background(serves.visibility.run(), on_failure))
            await stack.enter_async_context(run_in_background(serves.disk_monitor.run(), on_failure))
            url = await stack.enter_async_context(serve_api(listening, settings.api, serves, on_failure))
        try:
            yield RunningProcess(db, log, url)
        finally:
            if worker is not None:  # first, so that its grace time runs while the other roles stop
                worker.stop()


@contextmanager
def serve_metrics(settings: MetricsSettings, log: EventStore, changes: ChangeStream) -> Iterator[int]:
    """Show the numbers of this process to Prometheus inside the block; yields the port.

    Raises:
        ResourceUnavailable: the port is taken.
        ConfigurationError: it cannot be opened.
    """
    from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

    from jobledger.api.routes.metrics import CallbackCollector, collect_process_metrics

    registry = CollectorRegistry()
    registry.register(CallbackCollector(lambda: collect_process_metrics(log, changes)))
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(settings.port or 0, settings.host, registry)
    except OSError as error:
        raise classify_os_error(
            error,
            f"metrics.port: cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose another "
            "number, or null for none.",
        ) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _worker(
    settings: Settings,
    db: Database,
    log: EventStore,
    checkpoint: Checkpoint,
    changes: ChangeStream,
    connection: Connection,
    store: FileStore,
) -> Worker:
    chosen = settings.event_worker
    confinement.check_confinement(chosen.confinement)
    return Worker(
        db,
        log,
        checkpoint,
        changes,
        connection,
        settings=executor.ExecutorSettings(
            store,
            settings.processors,
            chosen.memory_limit_mb,
            chosen.retry_base_seconds,
            chosen.retry_max_seconds,
            ConfinementSettings(
                mode=chosen.confinement,
                environment_variables=tuple(chosen.pass_environment),
                protected_paths=tuple(chosen.protected_paths),
                readable_paths=tuple(chosen.readable_paths),
                writable_paths=tuple(chosen.writable_paths),
            ),
        ),
        slots=chosen.max_concurrent,
        slots_per_type=chosen.max_concurrent_per_type,
        lease_seconds=chosen.lease_seconds,
        shutdown_grace_seconds=chosen.shutdown_grace_seconds,
        scratch=ScratchDirectory(chosen.scratch_dir, min_free_mb=chosen.scratch_min_free_mb),
    )


def _deliverer(
    settings: Settings,
    db: Database,
    log: EventStore,
    store: FileStore,
    checkpoint: Checkpoint,
    changes: ChangeStream,
    connection: Connection,
) -> Deliverer:
    chosen = settings.webhooks
    return Deliverer(
        db,
        log,
        store,
        checkpoint,
        changes,
        connection,
        settings=deliverer.DeliverySettings(
            retry_delays=chosen.retry_delays_seconds,
            jitter=chosen.jitter,
            timeout_seconds=chosen.timeout_seconds,
            allowed_private_hosts=chosen.allowed_private_hosts,
            limits=DeliveryLimits(
                chosen.max_concurrent,
                chosen.max_concurrent_per_host,
                chosen.circuit_breaker_failures,
                timedelta(seconds=chosen.circuit_breaker_cooldown_seconds),
            ),
            base_url=(settings.api.public_url or "").rstrip("/"),
        ),
        holder=f"{socket.gethostname()}-{os.getpid()}",
        lease_seconds=chosen.lease_seconds,
    )


@asynccontextmanager
async def _working(worker: Worker, failed: Callable[[BaseException], None]) -> AsyncIterator[None]:
    task = asyncio.create_task(worker.run(), name="worker")
    task.add_done_callback(failure_callback(failed))
    try:
        yield
    finally:
        worker.stop()
        await asyncio.gather(task, return_exceptions=True)


def shutdown_timeout(settings: Settings, wanted: frozenset[Role]) -> float:
    """Return within how many seconds of a signal the process ends, whatever the database does."""
    grace = settings.event_worker.shutdown_grace_seconds if "worker" in wanted else 0.0
    return grace + SHUTDOWN_MARGIN_SECONDS


class Shutdown:
    """Set by Ctrl-C, SIGTERM, or a role that failed. A second Ctrl-C ends the process at once.

    A process that has not ended `limit_seconds` later is ended: a call waits for a database that does not answer. The
    data is safe whenever a process dies, and leases that were not given back expire.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._event = asyncio.Event()
        self._limit = threading.Timer(timeout_seconds, self._end, [timeout_seconds])
        self._limit.daemon = True
        self.error: BaseException | None = None

    def install_signal_handlers(self) -> None:
        """Take over the signals of this process."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled)

    @property
    def is_requested(self) -> bool:
        return self._event.is_set()

    def cancel_timeout(self) -> None:
        """Let the process take as long as it needs to end."""
        self._limit.cancel()

    def _signalled(self) -> None:
        if self._event.is_set():
            os._exit(130)  # the data is safe whenever we die; only politeness is lost
        self.request()

    def request_after_failure(self, error: BaseException) -> None:
        """Stop because something is broken."""
        if not self._event.is_set():
            _log.error("a role ended unexpectedly, stopping", exc_info=error)
        self.request(error)

    def request(self, error: BaseException | None = None) -> None:
        """Stop within the limit. Whoever passes an error reports it."""
        if self._event.is_set():
            return
        self.error = error
        self._event.set()  # first: without memory for a thread, the process stops without a limit
        with suppress(RuntimeError):
            self._limit.start()

    def _end(self, seconds: float) -> None:
        _log.warning(
            "not everything could be ended in time, ending now: does the database answer? "
            "What was not given back is free when its lease expires",
            seconds=seconds,
        )
        os._exit(0 if self.error is None else 1)

    async def wait(self) -> None:
        await self._event.wait()
