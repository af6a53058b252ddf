"""Every page as a picture, light and dark, in docs/images: `make screenshots`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, expect

from tests.api.conftest import Api
from tests.api.dashboard.conftest import needs_browser
from tests.api.dashboard.test_pages import at

pytestmark = [
    needs_browser,
    pytest.mark.skipif(not os.environ.get("JOBLEDGER_SCREENSHOTS"), reason="pictures are made by `make screenshots`"),
]
KEPT = Path(__file__).parents[3] / "docs" / "images"
TITLES = (
    "Ledgers that never forget",
    "An opening",
    "Debugging with a rubber duck",
    "Smaller indexes",
    "Books, backwards",
)


async def a_conference(api: Api) -> dict[str, str]:
    """Something of everything, and the addresses of the pages that show it."""
    sessions = [
        {"session": title, "track": ("Databases", "Keynotes")[number % 2], "event": "ExampleConf 2025"}
        for number, title in enumerate(TITLES)
    ]
    sessions[3]["fail"] = "The page https://conference.example/talks/4 answered 404 (Not Found)."
    done = await api.submit_batch(*sessions, batch_name="Saturday")
    for job_id in done["job_ids"]:
        await api.wait_until_finished(job_id)
    running = await api.submit_batch(
        *({**one, "session": f"{one['session']} (part two)", "seconds": 300, "fail": None} for one in sessions * 2),
        batch_name="Sunday",
    )
    await api.wait_for_event(running["job_ids"][0], "JobProgressed")
    first, failed = done["job_ids"][0], done["job_ids"][3]
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


async def test_every_page_is_pictured_in_light_and_dark(api: Api, browser: Browser) -> None:
    KEPT.mkdir(exist_ok=True)
    paths = await a_conference(api)
    scheme: Any
    for scheme in ("light", "dark"):
        context = await browser.new_context(color_scheme=scheme, viewport={"width": 1200, "height": 750})
        page = await context.new_page()
        for name, path in paths.items():
            await page.goto(at(api, path))
            await expect(page.locator("h1").first).to_be_visible()
            picture = await page.screenshot(path=KEPT / f"{name}-{scheme}.png")
            assert len(picture) > 10_000, name
        await context.close()


@pytest.mark.parametrize("language", ["en", "de"])
async def test_every_page_is_pictured_in_each_language(language: str, api: Api, browser: Browser) -> None:
    """Full pages for proofreading, in build/screenshots."""
    folder = Path("build") / "screenshots" / language
    folder.mkdir(parents=True, exist_ok=True)
    retrying = await api.submit({"fail": "not yet", "transient": True, "session": "A retry"}, max_attempts=5)
    await api.wait_for_event(retrying, "JobAttemptFailed")
    paths = {**await a_conference(api), "sign-in": "/sign-in", "not-found": "/jobs/job-000000000000000000000000"}
    paths["retrying-job"] = f"/jobs/{retrying}"
    context = await browser.new_context(
        locale=language, timezone_id="Europe/Berlin", viewport={"width": 1200, "height": 750}
    )
    page = await context.new_page()
    for name, path in paths.items():
        await page.goto(at(api, path))
        await expect(page.locator("h1").first).to_be_visible()
        if name in ("overview", "jobs", "job", "batches", "batch", "log"):
            await expect(page.locator("#live-status.connected")).to_be_visible()
        await page.screenshot(path=folder / f"{name}.png", full_page=True)
    await page.goto(at(api, paths["batch"]))
    await page.locator("[data-select-all]").check()
    await page.locator('[data-bulk-action="cancel"]').click()
    await page.screenshot(path=folder / "dialog-bulk.png")
    await page.locator('dialog button[value="dismiss"]').click()
    await page.locator("#actions button.danger").click()
    await page.screenshot(path=folder / "dialog.png")
    await context.close()
