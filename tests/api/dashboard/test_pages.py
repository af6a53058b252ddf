"""The dashboard moves by itself, and what one does in it is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, expect

from tests.api.conftest import Api, run_api
from tests.api.dashboard.conftest import needs_browser
from tests.processors.session.fixtures import CONFERENCE_PAGE, SiteResponse, html, make_pdf, serve_site

pytestmark = needs_browser
SOON_MS = 15_000


def at(api: Api, path: str = "") -> str:
    return f"{api.http.base_url}/monitoring/events{path}"


async def live(page: Page, address: str) -> None:
    await page.goto(address)
    await expect(page.locator("#live-status.connected")).to_be_visible()


async def confirm(page: Page, button: str, reason: str = "") -> None:
    await page.locator("main").get_by_role("button", name=button, exact=True).click()
    dialog = page.locator("dialog")
    if reason:
        await dialog.get_by_role("textbox").fill(reason)
    await dialog.get_by_role("button", name=button, exact=True).click()


async def test_a_job_appears_and_moves_in_an_open_page(api: Api, page: Page) -> None:
    await live(page, at(api, "/jobs"))
    await page.evaluate("window.stillTheSamePage = true")
    job_id = await api.submit({"seconds": 2}, job_name="Hello <b>you</b>")
    row = page.locator(f"#{job_id}")
    await expect(row.locator(".status-badge.processing")).to_be_visible(timeout=SOON_MS)
    await expect(row.locator(".status-badge.completed")).to_be_visible(timeout=SOON_MS)
    await expect(row.locator("th a")).to_have_text("Hello <b>you</b>")
    assert await page.evaluate("window.stillTheSamePage")
    await row.locator("th a").click()
    await expect(page.locator("h1")).to_have_text("Hello <b>you</b>")
    await expect(page.locator("#preview")).to_contain_text('"seconds":2.0')


async def test_the_overview_counts_without_a_reload(api: Api, page: Page) -> None:
    await live(page, at(api))
    await page.evaluate("window.stillTheSamePage = true")
    batch = await api.submit_batch({"seconds": 3}, {"fail": "broken"}, batch_name="Keynotes")
    await expect(page.locator("#count-total")).to_have_text("2", timeout=SOON_MS)
    await expect(page.locator(f"#{batch['batch_id']}")).to_contain_text("Keynotes")
    await expect(page.locator("#count-failed")).to_have_text("1", timeout=SOON_MS)
    await expect(page.locator("#count-completed")).to_have_text("1", timeout=SOON_MS)
    await expect(page.locator(".chart rect.completed")).to_have_count(1)
    await expect(page.locator(f"#{batch['batch_id']}")).to_have_count(0)
    assert await page.evaluate("window.stillTheSamePage")


async def test_a_job_is_cancelled_and_restarted_with_a_reason_in_the_log(api: Api, page: Page) -> None:
    job_id = await api.submit({"seconds": 60})
    await live(page, at(api, f"/jobs/{job_id}"))
    await expect(page.locator("#status .status-badge.processing")).to_be_visible(timeout=SOON_MS)
    await confirm(page, "Cancel job", "wrong file")
    await expect(page.locator("#status .status-badge.cancelled")).to_be_visible(timeout=SOON_MS)
    await expect(page.locator("#events")).to_contain_text("wrong file")
    await page.get_by_role("button", name="Restart job").click()
    await page.locator("dialog").get_by_role("button", name="Back").click()
    await expect(page.locator("#status .status-badge.cancelled")).to_be_visible()
    await confirm(page, "Restart job")
    await expect(page.locator("#status .status-badge.processing")).to_be_visible(timeout=SOON_MS)
    await expect(page.locator("#attempts tbody tr")).to_have_count(2)
    history = (await api.get(f"/api/events/jobs/{job_id}/history")).json()["events"]
    assert [event["data"].get("reason") for event in history if event["type"] == "JobCancelRequested"] == ["wrong file"]
    assert sum(event["type"] == "JobRestarted" for event in history) == 1


async def test_those_chosen_are_cancelled_together(api_without_worker: Api, page: Page) -> None:
    job_ids = [await api_without_worker.submit() for _ in range(3)]
    await live(page, at(api_without_worker, "/jobs"))
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
    await expect(page.locator("tr .status-badge.cancelled")).to_have_count(2, timeout=SOON_MS)
    await expect(page.locator(f"#{job_ids[2]} .status-badge.pending")).to_be_visible()


async def test_jobs_are_found_by_what_is_asked_for(api_without_worker: Api, page: Page) -> None:
    for number in range(60):
        await api_without_worker.submit({"track": f"Track {number % 2}", "session": f"Talk {number}"})
    await page.goto(at(api_without_worker, "/jobs"))
    await page.get_by_label("Track").fill("Track 1")
    await page.get_by_role("button", name="Filter").click()
    await expect(page.locator("tbody tr")).to_have_count(30)
    await page.goto(at(api_without_worker, "/jobs"))
    await expect(page.locator("tbody tr")).to_have_count(50)
    await page.get_by_role("link", name="Next page").first.click()
    await expect(page.locator("tbody tr")).to_have_count(10)
    await page.get_by_label("Search").fill("talk 59")
    await page.get_by_role("button", name="Filter").click()
    await expect(page.locator("tbody th")).to_have_text(["Talk 59"])


async def test_a_batch_is_checked_submitted_paused_and_resumed(api_without_worker: Api, page: Page) -> None:
    await page.goto(at(api_without_worker, "/submit"))
    content, findings = page.locator("#batch-json"), page.locator("#validation-results")
    send = page.get_by_role("button", name="Submit", exact=True)
    check = page.get_by_role("button", name="Validate")
    await content.fill("{")
    await check.click()
    await expect(findings).to_contain_text("Invalid JSON")
    session: dict[str, Any] = {"event": "E", "session": "S", "url": "https://e.example/", "filename": "s.md"}
    await content.fill(json.dumps([session]))
    await check.click()
    await expect(findings).to_contain_text("jobs[0].parameters.track")
    await expect(send).to_be_disabled()
    page_complaints: list[str] = page.console_errors  # type: ignore[attr-defined]
    assert len(page_complaints) == 1, "the browser tells of the 422"
    page_complaints.clear()
    await content.fill(json.dumps([{**session, "track": "T"}, {**session, "track": "U"}]))
    await page.get_by_label("Batch name").fill("Two talks")
    await check.click()
    await expect(findings).to_have_text("2 jobs are valid.")
    await send.click()
    await expect(page.locator("h1")).to_have_text("Two talks")
    await expect(page.locator("#count-pending")).to_have_text("2", timeout=SOON_MS)
    await expect(page.locator("#live-status.connected")).to_be_visible()
    await confirm(page, "Pause batch")
    await expect(page.locator("#status .paused")).to_be_visible(timeout=SOON_MS)
    await confirm(page, "Resume batch")
    await expect(page.locator("#status .paused")).to_have_count(0, timeout=SOON_MS)


async def test_the_tail_of_the_log_comes_in_at_the_top(api_without_worker: Api, page: Page) -> None:
    await live(page, at(api_without_worker, "/log?types=JobSubmitted"))
    first = await api_without_worker.submit(job_name="first")
    await expect(page.locator("#events tr").first).to_contain_text(first, timeout=SOON_MS)
    second = await api_without_worker.submit(job_name="second")
    await expect(page.locator("#events tr").first).to_contain_text(second, timeout=SOON_MS)
    await expect(page.locator("#events tr")).to_have_count(2)
    await page.get_by_role("link", name=first).click()
    await expect(page.locator("h1")).to_have_text("first")


async def test_the_slider_shows_a_job_as_it_was(api: Api, page: Page) -> None:
    job_id = await api.submit({"fail": "no luck"}, max_attempts=1)
    await api.wait_until_finished(job_id)
    await page.goto(at(api, f"/jobs/{job_id}"))
    what, slider = page.locator("#time-travel-state"), page.locator("#time-travel input")
    await expect(what).to_contain_text("Failed")
    await slider.focus()
    await slider.press("Home")
    await expect(what).to_contain_text("Pending")
    await slider.press("ArrowRight")
    await expect(what).to_contain_text("Processing")


async def test_a_session_reads_as_it_is_and_its_slides_are_there(
    mongodb_uri: str, db_name: str, tmp_path: Path, page: Page
) -> None:
    sessions = {"session": {"allowed_private_hosts": ["127.0.0.1"]}}
    with serve_site() as site:
        async for api in run_api(mongodb_uri, db_name, tmp_path, processors=sessions):
            asked = {
                **{
                    "event": "E",
                    "session": "Ledgers that never forget",
                    "filename": "Ledgers [1].md",
                    "track": "T & U",
                },
                "url": site.put("/talk", html(CONFERENCE_PAGE)),
                "attachments_url": site.put("/slides.pdf", SiteResponse(make_pdf(3))),
            }
            answer = await api.post("/api/events/jobs", {"parameters": asked})
            job_id = answer.json()["job_id"]
            assert (await api.wait_until_finished(job_id))["status"] == "completed"
            await page.goto(at(api, f"/jobs/{job_id}"))
            await expect(page.locator("#preview h4").first).to_have_text("What you will learn")
            await expect(page.locator("#attempts")).to_contain_text("transcript")
            for pictures in (page.locator("#preview img"), page.locator(".gallery img")):
                await expect(pictures).to_have_count(3)
                for number in range(3):
                    await pictures.nth(number).scroll_into_view_if_needed()
                    await expect(pictures.nth(number)).to_have_js_property("complete", value=True)
                    assert await pictures.nth(number).evaluate("it => it.naturalWidth") > 100
            links = await page.locator("section details ul a, .gallery a").evaluate_all(
                "all => all.map(one => one.href)"
            )
            for link in links:
                assert (await api.http.get(link)).status_code == 200, link
            assert len(links) == 3 + 7


async def test_what_is_said_of_a_page_is_not_said_of_what_it_asks_for(api_without_worker: Api) -> None:
    """Without a browser: a page that is asked for conditionally, or with patience, is a page all the same."""
    job_id = await api_without_worker.submit()
    headers = {"If-None-Match": "*", "Prefer": "wait=30", "If-Match": '"7"'}
    for path in ("", "/jobs", f"/jobs/{job_id}", "/batches", "/log", "/submit"):
        answer = await api_without_worker.get(f"/monitoring/events{path}", **headers)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8"), path


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 401),
        (b"credential=%ff%00&next=//evil.example", 401),
        (b"&".join(b"a%d=1" % number for number in range(50)), 400),
        (b"credential=" + b"x" * 30_000, 413),
    ],
)
async def test_nonsense_instead_of_a_sign_in_is_refused(body: bytes, status: int, api_without_worker: Api) -> None:
    ours = {"Origin": str(api_without_worker.http.base_url).rstrip("/")}
    answer = await api_without_worker.http.post("/monitoring/events/sign-in", content=body, headers=ours)
    assert answer.status_code == status
    assert "evil" not in answer.text
    assert "set-cookie" not in answer.headers
