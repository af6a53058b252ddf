"""Test that the API responds with 503 in time while the database is killed or suspended, and recovers without help."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from jobledger.ledger.mongo.embedded import EmbeddedServer
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.event_store import EventStore
from tests.api.conftest import Api, run_api
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.soak_only import soak_only
from tests.support.suspension import suspend

pytestmark = needs_local_mongod

CONNECT_TIMEOUT_MS = 1000
RESPONSE_SECONDS = 40.0
RECOVERY_SECONDS = 40.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A MongoDB server that only this test uses, so that it can be killed."""
    with EmbeddedServer.start(tmp_path / "server", oplog_mb=990) as server:
        yield server
        os.kill(server.pid, signal.SIGCONT)


@pytest.fixture
async def api(server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    """An API with all roles and short timeouts: an append fails after 4 seconds instead of 30."""
    monkeypatch.setattr(
        "jobledger.cli.composition.EventStore", partial(EventStore, limits=EventStoreLimits(append_timeout_seconds=4))
    )
    mongodb = {"uri": server.uri, "db_name": "outage", "connect_timeout_ms": CONNECT_TIMEOUT_MS}
    async for api in run_api(server.uri, "outage", tmp_path, mongodb=mongodb):
        yield api


async def check_unavailable(api: Api, method: str, path: str, seconds: float = RESPONSE_SECONDS) -> None:
    """Check that a request gets the 503 of the API within `seconds`."""
    start = time.monotonic()
    content = {"job_type": "echo", "parameters": {}} if method == "POST" else None
    response = await api.http.request(method, path, json=content, timeout=seconds)
    assert response.status_code == 503, f"{path}: {response.text}"
    assert response.json()["code"] == "database_unavailable"
    assert int(response.headers["retry-after"]) > 0
    assert "Traceback" not in response.text
    assert time.monotonic() - start < seconds


async def is_stream_unavailable(api: Api) -> bool:
    async with api.http.stream("GET", "/api/ledger/stream", headers=api.principal_headers) as response:
        return response.status_code == 503


async def check_recovery(api: Api) -> None:
    """Repeat a submission while the API responds with 503, as a client should, until the job is completed."""
    deadline = time.monotonic() + RECOVERY_SECONDS
    while True:
        response = await api.post("/api/events/jobs", {"job_type": "echo", "parameters": {}})
        if response.status_code == 202:
            break
        assert response.status_code == 503, response.text
        assert time.monotonic() < deadline, "the API does not reconnect to the database"
    job_id = response.json()["job_id"]
    while await is_stream_unavailable(api):  # until the change stream is reopened, which access checks depend on
        assert time.monotonic() < deadline, "the API does not reopen the change stream"
        await asyncio.sleep(0.1)
    job = await api.wait_until_finished(job_id)
    assert job["status"] == "completed"
    assert (await api.get("/readyz")).status_code == 200


async def test_killed_database_gives_503_until_it_returns(api: Api, server: EmbeddedServer) -> None:
    job_id = await api.submit()
    await api.wait_until_finished(job_id)
    os.kill(server.pid, signal.SIGKILL)
    await server.wait_exited()

    for path in ("/api/events/jobs", f"/api/events/jobs/{job_id}", "/api/events/files/x", "/readyz"):
        await check_unavailable(api, "GET", path, 10)
    assert (await api.get("/healthz")).status_code == 200
    await check_unavailable(api, "POST", "/api/events/jobs", 15)

    await server.restart()
    await check_recovery(api)
    assert (await api.get(f"/api/events/jobs/{job_id}")).json()["job"]["status"] == "completed"


async def test_readyz_with_suspended_database_gives_503_within_seconds(api: Api, server: EmbeddedServer) -> None:
    assert (await api.get("/readyz")).status_code == 200
    suspend(server.pid)
    try:
        await check_unavailable(api, "GET", "/readyz", 7)  # without a time limit, until the driver's next heartbeat
    finally:
        os.kill(server.pid, signal.SIGCONT)


@soak_only
async def test_suspended_database_gives_503_in_bounded_time(api: Api, server: EmbeddedServer) -> None:
    job_id = await api.submit()
    await api.wait_until_finished(job_id)
    suspend(server.pid)
    try:
        for path in ("/api/events/jobs", f"/api/events/jobs/{job_id}", "/readyz"):
            await check_unavailable(api, "GET", path)
        assert (await api.get("/healthz")).status_code == 200
    except httpx.ReadTimeout:
        pytest.fail(f"no response within {RESPONSE_SECONDS} s while the database is suspended")
    finally:
        os.kill(server.pid, signal.SIGCONT)
    await check_recovery(api)
