"""Behind a proxy that puts us under a path of its own, every page, script, action and stream is found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from playwright.async_api import Page, expect

from tests.api.conftest import Api
from tests.api.dashboard.conftest import needs_browser
from tests.api.dashboard.test_live import SOON_MS, confirm

pytestmark = needs_browser
PREFIX = b"/tools/jobs"


@asynccontextmanager
async def proxy_to(port: int) -> AsyncIterator[int]:
    """A proxy that strips its prefix, and answers 404 to whatever lies beside it. One request a connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            line, _, rest = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
            method, target, version = line.split(b" ")
            if not target.startswith(PREFIX + b"/"):
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            else:
                there, back = await asyncio.open_connection("127.0.0.1", port)
                kept = [it for it in rest.split(b"\r\n") if not it.lower().startswith(b"connection:") and it]
                head = [b" ".join((method, target.removeprefix(PREFIX), version)), *kept, b"Connection: close"]
                back.write(b"\r\n".join(head) + b"\r\n\r\n")
                sending = asyncio.create_task(pump(reader, back))
                await pump(there, writer)
                sending.cancel()
                back.close()
        writer.close()

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while part := await source.read(65_536):
                target.write(part)
                await target.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def test_everything_works_under_a_path_prefix(api: Api, page: Page) -> None:
    port = api.http.base_url.port
    assert port is not None
    async with proxy_to(port) as proxied:
        home = f"http://127.0.0.1:{proxied}{PREFIX.decode()}/monitoring/events"
        await page.goto(home)
        await expect(page.locator("#pulse.on")).to_be_visible()
        await page.get_by_role("link", name="Jobs", exact=True).click()
        await expect(page.locator("#pulse.on")).to_be_visible()
        job_id = await api.submit({"seconds": 60}, job_name="Somewhere else")
        await page.locator(f"#{job_id} a").click(timeout=SOON_MS)
        await expect(page.locator("#state .state.processing")).to_be_visible(timeout=SOON_MS)
        await confirm(page, "Cancel")
        await expect(page.locator("#state .state.cancelled")).to_be_visible(timeout=SOON_MS)
        assert page.url == f"{home}/jobs/{job_id}"
        await page.goto("about:blank")
