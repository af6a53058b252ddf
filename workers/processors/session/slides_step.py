"""session: the step `slides`, 60 to 90 percent of the job. What cannot be had is a warning, never a failure."""

from __future__ import annotations

import asyncio
from pathlib import Path

from jobledger.workers.processor import JSON, ProcessorError
from jobledger.workers.processors.session.deck_files import HAVE_WORDS, SlideText, words
from jobledger.workers.processors.session.markdown import SlideShow
from jobledger.workers.processors.session.office_conversion import (
    MEDIA_TYPES,
    NotConverted,
    can_be_presentation,
    is_installed,
    is_presentation,
    to_pdf,
)
from jobledger.workers.processors.session.slides import (
    DrawnPage,
    Slide,
    Unreadable,
    draw,
    file_names,
    is_pdf,
    other_type,
    suffix_of,
)
from jobledger.workers.processors.session.step_context import FETCH_SHARE, Cancelled, Work
from jobledger.workers.sandbox import runner

MAX_TEXT = 500_000
LOOK_EVERY_SECONDS = 0.5
_MISSING = "LibreOffice, which could make one of it, is not installed"


def inputs(work: Work) -> dict[str, JSON]:
    """Return all that the slides depend on: with the same inputs the step is not repeated."""
    limits = {
        "slides_max_bytes",
        "slide_longest_side",
        "thumbnail_longest_side",
        "jpeg_quality",
        "max_pages",
        "max_pixels",
    }
    return {
        "url": work.session.attachments_url,
        "office": _can_convert(work),
        **work.settings.model_dump(mode="json", include=limits),
    }


def _can_convert(work: Work) -> bool:
    """Return whether a presentation would be converted: not known before it is tried out, which only they are worth."""
    if not is_installed(work.settings.libreoffice):
        return False
    url = work.session.attachments_url
    return url is None or not can_be_presentation(suffix_of(url)) or runner.is_available()


async def run(work: Work) -> JSON:
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
        except Unreadable as error:
            await work.warn(f"The slides are only linked: the PDF {error}.")
        except NotConverted as error:
            await work.warn(f"{_only(texts)}: it {str(error).rstrip('.')}.")
    await work.job.progress(90, "The slides are done")
    return SlideShow(slides=slides, texts=[] if slides else texts, warnings=work.warnings).model_dump(mode="json")


async def _show(work: Work, url: str, slides: list[Slide], texts: list[SlideText]) -> None:
    suffix = suffix_of(url)
    kind = other_type(url)
    convertible = can_be_presentation(suffix) and is_installed(work.settings.libreoffice)
    if kind and not convertible and suffix not in HAVE_WORDS:
        missing = f"; {_MISSING}" if can_be_presentation(suffix) else ""
        await work.warn(f"The attachment is only linked: it is {kind}, and images can only be made of PDF{missing}.")
        return
    attachment = work.job.scratch / "attachment"
    await work.job.progress(60, "Fetching the slides")
    fetched = await work.fetcher.fetch(
        url,
        max_bytes=work.settings.slides_max_bytes,
        total_seconds=work.settings.slides_timeout_seconds * FETCH_SHARE,
        into=attachment,
        on_progress=work.downloading("Fetching the slides", 60, 70),
    )
    await work.log_fetched(fetched)
    if await asyncio.to_thread(is_pdf, attachment):
        await _draw(work, attachment, slides)
        return
    suffix = suffix if can_be_presentation(suffix) else MEDIA_TYPES.get(fetched.media_type, "")
    if not await asyncio.to_thread(is_presentation, attachment, suffix):
        kind = fetched.media_type or "of unknown type"
        await work.warn(f"The attachment is only linked: it is no PDF ({kind}), and images can only be made of PDF.")
        return
    texts += await asyncio.to_thread(words, attachment)
    if not is_installed(work.settings.libreoffice):
        kind = other_type(f"/x{suffix}") or "a presentation"
        await work.warn(f"{_only(texts)}: it is {kind}, and images can only be made of PDF; {_MISSING}.")
        return
    await _draw(work, await _converted(work, attachment, suffix), slides)


def _only(texts: list[SlideText]) -> str:
    """Return what the document has of slides without images."""
    return "Only the words of the slides are shown" if texts else "The attachment is only linked"


async def _converted(work: Work, attachment: Path, suffix: str) -> Path:
    await work.job.progress(70, "Making a PDF of the slides")
    scratch = work.job.scratch / "office"
    await asyncio.to_thread(scratch.mkdir)
    converting = asyncio.create_task(
        to_pdf(attachment, suffix, program=work.settings.libreoffice or "", scratch=scratch)
    )
    try:
        while not (await asyncio.wait({converting}, timeout=LOOK_EVERY_SECONDS))[0]:
            work.stop_if_cancelled()
        return converting.result()
    finally:
        converting.cancel()
        await asyncio.wait({converting})


async def _draw(work: Work, pdf: Path, slides: list[Slide]) -> None:
    pages, text_left = 0, MAX_TEXT
    async with work.one_by_one(draw(pdf, work.settings)) as drawn_pages:
        async for drawn in drawn_pages:
            pages = drawn.pages
            if drawn.problem:
                await work.warn(f"Slide {drawn.number} is not shown: the page {drawn.problem}.")
            else:
                slides.append(await _save(work, drawn, text_left))
                text_left -= len(slides[-1].text)
            done = drawn.number / min(pages, work.settings.max_pages)
            await work.job.progress(70 + 20 * done, f"Drawing slide {drawn.number} of {pages}")
    if pages > work.settings.max_pages:
        await work.warn(f"Only the first {work.settings.max_pages} of {pages} slides are shown.")
    await work.job.log("info", f"Made images of {len(slides)} of {pages} pages")


async def _save(work: Work, drawn: DrawnPage, text_left: int) -> Slide:
    image, thumbnail = file_names(drawn.number)
    saved = await work.job.save(work.layout.asset(image), drawn.image, "image/jpeg")
    small = await work.job.save(work.layout.asset(thumbnail), drawn.thumbnail, "image/jpeg")
    return Slide(**saved.model_dump(), number=drawn.number, text=drawn.text[:text_left], thumbnail=small)
