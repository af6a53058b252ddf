"""Behind a proxy with a path prefix, pages, scripts, actions and live updates work."""

from __future__ import annotations

from playwright.async_api import Page, expect

from tests.api.conftest import Api
from tests.api.dashboard.conftest import confirm_action, needs_browser
from tests.support.path_proxy import run_path_proxy

pytestmark = needs_browser
PREFIX = "/tools/jobs"


async def test_pages_and_actions_work_under_path_prefix(api: Api, page: Page) -> None:
    port = api.http.base_url.port
    assert port is not None
    async with run_path_proxy(port, PREFIX) as proxy_port:
        home = f"http://127.0.0.1:{proxy_port}{PREFIX}/monitoring/events"
        await page.goto(home)
        await expect(page.locator("#live-status.connected")).to_be_visible()
        await page.get_by_role("link", name="Jobs", exact=True).click()
        await expect(page.locator("#live-status.connected")).to_be_visible()
        job_id = await api.submit({"seconds": 60}, job_name="Somewhere else")
        await page.locator(f"#{job_id} a").click()
        await expect(page.locator("#status .status-badge.processing")).to_be_visible()
        await confirm_action(page, "Cancel job")
        await expect(page.locator("#status .status-badge.cancelled")).to_be_visible()
        assert page.url == f"{home}/jobs/{job_id}"
        await page.goto("about:blank")
