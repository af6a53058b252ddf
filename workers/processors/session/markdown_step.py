"""session: the step `markdown`, 90 to 100 percent of the job: everything found out becomes one document."""

from __future__ import annotations

import json
from hashlib import sha256

from workers.processor import JSON
from workers.processors.session.markdown import (
    Recording,
    SlideShow,
    built_in_template,
    compose_markdown,
    not_translated,
)
from workers.processors.session.page import PageText
from workers.processors.session.steps import Work


def read_template(work: Work) -> str:
    """The operator's own template, or ours."""
    own = work.settings.template
    return own.read_text(encoding="utf-8") if own else built_in_template()


def inputs(work: Work, page: PageText, recording: Recording, show: SlideShow, template: str) -> dict[str, JSON]:
    """Digests: the texts themselves are already the outputs of the steps before."""
    told = [work.session, page, recording, show]
    return {
        "path": work.layout.markdown,
        "content": _digest([part.model_dump(mode="json") for part in told]),
        "template": _digest(template),
    }


def _digest(value: JSON) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


async def run(work: Work, page: PageText, recording: Recording, show: SlideShow, template: str) -> JSON:
    """Write and store the Markdown."""
    await work.job.progress(90, "Writing the Markdown")
    if sentence := not_translated(work.session, page):
        await work.warn(sentence)
    text = compose_markdown(
        session=work.session,
        job_id=work.job.job_id,
        page=page,
        recording=recording,
        show=show,
        warnings=[*page.warnings, *recording.warnings, *show.warnings, *work.warnings],
        template=template,
    )
    saved = await work.job.save(work.layout.markdown, text.encode(), "text/markdown; charset=utf-8")
    await work.job.log("info", f"Wrote {len(text):,} characters of Markdown")
    return saved.model_dump(mode="json")
