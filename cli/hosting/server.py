"""Compose the API: its listener, authentication, context and HTTP server."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from hashlib import sha256
from ipaddress import ip_network
from pathlib import Path
from typing import Final, assert_never
from urllib.parse import urlsplit

import uvicorn

from jobledger.api.app import create_app
from jobledger.api.auth.api_keys import ApiKeyCache
from jobledger.api.auth.backends import ApiKeyBackend, JwtBackend, ProxyBackend
from jobledger.api.auth.browser_sessions import BrowserSessions
from jobledger.api.auth.jwks import JwksKeySource, KeySource, StaticKeySource, create_hs256_key, load_public_key
from jobledger.api.auth.permissions import AuthBackend, RevocationNotifier, SingleUserBackend
from jobledger.api.auth.signed_links import SignedLinks
from jobledger.api.auth.stream_access import StreamAccessCache
from jobledger.api.context import ApiContext, SubmissionDefaults
from jobledger.api.finish_notifier import FinishNotifier
from jobledger.api.http.memory_budget import MemoryBudget
from jobledger.api.http.sse import LiveStreams
from jobledger.api.processes.markdown_previewer import MarkdownPreviewer
from jobledger.api.processes.parameter_validator import ParameterValidator
from jobledger.api.settings import AuthSettings, JwtSettings
from jobledger.cli.hosting.background_tasks import run_in_background
from jobledger.cli.hosting.http_connection import ConnectionLimits, LoadSheddingSocket, create_protocol_class
from jobledger.cli.settings import Settings
from jobledger.ledger.domain.errors import ConfigurationError, classify_os_error
from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.mongo.connection import Database
from jobledger.ledger.mongo.server_clock import get_server_clock
from jobledger.ledger.net.url_policy import AllowedHosts
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.system.disk_space import MIB, DiskSpaceMonitor
from jobledger.projections.engine.checkpoint import CheckpointFollower
from jobledger.projections.engine.dispatcher import Dispatcher
from jobledger.projections.engine.stalls import StallDetector
from jobledger.workers.processor import Processor
from jobledger.workers.registry import get_default_timeout, get_retry, get_unusable_job_types, load_processors

_KEEP_ALIVE_SECONDS: Final = 30
_GRACEFUL_SHUTDOWN_SECONDS: Final = 3


@contextmanager
def open_listener(host: str, port: int) -> Iterator[socket.socket]:
    """Open the port. The server does not, so that a port in use is a clear error before anything else starts.

    Raises:
        ResourceUnavailable: The port is in use, or the address does not exist yet.
        ConfigurationError: The port cannot be opened.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol given, asyncio disables Nagle's algorithm; otherwise small responses wait 40 ms for an ACK.
    with LoadSheddingSocket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(2048)  # bind() alone succeeds for two sockets as long as neither listens
        except OSError as error:
            raise classify_os_error(
                error,
                f"api.port: cannot listen on {host}:{port} ({error.strerror}). "
                "Stop the process that uses the port, or use another port: api.port (JOBLEDGER_API__PORT).",
            ) from error
        yield listener


def build_context(
    settings: Settings,
    db: Database,
    event_store: EventStore,
    checkpoint: CheckpointFollower,
    change_stream: ChangeStream,
    store: FileStore,
) -> ApiContext:
    """Return the context of the routes. Call it before the change stream runs, because it adds listeners.

    Raises:
        ConfigurationError: The public key for tokens cannot be used.
    """
    finish_notifier = FinishNotifier()
    change_stream.add_listener(finish_notifier)
    stall_detector = StallDetector(event_store, checkpoint)
    change_stream.add_listener(stall_detector)
    public_host = urlsplit(settings.api.public_url).hostname if settings.api.public_url else None
    hosts = ("localhost", "127.0.0.1", "[::1]", settings.api.host, public_host)
    revocations = RevocationNotifier()
    backend = _make_auth_backend(settings.auth, db, change_stream, revocations)
    return ApiContext(
        db=db,
        event_store=event_store,
        checkpoint=checkpoint,
        change_stream=change_stream,
        file_store=store,
        job_types={name: processor.Parameters for name, processor in load_processors().items()},
        parameter_validator=ParameterValidator(),
        markdown_previewer=MarkdownPreviewer(),
        memory_budget=MemoryBudget(settings.api.request_memory_mb * 1024 * 1024),
        unavailable_job_types=get_unusable_job_types(),
        allowed_hosts=tuple(dict.fromkeys(name for name in hosts if name)),
        auth_backend=backend,
        browser_sessions=_make_browser_sessions(settings.auth, backend, db, change_stream, revocations),
        revocation_notifier=revocations,
        get_groups=backend.keys.get_groups if isinstance(backend, ApiKeyBackend) else lambda _user_id: frozenset[str](),
        finish_notifier=finish_notifier,
        stream_access=StreamAccessCache(event_store, checkpoint),
        stall_detector=stall_detector,
        dispatcher=Dispatcher(db, event_store, checkpoint, change_stream),
        live_streams=LiveStreams(),
        signed_links=SignedLinks(db, settings.api.public_url),
        allowed_webhook_hosts=AllowedHosts(settings.webhooks.allowed_private_hosts),
        is_webhook_echo_enabled=settings.webhooks.echo_enabled,
        settings=settings.api,
        trusted_proxies=[ip_network(text) for text in (*settings.api.trusted_proxies, *settings.auth.proxy.trusted)],
        has_access_log=settings.logging.access_log,
        disk_monitor=_make_disk_monitor(settings),
        submission_defaults={name: _get_defaults(processor) for name, processor in load_processors().items()},
    )


