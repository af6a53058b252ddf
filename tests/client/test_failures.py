"""The clients against a server that fails, and against an API whose connections are cut."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import orjson
import pytest

import jobledger
from tests.client.conftest import Caller, list_names

JOB = {
    "job_id": "job-1",
    "job_type": "echo",
    "status": "completed",
    "created_at": "2026-01-01T00:00:00Z",
    "updated_at": "2026-01-01T00:00:00Z",
    "version": 2,
    "position": 2,
}
ACCEPTED = orjson.dumps({"status": "success", "job_id": "job-1", "job": JOB})
FOUND = orjson.dumps({"status": "success", "job": JOB})


def answer(status: int, body: bytes, *headers: str, media_type: str = "application/json") -> bytes:
    """Return a response."""
    lines = [f"HTTP/1.1 {status} Status", f"Content-Type: {media_type}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def error(status: int, code: str, *headers: str) -> bytes:
    """Return an error of the API."""
    content = {"status": "error", "code": code, "message": f"The message of {code}.", "details": {"a": 1}}
    return answer(status, orjson.dumps(content), "X-Request-ID: r-1", *headers)


def start_stream(*blocks: bytes) -> bytes:
    """Return the beginning of a live stream, which is cut afterwards."""
    body = b"".join(b"%x\r\n%s\r\n" % (len(block), block) for block in blocks)
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + body


def event_block(position: int, text: str = "x") -> bytes:
    """Return an event of the live stream."""
    event = {
        "position": position,
        "event_id": f"e{position}",
        "stream": "job-1",
        "version": position,
        "type": "JobProgressed",
        "schema": 1,
        "time": "2026-01-01T00:00:00Z",
        "meta": {"actor": "system"},
        "hash": None,
        "data": {"attempt": 1, "step": "a", "percent": 1, "message": text},
    }
    return b"id: %d\nevent: JobProgressed\ndata: %s\n\n" % (position, orjson.dumps(event))


class Server:
    """Sends prepared responses in this order, and repeats the last one. `requests` are the heads of all requests."""

    def __init__(self, *answers: bytes | float) -> None:
        self.answers = list(answers)
        self.requests: list[str] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
            await reader.readexactly(int(length[1]) if length else 0)
            self.requests.append(head)
            found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if isinstance(found, float):
                await asyncio.sleep(found)
            else:
                writer.write(found)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def find_headers(self, name: str) -> list[str | None]:
        """Return the values of a header in all requests."""
        found = [re.search(rf"^{name}: (.*?)\r$", head, re.IGNORECASE | re.MULTILINE) for head in self.requests]
        return [match[1] if match else None for match in found]


@asynccontextmanager
async def run_server(*answers: bytes | float) -> AsyncIterator[Server]:
    server = Server(*answers)
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listener:
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        yield server


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobledger.client.settings._FIRST_DELAY_SECONDS", 0.01)


@pytest.mark.parametrize(
    "failure",
    [
        error(503, "server_busy", "Retry-After: 0"),
        error(429, "too_many_requests", "Retry-After: 0"),
        answer(502, b"<html>Bad Gateway</html>", media_type="text/html"),
        answer(504, b"", media_type="text/html"),
        b"",
        b"HTTP/1.1 202 Accepted\r\nContent-Length: 500\r\n\r\n{",
    ],
)
async def test_transient_failure_is_retried_with_the_same_key(call: Caller, failure: bytes) -> None:
    async with run_server(failure, failure, answer(202, ACCEPTED)) as server:
        handle = await call(call.create(server.url, key="jl_x").submit, "echo", {})
    assert handle.job_id == "job-1"
    keys = server.find_headers("idempotency-key")
    assert len(keys) == 3
    assert len({*keys}) == 1
    assert keys[0]
    assert server.find_headers("authorization") == ["Bearer jl_x"] * 3
    assert str(server.find_headers("user-agent")[0]).startswith("jobledger-python/")


async def test_retries_are_bounded_and_error_has_all_fields(call: Caller) -> None:
    async with run_server(error(503, "database_unavailable", "Retry-After: 0")) as server:
        with pytest.raises(jobledger.ApiUnavailableError) as caught:
            await call(call.create(server.url, max_retries=2).get, "job-1")
    assert len(server.requests) == 3
    failure = caught.value
    assert isinstance(failure, jobledger.JobledgerError)
    assert (failure.status, failure.code, failure.message) == (
        503,
        "database_unavailable",
        "The message of database_unavailable.",
    )
    assert (failure.details, failure.request_id, failure.retry_after) == ({"a": 1}, "r-1", 0)


@pytest.mark.parametrize(
    ("response", "kind", "text"),
    [
        (error(401, "invalid_credentials"), jobledger.AuthenticationError, "expired or revoked"),
        (error(403, "forbidden"), jobledger.ForbiddenError, "forbidden"),
        (error(404, "job_not_found"), jobledger.NotFoundError, "job_not_found"),
        (error(409, "invalid_state"), jobledger.ConflictError, "invalid_state"),
        (error(413, "content_too_large"), jobledger.InvalidRequestError, "content_too_large"),
        (error(500, "internal_error"), jobledger.ServerError, "internal_error"),
        (error(503, "job_type_unavailable"), jobledger.ApiUnavailableError, "job_type_unavailable"),
        (error(429, "too_many_requests", "Retry-After: 3600"), jobledger.RateLimitError, "too_many_requests"),
        (answer(413, b"<html>", media_type="text/html"), jobledger.UnexpectedResponseError, "limits the size"),
        (answer(404, b"<html>", media_type="text/html"), jobledger.UnexpectedResponseError, "text/html"),
        (answer(301, b"", "Location: https://other/"), jobledger.UnexpectedResponseError, "redirects to"),
        (answer(200, b"<html>"), jobledger.UnexpectedResponseError, "not JSON"),
        (answer(200, b'{"status": "success", "job": {"job_id": 7}}'), jobledger.UnexpectedResponseError, "job"),
        (answer(200, b"[]"), jobledger.UnexpectedResponseError, "success"),
        (answer(200, b"xx", "Content-Encoding: gzip"), jobledger.UnexpectedResponseError, "decoded"),
    ],
)
async def test_permanent_failure_is_not_retried(
    call: Caller, response: bytes, kind: type[jobledger.ClientError], text: str
) -> None:
    async with run_server(response) as server:
        with pytest.raises(kind, match=text) as caught:
            await call(call.create(server.url, key="jl_x").get, "job-1")
    assert type(caught.value) is kind
    assert len(server.requests) == 1
    assert "jl_x" not in str(caught.value)


async def test_slow_and_absent_servers_end_in_time(call: Caller) -> None:
    begin = time.monotonic()
    async with run_server(30.0) as server:
        with pytest.raises(jobledger.ApiUnavailableError, match="in time"):
            await call(call.create(server.url, timeout=0.2, max_retries=1).get, "job-1")
        with pytest.raises(jobledger.WaitTimeoutError):
            await call(call.create(server.url).result, "job-1", timeout=0.2)
    with pytest.raises(jobledger.ApiUnavailableError, match="Check the URL"):
        await call(call.create("http://127.0.0.1:1", max_retries=1).get, "job-1")
    assert time.monotonic() - begin < 15


async def test_result_waits_without_polling_and_survives_an_outage(call: Caller) -> None:
    pending = orjson.dumps({"status": "success", "job": JOB | {"status": "pending"}})
    completed = orjson.dumps({"status": "success", "job": JOB | {"results": {"metadata": META}}})
    waited = answer(200, pending, "Preference-Applied: wait=60")
    async with run_server(waited, *[b""] * 6, answer(200, completed)) as server:
        await call(call.create(server.url).result, "job-1")
    assert server.find_headers("prefer") == ["wait=60"] * 8


META = {"processed_at": "2026-01-01T00:00:00Z", "duration": 1.0}


async def test_events_resume_at_the_last_event_after_cut_connections(call: Caller) -> None:
    line_break = "a\u2028b\u0085c"  # no line break in Server-Sent Events
    first = start_stream(b"retry: 10\nid: 4\n\n", event_block(5, line_break), event_block(6)[:-20])
    second = start_stream(b"retry: 10\nid: 5\n\n: comment\n\n", event_block(6))
    third = start_stream(b"retry: 10\nid: 9\n\n", event_block(10))
    async with run_server(first, b"", second, third, 30.0) as server:
        stream = call.create(server.url).events(after=4)
        events = await call.take(stream, 3)
        await call.close(stream)
    assert [event.position for event in events] == [5, 6, 10]
    assert events[0].event.message == line_break
    assert server.find_headers("last-event-id")[:4] == ["4", "5", "5", "6"]


async def test_read_after_followed_end_waits_for_the_views(call: Caller) -> None:
    pending = orjson.dumps({"status": "success", "job": JOB | {"status": "pending", "version": 1, "position": 1}})
    page = orjson.dumps({"status": "success", "events": [], "head": 6})
    end = event_block(7).replace(b"JobProgressed", b"JobCompleted").replace(b'"version":7', b'"version":2')
    async with run_server(answer(200, pending), answer(200, page), start_stream(end), answer(200, FOUND)) as server:
        handle = call.create(server.url).job("job-1")
        stream = handle.follow(after=1)
        assert [event.type for event in await call.take(stream)] == ["JobCompleted"]
        await call(handle.get)
    assert server.find_headers("ledger-position") == [None, None, None, "7"]


async def test_events_with_an_expired_key_end_with_an_error(call: Caller) -> None:
    async with run_server(start_stream(b"retry: 10\n\n", event_block(1)), error(401, "invalid_credentials")) as server:
        stream = call.create(server.url, key="jl_x").events()
        assert len(await call.take(stream, 1)) == 1
        with pytest.raises(jobledger.AuthenticationError, match="expired or revoked"):
            await call.take(stream, 1)
        await call.close(stream)


async def test_key_function_is_called_for_each_request(call: Caller) -> None:
    keys = iter(["jl_a", "jl_b"])
    get_key: Callable[[], str] = lambda: next(keys)  # noqa: E731 - typed
    async with run_server(answer(200, FOUND)) as server:
        client = call.create(server.url, key=get_key)
        await call(client.get, "job-1")
        await call(client.get, "job-1")
    assert server.find_headers("authorization") == ["Bearer jl_a", "Bearer jl_b"]


async def test_download_continues_after_cut_connection(call: Caller, tmp_path: Path) -> None:
    content = bytes(range(256)) * 4000
    head = 'HTTP/1.1 {}\r\nETag: "tag"\r\nContent-Length: {}\r\n{}\r\n'
    size = 600_000
    cut = head.format("200 OK", len(content), "").encode() + content[:size]
    async with run_server(cut, b"") as server:

        async def serve_rest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if not server.requests:
                await server.serve(reader, writer)
                return
            text = (await reader.readuntil(b"\r\n\r\n")).decode()
            server.requests.append(text)
            [start] = re.findall(r"range: bytes=(\d+)-", text, re.IGNORECASE)[:1]
            rest = content[int(start) :]
            fields = f"Content-Range: bytes {start}-{len(content) - 1}/{len(content)}\r\n"
            writer.write(head.format("206 Partial", len(rest), fields).encode() + rest)
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(serve_rest, "127.0.0.1", 0) as listener:
            client: Any = call.create(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
            saved = await call(client.download, "a/b c.bin", tmp_path / "copy.bin")
    assert saved.read_bytes() == content
    assert server.find_headers("if-range") == [None, '"tag"']
    assert "/api/events/files/a/b%20c.bin" in server.requests[0]
    assert list_names(tmp_path) == ["copy.bin"]


async def test_repeated_delete_after_lost_response_succeeds(call: Caller) -> None:
    missing = error(404, "job_not_found")
    async with run_server(b"", missing) as server:
        await call(call.create(server.url).job("job-1").delete)
    assert len(server.requests) == 2
    async with run_server(error(429, "too_many_requests", "Retry-After: 0"), missing) as server:
        with pytest.raises(jobledger.NotFoundError):
            await call(call.create(server.url).job("job-1").delete)


async def test_announced_maintenance_does_not_end_streams_and_waits(
    call: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays: list[float] = []
    for module in ("event_stream", "transport"):
        monkeypatch.setattr(f"jobledger.client.asynchronous.{module}.sleep", _record_async_delay(delays))
        monkeypatch.setattr(f"jobledger.client.synchronous.{module}.sleep", delays.append)
    maintenance = answer(503, b"<html>", "Retry-After: 120", media_type="text/html")
    async with run_server(maintenance, start_stream(event_block(1)), 30.0) as server:
        stream = call.create(server.url).events()
        assert len(await call.take(stream, 1)) == 1
        await call.close(stream)
    completed = orjson.dumps({"status": "success", "job": JOB | {"results": {"metadata": META}}})
    async with run_server(maintenance, answer(200, completed)) as server:
        await call(call.create(server.url).result, "job-1")
    assert delays == [120, 120]
    too_long = answer(503, b"<html>", "Retry-After: 3600", media_type="text/html")
    async with run_server(too_long) as server:
        with pytest.raises(jobledger.ApiUnavailableError):
            await call(call.create(server.url).result, "job-1")


def _record_async_delay(delays: list[float]) -> Callable[[float], Any]:
    async def sleep(seconds: float) -> None:
        delays.append(seconds)

    return sleep


async def test_invalid_event_hides_no_event_before_it(call: Caller) -> None:
    broken = start_stream(b"retry: 10\n\n" + event_block(1) + b"id: 2\ndata: {\n\n")
    async with run_server(broken, start_stream(b"retry: 10\n\n", event_block(1))) as server:
        stream = call.create(server.url).events()
        with pytest.raises(jobledger.UnexpectedResponseError):
            await call.take(stream, 1)
        [event] = await call.take(stream, 1)
        await call.close(stream)
    assert event.position == 1
    assert server.find_headers("last-event-id") == ["0", "0"]


def test_asynchronous_client_works_in_several_event_loops() -> None:
    async def get(client: jobledger.AsyncClient) -> str:
        return (await client.get("job-1")).job_id

    with serve_in_thread() as url:
        client = jobledger.AsyncClient(url, max_retries=0)
        assert [asyncio.run(get(client)) for _ in range(3)] == ["job-1"] * 3
        asyncio.run(client.aclose())
        with pytest.raises(RuntimeError, match="closed"):
            asyncio.run(get(client))


def test_forked_process_uses_own_connections() -> None:
    with serve_in_thread() as url, jobledger.Client(url, max_retries=0) as client:
        client.get("job-1")
        connections = set(Connection.ports)
        process = os.fork()
        if not process:
            with suppress(BaseException):
                os._exit(0 if client.get("job-1").job_id == "job-1" else 1)
            os._exit(2)
        assert os.waitpid(process, 0)[1] == 0
        assert set(Connection.ports) - connections, "the connection of the parent was used"
        client.get("job-1")
        assert len(Connection.ports) == 3
        assert Connection.ports[-1] in connections


class Connection(BaseHTTPRequestHandler):
    """Answers requests on a connection that stays open."""

    protocol_version = "HTTP/1.1"
    ports: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        self.ports.append(self.client_address[1])
        self.send_response(200)
        self.send_header("Content-Length", str(len(FOUND)))
        self.end_headers()
        self.wfile.write(FOUND)

    def log_message(self, *_arguments: object) -> None:
        """Print nothing."""


@contextmanager
def serve_in_thread() -> Iterator[str]:
    Connection.ports.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Connection) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
