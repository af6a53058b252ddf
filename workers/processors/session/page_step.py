"""The step `page`: fetch and read the page (progress 0 to 20 percent). If this step fails, the job fails."""

from __future__ import annotations

import asyncio
import html
import re
from functools import partial
from typing import Final

from jobledger.workers.processor import JSON, ProcessorError
from jobledger.workers.processors.session import page_kind
from jobledger.workers.processors.session.embedded_media import find_watch_page
from jobledger.workers.processors.session.fetcher import FetchResult, make_redirect_error
from jobledger.workers.processors.session.page import PageText, read_page, require_html_type
from jobledger.workers.processors.session.page_images import store_images
from jobledger.workers.processors.session.page_kind import Verdict
from jobledger.workers.processors.session.page_metadata import MAX_INTRO
from jobledger.workers.processors.session.page_redirects import find_canonical, find_redirect
from jobledger.workers.processors.session.page_source import PageSource, parse_page, split_words
from jobledger.workers.processors.session.rendering import (
    INSTALL_ADVICE,
    MAX_FURTHER_SECONDS,
    PageNotRendered,
    render_page,
)
from jobledger.workers.processors.session.safe_markdown import escape_link_target
from jobledger.workers.processors.session.step_context import FETCH_TIMEOUT_FRACTION, Cancelled, StepContext
from jobledger.workers.processors.session.structured_data import TalkData, find_talk_data

_READING_SECONDS: Final = 2
"""Time to read a page after it was rendered."""
_NO_TIME: Final = (
    f"The page was not rendered: this may take {MAX_FURTHER_SECONDS + _READING_SECONDS} seconds more than its own "
    "timeout, and too little of the step's time was left. Raise `processors.session.page_timeout_seconds`."
)
_MIN_DESCRIPTION_WORDS: Final = 8
"""Structured data with a shorter description have no abstract."""
_PRESENT_SHARE: Final = 0.5
_IMAGE_SETTINGS: Final = {
    *("page_max_images", "page_image_max_bytes", "slide_max_side_px", "jpeg_quality", "max_image_pixels"),
}
_LINK_TARGET: Final = re.compile(r"\]\(([^()\s]+)\)")
_MEDIA: Final = re.compile(r"<(?:img|iframe|video|audio|object|embed)\b[^>]*>", re.IGNORECASE)


def build_inputs(ctx: StepContext) -> dict[str, JSON]:
    """Return the inputs of the step. The step is not repeated with the same inputs."""
    return {
        "url": ctx.parameters.url,
        "title": ctx.parameters.session,
        "speakers": list(ctx.parameters.speakers or ()),
        "max_bytes": ctx.settings.page_max_bytes,
        **ctx.settings.model_dump(mode="json", include=_IMAGE_SETTINGS),
        "render": ctx.settings.render,
        "has_video": ctx.parameters.video_url is not None,
    }


async def run(ctx: StepContext) -> PageText:
    """Fetch and read the page.

    Raises:
        ProcessorError: The page cannot be fetched, is not HTML, is empty, is not that of a talk (see `page_kind`), or
            timed out (STEP_TIMEOUT, transient).
    """
    seconds = ctx.settings.page_timeout_seconds
    try:
        async with asyncio.timeout(seconds) as timeout:
            page = await ctx.run_until_cancelled(_fetch_and_read(ctx, timeout.when() or 0.0))
    except TimeoutError:
        raise ProcessorError(
            "STEP_TIMEOUT",
            f"The page was not read within {seconds:g} seconds.",
            transient=True,
            details={"step": "page", "seconds": seconds},
        ) from None
    page = await ctx.run_until_cancelled(store_images(ctx, page))
    for warning in page.warnings:
        await ctx.warn(warning, repeat_on_restart=page.may_change)
    await ctx.job.log("info", f"The page has {len(page.markdown):,} characters of text")
    await ctx.job.report_progress(20, "Page read")
    return page


async def _fetch_and_read(ctx: StepContext, deadline: float) -> PageText:
    await ctx.job.report_progress(0, "Fetching the page")
    response, source = await _fetch_final_page(ctx)
    await ctx.job.report_progress(10, "Reading the page")
    try:
        page = await _judge_and_read(ctx, response, source, deadline)
    except ProcessorError as error:
        if response.error is None or error.code == "CANCELLED":
            raise
        raise response.error from None
    if response.error is None:
        return page
    warning = f"The page was not received completely, so its end is missing: {response.error.message}"
    return page.model_copy(update={"warnings": [warning, *page.warnings], "may_change": True})


