"""cli: the composition of the API: its port, how one signs in, what its routes work with, and its server."""

from __future__ import annotations

import asyncio
import resource
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
from jobledger.api.auth.api_keys import KeyRing
from jobledger.api.auth.backends import Grants, JwtSignIn, KeySignIn, ProxyHeaders, ProxySignIn, TokenRules
from jobledger.api.auth.browser_sessions import Sessions
from jobledger.api.auth.jwks import KeysAt, KeySource, OneKey, public_key, shared_secret
from jobledger.api.auth.permissions import OpenSignIn, Revocations, SignIn
from jobledger.api.auth.signed_links import Links
from jobledger.api.auth.visibility import Visibility
from jobledger.api.completion_waiter import Endings
from jobledger.api.context import Services, Webhooks
from jobledger.api.dashboard.previews import Previews
from jobledger.api.http.memory_budget import MemoryBudget
from jobledger.api.http.middleware import Edge
from jobledger.api.http.sse import Streams
from jobledger.api.submission.parameters import ParametersValidator
from jobledger.cli.auth_settings import AuthSettings, JwtSettings
from jobledger.cli.http_connections import ConnectionLimits, SheddingSocket, protocol
from jobledger.cli.role_tasks import watcher
from jobledger.cli.settings import ApiSettings, Settings
from jobledger.ledger.domain.errors import ConfigurationError, os_failure
from jobledger.ledger.files.directory import FileStore
from jobledger.ledger.mongo.connection import Database
from jobledger.ledger.mongo.server_clock import clock_of
from jobledger.ledger.store.change_stream import Changes
from jobledger.ledger.store.event_store import EventLog
from jobledger.ledger.system.disk_space import MIB, StorageWatch
from jobledger.projections.engine.checkpoint import Checkpoint
from jobledger.projections.engine.health import StallWatch
from jobledger.workers.registry import processors, unusable_types

_MOST_FILES: Final = 65_536
_KEEP_ALIVE_SECONDS: Final = 30


def allow_many_connections() -> None:
    """Raise how many files may be open to what we may: by default that is 1024, and each client's connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """Open the port ourselves, so that a taken one is a clear error before anything else begins.

    Raises:
        ResourceUnavailable: it is taken, or the address is not there yet.
        ConfigurationError: it cannot be opened.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, else asyncio does not switch off Nagle's algorithm, and small answers wait 40 ms for an ACK.
    with SheddingSocket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(2048)  # bound is not enough: two may be bound to a port to which neither listens
        except OSError as error:
            raise os_failure(
                error,
                f"api.port: cannot listen on {host}:{port} ({error.strerror}); is another jobledger running? "
                "Stop it, or set api.port (JOBLEDGER_API__PORT) to another number.",
            ) from error
        yield listening


def services_for(
    settings: Settings, db: Database, log: EventLog, checkpoint: Checkpoint, changes: Changes, store: FileStore
) -> Services:
    """Return what the routes work with. Call before the change stream runs: some of it listens.

    Raises:
        ConfigurationError: the public key for tokens cannot be used.
    """
    endings = Endings()
    changes.listen(endings)
    stall_watch = StallWatch(log, checkpoint)
    changes.listen(stall_watch)
    public = urlsplit(settings.api.public_url).hostname if settings.api.public_url else None
    hosts = ("localhost", "127.0.0.1", "[::1]", settings.api.host, public)
    revocations = Revocations()
    sign_in = _sign_in(settings.auth, db, changes, revocations)
    return Services(
        db=db,
        log=log,
        checkpoint=checkpoint,
        changes=changes,
        store=store,
        job_types={name: processor.Parameters for name, processor in processors().items()},
        parameters=ParametersValidator(),
        previews=Previews(),
        memory=MemoryBudget(settings.api.request_memory_mb * 1024 * 1024),
        unusable_types=unusable_types(),
        largest_body_bytes=settings.api.max_body_bytes,
        allowed_hosts=tuple(dict.fromkeys(name for name in hosts if name)),
        sign_in=sign_in,
        sessions=_sessions(settings.auth, sign_in, db, changes, revocations),
        revocations=revocations,
        public_origin=settings.api.public_url,
        groups_of=sign_in.groups_of if isinstance(sign_in, KeySignIn) else lambda _user_id: frozenset[str](),
        endings=endings,
        visibility=Visibility(log, checkpoint),
        stall_watch=stall_watch,
        streams=Streams(),
        links=Links(db, settings.api.public_url),
        webhooks=Webhooks(settings.webhooks.sink, tuple(settings.webhooks.allow_private)),
        edge=_edge(settings),
        storage=_storage(settings),
    )


