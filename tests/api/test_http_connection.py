"""Test HTTP connections: ambiguous framing, slow clients, and the limits of connections and file descriptors."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from jobledger.api.http.memory_budget import MemoryBudget
from jobledger.cli.hosting.http_connection import (
    ConnectionLimits,
    HttpConnection,
    LoadSheddingSocket,
    create_protocol_class,
)
from tests.api.conftest import Api, RunApi
from tests.support.polling import DEADLINE_SECONDS, poll_until

JOBS, STREAM = "/api/events/jobs", "/api/ledger/stream"
HOST = "Host: 127.0.0.1\r\n"
POST = f"POST {JOBS} HTTP/1.1\r\n{HOST}Content-Type: application/json\r\n"
CHUNKED = f"{POST}Transfer-Encoding: chunked\r\n"
GET = "GET /healthz HTTP/1.1\r\n"


@asynccontextmanager
async def connect(api: Api) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(api.http.base_url.host, api.http.base_url.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def read_until_closed(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(DEADLINE_SECONDS):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


AMBIGUOUS_REQUESTS = [
    (f"{POST}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "ambiguous_length"),
    (f"{CHUNKED}Content-Length: 2\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n", "ambiguous_length"),
    (f"{POST}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}", "malformed_request"),
    (f"{POST}Content-Length: +2\r\n\r\n{{}}", "malformed_request"),
    (f"{POST}Content-Length: -1\r\n\r\n{{}}", "malformed_request"),
    (f"{POST}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "malformed_request"),
    (f"{POST}Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", "malformed_request"),
    (f"{POST}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", "malformed_request"),
    (f"{CHUNKED}\r\n-1\r\n{{}}\r\n0\r\n\r\n", "malformed_request"),
    (f"{CHUNKED}\r\n0x2\r\n{{}}\r\n0\r\n\r\n", "malformed_request"),
    (f"{CHUNKED}\r\n{'F' * 30}\r\n{{}}\r\n0\r\n\r\n", "malformed_request"),
    (f"{CHUNKED}\r\n2\r\n{{}}XX0\r\n\r\n", "malformed_request"),
    (f"{GET}{HOST}X-A: b\rX-B: c\r\n\r\n", "malformed_request"),
    (f"{GET}{HOST}X-A: b\0c\r\n\r\n", "malformed_request"),
    (f"{GET}\r\n", "malformed_request"),
    (f"{GET}{HOST}{HOST}\r\n", "malformed_request"),
    ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "malformed_request"),
]


async def test_ambiguous_framing_is_rejected_and_connection_closed(api_without_worker: Api) -> None:
    for request, code in AMBIGUOUS_REQUESTS:
        async with connect(api_without_worker) as (reader, writer):
            writer.write(request.encode("latin-1"))
            writer.write(f"{GET}{HOST}\r\n".encode())  # the smuggled request, which must get no response
            response = await read_until_closed(reader)
        assert response.count(b"HTTP/1.1 ") == 1, (request, response)
        assert response.startswith(b"HTTP/1.1 400 "), (request, response)
        assert f'"code":"{code}"'.encode() in response, request


async def test_unusual_valid_requests_get_responses(api_without_worker: Api) -> None:
    for requests, status in (
        (f"{GET}{HOST}\r\n" * 20, b"200"),
        (f"{POST}Content-Length: 2\r\nContent-Length: 2\r\n\r\n{{}}", b"422"),
        (f"{CHUNKED}\r\n2;a=b\r\n{{}}\r\n0\r\nX-Trailer: 1\r\n\r\n", b"422"),
        (f"GET {JOBS}/job-%zz%00 HTTP/1.1\r\n{HOST}\r\n", b"404"),
        (f"OPTIONS * HTTP/1.1\r\n{HOST}\r\n", b"404"),
    ):
        async with connect(api_without_worker) as (reader, writer):
            writer.write(requests.encode())
            async with asyncio.timeout(DEADLINE_SECONDS):
                for _ in range(requests.count("HTTP/1.1")):
                    assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == status
                    await reader.readuntil(b"}")


async def test_repeated_single_value_header_is_rejected(api_without_worker: Api) -> None:
    for name in ("Idempotency-Key", "Range", "Ledger-Position", "Last-Event-ID", "Content-Type"):
        response = await api_without_worker.http.get(JOBS, headers=[(name, "1"), (name, "2")])
        assert (response.status_code, response.json()["code"]) == (400, "duplicate_header")
        assert name.lower() in response.json()["message"].lower()


# Slow clients -------------------------------------------------------------------------------------------------------


@pytest.fixture
def created_limits(monkeypatch: pytest.MonkeyPatch) -> list[ConnectionLimits]:
    """The limits of the servers that the test starts. They have short intervals."""
    created: list[ConnectionLimits] = []

    create_with_short_intervals = partial(
        ConnectionLimits,
        header_timeout_seconds=0.4,
        body_interval_seconds=1.0,
        body_min_bytes=1000,
        read_interval_seconds=1.0,
        read_min_bytes=1000,
    )

    def create_limits(*arguments: Any) -> ConnectionLimits:
        created.append(create_with_short_intervals(*arguments))
        return created[-1]

    monkeypatch.setattr("jobledger.cli.hosting.server.ConnectionLimits", create_limits)
    return created


@pytest.fixture
async def strict_api(created_limits: list[ConnectionLimits], run_without_worker: RunApi) -> AsyncIterator[Api]:
    """An API that closes the connections of slow clients after a second."""
    async with run_without_worker() as api:
        yield api


SLOW_REQUESTS = {
    "nothing": "",
    "a request line": GET,
    "a header": f"{GET}{HOST}X-Slow: ",
    "a second request": f"{GET}{HOST}\r\n{GET}",
    "a body": f"{POST}Content-Length: 100000\r\n\r\n",
    "a chunk": f"{CHUNKED}\r\nFFFF\r\n",
}


async def test_slow_header_or_body_closes_the_connection(strict_api: Api) -> None:
    async def send_slowly(request: str) -> bytes:
        with socket.create_connection((strict_api.http.base_url.host, strict_api.http.base_url.port)) as client:
            client.settimeout(0)
            await asyncio.get_running_loop().sock_sendall(client, request.encode())
            task = asyncio.create_task(_send_byte_by_byte(client))
            response = await _receive_until_closed(client)
            task.cancel()
            return response

    start = time.monotonic()
    responses = await asyncio.gather(*(send_slowly(request) for request in SLOW_REQUESTS.values()))
    assert time.monotonic() - start < ConnectionLimits().header_timeout_seconds, (
        "the limits of the test are shorter than the defaults"
    )
    for name, response in zip(SLOW_REQUESTS, responses, strict=True):
        assert b"HTTP/1.1 408 " in response, (name, response)
    assert (await strict_api.get("/healthz")).status_code == 200


async def _send_byte_by_byte(client: socket.socket) -> None:
    with suppress(ConnectionError):
        while True:
            await asyncio.sleep(0.05)
            await asyncio.get_running_loop().sock_sendall(client, b"x")


async def _receive_until_closed(client: socket.socket) -> bytes:
    """Receive the response. A stream of asyncio would drop what it has not read yet when sending fails."""
    received = b""
    with suppress(ConnectionError):
        async with asyncio.timeout(DEADLINE_SECONDS):
            while chunk := await asyncio.get_running_loop().sock_recv(client, 65536):
                received += chunk
    return received


async def test_steady_body_and_idle_connection_stay_open(strict_api: Api) -> None:
    body = b'{"job_type": "echo", "parameters": {"a": "' + b"x" * 8000 + b'"}}'
    async with connect(strict_api) as (reader, writer):
        for pause in (0.12, 0):  # the first body takes longer than the interval of the limit
            writer.write(f"{POST}Content-Length: {len(body)}\r\n\r\n".encode())
            for begin in range(0, len(body), 800):
                writer.write(body[begin : begin + 800])
                await asyncio.sleep(pause)
            async with asyncio.timeout(DEADLINE_SECONDS):
                assert (await reader.readuntil(b"\r\n")).split()[1] == b"202"
                head = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
                lengths = [int(line[15:]) for line in head if line.startswith(b"content-length:")]
                await reader.readexactly(lengths[0])
            await asyncio.sleep(0.6)  # longer than the header timeout, which does not apply between requests


@asynccontextmanager
async def request_unbuffered(api: Api, path: str, buffer: int) -> AsyncIterator[Callable[[int], Awaitable[bytes]]]:
    """Send a request and yield the function that reads from the response.

    Args:
        api: The API.
        path: The path of the request.
        buffer: The receive buffer of the kernel, in bytes.
    """
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.settimeout(0)
        await loop.sock_connect(client, (api.http.base_url.host, api.http.base_url.port))
        await loop.sock_sendall(client, f"GET {path} HTTP/1.1\r\n{HOST}\r\n".encode())
        yield partial(loop.sock_recv, client)


async def test_unread_response_closes_connection_unlike_steady_reader(
    strict_api: Api, created_limits: list[ConnectionLimits]
) -> None:
    job_id = await strict_api.submit({"text": "x" * 7_000_000})
    size = len((await strict_api.get(f"{JOBS}/{job_id}")).content)
    await strict_api.http.aclose()
    open_connections = created_limits[0].open_connections
    await poll_until(lambda: open_connections.total() == 0, "the connections of the client are closed")

    async with request_unbuffered(strict_api, f"{JOBS}/{job_id}", 4096) as read:
        await poll_until(lambda: open_connections.total() == 1, "the connection is open")
        await poll_until(lambda: open_connections.total() == 0, "the connection is closed")
        received = 0
        with suppress(ConnectionResetError):
            while chunk := await read(1 << 20):
                received += len(chunk)
        assert received < size

    async with request_unbuffered(strict_api, f"{JOBS}/{job_id}", 1 << 18) as read:
        received = 0
        async with asyncio.timeout(DEADLINE_SECONDS):
            while received < size:
                chunk = await read(1 << 18)
                assert chunk
                received += len(chunk)
                await asyncio.sleep(0.05)  # together longer than the interval of the limit


@asynccontextmanager
async def run_download(
    limits: ConnectionLimits,
) -> AsyncIterator[tuple[Callable[[int], Awaitable[bytes]], ServerState]]:
    """Serve a response in chunks of 1 MB. Yield the function that reads from it, and the server's state."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(20):
            await send({"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": True})

    config, loop, state = uvicorn.Config(app, log_config=None), asyncio.get_running_loop(), ServerState()
    config.load()
    async with await loop.create_server(
        lambda: create_protocol_class(limits)(config, state, {}), "127.0.0.1", 0
    ) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(0)
            await loop.sock_connect(client, server.sockets[0].getsockname())
            await loop.sock_sendall(client, f"GET / HTTP/1.1\r\n{HOST}\r\n".encode())
            yield partial(loop.sock_recv, client), state
        await poll_until(lambda: not state.connections, "the connection is closed")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the bytes in its send buffer: make test there")
