"""cli: a directory as a web site on this machine, inside the event loop that is already running."""

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
    """Serve `directory` on 127.0.0.1 at a free port; yields the base URL, without a closing slash.

    Content types follow the file names, byte ranges are answered, a folder answers with its `index.html`.
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
    """A server in somebody else's program: it says when it listens, and leaves the signals to its host."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.started_event = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.started_event.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
