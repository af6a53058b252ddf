"""The step `page`: fetch and read the page (progress 0 to 20 percent). If this step fails, the job fails."""

from __future__ import annotations

import asyncio
from functools import partial

from jobledger.workers.processor import JSON, ProcessorError
from jobledger.workers.processors.session.page import PageText, read_page, require_html_type
from jobledger.workers.processors.session.step_context import FETCH_TIMEOUT_FRACTION, StepContext


def build_inputs(ctx: StepContext) -> dict[str, JSON]:
    """Return the inputs of the step. The step is not repeated with the same inputs."""
    return {"url": ctx.parameters.url, "title": ctx.parameters.session, "max_bytes": ctx.settings.page_max_bytes}


async def run(ctx: StepContext) -> PageText:
    """Fetch and read the page.

    Raises:
        ProcessorError: The page cannot be fetched, is not HTML, is empty, or timed out (STEP_TIMEOUT, transient).
    """
    seconds = ctx.settings.page_timeout_seconds
    try:
        async with asyncio.timeout(seconds):
            page = await _fetch_and_read(ctx)
    except TimeoutError:
        raise ProcessorError(
            "STEP_TIMEOUT",
            f"The page was not read within {seconds:g} seconds.",
            transient=True,
            details={"step": "page", "seconds": seconds},
        ) from None
    for warning in page.warnings:
        await ctx.warn(warning)
    await ctx.job.log("info", f"The page has {len(page.markdown):,} characters of text")
    await ctx.job.report_progress(20, "Page read")
    return page


async def _fetch_and_read(ctx: StepContext) -> PageText:
    await ctx.job.report_progress(0, "Fetching the page")
    response = await ctx.fetcher.fetch(
        ctx.parameters.url,
        max_bytes=ctx.settings.page_max_bytes,
        timeout_seconds=ctx.settings.page_timeout_seconds * FETCH_TIMEOUT_FRACTION,
        accept="text/html, application/xhtml+xml",
        check_media_type=require_html_type,
        on_progress=partial(ctx.report_download, "Fetching the page", 0, 10),
    )
    await ctx.log_fetch(response)
    await ctx.job.report_progress(10, "Reading the page")
    return await asyncio.to_thread(
        read_page,
        response.body,
        content_type=response.content_type,
        url=response.url,
        session_title=ctx.parameters.session,
    )
