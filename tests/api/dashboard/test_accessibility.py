"""Nothing that comes from outside runs or breaks a page; everybody can use it; nobody sees more than they may."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe  # type: ignore[import-untyped]
from playwright.async_api import Browser, BrowserContext, Page, expect

from jobledger.api.auth.api_keys import ApiKey, ApiKeyToken, store_key
from jobledger.api.dashboard.translations import SUPPORTED_LANGUAGES
from tests.api.conftest import Api, run_api
from tests.api.dashboard.conftest import clear_console_errors, needs_browser
from tests.api.dashboard.test_pages import at, live

pytestmark = needs_browser

CORPUS = (
    "<script>window.ran = 1</script>",
    '"><img src=x onerror="window.ran = 1">',
    "javascript:window.ran=1",
    "{{ 7 * 7 }}{% raw %}",
    "</title></textarea></script><svg onload=window.ran=1>",
    "' onmouseover='window.ran=1",
    "[click](javascript:window.ran=1) <iframe srcdoc='<script>parent.ran=1</script>'>",
    "‮txet desrever 🦆 &lt;b&gt;",
)


async def test_what_comes_from_outside_stays_text(api: Api, page: Page) -> None:
    failing = [{"fail": text, "session": text, "track": text, "speakers": [text]} for text in CORPUS]
    batch = await api.submit_batch(*failing, {"notes": CORPUS}, batch_name=" ".join(CORPUS)[:200])
    jobs = batch["job_ids"]
    for job_id in jobs:
        await api.wait_until_finished(job_id)
    paths = ["", "/jobs", "/batches", f"/batches/{batch['batch_id']}", "/log", *(f"/jobs/{job_id}" for job_id in jobs)]
    for path in paths:
        await page.goto(at(api, path))
        assert await page.evaluate("window.ran") is None, path
        assert await page.locator("iframe, main svg[onload], main script, main [onerror]").count() == 0, path
        links = await page.eval_on_selector_all("a", "all => all.map(one => one.getAttribute('href'))")
        assert not any(str(link).lower().startswith("javascript") for link in links), path
    for text, job_id in zip(CORPUS, jobs, strict=False):
        await page.goto(at(api, f"/jobs/{job_id}"))
        await expect(page.locator("#error")).to_contain_text(" ".join(text.split()))


async def pages_of(api: Api) -> list[str]:
    """A service with something of everything, and the addresses of all of its pages."""
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
async def test_no_page_has_a_serious_barrier(scheme: Any, api: Api, browser: Browser) -> None:
    context = await browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    page = await context.new_page()
    for path in await pages_of(api):
        await page.goto(at(api, path))
        found = await Axe().run(page)
        serious = [
            (violation["id"], [node["html"][:200] for node in violation["nodes"]])
            for violation in found.response["violations"]
            if violation["impact"] in ("serious", "critical")
        ]
        assert serious == [], path
    await context.close()


async def test_pages_fit_a_phone(api: Api, browser: Browser) -> None:
    context = await browser.new_context(viewport={"width": 360, "height": 740})
    page = await context.new_page()
    for path in await pages_of(api):
        await page.goto(at(api, path))
        wide, seen = await page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= seen, path
    await context.close()


async def test_german_is_spoken_to_who_prefers_it(api_without_worker: Api, browser: Browser) -> None:
    context = await browser.new_context(locale="de-AT")
    page = await context.new_page()
    await page.goto(at(api_without_worker))
    await expect(page.locator("h1")).to_have_text("Übersicht")
    await expect(page.locator("html")).to_have_attribute("lang", "de")
    await expect(page.locator("#count-pending").locator("..")).to_contain_text("Wartend")
    await context.close()


@pytest.mark.parametrize("language", SUPPORTED_LANGUAGES)
async def test_every_page_renders_in_each_language(language: str, api: Api) -> None:
    for path in await pages_of(api):
        answer = await api.http.get(at(api, path), headers={"Accept-Language": language})
        assert answer.status_code == (404 if path.endswith("/job-000000000000000000000000") else 200), path
        assert f'<html lang="{language}"' in answer.text


async def key_of(api: Api, user_id: str, *roles: Any) -> str:
    text = ApiKeyToken.generate()
    key = ApiKey(
        key_id=text.key_id, sha256=text.digest, user_id=user_id, roles=list(roles), created_at=datetime.now(UTC)
    )
    await store_key(api.db, key)
    return str(text)


async def test_who_has_a_key_signs_in_and_out_and_sees_only_what_they_may(
    mongodb_uri: str, db_name: str, tmp_path: Path, page: Page, context: BrowserContext
) -> None:
    async for api in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api", "projector"}), auth={"mode": "keys"}):
        ours, theirs = await key_of(api, "ada", "admin"), await key_of(api, "grace")
        answer = await api.post(
            "/api/events/jobs",
            {"job_type": "echo", "parameters": {}, "access_control": {"read_access": ["grace"]}},
            Authorization=f"Bearer {ours}",
        )
        job_id = answer.json()["job_id"]
        await page.goto(at(api, f"/jobs/{job_id}"))
        await expect(page.locator("h1")).to_have_text("Sign in")
        await page.get_by_label("API key or token").fill("jl_wrong")
        await page.get_by_role("button", name="Sign in").click()
        await expect(page.get_by_role("alert")).to_have_text("Sign-in failed. Check the API key or token.")
        clear_console_errors(page)
        await page.get_by_label("API key or token").fill(ours)
        await page.get_by_role("button", name="Sign in").click()
        await expect(page.locator("h1")).to_have_text(job_id)
        [cookie] = await context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        assert await page.evaluate("document.cookie") == ""
        await expect(page.get_by_role("button", name="Cancel job")).to_be_visible()
        await page.get_by_role("button", name="Sign out (ada)").click()
        await expect(page.locator("h1")).to_have_text("Sign in")
        assert await context.cookies() == []
        await page.get_by_label("API key or token").fill(theirs)
        await page.get_by_role("button", name="Sign in").click()
        await expect(page.locator("main")).to_contain_text("requires the role monitor or admin")
        await live(page, at(api, f"/jobs/{job_id}"))
        await expect(page.locator("h1")).to_have_text(job_id)
        await expect(page.locator("main button")).to_have_count(0)
