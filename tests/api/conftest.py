"""Run the API and other roles in the test's process, with an HTTP client and a separate database."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    aclosing,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import httpx
import orjson
import pytest
from anyio.from_thread import start_blocking_portal
from pymongo import MongoClient

from jobledger.api.auth.permissions import AuthBackend
from jobledger.cli.composition import ALL_ROLES, Role, start_roles
from jobledger.cli.settings_file import read_settings
from jobledger.ledger.domain.events import EventMetadata, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Database
from jobledger.ledger.store.command_handler import Command, handle_command
from jobledger.ledger.store.event_store import EventStore
from tests.support.header_auth import HeaderAuthBackend, principal_header
from tests.support.polling import DEADLINE_SECONDS

TERMINAL_EVENT_TYPES = ("JobCompleted", "JobFailed", "JobCancelled")
TEST_METADATA = EventMetadata("test")
WITHOUT_WORKER: frozenset[Role] = frozenset({"api", "projector"})
"""Roles with which submitted jobs stay pending."""
BACKEND_NAME = "jobledger.cli.hosting.server.SingleUserBackend"
"""The authentication that tests replace."""
NO_TRUSTED_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Loading the system's certificates takes a fifth of the start-up time."""


@dataclass(frozen=True)
class Api:
    """HTTP client, database and event store of a test."""

    http: httpx.AsyncClient
    db: Database
    event_store: EventStore
    store: Path
    principal_headers: dict[str, str] = field(default_factory=dict)
    failures: list[BaseException] = field(default_factory=list)
    """Exceptions of roles that ended unexpectedly."""

    @property
    def url(self) -> str:
        """The base URL without a slash at the end."""
        return str(self.http.base_url).rstrip("/")

    @property
    def origin_header(self) -> dict[str, str]:
        """The header that a browser sends with a request from a page of this API."""
        return {"Origin": self.url}

    def as_user(self, user_id: str = "", groups: Collection[str] = (), roles: Collection[str] = ()) -> Api:
        """Return a copy with another principal. Requires the fixture `header_auth`."""
        return replace(self, principal_headers=principal_header(user_id, groups, roles))

    async def post(self, path: str, content: Any = None, **headers: str) -> httpx.Response:
        headers |= self.principal_headers
        return (
            await self.http.post(path, json=content, headers=headers)
            if content is not None
            else (await self.http.post(path, headers=headers))
        )

    async def submit(self, parameters: dict[str, Any] | None = None, **fields: Any) -> str:
        """Submit an echo job and return its ID."""
        response = await self.post("/api/events/jobs", {"job_type": "echo", "parameters": parameters or {}, **fields})
        assert response.status_code == 202, response.text
        return str(response.json()["job_id"])

    async def submit_batch(self, *parameters: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """Submit a batch with one echo job for each of the `parameters` and return the response."""
        jobs = [{"job_type": "echo", "parameters": job_parameters} for job_parameters in parameters]
        response = await self.post("/api/events/batches", {"jobs": jobs, **fields})
        assert response.status_code == 202, response.text
        content: dict[str, Any] = response.json()
        return content

    async def handle_commands(
        self, stream: str, *commands: Command, meta: EventMetadata = TEST_METADATA
    ) -> list[RecordedEvent]:
        """Handle commands one after the other without HTTP and return all their events."""
        recorded: list[RecordedEvent] = []
        for command in commands:
            recorded += (await handle_command(self.event_store, stream, command, meta=meta)).events
        return recorded

    async def check_no_request_recorded(self, *, after: int) -> None:
        """Check that the log has no event after this position, except the projector's for earlier batches."""
        for event in await self.event_store.read(after=after):
            assert event.meta.actor == "system", event
            assert event.type in ("BatchFinished", "BatchReopened"), event

    async def wait_for_event(self, stream: str, *types: str) -> dict[str, Any]:
        """Wait for an event of a job or batch and until the views contain it. Return the event."""
        key = "batch_id" if stream.startswith("batch-") else "job_id"
        async with asyncio.timeout(DEADLINE_SECONDS), aclosing(self.stream_events(after=0, **{key: stream})) as events:
            async for event in events:
                if event["type"] in types and event["stream"] == stream:
                    await self.get("/api/monitoring/events/stats", event["position"])
                    return event
        raise AssertionError("the live stream ended")

    async def wait_until_finished(self, job_id: str) -> dict[str, Any]:
        """Wait until a job finished and return it."""
        event = await self.wait_for_event(job_id, *TERMINAL_EVENT_TYPES)
        response = await self.get(f"/api/events/jobs/{job_id}", event["position"])
        job: dict[str, Any] = response.json()["job"]
        return job

    async def get(self, path: str, position: int | str | None = None, **headers: str) -> httpx.Response:
        """Send a GET request that waits until the views reach `position`."""
        if position is not None:
            headers["Ledger-Position"] = str(position)
        return await self.http.get(path, headers=headers | self.principal_headers)

    async def stream_events(self, **query: Any) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of the live stream; each has its `id:` in `sse_id`."""
        headers = {"Last-Event-ID": str(query.pop("last_event_id"))} if "last_event_id" in query else {}
        headers |= self.principal_headers
        async with self.http.stream("GET", "/api/ledger/stream", params=query, headers=headers) as response:
            assert response.status_code == 200, await response.aread()
            sse_id = None
            async for line in response.aiter_lines():
                if line.startswith("id:"):
                    sse_id = line.removeprefix("id:").strip()
                if line.startswith("data:"):
                    yield {**orjson.loads(line.removeprefix("data:")), "sse_id": sse_id}

    async def take_events(self, number: int, **query: Any) -> list[dict[str, Any]]:
        """Return the first `number` events of the live stream."""
        taken: list[dict[str, Any]] = []
        async with asyncio.timeout(DEADLINE_SECONDS), aclosing(self.stream_events(**query)) as events:
            async for event in events:
                taken.append(event)
                if len(taken) == number:
                    break
        return taken


def check_error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check the status and the error object of a response. Return the error object."""
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "application/json"
    content: dict[str, Any] = response.json()
    assert content.keys() == {"status", "code", "message", "details"}
    assert (content["status"], content["code"]) == ("error", code)
    assert content["message"]
    assert "Traceback" not in response.text
    assert "pydantic" not in response.text.lower()
    return content


def make_settings(uri: str, db_name: str, directory: Path, **sections: dict[str, Any]) -> Any:
    """Return settings with the database and directory of a test."""
    defaults: dict[str, dict[str, Any]] = {
        "mongodb": {"uri": uri, "db_name": db_name},
        "api": {"port": 0, "max_streams_per_user": 0, "auth_failures_per_minute": 0},
        "event_worker": {"retry_base_seconds": 0.2, "shutdown_grace_seconds": 0},
        "results": {"store": str(directory / "results")},
        "logging": {"level": "warning"},
    }
    names = defaults.keys() | sections.keys()
    merged = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in names}
    settings, _ = read_settings(None, merged, defaults_only=True)
    return settings


