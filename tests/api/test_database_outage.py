"""The database is killed or stands still: the API says so in time, and goes on by itself when it is back."""

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

pytestmark = needs_local_mongod

PATIENCE_MS = 1000  # mongodb.connect_timeout_ms: how long the driver looks for a server
ANSWER_SECONDS = 40.0
BACK_SECONDS = 40.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server of the test's own, which it may harm."""
    with EmbeddedServer.start(tmp_path / "server", oplog_mb=990) as server:
        yield server
        os.kill(server.pid, signal.SIGCONT)


@pytest.fixture
async def api(server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    """All roles, with less patience than usual: an append gives up after 4 seconds, not 30."""
    monkeypatch.setattr(
        "jobledger.cli.composition.EventStore", partial(EventStore, limits=EventStoreLimits(append_timeout_seconds=4))
    )
    mongodb = {"uri": server.uri, "db_name": "away", "connect_timeout_ms": PATIENCE_MS}
    async for running in run_api(server.uri, "away", tmp_path, mongodb=mongodb):
        yield running


async def refused_in_time(api: Api, method: str, path: str, seconds: float = ANSWER_SECONDS) -> None:
    """Check that a request is refused with 503, in the envelope, within so many seconds."""
    began = time.monotonic()
    content = {"job_type": "echo", "parameters": {}} if method == "POST" else None
    response = await api.http.request(method, path, json=content, timeout=seconds)
    assert response.status_code == 503, f"{path}: {response.text}"
    assert response.json()["code"] == "database_unavailable"
    assert int(response.headers["retry-after"]) > 0
    assert "Traceback" not in response.text
    assert time.monotonic() - began < seconds


async def is_behind(api: Api) -> bool:
    async with api.http.stream("GET", "/api/ledger/stream", headers=api.principal_headers) as response:
        return response.status_code == 503


async def accepted_again(api: Api) -> None:
    """Submit as a client should, again and again, until it is accepted; then the job is done."""
    deadline = time.monotonic() + BACK_SECONDS
    while True:
        response = await api.post("/api/events/jobs", {"job_type": "echo", "parameters": {}})
        if response.status_code == 202:
            break
        assert response.status_code == 503, response.text
        assert time.monotonic() < deadline, "the API does not find the database again"
    job_id = response.json()["job_id"]
    while await is_behind(
        api
    ):  # who may see what is known from the change stream, which is opened again a little later
        assert time.monotonic() < deadline, "the API does not find the change stream again"
        await asyncio.sleep(0.1)
    job = await api.wait_until_finished(job_id)
    assert job["status"] == "completed"
    assert (await api.get("/readyz")).status_code == 200


async def test_killed_database_gives_503_until_it_returns(api: Api, server: EmbeddedServer) -> None:
    before = await api.submit()
    await api.wait_until_finished(before)
    os.kill(server.pid, signal.SIGKILL)
    await server.wait_exited()

    for path in ("/api/events/jobs", f"/api/events/jobs/{before}", "/api/events/files/x", "/readyz"):
        await refused_in_time(api, "GET", path, 10)
    assert (await api.get("/healthz")).status_code == 200
    await refused_in_time(api, "POST", "/api/events/jobs", 15)

    await server.restart()
    await accepted_again(api)
    assert (await api.get(f"/api/events/jobs/{before}")).json()["job"]["status"] == "completed"


async def test_readyz_with_frozen_database_gives_503_within_seconds(api: Api, server: EmbeddedServer) -> None:
    assert (await api.get("/readyz")).status_code == 200
    os.kill(server.pid, signal.SIGSTOP)
    try:
        await refused_in_time(api, "GET", "/readyz", 7)  # without a limit it takes until the driver's next heartbeat
    finally:
        os.kill(server.pid, signal.SIGCONT)


@soak_only
async def test_frozen_database_gives_503_in_bounded_time(api: Api, server: EmbeddedServer) -> None:
    before = await api.submit()
    await api.wait_until_finished(before)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        for path in ("/api/events/jobs", f"/api/events/jobs/{before}", "/readyz"):
            await refused_in_time(api, "GET", path)
        assert (await api.get("/healthz")).status_code == 200
    except httpx.ReadTimeout:
        pytest.fail(f"no response within {ANSWER_SECONDS} s while the database stands still")
    finally:
        os.kill(server.pid, signal.SIGCONT)
    await accepted_again(api)
