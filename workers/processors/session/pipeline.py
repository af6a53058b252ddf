"""session: the steps in their order, and what the job hands over in the end."""

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
"""The steps that do not depend on the target language are shared for this long: pages and recordings change."""


async def run(job: JobContext, settings: SessionSettings, fetcher: Fetcher) -> Results:
    """Make the Markdown of one session.

    Raises:
        ProcessorError: see `page_step.run`; CANCELLED; TEMPLATE_ERROR.
    """
    session: SessionParameters = job.parameters
    where = build_layout(
        event=session.event,
        track=session.track,
        session=session.session,
        filename=session.filename,
        job_id=job.job_id,
    )

    def next_step() -> StepContext:
        """Each step has its own list of warnings."""
        work = StepContext(job=job, session=session, settings=settings, result_layout=where, fetcher=fetcher)
        work.raise_if_cancelled()
        return work

    step = next_step()
    page = PageText.model_validate(
        await job.run_step("page", page_step.inputs(step), partial(page_step.run, step), share_max_age=STEP_CACHE_TTL)
    )
    step = next_step()
    recording = TranscriptResult.model_validate(
        await job.run_step(
            "transcript", transcript_step.inputs(step), partial(transcript_step.run, step), share_max_age=STEP_CACHE_TTL
        )
    )
    step = next_step()
    show = SlidesResult.model_validate(
        await job.run_step(
            "slides", slides_step.inputs(step), partial(slides_step.run, step), share_max_age=STEP_CACHE_TTL
        )
    )
    recording, show = recording.with_result_paths(where), show.with_result_paths(where)  # another job may have done it
    step = next_step()
    composed = EnrichmentResult.model_validate(
        await job.run_step(
            "enrich",
            enrichment_step.inputs(step, page, recording),
            partial(enrichment_step.run, step, page, recording),
        )
    )
    step = next_step()
    parts = (
        SessionContent(page, composed, recording, show),
        await asyncio.to_thread(document_step.read_template, step),
    )
    document = SavedFile.model_validate(
        await job.run_step("markdown", document_step.inputs(step, *parts), partial(document_step.run, step, *parts))
    )
    await job.report_progress(100, "The Markdown is ready")
    return Results(
        markdown=document,
        assets=[*_images(show), *([recording.audio] if recording.audio else [])],
        metadata=_facts(session, parts[0]),
    )


def _images(show: SlidesResult) -> list[SavedFile]:
    """Each slide followed by its thumbnail."""
    return [
        SavedFile.model_validate(file.model_dump(include=set(SavedFile.model_fields)))
        for slide in show.slides
        for file in (slide, slide.thumbnail)
    ]


def _facts(session: SessionParameters, material: SessionContent) -> dict[str, JSON]:
    page, composed, recording, show = material
    facts: dict[str, JSON] = {
        "title": page.title or session.session,
        "language": composed.language,
        "slides": len(show.slides),
        "audio_seconds": recording.audio_seconds,
        "transcribed": bool(recording.segments),
    }
    return facts if session.extra is None else facts | {"extra": session.extra}
