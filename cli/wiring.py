"""cli: the composition root. Puts the rooms together and runs the roles of a process until somebody stops it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Final, Literal, assert_never
from urllib.parse import urlsplit

import structlog
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.access import OpenSignIn, SignIn
from api.app import create_app
from api.endings import Endings
from api.event_stream import Streams
from api.jwks import KeysAt, KeySource, OneKey, public_key, shared_secret
from api.keys import KeyRing
from api.links import Links
from api.middleware import Edge
from api.services import Services
from api.sign_in import Grants, JwtSignIn, KeySignIn, ProxyHeaders, ProxySignIn, TokenRules
from api.visibility import Visibility
from cli.settings import AuthSettings, JwtSettings, LoggingSettings, Settings
from ledger.changes import Changes
from ledger.embedded import EmbeddedServer, running_server
from ledger.errors import ConfigurationError, LedgerUnavailable
from ledger.files import DirectoryStore, FileStore
from ledger.gridfs import GridFSStore
from ledger.log import EventLog
from ledger.mongo import OPLOG_ADVICE, Connection, Database, check_server, oplog_window
from projections.checkpoint import Checkpoint
from projections.projector import Projector
from workers import execution
from workers.registry import processors
from workers.worker import HEARD_EVENTS, Worker

_log = structlog.get_logger()
Role = Literal["api", "projector", "worker"]
ALL_ROLES: Final[frozenset[Role]] = frozenset({"api", "projector", "worker"})
_MOST_FILES: Final = 65_536


def set_up_logging(settings: LoggingSettings) -> None:
    """Log to standard error, for people or for machines."""
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if settings.format == "console":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,  # the request's id
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if settings.format == "console" else "iso", utc=False),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


@contextmanager
def database_server(settings: Settings, *, start: bool) -> Iterator[tuple[str, EmbeddedServer | None]]:
    """Yield the URI of the database, starting the embedded server if that is ours to do.

    Raises:
        DatabaseUnsuitable, LedgerUnavailable: there is none; the message says what to do.
    """
    mongodb = settings.mongodb
    if not mongodb.embedded:
        yield mongodb.uri.get_secret_value(), None
        return
    if not start:
        uri = running_server(mongodb.data_dir)
        if uri is None:
            raise LedgerUnavailable(
                f"No embedded MongoDB server is running on {mongodb.data_dir}: start `jobledger up` first, "
                "or set mongodb.uri to a replica set."
            )
        yield uri, None
        return
    with EmbeddedServer.start(
        mongodb.data_dir, port=mongodb.embedded_port, oplog_mb=mongodb.embedded_oplog_mb
    ) as server:
        yield server.uri, server


def spare_the_collector() -> None:
    """Tell the garbage collector that what is loaded by now stays, and that many short-lived objects are normal here.

    By default it looks through young objects after every 700th and, each time they have grown by a quarter, through all
    modules ever imported: a tenth to a fifth of what an append costs (docs/decisions/0014).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def allow_many_connections() -> None:
    """Raise how many files may be open to what we may: by default that is 1024, and each client's connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@dataclass(frozen=True, slots=True)
class Running:
    """A process at work. `url` is where its API answers, None if it has none."""

    db: Database
    log: EventLog
    url: str | None


@asynccontextmanager
async def database(connection: Connection) -> AsyncIterator[Database]:
    """Yield the checked database.

    Raises:
        DatabaseUnsuitable, LedgerUnavailable: it cannot be used or reached.
    """
    client = connection.client()
    try:
        db = client[connection.db_name]
        await check_server(db)
        if (window := await oplog_window(db)) is not None and window.short:
            _log.warning(f"the oplog reaches back {window.hours:.1f} hours only", advice=OPLOG_ADVICE)
        yield db
    finally:
        await client.close()


async def file_store(settings: Settings, db: Database) -> FileStore:
    """Return the store for result files, ready for use.

    Raises:
        ConfigurationError: the directory cannot be written to.
        LedgerUnavailable: the database failed.
    """
    if isinstance(settings.results.store, Path):
        directory = DirectoryStore(settings.results.store)
        directory.prepare()
        return directory
    grid = GridFSStore(db)
    await grid.prepare()
    return grid


@asynccontextmanager
async def roles(
    settings: Settings, connection: Connection, wanted: frozenset[Role], *, failed: Callable[[BaseException], None]
) -> AsyncIterator[Running]:
    """Run roles inside the block and stop them in good order behind it.

    `failed` is called when one of them ends although nobody stopped it.
    """
    spare_the_collector()
    if "api" in wanted:
        allow_many_connections()
    async with AsyncExitStack() as stack:
        listening = stack.enter_context(_listen(settings.api.host, settings.api.port)) if "api" in wanted else None
        db = await stack.enter_async_context(database(connection))
        store = await file_store(settings, db)
        log = EventLog(db)
        checkpoint = Checkpoint(db)
        changes = Changes(db, event_types=HEARD_EVENTS if wanted == {"worker"} else None)
        changes.listen(checkpoint)
        await log.prepare()
        stack.push_async_callback(log.aclose)
        projector = Projector(db, log, connection, holder=f"{socket.gethostname()}-{os.getpid()}")
        await projector.prepare()
        if wanted != {"worker"}:
            changes.listen(log)
        if "projector" in wanted:
            changes.listen(projector)
        endings = Endings()
        if "api" in wanted:
            changes.listen(endings)
        sign_in = _sign_in(settings.auth, db, changes) if "api" in wanted else None
        worker = _worker(settings, db, log, checkpoint, changes, connection, store) if "worker" in wanted else None
        stream = await stack.enter_async_context(changes.running())
        stream.add_done_callback(_watcher(failed))
        if "projector" in wanted:
            await stack.enter_async_context(_background(projector.run(), failed))
        if worker is not None:
            await stack.enter_async_context(_working(worker, failed))
        url = None
        if listening is not None and sign_in is not None:
            visibility = Visibility(log, checkpoint)
            await stack.enter_async_context(_background(visibility.run(), failed))
            serving = _serving(listening, settings, db, log, checkpoint, store, sign_in, endings, visibility, failed)
            url = await stack.enter_async_context(serving)
        yield Running(db, log, url)


def _worker(
    settings: Settings,
    db: Database,
    log: EventLog,
    checkpoint: Checkpoint,
    changes: Changes,
    connection: Connection,
    store: FileStore,
) -> Worker:
    chosen = settings.event_worker
    return Worker(
        db,
        log,
        checkpoint,
        changes,
        connection,
        settings=execution.Settings(
            store,
            settings.processors,
            chosen.memory_limit_mb,
            chosen.retry_base_seconds,
            chosen.retry_longest_seconds,
            chosen.share_steps_seconds,
        ),
        slots=chosen.max_concurrent,
        slots_of_type=chosen.max_concurrent_per_type,
        lease_seconds=chosen.lease_seconds,
        shutdown_grace_seconds=chosen.shutdown_grace_seconds,
    )


def _watcher(failed: Callable[[BaseException], None]) -> Callable[[asyncio.Task[None]], None]:
    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            failed(error)

    return ended


@asynccontextmanager
async def _background(
    work: Coroutine[None, None, None], failed: Callable[[BaseException], None]
) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    task.add_done_callback(_watcher(failed))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def _working(worker: Worker, failed: Callable[[BaseException], None]) -> AsyncIterator[None]:
    task = asyncio.create_task(worker.run(), name="worker")
    task.add_done_callback(_watcher(failed))
    try:
        yield
    finally:
        worker.stop()
        await asyncio.gather(task, return_exceptions=True)


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers: the process has its own, for all roles together."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Connection(H11Protocol):
    """Uvicorn's connection, which lets a stream cut off a client that does not read (`scope["state"]["abort"]`)."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}


