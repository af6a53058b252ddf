"""Run the steps of a session job in order and build its results."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel

from jobledger.workers.processor import JSON, JobContext, Results, SavedFile
from jobledger.workers.processors.session import (
    document,
    document_step,
    enrichment_step,
    page_step,
    slides_step,
    transcript_step,
)
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.page import PageText
from jobledger.workers.processors.session.parameters import SessionParameters
from jobledger.workers.processors.session.result_layout import build_layout
from jobledger.workers.processors.session.settings import SessionSettings
from jobledger.workers.processors.session.step_context import SHARED_STEP_MAX_AGE, StepContext

Output = TypeVar("Output", bound=BaseModel)


async def run(job: JobContext, settings: SessionSettings, fetcher: Fetcher) -> Results:
    """Convert one conference session to Markdown.

    Raises:
        ProcessorError: See `page_step.run`; also CANCELLED and TEMPLATE_ERROR.
    """
    parameters: SessionParameters = job.parameters
    names = parameters.model_dump(include={"event", "track", "session", "filename"})
    layout = build_layout(**names, job_id=job.job_id)

    async def run_step(
        name: str,
        output: type[Output],
        build_inputs: Callable[..., dict[str, JSON]],
        function: Callable[..., Awaitable[Output]],
        *arguments: object,
        is_shared: bool = False,
    ) -> Output:
        """Run a step with its own list of warnings, or return its stored output."""
        ctx = StepContext(job, parameters, settings, layout, fetcher)
        ctx.raise_if_cancelled()

        async def run_and_dump(_inputs: object) -> JSON:
            return (await function(ctx, *arguments)).model_dump(mode="json")

        share = SHARED_STEP_MAX_AGE if is_shared else None
        return output.model_validate(await job.step(name, run_and_dump, build_inputs(ctx, *arguments), share=share))

    page = await run_step("page", PageText, page_step.build_inputs, page_step.run, is_shared=True)
    transcript = await run_step(
        "transcript",
        document.TranscriptResult,
        transcript_step.build_inputs,
        transcript_step.run,
        transcript_step.list_subtitle_urls(parameters, settings, page.video_tracks),
        is_shared=True,
    )
    slides = await run_step("slides", document.SlidesResult, slides_step.build_inputs, slides_step.run, is_shared=True)
    # A shared output has the paths of the job that ran the step.
    page = page.with_result_paths(layout)
    transcript, slides = transcript.with_result_paths(layout), slides.with_result_paths(layout)
    enrichment = await run_step(
        "enrich", document.EnrichmentResult, enrichment_step.build_inputs, enrichment_step.run, page, transcript, slides
    )
    content = document.SessionContent(page, enrichment, transcript, slides)
    template = await asyncio.to_thread(document_step.read_template, settings)
    markdown = await run_step("markdown", SavedFile, document_step.build_inputs, document_step.run, content, template)
    await job.report_progress(100, "Markdown ready")
    return Results(
        markdown=markdown,
        assets=[*_list_images(slides), *page.images, *([transcript.audio] if transcript.audio else [])],
        metadata=_build_metadata(parameters, content),
    )


def _list_images(slides: document.SlidesResult) -> list[SavedFile]:
    """Return each slide followed by its thumbnail."""
    return [
        SavedFile.model_validate(file.model_dump(include=set(SavedFile.model_fields)))
        for slide in slides.slides
        for file in (slide, slide.thumbnail)
    ]


def _build_metadata(parameters: SessionParameters, content: document.SessionContent) -> dict[str, JSON]:
    metadata: dict[str, JSON] = {
        "title": content.page.title or parameters.session,
        "language": content.enrichment.language,
        "slides": len(content.slides.slides),
        "audio_seconds": content.transcript.audio_seconds,
        "transcribed": bool(content.transcript.segments),
    }
    return metadata if parameters.extra is None else metadata | {"extra": parameters.extra}
