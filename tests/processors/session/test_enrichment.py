"""Summary and translation by a language model: what is asked, what is accepted, and what a page cannot do."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobledger.workers.processor import Results
from jobledger.workers.processors.session import SessionProcessor, SessionSettings
from jobledger.workers.processors.session.enrichment import (
    InvalidModelOutput,
    parse_summary,
    parse_translation,
    split_markdown,
)
from tests.processors.session.fixtures import RecordingJob, Site, html, make_parameters, make_settings, without_deadline
from tests.processors.session.openai_server import KEY, FakeOpenAiServer, chat_completion, run_fake_openai

SUMMARY = {
    "subtitle": "Warum Logbücher",
    "intro": "Ein Vortrag über Logbücher.",
    "topic": "Datenbanken",
    "tags": ["Log"],
}
PAGE = """<html lang="en"><head><title>Ledgers</title></head><body><article><h1>Ledgers</h1>
<p>Ledgers are logs of what has happened. See <a href="https://example.org/ledgers">the paper</a> for more of it.</p>
<h2>Details</h2><p>They are appended to, never changed. That is all there is to say about ledgers in this talk.</p>
<pre><code>ledger = []\n\nledger.append(1)</code></pre></article></body></html>"""


@pytest.fixture
def api() -> Iterator[FakeOpenAiServer]:
    with run_fake_openai() as found:
        yield found


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    return file


def translated(text: str) -> str:
    """What a faithful model does: words change; addresses and code stay."""
    kept = r"(https?://\S+|```.*?```|`[^`]*`)"
    parts = re.split(kept, text, flags=re.DOTALL)
    return "".join(
        part if index % 2 else part.replace("ledger", "Logbuch").replace("Ledger", "Logbuch")
        for index, part in enumerate(parts)
    )


def faithful(asked: dict[str, Any]) -> Any:
    if "summarise" in asked["messages"][0]["content"]:
        return chat_completion(SUMMARY, tokens=100)
    return chat_completion({"markdown": translated(asked["messages"][1]["content"])}, tokens=7)


async def run(job: RecordingJob, api: FakeOpenAiServer, key: Path | None, **model: Any) -> Results:
    chosen = {"backend": "openai", "url": api.url, "model": "m", "api_key_file": key, "timeout_seconds": 5, **model}
    return await SessionProcessor(make_settings(language_model=chosen)).run(job)


def document(job: RecordingJob, results: Results) -> tuple[dict[str, Any], str]:
    assert results.markdown is not None
    text = job.files[results.markdown.path].decode()
    found = re.fullmatch(r"---\n(.*?\n)---\n(.*)", text, re.DOTALL)
    assert found
    return yaml.safe_load(found[1]), found[2]


async def test_a_page_is_summarised_and_translated(
    api: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    api.answer_chat = faithful
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    front, body = document(job, await run(job, api, key))
    assert (front["language"], front["intro"], front["topic"]) == ("de", SUMMARY["intro"], "Datenbanken")
    assert front["subtitle"] == "Warum Logbücher"
    assert front["tags"][-1] == "Log"
    assert "Logbuchs are logs" in body
    assert "https://example.org/ledgers" in body
    assert "ledger.append(1)" in body
    assert job.tokens == 107
    assert not [it for it in job.warnings if "translated" in it or "summary" in it]
    first = api.requests[0]
    assert first["response_format"]["json_schema"]["strict"] is True
    assert KEY not in json.dumps(api.requests) + "".join(job.lines)


async def test_the_same_in_another_language_only_composes_anew(
    api: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    api.answer_chat = faithful
    url = site.put("/t", html(PAGE))
    first = RecordingJob(make_parameters(url=url, target_language="de"), tmp_path)
    await run(first, api, key)
    second = RecordingJob(make_parameters(url=url, target_language="fr"), tmp_path, job_id="job-2", steps=first.steps)
    await run(second, api, key)
    assert second.ran == ["enrich", "markdown"]
    third = RecordingJob(make_parameters(url=url, target_language="fr"), tmp_path, steps=second.steps)
    asked = len(api.requests)
    await run(third, api, key)
    assert len(api.requests) == asked


async def test_a_text_in_the_language_that_is_wanted_is_not_translated(
    api: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    api.answer_chat = faithful
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="en-GB"), tmp_path)
    await run(job, api, key)
    assert len(api.requests) == 1


async def test_an_unusable_answer_is_asked_for_once_more_with_what_was_wrong(
    api: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    def at_first_wrong(asked: dict[str, Any]) -> Any:
        return faithful(asked) if len(asked["messages"]) == 4 else chat_completion("Certainly! Here it is.")

    api.answer_chat = at_first_wrong
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    front, body = document(job, await run(job, api, key))
    assert (front["language"], front["intro"]) == ("de", SUMMARY["intro"])
    assert "Logbuch" in body
    assert "there is no JSON object" in api.requests[1]["messages"][3]["content"]


@pytest.mark.parametrize(
    "answer",
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
async def test_answers_that_stay_unusable_leave_the_text_as_it_was_with_a_warning(
    api: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path, answer: Any
) -> None:
    api.answer_chat = lambda asked: chat_completion(answer)
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    front, body = document(job, await run(job, api, key))
    assert front["language"] == "en"
    assert "Ledgers are logs" in body
    assert "evil" not in body + str(front)
    assert any("not translated" in it for it in job.warnings)
    assert any("no summary" in it for it in job.warnings)


async def test_one_bad_piece_is_left_and_the_others_are_translated(
    api: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    paragraphs = "".join(f"<p>Ledgers number {n} are long. {'words ' * 60}</p>" for n in range(8))

    def one_bad(asked: dict[str, Any]) -> Any:
        return chat_completion("no") if "number 3" in asked["messages"][1]["content"] else faithful(asked)

    api.answer_chat = one_bad
    page = f"<html lang='en'><body><article><h1>Ledgers</h1>{paragraphs}</article></body></html>"
    job = RecordingJob(make_parameters(url=site.put("/t", html(page)), target_language="de"), tmp_path)
    _, body = document(job, await run(job, api, key, chunk_characters=500))
    assert "Ledgers number 3" in body
    assert "Logbuchs number 2" in body
    assert any(re.search(r"1 of \d+ chunks", it) for it in job.warnings)


async def test_a_page_that_gives_orders_only_spoils_itself(
    api: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    def obedient(asked: dict[str, Any]) -> Any:
        evil = "<script>alert(1)</script> ![x](https://evil.example/x.png) [y](javascript:alert(1))"
        if "summarise" in asked["messages"][0]["content"]:
            return chat_completion({**SUMMARY, "intro": evil, "tags": ["a: b\n- c"]})
        return chat_completion(
            {"markdown": f"{translated(asked['messages'][1]['content'])}\n\n{evil}\n\n```\nopen fence"}
        )

    api.answer_chat = obedient
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    front, body = document(job, await run(job, api, key))
    assert front["tags"][-1] == "a: b\n- c"
    assert "<script>" not in body
    assert "evil" not in body


async def test_busy_endpoints_are_waited_for_and_broken_ones_are_a_warning(
    api: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    url = site.put("/t", html(PAGE))
    api.answer_chat = faithful
    api.scripted_failures = [(429, {"Retry-After": "0"}), (503, {"Retry-After": "0"}), (500, {"Retry-After": "0"})]
    job = RecordingJob(make_parameters(url=url, target_language="de"), tmp_path)
    front, _ = document(job, await run(job, api, key))
    assert front["language"] == "de"
    for troubles, says in (
        ([(500, {"Retry-After": "0"})] * 4, "500: busy"),
        ([(404, {})], "404: busy"),
        ([(429, {"Retry-After": "3600"})], "429: busy"),
    ):
        api.scripted_failures = list(troubles)
        job = RecordingJob(make_parameters(url=url, target_language="de"), tmp_path)
        _, body = document(job, await run(job, api, key))
        assert "Ledgers are logs" in body
        assert any(says in it for it in job.warnings), job.warnings
        assert not api.scripted_failures


async def test_a_key_that_is_missing_or_wrong_is_told_without_it(
    api: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    url = site.put("/t", html(PAGE))
    for file, text, says in (
        (None, "", "401: Incorrect"),
        (key, "sk-wrong", "401"),
        (key, "", "contains no valid key"),
    ):
        if file is not None:
            file.write_text(text)
        job = RecordingJob(make_parameters(url=url, target_language="de"), tmp_path)
        document(job, await run(job, api, file))
        [warning] = [it for it in job.warnings if "language model" in it]
        assert says in warning
        assert "sk-wrong" not in warning


async def test_an_endpoint_that_hangs_is_given_up(api: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path) -> None:
    api.scripted_failures = ["hang"] * 9
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    begun = time.monotonic()
    chosen = {"backend": "openai", "url": api.url, "model": "m", "api_key_file": key}
    await SessionProcessor(make_settings(language_model=chosen, enrich_timeout_seconds=0.5)).run(job)
    assert time.monotonic() - begun < 5
    assert any("did not finish within 0.5 seconds" in it for it in job.warnings)


async def test_a_server_that_knows_no_schemas_is_asked_without(
    api: FakeOpenAiServer, key: Path, site: Site, tmp_path: Path
) -> None:
    api.answer_chat, api.supports_schemas = faithful, False
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    front, _ = document(job, await run(job, api, key))
    assert front["language"] == "de"
    assert all("response_format" not in it for it in api.requests)


async def test_without_a_model_the_text_stays_and_that_is_said(site: Site, tmp_path: Path) -> None:
    job = RecordingJob(make_parameters(url=site.put("/t", html(PAGE)), target_language="de"), tmp_path)
    front, body = document(job, await SessionProcessor(make_settings()).run(job))
    assert front["language"] == "en"
    [warning] = [it for it in job.warnings if "translated" in it]
    assert "No language model is configured" in warning
    assert warning.split(":")[0] in body


def test_settings_that_do_not_fit_together_are_refused() -> None:
    for section in ("language_model", "transcription"):
        for wrong in ({"backend": "openai"}, {"backend": "openai", "url": "ftp://x", "model": "m"}):
            with pytest.raises(ValidationError):
                SessionSettings.model_validate({section: wrong})


# The pure parts ---------------------------------------------------------------------------------------------------


def test_json_is_found_where_models_put_it() -> None:
    text = json.dumps(SUMMARY)
    for answer in (text, f"```json\n{text}\n```", f"Here you are: {text} Anything else?"):
        assert parse_summary(answer).intro == SUMMARY["intro"]


def test_what_has_other_links_or_code_is_not_accepted() -> None:
    original = "See [a](https://a.example/) and `x`.\n\n```\ncode\n```"
    assert parse_translation(json.dumps({"markdown": original.replace("See", "Siehe")}), original)
    for wrong in (
        original.replace("a.example", "b.example"),
        original.replace("`x`", "`y`"),
        original.replace("code", "Kode"),
    ):
        with pytest.raises(InvalidModelOutput):
            parse_translation(json.dumps({"markdown": wrong}), original)


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
def test_cut_into_pieces_nothing_is_lost_and_no_block_is_torn(blocks: list[str], size: int) -> None:
    text = "\n\n".join(blocks)
    found = split_markdown(text, size)
    assert [line for line in "\n".join(found).splitlines() if line.strip()] == [
        line for line in text.splitlines() if line.strip()
    ]
    assert all(it.count("```") % 2 == 0 for it in found)
    assert all(len(it) <= size for it in found if "\n\n" in it and "paragraph" in it)
