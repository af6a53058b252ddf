"""Redirects in HTML are followed as browsers do, within the limit for all redirects."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobledger.workers.processor import ProcessorError
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.page_redirects import find_redirect
from jobledger.workers.processors.session.page_source import PageSource
from jobledger.workers.processors.session.pipeline import run
from tests.processors.session.fixtures import (
    CONFERENCE_PAGE,
    RecordingJob,
    Site,
    SiteResponse,
    html,
    make_parameters,
    make_settings,
    read_document,
    redirect,
)
from tests.processors.session.no_talk_pages import page

URL = "https://conference.example/2025/old/"
REAL = "https://conference.example/talks/real"


def refresh(content: str, *, attribute: str = "http-equiv=refresh", body: str = "<h1>Redirecting…</h1>") -> str:
    return page("Redirecting…", body, f'<meta {attribute} content="{content}">')


@pytest.mark.parametrize(
    "content",
    [
        "0; url=/talks/real",
        "0;url=/talks/real",
        "0; URL='/talks/real'",
        "  5 ;   Url  =  /talks/real  ",
        "0, /talks/real",
        "0 url=/talks/real",
        "0; ../../talks/real",
        "0.5; url=https://conference.example/talks/real",
        "0; url=//conference.example/talks/real",
        "0; url='/talks/real' ignored",
        ".5; url=/talks/real",
    ],
)
def test_meta_refresh_is_found_in_all_its_forms(content: str) -> None:
    assert find_redirect(PageSource(URL, refresh(content)), is_talk=False) == REAL


@pytest.mark.parametrize(
    "source",
    [
        refresh("0; url=/talks/real", attribute="HTTP-EQUIV=' Refresh '"),
        refresh("0; url=real", attribute="http-equiv=refresh").replace("<head>", "<head><base href=/talks/>"),
        "<meta http-equiv=refresh content='0;url=/talks/real'>",
        page("", "<script>location.href = '/talks/real';</script>"),
        page("", '<script>window.location="/talks/real"</script>'),
        page("", "<script>window.location.replace('https:\\/\\/conference.example\\/talks\\/real')</script>"),
        page(
            "",
            "<script>\n  document . location . assign ( `/talks/real` );</script><noscript>No JavaScript</noscript>",
        ),
        page("", "Please wait").replace("<body", "<body onload=\"location.href='/talks/real'\""),
        "<html><frameset rows=100%><frame src=/talks/real></frameset></html>",
        page("ExampleConf", "<iframe src=/talks/real width=100%></iframe>"),
    ],
)
def test_other_redirects_are_found(source: str) -> None:
    assert find_redirect(PageSource(URL, source), is_talk=False) == REAL


@pytest.mark.parametrize(
    "source",
    [
        refresh("300"),
        refresh("300; url=/talks/real"),
        refresh("0; url=/2025/old/#top"),
        refresh("0; url=javascript:alert(1)"),
        refresh("0; url=http://["),
        refresh("x; url=/talks/real"),
        refresh("0; url=/talks/real", attribute="name=refresh"),
        page("", "<noscript><meta http-equiv=refresh content='0; url=/talks/real'></noscript>"),
        page("", "<script>if (location.href == '/talks/real') {}</script>"),
        page("", "<script>a.location.href + '/talks/real'</script>"),
        page("", "<script>var mylocation = '/talks/real';</script>"),
        page("", f"<script>location.href = '/talks/real';</script>{'<p>Many words of text.</p>' * 20}"),
        page("", "<iframe src=/a></iframe><iframe src=/b></iframe>"),
    ],
)
def test_page_that_stays_is_not_left(source: str) -> None:
    assert find_redirect(PageSource(URL, source), is_talk=False) is None


def test_page_of_the_talk_is_left_only_at_once() -> None:
    assert find_redirect(PageSource(URL, refresh("5; url=/slides")), is_talk=True) is None
    assert find_redirect(PageSource(URL, refresh("0; url=/slides")), is_talk=True) is not None


def test_refresh_header_is_followed() -> None:
    source = PageSource(URL, page("", "Moved"))
    assert find_redirect(source, refresh_header="0; url=/talks/real", is_talk=False) == REAL


async def process(url: str, folder: Path, **settings: object) -> tuple[RecordingJob, str]:
    job = RecordingJob(make_parameters(url=url), folder)
    configured = make_settings(**settings)
    results = await run(job, configured, Fetcher(configured, lock_directory=folder / "locks"))
    return job, read_document(job, results)


async def test_redirects_of_http_and_html_lead_to_the_talk(site: Site, tmp_path: Path) -> None:
    site.put("/a", redirect("/b"))
    site.put("/b", html(refresh("0; url=/c")))
    site.put("/c", SiteResponse(b"", headers={"Content-Type": "text/html", "Refresh": "1; url=/d"}))
    site.put("/d", html(page("", "<script>location.replace('/talk')</script>")))
    site.put("/talk", html(CONFERENCE_PAGE))
    job, document = await process(site.url("/a"), tmp_path)
    assert "An append-only log keeps it" in document
    assert "Redirecting" not in document
    assert site.url("/paper.html") in document  # links are relative to the final page
    assert not [warning for warning in job.warnings if "page" in warning]


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
async def test_redirects_of_http_and_html_count_together(limit: int, site: Site, tmp_path: Path) -> None:
    site.put("/a", redirect("/b"))
    site.put("/b", html(refresh("0; url=/c")))
    site.put("/c", redirect("/talk"))
    site.put("/talk", html(CONFERENCE_PAGE))
    if limit == 3:
        await process(site.url("/a"), tmp_path, max_redirects=limit)
        return
    with pytest.raises(ProcessorError, match=f"redirects more than {limit} times") as caught:
        await process(site.url("/a"), tmp_path, max_redirects=limit)
    assert caught.value.code == "TOO_MANY_REDIRECTS"
    assert len(site.requested_paths) == limit + 1


async def test_loop_of_refreshes_is_an_error(site: Site, tmp_path: Path) -> None:
    site.put("/a", html(refresh("0; url=/b")))
    site.put("/b", html(refresh("0; url=/a")))
    with pytest.raises(ProcessorError) as caught:
        await process(site.url("/a"), tmp_path)
    assert caught.value.code == "TOO_MANY_REDIRECTS"
    assert len(site.requested_paths) == 6


async def test_refresh_to_private_address_is_rejected(site: Site, tmp_path: Path) -> None:
    site.put("/a", html(refresh("0; url=http://10.0.0.1/")))
    with pytest.raises(ProcessorError) as caught:
        await process(site.url("/a"), tmp_path)
    assert caught.value.code == "ADDRESS_REJECTED"


async def test_refresh_to_itself_is_not_completed(site: Site, tmp_path: Path) -> None:
    site.put("/a", html(refresh("0; url=/a")))
    with pytest.raises(ProcessorError) as caught:
        await process(site.url("/a"), tmp_path)
    assert caught.value.code == "NOT_A_TALK_PAGE"
    assert site.requested_paths == ["/a"]


def canonical(url: str, body: str = "<div id=root></div>") -> str:
    return page("ExampleConf", body, f'<link rel="canonical" href="{url}">')


@pytest.mark.parametrize("body", ["<div id=root></div>", "<h1>Ledgers that never forget</h1>", "<p>Loading…</p>"])
async def test_canonical_page_is_read_instead_of_nearly_empty_one(body: str, site: Site, tmp_path: Path) -> None:
    site.put("/print", html(canonical("/talk", body)))
    site.put("/talk", html(CONFERENCE_PAGE))
    _, document = await process(site.url("/print"), tmp_path, render="never")
    assert "An append-only log keeps it" in document
    assert site.requested_paths[:2] == ["/print", "/talk"]


@pytest.mark.parametrize(
    "target",
    [html(page("ExampleConf", "<h1>Welcome to the conference</h1>" + "<p>All news.</p>" * 30)), None, "/print"],
)
async def test_canonical_page_without_the_talk_is_not_used(
    target: SiteResponse | str | None, site: Site, tmp_path: Path
) -> None:
    url = target if isinstance(target, str) else "/home"
    if isinstance(target, SiteResponse):
        site.put("/home", target)
    site.put("/print", html(canonical(url, "<h1>Ledgers that never forget</h1><p>How logs keep what happened.</p>")))
    _, document = await process(site.url("/print"), tmp_path, render="never")
    assert "How logs keep what happened" in document


async def test_canonical_page_of_a_full_page_is_not_fetched(site: Site, tmp_path: Path) -> None:
    site.put("/talk", html(CONFERENCE_PAGE.replace("<head>", '<head><link rel="canonical" href="/other">')))
    await process(site.url("/talk"), tmp_path)
    assert "/other" not in site.requested_paths
