"""Accessibility of every page: axe rules in both color schemes, phone width, and languages."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe  # type: ignore[import-untyped]
from playwright.async_api import Browser, expect

from jobledger.api.dashboard.translations import SUPPORTED_LANGUAGES
from tests.api.conftest import Api
from tests.api.dashboard.conftest import build_page_url, needs_browser

pytestmark = needs_browser


async def submit_examples(api: Api) -> list[str]:
    """Submit jobs in all states. Return the paths of all pages."""
    batch = await api.submit_batch(
        {"track": "Keynotes", "session": "An opening"},
        {"track": "Databases", "session": "Ledgers", "fail": "The page could not be read."},
        {"track": "Databases", "session": "A long one", "seconds": 60},
        batch_name="Saturday",
    )
    first, second, _ = batch["job_ids"]
    await api.wait_until_finished(first)
    await api.wait_until_finished(second)
    paths = ("", "/jobs", f"/jobs/{first}", f"/jobs/{second}", "/batches", f"/batches/{batch['batch_id']}")
    return [*paths, "/log", "/submit", "/sign-in", "/jobs/job-000000000000000000000000"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_pages_have_no_serious_accessibility_violations(scheme: Any, api: Api, browser: Browser) -> None:
    context = await browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    page = await context.new_page()
    for path in await submit_examples(api):
        await page.goto(build_page_url(api, path))
        results = await Axe().run(page)
        serious = [
            (violation["id"], [node["html"][:200] for node in violation["nodes"]])
            for violation in results.response["violations"]
            if violation["impact"] in ("serious", "critical")
        ]
        assert serious == [], path
    await context.close()


async def test_pages_fit_phone_width(api: Api, browser: Browser) -> None:
    context = await browser.new_context(viewport={"width": 360, "height": 740})
    page = await context.new_page()
    for path in await submit_examples(api):
        await page.goto(build_page_url(api, path))
        page_width, window_width = await page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert page_width <= window_width, path
    await context.close()


async def test_page_is_german_for_german_browser(api_without_worker: Api, browser: Browser) -> None:
    context = await browser.new_context(locale="de-AT")
    page = await context.new_page()
    await page.goto(build_page_url(api_without_worker))
    await expect(page.locator("h1")).to_have_text("Übersicht")
    await expect(page.locator("html")).to_have_attribute("lang", "de")
    await expect(page.locator("#count-pending").locator("..")).to_contain_text("Wartend")
    await context.close()


@pytest.mark.parametrize("language", SUPPORTED_LANGUAGES)
async def test_every_page_renders_in_each_language(language: str, api: Api) -> None:
    for path in await submit_examples(api):
        response = await api.http.get(build_page_url(api, path), headers={"Accept-Language": language})
        assert response.status_code == (404 if path.endswith("/job-000000000000000000000000") else 200), path
        assert f'<html lang="{language}"' in response.text
