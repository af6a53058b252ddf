"""The step `slides`: fetch and render the slides (progress 60 to 90 percent). Problems are only warnings."""

from __future__ import annotations

import asyncio
from pathlib import Path

from jobledger.workers.processor import JSON, ProcessorError
from jobledger.workers.processors.session.document import SlidesResult
from jobledger.workers.processors.session.pdf_rendering import (
    RenderedPage,
    Slide,
    UnreadablePdf,
    describe_other_type,
    is_pdf,
    render_pages,
    slide_file_names,
    url_suffix,
)
from jobledger.workers.processors.session.presentation_conversion import (
    MEDIA_TYPES,
    ConversionFailed,
    convert_to_pdf,
    has_presentation_signature,
    is_installed,
    is_presentation_suffix,
)
from jobledger.workers.processors.session.presentation_files import TEXT_SUFFIXES, SlideText, extract_slide_texts
from jobledger.workers.processors.session.step_context import FETCH_TIMEOUT_FRACTION, Cancelled, StepContext
from jobledger.workers.sandbox import runner

MAX_TEXT_CHARACTERS = 500_000
CANCELLATION_POLL_SECONDS = 0.5
_NOT_INSTALLED = "LibreOffice, which could convert it, is not installed"


def inputs(ctx: StepContext) -> dict[str, JSON]:
    """Return the inputs of the step. The step is not repeated with the same inputs."""
    limits = {
        "slides_max_bytes",
        "slide_max_side_px",
        "thumbnail_max_side_px",
        "jpeg_quality",
        "max_pdf_pages",
        "max_image_pixels",
    }
    return {
        "url": ctx.session.attachments_url,
        "office": _can_convert(ctx),
        **ctx.settings.model_dump(mode="json", include=limits),
    }


def _can_convert(ctx: StepContext) -> bool:
    """Return whether presentations are converted. Only for a presentation URL does this probe the sandbox."""
    if not is_installed(ctx.settings.libreoffice_command):
        return False
    url = ctx.session.attachments_url
    return url is None or not is_presentation_suffix(url_suffix(url)) or runner.is_available()


async def run(ctx: StepContext) -> JSON:
    """Fetch the attachment and save an image of each page."""
    slides: list[Slide] = []
    texts: list[SlideText] = []
    if ctx.session.attachments_url is not None:
        try:
            async with asyncio.timeout(ctx.settings.slides_timeout_seconds):
                await _fetch_and_render(ctx, ctx.session.attachments_url, slides, texts)
        except Cancelled:
            raise
        except TimeoutError:
            limit = f"{ctx.settings.slides_timeout_seconds:g} seconds"
            consequence = f"Only the first {len(slides)} are shown" if slides else "They are only linked"
            await ctx.warn(f"The slides were not processed within {limit}. {consequence}.")
        except ProcessorError as error:
            await ctx.warn(f"The slides are only linked. {error.message}")
        except UnreadablePdf as error:
            await ctx.warn(f"The slides are only linked. The PDF {error}.")
        except ConversionFailed as error:
            await ctx.warn(f"{_describe_fallback(texts)}. It {str(error).rstrip('.')}.")
    await ctx.job.report_progress(90, "Slides processed")
    return SlidesResult(slides=slides, texts=[] if slides else texts, warnings=ctx.warnings).model_dump(mode="json")


async def _fetch_and_render(ctx: StepContext, url: str, slides: list[Slide], texts: list[SlideText]) -> None:
    suffix = url_suffix(url)
    kind = describe_other_type(url)
    convertible = is_presentation_suffix(suffix) and is_installed(ctx.settings.libreoffice_command)
    if kind and not convertible and suffix not in TEXT_SUFFIXES:
        hint = f" {_NOT_INSTALLED}." if is_presentation_suffix(suffix) else ""
        await ctx.warn(f"The attachment is only linked. It is {kind}, not a PDF.{hint}")
        return
    attachment = ctx.job.scratch_dir / "attachment"
    await ctx.job.report_progress(60, "Fetching the slides")
    response = await ctx.fetcher.fetch(
        url,
        max_bytes=ctx.settings.slides_max_bytes,
        timeout_seconds=ctx.settings.slides_timeout_seconds * FETCH_TIMEOUT_FRACTION,
        target=attachment,
        on_progress=ctx.report_download_progress("Fetching the slides", 60, 70),
    )
    await ctx.log_fetch(response)
    if await asyncio.to_thread(is_pdf, attachment):
        await _render(ctx, attachment, slides)
        return
    suffix = suffix if is_presentation_suffix(suffix) else MEDIA_TYPES.get(response.media_type, "")
    if not await asyncio.to_thread(has_presentation_signature, attachment, suffix):
        media_type = response.media_type or "unknown type"
        await ctx.warn(f"The attachment is only linked. It is not a PDF ({media_type}).")
        return
    texts += await asyncio.to_thread(extract_slide_texts, attachment)
    if not is_installed(ctx.settings.libreoffice_command):
        kind = describe_other_type(f"/x{suffix}") or "a presentation"
        await ctx.warn(f"{_describe_fallback(texts)}. It is {kind}, not a PDF. {_NOT_INSTALLED}.")
        return
    await _render(ctx, await _convert(ctx, attachment, suffix), slides)


def _describe_fallback(texts: list[SlideText]) -> str:
    """Return what the document shows instead of images."""
    return "Only the text of the slides is shown" if texts else "The attachment is only linked"


async def _convert(ctx: StepContext, attachment: Path, suffix: str) -> Path:
    await ctx.job.report_progress(70, "Converting the slides to PDF")
    scratch = ctx.job.scratch_dir / "office"
    await asyncio.to_thread(scratch.mkdir)
    conversion = asyncio.create_task(
        convert_to_pdf(attachment, suffix, program=ctx.settings.libreoffice_command or "", scratch=scratch)
    )
    try:
        while not (await asyncio.wait({conversion}, timeout=CANCELLATION_POLL_SECONDS))[0]:
            ctx.raise_if_cancelled()
        return conversion.result()
    finally:
        conversion.cancel()
        await asyncio.wait({conversion})


async def _render(ctx: StepContext, pdf: Path, slides: list[Slide]) -> None:
    page_count, remaining_text_characters = 0, MAX_TEXT_CHARACTERS
    async with ctx.iterate_in_thread(render_pages(pdf, ctx.settings)) as pages:
        async for page in pages:
            page_count = page.page_count
            if page.problem:
                await ctx.warn(f"Slide {page.page_number} is not shown. The page {page.problem}.")
            else:
                slides.append(await _save(ctx, page, remaining_text_characters))
                remaining_text_characters -= len(slides[-1].text)
            fraction = page.page_number / min(page_count, ctx.settings.max_pdf_pages)
            await ctx.job.report_progress(70 + 20 * fraction, f"Rendering slide {page.page_number} of {page_count}")
    if page_count > ctx.settings.max_pdf_pages:
        await ctx.warn(f"Only the first {ctx.settings.max_pdf_pages} of {page_count} slides are shown.")
    await ctx.job.log("info", f"Rendered {len(slides)} of {page_count} pages")


async def _save(ctx: StepContext, page: RenderedPage, max_text_characters: int) -> Slide:
    image_name, thumbnail_name = slide_file_names(page.page_number)
    image = await ctx.job.save(ctx.result_layout.asset_path(image_name), page.image, "image/jpeg")
    thumbnail = await ctx.job.save(ctx.result_layout.asset_path(thumbnail_name), page.thumbnail, "image/jpeg")
    text = page.text[:max_text_characters]
    return Slide(**image.model_dump(), number=page.page_number, text=text, thumbnail=thumbnail)
