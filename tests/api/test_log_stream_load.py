"""Live streams of the log: a thousand clients, clients that do not read, server shutdown and database outages."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobledger.ledger.mongo.embedded import EmbeddedServer
from tests.api.conftest import WITHOUT_WORKER, Api, run_api
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS, poll_until

MAX_DELAY_SECONDS = 30.0  # on a busy machine; about a second on an idle one
CLIENTS = 1000
ECHO: dict[str, Any] = {"job_type": "echo", "parameters": {}}
JOB_KB = 60


def measure_memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def count_open_streams() -> int:
    return sum(task.get_name() == "live" for task in asyncio.all_tasks())


def count_connections(api: Api) -> int:
    """Return the number of connections that the server has open."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]]
    port = f":{api.http.base_url.port:04X}"
    return sum(row[1].endswith(port) and row[3] == "01" for row in rows)


@asynccontextmanager
async def open_stream(api: Api, path: str, **headers: str) -> AsyncIterator[asyncio.StreamReader]:
    """Request a stream over a connection with small buffers, so that unread data stays in the server."""
    url = api.http.base_url
    client_socket = socket.socket()
    client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    client_socket.settimeout(0)
    await asyncio.get_running_loop().sock_connect(client_socket, (url.host, url.port))
    # The reader buffers at most 4 KB (twice the limit) before it stops reading.
    reader, writer = await asyncio.open_connection(sock=client_socket, limit=2048)
    lines = [f"GET {path} HTTP/1.1", f"Host: {url.host}", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    try:
        yield reader
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def read_until(reader: asyncio.StreamReader, text: bytes) -> None:
    received = b""
    while text not in received:
        chunk = await reader.read(65536)
        assert chunk, f"the stream ended without {text!r}"
        received = received[-200:] + chunk


# Many clients -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("header_auth")
async def test_thousand_clients_share_one_change_stream_and_get_events_in_seconds(api_without_worker: Api) -> None:
    first = await api_without_worker.submit(access_control={"visibility": "public"})
    before = measure_memory_mb()
    async with asyncio.timeout(3 * DEADLINE_SECONDS), AsyncExitStack() as stack:
        readers = []
        for number in range(CLIENTS):  # half of them are users, half anonymous
            principal = {"X-Test-Principal": f"user-{number};;"} if number % 2 else {}
            connection = open_stream(api_without_worker, "/api/ledger/stream?after=0", **principal)
            readers.append(await stack.enter_async_context(connection))
        await asyncio.gather(*(read_until(reader, first.encode()) for reader in readers))
        assert count_open_streams() == CLIENTS
        start = time.monotonic()
        job_id = await api_without_worker.submit(access_control={"visibility": "public"})
        await asyncio.gather(*(read_until(reader, job_id.encode()) for reader in readers))
        seconds, growth_mb = time.monotonic() - start, measure_memory_mb() - before
        assert seconds < MAX_DELAY_SECONDS
        assert growth_mb < 250, "server and clients together: both run in this process"
        assert await count_change_streams(api_without_worker) == 1
    await poll_until(lambda: not count_open_streams(), "all streams are closed")


async def count_change_streams(api: Api) -> int:
    pipeline: list[dict[str, Any]] = [
        {"$currentOp": {"allUsers": True, "idleCursors": True}},
        {
            "$match": {
                "ns": {"$regex": f"^{api.db.name}\\."},
                "cursor.originatingCommand.pipeline.0.$changeStream": {"$exists": True},
            }
        },
    ]
    async with await api.db.client.admin.aggregate(pipeline) as cursor:
        return len(await cursor.to_list())


# Slow clients -------------------------------------------------------------------------------------------------------


async def submit_large_jobs(api: Api, number: int) -> None:
    jobs = [{"job_type": "echo", "parameters": {"text": "x" * JOB_KB * 1024}} for _ in range(20)]
    for _ in range(number // 20):
        response = await api.post("/api/events/batches", {"jobs": jobs})
        assert response.status_code == 202


async def test_client_that_does_not_read_is_disconnected_and_uses_bounded_memory(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.api.http.sse.SEND_TIMEOUT_SECONDS", 1.0)
    await submit_large_jobs(api_without_worker, 300)  # 18 MB, more than the buffers of two sockets
    memory_before, connections_before = measure_memory_mb(), count_connections(api_without_worker)
    async with asyncio.timeout(DEADLINE_SECONDS), AsyncExitStack() as stack:
        readers = []
        for _ in range(10):
            connection = open_stream(api_without_worker, "/api/ledger/stream?after=0")
            readers.append(await stack.enter_async_context(connection))
        await asyncio.gather(*(reader.readline() for reader in readers))
        peak = memory_before
        while count_open_streams():
            peak = max(peak, measure_memory_mb())
            await asyncio.sleep(0.05)
        assert peak - memory_before < 80, "for ten clients that have read nothing of 18 MB"
        while count_connections(api_without_worker) > connections_before:  # noqa: ASYNC110 - no event signals it
            await asyncio.sleep(0.05)
        received_bytes = 0
        with suppress(ConnectionError):
            while chunk := await readers[0].read(65536):
                received_bytes += len(chunk)
                assert not chunk.endswith(b"0\r\n\r\n"), "the stream ended regularly instead of being cut"
        assert received_bytes < 300 * JOB_KB * 1024


async def test_client_that_reads_slowly_gets_all_events(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.api.http.sse.SEND_TIMEOUT_SECONDS", 1.0)
    await submit_large_jobs(api_without_worker, 300)
    last = await api_without_worker.submit()
    async with (
        asyncio.timeout(DEADLINE_SECONDS),
        open_stream(api_without_worker, "/api/ledger/stream?after=0") as reader,
    ):
        start, received = time.monotonic(), b""
        while last.encode() not in received:
            chunk = await reader.read(256 * 1024)
            assert chunk, "the server cut a client that reads"
            received = received[-200:] + chunk
            await asyncio.sleep(0.001)
        assert time.monotonic() - start > 1.0, "it took longer than the send timeout"


# Shutdown and outage ------------------------------------------------------------------------------------------------


async def test_server_shutdown_ends_streams_immediately(
    mongodb_uri: str, db_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "jobledger.cli.hosting.server._GRACEFUL_SHUTDOWN_SECONDS", 300
    )  # then the server cancels streams
    running = run_api(mongodb_uri, db_name, tmp_path, WITHOUT_WORKER)
    api = await anext(running)
    async with asyncio.timeout(DEADLINE_SECONDS), AsyncExitStack() as stack:
        readers = []
        for _ in range(50):
            connection = open_stream(api, "/api/ledger/stream")
            readers.append(await stack.enter_async_context(connection))
        await asyncio.gather(*(read_until(reader, b"retry:") for reader in readers))
        await running.aclose()  # type: ignore[attr-defined]  # run_api is a generator
        remainders = await asyncio.gather(*(reader.read() for reader in readers))
        assert {remainder[-5:] for remainder in remainders} == {b"0\r\n\r\n"}, "each stream ends regularly"


@needs_local_mongod
async def test_database_outage_loses_no_event_of_a_stream(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path / "server", oplog_mb=990) as server:
        mongodb = {"uri": server.uri, "db_name": "away", "connect_timeout_ms": 1000}
        async for api in run_api(server.uri, "away", tmp_path, mongodb=mongodb):
            positions: list[int] = []
            following = asyncio.create_task(follow_stream(api, positions))
            await api.wait_until_finished(await api.submit())
            os.kill(server.pid, signal.SIGKILL)
            await server.wait_exited()
            while (await api.get("/readyz")).status_code != 503:  # noqa: ASYNC110 - no event signals it
                await asyncio.sleep(0.1)
            assert not following.done()
            await server.restart()
            async with asyncio.timeout(2 * DEADLINE_SECONDS):
                while (response := await api.post("/api/events/jobs", ECHO)).is_error:
                    assert response.status_code == 503
                    await asyncio.sleep(0.5)
                job_id = response.json()["job_id"]
                while (await api.get(f"/api/ledger/events?stream={job_id}")).status_code == 503:  # noqa: ASYNC110 - no event signals it
                    await asyncio.sleep(0.1)  # the process has not loaded yet who may see the job
                completed = await api.wait_for_event(job_id, "JobCompleted")
                while not positions or positions[-1] < completed["position"]:  # noqa: ASYNC110 - no event signals it
                    await asyncio.sleep(0.05)
            following.cancel()
            stored = [event.position for event in await api.event_store.read(after=0) if event.type != "PositionVoided"]
            assert positions == stored[: len(positions)]


async def follow_stream(api: Api, positions: list[int]) -> None:
    """Read the stream as a browser does: reconnect after an interruption, with the last ID."""
    while True:
        with suppress(httpx.HTTPError, AssertionError):
            async for event in api.stream_events(last_event_id=positions[-1] if positions else 0):
                positions.append(event["position"])
        await asyncio.sleep(0.1)
