"""Answers of model endpoints: additions that are accepted, errors that are corrected, and failures with a warning."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobledger.workers.processors.session import enrichment_step
from jobledger.workers.processors.session.document import EnrichmentResult, SlidesResult, TranscriptResult
from jobledger.workers.processors.session.enrichment import parse_summary
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.model_output import InvalidModelOutput, find_object, find_plain_text
from jobledger.workers.processors.session.presentation_files import SlideText
from jobledger.workers.processors.session.result_layout import build_layout
from jobledger.workers.processors.session.step_context import Cancelled, StepContext
from jobledger.workers.processors.session.transcript import Chapter, Segment
from tests.processors.session.fake_translation import (
    SUMMARIES,
    answer_correctly,
    is_list_request,
    is_summary_request,
    make_answer,
    translate,
)
from tests.processors.session.fixtures import RecordingJob, make_page_text, make_parameters, make_settings
from tests.processors.session.openai_server import KEY, FakeOpenAiServer, Reply, chat_completion

TEXT = """Ledgers are logs of what has happened since 2019. See [the paper](https://example.org/ledgers) for more of it.

## Details

They are appended to, never changed. That is all there is to say about ledgers in this talk, and it is not much.

- The first item uses `ledger.append(1)` and MongoDB
- The second item is about the time of $a_1 + b$ seconds

```
ledger = []
```

### How it works

1. Write the event to the end of the file
2. Read the events in their order"""
NO_DELAY = {"Retry-After": "0"}
Request = dict[str, Any]
Respond = Callable[[Request], Any]


async def enrich(
    server: FakeOpenAiServer,
    tmp_path: Path,
    *,
    text: str = TEXT,
    job: RecordingJob | None = None,
    transcript: TranscriptResult | None = None,
    slides: SlidesResult | None = None,
    enrich_timeout_seconds: float = 60,
    parameters: dict[str, Any] | None = None,
    **model: Any,
) -> tuple[EnrichmentResult, RecordingJob]:
    """Run the step `enrich` for a page with this text."""
    key = tmp_path / "key"
    if not key.exists():
        key.write_text(KEY)
    values = make_parameters(**{"target_language": "de", **(parameters or {})})
    job = job or RecordingJob(values, tmp_path)
    model = {"backend": "openai", "url": server.url, "model": "m", "api_key_file": key, "timeout_seconds": 5} | model
    settings = make_settings(language_model=model, enrich_timeout_seconds=enrich_timeout_seconds)
    names = values.model_dump(include={"event", "track", "session", "filename"})
    ctx = StepContext(job, values, settings, build_layout(**names, job_id="job-1"), Fetcher(settings))
    inputs = make_page_text(markdown=text, title="Ledgers"), transcript or TranscriptResult(), slides or SlidesResult()

    async def run(_inputs: object) -> EnrichmentResult:
        return await enrichment_step.run(ctx, *inputs)

    return await job.step("enrich", run, enrichment_step.build_inputs(ctx, *inputs)), job


def count_translations(server: FakeOpenAiServer) -> int:
    return sum(not is_summary_request(request) for request in server.requests)


def wrap(change: Callable[[str], Any]) -> Respond:
    """Return a function that answers with changed JSON of a correct answer."""
    return lambda request: chat_completion(change(json.dumps(make_answer(request), ensure_ascii=False)))


def replace_message(build: Callable[[str], dict[str, Any]]) -> Respond:
    """Return a function that answers with another message, built from the JSON of a correct answer."""

    def respond(request: Request) -> Any:
        answer = answer_correctly(request)
        message = answer["choices"][0]["message"]
        answer["choices"][0]["message"] = {"role": "assistant", **build(message["content"])}
        return answer

    return respond


def change_markdown(change: Callable[[str], str]) -> Respond:
    """Return a function that changes a correct translation. Summaries stay."""

    def respond(request: Request) -> Any:
        answer = make_answer(request)
        return chat_completion({"markdown": change(answer["markdown"])} if "markdown" in answer else answer)

    return respond


def plain(change: Callable[[str], str]) -> Respond:
    """Return a function that answers with a text instead of JSON. Summaries stay."""

    def respond(request: Request) -> Any:
        answer = make_answer(request)
        return chat_completion(change(answer["markdown"]) if "markdown" in answer else answer)

    return respond


def stream(request: Request) -> bytes:
    content = json.dumps(make_answer(request))
    events: list[Any] = [
        {"choices": [{"index": 0, "delta": {"content": content[start : start + 7]}, "finish_reason": None}]}
        for start in range(0, len(content), 7)
    ]
    events += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": {"total_tokens": 7}}]
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return b": PROCESSING\n\n" + "".join(lines).encode() + b"data: [DONE]\n\n"


def change_response(change: Callable[[dict[str, Any]], Any]) -> Respond:
    return lambda request: change(answer_correctly(request))


def use_plain_choice(response: dict[str, Any]) -> dict[str, Any]:
    text = response["choices"][0]["message"]["content"]
    return {"choices": [{"text": text, "finish_reason": None}], "usage": None}


ACCEPTED: dict[str, Respond] = {
    "extra fields": wrap(lambda text: f'{{"language": "de", "notes": [1], {text[1:]}'),
    "thoughts": wrap(lambda text: f"<think>I should write {{'markdown': …}} here.</think>\n{text}"),
    "thoughts without opening tag": wrap(lambda text: f"The user wants German.\n</think>\n\n{text}"),
    "thoughts of Magistral": wrap(lambda text: f"[THINK]German.[/THINK]{text}"),
    "thoughts without tags": wrap(lambda text: f'I will answer with {{"markdown": "…"}}.\n\n{text}'),
    "channels": wrap(lambda text: f"<|channel|>analysis<|message|>Hm.<|end|><|channel|>final<|message|>{text}<|end|>"),
    "text around": wrap(lambda text: f"Sure! Here is the JSON:\n{text}\nAnything else?"),
    "fence": wrap(lambda text: f"```json\n{text}\n```"),
    "fence and text": wrap(lambda text: f"Here:\n\n```json\n{text}\n```\n\nDone."),
    "raw line breaks": wrap(lambda text: text.replace("\\n", "\n")),
    "raw control characters": wrap(lambda text: text.replace("\\n", "\n\x01")),
    "carriage returns": wrap(lambda text: text.replace("\\n", "\\r\\n")),
    "line breaks escaped twice": wrap(lambda text: text.replace("\\n", "\\\\n")),
    "trailing commas": wrap(lambda text: f"{text[:-1]},}}"),
    "upper-case fields": wrap(lambda text: text.replace('"markdown"', '"Markdown"').replace('"intro"', '"Intro"')),
    "other field": wrap(lambda text: text.replace('"markdown"', '"translation"')),
    "wrapped in a field": wrap(lambda text: f'{{"result": {text}}}'),
    "wrapped in a list": wrap(lambda text: f"[{text}]"),
    "JSON in a string": wrap(lambda text: json.dumps(text)),
    "JSON in JSON": wrap(lambda text: json.dumps({"answer": text})),
    "JSON in its own field": wrap(lambda text: json.dumps({"markdown" if "markdown" in text else "intro": text})),
    "byte order mark": wrap(lambda text: f"\ufeff{text}"),
    "byte order mark in the response": lambda request: b"\xef\xbb\xbf" + json.dumps(answer_correctly(request)).encode(),
    "white space before the response": lambda request: b"\n \n" * 50 + json.dumps(answer_correctly(request)).encode(),
    "stream": stream,
    "content as parts": replace_message(
        lambda text: {"content": [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]}
    ),
    "content with thoughts": replace_message(
        lambda text: {"content": [{"type": "thinking", "thinking": [{}]}, {"type": "text", "text": text}]}
    ),
    "content as an object": replace_message(lambda text: {"content": json.loads(text)}),
    "reasoning beside": replace_message(lambda text: {"content": text, "reasoning_content": "First I think."}),
    "answer as reasoning": replace_message(lambda text: {"content": None, "reasoning_content": f"Hm.\n{text}"}),
    "tool call": replace_message(
        lambda text: {"content": None, "tool_calls": [{"function": {"name": "json", "arguments": text}}]}
    ),
    "text instead of message": change_response(use_plain_choice),
    "odd token numbers": change_response(lambda response: response | {"usage": {"total_tokens": -3.5}}),
    "no finish reason": change_response(lambda response: response | {"usage": [], "id": None}),
    "terms of another form": wrap(lambda text: text.replace('"terms": [', '"terms": [null, 7, {"source": 1}, ')),
    "plain Markdown": plain(lambda text: text),
    "plain Markdown in a fence": plain(lambda text: f"````markdown\n{text}\n````"),
    "plain Markdown with remarks": plain(
        lambda text: f"Here is the translation:\n\n---\n\n{text}\n\n---\n\nLet me know if you need anything else!"
    ),
    "other white space": change_markdown(lambda text: text.replace("- ", "* ").replace("\n\n", "\n\n\n") + "\n\n"),
}


@pytest.mark.parametrize("respond", ACCEPTED.values(), ids=ACCEPTED)
async def test_harmless_addition_is_accepted_at_once(
    openai_server: FakeOpenAiServer, tmp_path: Path, respond: Respond
) -> None:
    openai_server.answer_chat = respond
    result, job = await enrich(openai_server, tmp_path)
    assert job.warnings == []
    assert result.language == "de"
    assert result.markdown.replace("* ", "- ") == translate(TEXT)
    assert result.summary
    assert (result.summary.subtitle, result.summary.topic, result.summary.tags) == (
        "Warum Logbücher",
        "Datenbanken",
        ["Log"],
    )
    assert len(openai_server.requests) == 2


def answer_in(language: str) -> Callable[[str], str]:
    return lambda text: translate(TEXT, language)


INVALID_TRANSLATIONS: dict[str, tuple[Respond, str]] = {
    "refusal": (plain(lambda text: "I'm sorry, I cannot translate this text."), "refusal"),
    "refusal in JSON": (change_markdown(lambda text: "I\u2019m sorry, but I can\u2019t help with that."), "refusal"),
    "refusal in German": (change_markdown(lambda text: "Es tut mir leid, das kann ich nicht."), "refusal"),
    "refusal in a field": (
        lambda request: (
            answer_correctly(request)
            if is_summary_request(request)
            else {"choices": [{"message": {"content": None, "refusal": "I can't assist with that."}}]}
        ),
        "refusal",
    ),
    "untranslated": (change_markdown(lambda text: TEXT), "not translated"),
    "one paragraph untranslated": (
        change_markdown(
            lambda text: "\n\n".join([*text.split("\n\n")[:2], TEXT.split("\n\n")[2], *text.split("\n\n")[3:]])
        ),
        'not translated: "They are appended',
    ),
    "wrong language": (change_markdown(answer_in("fr")), '"de", but it is "fr"'),
    "paraphrase": (change_markdown(answer_in("en")), '"de", but it is "en"'),
    "other link": (change_markdown(lambda text: text.replace("example.org", "evil.example")), "links differ"),
    "missing link": (change_markdown(lambda text: text.replace("](https://example.org/ledgers)", "]")), "links differ"),
    "further link": (change_markdown(lambda text: f"{text} https://evil.example/"), "links differ"),
    "image": (change_markdown(lambda text: f"{text} ![x](https://evil.example/x.png)"), "links differ"),
    "code": (change_markdown(lambda text: text.replace("ledger = []", "Logbuch = []")), "code differs"),
    "inline code": (change_markdown(lambda text: text.replace("`ledger.append(1)`", "`x`")), "code differs"),
    "formula": (change_markdown(lambda text: text.replace("$a_1 + b$", "$a_2 + b$")), "formulas differ"),
    "heading level": (change_markdown(lambda text: text.replace("### ", "## ")), "levels 2, 3, got 2, 2"),
    "missing heading": (change_markdown(lambda text: text.replace("### ", "")), "headings"),
    "further heading": (change_markdown(lambda text: f"# Übersetzung\n\n{text}"), "headings"),
    "missing items": (change_markdown(lambda text: text.replace("\n2. ", " ").replace("\n- ", " ")), "list items"),
    "numbers of a list": (change_markdown(lambda text: text.replace("1. ", "5. ")), "start with the numbers"),
    "end is missing": (change_markdown(lambda text: "\n".join(text.splitlines()[:-2])), "numbered lists"),
    "too long": (
        change_markdown(lambda text: text.replace("\n\n## ", f" {translate('word ' * 600)}\n\n## ")),
        "too long",
    ),
    "too short": (change_markdown(lambda text: re.sub(r"(?<=\n\n)[^#\n`]{90,}", "Kurz.", text)), "too short"),
    "empty": (change_markdown(lambda text: ""), "empty"),
    "answer of a chat": (plain(lambda text: "Das ist ein guter Vortrag! Was möchten Sie darüber wissen?"), "links"),
    "cut JSON": (wrap(lambda text: text[:-40] if "markdown" in text else text), "no JSON object"),
    "no content": (
        lambda request: (
            answer_correctly(request)
            if is_summary_request(request)
            else {"choices": [{"message": {"role": "assistant", "content": None}}]}
        ),
        "no JSON object",
    ),
    "no choices": (
        lambda request: answer_correctly(request) if is_summary_request(request) else {"choices": []},
        "no JSON object",
    ),
}


@pytest.mark.parametrize(("respond", "reason"), INVALID_TRANSLATIONS.values(), ids=INVALID_TRANSLATIONS)
async def test_invalid_translation_is_corrected_by_the_model(
    openai_server: FakeOpenAiServer, tmp_path: Path, respond: Respond, reason: str
) -> None:
    def respond_wrongly_once(request: Request) -> Any:
        return answer_correctly(request) if count_translations(openai_server) > 1 else respond(request)

    openai_server.answer_chat = respond_wrongly_once
    result, job = await enrich(openai_server, tmp_path)
    assert (job.warnings, result.language, result.markdown) == ([], "de", translate(TEXT))
    assert count_translations(openai_server) == 2
    repair = openai_server.requests[-1]["messages"]
    if len(repair) > 2:
        assert reason in repair[-1]["content"]
    assert any(reason in message for message in job.log_messages)


@pytest.mark.parametrize(("respond", "reason"), INVALID_TRANSLATIONS.values(), ids=INVALID_TRANSLATIONS)
async def test_translation_that_stays_invalid_is_never_published(
    openai_server: FakeOpenAiServer, tmp_path: Path, respond: Respond, reason: str
) -> None:
    openai_server.answer_chat = respond
    result, job = await enrich(openai_server, tmp_path)
    assert result.markdown == TEXT
    assert result.language == "en"
    [warning] = job.warnings
    assert warning.startswith('The text was not translated from "en" to "de".')
    assert reason in warning or "levels" in warning
    assert "evil" not in warning
    assert count_translations(openai_server) <= 12


def has_word(request: Request, word: str) -> bool:
    return word in request["messages"][1]["content"]


async def test_invalid_part_is_isolated_and_named(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    paragraph = "This part of the text is about ledgers, and it has some more words to be long enough for a section."
    text = "\n\n".join(f"## Part {number}\n\n{paragraph} Number {number}." for number in range(1, 10))

    def refuse_part(request: Request) -> Any:
        if has_word(request, "Part 5") and not is_summary_request(request):
            return chat_completion({"markdown": "I cannot help with that."})
        return answer_correctly(request)

    openai_server.answer_chat = refuse_part
    result, job = await enrich(openai_server, tmp_path, text=text, chunk_characters=1000)
    assert result.language == "de"
    assert [line for line in result.markdown.splitlines() if line in text.splitlines() and line][:2] == [
        "## Part 5",
        f"{paragraph} Number 5.",
    ]
    [warning] = job.warnings
    assert "“Part 5”" in warning
    assert "refusal" in warning
    assert "1 of 2 parts" in warning


# API ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ApiCase:
    """A response of the API to translations, and what follows. `times`: how often; then the API works."""

    reply: Callable[[Request], Any]
    times: int
    requests: int
    warning: str = ""


def fail(status: int, content: Any = b"", headers: dict[str, str] | None = None) -> Callable[[Request], Any]:
    return lambda request: Reply(status, content, headers or {})


def make_error(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


BUSY = make_error("busy")
HTML = b"<!DOCTYPE html><html><body><h1>502 Bad Gateway</h1></body></html>"
API_CASES: dict[str, ApiCase] = {
    "busy once": ApiCase(fail(429, BUSY, NO_DELAY), 1, 2),
    "busy three times": ApiCase(fail(503, BUSY, NO_DELAY), 3, 4),
    "busy for ever": ApiCase(fail(503, BUSY, NO_DELAY), 99, 4, "status 503: busy"),
    "busy for an hour": ApiCase(fail(429, BUSY, {"Retry-After": "3600"}), 99, 1, "status 429: busy"),
    "error page of a proxy": ApiCase(fail(502, HTML, NO_DELAY), 2, 3),
    "error page for ever": ApiCase(fail(502, HTML, NO_DELAY), 99, 4, "status 502."),
    "Cloudflare": ApiCase(fail(524, HTML, NO_DELAY), 1, 2),
    "web page": ApiCase(fail(200, HTML), 99, 1, "a web page instead of JSON"),
    "text": ApiCase(fail(200, b"OK"), 99, 1, "not JSON"),
    "empty response": ApiCase(fail(200, b"", NO_DELAY), 1, 2),
    "end of the stream is missing": ApiCase(
        fail(200, b'data: {"choices": [{"delta": {"content": "{"}}]}\n', NO_DELAY), 1, 2
    ),
    "error in the stream": ApiCase(
        fail(200, b'data: {"error": {"code": 502, "message": "no provider"}}\n', NO_DELAY), 1, 2
    ),
    "other JSON": ApiCase(fail(200, {"object": "list", "data": []}), 99, 1, "does not match the protocol"),
    "redirect": ApiCase(fail(307, b"", {"Location": "https://evil.example/"}), 99, 1, "redirects"),
    "wrong key": ApiCase(fail(401, make_error("Invalid key")), 99, 1, "status 401: Invalid key"),
    "forbidden": ApiCase(fail(403, {"detail": "Not allowed"}), 99, 1, "status 403: Not allowed"),
    "unknown model": ApiCase(fail(404, make_error("model not found")), 99, 1, "status 404: model not found"),
    "unpaid": ApiCase(fail(402, make_error("Insufficient credits")), 99, 1, "status 402"),
    "out of quota": ApiCase(fail(429, make_error("No quota", code="insufficient_quota"), NO_DELAY), 99, 1, "No quota"),
    "error with status 200": ApiCase(fail(200, make_error("overloaded", code=503), NO_DELAY), 1, 2),
    "wrong key with status 200": ApiCase(fail(200, make_error("No auth", code="401")), 99, 1, "401: No auth"),
    "error in a choice": ApiCase(
        fail(200, {"choices": [{"error": {"code": 429, "message": "x"}, "finish_reason": "error"}]}, NO_DELAY), 1, 2
    ),
    "error in a list": ApiCase(fail(401, [make_error("API key not valid")]), 99, 1, "API key not valid"),
    "each text is rejected": ApiCase(fail(400, make_error("bad input")), 99, 3, "bad input"),
}


@pytest.mark.parametrize("case", API_CASES.values(), ids=API_CASES)
async def test_failure_of_the_api(openai_server: FakeOpenAiServer, tmp_path: Path, case: ApiCase) -> None:
    def respond(request: Request) -> Any:
        if is_summary_request(request) or count_translations(openai_server) > case.times:
            return answer_correctly(request)
        return case.reply(request)

    openai_server.answer_chat = respond
    result, job = await enrich(openai_server, tmp_path, text="\n\n".join([TEXT] * 3), chunk_characters=800)
    if case.warning:
        assert "Ledgers are logs" in result.markdown
        assert any(case.warning in warning for warning in job.warnings), job.warnings
        assert "evil" not in "".join(job.warnings)
        assert count_translations(openai_server) <= case.requests
    else:
        assert job.warnings == []
        assert result.language == "de"
        assert count_translations(openai_server) == case.requests + 2


def reject_option(is_rejected: Callable[[Request], bool], status: int, message: str) -> Respond:
    return lambda request: (
        Reply(status, make_error(message), NO_DELAY) if is_rejected(request) else answer_correctly(request)
    )


OPTIONS: dict[str, tuple[Respond, int]] = {
    "no schema": (
        reject_option(lambda body: body.get("response_format", {}).get("type") == "json_schema", 400, "Invalid"),
        1,
    ),
    "no format": (reject_option(lambda body: "response_format" in body, 422, "Extra inputs are not permitted"), 2),
    "no grammar": (
        reject_option(lambda body: "json_schema" in str(body.get("response_format")), 500, "failed to parse grammar"),
        1,
    ),
    "no temperature": (reject_option(lambda body: "temperature" in body, 400, "Unsupported value: 'temperature'"), 1),
    "no system role": (
        reject_option(lambda body: body["messages"][0]["role"] == "system", 400, "System role not supported"),
        1,
    ),
}


@pytest.mark.parametrize(("respond", "rejections"), OPTIONS.values(), ids=OPTIONS)
async def test_rejected_option_is_not_sent_again(
    openai_server: FakeOpenAiServer, tmp_path: Path, respond: Respond, rejections: int
) -> None:
    def separate_roles(request: Request) -> Any:
        if len(request["messages"]) > 1:
            return respond(request)
        prompt, _, text = request["messages"][0]["content"].partition("\n\n")
        return answer_correctly({"messages": [{"content": prompt}, {"content": text}]})

    openai_server.answer_chat = separate_roles
    result, job = await enrich(openai_server, tmp_path)
    assert (job.warnings, result.markdown) == ([], translate(TEXT))
    assert len(openai_server.requests) == 2 + rejections


SECTION = "Ledgers are logs of what has happened, and there are {} more words about them in this section of the page."
LONG_TEXT = "\n\n".join(f"## Part {number}\n\n{SECTION.format(number)}" for number in range(12))


def reject_long_texts(reply: Callable[[Request], Any]) -> Respond:
    return lambda request: reply(request) if len(request["messages"][1]["content"]) > 400 else answer_correctly(request)


TOO_LONG: dict[str, Respond] = {
    "OpenAI": reject_long_texts(fail(400, make_error("See the docs.", code="context_length_exceeded"))),
    "vLLM": reject_long_texts(fail(400, make_error("This model's maximum context length is 4096 tokens."))),
    "llama.cpp": reject_long_texts(fail(500, make_error("the request exceeds the available context size"), NO_DELAY)),
    "proxy": reject_long_texts(fail(413, b"<html>Request Entity Too Large</html>")),
    "answer is cut": reject_long_texts(
        lambda request: {"choices": [{"message": {"content": '{"markdown": "Der'}, "finish_reason": "length"}]}
    ),
}


@pytest.mark.parametrize("respond", TOO_LONG.values(), ids=TOO_LONG)
async def test_text_that_is_too_long_is_sent_in_smaller_pieces(
    openai_server: FakeOpenAiServer, tmp_path: Path, respond: Respond
) -> None:
    openai_server.answer_chat = respond
    # The summary stays too long: it is not made of less than 1000 characters.
    result, job = await enrich(openai_server, tmp_path, text=LONG_TEXT)
    assert not [warning for warning in job.warnings if "summary" not in warning]
    assert result.language == "de"
    assert "more words" not in result.markdown
    assert result.markdown.count("## ") == 12
    rejected = sum(len(request["messages"][1]["content"]) > 400 for request in openai_server.requests)
    assert rejected <= 6


async def test_long_material_of_summary_is_shortened(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    too_long = Reply(400, make_error("maximum context length is 2048"))
    openai_server.answer_chat = lambda request: (
        too_long if len(request["messages"][1]["content"]) > 3000 else answer_correctly(request)
    )
    result, job = await enrich(openai_server, tmp_path, text=LONG_TEXT * 8, chunk_characters=2000)
    assert (job.warnings, result.summary is not None) == ([], True)


@pytest.mark.parametrize(
    "reply",
    [
        fail(400, make_error("The response was filtered", code="content_filter")),
        lambda request: {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]},
    ],
    ids=["error", "finish reason"],
)
async def test_filtered_part_stays_and_others_are_translated(
    openai_server: FakeOpenAiServer, tmp_path: Path, reply: Respond
) -> None:
    openai_server.answer_chat = lambda request: (
        reply(request)
        if has_word(request, "are 7 more") and not is_summary_request(request)
        else answer_correctly(request)
    )
    result, job = await enrich(openai_server, tmp_path, text=LONG_TEXT)
    assert [line for line in result.markdown.splitlines() if line.startswith("Ledgers")] == [SECTION.format(7)]
    [warning] = job.warnings
    assert "“Part 7”" in warning
    assert "filter" in warning


async def test_model_that_translates_nothing_is_given_up(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    openai_server.answer_chat = change_markdown(lambda text: "I cannot do that.")
    _, job = await enrich(openai_server, tmp_path, text=LONG_TEXT * 10, chunk_characters=500)
    assert count_translations(openai_server) <= 30
    assert any("refusal" in warning for warning in job.warnings)


# Checkpoints ----------------------------------------------------------------------------------------------------------


async def test_restart_after_outage_sends_only_what_is_missing(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    openai_server.answer_chat = lambda request: (
        Reply(401, make_error("key expired"))
        if has_word(request, "Part 8") and not is_summary_request(request)
        else answer_correctly(request)
    )
    result, first = await enrich(openai_server, tmp_path, text=LONG_TEXT, chunk_characters=500)
    assert any("401: key expired" in warning for warning in first.warnings)
    assert any("text was not translated completely" in warning for warning in first.warnings)
    assert "## der" in result.markdown
    assert "## Part 8" in result.markdown
    sent = len(openai_server.requests)
    openai_server.answer_chat = answer_correctly
    again = RecordingJob(first.parameters, tmp_path, steps=first.get_steps_after_restart())
    result, second = await enrich(openai_server, tmp_path, text=LONG_TEXT, job=again, chunk_characters=500)
    assert (second.warnings, result.language) == ([], "de")
    assert "Part" not in result.markdown
    pending = openai_server.requests[sent:]
    assert 1 <= len(pending) <= 3
    assert has_word(pending[0], "Part 8")


async def test_attempt_after_crash_sends_only_what_is_missing(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    openai_server.answer_chat = answer_correctly
    _, first = await enrich(openai_server, tmp_path, text=LONG_TEXT, chunk_characters=500)
    steps = list(first.steps.items())
    sent = len(openai_server.requests)
    again = RecordingJob(first.parameters, tmp_path, steps=dict(steps[:3]))
    result, _ = await enrich(openai_server, tmp_path, text=LONG_TEXT, job=again, chunk_characters=500)
    assert len(openai_server.requests) == sent + (sent - 3)
    assert "Part" not in result.markdown


async def test_other_model_repeats_all_pieces(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    openai_server.answer_chat = answer_correctly
    _, first = await enrich(openai_server, tmp_path)
    again = RecordingJob(first.parameters, tmp_path, steps=first.steps)
    await enrich(openai_server, tmp_path, job=again, model="m2")
    assert [request["model"] for request in openai_server.requests] == ["m", "m", "m2", "m2"]


async def test_invalid_piece_is_not_requested_again_by_restart(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    openai_server.answer_chat = change_markdown(lambda text: TEXT)
    _, first = await enrich(openai_server, tmp_path)
    sent = len(openai_server.requests)
    again = RecordingJob(first.parameters, tmp_path, steps=first.get_steps_after_restart())
    await enrich(openai_server, tmp_path, job=again)
    assert len(openai_server.requests) == sent
    assert again.warnings == first.warnings


async def test_wrong_key_stops_at_once(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-wrong")
    _, job = await enrich(openai_server, tmp_path, text=LONG_TEXT, chunk_characters=500)
    assert job.executed_steps == ["enrich", "summarize"]
    again = RecordingJob(job.parameters, tmp_path, steps=job.get_steps_after_restart())
    (tmp_path / "key").write_text(KEY)
    openai_server.answer_chat = answer_correctly
    result, again = await enrich(openai_server, tmp_path, text=LONG_TEXT, job=again, chunk_characters=500)
    assert (result.language, again.warnings) == ("de", [])


class CancelledJob(RecordingJob):
    """A job that is cancelled a second after it began."""

    begin = 0.0

    @property
    def is_cancelled(self) -> bool:
        self.begin = self.begin or time.monotonic()
        return time.monotonic() > self.begin + 1


@pytest.mark.parametrize("failure", ["hang", (429, {"Retry-After": "50"})])
async def test_cancellation_ends_a_request_and_a_pause(
    openai_server: FakeOpenAiServer, tmp_path: Path, failure: Any
) -> None:
    openai_server.scripted_failures = [failure] * 9
    job = CancelledJob(make_parameters(target_language="de"), tmp_path)
    async with asyncio.timeout(5):
        with pytest.raises(Cancelled):
            await enrich(openai_server, tmp_path, job=job, timeout_seconds=60)


async def test_timeout_of_the_step_keeps_what_is_translated(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    def hang_at_part(request: Request) -> Any:
        if has_word(request, "Part 8") and not is_summary_request(request):
            openai_server.closing.wait()
        return answer_correctly(request)

    openai_server.answer_chat = hang_at_part
    result, job = await enrich(
        openai_server, tmp_path, text=LONG_TEXT, chunk_characters=500, enrich_timeout_seconds=4, timeout_seconds=60
    )
    assert result.language == "de"
    assert "## Part 8" in result.markdown
    assert any("did not finish within 4 seconds" in warning for warning in job.warnings)
    assert "enrich" not in {name for name, _ in job.get_steps_after_restart()}


async def test_piece_that_timed_out_is_repeated_by_restart(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    def hang_at_part(request: Request) -> Any:
        if has_word(request, "are 8 more") and not is_summary_request(request):
            openai_server.closing.wait(2)
        return answer_correctly(request)

    openai_server.answer_chat = hang_at_part
    result, job = await enrich(openai_server, tmp_path, text=LONG_TEXT, chunk_characters=500, timeout_seconds=0.3)
    assert "are 8 more" in result.markdown
    [warning] = job.warnings
    assert "did not respond within 0.3 seconds" in warning
    openai_server.answer_chat = answer_correctly
    again = RecordingJob(job.parameters, tmp_path, steps=job.get_steps_after_restart())
    sent = len(openai_server.requests)
    result, _ = await enrich(
        openai_server, tmp_path, text=LONG_TEXT, job=again, chunk_characters=500, timeout_seconds=0.3
    )
    assert "more words" not in result.markdown
    assert len(openai_server.requests) == sent + 1


# Other parts ----------------------------------------------------------------------------------------------------------


def make_transcript() -> TranscriptResult:
    texts = [
        f"Ledgers are logs of what has happened, said the speaker number {number} at last." for number in range(30)
    ]
    return TranscriptResult(
        segments=[Segment(start_seconds=10 * number, text=text) for number, text in enumerate(texts)]
    )


SLIDES = SlidesResult(
    texts=[
        SlideText(
            number=1, text="Ledgers and their logs\nWhat has happened to them", notes="Say hello to all the people."
        ),
        SlideText(number=2, text="2019", notes=""),
        SlideText(number=3, text="Ledgers and their logs\nWhat has happened to them", notes="Thank you for listening."),
    ]
)


@pytest.mark.parametrize(
    ("setting", "parameter", "expected"),
    [
        (["page"], None, (True, False, False)),
        (["page", "transcript", "slides"], None, (True, True, True)),
        (["page", "transcript", "slides"], ["slides"], (False, False, True)),
        (["page"], ["transcript"], (False, True, False)),
        (["page"], [], (False, False, False)),
    ],
)
async def test_chosen_parts_are_translated(
    openai_server: FakeOpenAiServer,
    tmp_path: Path,
    setting: list[str],
    parameter: list[str] | None,
    expected: tuple[bool, bool, bool],
) -> None:
    openai_server.answer_chat = answer_correctly
    result, job = await enrich(
        openai_server,
        tmp_path,
        transcript=make_transcript(),
        slides=SLIDES,
        translate=setting,
        parameters={"translate": parameter},
    )
    assert job.warnings == []
    is_translated = result.markdown != TEXT, bool(result.segment_texts), bool(result.slide_texts)
    assert is_translated == expected
    assert result.transcript_language == ("de" if expected[1] else "en")
    if expected[1]:
        assert len(result.segment_texts) == 30
        assert all("Logbuch" in text for text in result.segment_texts)
    if expected[2]:
        assert len(result.slide_texts) == 3
        assert "2019" not in result.slide_texts


LISTS: dict[str, Callable[[list[str]], Any]] = {
    "one is missing": lambda texts: {"texts": texts[:-1]},
    "two are joined": lambda texts: {"texts": [f"{texts[0]} {texts[1]}", *texts[2:]]},
    "one is empty": lambda texts: {"texts": ["", *texts[1:]]},
    "refusal": lambda texts: {"texts": ["I'm sorry, I can't do that."] * len(texts)},
    "untranslated": lambda texts: {"texts": [segment.text for segment in make_transcript().segments][: len(texts)]},
    "no list": lambda texts: {"texts": 7},
}


@pytest.mark.parametrize("change", LISTS.values(), ids=LISTS)
async def test_invalid_list_is_corrected_by_the_model(
    openai_server: FakeOpenAiServer, tmp_path: Path, change: Callable[[list[str]], Any]
) -> None:
    def respond(request: Request) -> Any:
        answer = make_answer(request)
        is_first = sum(is_list_request(request) for request in openai_server.requests) == 1
        return chat_completion(change(answer["texts"]) if is_list_request(request) and is_first else answer)

    openai_server.answer_chat = respond
    result, job = await enrich(
        openai_server, tmp_path, transcript=make_transcript(), parameters={"translate": ["transcript"]}
    )
    assert job.warnings == []
    assert len(result.segment_texts) == 30
    assert sum(is_list_request(request) for request in openai_server.requests) == 2


@pytest.mark.parametrize("change", [json.dumps, lambda texts: {"result": {"translations": texts}}])
async def test_list_in_another_form_is_accepted(
    openai_server: FakeOpenAiServer, tmp_path: Path, change: Callable[[list[str]], Any]
) -> None:
    openai_server.answer_chat = lambda request: chat_completion(
        change(make_answer(request)["texts"]) if is_list_request(request) else make_answer(request)
    )
    result, job = await enrich(
        openai_server, tmp_path, transcript=make_transcript(), parameters={"translate": ["transcript"]}
    )
    assert (job.warnings, len(result.segment_texts), len(openai_server.requests)) == ([], 30, 2)


async def test_segment_that_is_never_translated_stays(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    def respond(request: Request) -> Any:
        answer = make_answer(request)
        if is_list_request(request) and has_word(request, "number 17 at"):
            answer["texts"].pop()
        return chat_completion(answer)

    openai_server.answer_chat = respond
    result, job = await enrich(
        openai_server, tmp_path, transcript=make_transcript(), parameters={"translate": ["transcript"]}
    )
    kept = [number for number, text in enumerate(result.segment_texts) if "Logbuch" not in text]
    assert 17 in kept
    assert len(kept) <= 8
    [warning] = job.warnings
    assert re.search(r"The transcript was not translated completely: 2:\d\d to [23]:\d\d", warning)


async def test_chapters_are_translated_with_the_transcript(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    openai_server.answer_chat = lambda request: chat_completion(make_answer(request))
    transcript = make_transcript()
    transcript.chapters = [Chapter(start_seconds=0, title="Why ledgers"), Chapter(start_seconds=60, title="Questions")]
    result, job = await enrich(openai_server, tmp_path, transcript=transcript, parameters={"translate": ["transcript"]})
    assert job.warnings == []
    assert len(result.chapter_titles) == 2
    assert "Logbuch" in result.chapter_titles[0]


async def test_slide_of_code_may_stay_as_it_is(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    code = "Commit fn commit(batch: &[Entry]) { file.write_vectored(batch)?; file.sync_data()?; entry.answer(); }"

    def respond(request: Request) -> Any:
        answer = make_answer(request)
        if is_list_request(request):
            sent = json.loads(request["messages"][1]["content"])
            answer["texts"] = [code if old == code else new for old, new in zip(sent, answer["texts"], strict=True)]
        return chat_completion(answer)

    openai_server.answer_chat = respond
    slides = SlidesResult(
        texts=[SlideText(number=1, text="Ledgers keep all of the entries"), SlideText(number=2, text=code)]
    )
    result, job = await enrich(openai_server, tmp_path, slides=slides, parameters={"translate": ["slides"]})
    assert job.warnings == []
    assert result.slide_texts[code] == code


# Glossary and languages -----------------------------------------------------------------------------------------------


async def test_names_and_earlier_terms_are_part_of_requests(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    openai_server.answer_chat = answer_correctly
    text = f"{LONG_TEXT}\n\nAda Example wrote MongoDB. The other name is not in the text, as everybody can see."
    await enrich(openai_server, tmp_path, text=text, chunk_characters=500)
    prompts = [request["messages"][0]["content"] for request in openai_server.requests[1:]]
    assert all('the talk "Ledgers that never forget"' in prompt for prompt in prompts)
    assert '"Ada Example", "MongoDB"' in prompts[-1]
    assert "Grace" not in prompts[-1]
    assert '"ledgers" as "Logbuch"' in prompts[1]
    assert "Translate as before" not in prompts[0]


async def test_page_in_target_language_is_not_sent_whatever_it_declares(
    openai_server: FakeOpenAiServer, tmp_path: Path
) -> None:
    openai_server.answer_chat = answer_correctly
    result, job = await enrich(openai_server, tmp_path, text=translate(LONG_TEXT))
    assert (result.language, job.warnings, count_translations(openai_server)) == ("de", [], 0)


async def test_foreign_part_of_a_page_in_target_language_is_translated(
    openai_server: FakeOpenAiServer, tmp_path: Path
) -> None:
    openai_server.answer_chat = answer_correctly
    text = f"{translate(LONG_TEXT * 2)}\n\n## English abstract\n\n{SECTION} {SECTION} {SECTION}"
    result, _ = await enrich(openai_server, tmp_path, text=text, chunk_characters=1000)
    assert result.language == "de"
    assert count_translations(openai_server) == 1
    assert "English abstract" not in result.markdown


async def test_language_is_that_of_most_of_the_text(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    openai_server.answer_chat = lambda request: (
        Reply(401, make_error("no"))
        if has_word(request, "Part 5") and not is_summary_request(request)
        else answer_correctly(request)
    )
    result, _ = await enrich(openai_server, tmp_path, text=LONG_TEXT, chunk_characters=500)
    assert "Part 5" in result.markdown
    assert "Logbuch" in result.markdown
    assert result.language == "en"


async def test_code_and_tables_of_numbers_are_not_sent(openai_server: FakeOpenAiServer, tmp_path: Path) -> None:
    openai_server.answer_chat = answer_correctly
    code = "```python\n" + "ledger.append(event)\n" * 20 + "```"
    table = "| 1 | 2 |\n|---|---|\n" + "| 3.5 | 4 |\n" * 30
    result, job = await enrich(openai_server, tmp_path, text=f"{TEXT}\n\n{code}\n\n{table}\n{SECTION}")
    assert job.warnings == []
    assert code in result.markdown
    assert "| 3.5 | 4 |" in result.markdown
    sent = "".join(request["messages"][1]["content"] for request in openai_server.requests[1:])
    assert "append(event)" not in sent
    assert "3.5" not in sent


async def test_descriptions_of_images_are_translated_but_not_targets(
    openai_server: FakeOpenAiServer, tmp_path: Path
) -> None:
    openai_server.answer_chat = answer_correctly
    text = f"{TEXT}\n\n![A picture of ledgers](assets/image-1.png)"
    result, job = await enrich(openai_server, tmp_path, text=text)
    assert job.warnings == []
    assert "](assets/image-1.png)" in result.markdown
    assert "picture" not in result.markdown
    assert "\\!" not in result.markdown


def test_summary_of_another_form_is_accepted() -> None:
    intro = ["Ein Vortrag über Logbücher.", "Er ist kurz."]
    answer = {"intro": intro, "subtitle": "Wort " * 100, "topic": None, "tags": "#Log, Daten; Log\nEreignisse", "x": 1}
    summary = parse_summary(json.dumps(answer), "de")
    assert summary.intro == "Ein Vortrag über Logbücher.\n\nEr ist kurz."
    assert len(summary.subtitle) <= 300
    assert summary.subtitle.endswith("Wort…")
    assert summary.topic == ""
    assert summary.tags == ["Log", "Daten", "Ereignisse"]
    many = parse_summary(json.dumps({"intro": "x", "tags": [{"name": f"t{n}"} for n in range(40)]}))
    assert len(many.tags) == 10


@pytest.mark.parametrize("intro", ["I'm sorry, but I cannot summarize this.", SUMMARIES["en"]["intro"], "", None, 7])
def test_summary_that_is_none_is_rejected(intro: object) -> None:
    with pytest.raises(InvalidModelOutput):
        parse_summary(json.dumps({"intro": intro, "tags": []}), "de")


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (r'{"markdown": "It\'s a\_b \(x\) \alpha"}', r"It's a\_b \(x\) \alpha".replace("\\a", "\\a")),
        ('{"markdown": "a, ]",}', "a, ]"),
        ('[1] {"markdown": "x",}', "x"),
        ('{"markdown": "draft"} no: {"markdown": "final"}', "final"),
    ],
)
def test_json_with_errors_is_read(output: str, expected: str) -> None:
    found = find_object(output, frozenset({"markdown"}))
    assert found == {"markdown": expected}


@pytest.mark.parametrize("text", ["{" * 200_000, "[" * 200_000, '{"a":' * 50_000, '"' * 200_000, "<think>" * 50_000])
def test_hostile_output_is_read_in_a_short_time(text: str) -> None:
    begin = time.monotonic()
    assert find_object(text, frozenset({"markdown"})) is None
    find_plain_text(text)
    assert time.monotonic() - begin < 5
