"""Pages of the dashboard update themselves, and their actions work."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, expect
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.dashboard.errors import render_errors
from jobledger.ledger.domain.commands import ClaimJob, ReleaseJob
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.workers.processor import JobContext, Results
from jobledger.workers.processors.echo import EchoProcessor
from tests.api.conftest import Api, run_api
from tests.api.dashboard.conftest import build_page_url, confirm_action, needs_browser, open_live_page
from tests.processors.session.fixtures import CONFERENCE_PAGE, SiteResponse, html, make_pdf, serve_site

pytestmark = needs_browser


@pytest.fixture
def job_release(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """An event that echo jobs with `seconds` wait for, so that a page can show them while they run."""
    release = asyncio.Event()
    run = EchoProcessor.run

    async def run_after_release(self: EchoProcessor, job: JobContext) -> Results:
        if job.parameters.model_dump()["seconds"]:
            await release.wait()
        return await run(self, job)

    monkeypatch.setattr(EchoProcessor, "run", run_after_release)
    return release


async def test_job_list_shows_new_job_and_status_changes_without_reload(
    job_release: asyncio.Event, api: Api, page: Page
) -> None:
    await open_live_page(page, build_page_url(api, "/jobs"))
    await page.evaluate("window.isSamePage = true")
    job_id = await api.submit({"seconds": 0.5}, job_name="Hello <b>you</b>")
    row = page.locator(f"#{job_id}")
    await expect(row.locator(".status-badge.processing")).to_be_visible()
    job_release.set()
    await expect(row.locator(".status-badge.completed")).to_be_visible()
    await expect(row.locator("th a")).to_have_text("Hello <b>you</b>")
    assert await page.evaluate("window.isSamePage")
    await row.locator("th a").click()
    await expect(page.locator("h1")).to_have_text("Hello <b>you</b>")
    await expect(page.locator("#preview")).to_contain_text('"seconds":0.5')


async def test_overview_updates_counts_without_reload(job_release: asyncio.Event, api: Api, page: Page) -> None:
    await open_live_page(page, build_page_url(api))
    await page.evaluate("window.isSamePage = true")
    batch = await api.submit_batch({"seconds": 0.5}, {"fail": "broken"}, batch_name="Keynotes")
    await expect(page.locator("#count-total")).to_have_text("2")
    await expect(page.locator(f"#{batch['batch_id']}")).to_contain_text("Keynotes")
    await expect(page.locator("#count-failed")).to_have_text("1")
    job_release.set()
    await expect(page.locator("#count-completed")).to_have_text("1")
    await expect(page.locator(".chart rect.completed")).to_have_count(1)
    await expect(page.locator(f"#{batch['batch_id']}")).to_have_count(0)
    assert await page.evaluate("window.isSamePage")


async def test_job_page_cancels_with_reason_and_restarts(api: Api, page: Page) -> None:
    job_id = await api.submit({"seconds": 60})
    await open_live_page(page, build_page_url(api, f"/jobs/{job_id}"))
    await expect(page.locator("#status .status-badge.processing")).to_be_visible()
    await confirm_action(page, "Cancel job", "wrong file")
    await expect(page.locator("#status .status-badge.cancelled")).to_be_visible()
    await expect(page.locator("#events")).to_contain_text("wrong file")
    await page.get_by_role("button", name="Restart job").click()
    await page.locator("dialog").get_by_role("button", name="Back").click()
    await expect(page.locator("#status .status-badge.cancelled")).to_be_visible()
    await confirm_action(page, "Restart job")
    await expect(page.locator("#status .status-badge.processing")).to_be_visible()
    await expect(page.locator("#attempts tr")).to_have_count(2)
    history = (await api.get(f"/api/events/jobs/{job_id}/history")).json()["events"]
    assert [event["data"].get("reason") for event in history if event["type"] == "JobCancelRequested"] == ["wrong file"]
    assert sum(event["type"] == "JobRestarted" for event in history) == 1


async def test_job_list_cancels_selected_jobs(api_without_worker: Api, page: Page) -> None:
    job_ids = [await api_without_worker.submit() for _ in range(3)]
    await open_live_page(page, build_page_url(api_without_worker, "/jobs"))
    button = page.locator("main").get_by_role("button", name="Cancel jobs")
    await expect(button).to_be_disabled()
    for job_id in job_ids[:2]:
        await page.locator(f"#{job_id} input").check()
    await expect(page.locator("[data-selection]")).to_have_text("2 jobs selected")
    await button.click()
    await expect(page.locator("#confirm-title")).to_have_text("Cancel 2 jobs?")
    await page.locator("dialog").get_by_role("button", name="Cancel jobs").click()
    await expect(page.locator("[data-selection]")).to_have_text("0 jobs selected")
    await expect(page.locator("#toast")).to_have_text("Accepted: 2, rejected: 0")
    await expect(page.locator("tr .status-badge.cancelled")).to_have_count(2)
    await expect(page.locator(f"#{job_ids[2]} .status-badge.pending")).to_be_visible()


async def test_job_list_filters_searches_and_pages(api_without_worker: Api, page: Page) -> None:
    for number in range(60):
        await api_without_worker.submit({"track": f"Track {number % 2}", "session": f"Talk {number}"})
    await page.goto(build_page_url(api_without_worker, "/jobs"))
    await page.get_by_label("Track").fill("Track 1")
    await page.get_by_role("button", name="Filter").click()
    await expect(page.locator("tbody tr")).to_have_count(30)
    await page.goto(build_page_url(api_without_worker, "/jobs"))
    await expect(page.locator("tbody tr")).to_have_count(50)
    await page.get_by_role("link", name="Next page").first.click()
    await expect(page.locator("tbody tr")).to_have_count(10)
    await page.get_by_label("Search").fill("talk 59")
    await page.get_by_role("button", name="Filter").click()
    await expect(page.locator("tbody th")).to_have_text(["Talk 59"])


async def test_submit_page_validates_and_submits_batch_that_pauses_and_resumes(
    api_without_worker: Api, page: Page
) -> None:
    await page.goto(build_page_url(api_without_worker, "/submit"))
    batch_json, results = page.locator("#batch-json"), page.locator("#validation-results")
    submit = page.get_by_role("button", name="Submit", exact=True)
    validate = page.get_by_role("button", name="Validate")
    await batch_json.fill("{")
    await validate.click()
    await expect(results).to_contain_text("Invalid JSON")
    session: dict[str, Any] = {"event": "E", "session": "S", "url": "https://e.example/", "filename": "s.md"}
    await batch_json.fill(json.dumps([session]))
    await validate.click()
    await expect(results).to_contain_text("jobs[0].parameters.track")
    await expect(submit).to_be_disabled()
    console_errors: list[str] = page.console_errors  # type: ignore[attr-defined]
    assert len(console_errors) == 1, "the browser reports the status 422"
    console_errors.clear()
    await batch_json.fill(json.dumps([{**session, "track": "T"}, {**session, "track": "U"}]))
    await page.get_by_label("Batch name").fill("Two talks")
    await validate.click()
    await expect(results).to_have_text("2 jobs are valid.")
    await submit.click()
    await expect(page.locator("h1")).to_have_text("Two talks")
    await expect(page.locator("#count-pending")).to_have_text("2")
    await expect(page.locator("#live-status.connected")).to_be_visible()
    await confirm_action(page, "Pause batch")
    await expect(page.locator("#status .paused")).to_be_visible()
    await confirm_action(page, "Resume batch")
    await expect(page.locator("#status .paused")).to_have_count(0)


async def test_log_page_adds_new_events_at_the_top(api_without_worker: Api, page: Page) -> None:
    await open_live_page(page, build_page_url(api_without_worker, "/log?types=JobSubmitted"))
    first = await api_without_worker.submit(job_name="first")
    await expect(page.locator("#events tr").first).to_contain_text(first)
    second = await api_without_worker.submit(job_name="second")
    await expect(page.locator("#events tr").first).to_contain_text(second)
    await expect(page.locator("#events tr")).to_have_count(2)
    await page.get_by_role("link", name=first).click()
    await expect(page.locator("h1")).to_have_text("first")


async def test_past_state_slider_shows_job_at_each_event(api: Api, page: Page) -> None:
    job_id = await api.submit({"fail": "no luck"}, max_attempts=1)
    await api.wait_until_finished(job_id)
    await page.goto(build_page_url(api, f"/jobs/{job_id}"))
    state, slider = page.locator("#past-state-summary"), page.locator("#past-state input")
    await expect(state).to_contain_text("Failed")
    await slider.focus()
    await slider.press("Home")
    await expect(state).to_contain_text("Pending")
    await slider.press("ArrowRight")
    await expect(state).to_contain_text("Processing")


async def test_job_page_shows_released_attempts_without_maximum(api_without_worker: Api, page: Page) -> None:
    api = api_without_worker
    job_id = await api.submit({"text": "x"}, max_attempts=1)
    claim = ClaimJob("worker-1", datetime.now(UTC) + timedelta(hours=1))
    await api.handle_commands(job_id, claim, ReleaseJob("worker-1", 1, "the worker shuts down"), claim)
    await page.goto(build_page_url(api, f"/jobs/{job_id}"))
    attempt = page.locator("#details dt", has_text="Attempt").locator("xpath=following-sibling::dd[1]")
    await expect(attempt).to_have_text(re.compile(r"^2 \("))
    await expect(page.locator("#attempts tr").first).to_contain_text("Released")
    state, slider = page.locator("#past-state-summary"), page.locator("#past-state input")
    await expect(state).to_contain_text("Processing · Attempt 2 · ")
    await slider.focus()
    await slider.press("Home")
    await expect(state).to_contain_text("Pending · 0 %")


async def test_session_job_page_shows_preview_slides_and_working_links(
    mongodb_uri: str, db_name: str, tmp_path: Path, page: Page
) -> None:
    processors = {"session": {"allowed_private_hosts": ["127.0.0.1"]}}
    with serve_site() as site:
        async for api in run_api(mongodb_uri, db_name, tmp_path, processors=processors):
            parameters = {
                "event": "E",
                "session": "Ledgers that never forget",
                "filename": "Ledgers [1].md",
                "track": "T & U",
                "url": site.put("/talk", html(CONFERENCE_PAGE)),
                "attachments_url": site.put("/slides.pdf", SiteResponse(make_pdf(3))),
            }
            response = await api.post("/api/events/jobs", {"parameters": parameters})
            job_id = response.json()["job_id"]
            assert (await api.wait_until_finished(job_id))["status"] == "completed"
            await page.goto(build_page_url(api, f"/jobs/{job_id}"))
            await expect(page.locator("#preview h4").first).to_have_text("What you will learn")
            await expect(page.locator("#attempts")).to_contain_text("transcript")
            for images in (page.locator("#preview img"), page.locator(".gallery img")):
                await expect(images).to_have_count(3)
                for number in range(3):
                    await images.nth(number).scroll_into_view_if_needed()
                    await expect(images.nth(number)).to_have_js_property("complete", value=True)
                    assert await images.nth(number).evaluate("image => image.naturalWidth") > 100
            links = await page.locator("section details ul a, .gallery a").evaluate_all(
                "links => links.map(link => link.href)"
            )
            for link in links:
                assert (await api.http.get(link)).status_code == 200, link
            assert len(links) == 3 + 7


async def test_page_names_no_database_host_while_database_is_down() -> None:
    @render_errors
    async def show_page(_request: Request) -> Response:
        raise LedgerUnavailable("reading the jobs: db1.internal:27017 refused the connection")

    response = await show_page(Request({"type": "http", "path": "/monitoring/events/jobs", "headers": []}))
    assert response.status_code == 503
    assert b"The database does not respond." in response.body
    assert b"db1" not in response.body


async def test_pages_ignore_conditional_headers_and_prefer_wait(api_without_worker: Api) -> None:
    """If-None-Match, If-Match and Prefer apply to API routes, not to the pages that call them."""
    job_id = await api_without_worker.submit()
    headers = {"If-None-Match": "*", "Prefer": "wait=30", "If-Match": '"7"'}
    for path in ("", "/jobs", f"/jobs/{job_id}", "/batches", "/log", "/submit"):
        response = await api_without_worker.get(f"/monitoring/events{path}", **headers)
        assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8"), path


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 401),
        (b"credential=%ff%00&next=//evil.example", 401),
        (b"&".join(b"a%d=1" % number for number in range(50)), 400),
        (b"credential=" + b"x" * 30_000, 413),
    ],
    ids=["empty", "invalid UTF-8", "too many fields", "too large"],
)
async def test_invalid_sign_in_form_is_rejected(body: bytes, status: int, api_without_worker: Api) -> None:
    response = await api_without_worker.http.post(
        "/monitoring/events/sign-in", content=body, headers=api_without_worker.origin_header
    )
    assert response.status_code == status
    assert "evil" not in response.text
    assert "set-cookie" not in response.headers
