"""All times of a page are in one time zone: that of the browser, or UTC without JavaScript."""

from __future__ import annotations

import re
from datetime import datetime
from zoneinfo import ZoneInfo

from playwright.async_api import Browser, expect

from tests.api.conftest import Api
from tests.api.dashboard.conftest import build_page_url, needs_browser
from tests.api.dashboard.test_translations import TEMPLATES

CLOCK_TIME = re.compile(r"\d{1,2}:\d{2}:\d{2}")
TIMES = """() => [...document.querySelectorAll("time")].map((time) => [time.dateTime, time.textContent])"""
TEXT_WITHOUT_TIMES = """() => {
    const main = document.querySelector("main").cloneNode(true);
    for (const element of main.querySelectorAll("time, pre")) element.remove();
    return main.textContent;
}"""


def test_templates_output_timestamps_only_through_the_time_element() -> None:
    timestamp = re.compile(r"\b\w+\.(?:\w+_at|\w+_until|\w+_since|time|timestamp)\b")
    for name, text in TEMPLATES.items():
        for expression in re.findall(r"\{\{.*?\}\}", text):
            if timestamp.search(expression):
                assert "time_element(" in expression, (name, expression)


async def submit_retrying_job(api: Api) -> str:
    """Submit a job that fails once. Return its ID when it waits for the next attempt."""
    job_id = await api.submit({"fail": "not yet", "transient": True}, max_attempts=3)
    await api.wait_for_event(job_id, "JobAttemptFailed")
    await api.get("/api/events/jobs", await api.event_store.read_head_position())
    return job_id


@needs_browser
async def test_page_times_are_in_time_zone_of_browser(api: Api, browser: Browser) -> None:
    job_id = await submit_retrying_job(api)
    # UTC+05:45: even the minutes differ from UTC.
    context = await browser.new_context(locale="en-GB", timezone_id="Asia/Kathmandu")
    page = await context.new_page()
    for path in (f"/jobs/{job_id}", "/jobs", "/log", ""):
        await page.goto(build_page_url(api, path))
        await expect(page.locator("html.js")).to_be_attached()
        await expect(page.locator("[data-time-zone]")).to_have_text(re.compile("Asia/(Kathmandu|Katmandu)"))
        times = await page.evaluate(TIMES)
        assert times, path
        for iso, text in times:
            local = datetime.fromisoformat(iso).astimezone(ZoneInfo("Asia/Kathmandu"))
            assert f"{local:%H:%M:%S}" in text, (path, iso, text)
        assert not CLOCK_TIME.search(await page.evaluate(TEXT_WITHOUT_TIMES)), path
    await page.goto(build_page_url(api, f"/jobs/{job_id}"))
    await expect(page.locator("#attempts td.wide-column time").first).to_be_visible()
    await context.close()


@needs_browser
async def test_page_times_without_javascript_are_in_utc(api: Api, browser: Browser) -> None:
    job_id = await submit_retrying_job(api)
    context = await browser.new_context(java_script_enabled=False, timezone_id="Asia/Kathmandu")
    page = await context.new_page()
    await page.goto(build_page_url(api, f"/jobs/{job_id}"))
    texts = await page.locator("time").all_text_contents()
    assert texts
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", text) for text in texts), texts
    await expect(page.locator("footer")).to_contain_text("UTC")
    await context.close()