@pytest.mark.parametrize("is_read", [True, False], ids=["read", "unread"])
async def test_download_is_aborted_only_if_it_is_not_read(is_read: bool) -> None:
    """A client that reads 20 KB/s is not aborted.

    The kernel accepts more of a response only after much of its buffer was read, so the buffer of the process alone
    would show no progress.
    """
    limits = ConnectionLimits(read_interval_seconds=1.0, read_min_bytes=1000)
    async with asyncio.timeout(DEADLINE_SECONDS), run_download(limits) as (read, state):
        if not is_read:
            await poll_until(lambda: bool(state.connections), "the connection is open")
            await poll_until(lambda: not state.connections, "the connection is aborted")
            return
        for _ in range(28):
            assert await read(1000)
            await asyncio.sleep(0.05)
        assert state.connections


async def test_large_response_must_be_read_faster_than_small_one() -> None:
    """The required number of bytes grows with the bytes in memory."""
    limits = ConnectionLimits(read_interval_seconds=0.2, read_min_bytes=1000, drain_timeout_seconds=1.0)
    for buffered, read, is_aborted in [(7_000_000, 5_000, True), (7_000_000, 2_000_000, False), (4000, 1500, False)]:
        transport = _Transport(buffered)
        connection = object.__new__(HttpConnection)
        connection.limits, connection.loop = limits, asyncio.get_running_loop()
        connection.transport = transport  # type: ignore[assignment]
        connection.flow = FlowControl(transport)  # type: ignore[arg-type]
        connection.pause_writing()
        transport.buffered -= read
        connection._check_reader()  # what the timer calls after the interval
        connection._stop_watching_reader()
        transport.socket.close()
        assert transport.is_aborted is is_aborted, (buffered, read)


