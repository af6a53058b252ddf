"""session: the step `markdown`, 90 to 100 percent of the job: everything found out becomes one document."""

from __future__ import annotations

from jobledger.workers.processor import JSON
from jobledger.workers.processors.session.markdown import Material, built_in_template, compose_markdown
from jobledger.workers.processors.session.step_context import Work, digest_of


def read_template(work: Work) -> str:
    """The operator's own template, or ours."""
    own = work.settings.template
    return own.read_text(encoding="utf-8") if own else built_in_template()


def inputs(work: Work, material: Material, template: str) -> dict[str, JSON]:
    """Digests: the texts themselves are already the outputs of the steps before."""
    told = [work.session, *material]
    return {
        "path": work.layout.markdown,
        "content": digest_of([part.model_dump(mode="json") for part in told]),
        "template": digest_of(template),
    }


async def run(work: Work, material: Material, template: str) -> JSON:
    """Write and store the Markdown."""
    await work.job.progress(90, "Writing the Markdown")
    text = compose_markdown(
        session=work.session,
        job_id=work.job.job_id,
        material=material,
        warnings=[warning for part in material for warning in part.warnings],
        template=template,
    )
    saved = await work.job.save(work.layout.markdown, text.encode(), "text/markdown; charset=utf-8")
    await work.job.log("info", f"Wrote {len(text):,} characters of Markdown")
    return saved.model_dump(mode="json")
