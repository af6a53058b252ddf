"""A page that is open while the API is started anew comes back by itself, and has missed nothing."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path

import httpx
import pytest
from playwright.async_api import Page, expect

from tests.api.dashboard.conftest import clear_console_errors, needs_browser
from tests.support.installation import Installation

pytestmark = needs_browser


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.timeout(120)
async def test_a_page_survives_a_restart_of_the_api(mongodb_uri: str, db_name: str, tmp_path: Path, page: Page) -> None:
    port = free_port()
    mongodb = {"uri": mongodb_uri, "db_name": db_name}
    with Installation(tmp_path, mongodb=mongodb, api={"port": port}) as installation:
        for role in ("projector", "worker"):
            await asyncio.to_thread(installation.start(role).wait_until_ready)
        serving = await asyncio.to_thread(installation.start("api").wait_until_ready)
        url = serving.url
        jobs = {"job_type": "echo", "parameters": {"seconds": 4}}
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            job_id = (await client.post("/api/events/jobs", json=jobs)).json()["job_id"]
        await page.goto(f"{url}/monitoring/events/jobs/{job_id}")
        await expect(page.locator("#status .status-badge.processing")).to_be_visible(timeout=15_000)
        await expect(page.locator("#live-status.connected")).to_be_visible()
        await page.evaluate("window.stillTheSamePage = true")
        serving.process.send_signal(signal.SIGKILL)
        await expect(page.locator("#live-status")).to_have_text("Reconnecting …")
        await asyncio.sleep(5)  # meanwhile the job ends
        await asyncio.to_thread(installation.start("api").wait_until_ready)
        await expect(page.locator("#status .status-badge.completed")).to_be_visible(timeout=20_000)
        await expect(page.locator("#events")).to_contain_text("JobCompleted")
        await expect(page.locator("#live-status.connected")).to_be_visible()
        assert await page.evaluate("window.stillTheSamePage")
        clear_console_errors(page)
