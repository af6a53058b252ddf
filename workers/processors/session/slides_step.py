"""session: the step `slides`, 60 to 90 percent of the job. What cannot be had is a warning, never a failure."""

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
_MISSING = "LibreOffice, which could make one of it, is not installed"


def inputs(work: StepContext) -> dict[str, JSON]:
    """Return all that the slides depend on: with the same inputs the step is not repeated."""
    limits = {
        "slides_max_bytes",
        "slide_max_side_px",
        "thumbnail_max_side_px",
        "jpeg_quality",
        "max_pages",
        "max_image_pixels",
    }
    return {
        "url": work.session.attachments_url,
        "office": _can_convert(work),
        **work.settings.model_dump(mode="json", include=limits),
    }


def _can_convert(work: StepContext) -> bool:
    """Return whether a presentation would be converted: not known before it is tried out, which only they are worth."""
    if not is_installed(work.settings.libreoffice_command):
        return False
    url = work.session.attachments_url
    return url is None or not is_presentation_suffix(url_suffix(url)) or runner.is_available()


async def run(work: StepContext) -> JSON:
    """Fetch the attachment and store an image of each page."""
    slides: list[Slide] = []
    texts: list[SlideText] = []
    if work.session.attachments_url is not None:
        try:
            async with asyncio.timeout(work.settings.slides_timeout_seconds):
                await _show(work, work.session.attachments_url, slides, texts)
        except Cancelled:
            raise
        except TimeoutError:
            limit = f"{work.settings.slides_timeout_seconds:g} seconds"
            done = f"only the first {len(slides)} are shown" if slides else "they are only linked"
            await work.warn(f"The slides could not be worked through within {limit}: {done}.")
        except ProcessorError as error:
            await work.warn(f"The slides are only linked. {error.message}")
        except UnreadablePdf as error:
            await work.warn(f"The slides are only linked: the PDF {error}.")
        except ConversionFailed as error:
            await work.warn(f"{_only(texts)}: it {str(error).rstrip('.')}.")
    await work.job.report_progress(90, "The slides are done")
    return SlidesResult(slides=slides, texts=[] if slides else texts, warnings=work.warnings).model_dump(mode="json")


async def _show(work: StepContext, url: str, slides: list[Slide], texts: list[SlideText]) -> None:
    suffix = url_suffix(url)
    kind = describe_other_type(url)
    convertible = is_presentation_suffix(suffix) and is_installed(work.settings.libreoffice_command)
    if kind and not convertible and suffix not in TEXT_SUFFIXES:
        missing = f"; {_MISSING}" if is_presentation_suffix(suffix) else ""
        await work.warn(f"The attachment is only linked: it is {kind}, and images can only be made of PDF{missing}.")
        return
    attachment = work.job.scratch_dir / "attachment"
    await work.job.report_progress(60, "Fetching the slides")
    fetched = await work.fetcher.fetch(
        url,
        max_bytes=work.settings.slides_max_bytes,
        timeout_seconds=work.settings.slides_timeout_seconds * FETCH_TIMEOUT_FRACTION,
        target=attachment,
        on_progress=work.report_download_progress("Fetching the slides", 60, 70),
    )
    await work.log_fetch(fetched)
    if await asyncio.to_thread(is_pdf, attachment):
        await _draw(work, attachment, slides)
        return
    suffix = suffix if is_presentation_suffix(suffix) else MEDIA_TYPES.get(fetched.media_type, "")
    if not await asyncio.to_thread(has_presentation_signature, attachment, suffix):
        kind = fetched.media_type or "of unknown type"
        await work.warn(f"The attachment is only linked: it is no PDF ({kind}), and images can only be made of PDF.")
        return
    texts += await asyncio.to_thread(extract_slide_texts, attachment)
    if not is_installed(work.settings.libreoffice_command):
        kind = describe_other_type(f"/x{suffix}") or "a presentation"
        await work.warn(f"{_only(texts)}: it is {kind}, and images can only be made of PDF; {_MISSING}.")
        return
    await _draw(work, await _converted(work, attachment, suffix), slides)


def _only(texts: list[SlideText]) -> str:
    """Return what the document has of slides without images."""
    return "Only the words of the slides are shown" if texts else "The attachment is only linked"


async def _converted(work: StepContext, attachment: Path, suffix: str) -> Path:
    await work.job.report_progress(70, "Making a PDF of the slides")
    scratch = work.job.scratch_dir / "office"
    await asyncio.to_thread(scratch.mkdir)
    converting = asyncio.create_task(
        convert_to_pdf(attachment, suffix, program=work.settings.libreoffice_command or "", scratch=scratch)
    )
    try:
        while not (await asyncio.wait({converting}, timeout=CANCELLATION_POLL_SECONDS))[0]:
            work.raise_if_cancelled()
        return converting.result()
    finally:
        converting.cancel()
        await asyncio.wait({converting})


async def _draw(work: StepContext, pdf: Path, slides: list[Slide]) -> None:
    pages, remaining_text_characters = 0, MAX_TEXT_CHARACTERS
    async with work.iterate_in_thread(render_pages(pdf, work.settings)) as drawn_pages:
        async for drawn in drawn_pages:
            pages = drawn.page_count
            if drawn.problem:
                await work.warn(f"Slide {drawn.page_number} is not shown: the page {drawn.problem}.")
            else:
                slides.append(await _save(work, drawn, remaining_text_characters))
                remaining_text_characters -= len(slides[-1].text)
            done = drawn.page_number / min(pages, work.settings.max_pdf_pages)
            await work.job.report_progress(70 + 20 * done, f"Drawing slide {drawn.page_number} of {pages}")
    if pages > work.settings.max_pdf_pages:
        await work.warn(f"Only the first {work.settings.max_pdf_pages} of {pages} slides are shown.")
    await work.job.log("info", f"Made images of {len(slides)} of {pages} pages")


async def _save(work: StepContext, drawn: RenderedPage, text_left: int) -> Slide:
    image, thumbnail = slide_file_names(drawn.page_number)
    saved = await work.job.save(work.result_layout.asset_path(image), drawn.image, "image/jpeg")
    small = await work.job.save(work.result_layout.asset_path(thumbnail), drawn.thumbnail, "image/jpeg")
    return Slide(**saved.model_dump(), number=drawn.page_number, text=drawn.text[:text_left], thumbnail=small)
