"""Connections: framing that two servers could read differently, slow clients, and too many of anything."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from ipaddress import ip_network
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from starlette.types import Message
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from jobledger.api.event_filter import EventFilter
from jobledger.api.http.client_address import client_address, get_rate_limit_key
from jobledger.api.http.limits import SIGN_IN_PATH, AuthFailureLimitMiddleware
from jobledger.api.http.memory_budget import MemoryBudget
from jobledger.api.http.options import HttpOptions
from jobledger.api.http.sse import Throttle
from jobledger.api.routes.log_stream import _generate_blocks
from jobledger.cli.http_connection import ConnectionLimits, HttpConnection, SheddingSocket, protocol_class
from jobledger.ledger.domain.errors import LedgerUnavailable
from tests.api.conftest import Api, run_api
from tests.support.header_auth import principal_header

JOBS, STREAM = "/api/events/jobs", "/api/ledger/stream"
HOST = "Host: 127.0.0.1\r\n"
POST = f"POST {JOBS} HTTP/1.1\r\n{HOST}Content-Type: application/json\r\n"
CHUNKED = f"{POST}Transfer-Encoding: chunked\r\n"
GET = "GET /healthz HTTP/1.1\r\n"


@asynccontextmanager
async def connected(api: Api) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(api.http.base_url.host, api.http.base_url.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def until_closed(reader: asyncio.StreamReader, seconds: float = 10) -> bytes:
    async with asyncio.timeout(seconds):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


FRAMING = [
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
    for sent, code in FRAMING:
        async with connected(api_without_worker) as (reader, writer):
            writer.write(sent.encode("latin-1"))
            writer.write(f"{GET}{HOST}\r\n".encode())  # what a smuggler wants to be answered
            response = await until_closed(reader)
        assert response.count(b"HTTP/1.1 ") == 1, (sent, response)
        assert response.startswith(b"HTTP/1.1 400 "), (sent, response)
        assert f'"code":"{code}"'.encode() in response, sent


async def test_unusual_valid_requests_get_responses(api_without_worker: Api) -> None:
    for sent, status in (
        (f"{GET}{HOST}\r\n" * 20, b"200"),
        (f"{POST}Content-Length: 2\r\nContent-Length: 2\r\n\r\n{{}}", b"422"),
        (f"{CHUNKED}\r\n2;a=b\r\n{{}}\r\n0\r\nX-Trailer: 1\r\n\r\n", b"422"),
        (f"GET {JOBS}/job-%zz%00 HTTP/1.1\r\n{HOST}\r\n", b"404"),
        (f"OPTIONS * HTTP/1.1\r\n{HOST}\r\n", b"404"),
    ):
        async with connected(api_without_worker) as (reader, writer):
            writer.write(sent.encode())
            async with asyncio.timeout(10):
                for _ in range(sent.count("HTTP/1.1")):
                    assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == status
                    await reader.readuntil(b"}")


async def test_repeated_single_value_header_is_rejected(api_without_worker: Api) -> None:
    for name in ("Idempotency-Key", "Range", "Ledger-Position", "Last-Event-ID", "Content-Type"):
        response = await api_without_worker.http.get(JOBS, headers=[(name, "1"), (name, "2")])
        assert (response.status_code, response.json()["code"]) == (400, "duplicate_header")
        assert name.lower() in response.json()["message"].lower()


# Slow clients -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def impatient_api(
    mongodb_uri: str, db_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Api]:
    limits = partial(
        ConnectionLimits,
        header_timeout_seconds=0.4,
        body_interval_seconds=0.4,
        body_min_bytes=1000,
        read_interval_seconds=0.4,
        read_min_bytes=1000,
    )
    monkeypatch.setattr("jobledger.cli.server.ConnectionLimits", limits)
    async for running in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api", "projector"})):
        yield running


SLOW = {
    "nothing": "",
    "a request line": GET,
    "a header": f"{GET}{HOST}X-Slow: ",
    "a second request": f"{GET}{HOST}\r\n{GET}",
    "a body": f"{POST}Content-Length: 100000\r\n\r\n",
    "a chunk": f"{CHUNKED}\r\nFFFF\r\n",
}


async def test_slow_header_or_body_closes_the_connection(impatient_api: Api) -> None:
    for name, first in SLOW.items():
        async with connected(impatient_api) as (reader, writer):
            writer.write(first.encode())
            begun = time.monotonic()
            drip = asyncio.create_task(_drip(writer))
            response = await until_closed(reader)
            drip.cancel()
        assert b"HTTP/1.1 408 " in response, (name, response)
        assert time.monotonic() - begun < 5
    assert (await impatient_api.get("/healthz")).status_code == 200


async def _drip(writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while True:
            await asyncio.sleep(0.05)
            writer.write(b"x")


async def test_steady_body_and_idle_connection_stay_open(impatient_api: Api) -> None:
    body = b'{"job_type": "echo", "parameters": {"a": "' + b"x" * 8000 + b'"}}'
    async with connected(impatient_api) as (reader, writer):
        for _ in range(2):
            writer.write(f"{POST}Content-Length: {len(body)}\r\n\r\n".encode())
            for begin in range(0, len(body), 800):
                writer.write(body[begin : begin + 800])
                await asyncio.sleep(0.12)
            async with asyncio.timeout(10):
                assert (await reader.readuntil(b"\r\n")).split()[1] == b"202"
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(int(it[15:]) for it in head.lower().split(b"\r\n") if it.startswith(b"content-length:"))
                await reader.readexactly(length)
            await asyncio.sleep(0.6)  # kept alive, although a head takes at most 0.4 s


@asynccontextmanager
async def asking_for(api: Api, path: str, buffer: int) -> AsyncIterator[Callable[[int], Awaitable[bytes]]]:
    """Send a request; yield the function that reads of the response. `buffer` is what the system reads ahead."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.settimeout(0)
        await loop.sock_connect(client, (api.http.base_url.host, api.http.base_url.port))
        await loop.sock_sendall(client, f"GET {path} HTTP/1.1\r\n{HOST}\r\n".encode())
        yield partial(loop.sock_recv, client)


