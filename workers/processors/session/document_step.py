"""The step `markdown`: render and save the document (progress 90 to 100 percent)."""

from __future__ import annotations

from jobledger.workers.processor import JSON, SavedFile
from jobledger.workers.processors.session.document import SessionContent, read_built_in_template, render_document
from jobledger.workers.processors.session.settings import SessionSettings
from jobledger.workers.processors.session.step_context import StepContext, compute_json_digest


def read_template(settings: SessionSettings) -> str:
    """Return the text of the configured template or of the built-in one."""
    return settings.template.read_text(encoding="utf-8") if settings.template else read_built_in_template()


def build_inputs(ctx: StepContext, content: SessionContent, template: str) -> dict[str, JSON]:
    """Return digests of the inputs. The texts are already stored as outputs of the other steps."""
    parts = [ctx.parameters, *content]
    return {
        "path": ctx.result_layout.markdown_path,
        "content": compute_json_digest([part.model_dump(mode="json") for part in parts]),
        "template": compute_json_digest(template),
    }


async def run(ctx: StepContext, content: SessionContent, template: str) -> SavedFile:
    """Render and save the document."""
    await ctx.job.report_progress(90, "Writing the Markdown")
    text = render_document(
        parameters=ctx.parameters,
        job_id=ctx.job.job_id,
        content=content,
        warnings=[warning for part in content for warning in part.warnings],
        template=template,
    )
    saved = await ctx.job.save(ctx.result_layout.markdown_path, text.encode(), "text/markdown; charset=utf-8")
    await ctx.job.log("info", f"Wrote {len(text):,} characters of Markdown")
    return saved
