"""A reverse proxy that serves a server under a path prefix."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


@asynccontextmanager
async def run_path_proxy(port: int, prefix: str, *, strip_prefix: bool = True) -> AsyncIterator[int]:
    """Forward requests below `prefix` and return 404 for others, one request per connection. Yield the port.

    Args:
        port: Port of the server.
        prefix: The path, such as `/tools/jobs`.
        strip_prefix: Whether the server gets the path without the prefix.
    """
    start = prefix.encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            line, _, rest = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
            method, target, version = line.split(b" ")
            if not target.startswith(start + b"/"):
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            else:
                server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
                headers = [line for line in rest.split(b"\r\n") if not line.lower().startswith(b"connection:") and line]
                path = target.removeprefix(start) if strip_prefix else target
                head = [b" ".join((method, path, version)), *headers, b"Connection: close"]
                server_writer.write(b"\r\n".join(head) + b"\r\n\r\n")
                sending = asyncio.create_task(pump(reader, server_writer))
                await pump(server_reader, writer)
                sending.cancel()
                server_writer.close()
        writer.close()

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while chunk := await source.read(65_536):
                target.write(chunk)
                await target.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
