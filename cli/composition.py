"""Composition root: create the objects of a process from the settings, and run its roles."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final, Literal

import structlog

from jobledger.cli.hosting.background_tasks import create_failure_callback, run_in_background
from jobledger.cli.hosting.database import close_with_timeout, open_database, open_file_store
from jobledger.cli.hosting.logging_setup import set_secret_filter
from jobledger.cli.hosting.loop_watchdog import watch_event_loop
from jobledger.cli.hosting.metrics_server import serve_metrics
from jobledger.cli.hosting.process_tuning import (
    collect_garbage_periodically,
    raise_open_file_limit,
    tune_garbage_collector,
)
from jobledger.cli.settings import Settings
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.mongo.connection import Connection, Database
from jobledger.ledger.outbox.relay import OutboxRelay
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.system.pacing import PACE_SECONDS
from jobledger.projections.engine.checkpoint import CheckpointFollower
from jobledger.projections.engine.projector import Projector
from jobledger.workers.cleanup import Cleanup
from jobledger.workers.registry import check_plugins, get_app_problem, get_unusable_job_types
from jobledger.workers.sandbox import confinement
from jobledger.workers.webhooks.deliverer import Deliverer
from jobledger.workers.worker import SUBSCRIBED_EVENT_TYPES, Worker

_log = structlog.get_logger()
Role = Literal["api", "projector", "worker", "webhook-sender"]
ALL_ROLES: Final[frozenset[Role]] = frozenset({"api", "projector", "worker", "webhook-sender"})
_READS_ALL_EVENTS: Final[frozenset[Role]] = frozenset({"api", "projector"})
_USES_PROCESSORS: Final[frozenset[Role]] = frozenset({"api", "worker"})


@dataclass(frozen=True, slots=True)
class RunningProcess:
    """A process whose roles run. `url` is the URL of its API, or None."""

    db: Database
    event_store: EventStore
    url: str | None


@asynccontextmanager
async def start_roles(
    settings: Settings,
    connection: Connection,
    selected: frozenset[Role],
    *,
    on_failure: Callable[[BaseException], None],
) -> AsyncIterator[RunningProcess]:
    """Run roles inside the block, and stop them in order after it.

    Args:
        settings: The settings.
        connection: Connection to the database.
        selected: Roles to run.
        on_failure: Called with the exception when a role fails.
    """
    # Imported here, because it takes long and most commands run no role.
    from jobledger.api.auth import browser_sessions
    from jobledger.api.routes import webhook_echo
    from jobledger.cli.hosting.server import build_context, open_listener, serve_api

    tune_garbage_collector()
    if selected & _USES_PROCESSORS and (problem := get_app_problem()) is not None:
        raise ConfigurationError(f"jobs.app (--app): {problem}")
    if "worker" in selected:
        await asyncio.to_thread(check_plugins, settings.event_worker.pass_environment)
    if selected & _USES_PROCESSORS:
        for job_type, reason in get_unusable_job_types().items():
            _log.error("job type unavailable", job_type=job_type, reason=reason)
    async with AsyncExitStack() as stack:
        stack.enter_context(watch_event_loop(settings.event_worker.lease_seconds))
        await stack.enter_async_context(run_in_background(collect_garbage_periodically(), on_failure))
        listener = None
        if "api" in selected:
            raise_open_file_limit()
            listener = stack.enter_context(open_listener(settings.api.host, settings.api.port))
        db = await stack.enter_async_context(open_database(connection))
        store = await open_file_store(settings, db)
        event_store = EventStore(db)
        checkpoint = CheckpointFollower(db)
        worker: Worker | None = None

        def get_max_delay() -> float:
            """Return by how many seconds changes may be delayed for the roles of this process."""
            delay = PACE_SECONDS if worker is None else worker.get_max_delay()
            return min(delay, PACE_SECONDS) if selected & _READS_ALL_EVENTS else delay

        deliverer: Deliverer | None = None
        change_stream = ChangeStream(
            db,
            event_types=None if selected & _READS_ALL_EVENTS else SUBSCRIBED_EVENT_TYPES,
            get_max_delay=get_max_delay,
        )
        change_stream.add_listener(checkpoint)
        await event_store.prepare()
        stack.push_async_callback(lambda: close_with_timeout(event_store.aclose()))
        holder = f"{socket.gethostname()}-{os.getpid()}"
        cleanup = Cleanup(db, event_store, store, checkpoint, holder=holder)
        outbox = OutboxRelay(db, event_store)

        async def run_leader_tasks() -> None:
            await asyncio.gather(cleanup.run(), outbox.run())

        projector = Projector(
            db,
            event_store,
            connection,
            checkpoint,
            holder=holder,
            leader_task=run_leader_tasks,
            pause_stream=change_stream.pause if selected == {"projector"} else None,
        )
        await projector.prepare()
        if selected & _READS_ALL_EVENTS:
            change_stream.add_listener(event_store)
        if "projector" in selected:
            projector.register_listeners(change_stream)
            change_stream.add_listener(outbox)
        context = None
        if "api" in selected:
            context = build_context(settings, db, event_store, checkpoint, change_stream, store)
            stack.callback(context.dispatcher.close)
            if context.browser_sessions is not None:
                await browser_sessions.create_indexes(db)
            if context.is_webhook_echo_enabled:
                await webhook_echo.create_indexes(db)
        shared = (db, event_store, checkpoint, change_stream, connection, store)
        if "worker" in selected:
            confinement.check_confinement(settings.event_worker.confinement)
            worker = Worker(
                *shared,
                settings=settings.event_worker,
                processor_settings=settings.processors,
                may_pause_stream=selected == {"worker"},
            )
            worker.secret_filter.add_settings(settings.model_dump(exclude={"processors"}))
            set_secret_filter(worker.secret_filter.hide)
        if "webhook-sender" in selected:
            deliverer = Deliverer(*shared, settings=settings.webhooks, base_url=settings.api.base_url, holder=holder)
        if settings.metrics.port is not None and "api" not in selected:
            stack.enter_context(serve_metrics(settings.metrics, event_store, change_stream))
        stream = await stack.enter_async_context(change_stream.keep_open())
        stream.add_done_callback(create_failure_callback(on_failure))
        if "projector" in selected:
            await stack.enter_async_context(run_in_background(projector.run(), on_failure))
        if worker is not None:
            await stack.enter_async_context(run_in_background(worker.run(), on_failure, stop=worker.stop))
        if deliverer is not None:
            await stack.enter_async_context(run_in_background(deliverer.run(), on_failure))
        url = None
        if listener is not None and context is not None:
            await stack.enter_async_context(run_in_background(context.stream_access.run(), on_failure))
            await stack.enter_async_context(run_in_background(context.disk_monitor.run(), on_failure))
            url = await stack.enter_async_context(serve_api(listener, context, on_failure))
        try:
            yield RunningProcess(db, event_store, url)
        finally:
            if worker is not None:  # first, so that its grace period runs while the other roles stop
                worker.stop()
