"""The step `slides`: fetch and render the slides (progress 60 to 90 percent). Problems are only warnings."""

from __future__ import annotations

import asyncio
import shutil
from functools import partial
from pathlib import Path

from jobledger.workers.processor import JSON, ProcessorError
from jobledger.workers.processors.session import pdf_rendering, presentation_conversion, presentation_files
from jobledger.workers.processors.session.document import SlidesResult
from jobledger.workers.processors.session.pdf_rendering import RenderedPage, Slide, UnreadablePdf
from jobledger.workers.processors.session.presentation_files import UnusablePresentation
from jobledger.workers.processors.session.step_context import FETCH_TIMEOUT_FRACTION, Cancelled, StepContext
from jobledger.workers.sandbox import runner

MAX_TEXT_CHARACTERS = 500_000
CANCELLATION_POLL_SECONDS = 0.5
_NOT_INSTALLED = "LibreOffice, which could convert it, is not installed"


def build_inputs(ctx: StepContext) -> dict[str, JSON]:
    """Return the inputs of the step. The step is not repeated with the same inputs."""
    limits = {
        *("slides_max_bytes", "slide_max_side_px", "thumbnail_max_side_px"),
        *("jpeg_quality", "max_pdf_pages", "max_image_pixels"),
    }
    return {
        "url": ctx.parameters.attachments_url,
        "office": _can_convert(ctx),
        **ctx.settings.model_dump(mode="json", include=limits),
    }


def _can_convert(ctx: StepContext) -> bool:
    """Return whether presentations are converted. Only for a presentation URL does this probe the sandbox."""
    url = ctx.parameters.attachments_url
    is_presentation = url is not None and pdf_rendering.get_url_suffix(url) in presentation_conversion.SIGNATURES
    return _is_libreoffice_installed(ctx) and (not is_presentation or runner.is_available())


def _is_libreoffice_installed(ctx: StepContext) -> bool:
    return shutil.which(ctx.settings.libreoffice_command or "") is not None


async def run(ctx: StepContext) -> SlidesResult:
    """Fetch the attachment and save an image of each page."""
    result = SlidesResult()
    result.warnings = ctx.warnings
    if ctx.parameters.attachments_url is not None:
        try:
            async with asyncio.timeout(ctx.settings.slides_timeout_seconds):
                await _fetch_and_render(ctx, ctx.parameters.attachments_url, result)
        except Cancelled:
            raise
        except TimeoutError:
            limit = f"{ctx.settings.slides_timeout_seconds:g} seconds"
            consequence = f"Only the first {len(result.slides)} are shown" if result.slides else "They are only linked"
            await ctx.warn(f"The slides were not processed within {limit}. {consequence}.")
        except ProcessorError as error:
            await ctx.warn(f"The slides are only linked. {error.message}")
        except UnreadablePdf as error:
            await ctx.warn(f"The slides are only linked. The PDF {error}.")
        except UnusablePresentation as error:
            await _warn_about_fallback(ctx, result, f"It {str(error).rstrip('.')}.")
    await ctx.job.report_progress(80, "Slides processed")
    if result.slides:
        result.texts = []
    return result


