"""What a restart of a session job repeats: steps with a warning whose cause may be gone, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobledger.workers.processors.session import SessionProcessor
from tests.processors.session.fixtures import (
    RecordingJob,
    Site,
    SiteResponse,
    html,
    make_parameters,
    make_pdf,
    make_settings,
    redirect,
)
from tests.processors.session.openai_server import KEY, FakeOpenAiServer, chat_completion

PDF = {"Content-Type": "application/pdf"}


async def run_and_restart(
    tmp_path: Path, settings: dict[str, Any], change: Callable[[], object], **urls: str
) -> tuple[RecordingJob, RecordingJob]:
    """Run a job, change something, and run the job again with the steps that a restart keeps."""
    first = RecordingJob(make_parameters(**urls), tmp_path / "1")
    first.scratch_dir.mkdir()
    await SessionProcessor(make_settings(**settings)).run(first)
    change()
    steps = first.get_steps_after_restart()
    second = RecordingJob(first.parameters, tmp_path / "2", attempt=2, steps=steps)
    second.scratch_dir.mkdir()
    await SessionProcessor(make_settings(**settings)).run(second)
    return first, second


async def test_restart_after_wrong_key_repeats_only_enrichment(
    site: Site, page_url: str, openai_server: FakeOpenAiServer, tmp_path: Path
) -> None:
    slides_url = site.put("/slides.pdf", SiteResponse(make_pdf(1), headers=PDF))
    openai_server.answer_chat = lambda request: chat_completion(
        {"subtitle": "S", "intro": "A talk.", "topic": "Logs", "tags": ["logs"]}
    )
    key_file = tmp_path / "key"
    key_file.write_text("sk-wrong")
    model = {"backend": "openai", "url": openai_server.url, "model": "m", "api_key_file": key_file}
    first, second = await run_and_restart(
        tmp_path,
        {"language_model": model},
        lambda: key_file.write_text(KEY),
        url=page_url,
        attachments_url=slides_url,
    )
    assert "Incorrect API key provided" in first.warnings[0]
    assert second.executed_steps == ["enrich", "summarize", "markdown"]
    assert second.warnings == []
    assert site.requested_paths == ["/2025/talks/ledgers/", "/slides.pdf"]


@pytest.mark.parametrize(
    "response",
    [
        SiteResponse(status=404),
        SiteResponse(status=403),
        SiteResponse(status=503),
        SiteResponse(b"%PDF-", content_length=1000),
        SiteResponse(b"<p>Sign in</p>", headers={"Content-Type": "text/html"}),
        redirect("http://10.0.0.1/"),
        redirect("/slides"),
    ],
)
async def test_restart_repeats_slides_that_could_not_be_fetched(
    response: SiteResponse, site: Site, page_url: str, tmp_path: Path
) -> None:
    slides_url = site.put("/slides", response)
    first, second = await run_and_restart(
        tmp_path,
        {},
        lambda: site.put("/slides", SiteResponse(make_pdf(2), headers=PDF)),
        url=page_url,
        attachments_url=slides_url,
    )
    assert len(first.warnings) == 1
    assert second.executed_steps == ["slides", "markdown"]
    assert second.warnings == []


@pytest.mark.parametrize(
    ("response", "warning"),
    [
        (SiteResponse(make_pdf(1, password="secret"), headers=PDF), "password"),
        (SiteResponse(make_pdf(3), headers=PDF), "Only the first 2 of 3"),
        (SiteResponse(b"%PDF-", content_length=10**12), "is larger than"),
        (SiteResponse(b"PK", headers={"Content-Type": "application/zip"}), "It is not a PDF (application/zip)"),
    ],
)
async def test_restart_keeps_slides_that_would_be_the_same(
    response: SiteResponse, warning: str, site: Site, page_url: str, tmp_path: Path
) -> None:
    slides_url = site.put("/slides", response)
    first, second = await run_and_restart(
        tmp_path,
        {"max_pdf_pages": 2},
        lambda: site.put("/slides", html("not read")),
        url=page_url,
        attachments_url=slides_url,
    )
    assert len(first.warnings) == 1
    assert warning in first.warnings[0]
    assert second.executed_steps == []
    assert second.warnings == first.warnings