async def _judge_and_read(ctx: StepContext, response: FetchResult, source: PageSource, deadline: float) -> PageText:
    """Read the page. Render it before if it needs JavaScript, or if it has no text and the scripts may add some."""
    verdict = await asyncio.to_thread(_judge, ctx, source)
    mode = ctx.settings.render
    if mode == "always" or (mode == "auto" and verdict.needs_javascript):
        return await _render_and_read(ctx, response, source, verdict, deadline)
    problem = "The page was not rendered: `processors.session.render` is `never`." if verdict.needs_javascript else None
    try:
        return await asyncio.to_thread(_read, ctx, response, source, verdict, problem)
    except ProcessorError as error:
        has_scripts = source.tree.xpath("//script[not(contains(@type, 'json'))]")
        if error.code != "EMPTY_PAGE" or mode == "never" or not has_scripts:
            raise
    return await _render_and_read(ctx, response, source, verdict, deadline)


async def _render_and_read(
    ctx: StepContext, response: FetchResult, source: PageSource, verdict: Verdict, deadline: float
) -> PageText:
    rendered, problem = await _render(ctx, response, deadline)
    if problem is None:
        rendered_source = await asyncio.to_thread(parse_page, rendered)
        rendered_verdict = await asyncio.to_thread(_judge, ctx, rendered_source)
        if rendered_verdict.error is None or verdict.error is not None:
            return await asyncio.to_thread(_read, ctx, rendered, rendered_source, rendered_verdict, None)
        problem = f"The rendered page was not used, because it is no talk: {rendered_verdict.error.message}"
    return await asyncio.to_thread(_read, ctx, response, source, verdict, problem)


async def _fetch_final_page(ctx: StepContext) -> tuple[FetchResult, PageSource]:
    """Fetch the page, and follow the redirects of its HTML as well."""
    url, redirects = ctx.parameters.url, 0
    while True:
        response = await _fetch_twice_if_cut(ctx, url, ctx.settings.max_redirects - redirects)
        redirects += response.redirects
        source = await asyncio.to_thread(parse_page, response)
        target = await asyncio.to_thread(_find_redirect, ctx, source, response.refresh)
        if target is None:
            return await _fetch_canonical(ctx, source, ctx.settings.max_redirects - redirects) or (response, source)
        redirects += 1
        if redirects > ctx.settings.max_redirects:
            raise make_redirect_error(ctx.parameters.url, target, ctx.settings.max_redirects)
        await ctx.job.log("info", f"The page {response.url} redirects to {target}")
        url = target


async def _fetch_canonical(
    ctx: StepContext, source: PageSource, max_redirects: int
) -> tuple[FetchResult, PageSource] | None:
    """Fetch the canonical page of a nearly empty one. Return None if it has no more of the talk."""
    url = find_canonical(source)
    if url is None or max_redirects < 1:
        return None
    try:
        response = await _fetch(ctx, url, max_redirects - 1, ctx.settings.page_timeout_seconds * FETCH_TIMEOUT_FRACTION)
        canonical = await asyncio.to_thread(parse_page, response)
    except Cancelled:
        raise
    except ProcessorError as error:
        await ctx.job.log("info", f"The canonical page {url} was not used: {error.message}")
        return None
    has_more = len(canonical.words) > len(source.words) and await asyncio.to_thread(_names_talk, ctx, canonical)
    if not response.is_complete or not has_more:
        return None
    await ctx.job.log("info", f"The page {source.url} is nearly empty. Its canonical page {response.url} is used.")
    return response, canonical


async def _fetch_twice_if_cut(ctx: StepContext, url: str, max_redirects: int) -> FetchResult:
    """Fetch the page, and once more if it was cut. Return the larger part if it was cut again.

    Browsers show what they received of a page.
    """
    seconds = ctx.settings.page_timeout_seconds * FETCH_TIMEOUT_FRACTION
    response = await _fetch(ctx, url, max_redirects, seconds)
    if not response.is_complete:
        try:
            again = await _fetch(ctx, url, max_redirects, max(0.0, seconds - response.seconds))
        except Cancelled:
            raise
        except ProcessorError:
            return response
        return again if again.is_complete or again.size > response.size else response
    return response


