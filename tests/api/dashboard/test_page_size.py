"""Pages of the dashboard have a bounded size and cost the event loop bounded time, whatever they show."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment, nodes
from markupsafe import Markup
from starlette.requests import Request

from jobledger.api.dashboard import charts, rendering
from jobledger.api.dashboard.attempt_timeline import build_attempt_timeline
from jobledger.api.dashboard.markdown_preview import MAX_MARKDOWN_BYTES
from jobledger.api.processes.markdown import MAX_HTML_BYTES
from jobledger.api.processes.markdown_previewer import MarkdownPreviewer
from tests.api.conftest import Api
from tests.api.dashboard.conftest import build_page_url

MAX_PAGE_BYTES = 2_000_000
TEMPLATES = Path(rendering.__file__).parent / "templates"
TIME = "2026-01-01T00:00:00.000Z"
NOW = datetime(2026, 1, 2, tzinfo=UTC)
TEXTS = {"markup": "<", "quotes": "'", "beyond 16 bits": "\U0001f986", "words": "x "}


def make_job(text: str) -> dict[str, Any]:
    """Return a job with more in each field than a view stores."""
    files = [{"path": f"{text[:1000]}/{place}-thumb.jpg", "size": 1, "media_type": text} for place in range(2000)]
    logs = [{"timestamp": TIME, "level": "info", "message": text * 10}] * 1000
    return {
        "job_id": "job-0",
        "job_name": None,
        "job_type": "echo",
        "status": "processing",
        "parameters": {"session": text * 20, "track": text * 20, "more": text * 100},
        "progress": {"percent": 1.0, "message": text * 2},
        "attempt": 1,
        "max_attempts": 3,
        "user_id": text,
        "worker_id": text,
        "batch_id": text,
        "created_at": TIME,
        "updated_at": TIME,
        "error": {"code": text, "message": text * 10},
        "logs": logs,
        "results": {
            "metadata": {"warnings": [text] * 1000, "tokens_used": 1},
            "files": files,
            "assets": [{**file, "url": f"/api/events/files/{file['path']}"} for file in files],
        },
    }


def make_events(text: str) -> list[dict[str, Any]]:
    """Return more events than a page gets, each larger than a page."""
    data = {"attempt": 1, "worker_id": text, "step": text, "duration_s": 1, "output": text * 100, "message": text}
    types = ["JobSubmitted", "JobClaimed", *["StepCompleted"] * 1000, "JobReleased"]
    return [
        {"position": place, "time": TIME, "type": type_, "stream": text, "meta": {"actor": text}, "data": data}
        for place, type_ in enumerate(types)
    ]


def make_batch(text: str, number: int = 0) -> dict[str, Any]:
    counts = {
        f"{status}_jobs": 2000 for status in ("pending", "processing", "completed", "failed", "cancelled", "total")
    }
    return {
        "batch_id": f"batch-{number:024}",
        "batch_name": text,
        "status": "processing",
        "user_id": text,
        "created_at": TIME,
        "eta_minutes": 1,
        "summary": {"duration": 1.0, "tokens_used": 1},
        **counts,
    }


def make_context(template: str, text: str) -> dict[str, Any]:
    """Return variables for a template, all larger than the API returns."""
    first = make_job(text)
    jobs = [{**first, "job_id": f"job-{number:024}"} for number in range(200)]
    result_page = {"jobs": jobs, "batches": [make_batch(text, number) for number in range(1000)], "total": 1000}
    filters, events = dict.fromkeys(("q", "status", "track", "stream", "types"), text), make_events(text)
    match template:
        case "job.html.j2":
            deliveries = [
                {"delivery_id": text, "status": "pending", "url": text, "attempts": [{"error": {"code": text}}] * 50}
            ] * 20
            variables = {
                "job": jobs[0],
                "attempts": build_attempt_timeline(events, NOW),
                "slides": jobs[0]["results"]["assets"],
            }
            preview = Markup("x" * MAX_HTML_BYTES)
            return {
                **variables,
                "events": events,
                "deliveries": deliveries,
                "preview": preview,
                "can_write": True,
                "has_more_events": True,
            }
        case "batch.html.j2":
            return {"batch": make_batch(text), "result_page": result_page, "events": events, "can_write": True}
        case "overview.html.j2":
            workers = [{"worker_id": f"{number}{text}", "host": text, "problem": text * 10} for number in range(100)]
            stats = {
                "jobs": {},
                "workers": workers,
                "tracks": [{"_id": f"{number}{text}", "count": 1} for number in range(10_000)],
            }
            bars = charts.stack_bars([[("completed", 1)]] * 60)
            by_worker = {workers[0]["worker_id"]: jobs}
            return {
                "stats": stats,
                "active_batches": result_page["batches"],
                "jobs_by_worker": by_worker,
                "throughput_chart": bars,
                "run_time_chart": bars,
                "oldest_pending_job": jobs[0],
            }
        case _:
            return {
                "filters": filters,
                "result_page": result_page,
                "events": events,
                "job_types": [text] * 1000,
                "message": text * 100,
            }


PAGES = sorted(file.name for file in TEMPLATES.glob("*.j2") if file.name not in ("base.html.j2", "macros.html.j2"))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("template", PAGES)
def test_page_with_more_than_maximal_content_stays_small(template: str, text: str) -> None:
    scope = {"type": "http", "path": "/monitoring/events/jobs/x", "query_string": b"", "headers": []}
    content = make_context(template, TEXTS[text] * 10_000)
    start = time.thread_time()
    body = rendering.render_page(Request(scope), template, **content).body
    cpu_seconds = time.thread_time() - start
    assert len(body) < MAX_PAGE_BYTES
    assert bytes(body).rstrip().endswith(b"</html>")
    assert cpu_seconds < 3, "usually about 0.2"


@pytest.mark.parametrize("template", sorted(file.name for file in TEMPLATES.glob("*.j2")))
def test_template_loops_are_over_constants_or_limited_rows(template: str) -> None:
    parsed = Environment(autoescape=True).parse((TEMPLATES / template).read_text(encoding="utf-8"))
    for loop in parsed.find_all(nodes.For):
        items = loop.iter
        assert isinstance(items, nodes.Tuple) or (isinstance(items, nodes.Filter) and items.name == "limit_rows"), (
            loop.lineno
        )


async def test_truncated_page_links_to_the_full_document(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit({"file": False, "a": "<" * 7_400_000})
    await api_without_worker.get("/api/events/jobs", await api_without_worker.event_store.read_head_position())
    for path in (f"/jobs/{job_id}", "/jobs", "/log", ""):
        response = await api_without_worker.get(build_page_url(api_without_worker, path))
        assert response.status_code == 200
        assert len(response.content) < MAX_PAGE_BYTES
        assert ('id="truncation-notice"' in response.text) == (path in (f"/jobs/{job_id}", "/log"))
    response = await api_without_worker.get(build_page_url(api_without_worker, f"/jobs/{job_id}"))
    assert f'href="../../../api/events/jobs/{job_id}"' in response.text


# Previews -----------------------------------------------------------------------------------------------------------

FOLDER = "../files/"
MAX_BYTES = MAX_MARKDOWN_BYTES
HOSTILE = {
    "unclosed images": "![" * (MAX_BYTES // 2),
    "unclosed links": "[" * MAX_BYTES,
    "nested links": "[" * (MAX_BYTES // 8) + "a" + "](b)" * (MAX_BYTES // 8),
    "a wide table with short rows": "|".join("a" * 500) + "\n" + "|".join("-" * 500) + "\n" + "x\n" * 4250,
    "nested quotes": ">" * MAX_BYTES,
    "nested lists": "\n".join(" " * (2 * depth) + "- a" for depth in range(500)),
    "emphasis": "*a_" * (MAX_BYTES // 3),
    "backticks": "".join("`" * number + " " for number in range(700)),
    "references": "[a]: /b\n" * (MAX_BYTES // 16) + "[a]" * (MAX_BYTES // 8),
    "entities": "&quot;" * (MAX_BYTES // 6),
    "unclosed front matter": "---\n" * (MAX_BYTES // 4),
}


@pytest.mark.parametrize("markdown", HOSTILE)
async def test_preview_of_hostile_markdown_leaves_event_loop_free(markdown: str) -> None:
    previews = MarkdownPreviewer(timeout_seconds=1)
    try:
        start = time.thread_time()
        html = await previews.render("digest", HOSTILE[markdown], files_url=FOLDER)
        cached = await previews.render("digest", HOSTILE[markdown], files_url=FOLDER)
        cpu_seconds = time.thread_time() - start
        assert html is None or len(html.encode()) <= MAX_HTML_BYTES
        assert cached is html, "the result is cached"
        assert cpu_seconds < 0.5, "of the thread with the event loop"
    finally:
        await previews.close()


async def test_preview_shows_images_from_result_folder() -> None:
    previews = MarkdownPreviewer(timeout_seconds=60)
    try:
        html = await previews.render("digest", "---\na: 1\n---\n*fine* ![](a.png)", files_url=FOLDER)
        assert html == f'<p><em>fine</em> <img src="{FOLDER}a.png" alt="" loading="lazy" /></p>\n'
    finally:
        await previews.close()


async def test_job_page_shows_text_if_result_is_too_large_for_preview(api: Api) -> None:
    ids = [await api.submit({"text": text}) for text in ("![" * 100_000, "x" * MAX_BYTES, "fine")]
    pages = []
    for job_id in ids:
        await api.wait_until_finished(job_id)
        pages.append((await api.get(build_page_url(api, f"/jobs/{job_id}"))).text)
    assert ['<article class="preview" id="preview"><pre' in page for page in pages] == [False, True, False]
    assert "<code" in pages[2]
