"""A webhook endpoint with scripted responses.

async with run_webhook_endpoint() as endpoint:
    endpoint.script_responses("/hook", 500, 500, 200)  # in this order; the last one repeats
    …
    assert [request.status for request in endpoint.requests] == [500, 500, 200]
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

ScriptedResponse = int | tuple[int, dict[str, str]] | Literal["hang", "reset"]


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """A request and its response."""

    path: str
    headers: dict[str, str]
    body: bytes
    status: int | str
    received_at: float
    raw_headers: dict[str, str] = field(default_factory=dict)

    @property
    def json_body(self) -> dict[str, Any]:
        content: dict[str, Any] = orjson.loads(self.body)
        return content

    @property
    def webhook_id(self) -> str:
        return self.headers["webhook-id"]


@dataclass(slots=True)
class WebhookEndpoint:
    """Listens on 127.0.0.1. Returns 200 unless another response is scripted."""

    port: int = 0
    body: bytes = b"ok"
    requests: list[ReceivedRequest] = field(default_factory=list)
    scripted_responses: dict[str, list[ScriptedResponse]] = field(default_factory=dict)
    request_received: asyncio.Event = field(default_factory=asyncio.Event)
    server: asyncio.Server | None = None

    def url(self, path: str = "/hook") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def script_responses(self, path: str, *script: ScriptedResponse) -> None:
        self.scripted_responses[path] = list(script)

    def requests_to(self, path: str) -> list[ReceivedRequest]:
        return [request for request in self.requests if request.path == path]

    async def wait_for_requests(
        self, number: int, path: str | None = None, *, seconds: float = 60.0
    ) -> list[ReceivedRequest]:
        """Wait for `number` requests and return all requests."""
        try:
            async with asyncio.timeout(seconds):
                while len(self._select_requests(path)) < number:
                    self.request_received.clear()
                    await self.request_received.wait()
        except TimeoutError:
            count = len(self._select_requests(path))
            raise AssertionError(f"received {count} of {number} requests within {seconds} s") from None
        return self._select_requests(path)

    def _select_requests(self, path: str | None) -> list[ReceivedRequest]:
        return self.requests if path is None else self.requests_to(path)

    async def handle_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
            raw = {
                name.lower(): value.removeprefix(" ") for name, _, value in (line.partition(":") for line in head[1:-2])
            }
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            path = head[0].split(" ")[1]
            script = self.scripted_responses.get(path, [200])
            response = script.pop(0) if len(script) > 1 else script[0]
            status = response[0] if isinstance(response, tuple) else response
            self.requests.append(ReceivedRequest(path, headers, body, status, asyncio.get_running_loop().time(), raw))
            self.request_received.set()
            if response == "hang":
                await reader.read()  # until the client disconnects
            elif response == "reset":
                writer.transport.abort()
                return
            else:
                more_headers = response[1] if isinstance(response, tuple) else {}
                lines = [f"HTTP/1.1 {status} Scripted", f"Content-Length: {len(self.body)}", "Connection: close"]
                lines += [f"{name}: {value}" for name, value in more_headers.items()]
                writer.write("\r\n".join([*lines, "", ""]).encode() + self.body)
                await writer.drain()
        writer.close()

    async def start(self) -> None:
        self.server = await asyncio.start_server(self.handle_connection, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening. `start` uses the same port again."""
        if self.server is not None:
            self.server.close()
            self.server = None


@asynccontextmanager
async def run_webhook_endpoint() -> AsyncIterator[WebhookEndpoint]:
    """Run an endpoint inside the block."""
    endpoint = WebhookEndpoint()
    await endpoint.start()
    try:
        yield endpoint
    finally:
        await endpoint.stop()