def _get_defaults(processor: type[Processor]) -> SubmissionDefaults:
    retry = get_retry(processor)
    return SubmissionDefaults(
        max_attempts=retry.max_attempts if retry is not None else 1,
        timeout_s=get_default_timeout(processor),
        is_retried=retry is not None,
    )


def _make_disk_monitor(settings: Settings) -> DiskSpaceMonitor:
    """Return the monitor of the disks that new jobs would fill."""
    directories = {}
    if isinstance(settings.results.store, Path):
        directories["results"] = settings.results.store
    if settings.mongodb.is_embedded:
        directories["data"] = settings.mongodb.data_dir
    return DiskSpaceMonitor(directories, settings.results.min_free_mb * MIB)


def _make_browser_sessions(
    auth: AuthSettings, backend: AuthBackend, db: Database, change_stream: ChangeStream, revocations: RevocationNotifier
) -> BrowserSessions | None:
    """Return the sessions of the dashboard, or None in modes without its sign-in page."""
    if auth.mode not in ("keys", "jwt"):
        return None
    is_key_valid = backend.keys.is_valid if isinstance(backend, ApiKeyBackend) else lambda _key_id: False
    sessions = BrowserSessions(db, revocations, policy=_compute_policy_digest(auth), is_key_valid=is_key_valid)
    change_stream.add_listener(sessions)
    return sessions


def _compute_policy_digest(auth: AuthSettings) -> str:
    """Return a digest of the authentication settings. All sessions end when it changes, for example with a secret."""
    secret = auth.jwt.secret.get_secret_value() if auth.jwt.secret else ""
    return sha256(f"{auth.model_dump_json()}\0{secret}".encode()).hexdigest()


def _make_auth_backend(
    auth: AuthSettings, db: Database, change_stream: ChangeStream, revocations: RevocationNotifier
) -> AuthBackend:
    """Return the backend of the configured mode.

    Raises:
        ConfigurationError: The public key cannot be used.
    """
    match auth.mode:
        case "open":
            return SingleUserBackend("local")
        case "keys":
            cache = ApiKeyCache(db, revocations, now=get_server_clock(db.client).estimate)
            change_stream.add_listener(cache)
            return ApiKeyBackend(auth, cache)
        case "jwt":
            return JwtBackend(auth, _make_key_source(auth.jwt))
        case "proxy":
            return ProxyBackend(auth)
        case _:
            assert_never(auth.mode)


def _make_key_source(jwt: JwtSettings) -> KeySource:
    if jwt.jwks_url is not None:
        return JwksKeySource(jwt.jwks_url)
    if jwt.public_key_file is None:
        assert jwt.secret is not None  # noqa: S101 - AuthSettings requires one of the three
        return StaticKeySource(create_hs256_key(jwt.secret.get_secret_value()))
    try:
        return StaticKeySource(load_public_key(jwt.public_key_file.read_bytes()))
    except OSError as error:
        raise classify_os_error(
            error, f"auth.jwt.public_key_file: {jwt.public_key_file} cannot be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"auth.jwt.public_key_file: {jwt.public_key_file}: {error}") from error


class BackgroundServer(uvicorn.Server):
    """Uvicorn without its signal handlers: the process handles signals for all roles."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serve_api(
    listener: socket.socket, context: ApiContext, on_failure: Callable[[BaseException], None]
) -> AsyncIterator[str]:
    """Serve inside the block. Yield the URL. `on_failure` is called with the exception if the server fails."""
    settings = context.settings
    host, port = listener.getsockname()[:2]
    shown_host = f"[{host}]" if ":" in host else host
    limits = ConnectionLimits(settings.max_connections, settings.max_connections_per_address, context.trusted_proxies)
    server = BackgroundServer(
        uvicorn.Config(
            create_app(context),
            http=create_protocol_class(limits),
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            ws="none",
            log_level="warning",
            access_log=False,
            proxy_headers=False,  # auth.proxy and api.trusted_proxies define the trusted proxies
            timeout_graceful_shutdown=_GRACEFUL_SHUTDOWN_SECONDS,
            lifespan="off",
        )
    )

    def stop() -> None:
        context.live_streams.close()
        server.should_exit = True

    try:
        async with run_in_background(server.serve(sockets=[listener]), on_failure, stop=stop):
            yield settings.public_url or f"http://{shown_host}:{port}"
    finally:
        await context.parameter_validator.close()
        await context.markdown_previewer.close()
