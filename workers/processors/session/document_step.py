"""session: the step `markdown`, 90 to 100 percent of the job: everything found out becomes one document."""

from __future__ import annotations

from jobledger.workers.processor import JSON
from jobledger.workers.processors.session.document import SessionContent, built_in_template, render_document
from jobledger.workers.processors.session.step_context import StepContext, json_digest


def read_template(work: StepContext) -> str:
    """The operator's own template, or ours."""
    own = work.settings.template
    return own.read_text(encoding="utf-8") if own else built_in_template()


def inputs(work: StepContext, material: SessionContent, template: str) -> dict[str, JSON]:
    """Digests: the texts themselves are already the outputs of the steps before."""
    told = [work.session, *material]
    return {
        "path": work.result_layout.markdown_path,
        "content": json_digest([part.model_dump(mode="json") for part in told]),
        "template": json_digest(template),
    }


async def run(work: StepContext, material: SessionContent, template: str) -> JSON:
    """Write and store the Markdown."""
    await work.job.report_progress(90, "Writing the Markdown")
    text = render_document(
        session=work.session,
        job_id=work.job.job_id,
        content=material,
        warnings=[warning for part in material for warning in part.warnings],
        template=template,
    )
    saved = await work.job.save(work.result_layout.markdown_path, text.encode(), "text/markdown; charset=utf-8")
    await work.job.log("info", f"Wrote {len(text):,} characters of Markdown")
    return saved.model_dump(mode="json")
