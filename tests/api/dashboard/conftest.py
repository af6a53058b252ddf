"""Chromium and helpers for tests of the dashboard. Console errors fail a test."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from playwright.async_api import Browser, BrowserContext, Page, async_playwright, expect

from jobledger.api.auth.api_keys import ApiKey, ApiKeyToken, store_key
from tests.api.conftest import Api

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="install Chromium: apt-get install chromium"
)
expect.set_options(timeout=30_000)  # milliseconds
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    assert CHROMIUM is not None, "Chromium is missing: apt-get install chromium"
    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        yield running
        await running.close()


@pytest.fixture
async def context(browser: Browser) -> AsyncIterator[BrowserContext]:
    new_context = await browser.new_context(locale="en-GB", viewport={"width": 1280, "height": 900})
    yield new_context
    await new_context.close()


@pytest.fixture
async def page(context: BrowserContext) -> AsyncIterator[Page]:
    """A page that collects console errors. Remaining errors fail the test."""
    new_page = await context.new_page()
    errors: list[str] = []
    new_page.on("console", lambda entry: errors.append(entry.text) if entry.type in ("error", "warning") else None)
    new_page.on("pageerror", lambda error: errors.append(str(error)))
    new_page.console_errors = errors  # type: ignore[attr-defined]  # tests remove those that they expect
    yield new_page
    assert errors == []


def clear_console_errors(page: Any) -> None:
    """Discard the expected console errors, such as those of an outage."""
    page.console_errors.clear()


def build_page_url(api: Api, path: str = "") -> str:
    """Return the URL of a page of the dashboard."""
    return f"{api.url}/monitoring/events{path}"


async def open_live_page(page: Page, url: str) -> None:
    """Open a page and wait until its live updates are connected."""
    await page.goto(url)
    await expect(page.locator("#live-status.connected")).to_be_visible()


async def confirm_action(page: Page, button: str, reason: str = "") -> None:
    """Click a button and confirm its dialog."""
    await page.locator("main").get_by_role("button", name=button, exact=True).click()
    dialog = page.locator("dialog")
    if reason:
        await dialog.get_by_role("textbox").fill(reason)
    await dialog.get_by_role("button", name=button, exact=True).click()


async def create_key(api: Api, user_id: str, *roles: Any) -> str:
    """Store an API key for a user and return its text."""
    token = ApiKeyToken.generate()
    key = ApiKey(
        key_id=token.key_id, sha256=token.digest, user_id=user_id, roles=list(roles), created_at=datetime.now(UTC)
    )
    await store_key(api.db, key)
    return str(token)


async def sign_in(page: Page, key: str) -> None:
    """Fill in and submit the sign-in form of the open page."""
    await page.get_by_label("API key or token").fill(key)
    await page.get_by_role("button", name="Sign in").click()
