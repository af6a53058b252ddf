"""session: the steps in their order, and what the job hands over in the end."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial
from typing import Final

from jobledger.workers.processor import JSON, Job, Results, SavedFile
from jobledger.workers.processors.session import compose_step, markdown_step, page_step, slides_step, transcript_step
from jobledger.workers.processors.session.fetch import Fetcher
from jobledger.workers.processors.session.markdown import Composed, Material, Recording, SlideShow
from jobledger.workers.processors.session.page import PageText
from jobledger.workers.processors.session.parameters import SessionParameters
from jobledger.workers.processors.session.result_names import layout
from jobledger.workers.processors.session.settings import SessionSettings
from jobledger.workers.processors.session.step_context import Work

SHARE: Final = timedelta(days=1)
"""The steps that do not depend on the target language are shared for this long: pages and recordings change."""


async def run(job: Job, settings: SessionSettings, fetcher: Fetcher) -> Results:
    """Make the Markdown of one session.

    Raises:
        ProcessorError: see `page_step.run`; CANCELLED; TEMPLATE_ERROR.
    """
    session: SessionParameters = job.parameters
    where = layout(
        event=session.event,
        track=session.track,
        session=session.session,
        filename=session.filename,
        job_id=job.job_id,
    )

    def next_step() -> Work:
        """Each step has its own list of warnings."""
        work = Work(job=job, session=session, settings=settings, layout=where, fetcher=fetcher)
        work.stop_if_cancelled()
        return work

    step = next_step()
    page = PageText.model_validate(
        await job.step("page", page_step.inputs(step), partial(page_step.run, step), share=SHARE)
    )
    step = next_step()
    recording = Recording.model_validate(
        await job.step("transcript", transcript_step.inputs(step), partial(transcript_step.run, step), share=SHARE)
    )
    step = next_step()
    show = SlideShow.model_validate(
        await job.step("slides", slides_step.inputs(step), partial(slides_step.run, step), share=SHARE)
    )
    recording, show = recording.placed(where), show.placed(where)  # another job may have done it
    step = next_step()
    composed = Composed.model_validate(
        await job.step(
            "compose", compose_step.inputs(step, page, recording), partial(compose_step.run, step, page, recording)
        )
    )
    step = next_step()
    parts = (Material(page, composed, recording, show), await asyncio.to_thread(markdown_step.read_template, step))
    document = SavedFile.model_validate(
        await job.step("markdown", markdown_step.inputs(step, *parts), partial(markdown_step.run, step, *parts))
    )
    await job.progress(100, "The Markdown is ready")
    return Results(
        markdown=document,
        assets=[*_images(show), *([recording.audio] if recording.audio else [])],
        metadata=_facts(session, parts[0]),
    )


def _images(show: SlideShow) -> list[SavedFile]:
    """Each slide followed by its thumbnail."""
    return [
        SavedFile.model_validate(file.model_dump(include=set(SavedFile.model_fields)))
        for slide in show.slides
        for file in (slide, slide.thumbnail)
    ]


def _facts(session: SessionParameters, material: Material) -> dict[str, JSON]:
    page, composed, recording, show = material
    facts: dict[str, JSON] = {
        "title": page.title or session.session,
        "language": composed.language,
        "slides": len(show.slides),
        "audio_seconds": recording.seconds,
        "transcribed": bool(recording.segments),
    }
    return facts if session.extra is None else facts | {"extra": session.extra}
