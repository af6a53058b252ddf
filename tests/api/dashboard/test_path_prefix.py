"""Behind a proxy that puts us under a path of its own, every page, script, action and stream is found."""

from __future__ import annotations

from playwright.async_api import Page, expect

from tests.api.conftest import Api
from tests.api.dashboard.conftest import needs_browser
from tests.api.dashboard.test_pages import SOON_MS, confirm
from tests.support.path_proxy import run_path_proxy

pytestmark = needs_browser
PREFIX = "/tools/jobs"


async def test_everything_works_under_a_path_prefix(api: Api, page: Page) -> None:
    port = api.http.base_url.port
    assert port is not None
    async with run_path_proxy(port, PREFIX) as proxied:
        home = f"http://127.0.0.1:{proxied}{PREFIX}/monitoring/events"
        await page.goto(home)
        await expect(page.locator("#live-status.connected")).to_be_visible()
        await page.get_by_role("link", name="Jobs", exact=True).click()
        await expect(page.locator("#live-status.connected")).to_be_visible()
        job_id = await api.submit({"seconds": 60}, job_name="Somewhere else")
        await page.locator(f"#{job_id} a").click(timeout=SOON_MS)
        await expect(page.locator("#status .status-badge.processing")).to_be_visible(timeout=SOON_MS)
        await confirm(page, "Cancel job")
        await expect(page.locator("#status .status-badge.cancelled")).to_be_visible(timeout=SOON_MS)
        assert page.url == f"{home}/jobs/{job_id}"
        await page.goto("about:blank")
