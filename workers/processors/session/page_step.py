"""session: the step `page`, 0 to 20 percent of the job. If it fails the job fails: there would be nothing to say."""

from __future__ import annotations

import asyncio

from jobledger.workers.processor import JSON, ProcessorError
from jobledger.workers.processors.session.page import PageText, read_page, require_html_type
from jobledger.workers.processors.session.step_context import FETCH_TIMEOUT_FRACTION, StepContext


def inputs(work: StepContext) -> dict[str, JSON]:
    """Return all that the page depends on: with the same inputs the step is not repeated."""
    return {"url": work.session.url, "title": work.session.session, "max_bytes": work.settings.page_max_bytes}


async def run(work: StepContext) -> JSON:
    """Fetch and read the page.

    Raises:
        ProcessorError: it cannot be fetched, is no HTML, is empty, or took too long (STEP_TIMEOUT, transient).
    """
    seconds = work.settings.page_timeout_seconds
    try:
        async with asyncio.timeout(seconds):
            page = await _read(work)
    except TimeoutError:
        raise ProcessorError(
            "STEP_TIMEOUT",
            f"The page was not read within {seconds:g} seconds.",
            transient=True,
            details={"step": "page", "seconds": seconds},
        ) from None
    for warning in page.warnings:
        await work.warn(warning)
    await work.job.log("info", f"The page has {len(page.markdown):,} characters of text")
    await work.job.report_progress(20, "The page is read")
    return page.model_dump(mode="json")


async def _read(work: StepContext) -> PageText:
    await work.job.report_progress(0, "Fetching the page")
    fetched = await work.fetcher.fetch(
        work.session.url,
        max_bytes=work.settings.page_max_bytes,
        timeout_seconds=work.settings.page_timeout_seconds * FETCH_TIMEOUT_FRACTION,
        accept="text/html, application/xhtml+xml",
        check_media_type=require_html_type,
        on_progress=work.report_download_progress("Fetching the page", 0, 10),
    )
    await work.log_fetch(fetched)
    await work.job.report_progress(10, "Reading the page")
    return await asyncio.to_thread(
        read_page,
        fetched.body,
        content_type=fetched.content_type,
        url=fetched.url,
        session_title=work.session.session,
    )
