"""Tests of hostile sessions: each job ends in time with an error or a warning that states why.

The worker continues.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.mongo.connection import Connection
from tests.processors.session.decks import make_deck_with_endless_page
from tests.processors.session.fixtures import (
    CONFERENCE_PAGE,
    Site,
    SiteResponse,
    html,
    make_pdf,
    make_pdf_with_image,
    redirect,
    serve_site,
)
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process

HTML = {"Content-Type": "text/html; charset=utf-8"}
MEBIBYTE = 1024 * 1024


@pytest.fixture
def site() -> Iterator[Site]:
    with serve_site() as running:
        running.put("/talk", html(CONFERENCE_PAGE))
        yield running


@pytest.fixture
async def roles(connection: Connection, store: Path) -> AsyncIterator[RunningRoles]:
    # The endless page needs about 0.4 GB per second, so the timeout ends it before the memory limit of 2 GiB does.
    limits = {"allowed_private_hosts": ["127.0.0.1"], "slide_timeout_seconds": 3, "page_timeout_seconds": 30}
    options = WorkerOptions(max_concurrent=2, memory_limit_mb=4096, processors={"session": limits})
    async with run_roles_in_process(connection, store, projector=True, worker=options) as running:
        yield running


def make_parameters(**urls: str) -> dict[str, Any]:
    return {"event": "A conference", "session": "A talk", "filename": "talk.md", "track": "A track", **urls}


def compress_zeros(mebibytes: int) -> bytes:
    compressor = zlib.compressobj(9, wbits=31)
    return b"".join(compressor.compress(bytes(MEBIBYTE)) for _ in range(mebibytes)) + compressor.flush()


@pytest.mark.timeout(240)
async def test_hostile_page_fails_its_job_and_worker_continues(roles: RunningRoles, site: Site) -> None:
    bomb = compress_zeros(400)
    assert len(bomb) < MEBIBYTE
    expected = {
        site.put("/inside", redirect("http://169.254.169.254/latest/meta-data/")): "ADDRESS_REJECTED",
        site.put("/circle", redirect("/circle")): "TOO_MANY_REDIRECTS",
        site.put("/bomb", SiteResponse(bomb, headers={**HTML, "Content-Encoding": "gzip"})): "TOO_LARGE",
        site.put("/announced", SiteResponse(b"<html>", headers=HTML, content_length=10**15)): "TOO_LARGE",
        site.put(
            "/nested", SiteResponse(gzip.compress(b"<b>" * 10_000_000), headers={**HTML, "Content-Encoding": "gzip"})
        ): ("TOO_LARGE"),
        site.put("/zeros", SiteResponse(bytes(MEBIBYTE), headers=HTML)): "EMPTY_PAGE",
        site.put("/film", SiteResponse(b"\x1a\x45\xdf\xa3", headers={"Content-Type": "video/webm"})): "NOT_HTML",
        "http://[::ffff:10.0.0.1]/": "ADDRESS_REJECTED",
    }
    submitted = {
        url: await roles.submit(make_parameters(url=url), job_type="session", max_attempts=1) for url in expected
    }
    for url, job_id in submitted.items():
        job = await roles.wait_until_finished(job_id, seconds=100)
        assert (job["status"], job["error"]["code"]) == ("failed", expected[url]), url
        assert "Traceback" not in job["error"]["message"]
    await assert_session_completes(roles, site)


@pytest.mark.timeout(240)
async def test_hostile_attachment_is_a_warning_and_worker_continues(roles: RunningRoles, site: Site) -> None:
    giant = "contains an image of 20000 × 25000 pixels, more than allowed"
    expected = {
        site.put("/endless.pdf", SiteResponse(make_deck_with_endless_page())): "was not rendered within 3 seconds",
        site.put("/giant.pdf", SiteResponse(make_pdf_with_image(20_000, 25_000))): giant,
        site.put("/cut.pdf", SiteResponse(make_pdf(30)[:3000])): "The PDF is damaged",
        site.put("/locked.pdf", SiteResponse(make_pdf(2, password="secret"))): "protected by a password",
        site.put("/inside.pdf", redirect("http://127.0.0.2:1/")): "127.0.0.2",
    }
    submitted = {
        url: await roles.submit(
            make_parameters(url=site.url("/talk"), attachments_url=url), job_type="session", max_attempts=1
        )
        for url in expected
    }
    for url, job_id in submitted.items():
        job = await roles.wait_until_finished(job_id, seconds=100)
        assert job["status"] == "completed", (url, job["error"])
        assert any(expected[url] in warning for warning in job["results"]["metadata"]["warnings"]), url
    await assert_session_completes(roles, site)


async def assert_session_completes(roles: RunningRoles, site: Site) -> None:
    slides = site.put("/slides.pdf", SiteResponse(make_pdf(2)))
    job_id = await roles.submit(make_parameters(url=site.url("/talk"), attachments_url=slides), job_type="session")
    job = await roles.wait_until_finished(job_id)
    assert (job["status"], job["attempt"]) == ("completed", 1)
    assert job["results"]["metadata"]["slides"] == 2
