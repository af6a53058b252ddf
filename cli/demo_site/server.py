"""Serve a directory as a website from the running event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles


@asynccontextmanager
async def serve_directory(directory: Path) -> AsyncIterator[str]:
    """Serve `directory` on a free port of 127.0.0.1 and yield the base URL without a trailing slash.

    Supports content types by file name, byte ranges and `index.html` for directories.
    """
    site = Starlette(routes=[Mount("/", StaticFiles(directory=directory, html=True))])
    server = _BackgroundServer(
        uvicorn.Config(site, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = asyncio.create_task(server.serve(sockets=[listener]), name="demo site")
        try:
            await server.started_event.wait()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await running


class _BackgroundServer(uvicorn.Server):
    """A server that signals when it listens and does not install signal handlers."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.started_event = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.started_event.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