def _sign_in(auth: AuthSettings, db: Database, changes: Changes) -> SignIn:
    """Return the way to sign in that is set.

    Raises:
        ConfigurationError: the public key cannot be used.
    """
    grants = Grants(frozenset(auth.admins), frozenset(auth.monitors))
    match auth.mode:
        case "open":
            return OpenSignIn("local")
        case "keys":
            ring = KeyRing(db)
            changes.listen(ring)
            return KeySignIn(ring, now=lambda: datetime.now(UTC), anonymous_public=auth.anonymous_public)
        case "jwt":
            rules = TokenRules(
                auth.jwt.issuer,
                auth.jwt.audience,
                auth.jwt.leeway_seconds,
                auth.jwt.user_claim,
                auth.jwt.groups_claim,
                auth.jwt.roles_claim,
            )
            return JwtSignIn(_token_keys(auth.jwt), rules, grants, anonymous_public=auth.anonymous_public)
        case "proxy":
            trusted = [ip_network(network) for network in auth.proxy.trusted]
            headers = ProxyHeaders(auth.proxy.user_header, auth.proxy.groups_header, auth.proxy.roles_header)
            return ProxySignIn(trusted, headers, grants, anonymous_public=auth.anonymous_public)
        case _:
            assert_never(auth.mode)