async def _fetch(ctx: StepContext, url: str, max_redirects: int, timeout_seconds: float) -> FetchResult:
    response = await ctx.fetcher.fetch(
        url,
        max_bytes=ctx.settings.page_max_bytes,
        timeout_seconds=timeout_seconds,
        accept="text/html, application/xhtml+xml",
        check_media_type=require_html_type,
        allow_partial=True,
        on_progress=partial(ctx.report_download, "Fetching the page", 0, 10),
        max_redirects=max_redirects,
        describe_error_page=page_kind.describe_error_page,
    )
    await ctx.log_fetch(response)
    return response


def _find_redirect(ctx: StepContext, source: PageSource, refresh_header: str) -> str | None:
    return find_redirect(source, refresh_header=refresh_header, is_talk=_names_talk(ctx, source))


def _names_talk(ctx: StepContext, source: PageSource) -> bool:
    return page_kind.find_anchors(source, ctx.parameters.session, ctx.parameters.speakers or ()).any


def _judge(ctx: StepContext, source: PageSource) -> Verdict:
    return page_kind.judge_page(
        source,
        requested_url=ctx.parameters.url,
        title=ctx.parameters.session,
        speakers=ctx.parameters.speakers or (),
    )


async def _render(ctx: StepContext, response: FetchResult, deadline: float) -> tuple[FetchResult, str | None]:
    """Return the rendered page, or the page as it is and the reason why it could not be rendered.

    Rendering ends early enough to read the page before the step's deadline.
    """
    remaining = deadline - asyncio.get_running_loop().time() - MAX_FURTHER_SECONDS - _READING_SECONDS
    seconds = min(ctx.settings.render_timeout_seconds, remaining)
    if seconds <= 0:
        return response, _NO_TIME
    await ctx.job.report_progress(10, "Rendering the page")
    try:
        rendered = await render_page(
            response,
            scratch=ctx.job.scratch_dir / "chromium",
            fetcher=ctx.fetcher,
            settings=ctx.settings,
            seconds=seconds,
        )
    except PageNotRendered as error:
        return response, f"The page was not rendered: {error}"
    await ctx.job.log("info", f"Rendered {rendered.url} in {rendered.seconds:.1f} s")
    return rendered, None


def _read(
    ctx: StepContext, response: FetchResult, source: PageSource, verdict: Verdict, problem: str | None
) -> PageText:
    """Read the page with what its structured data add.

    Args:
        ctx: The context of the step.
        response: The page.
        source: The same page, parsed.
        verdict: Whether it is the page of a talk.
        problem: A sentence that says why the page was not rendered, although it may need JavaScript. The error or a
            warning contains it.

    Raises:
        ProcessorError: The page has no text of a talk.
    """
    data = find_talk_data(source, ctx.parameters.session)
    abstract = _read_abstract(ctx, response, data) if data is not None else None
    if verdict.error is not None and not verdict.needs_javascript:
        raise verdict.error
    warnings = [verdict.warning] if verdict.warning else []
    try:
        page = _read_text(ctx, response, verdict, problem)
    except ProcessorError:
        if abstract is None:
            raise
        page = abstract
        subject = "The page shows its text only with JavaScript." if verdict.needs_javascript else "The page is empty."
        warnings.append(f"{subject} The text is that of its structured data.")
    else:
        if data is not None and abstract is not None and not _contains(page.markdown, data.description):
            markdown = f"{page.markdown}\n\n{abstract.markdown}"
            page = page.model_copy(update={"markdown": markdown, "warnings": page.warnings + abstract.warnings})
            warnings.append("The page does not show the abstract. It was taken from the page's structured data.")
    if problem:
        warnings.append(problem)
        page = page.model_copy(update={"may_change": True})
    if data is not None:
        return _add_data(ctx, page, data, warnings)
    return page.model_copy(update={"warnings": page.warnings + warnings})


