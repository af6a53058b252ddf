"""Live streams under load and in trouble: a thousand at once, clients that do not read, a server that stops."""

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
from tests.api.conftest import DEADLINE_SECONDS, Api, run_api
from tests.support.mongodb_provider import needs_local_mongod

CLIENTS = 1000
SOME_KB = 60


def memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def open_streams() -> int:
    return sum(task.get_name() == "live" for task in asyncio.all_tasks())


def connections(api: Api) -> int:
    """How many connections the server holds."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]]
    port = f":{api.http.base_url.port:04X}"
    return sum(row[1].endswith(port) and row[3] == "01" for row in rows)


@asynccontextmanager
async def connected(api: Api, path: str, **headers: str) -> AsyncIterator[tuple[asyncio.StreamReader, socket.socket]]:
    """A bare connection that has asked for a stream. What it has not read stays with the server."""
    url = api.http.base_url
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    wire.settimeout(0)
    await asyncio.get_running_loop().sock_connect(wire, (url.host, url.port))
    # The reader takes 4 KB at most before somebody asks it for more.
    reader, writer = await asyncio.open_connection(sock=wire, limit=2048)
    lines = [f"GET {path} HTTP/1.1", f"Host: {url.host}", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    try:
        yield reader, wire
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def read_until(reader: asyncio.StreamReader, text: bytes) -> None:
    seen = b""
    while text not in seen:
        part = await reader.read(65536)
        assert part, f"the stream has ended without {text!r}"
        seen = seen[-200:] + part


# Many ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("header_auth")
async def test_a_thousand_clients_share_one_change_stream_and_all_hear_within_seconds(api_without_worker: Api) -> None:
    first = await api_without_worker.submit(access_control={"visibility": "public"})
    before = memory_mb()
    async with asyncio.timeout(3 * DEADLINE_SECONDS), AsyncExitStack() as stack:
        readers = []
        for number in range(CLIENTS):  # half of them may see everything, half what is public
            who = {"X-Test-Principal": f"user-{number};;"} if number % 2 else {}
            connection = connected(api_without_worker, "/api/ledger/stream?after=0", **who)
            readers.append((await stack.enter_async_context(connection))[0])
        await asyncio.gather(*(read_until(reader, first.encode()) for reader in readers))
        assert open_streams() == CLIENTS
        begun = time.monotonic()
        job_id = await api_without_worker.submit(access_control={"visibility": "public"})
        await asyncio.gather(*(read_until(reader, job_id.encode()) for reader in readers))
        seconds, grown = time.monotonic() - begun, memory_mb() - before
        assert seconds < 10
        assert grown < 250, "both ends of all connections are in this process"
        assert await change_streams(api_without_worker) == 1
    async with asyncio.timeout(DEADLINE_SECONDS):
        while open_streams():  # noqa: ASYNC110 - for what no event tells
            await asyncio.sleep(0.05)


async def change_streams(api: Api) -> int:
    pipeline: list[dict[str, Any]] = [
        {"$currentOp": {"allUsers": True, "idleCursors": True}},
        {
            "$match": {
                "ns": {"$regex": f"^{api.db.name}\\."},
                "cursor.originatingCommand.pipeline.0.$changeStream": {"$exists": True},
            }
        },
    ]
    async with await api.db.client.admin.aggregate(pipeline) as found:
        return len(await found.to_list())


# Slow ---------------------------------------------------------------------------------------------------------------


async def large_jobs(api: Api, number: int) -> None:
    jobs = [{"job_type": "echo", "parameters": {"text": "x" * SOME_KB * 1024}} for _ in range(20)]
    for _ in range(number // 20):
        answer = await api.post("/api/events/batches", {"jobs": jobs})
        assert answer.status_code == 202


async def test_a_client_that_does_not_read_is_cut_and_nothing_is_kept_for_it(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.api.http.sse.SEND_TIMEOUT_SECONDS", 1.0)
    await large_jobs(api_without_worker, 300)  # 18 MB, more than lies between two sockets
    before, held = memory_mb(), connections(api_without_worker)
    async with asyncio.timeout(DEADLINE_SECONDS), AsyncExitStack() as stack:
        readers = []
        for _ in range(10):
            connection = connected(api_without_worker, "/api/ledger/stream?after=0")
            readers.append((await stack.enter_async_context(connection))[0])
        await asyncio.gather(*(reader.readline() for reader in readers))
        most = before
        while open_streams():
            most = max(most, memory_mb())
            await asyncio.sleep(0.05)
        assert most - before < 80, "for ten clients that have read nothing of 18 MB"
        while connections(api_without_worker) > held:  # noqa: ASYNC110 - for what no event tells
            await asyncio.sleep(0.05)
        read = 0
        with suppress(ConnectionError):
            while part := await readers[0].read(65536):
                read += len(part)
                assert not part.endswith(b"0\r\n\r\n"), "ended in good order, and not cut"
        assert read < 300 * SOME_KB * 1024


async def test_a_client_that_reads_slowly_but_does_read_gets_everything(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.api.http.sse.SEND_TIMEOUT_SECONDS", 1.0)
    await large_jobs(api_without_worker, 300)
    last = await api_without_worker.submit()
    async with (
        asyncio.timeout(DEADLINE_SECONDS),
        connected(api_without_worker, "/api/ledger/stream?after=0") as (reader, _),
    ):
        begun, seen = time.monotonic(), b""
        while last.encode() not in seen:
            part = await reader.read(256 * 1024)
            assert part, "cut although it reads"
            seen = seen[-200:] + part
            await asyncio.sleep(0.001)
        assert time.monotonic() - begun > 1.0


# The end of things --------------------------------------------------------------------------------------------------


async def test_when_the_server_stops_its_streams_end_at_once(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    running = run_api(mongodb_uri, db_name, tmp_path, frozenset({"api", "projector"}))
    api = await anext(running)
    async with asyncio.timeout(DEADLINE_SECONDS), AsyncExitStack() as stack:
        readers = []
        for _ in range(50):
            connection = connected(api, "/api/ledger/stream")
            readers.append((await stack.enter_async_context(connection))[0])
        await asyncio.gather(*(read_until(reader, b"retry:") for reader in readers))
        begun = time.monotonic()
        await running.aclose()  # type: ignore[attr-defined]  # it is a generator
        assert time.monotonic() - begun < 2, "the server would wait for three seconds, and then cancel them"
        rests = await asyncio.gather(*(reader.read() for reader in readers))
        assert {rest[-5:] for rest in rests} == {b"0\r\n\r\n"}, "each ends in good order"


@needs_local_mongod
async def test_over_an_outage_of_the_database_a_client_misses_nothing(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path / "server", oplog_mb=990) as server:
        mongodb = {"uri": server.uri, "db_name": "away", "connect_timeout_ms": 1000}
        async for api in run_api(server.uri, "away", tmp_path, mongodb=mongodb):
            seen: list[int] = []
            watching = asyncio.create_task(_follow(api, seen))
            await api.wait_until_finished(await api.submit())
            os.kill(server.pid, signal.SIGKILL)
            await server.wait_exited()
            await asyncio.sleep(2)
            assert not watching.done()
            await server.restart()
            async with asyncio.timeout(2 * DEADLINE_SECONDS):
                while (answer := await api.post("/api/events/jobs", {"job_type": "echo", "parameters": {}})).is_error:
                    assert answer.status_code == 503
                    await asyncio.sleep(0.5)
                job_id = answer.json()["job_id"]
                while (await api.get(f"/api/ledger/events?stream={job_id}")).status_code == 503:  # noqa: ASYNC110 - it catches up
                    await asyncio.sleep(0.1)  # the process does not know yet who may see the job
                ended = await api.wait_for_event(job_id, "JobCompleted")
                while not seen or seen[-1] < ended["position"]:  # noqa: ASYNC110 - for what no event tells
                    await asyncio.sleep(0.05)
            watching.cancel()
            everything = await api.event_store.read(after=0)
            assert seen == [event.position for event in everything if event.type != "PositionVoided"][: len(seen)]


async def _follow(api: Api, seen: list[int]) -> None:
    """Read the stream as a browser does: come back after an interruption, with the last id."""
    while True:
        with suppress(httpx.HTTPError, AssertionError):
            async for event in api.stream_events(last_event_id=seen[-1] if seen else 0):
                seen.append(event["position"])
        await asyncio.sleep(0.1)