def _token_keys(jwt: JwtSettings) -> KeySource:
    if jwt.jwks_url is not None:
        return KeysAt(jwt.jwks_url)
    if jwt.public_key_file is None:
        assert jwt.secret is not None  # noqa: S101 - the settings make sure that there is one of the three
        return OneKey(shared_secret(jwt.secret.get_secret_value()))
    try:
        return OneKey(public_key(jwt.public_key_file.read_bytes()))
    except OSError as error:
        raise ConfigurationError(
            f"auth.jwt.public_key_file: {jwt.public_key_file} cannot be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"auth.jwt.public_key_file: {jwt.public_key_file}: {error}") from error


@asynccontextmanager
async def _serving(
    listening: socket.socket,
    settings: Settings,
    db: Database,
    log: EventLog,
    checkpoint: Checkpoint,
    store: FileStore,
    sign_in: SignIn,
    endings: Endings,
    visibility: Visibility,
    failed: Callable[[BaseException], None],
) -> AsyncIterator[str]:
    host, port = listening.getsockname()[:2]
    shown_host = f"[{host}]" if ":" in host else host
    public = urlsplit(settings.api.public_url).hostname if settings.api.public_url else None
    services = Services(
        db=db,
        log=log,
        checkpoint=checkpoint,
        store=store,
        job_types={name: processor.Parameters for name, processor in processors().items()},
        largest_body_bytes=settings.api.max_body_bytes,
        allowed_hosts=tuple(dict.fromkeys(name for name in ("localhost", "127.0.0.1", "[::1]", host, public) if name)),
        endings=endings,
        edge=_edge(settings),
        visibility=visibility,
        streams=Streams(),
        links=Links(db, settings.api.public_url),
        sign_in=sign_in,
    )
    server = _Server(
        uvicorn.Config(
            create_app(services),
            http=_Connection,
            log_level="warning",
            access_log=False,
            proxy_headers=False,  # whom we trust to say who somebody is, auth.proxy says
            timeout_graceful_shutdown=3,
            lifespan="off",
        )
    )
    task = asyncio.create_task(server.serve(sockets=[listening]), name="api")
    task.add_done_callback(_watcher(failed))
    try:
        yield settings.api.public_url or f"http://{shown_host}:{port}"
    finally:
        services.streams.close()
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)


def _edge(settings: Settings) -> Edge:
    api = settings.api
    return Edge(
        cors_origins=tuple(api.cors_origins),
        requests_per_second=api.requests_per_second,
        burst=api.burst,
        max_streams_per_user=api.max_streams_per_user,
        https=(api.public_url or "").startswith("https://"),
        access_log=settings.logging.access,
    )


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """Open the port ourselves, so that a taken one is a clear error before anything else begins."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, else asyncio does not switch off Nagle's algorithm, and small answers wait 40 ms for an ACK.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(2048)  # bound is not enough: two may be bound to a port to which neither listens
        except OSError as error:
            raise ConfigurationError(
                f"api.port: cannot listen on {host}:{port} ({error.strerror}); is another jobledger running? "
                "Stop it, or set api.port (JOBLEDGER_API__PORT) to another number."
            ) from error
        yield listening


class Stop:
    """Set by Ctrl-C, SIGTERM, or a role that failed. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.error: BaseException | None = None

    def listen(self) -> None:
        """Take over the signals of this process."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        if self._event.is_set():
            os._exit(130)  # the data is safe whenever we die; only politeness is lost
        self._event.set()

    def fail(self, error: BaseException) -> None:
        """Stop because something is broken."""
        if not self._event.is_set():
            _log.error("a role ended unexpectedly, stopping", exc_info=error)
            self.error = error
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()


async def keep_running(server: EmbeddedServer | None, stop: Stop) -> None:
    """Wait until stopped; meanwhile start the embedded server again whenever it dies."""
    stopped = asyncio.create_task(stop.wait())
    try:
        while server is not None:
            died = asyncio.create_task(server.died())
            await asyncio.wait({stopped, died}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                died.cancel()
                return
            _log.error("the embedded MongoDB server died, starting it again", exit_code=died.result())
            server.restart()
            _log.info("the embedded MongoDB server is back")
        await stopped
    finally:
        stopped.cancel()
