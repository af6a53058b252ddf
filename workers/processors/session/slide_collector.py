"""Collect rendered pages: merge overlays, save the others, and join them with their texts and speaker notes."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from jobledger.workers.processors.session import pdf_rendering, slide_text
from jobledger.workers.processors.session.document import SlidesResult
from jobledger.workers.processors.session.pdf_rendering import RenderedPage, Slide
from jobledger.workers.processors.session.presentation_files import SlideText
from jobledger.workers.processors.session.slide_text import TextLine
from jobledger.workers.processors.session.step_context import StepContext


class SlideCollector:
    """Fills a result with the pages of a PDF.

    Attributes:
        recognition_images: Files for text recognition, by the number of the slide.
    """

    def __init__(self, ctx: StepContext, result: SlidesResult) -> None:
        self._ctx = ctx
        self._result = result
        self._page_count = 0
        self._pending: list[RenderedPage] = []
        self._merged_pages: dict[int, list[int]] = defaultdict(list)
        self._lines: dict[int, list[TextLine]] = {}
        self._notes: dict[int, str] = {}
        self._problems: dict[str, list[int]] = defaultdict(list)
        self.recognition_images: dict[int, Path] = {}

    async def add(self, page: RenderedPage) -> None:
        """Add the next page. The page before it is saved, unless this page shows all of it."""
        self._page_count = page.page_count
        self._lines[page.page_number] = page.lines
        self._notes[page.page_number] = slide_text.clean_notes(page.notes)
        if page.problem is not None:
            self._problems[page.problem].append(page.page_number)
        elif page.is_extension and self._pending:
            replaced = self._pending.pop()
            earlier = self._merged_pages.pop(replaced.page_number, [])
            self._merged_pages[page.page_number] = [*earlier, replaced.page_number]
            self._pending.append(page)
        else:
            if not all(pending.is_blank for pending in self._pending):
                await self._save_pending()
            self._pending.append(page)  # blank pages wait until it is known that not all are blank

    async def finish(self, texts: list[SlideText]) -> None:
        """Save the last page, and set the texts and notes of all.

        Args:
            texts: Texts and notes from the presentation file; empty for a PDF.
        """
        if self._pending and not self._result.slides and all(page.is_blank for page in self._pending):
            count = len(self._pending)
            await self._ctx.warn(
                "The slides are only linked. "
                + (f"All {count} pages are blank." if count > 1 else "The page is blank.")
            )
            self._pending.clear()
        await self._save_pending()
        for problem, numbers in self._problems.items():
            await self._warn_about_problem(problem, numbers)
        self._set_texts(texts)
        self._result.merged_pages = sum(map(len, self._merged_pages.values()))

    async def _save_pending(self) -> None:
        while self._pending:
            self._result.slides.append(await self._save(self._pending.pop(0)))

    async def _save(self, page: RenderedPage) -> Slide:
        ctx = self._ctx
        image_name, thumbnail_name = pdf_rendering.make_slide_file_names(page.page_number)
        image = await ctx.job.save(ctx.result_layout.build_asset_path(image_name), page.image, "image/jpeg")
        thumbnail = await ctx.job.save(ctx.result_layout.build_asset_path(thumbnail_name), page.thumbnail, "image/jpeg")
        if page.recognition_image:
            path = ctx.job.scratch_dir / f"recognition-{page.page_number}.jpg"
            await asyncio.to_thread(path.write_bytes, page.recognition_image)
            self.recognition_images[page.page_number] = path
        return Slide(**image.model_dump(), number=page.page_number, text="", thumbnail=thumbnail)

    async def _warn_about_problem(self, problem: str, numbers: list[int]) -> None:
        if len(numbers) == 1:
            await self._ctx.warn(f"Slide {numbers[0]} is not shown. The page {problem}.")
        else:
            await self._ctx.warn(
                f"Slides {slide_text.format_numbers(numbers)} are not shown. Each of these pages {problem}."
            )

    def _set_texts(self, texts: list[SlideText]) -> None:
        """Set the texts and notes of the slides. Pages that are not shown are replaced by their text."""
        by_page = {text.number: text for text in texts} if self._page_count == len(texts) else {}
        slide_texts = slide_text.build_slide_texts(self._lines)
        for index, slide in enumerate(self._result.slides):
            pages = [*self._merged_pages[slide.number], slide.number]
            file_notes = (by_page[page].notes for page in pages if page in by_page)
            notes = join_notes([*file_notes, *(self._notes[page] for page in pages)])
            update = {"text": slide_texts[slide.number], "notes": notes}
            self._result.slides[index] = slide.model_copy(update=update)
        shown = {page for slide in self._result.slides for page in (slide.number, *self._merged_pages[slide.number])}
        if texts and not by_page:  # it is not known which page a text belongs to
            self._result.texts = [text for text in texts if text.notes or not shown]
            return
        missing = by_page or {
            number: SlideText(number=number, text=text, notes=self._notes[number])
            for number, text in slide_texts.items()
        }
        self._result.texts = [
            text
            for number, text in missing.items()
            if number not in shown and number <= self._ctx.settings.max_pdf_pages and (text.text or text.notes)
        ]


def join_notes(notes: Iterable[str]) -> str:
    """Return the notes of the overlays of a slide, each once."""
    return "\n".join(dict.fromkeys(note for note in notes if note))