async def _fetch_and_render(ctx: StepContext, url: str, result: SlidesResult) -> None:
    """Fetch the attachment and fill `result`.

    Raises:
        UnusablePresentation: The presentation cannot be converted.
        ProcessorError: The attachment cannot be fetched.
        UnreadablePdf: The PDF cannot be opened.
    """
    suffix = pdf_rendering.get_url_suffix(url)
    kind = pdf_rendering.OTHER_TYPES.get(suffix)
    is_installed = _is_libreoffice_installed(ctx)
    if (
        kind
        and not (suffix in presentation_conversion.SIGNATURES and is_installed)
        and suffix not in presentation_files.TEXT_SUFFIXES
    ):
        hint = f" {_NOT_INSTALLED}." if suffix in presentation_conversion.SIGNATURES else ""
        await ctx.warn(f"The attachment is only linked. It is {kind}, not a PDF.{hint}")
        return
    attachment = ctx.job.scratch_dir / "attachment"
    await ctx.job.report_progress(60, "Fetching the slides")
    response = await ctx.fetcher.fetch(
        url,
        max_bytes=ctx.settings.slides_max_bytes,
        timeout_seconds=ctx.settings.slides_timeout_seconds * FETCH_TIMEOUT_FRACTION,
        target=attachment,
        on_progress=partial(ctx.report_download, "Fetching the slides", 60, 66),
    )
    await ctx.log_fetch(response)
    if await asyncio.to_thread(pdf_rendering.is_pdf, attachment):
        await _render(ctx, attachment, result)
        return
    suffix = (
        suffix
        if suffix in presentation_conversion.SIGNATURES
        else presentation_conversion.MEDIA_TYPES.get(response.media_type, "")
    )
    if not await asyncio.to_thread(presentation_conversion.has_presentation_signature, attachment, suffix):
        media_type = response.media_type or "unknown type"
        await ctx.warn(f"The attachment is only linked. It is not a PDF ({media_type}).")
        return
    result.texts = await asyncio.to_thread(presentation_files.extract_slide_texts, attachment)
    if is_installed:
        await _render(ctx, await _convert(ctx, attachment, suffix), result)
    else:
        await _warn_about_fallback(
            ctx, result, f"It is {pdf_rendering.OTHER_TYPES[suffix]}, not a PDF. {_NOT_INSTALLED}."
        )


async def _warn_about_fallback(ctx: StepContext, result: SlidesResult, reason: str) -> None:
    """Warn about what the document shows instead of images."""
    fallback = "Only the text of the slides is shown" if result.texts else "The attachment is only linked"
    await ctx.warn(f"{fallback}. {reason}")


async def _convert(ctx: StepContext, attachment: Path, suffix: str) -> Path:
    await ctx.job.report_progress(66, "Converting the slides to PDF")
    scratch = ctx.job.scratch_dir / "office"
    await asyncio.to_thread(scratch.mkdir)
    conversion = asyncio.create_task(
        presentation_conversion.convert_to_pdf(
            attachment, suffix, program=ctx.settings.libreoffice_command or "", scratch=scratch
        )
    )
    try:
        while not (await asyncio.wait({conversion}, timeout=CANCELLATION_POLL_SECONDS))[0]:
            ctx.raise_if_cancelled()
        return conversion.result()
    finally:
        conversion.cancel()
        await asyncio.wait({conversion})


async def _render(ctx: StepContext, pdf: Path, result: SlidesResult) -> None:
    page_count, remaining_text_characters, max_pages = 0, MAX_TEXT_CHARACTERS, ctx.settings.max_pdf_pages
    async with ctx.iterate_in_thread(pdf_rendering.render_pages(pdf, ctx.settings)) as pages:
        async for page in pages:
            page_count = page.page_count
            if page.problem:
                await ctx.warn(f"Slide {page.page_number} is not shown. The page {page.problem}.")
            else:
                result.slides.append(await _save(ctx, page, remaining_text_characters))
                remaining_text_characters -= len(result.slides[-1].text)
            message = f"Rendering slide {page.page_number} of {page_count}"
            await ctx.report_part(message, 66, 80, page.page_number, min(page_count, max_pages))
    if page_count > max_pages:
        await ctx.warn(f"Only the first {max_pages} of {page_count} slides are shown.")
    await ctx.job.log("info", f"Rendered {len(result.slides)} of {page_count} pages")


async def _save(ctx: StepContext, page: RenderedPage, max_text_characters: int) -> Slide:
    image_name, thumbnail_name = pdf_rendering.make_slide_file_names(page.page_number)
    image = await ctx.job.save(ctx.result_layout.build_asset_path(image_name), page.image, "image/jpeg")
    thumbnail = await ctx.job.save(ctx.result_layout.build_asset_path(thumbnail_name), page.thumbnail, "image/jpeg")
    text = page.text[:max_text_characters]
    return Slide(**image.model_dump(), number=page.page_number, text=text, thumbnail=thumbnail)
