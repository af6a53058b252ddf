"""What a browser lets pages of other origins do with an operator's session: nothing, whatever port or name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from playwright.async_api import BrowserContext, Page, expect

from jobledger.api.auth.api_keys import ApiKeyToken, revoke_key
from tests.api.conftest import Api, run_api
from tests.api.dashboard.conftest import clear_console_errors, needs_browser
from tests.api.dashboard.test_accessibility import key_of
from tests.api.dashboard.test_pages import at

pytestmark = needs_browser


@asynccontextmanager
async def other_origin() -> AsyncIterator[tuple[int, list[str]]]:
    """A web server on a port of its own; it records the cookies that it is sent."""
    cookies: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        cookies.extend(line for line in head.split("\r\n") if line.lower().startswith("cookie:"))
        body = b"<!doctype html><link rel=icon href=data:,><title>other</title>"
        top = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(top.encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1], cookies
    server.close()


CANCEL = """async (url) => {
    try {
        await fetch(url, {method: "POST", mode: "no-cors", credentials: "include"});
    } catch (error) {}
}"""
FORM = """([url, fields]) => {
    const form = document.createElement("form");
    Object.assign(form, {method: "post", action: url});
    for (const [name, value] of Object.entries(fields)) {
        form.append(Object.assign(document.createElement("input"), {name, value}));
    }
    document.body.append(form);
    form.submit();
}"""


async def sign_in(page: Page, api: Api, key: str) -> None:
    await page.goto(at(api, "/sign-in"))
    await page.get_by_label("API key or token").fill(key)
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_role("button", name="Sign out")).to_be_visible()


async def test_live_page_leads_to_the_sign_in_when_its_key_is_revoked(
    mongodb_uri: str, db_name: str, tmp_path: Path, page: Page
) -> None:
    roles = frozenset({"api", "projector"})
    async for api in run_api(mongodb_uri, db_name, tmp_path, roles, auth={"mode": "keys"}):  # type: ignore[arg-type]  # a literal set is a set of str
        key = await key_of(api, "ada", "admin")
        await sign_in(page, api, key)
        await page.goto(at(api, "/jobs"))
        await expect(page.locator("#live-status.connected")).to_be_visible()
        text = ApiKeyToken.parse(key)
        assert text is not None
        await revoke_key(api.db, text.key_id)
        await expect(page.locator("h1")).to_have_text("Sign in", timeout=15_000)
        clear_console_errors(page)


async def test_pages_of_other_origins_change_nothing_and_sign_nobody_in(
    mongodb_uri: str, db_name: str, tmp_path: Path, page: Page, context: BrowserContext
) -> None:
    roles = frozenset({"api", "projector"})
    async for api in run_api(mongodb_uri, db_name, tmp_path, roles, auth={"mode": "keys"}):  # type: ignore[arg-type]  # a literal set is a set of str
        key, attackers = await key_of(api, "ada", "admin"), await key_of(api, "mallory")
        answer = await api.post(
            "/api/events/jobs", {"job_type": "echo", "parameters": {}}, Authorization=f"Bearer {key}"
        )
        job_id = answer.json()["job_id"]
        here = str(api.http.base_url).rstrip("/")
        async with other_origin() as (port, cookies):
            await sign_in(page, api, key)
            for name in ("127.0.0.1", "localhost"):
                await page.goto(f"http://{name}:{port}/")
                await page.evaluate(CANCEL, f"{here}/api/events/jobs/{job_id}/cancel")
                clear_console_errors(page)
            kinds = [event.type for event in await api.event_store.read_stream(job_id)]
            assert kinds == ["JobSubmitted"]
            # A cookie is sent to every port of its host: what is in it must not be the key.
            assert cookies
            assert not any(key in cookie for cookie in cookies)
            # Nor can such a page sign the operator out, or in as somebody else.
            await page.goto(f"http://127.0.0.1:{port}/")
            await page.evaluate(FORM, [f"{here}/monitoring/events/sign-out", {}])
            await page.wait_for_url("**/sign-out")
            await page.goto(f"http://127.0.0.1:{port}/")
            await page.evaluate(FORM, [f"{here}/monitoring/events/sign-in", {"credential": attackers}])
            await page.wait_for_url("**/sign-in")
            clear_console_errors(page)
            await page.goto(at(api, "/jobs"))
            await expect(page.get_by_role("button", name="Sign out (ada)")).to_be_visible()
            # Our own page still can.
            await page.goto(at(api, f"/jobs/{job_id}"))
            await page.locator("main").get_by_role("button", name="Cancel job").click()
            await page.locator("#confirm-dialog").get_by_role("button", name="Cancel job").click()
            await expect(page.locator("#status .status-badge.cancelled")).to_be_visible()
