"""Pages of other origins, whatever port or host name, can do nothing with a browser session of an operator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from playwright.async_api import BrowserContext, Page, expect

from jobledger.api.auth.api_keys import ApiKeyToken, revoke_key
from tests.api.conftest import WITHOUT_WORKER, Api, run_api
from tests.api.dashboard.conftest import (
    build_page_url,
    clear_console_errors,
    create_key,
    needs_browser,
    sign_in,
)

pytestmark = needs_browser


@asynccontextmanager
async def run_other_origin() -> AsyncIterator[tuple[int, list[str]]]:
    """Run a web server on another port. Yield the port and the cookies that it receives."""
    cookies: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        cookies.extend(line for line in head.split("\r\n") if line.lower().startswith("cookie:"))
        body = b"<!doctype html><link rel=icon href=data:,><title>other</title>"
        header = (
            f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(header.encode() + b"\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1], cookies
    server.close()


POST_SCRIPT = """async (url) => {
    try {
        await fetch(url, {method: "POST", mode: "no-cors", credentials: "include"});
    } catch (error) {}
}"""
SUBMIT_FORM_SCRIPT = """([url, fields]) => {
    const form = document.createElement("form");
    Object.assign(form, {method: "post", action: url});
    for (const [name, value] of Object.entries(fields)) {
        form.append(Object.assign(document.createElement("input"), {name, value}));
    }
    document.body.append(form);
    form.submit();
}"""


async def open_session(page: Page, api: Api, key: str) -> None:
    await page.goto(build_page_url(api, "/sign-in"))
    await sign_in(page, key)
    await expect(page.get_by_role("button", name="Sign out")).to_be_visible()


async def test_live_page_shows_sign_in_when_key_is_revoked(
    mongodb_uri: str, db_name: str, tmp_path: Path, page: Page
) -> None:
    async for api in run_api(mongodb_uri, db_name, tmp_path, WITHOUT_WORKER, auth={"mode": "keys"}):
        key = await create_key(api, "ada", "admin")
        await open_session(page, api, key)
        await page.goto(build_page_url(api, "/jobs"))
        await expect(page.locator("#live-status.connected")).to_be_visible()
        token = ApiKeyToken.parse(key)
        assert token is not None
        await revoke_key(api.db, token.key_id)
        await expect(page.locator("h1")).to_have_text("Sign in")
        clear_console_errors(page)


async def test_pages_of_other_origins_cannot_change_data_or_sign_in(
    mongodb_uri: str, db_name: str, tmp_path: Path, page: Page, context: BrowserContext
) -> None:
    async for api in run_api(mongodb_uri, db_name, tmp_path, WITHOUT_WORKER, auth={"mode": "keys"}):
        key, key_of_attacker = await create_key(api, "ada", "admin"), await create_key(api, "mallory")
        response = await api.post(
            "/api/events/jobs", {"job_type": "echo", "parameters": {}}, Authorization=f"Bearer {key}"
        )
        job_id = response.json()["job_id"]
        async with run_other_origin() as (port, cookies):
            await open_session(page, api, key)
            for name in ("127.0.0.1", "localhost"):
                await page.goto(f"http://{name}:{port}/")
                await page.evaluate(POST_SCRIPT, f"{api.url}/api/events/jobs/{job_id}/cancel")
                clear_console_errors(page)
            event_types = [event.type for event in await api.event_store.read_stream(job_id)]
            assert event_types == ["JobSubmitted"]
            # Browsers send a cookie to every port of its host, so it must not contain the key.
            assert cookies
            assert not any(key in cookie for cookie in cookies)
            # Such a page cannot sign the operator out, or in as another user.
            await page.goto(f"http://127.0.0.1:{port}/")
            await page.evaluate(SUBMIT_FORM_SCRIPT, [f"{api.url}/monitoring/events/sign-out", {}])
            await page.wait_for_url("**/sign-out")
            await page.goto(f"http://127.0.0.1:{port}/")
            await page.evaluate(
                SUBMIT_FORM_SCRIPT, [f"{api.url}/monitoring/events/sign-in", {"credential": key_of_attacker}]
            )
            await page.wait_for_url("**/sign-in")
            clear_console_errors(page)
            await page.goto(build_page_url(api, "/jobs"))
            await expect(page.get_by_role("button", name="Sign out (ada)")).to_be_visible()
            # The dashboard itself still can.
            await page.goto(build_page_url(api, f"/jobs/{job_id}"))
            await page.locator("main").get_by_role("button", name="Cancel job").click()
            await page.locator("#confirm-dialog").get_by_role("button", name="Cancel job").click()
            await expect(page.locator("#status .status-badge.cancelled")).to_be_visible()