def _read_text(ctx: StepContext, response: FetchResult, verdict: Verdict, problem: str | None) -> PageText:
    """Read the text of the page without its structured data.

    Raises:
        ProcessorError: The page has no text, or needs JavaScript.
    """
    if verdict.error is not None:
        raise _explain_shell(verdict.error, problem, is_disabled=ctx.settings.render == "never")
    try:
        return read_page(
            response.body,
            content_type=response.content_type,
            url=response.url,
            session_title=ctx.parameters.session,
            speakers=ctx.parameters.speakers or (),
        )
    except ProcessorError as error:
        if error.code != "EMPTY_PAGE":
            raise
        advice = problem or "Check with a browser whether it shows the talk."
        message, is_transient = f"{error.message} {advice}", problem == _NO_TIME
        raise ProcessorError(error.code, message, transient=is_transient, details=error.details) from None


def _explain_shell(error: ProcessorError, problem: str | None, *, is_disabled: bool) -> ProcessorError:
    """Return the error of a page that needs JavaScript, with the reason why it was not rendered."""
    if is_disabled:
        advice = f"Set `processors.session.render` to `auto`. {INSTALL_ADVICE}"
    else:
        advice = problem or "It was rendered, and shows no talk. Use another URL of the talk."
    is_transient = error.transient or problem == _NO_TIME
    return ProcessorError(error.code, f"{error.message} {advice}", transient=is_transient, details=error.details)


def _has_abstract(data: TalkData) -> bool:
    """Return whether the description says more than the title."""
    words = split_words(_to_html(data.description).replace("<", " <"))
    return len(words) >= _MIN_DESCRIPTION_WORDS and not set(words) <= {*split_words(data.title), "p", "br", "h1", "h2"}


def _contains(text: str, description: str) -> bool:
    """Return whether most of a description, which may be HTML, is in the text."""
    words, wanted = split_words(text), split_words(_to_html(description).replace("<", " <"))
    present = set(zip(words, words[1:], words[2:], strict=False))
    triples = list(zip(wanted, wanted[1:], wanted[2:], strict=False))
    return sum(triple in present for triple in triples) >= _PRESENT_SHARE * len(triples)


def _read_abstract(ctx: StepContext, response: FetchResult, data: TalkData) -> PageText | None:
    """Return the abstract in the structured data, or None if there is none."""
    if not _has_abstract(data):
        return None
    title = html.escape(data.title)
    body = f"<html><head><title>{title}</title></head><body><article><h1>{title}</h1>{_to_html(data.description)}"
    try:
        return read_page(
            f"{body}</article></body></html>".encode("utf-8", "replace"),
            content_type="text/html; charset=utf-8",
            url=response.url,
            session_title=data.title or ctx.parameters.session,
        )
    except ProcessorError:  # it has only elements that are not shown
        return None


def _to_html(description: str) -> str:
    """Return the HTML of a description, which is HTML, perhaps escaped, or plain text with paragraphs."""
    unescaped = _MEDIA.sub("", html.unescape(description))
    if "</" in unescaped or "<br" in unescaped:
        return unescaped
    paragraphs = (part.strip() for part in unescaped.replace("\r\n", "\n").split("\n\n"))
    return "".join(f"<p>{html.escape(part)}</p>" for part in paragraphs if part)


def _add_data(ctx: StepContext, page: PageText, data: TalkData, warnings: list[str]) -> PageText:
    """Return the page with what the structured data say better than the page's metadata."""
    markdown = page.markdown
    if data.video_url and ctx.parameters.video_url is None:
        target = find_watch_page(data.video_url)
        link = escape_link_target(target)
        present = {find_watch_page(match[1]) for match in _LINK_TARGET.finditer(markdown)}
        markdown += "" if {target, link} & present else f"\n\n[Video]({link})"
    return page.model_copy(
        update={
            "markdown": markdown,
            "title": data.title or page.title,
            "language": page.language or data.language,
            "keywords": page.keywords or data.keywords,
            "intro": page.intro or _shorten(data.description),
            "warnings": page.warnings + warnings,
        }
    )


def _shorten(description: str) -> str | None:
    """Return the beginning of a description as one line of text."""
    words = " ".join(PageSource("", f"<body>{_to_html(description)}</body>").text.split())
    if len(words) > MAX_INTRO:
        words = words[:MAX_INTRO].rsplit(" ", 1)[0] + " …"
    return words or None
