"""Run the steps of a session job in order and build its results."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial
from typing import Final

from jobledger.workers.processor import JSON, JobContext, Results, SavedFile
from jobledger.workers.processors.session import document_step, enrichment_step, page_step, slides_step, transcript_step
from jobledger.workers.processors.session.document import (
    EnrichmentResult,
    SessionContent,
    SlidesResult,
    TranscriptResult,
)
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.page import PageText
from jobledger.workers.processors.session.parameters import SessionParameters
from jobledger.workers.processors.session.result_layout import build_layout
from jobledger.workers.processors.session.settings import SessionSettings
from jobledger.workers.processors.session.step_context import StepContext

STEP_CACHE_TTL: Final = timedelta(days=1)
"""How long jobs share the outputs of steps that do not depend on the target language. Pages and recordings change."""


async def run(job: JobContext, settings: SessionSettings, fetcher: Fetcher) -> Results:
    """Convert one session to Markdown.

    Raises:
        ProcessorError: See `page_step.run`; also CANCELLED and TEMPLATE_ERROR.
    """
    session: SessionParameters = job.parameters
    layout = build_layout(
        event=session.event,
        track=session.track,
        session=session.session,
        filename=session.filename,
        job_id=job.job_id,
    )

    def begin_step() -> StepContext:
        """Return a context with its own list of warnings."""
        ctx = StepContext(job=job, session=session, settings=settings, result_layout=layout, fetcher=fetcher)
        ctx.raise_if_cancelled()
        return ctx

    ctx = begin_step()
    page = PageText.model_validate(
        await job.run_step("page", page_step.inputs(ctx), partial(page_step.run, ctx), share_max_age=STEP_CACHE_TTL)
    )
    ctx = begin_step()
    transcript = TranscriptResult.model_validate(
        await job.run_step(
            "transcript", transcript_step.inputs(ctx), partial(transcript_step.run, ctx), share_max_age=STEP_CACHE_TTL
        )
    )
    ctx = begin_step()
    slides = SlidesResult.model_validate(
        await job.run_step(
            "slides", slides_step.inputs(ctx), partial(slides_step.run, ctx), share_max_age=STEP_CACHE_TTL
        )
    )
    # A cached output has the paths of the job that ran the step.
    transcript, slides = transcript.with_result_paths(layout), slides.with_result_paths(layout)
    ctx = begin_step()
    enrichment = EnrichmentResult.model_validate(
        await job.run_step(
            "enrich",
            enrichment_step.inputs(ctx, page, transcript),
            partial(enrichment_step.run, ctx, page, transcript),
        )
    )
    ctx = begin_step()
    content = SessionContent(page, enrichment, transcript, slides)
    template = await asyncio.to_thread(document_step.read_template, ctx)
    document = SavedFile.model_validate(
        await job.run_step(
            "markdown",
            document_step.inputs(ctx, content, template),
            partial(document_step.run, ctx, content, template),
        )
    )
    await job.report_progress(100, "Markdown ready")
    return Results(
        markdown=document,
        assets=[*_list_images(slides), *([transcript.audio] if transcript.audio else [])],
        metadata=_build_metadata(session, content),
    )


def _list_images(slides: SlidesResult) -> list[SavedFile]:
    """Return each slide followed by its thumbnail."""
    return [
        SavedFile.model_validate(file.model_dump(include=set(SavedFile.model_fields)))
        for slide in slides.slides
        for file in (slide, slide.thumbnail)
    ]


def _build_metadata(session: SessionParameters, content: SessionContent) -> dict[str, JSON]:
    metadata: dict[str, JSON] = {
        "title": content.page.title or session.session,
        "language": content.enrichment.language,
        "slides": len(content.slides.slides),
        "audio_seconds": content.transcript.audio_seconds,
        "transcribed": bool(content.transcript.segments),
    }
    return metadata if session.extra is None else metadata | {"extra": session.extra}
