"""A slow website for session jobs, which run in child processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

PAGE = b"<html><head><title>A talk</title></head><body><h1>A talk</h1><p>What was said there.</p></body></html>"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n"


class SlowSite:
    """Returns the same page for every path after `pause(path)` returned."""

    def __init__(self, pause: Callable[[str], Awaitable[None]]) -> None:
        self._pause = pause
        self._pending: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.requested_paths = asyncio.Queue[str]()
        """The requested paths in order."""
        self.port = 0

    def job_parameters(self, path: str = "/talk") -> dict[str, Any]:
        return {
            "event": "A conference",
            "session": "A talk",
            "url": f"http://127.0.0.1:{self.port}{path}",
            "filename": "talk.md",
            "track": "A track",
        }

    def handle_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one connection."""
        task = asyncio.create_task(self._respond(reader, writer))
        self._pending[task] = writer
        task.add_done_callback(self._pending.pop)

    async def aclose(self) -> None:
        """Close all connections that wait for a response."""
        for writer in self._pending.values():
            writer.close()
        await asyncio.gather(*self._pending)

    async def _respond(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):  # the client was killed
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
            self.requested_paths.put_nowait(path)
            pause, disconnect = asyncio.ensure_future(self._pause(path)), asyncio.ensure_future(reader.read())
            await asyncio.wait({pause, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            is_connected = pause.done()
            for future in (pause, disconnect):
                future.cancel()
            await asyncio.gather(pause, disconnect, return_exceptions=True)
            if is_connected:
                await self.write_response(path, writer)
        writer.close()

    async def write_response(self, path: str, writer: asyncio.StreamWriter) -> None:
        """Write the response."""
        writer.write(HEAD + PAGE)
        await writer.drain()


@asynccontextmanager
async def serve_site(site: SlowSite) -> AsyncIterator[SlowSite]:
    """Serve the website inside the block."""
    server = await asyncio.start_server(site.handle_connection, "127.0.0.1", 0)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()
        await site.aclose()