class _Transport:
    """A transport with a number of buffered bytes."""

    def __init__(self, buffered: int) -> None:
        self.buffered = buffered
        self.socket = socket.socket()
        self.is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def get_extra_info(self, _name: str) -> socket.socket:
        return self.socket

    def abort(self) -> None:
        self.is_aborted = True


async def test_unread_responses_use_bounded_memory(run_without_worker: RunApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobledger.cli.hosting.server.MemoryBudget", lambda _size: MemoryBudget(18_000_000))
    async with run_without_worker() as api:
        large, small = await api.submit({"text": "x" * 7_000_000}), await api.submit()
        path = f"{JOBS}/{large}"
        assert (await api.get(path)).status_code == 200
        async with (
            request_unbuffered(api, path, 4096) as read_first,
            request_unbuffered(api, path, 4096) as read_second,
        ):
            assert [await read_first(12), await read_second(12)] == [b"HTTP/1.1 200"] * 2
            response = await api.get(path)
            assert (response.status_code, response.json()["code"]) == (503, "server_busy")
            assert response.headers["Retry-After"] == "2"
            assert (await api.get(f"{JOBS}/{small}")).status_code == 200
            # The response to a write is as large, but it is not refused: it confirms the write.
            await api.submit({"text": "x" * 7_000_000})

        async def is_available() -> bool:
            return (await api.get(path)).status_code != 503

        await poll_until(is_available, "the memory of the closed connections is released")


# Too many connections -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"max_connections": 5}, {"max_connections_per_address": 5}])
async def test_connection_beyond_limit_gets_503_until_others_close(
    run_without_worker: RunApi, limit: dict[str, int]
) -> None:
    async with run_without_worker(api=limit) as api:
        await api.http.aclose()
        async with AsyncExitStack() as stack:
            for _ in range(5):
                await stack.enter_async_context(connect(api))
            async with connect(api) as (reader, _):
                response = await read_until_closed(reader)
            assert response.startswith(b"HTTP/1.1 503 "), response
            assert b"too_many_connections" in response
            assert b"retry-after: 5" in response.lower()

        async def is_connection_accepted() -> bool:
            async with connect(api) as (reader, writer):
                writer.write(f"{GET}{HOST}\r\n".encode())
                return (await reader.readuntil(b"\r\n")).split()[1] == b"200"

        await poll_until(is_connection_accepted, "a connection is accepted")


async def test_connections_without_descriptors_are_closed_and_logged_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accept` fails until a descriptor is free, as in a process that has none left."""
    loop_errors: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: loop_errors.append(context))
    accept = socket.socket._accept  # type: ignore[attr-defined]  # called by every accept
    has_descriptors = True

    def accept_with_limit(self: socket.socket) -> Any:
        if not has_descriptors and self._reserve >= 0:  # type: ignore[attr-defined]
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(self)

    monkeypatch.setattr(socket.socket, "_accept", accept_with_limit)
    with LoadSheddingSocket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(2048)

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hello")
            writer.close()

        async with await asyncio.start_server(greet, sock=listener, backlog=2048):

            async def read_greeting() -> bytes:
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                greeting = await read_until_closed(reader)
                writer.close()
                return greeting

            assert await read_greeting() == b"hello"
            has_descriptors = False
            assert await asyncio.gather(*(read_greeting() for _ in range(50))) == [b""] * 50
            has_descriptors = True
            assert await read_greeting() == b"hello"
    assert loop_errors == []
    assert capfd.readouterr().out.count("out of file descriptors, closing new connections") == 1