async def test_unread_response_closes_connection_unlike_steady_reader(impatient_api: Api) -> None:
    job_id = await impatient_api.submit({"text": "x" * 7_000_000})
    size = len((await impatient_api.get(f"{JOBS}/{job_id}")).content)

    async with asking_for(impatient_api, f"{JOBS}/{job_id}", 4096) as read:
        await asyncio.sleep(2)
        received = 0
        with suppress(ConnectionResetError):
            while part := await read(1 << 20):
                received += len(part)
        assert received < size

    async with asking_for(impatient_api, f"{JOBS}/{job_id}", 1 << 18) as read:
        received = 0
        async with asyncio.timeout(30):
            while received < size:
                part = await read(1 << 18)
                assert part
                received += len(part)
                await asyncio.sleep(0.05)


@asynccontextmanager
async def downloading(limits: ConnectionLimits) -> AsyncIterator[tuple[Callable[[int], Awaitable[bytes]], ServerState]]:
    """Serve an response of pieces of 1 MB. Yield the function that reads of it, and the server's state."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(20):
            await send({"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": True})

    config, loop, state = uvicorn.Config(app, log_config=None), asyncio.get_running_loop(), ServerState()
    config.load()
    async with await loop.create_server(lambda: protocol_class(limits)(config, state, {}), "127.0.0.1", 0) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(0)
            await loop.sock_connect(client, server.sockets[0].getsockname())
            await loop.sock_sendall(client, f"GET / HTTP/1.1\r\n{HOST}\r\n".encode())
            yield partial(loop.sock_recv, client), state
        while state.connections:  # noqa: ASYNC110 - the server notices a moment later
            await asyncio.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say what it holds")
@pytest.mark.parametrize("reads", [True, False])
async def test_download_is_aborted_only_if_it_is_not_read(reads: bool) -> None:
    """The system takes more of an response only after much of what it holds was read: that is no measure."""
    limits = ConnectionLimits(read_interval_seconds=0.5, read_min_bytes=500)
    async with asyncio.timeout(10), downloading(limits) as (read, state):
        for _ in range(28):
            if reads:
                assert await read(1000)
            await asyncio.sleep(0.05)
        assert bool(state.connections) is reads


async def test_large_response_must_be_read_faster_than_small_one() -> None:
    """The more is in memory, the more has to be read of it."""
    limits = ConnectionLimits(read_interval_seconds=0.2, read_min_bytes=1000, drain_timeout_seconds=1.0)
    cut = []
    for waiting, read, is_cut in [(7_000_000, 5_000, True), (7_000_000, 2_000_000, False), (4000, 1500, False)]:
        transport = _Transport(waiting)
        connection = object.__new__(HttpConnection)
        connection.limits, connection.loop = limits, asyncio.get_running_loop()
        connection.transport = transport  # type: ignore[assignment]
        connection.flow = FlowControl(transport)  # type: ignore[arg-type]
        connection.pause_writing()
        transport.waiting -= read
        await asyncio.sleep(0.25)
        connection._stop_watching_reader()
        transport.socket.close()
        cut.append(transport.is_aborted is is_cut)
    assert cut == [True] * 3


class _Transport:
    """A connection of which a number of bytes was not read yet."""

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self.socket = socket.socket()
        self.is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def get_extra_info(self, _name: str) -> socket.socket:
        return self.socket

    def abort(self) -> None:
        self.is_aborted = True


async def test_unread_responses_use_bounded_memory(
    mongodb_uri: str, db_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.cli.server.MemoryBudget", lambda _size: MemoryBudget(18_000_000))
    async for api in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api", "projector"})):
        large, small = await api.submit({"text": "x" * 7_000_000}), await api.submit()
        assert (await api.get(f"{JOBS}/{large}")).status_code == 200
        async with asking_for(api, f"{JOBS}/{large}", 4096) as one, asking_for(api, f"{JOBS}/{large}", 4096) as other:
            assert [await one(12), await other(12)] == [b"HTTP/1.1 200"] * 2
            response = await api.get(f"{JOBS}/{large}")
            assert (response.status_code, response.json()["code"]) == (503, "server_busy")
            assert response.headers["Retry-After"] == "2"
            assert (await api.get(f"{JOBS}/{small}")).status_code == 200
            await api.submit({"text": "x" * 7_000_000})  # its response is as large, but says what was done
        async with asyncio.timeout(10):
            while (await api.get(f"{JOBS}/{large}")).status_code == 503:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


# Too many ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(mongodb_uri: str, db_name: str, tmp_path: Path) -> Any:
    @asynccontextmanager
    async def running(**sections: dict[str, Any]) -> AsyncIterator[Api]:
        roles: Any = frozenset({"api", "projector"})
        async for api in run_api(mongodb_uri, db_name, tmp_path, roles, **sections):
            yield api

    return running


@pytest.mark.parametrize("limit", [{"max_connections": 5}, {"max_connections_per_address": 5}])
async def test_connection_beyond_limit_gets_503_until_others_close(run: Any, limit: dict[str, int]) -> None:
    async with run(api=limit) as api:
        await api.http.aclose()
        held = [connected(api) for _ in range(5)]
        for one in held:
            await one.__aenter__()
        async with connected(api) as (reader, _):
            response = await until_closed(reader)
        assert response.startswith(b"HTTP/1.1 503 "), response
        assert b"too_many_connections" in response
        assert b"retry-after: 5" in response.lower()
        for one in held:
            await one.__aexit__(None, None, None)
        await asyncio.sleep(0.1)
        async with connected(api) as (reader, writer):
            writer.write(f"{GET}{HOST}\r\n".encode())
            assert (await reader.readuntil(b"\r\n")).split()[1] == b"200"


async def test_live_streams_of_all_users_are_limited_together(header_auth: None, run: Any) -> None:
    async with run(api={"max_streams": 2}) as api:
        opened = [api.http.stream("GET", STREAM, headers=principal_header(user)) for user in ("alice", "bob")]
        for stream in opened:
            assert (await stream.__aenter__()).status_code == 200
        refused = await api.get(STREAM, **principal_header("carol"))
        for stream in opened:
            await stream.__aexit__(None, None, None)
    assert (refused.status_code, refused.json()["code"]) == (503, "stream_capacity_exceeded")


async def test_wrong_credentials_are_limited_per_address(run: Any) -> None:
    secret = "s" * 32
    jwt = pytest.importorskip("jwt")
    token = jwt.encode({"sub": "alice", "exp": time.time() + 600}, secret, "HS256")
    late = jwt.encode({"sub": "bob", "exp": time.time() + 600}, secret, "HS256")
    settings = {"trusted_proxies": ["127.0.0.0/8"], "auth_failures_per_minute": 5}
    async with run(api=settings, auth={"mode": "jwt", "jwt": {"secret": secret}}) as api:

        async def ask(credential: str, address: str) -> int:
            headers = {"Authorization": f"Bearer {credential}", "X-Forwarded-For": f"1.2.3.4, {address}"}
            return int((await api.get(JOBS, **headers)).status_code)

        assert await ask(token, "203.0.113.7") == 200
        refused = [await ask(f"wrong-{number}", "203.0.113.7") for number in range(8)]
        assert refused == [401] * 5 + [429] * 3
        assert await ask(token, "203.0.113.7") == 200  # accepted from there before
        assert await ask(late, "203.0.113.7") == 429
        assert await ask(late, "203.0.113.8") == 200
        assert await ask("wrong", "203.0.113.9") == 401
        response = await api.post(
            "/monitoring/events/sign-in",
            **{"X-Forwarded-For": "203.0.113.7", "Origin": str(api.http.base_url).rstrip("/")},
        )
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 0
        assert (await api.get("/healthz", **{"X-Forwarded-For": "203.0.113.7"})).status_code == 200
        assert [await ask(f"other-{number}", f"2001:db8::{number}") for number in range(6)] == [401] * 5 + [429]
        assert await ask("other", "2001:db8:0:1::1") == 401


PAGES = ("/monitoring/events", "/monitoring/events/jobs/job-1")


async def test_wrong_credentials_are_limited_in_api_pages_and_sign_in(run: Any) -> None:
    """A page responses with the way to the sign-in, and the form has its credential in the body: each guess counts."""
    settings = {"trusted_proxies": ["127.0.0.0/8"], "auth_failures_per_minute": 5}
    async with run(api=settings, auth={"mode": "keys"}) as api:
        ours = {"Origin": str(api.http.base_url).rstrip("/")}

        async def guess(path: str, kind: str, address: str, number: int) -> int:
            headers = {"X-Forwarded-For": address}
            if path == SIGN_IN_PATH:
                cookie = {"Cookie": "jobledger=the-same"} if kind == "cookie" else {}
                form = {"credential": f"wrong-{number}"}
                return int((await api.http.post(path, data=form, headers=headers | ours | cookie)).status_code)
            bearer, cookie = {"Authorization": f"Bearer {number}"}, {"Cookie": f"jobledger={number}"}
            wrong = bearer if kind == "bearer" else cookie
            return int((await api.get(path, **headers, **wrong)).status_code)

        ways = product((JOBS, *PAGES, SIGN_IN_PATH), ("bearer", "cookie"), (True, False))
        for host, (path, kind, is_parallel) in enumerate(ways, 1):
            guesses = [guess(path, kind, f"203.0.113.{host}", number) for number in range(8)]
            found = await asyncio.gather(*guesses) if is_parallel else [await it for it in guesses]
            refused = 303 if path in PAGES else 401
            assert Counter(found) == {refused: 5, 429: 3}, (path, kind, is_parallel)


async def _receive() -> Message:
    return {"type": "http.disconnect"}


async def _send(_message: Message) -> None:
    """Send nothing."""


@pytest.mark.parametrize(
    ("path", "checked"),
    [(JOBS, 10), (SIGN_IN_PATH, 10), (JOBS, 30), (SIGN_IN_PATH, 30)],
    ids=["few", "form", "many", "forms"],
)
async def test_credentials_checked_in_parallel_are_limited(path: str, checked: int) -> None:
    """However many are sent before the first is refused, no more are looked at than may be wrong."""
    looked_at = 0
    refused = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal looked_at
        looked_at += 1
        await refused.wait()
        await send({"type": "http.response.start", "status": 401, "headers": []})

    limited = AuthFailureLimitMiddleware(app, HttpOptions(auth_failures_per_minute=10))
    tasks = [asyncio.create_task(limited(scope_of(path, f"wrong-{n}"), _receive, _send)) for n in range(checked)]
    await asyncio.sleep(0.01)
    refused.set()
    await asyncio.gather(*tasks)
    assert looked_at == 10


@pytest.mark.parametrize("end", ["accepted", "answered", "failed"])
async def test_credentials_that_are_not_rejected_use_no_token(end: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if end == "failed":
            raise ConnectionError
        if end == "accepted":
            scope["on_credentials_accepted"]()
            await asyncio.sleep(0.05)  # such as `Prefer: wait`
        else:
            await send({"type": "http.response.start", "status": 503, "headers": []})

    limited = AuthFailureLimitMiddleware(app, HttpOptions(auth_failures_per_minute=1))
    for number in range(5):
        task = asyncio.create_task(limited(scope_of(JOBS, str(number)), _receive, _send))
        await asyncio.sleep(0)
        assert limited._buckets is not None
        assert limited._buckets.take("127.0.0.1") == 0
        limited._buckets.refund("127.0.0.1")
        await asyncio.gather(task, return_exceptions=True)


async def test_same_credentials_in_parallel_need_one_token() -> None:
    passed = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal passed
        await asyncio.sleep(0.01)
        passed += 1
        scope["on_credentials_accepted"]()

    limited = AuthFailureLimitMiddleware(app, HttpOptions(auth_failures_per_minute=1))
    await asyncio.gather(*(limited(scope_of(JOBS, "right"), _receive, _send) for _ in range(50)))
    assert passed == 50
    assert not limited._being_checked


def scope_of(path: str, credential: str) -> dict[str, Any]:
    """Return a request with a credential; that of a form is in its body."""
    headers = [] if path == SIGN_IN_PATH else [(b"authorization", f"Bearer {credential}".encode())]
    method = "POST" if path == SIGN_IN_PATH else "GET"
    return {"type": "http", "method": method, "path": path, "headers": headers, "client": ("127.0.0.1", 1)}


def test_rate_limit_key_is_ipv4_address_or_ipv6_network() -> None:
    assert get_rate_limit_key("203.0.113.7") == get_rate_limit_key("::ffff:203.0.113.7") == "203.0.113.7"
    assert (
        get_rate_limit_key("2001:db8::1")
        == get_rate_limit_key("2001:db8::ffff:1")
        != get_rate_limit_key("2001:db8:0:1::1")
    )
    assert get_rate_limit_key("fe80::1%eth0") == "fe80::/64"
    assert (get_rate_limit_key(""), get_rate_limit_key("testclient")) == ("", "testclient")


@pytest.mark.parametrize(
    ("peer", "forwarded", "found"),
    [
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", ["6.6.6.6, 203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", ["6.6.6.6", "203.0.113.7, 10.0.0.2"], "203.0.113.7"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["nonsense, 10.0.0.2"], "10.0.0.2"),
        ("::ffff:10.0.0.1", ["2001:db8::1"], "2001:db8::1"),
        ("198.51.100.1", ["203.0.113.7"], "198.51.100.1"),  # no proxy of ours
    ],
)
def test_client_address_is_the_last_untrusted_address(peer: str, forwarded: list[str], found: str) -> None:
    headers = [(b"x-forwarded-for", it.encode()) for it in forwarded]
    scope = {"type": "http", "client": (peer, 1), "headers": headers}
    assert client_address(scope, [ip_network("10.0.0.0/8")]) == found


async def test_log_stream_throttles_only_hidden_events_of_the_past() -> None:
    """Hidden events come live, then the stream falls behind, is live again, and falls behind again."""
    waited: list[int] = []
    chunks = [(False, 600), (True, 10), (True, 490), (True, 499), (False, 600), (True, 499)]

    class Events:
        position, is_catching_up = 0, False

        async def next_chunk(self, _limit: int) -> list[Any]:
            if not chunks:
                raise LedgerUnavailable("the end")
            self.is_catching_up, number = chunks.pop(0)
            return [SimpleNamespace(type="JobSubmitted")] * number

    @asynccontextmanager
    async def subscription(**_: Any) -> AsyncIterator[Events]:
        yield Events()

    async def wait(amount: int) -> None:
        waited.append(amount)

    known: Any = SimpleNamespace(
        visibility=None,
        event_store=SimpleNamespace(subscribe=subscription),
        live_streams=SimpleNamespace(history_throttle=SimpleNamespace(wait=wait)),
    )
    admin: Any = SimpleNamespace(is_admin=True)
    async for _ in _generate_blocks(known, admin, EventFilter(frozenset({"JobDeleted"})), 0):
        pass
    assert waited == [500]


async def test_throttle_rate_is_shared_by_all_streams() -> None:
    throttle, loop = Throttle(1000), asyncio.get_running_loop()
    begun = loop.time()
    await asyncio.gather(*(throttle.wait(50) for _ in range(8)))
    assert 0.3 < loop.time() - begun < 3


async def test_connections_without_descriptors_are_closed_and_logged_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the process has none left: `accept` fails until a descriptor is free."""
    reported: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: reported.append(context))
    accept = socket.socket._accept  # type: ignore[attr-defined]  # what every accept calls
    free = True

    def limited(self: socket.socket) -> Any:
        if not free and self._reserve >= 0:  # type: ignore[attr-defined]
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(self)

    monkeypatch.setattr(socket.socket, "_accept", limited)
    with SheddingSocket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(2048)

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hello")
            writer.close()

        async with await asyncio.start_server(greet, sock=listening, backlog=2048):

            async def said_to_client() -> bytes:
                reader, writer = await asyncio.open_connection(*listening.getsockname())
                heard = await until_closed(reader)
                writer.close()
                return heard

            assert await said_to_client() == b"hello"
            free = False
            assert await asyncio.gather(*(said_to_client() for _ in range(50))) == [b""] * 50
            free = True
            assert await said_to_client() == b"hello"
    assert reported == []
    assert capfd.readouterr().out.count("out of file descriptors, closing new connections") == 1