def _storage(settings: Settings) -> StorageWatch:
    """The disks of this machine that new jobs would fill."""
    directories = {}
    if isinstance(settings.results.store, Path):
        directories["results"] = settings.results.store
    if settings.mongodb.embedded:
        directories["data"] = settings.mongodb.data_dir
    return StorageWatch(directories, settings.results.reserve_mb * MIB)


def _edge(settings: Settings) -> Edge:
    api = settings.api
    return Edge(
        cors_origins=tuple(api.cors_origins),
        requests_per_second=api.requests_per_second,
        burst=api.burst,
        max_streams_per_user=api.max_streams_per_user,
        max_streams=api.max_streams,
        refused_sign_ins_per_minute=api.refused_sign_ins_per_minute,
        trusted_proxies=tuple(ip_network(it) for it in (*api.trusted_proxies, *settings.auth.proxy.trusted)),
        https=(api.public_url or "").startswith("https://"),
        access_log=settings.logging.access,
    )


def _sessions(
    auth: AuthSettings, sign_in: SignIn, db: Database, changes: Changes, revocations: Revocations
) -> Sessions | None:
    """Return the sessions of the dashboard, in the modes in which people sign in here."""
    if auth.mode not in ("keys", "jwt"):
        return None
    holder_of = sign_in.holder_of if isinstance(sign_in, KeySignIn) else None
    sessions = Sessions(db, revocations, policy=_policy(auth), holder_of=holder_of)
    changes.listen(sessions)
    return sessions


def _policy(auth: AuthSettings) -> str:
    """Return what identifies the sign-in settings: with other ones, such as another secret, all sessions end."""
    secret = auth.jwt.secret.get_secret_value() if auth.jwt.secret else ""
    return sha256(f"{auth.model_dump_json()}\0{secret}".encode()).hexdigest()


def _sign_in(auth: AuthSettings, db: Database, changes: Changes, revocations: Revocations) -> SignIn:
    """Return the way to sign in that is set.

    Raises:
        ConfigurationError: the public key cannot be used.
    """
    grants = Grants(frozenset(auth.admins), frozenset(auth.monitors))
    match auth.mode:
        case "open":
            return OpenSignIn("local")
        case "keys":
            ring = KeyRing(db, revocations)
            changes.listen(ring)
            return KeySignIn(ring, now=clock_of(db.client).estimate, anonymous_public=auth.anonymous_public)
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
        raise os_failure(
            error, f"auth.jwt.public_key_file: {jwt.public_key_file} cannot be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"auth.jwt.public_key_file: {jwt.public_key_file}: {error}") from error


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers: the process has its own, for all roles together."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serving(
    listening: socket.socket, settings: ApiSettings, services: Services, failed: Callable[[BaseException], None]
) -> AsyncIterator[str]:
    """Serve inside the block; yield where. `failed` is told if the server ends although nobody stopped it."""
    host, port = listening.getsockname()[:2]
    shown_host = f"[{host}]" if ":" in host else host
    limits = ConnectionLimits(
        settings.max_connections, settings.max_connections_per_address, services.edge.trusted_proxies
    )
    server = _Server(
        uvicorn.Config(
            create_app(services),
            http=protocol(limits),
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            ws="none",
            log_level="warning",
            access_log=False,
            proxy_headers=False,  # whom we trust to say who somebody is, auth.proxy says
            timeout_graceful_shutdown=3,
            lifespan="off",
        )
    )
    task = asyncio.create_task(server.serve(sockets=[listening]), name="api")
    task.add_done_callback(watcher(failed))
    try:
        yield settings.public_url or f"http://{shown_host}:{port}"
    finally:
        services.streams.close()
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)
        await services.parameters.close()
        await services.previews.close()
