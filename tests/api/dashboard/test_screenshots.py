"""Screenshots of every page for the documentation and for proofreading. Run them with `make screenshots`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, expect

from tests.api.conftest import Api
from tests.api.dashboard.conftest import build_page_url, needs_browser

pytestmark = [
    needs_browser,
    pytest.mark.skipif(not os.environ.get("JOBLEDGER_SCREENSHOTS"), reason="writes screenshots: make screenshots"),
]
IMAGE_FOLDER = Path(__file__).parents[3] / "docs" / "images"
TITLES = (
    "Ledgers that never forget",
    "An opening",
    "Debugging with a rubber duck",
    "Smaller indexes",
    "Books, backwards",
)


async def submit_conference(api: Api) -> dict[str, str]:
    """Submit jobs and batches of all kinds. Return the paths of the pages that show them, by name of the image."""
    sessions = [
        {"session": title, "track": ("Databases", "Keynotes")[number % 2], "event": "ExampleConf 2025"}
        for number, title in enumerate(TITLES)
    ]
    sessions[3]["fail"] = "The page https://conference.example/talks/4 responded with 404 (Not Found)."
    finished = await api.submit_batch(*sessions, batch_name="Saturday")
    for job_id in finished["job_ids"]:
        await api.wait_until_finished(job_id)
    running = await api.submit_batch(
        *(
            {**session, "session": f"{session['session']} (part two)", "seconds": 300, "fail": None}
            for session in sessions * 2
        ),
        batch_name="Sunday",
    )
    await api.wait_for_event(running["job_ids"][0], "JobProgressed")
    first, failed = finished["job_ids"][0], finished["job_ids"][3]
    return {
        "overview": "",
        "jobs": "/jobs",
        "job": f"/jobs/{first}",
        "failed-job": f"/jobs/{failed}",
        "batches": "/batches",
        "batch": f"/batches/{running['batch_id']}",
        "log": "/log",
        "submit": "/submit",
    }


async def test_screenshots_of_every_page_in_light_and_dark(api: Api, browser: Browser) -> None:
    IMAGE_FOLDER.mkdir(exist_ok=True)
    paths = await submit_conference(api)
    scheme: Any
    for scheme in ("light", "dark"):
        context = await browser.new_context(color_scheme=scheme, viewport={"width": 1200, "height": 750})
        page = await context.new_page()
        for name, path in paths.items():
            await page.goto(build_page_url(api, path))
            await expect(page.locator("h1").first).to_be_visible()
            image = await page.screenshot(path=IMAGE_FOLDER / f"{name}-{scheme}.png")
            assert len(image) > 10_000, name
        await context.close()


@pytest.mark.parametrize("language", ["en", "de"])
async def test_screenshots_of_every_page_in_each_language(language: str, api: Api, browser: Browser) -> None:
    """Write full pages to build/screenshots for proofreading."""
    folder = Path("build") / "screenshots" / language
    folder.mkdir(parents=True, exist_ok=True)
    retrying = await api.submit({"fail": "not yet", "transient": True, "session": "A retry"}, max_attempts=5)
    await api.wait_for_event(retrying, "JobAttemptFailed")
    paths = {**await submit_conference(api), "sign-in": "/sign-in", "not-found": "/jobs/job-000000000000000000000000"}
    paths["retrying-job"] = f"/jobs/{retrying}"
    context = await browser.new_context(
        locale=language, timezone_id="Europe/Berlin", viewport={"width": 1200, "height": 750}
    )
    page = await context.new_page()
    for name, path in paths.items():
        await page.goto(build_page_url(api, path))
        await expect(page.locator("h1").first).to_be_visible()
        if name in ("overview", "jobs", "job", "batches", "batch", "log"):
            await expect(page.locator("#live-status.connected")).to_be_visible()
        await page.screenshot(path=folder / f"{name}.png", full_page=True)
    await page.goto(build_page_url(api, paths["batch"]))
    await page.locator("[data-select-all]").check()
    await page.locator('[data-bulk-action="cancel"]').click()
    await page.screenshot(path=folder / "dialog-bulk.png")
    await page.locator('dialog button[value="dismiss"]').click()
    await page.locator("#actions button.danger").click()
    await page.screenshot(path=folder / "dialog.png")
    await context.close()
