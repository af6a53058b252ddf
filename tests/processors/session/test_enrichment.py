"""Summary and translation by a language model: requests, accepted responses, and prompt injection by pages."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobledger.workers.processor import Results
from jobledger.workers.processors.session import SessionProcessor, SessionSettings, enrichment_step
from jobledger.workers.processors.session.document import SlidesResult, TranscriptResult
from jobledger.workers.processors.session.enrichment import parse_summary, parse_translation
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.markdown_sections import join_sections, split_markdown
from jobledger.workers.processors.session.model_output import InvalidModelOutput
from jobledger.workers.processors.session.result_layout import build_layout
from jobledger.workers.processors.session.step_context import StepContext
from jobledger.workers.processors.session.transcript import Segment
from tests.processors.session.fake_translation import SUMMARIES, answer_correctly, is_summary_request, translate
from tests.processors.session.fixtures import (
    RecordingJob,
    Site,
    SiteResponse,
    html,
    make_page_text,
    make_parameters,
    make_pdf,
    make_settings,
    read_document,
    split_front_matter,
    without_deadline,
)
from tests.processors.session.openai_server import KEY, FakeOpenAiServer, chat_completion

SUMMARY = SUMMARIES["de"]
PAGE = """<html lang="en"><head><title>Ledgers</title></head><body><article><h1>Ledgers</h1>
<p>Ledgers are logs of what has happened. See <a href="https://example.org/ledgers">the paper</a> for more of it.</p>
<h2>Details</h2><p>They are appended to, never changed. That is all there is to say about ledgers in this talk.</p>
<pre><code>ledger = []\n\nledger.append(1)</code></pre></article></body></html>"""


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    return file


async def run(job: RecordingJob, openai_server: FakeOpenAiServer, key: Path | None, **changes: Any) -> Results:
    model = {"backend": "openai", "url": openai_server.url, "model": "m", "api_key_file": key, **changes}
    return await SessionProcessor(make_settings(language_model=model)).run(job)


async def test_page_is_summarized_and_translated(
    openai_server: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    openai_server.answer_chat = answer_correctly
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    front_matter, body = split_front_matter(read_document(job, await run(job, openai_server, key)))
    assert (front_matter["language"], front_matter["intro"], front_matter["topic"]) == (
        "de",
        SUMMARY["intro"],
        "Datenbanken",
    )
    assert front_matter["subtitle"] == "Warum Logbücher"
    assert front_matter["tags"][-1] == "Log"
    assert "Logbuch" in body
    assert "https://example.org/ledgers" in body
    assert "ledger.append(1)" in body
    assert job.tokens == 107
    assert not [warning for warning in job.warnings if "translated" in warning or "summary" in warning]
    first = openai_server.requests[0]
    assert first["response_format"]["json_schema"]["strict"] is True
    assert KEY not in json.dumps(openai_server.requests) + "".join(job.log_messages)


async def test_other_target_language_runs_only_enrich_and_markdown(
    openai_server: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    openai_server.answer_chat = answer_correctly
    url = site.put("/t", html(PAGE))
    first = RecordingJob(make_parameters(url=url, target_language="de"), tmp_path)
    await run(first, openai_server, key)
    second = RecordingJob(make_parameters(url=url, target_language="fr"), tmp_path, job_id="job-2", steps=first.steps)
    await run(second, openai_server, key)
    assert second.executed_steps == ["enrich", "summarize", "translate text", "markdown"]
    third = RecordingJob(make_parameters(url=url, target_language="fr"), tmp_path, steps=second.steps)
    request_count = len(openai_server.requests)
    await run(third, openai_server, key)
    assert len(openai_server.requests) == request_count


async def test_text_in_target_language_is_not_translated(
    openai_server: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    openai_server.answer_chat = answer_correctly
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="en-GB"), tmp_path)
    await run(job, openai_server, key)
    assert len(openai_server.requests) == 1


async def test_unusable_response_is_requested_again_with_the_error(
    openai_server: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    def answer_wrongly_at_first(request: dict[str, Any]) -> Any:
        return answer_correctly(request) if len(request["messages"]) == 4 else chat_completion("Certainly! Here it is.")

    openai_server.answer_chat = answer_wrongly_at_first
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    front_matter, body = split_front_matter(read_document(job, await run(job, openai_server, key)))
    assert (front_matter["language"], front_matter["intro"]) == ("de", SUMMARY["intro"])
    assert "Logbuch" in body
    assert "there is no JSON object" in openai_server.requests[1]["messages"][3]["content"]


@pytest.mark.parametrize(
    "response",
    [
        "no JSON",
        {"markdown": "", "intro": ""},
        {"error": "I cannot do that"},
        {"markdown": "Alles ganz anders, ohne Link und Code."},
        {"markdown": "[the paper](https://evil.example/)"},
        {"markdown": 7},
        "{" * 1000,
    ],
    ids=str,
)
async def test_unusable_responses_leave_text_unchanged_with_warning(
    openai_server: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path, response: Any
) -> None:
    openai_server.answer_chat = lambda request: chat_completion(response)
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    front_matter, body = split_front_matter(read_document(job, await run(job, openai_server, key)))
    assert front_matter["language"] == "en"
    assert "Ledgers are logs" in body
    assert "evil" not in body + str(front_matter)
    assert any("not translated" in warning for warning in job.warnings)
    assert any("no summary" in warning for warning in job.warnings)


async def test_one_unusable_chunk_stays_and_others_are_translated(
    openai_server: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    paragraphs = "".join(f"<p>Ledgers number {n} are long. {'words ' * 60}</p>" for n in range(8))

    def answer_one_chunk_wrongly(request: dict[str, Any]) -> Any:
        return chat_completion("no") if "number 3" in request["messages"][1]["content"] else answer_correctly(request)

    openai_server.answer_chat = answer_one_chunk_wrongly
    page = f"<html lang='en'><body><article><h1>Ledgers</h1>{paragraphs}</article></body></html>"
    job = RecordingJob(make_parameters(url=site.put("/t", html(page)), target_language="de"), tmp_path)
    _, body = split_front_matter(read_document(job, await run(job, openai_server, key, chunk_characters=500)))
    assert "Ledgers number 3" in body
    assert not re.search("Ledgers number 2", body)
    assert any(re.search(r"1 of \d+ parts", warning) for warning in job.warnings)


async def test_prompt_injection_gives_no_html_links_or_images(
    openai_server: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    def obey_page(request: dict[str, Any]) -> Any:
        injection = "<script>alert(1)</script> ![x](https://evil.example/x.png) [y](javascript:alert(1))"
        if is_summary_request(request):
            return chat_completion({**SUMMARY, "intro": injection, "tags": ["a: b\n- c"]})
        return chat_completion(
            {"markdown": f"{translate(request['messages'][1]['content'])}\n\n{injection}\n\n```\nopen fence"}
        )

    openai_server.answer_chat = obey_page
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    front_matter, body = split_front_matter(read_document(job, await run(job, openai_server, key)))
    assert front_matter["tags"][-1] == "a: b\n- c"
    assert "<script>" not in body
    assert "evil" not in body


async def test_busy_api_is_retried_and_failing_api_is_a_warning(
    openai_server: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    url = site.put("/t", html(PAGE))
    openai_server.answer_chat = answer_correctly
    openai_server.scripted_failures = [
        (429, {"Retry-After": "0"}),
        (503, {"Retry-After": "0"}),
        (500, {"Retry-After": "0"}),
    ]
    job = RecordingJob(make_parameters(url=url, target_language="de"), tmp_path)
    front_matter, _ = split_front_matter(read_document(job, await run(job, openai_server, key)))
    assert front_matter["language"] == "de"
    for failures, reason in (
        ([(500, {"Retry-After": "0"})] * 4, "500: busy"),
        ([(404, {})], "404: busy"),
        ([(429, {"Retry-After": "3600"})], "429: busy"),
    ):
        openai_server.scripted_failures = list(failures)
        job = RecordingJob(make_parameters(url=url, target_language="de"), tmp_path)
        _, body = split_front_matter(read_document(job, await run(job, openai_server, key)))
        assert "Ledgers are logs" in body
        assert any(reason in warning for warning in job.warnings), job.warnings
        assert not openai_server.scripted_failures


def replace_text(file: Path, text: str) -> None:
    file.write_text(text)


def read_everything(job: RecordingJob, results: Results) -> str:
    files = [content.decode(errors="replace") for content in job.files.values()]
    outputs = [json.dumps(output) for output, _ in job.steps.values()]
    return "\n".join([*files, *outputs, *job.warnings, *job.log_messages, results.model_dump_json()])


@pytest.mark.parametrize("rejection", ["Incorrect API key provided", "x" * 180, "x" * 150])
async def test_key_that_an_api_echoes_in_its_error_is_not_published(
    openai_server: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path, rejection: str
) -> None:
    openai_server.rejection = rejection
    wrong_key = "sk-wrong-0123456789abcdefghijklmnopqrstuvwxyz"
    replace_text(key, wrong_key)
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    published = read_everything(job, await run(job, openai_server, key))
    assert "status 401" in published
    assert wrong_key[:8] not in published


async def test_key_that_an_api_echoes_in_its_answer_is_not_published(
    openai_server: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    openai_server.answer_chat = lambda request: json.loads(
        json.dumps(answer_correctly(request)).replace("Logbuch", f"Logbuch {KEY}")
    )
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    published = read_everything(job, await run(job, openai_server, key))
    assert "API key" in published
    assert KEY not in published


async def test_progress_does_not_fall_after_the_slides(
    openai_server: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    openai_server.answer_chat = answer_correctly
    slides_url = site.put("/slides.pdf", SiteResponse(make_pdf(3), headers={"Content-Type": "application/pdf"}))
    url = site.put("/t", html(PAGE))
    job = RecordingJob(make_parameters(url=url, attachments_url=slides_url, target_language="de"), tmp_path)
    await run(job, openai_server, key)
    percents = [percent for percent, _ in job.progress]
    assert percents == sorted(percents)
    assert any("Translat" in message for _, message in job.progress)


async def test_deeply_nested_answer_is_a_warning(
    openai_server: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    openai_server.answer_chat = lambda request: b'{"x":' + b"[" * 900 + b"]" * 900 + b"}"
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    await run(job, openai_server, key)
    assert any("nested too deeply" in warning for warning in job.warnings)


async def test_invalid_api_key_is_a_warning_without_the_key(
    openai_server: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    url = site.put("/t", html(PAGE))
    for key_file, text, reason in (
        (None, "", "401: Incorrect"),
        (key, "sk-wrong", "401"),
        (key, "", "contains no valid key"),
    ):
        if key_file is not None:
            replace_text(key_file, text)
        job = RecordingJob(make_parameters(url=url, target_language="de"), tmp_path)
        split_front_matter(read_document(job, await run(job, openai_server, key_file)))
        [warning] = [warning for warning in job.warnings if "language model" in warning]
        assert reason in warning
        assert "sk-wrong" not in warning


async def test_hanging_api_ends_with_enrich_timeout(
    openai_server: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    openai_server.scripted_failures = ["hang"] * 9
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    model = {"backend": "openai", "url": openai_server.url, "model": "m", "api_key_file": key}
    async with asyncio.timeout(60):
        await SessionProcessor(make_settings(language_model=model, enrich_timeout_seconds=0.5)).run(job)
    assert any("did not finish within 0.5 seconds" in warning for warning in job.warnings)


async def test_server_without_schemas_is_called_without_response_format(
    openai_server: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    openai_server.answer_chat, openai_server.supports_schemas = answer_correctly, False
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    front_matter, _ = split_front_matter(read_document(job, await run(job, openai_server, key)))
    assert front_matter["language"] == "de"
    assert all("response_format" not in request for request in openai_server.requests)


async def test_missing_language_model_is_a_warning_in_document(site: Site, tmp_path: Path) -> None:
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    front_matter, body = split_front_matter(read_document(job, await SessionProcessor(make_settings()).run(job)))
    assert front_matter["language"] == "en"
    [warning] = [warning for warning in job.warnings if "translated" in warning]
    assert "No language model is configured" in warning
    assert warning.split(":")[0] in body


async def test_long_transcript_without_language_model_gives_no_warning_about_page(tmp_path: Path) -> None:
    parameters = make_parameters(source_language="en", target_language="de")
    settings = make_settings()
    layout = build_layout(event="E", track="T", session="S", filename="s.md", job_id="job-1")
    ctx = StepContext(RecordingJob(parameters, tmp_path), parameters, settings, layout, Fetcher(settings))
    page = make_page_text(language="de", markdown="Der Text der Seite.")
    spoken = TranscriptResult(segments=[Segment(start_seconds=0, text="word " * 60_000)])
    await enrichment_step.run(ctx, page, spoken, SlidesResult())
    assert ctx.warnings == []


def test_inconsistent_api_settings_are_rejected() -> None:
    for section in ("language_model", "transcription"):
        for settings in ({"backend": "openai"}, {"backend": "openai", "url": "ftp://x", "model": "m"}):
            with pytest.raises(ValidationError):
                SessionSettings.model_validate({section: settings})


# Parsing ----------------------------------------------------------------------------------------------------------


def test_parse_summary_finds_json_in_surrounding_text() -> None:
    text = json.dumps(SUMMARY)
    for response in (text, f"```json\n{text}\n```", f"Here you are: {text} Anything else?"):
        assert parse_summary(response).intro == SUMMARY["intro"]


def test_parse_translation_rejects_changed_links_or_code() -> None:
    original = "See [a](https://a.example/) and `x`.\n\n```\ncode\n```"
    assert parse_translation(json.dumps({"markdown": original.replace("See", "Siehe")}), original)
    for translation in (
        original.replace("a.example", "b.example"),
        original.replace("`x`", "`y`"),
        original.replace("code", "Kode"),
    ):
        with pytest.raises(InvalidModelOutput):
            parse_translation(json.dumps({"markdown": translation}), original)


@without_deadline
@given(
    blocks=st.lists(
        st.sampled_from(
            [
                "a paragraph " * 20,
                "- one\n\n- two\n\n  three",
                "```\nx\n\ny\n```",
                "| a | b |\n|---|---|\n| 1 | 2 |",
                "## h",
            ]
        ),
        min_size=1,
        max_size=20,
    ),
    size=st.integers(500, 1000),
)
def test_split_markdown_keeps_all_text_and_whole_blocks(blocks: list[str], size: int) -> None:
    text = "\n\n".join(blocks)
    sections = split_markdown(text, size)
    assert join_sections(sections, [section.text for section in sections]).split() == text.split()
    assert all(section.text.count("```") % 2 == 0 for section in sections)
    assert all(len(section.text) <= size for section in sections)
