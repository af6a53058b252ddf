"""The step `markdown`: render and save the document (progress 90 to 100 percent)."""

from __future__ import annotations

from jobledger.workers.processor import JSON
from jobledger.workers.processors.session.document import SessionContent, read_built_in_template, render_document
from jobledger.workers.processors.session.step_context import StepContext, json_digest


def read_template(ctx: StepContext) -> str:
    """Return the text of the configured template or of the built-in one."""
    path = ctx.settings.template
    return path.read_text(encoding="utf-8") if path else read_built_in_template()


def inputs(ctx: StepContext, content: SessionContent, template: str) -> dict[str, JSON]:
    """Return digests of the inputs. The texts are already stored as outputs of the other steps."""
    parts = [ctx.session, *content]
    return {
        "path": ctx.result_layout.markdown_path,
        "content": json_digest([part.model_dump(mode="json") for part in parts]),
        "template": json_digest(template),
    }


async def run(ctx: StepContext, content: SessionContent, template: str) -> JSON:
    """Render and save the document."""
    await ctx.job.report_progress(90, "Writing the Markdown")
    text = render_document(
        session=ctx.session,
        job_id=ctx.job.job_id,
        content=content,
        warnings=[warning for part in content for warning in part.warnings],
        template=template,
    )
    saved = await ctx.job.save(ctx.result_layout.markdown_path, text.encode(), "text/markdown; charset=utf-8")
    await ctx.job.log("info", f"Wrote {len(text):,} characters of Markdown")
    return saved.model_dump(mode="json")
