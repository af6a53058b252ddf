"""The step `slides`: fetch and render the slides (progress 60 to 80 percent). Problems are only warnings."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import aclosing
from pathlib import Path

from jobledger.workers.processor import JSON, ProcessorError
from jobledger.workers.processors.session import (
    attachments,
    pdf_rendering,
    presentation_conversion,
    presentation_files,
    text_recognition,
)
from jobledger.workers.processors.session.document import SlidesResult
from jobledger.workers.processors.session.download import ProgressRange, download
from jobledger.workers.processors.session.pdf_rendering import UnreadablePdf
from jobledger.workers.processors.session.presentation_files import UnusablePresentation
from jobledger.workers.processors.session.slide_collector import SlideCollector
from jobledger.workers.processors.session.step_context import (
    FETCH_TIMEOUT_FRACTION,
    Cancelled,
    StepContext,
    may_succeed_later,
)
from jobledger.workers.sandbox import runner

_NOT_INSTALLED = "LibreOffice, which could convert it, is not installed"


def build_inputs(ctx: StepContext) -> dict[str, JSON]:
    """Return the inputs of the step. The step is not repeated with the same inputs."""
    limits = {
        *("slides_max_bytes", "slide_max_side_px", "thumbnail_max_side_px"),
        *("jpeg_quality", "max_pdf_pages", "max_image_pixels", "merge_overlays"),
    }
    return {
        "url": ctx.parameters.attachments_url,
        "office": _can_convert(ctx),
        "recognition": ctx.parameters.source_language if _can_recognize(ctx) else None,
        **ctx.settings.model_dump(mode="json", include=limits),
    }


def _can_convert(ctx: StepContext) -> bool:
    """Return whether presentations are converted. Only for a presentation URL does this probe the sandbox."""
    url = ctx.parameters.attachments_url
    is_presentation = url is not None and pdf_rendering.get_url_suffix(url) in presentation_conversion.SIGNATURES
    return _is_libreoffice_installed(ctx) and (not is_presentation or runner.is_available())


def _is_libreoffice_installed(ctx: StepContext) -> bool:
    return shutil.which(ctx.settings.libreoffice_command or "") is not None


def _can_recognize(ctx: StepContext) -> bool:
    return ctx.settings.ocr == "auto" and text_recognition.is_installed()


async def run(ctx: StepContext) -> SlidesResult:
    """Fetch the attachment and save an image of each page."""
    result = SlidesResult()
    result.warnings = ctx.warnings
    if ctx.parameters.attachments_url is not None:
        try:
            async with asyncio.timeout(ctx.settings.slides_timeout_seconds):
                await ctx.run_until_cancelled(_Attachment(ctx, result).fetch_and_show(ctx.parameters.attachments_url))
        except Cancelled:
            raise
        except TimeoutError:
            limit = f"{ctx.settings.slides_timeout_seconds:g} seconds"
            message = f"The slides were not processed within {limit}. {_describe_shown(result)}."
            await ctx.warn(message, repeat_on_restart=True)
        except ProcessorError as error:
            warning = f"The slides are only linked. {error.message}"
            await ctx.warn(warning, repeat_on_restart=may_succeed_later(error))
        except UnreadablePdf as error:
            fallback = "Only the text of the slides is shown" if result.texts else "The slides are only linked"
            await ctx.warn(f"{fallback}. {error}.")
        except UnusablePresentation as error:
            has_no_sandbox = isinstance(error.__cause__, runner.SandboxUnavailable)
            reason = f"It {str(error).rstrip('.')}."
            await _warn_about_fallback(ctx, result, reason, repeat_on_restart=has_no_sandbox)
    await ctx.job.report_progress(80, "Slides processed")
    return result


def _describe_shown(result: SlidesResult) -> str:
    if result.slides:
        return f"Only the first {len(result.slides)} are shown"
    return "Only their text is shown" if result.texts else "They are only linked"


def _needs_libreoffice(suffix: str) -> bool:
    return suffix in presentation_conversion.SIGNATURES and suffix not in presentation_files.TEXT_SUFFIXES


async def _warn_about_fallback(
    ctx: StepContext, result: SlidesResult, reason: str, *, repeat_on_restart: bool = False
) -> None:
    """Warn about what the document shows instead of images."""
    fallback = "Only the text of the slides is shown" if result.texts else "The attachment is only linked"
    await ctx.warn(f"{fallback}. {reason}", repeat_on_restart=repeat_on_restart)


class _Attachment:
    """Fetches one attachment and shows it in a result. The recognition of text ends before the step's timeout."""

    def __init__(self, ctx: StepContext, result: SlidesResult) -> None:
        self._ctx = ctx
        self._result = result
        self._deadline = (
            asyncio.get_running_loop().time() + ctx.settings.slides_timeout_seconds * FETCH_TIMEOUT_FRACTION
        )

    async def fetch_and_show(self, url: str) -> None:
        """Fetch the attachment and fill `result`.

        Raises:
            UnusablePresentation: The presentation cannot be converted.
            ProcessorError: The attachment cannot be fetched.
            UnreadablePdf: The PDF cannot be opened.
        """
        suffix = pdf_rendering.get_url_suffix(url)
        kind = attachments.UNSUPPORTED_TYPES.get(suffix)
        if _needs_libreoffice(suffix) and not _is_libreoffice_installed(self._ctx):
            kind = f"{attachments.PRESENTATION_TYPES[suffix]}, not a PDF. {_NOT_INSTALLED}"
        if kind:
            await self._ctx.warn(f"The attachment is only linked. It is {kind}.")
            return
        attachment = self._ctx.job.scratch_dir / "attachment"
        response = await download(
            self._ctx,
            attachments.get_download_url(url),
            attachment,
            progress=ProgressRange("Fetching the slides", 60, 66),
            max_bytes=self._ctx.settings.slides_max_bytes,
            timeout_seconds=self._ctx.settings.slides_timeout_seconds * FETCH_TIMEOUT_FRACTION,
        )
        suffix = (
            suffix
            if suffix in presentation_conversion.SIGNATURES
            else presentation_conversion.MEDIA_TYPES.get(response.media_type, "")
        )
        if not await self._show(attachment, suffix):
            await self._show_content(attachment, response.media_type)

    async def _show_content(self, attachment: Path, media_type: str) -> None:
        """Show what is in an attachment that is neither a PDF, a picture nor a presentation, or say what it is."""
        unpacked = self._ctx.job.scratch_dir / "unpacked"
        content = await asyncio.to_thread(
            attachments.inspect,
            attachment,
            unpacked,
            max_bytes=self._ctx.settings.slides_max_bytes,
            media_type=media_type,
        )
        if content.unpacked_suffix is not None:
            if not await self._show(unpacked, content.unpacked_suffix):
                await self._ctx.warn("The attachment is only linked. The presentation in the archive is damaged.")
            return
        self._result.texts = content.texts
        is_page = "html" in media_type and not content.texts  # such as a sign-in page, or a page that says "not found"
        await _warn_about_fallback(self._ctx, self._result, content.description, repeat_on_restart=is_page)

    async def _show(self, attachment: Path, suffix: str) -> bool:
        """Show a PDF, a picture or a presentation. Return whether the file is one of them."""
        if await asyncio.to_thread(pdf_rendering.is_pdf, attachment):
            await self._render(attachment)
        elif await asyncio.to_thread(pdf_rendering.is_picture, attachment):
            await self._render(attachment, is_picture=True)
        elif suffix := await asyncio.to_thread(presentation_conversion.detect_presentation, attachment, suffix):
            await self._show_presentation(attachment, suffix)
        else:
            return False
        return True

    async def _show_presentation(self, attachment: Path, suffix: str) -> None:
        texts = await asyncio.to_thread(presentation_files.read_slide_texts, attachment)
        if texts == []:
            raise UnusablePresentation("has no slides")
        self._result.texts = texts or []
        if not _is_libreoffice_installed(self._ctx):
            kind = attachments.PRESENTATION_TYPES[suffix]
            await _warn_about_fallback(self._ctx, self._result, f"It is {kind}, not a PDF. {_NOT_INSTALLED}.")
            return
        await self._ctx.job.report_progress(66, "Converting the slides to PDF")
        scratch = self._ctx.job.scratch_dir / "office"
        await asyncio.to_thread(scratch.mkdir)
        converted = await presentation_conversion.convert_to_pdf(
            attachment, suffix, program=self._ctx.settings.libreoffice_command or "", scratch=scratch
        )
        if texts is None:
            self._result.texts = await asyncio.to_thread(presentation_files.extract_slide_texts, converted.text_source)
        await self._render(converted.pdf)

    async def _render(self, file: Path, *, is_picture: bool = False) -> None:
        texts, page_count, max_pages = self._result.texts, 0, self._ctx.settings.max_pdf_pages
        collector = SlideCollector(self._ctx, self._result)
        pages = pdf_rendering.render_pages(
            file,
            self._ctx.settings,
            self._ctx.job.scratch_dir,
            is_picture=is_picture,
            recognizes_text=_can_recognize(self._ctx),
        )
        try:
            async with aclosing(pages):
                async for page in pages:
                    page_count = page.page_count
                    await collector.add(page)
                    message = f"Rendering slide {page.page_number} of {page_count}"
                    await self._ctx.report_part(message, 66, 80, page.page_number, min(page_count, max_pages))
        finally:
            await collector.finish(texts)
        if page_count > max_pages:
            await self._ctx.warn(f"Only the first {max_pages} of {page_count} slides are shown.")
        await self._ctx.job.log("info", f"Rendered {len(self._result.slides)} of {page_count} pages")
        await text_recognition.recognize_slides(
            self._ctx, self._result.slides, collector.recognition_images, self._deadline
        )
