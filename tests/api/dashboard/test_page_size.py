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
from jobledger.api.dashboard.markdown import MAX_HTML_BYTES
from jobledger.api.dashboard.markdown_preview import MAX_MARKDOWN_BYTES, MarkdownPreviewer
from tests.api.conftest import Api
from tests.api.dashboard.test_pages import at

LARGEST_PAGE_BYTES = 2_000_000
TEMPLATES = Path(rendering.__file__).parent / "templates"
TIME = "2026-01-01T00:00:00.000Z"
NOW = datetime(2026, 1, 2, tzinfo=UTC)
TEXTS = {"markup": "<", "quotes": "'", "beyond 16 bits": "\U0001f986", "words": "x "}


def job(text: str) -> dict[str, Any]:
    """A job with more in each field than a view keeps."""
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


def events(text: str) -> list[dict[str, Any]]:
    """More events than a page is given, each with more than fits into a page."""
    data = {"attempt": 1, "worker_id": text, "step": text, "duration_s": 1, "output": text * 100, "message": text}
    types = ["JobSubmitted", "JobClaimed", *["StepCompleted"] * 1000, "JobReleased"]
    return [
        {"position": place, "time": TIME, "type": it, "stream": text, "meta": {"actor": text}, "data": data}
        for place, it in enumerate(types)
    ]


def batch(text: str, number: int = 0) -> dict[str, Any]:
    counts = {f"{it}_jobs": 2000 for it in ("pending", "processing", "completed", "failed", "cancelled", "total")}
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


def content_of(template: str, text: str) -> dict[str, Any]:
    """What a page is given: much of everything."""
    one = job(text)
    jobs = [{**one, "job_id": f"job-{number:024}"} for number in range(200)]
    found = {"jobs": jobs, "batches": [batch(text, number) for number in range(1000)], "total": 1000}
    filters, told = dict.fromkeys(("q", "status", "track", "stream", "types"), text), events(text)
    permissions = {"write": True}
    match template:
        case "job.html.j2":
            deliveries = [
                {"delivery_id": text, "status": "pending", "url": text, "attempts": [{"error": {"code": text}}] * 50}
            ] * 20
            shown = {
                "job": jobs[0],
                "attempts": build_attempt_timeline(told, NOW),
                "slides": jobs[0]["results"]["assets"],
            }
            preview = Markup("x" * MAX_HTML_BYTES)
            return {
                **shown,
                "events": told,
                "deliveries": deliveries,
                "preview": preview,
                "permissions": permissions,
                "has_more_events": True,
            }
        case "batch.html.j2":
            return {"batch": batch(text), "result_page": found, "events": told, "permissions": permissions}
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
                "active_batches": found["batches"],
                "jobs_by_worker": by_worker,
                "throughput_chart": bars,
                "run_time_chart": bars,
                "oldest_pending_job": jobs[0],
            }
        case _:
            return {
                "filters": filters,
                "result_page": found,
                "events": told,
                "job_types": [text] * 1000,
                "message": text * 100,
            }


PAGES = sorted(it.name for it in TEMPLATES.glob("*.j2") if it.name not in ("base.html.j2", "macros.html.j2"))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("template", PAGES)
def test_page_with_more_than_maximal_content_stays_small(template: str, text: str) -> None:
    scope = {"type": "http", "path": "/monitoring/events/jobs/x", "query_string": b"", "headers": []}
    content = content_of(template, TEXTS[text] * 10_000)
    begun = time.thread_time()
    body = rendering.render_page(Request(scope), template, **content).body
    used = time.thread_time() - begun
    assert len(body) < LARGEST_PAGE_BYTES
    assert bytes(body).rstrip().endswith(b"</html>")
    assert used < 3, "CPU seconds: it takes about 0.2"


@pytest.mark.parametrize("template", sorted(it.name for it in TEMPLATES.glob("*.j2")))
def test_loops_of_templates_are_over_constants_or_end_with_the_budget(template: str) -> None:
    parsed = Environment(autoescape=True).parse((TEMPLATES / template).read_text(encoding="utf-8"))
    for loop in parsed.find_all(nodes.For):
        over = loop.iter
        assert isinstance(over, nodes.Tuple) or (isinstance(over, nodes.Filter) and over.name == "limit_rows"), (
            loop.lineno
        )


async def test_page_that_shows_only_the_beginning_says_where_the_rest_is(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit({"file": False, "a": "<" * 7_400_000})
    await api_without_worker.get("/api/events/jobs", await api_without_worker.event_store.head_position())
    for path in (f"/jobs/{job_id}", "/jobs", "/log", ""):
        answer = await api_without_worker.get(at(api_without_worker, path))
        assert answer.status_code == 200
        assert len(answer.content) < LARGEST_PAGE_BYTES
        assert ('id="truncation-notice"' in answer.text) == (path in (f"/jobs/{job_id}", "/log"))
    answer = await api_without_worker.get(at(api_without_worker, f"/jobs/{job_id}"))
    assert f'href="../../../api/events/jobs/{job_id}"' in answer.text


# Previews ---------------------------------------------------------------------------------------------------------

FOLDER = "../files/"
LARGEST = MAX_MARKDOWN_BYTES
HOSTILE = {
    "images without an end": "![" * (LARGEST // 2),
    "links without an end": "[" * LARGEST,
    "nested links": "[" * (LARGEST // 8) + "a" + "](b)" * (LARGEST // 8),
    "a wide table with short rows": "|".join("a" * 500) + "\n" + "|".join("-" * 500) + "\n" + "x\n" * 4250,
    "nested quotes": ">" * LARGEST,
    "nested lists": "\n".join(" " * (2 * depth) + "- a" for depth in range(500)),
    "emphasis": "*a_" * (LARGEST // 3),
    "backticks": "".join("`" * number + " " for number in range(700)),
    "references": "[a]: /b\n" * (LARGEST // 16) + "[a]" * (LARGEST // 8),
    "entities": "&quot;" * (LARGEST // 6),
    "front matter without an end": "---\n" * (LARGEST // 4),
}


@pytest.mark.parametrize("markdown", HOSTILE)
async def test_preview_of_hostile_markdown_leaves_event_loop_free(markdown: str) -> None:
    previews = MarkdownPreviewer(timeout_seconds=1)
    try:
        begun = time.thread_time()
        html = await previews.render("digest", HOSTILE[markdown], files_url=FOLDER)
        again = await previews.render("digest", HOSTILE[markdown], files_url=FOLDER)
        used = time.thread_time() - begun
        assert html is None or len(html.encode()) <= MAX_HTML_BYTES
        assert again is html, "the outcome is kept"
        assert used < 0.5, "CPU seconds of the thread with the event loop"
    finally:
        await previews.close()


async def test_preview_shows_images_from_the_folder_of_the_result() -> None:
    previews = MarkdownPreviewer(timeout_seconds=60)
    try:
        html = await previews.render("digest", "---\na: 1\n---\n*fine* ![](a.png)", files_url=FOLDER)
        assert html == f'<p><em>fine</em> <img src="{FOLDER}a.png" alt="" loading="lazy" /></p>\n'
    finally:
        await previews.close()


async def test_job_page_shows_text_where_the_result_is_too_large_for_a_preview(api: Api) -> None:
    ids = [await api.submit({"text": text}) for text in ("![" * 100_000, "x" * LARGEST, "fine")]
    pages = []
    for job_id in ids:
        await api.wait_until_finished(job_id)
        pages.append((await api.get(at(api, f"/jobs/{job_id}"))).text)
    assert ['<article class="preview" id="preview"><pre' in page for page in pages] == [False, True, False]
    assert "<code" in pages[2]