def create_client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=DEADLINE_SECONDS, trust_env=False, verify=NO_TRUSTED_CERTIFICATES)


async def run_api(
    uri: str, db_name: str, directory: Path, roles: frozenset[Role] = ALL_ROLES, **sections: dict[str, Any]
) -> AsyncIterator[Api]:
    """Run roles and yield the API. A role that ends unexpectedly fails the test.

    Args:
        uri: The MongoDB server.
        db_name: The database of the test.
        directory: Where result files are stored.
        roles: The roles to run.
        sections: Settings by section, in addition to those of `make_settings`.
    """
    settings = make_settings(uri, db_name, directory, **sections)
    failures: list[BaseException] = []
    async with (
        start_roles(settings, settings.mongodb.make_connection(uri), roles, on_failure=failures.append) as running,
        create_client(running.url or "") as client,
    ):
        yield Api(client, running.db, running.event_store, directory / "results", failures=failures)
    assert not failures


@pytest.fixture
def header_auth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Authenticate by a header (tests/support/header_auth.py). Must come before the fixture that runs the API."""
    monkeypatch.setattr(BACKEND_NAME, create_header_auth_backend)


def create_header_auth_backend(_user_id: str) -> HeaderAuthBackend:
    return HeaderAuthBackend()


@pytest.fixture
async def api(mongodb_uri: str, db_name: str, tmp_path: Path) -> AsyncIterator[Api]:
    """An API with all roles."""
    async for api in run_api(mongodb_uri, db_name, tmp_path):
        yield api


@pytest.fixture
async def api_without_worker(mongodb_uri: str, db_name: str, tmp_path: Path) -> AsyncIterator[Api]:
    """An API without a worker. Submitted jobs stay pending."""
    async for api in run_api(mongodb_uri, db_name, tmp_path, WITHOUT_WORKER):
        yield api


@pytest.fixture
async def header_auth_api(header_auth: None, mongodb_uri: str, db_name: str, tmp_path: Path) -> AsyncIterator[Api]:
    """An API without a worker that authenticates by a header (tests/support/header_auth.py)."""
    async for api in run_api(mongodb_uri, db_name, tmp_path, WITHOUT_WORKER):
        yield api


RunApi = Callable[..., AbstractAsyncContextManager[Api]]
"""Runs an API without a worker with the given sections of settings."""


@pytest.fixture
def run_without_worker(mongodb_uri: str, db_name: str, tmp_path: Path) -> RunApi:
    """The context manager that runs an API without a worker, for tests with their own settings."""

    @asynccontextmanager
    async def run(**sections: dict[str, Any]) -> AsyncIterator[Api]:
        running = run_api(mongodb_uri, db_name, tmp_path, WITHOUT_WORKER, **sections)
        async with aclosing(cast("AsyncGenerator[Api, None]", running)) as apis:
            async for api in apis:
                yield api

    return run


# An API for all tests of a module -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ApiInThread:
    """An API without a worker. Its event loop runs in another thread, so each test has its own event loop."""

    url: str
    connection: Connection
    store: Path
    failures: list[BaseException]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Api]:
        """Yield the API with an HTTP client and an event store of the current event loop.

        A role that has ended unexpectedly fails the test.
        """
        async with create_client(self.url) as http, self.connection.create_client() as mongo:
            event_store = EventStore(mongo[self.connection.db_name])
            yield Api(http, mongo[self.connection.db_name], event_store, self.store)
            await event_store.aclose()
        assert not self.failures


RunApiInThread = Callable[..., AbstractContextManager[ApiInThread]]
"""Runs an API without a worker on a new database. The optional argument creates another backend of authentication."""


@pytest.fixture(scope="module")
def run_in_thread(
    mongodb_uri: str,
    mongodb_client: MongoClient[dict[str, Any]],
    cleanup_executor: ThreadPoolExecutor,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunApiInThread:
    """The context manager that runs an API for all tests of a module."""

    @contextmanager
    def run(create_backend: Callable[[str], AuthBackend] | None = None) -> Iterator[ApiInThread]:
        connection = Connection(mongodb_uri, f"test_{uuid4().hex[:16]}")
        running = asynccontextmanager(run_api)(
            mongodb_uri, connection.db_name, tmp_path_factory.mktemp("api"), WITHOUT_WORKER
        )
        try:
            with pytest.MonkeyPatch.context() as monkeypatch, start_blocking_portal() as portal:
                if create_backend is not None:
                    monkeypatch.setattr(BACKEND_NAME, create_backend)
                with portal.wrap_async_context_manager(running) as api:
                    monkeypatch.undo()  # the tests of the module may run other APIs
                    yield ApiInThread(api.url, connection, api.store, api.failures)
        finally:
            cleanup_executor.submit(mongodb_client.drop_database, connection.db_name)

    return run


@pytest.fixture(scope="module")
def api_of_module(run_in_thread: RunApiInThread) -> Iterator[ApiInThread]:
    """An API without a worker. Tests use it by `shared_api`."""
    with run_in_thread() as api:
        yield api


@pytest.fixture(scope="module")
def header_auth_api_of_module(run_in_thread: RunApiInThread) -> Iterator[ApiInThread]:
    """Like `api_of_module`, but authenticates by a header. Tests use it by `shared_header_auth_api`."""
    with run_in_thread(create_header_auth_backend) as api:
        yield api


@pytest.fixture
async def shared_api(api_of_module: ApiInThread) -> AsyncIterator[Api]:
    """An API without a worker for all tests of a module. A test asserts only about jobs that it added itself."""
    async with api_of_module.open() as api:
        yield api


@pytest.fixture
async def shared_header_auth_api(header_auth_api_of_module: ApiInThread) -> AsyncIterator[Api]:
    """Like `shared_api`, but authenticates by a header (tests/support/header_auth.py)."""
    async with header_auth_api_of_module.open() as api:
        yield api
