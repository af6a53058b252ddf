"""session: the step `enrich`, 80 to 90 percent of the job: summary, tags, translation; what fails is a warning."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, TypeVar

from pydantic import BaseModel

from jobledger.workers.processor import JSON
from jobledger.workers.processors.session import enrichment
from jobledger.workers.processors.session.document import (
    EnrichmentResult,
    TranscriptResult,
    primary_subtag,
    resolve_language,
)
from jobledger.workers.processors.session.enrichment import InvalidModelOutput, Summary, Translation
from jobledger.workers.processors.session.openai_api import OpenAiClient, OpenAiError, read_api_key
from jobledger.workers.processors.session.page import PageText
from jobledger.workers.processors.session.step_context import StepContext, json_digest

MAX_PROMPT_CHARACTERS: Final = 30_000
"""So much of the page, and of what was said, is read for the summary."""
Parsed = TypeVar("Parsed")


def inputs(work: StepContext, page: PageText, recording: TranscriptResult) -> dict[str, JSON]:
    """Return all that the text depends on. Where the key lies, and how patient we are, is not part of it."""
    chosen = work.settings.language_model
    said = [segment.text for segment in recording.segments] if chosen.backend != "none" else []
    return {
        "content": json_digest([page.model_dump(mode="json"), said]),
        "title": work.session.session,
        "source_language": work.session.source_language,
        "target_language": work.session.target_language,
        "backend": chosen.backend,
        "url": chosen.url,
        "model": chosen.model,
        "chunk_characters": chosen.chunk_characters,
        "max_characters": chosen.max_characters,
        "temperature": chosen.temperature,
    }


async def run(work: StepContext, page: PageText, recording: TranscriptResult) -> JSON:
    """Ask the language model, where one is configured."""
    language, target = resolve_language(work.session, page), work.session.target_language
    composed = EnrichmentResult(language=language, markdown=page.markdown)
    other = primary_subtag(language) != primary_subtag(target)
    if work.settings.language_model.backend == "none":
        if other:
            await work.warn(f"{_not_translated(language, target)}, and no language model is configured.")
        return _output(work, composed)
    await work.job.report_progress(80, "Composing")
    try:
        async with asyncio.timeout(work.settings.enrich_timeout_seconds), _model(work) as model:
            composed = await _summarize(work, model, composed, page, recording)
            if other:
                composed = await _translate(work, model, composed)
    except TimeoutError:
        limit = f"within {work.settings.enrich_timeout_seconds:g} seconds"
        await work.warn(f"The language model was not done {limit}: the text may be without summary or translation.")
    except OpenAiError as failed:
        await work.warn(f"The language model cannot be used: {failed}.")
    await work.job.report_progress(90, "The text is composed")
    return _output(work, composed)


def _output(work: StepContext, composed: EnrichmentResult) -> JSON:
    return composed.model_copy(update={"warnings": work.warnings}).model_dump(mode="json")


def _not_translated(language: str, target: str) -> str:
    return f'The text is not translated: it is in "{language}", "{target}" was asked for'


class _LanguageModel:
    """A model that is asked for JSON, and told once what was wrong with it."""

    def __init__(self, work: StepContext, api: OpenAiClient) -> None:
        self._work = work
        self._api = api
        self._takes_schema = True

    async def generate(
        self, prompt: str, material: str, wanted: type[BaseModel], read: Callable[[str], Parsed]
    ) -> Parsed:
        """Return what `read` makes of the answer.

        Raises:
            NotAccepted: nor could it use the second one.
            ApiFailed: the endpoint failed.
        """
        messages = [{"role": "system", "content": prompt}, {"role": "user", "content": material}]
        answer = await self._answer(messages, wanted)
        try:
            return read(answer)
        except InvalidModelOutput as problem:
            await self._work.job.log("info", f"The language model's answer was not usable: {problem}. Asking again.")
            messages += [
                {"role": "assistant", "content": answer},
                {
                    "role": "user",
                    "content": f"This cannot be used: {problem}. Answer again, with the JSON object only.",
                },
            ]
        return read(await self._answer(messages, wanted))

    async def _answer(self, messages: list[dict[str, str]], wanted: type[BaseModel]) -> str:
        self._work.raise_if_cancelled()
        chosen = self._work.settings.language_model
        body: dict[str, Any] = {"model": chosen.model, "messages": messages}
        if chosen.temperature is not None:
            body["temperature"] = chosen.temperature
        if self._takes_schema:
            body["response_format"] = enrichment.json_schema_format(wanted)
        try:
            answer = await self._api.post("chat/completions", json=body)
        except OpenAiError as failed:
            if not self._takes_schema or failed.status not in (400, 422):
                raise
            self._takes_schema = False  # not every server knows this form; the prompt asks for the same
            return await self._answer(messages, wanted)
        return self._text_of(answer)

    def _text_of(self, answer: Any) -> str:
        try:
            text = answer["choices"][0]["message"]["content"]
            usage = answer.get("usage") or {}
            tokens = usage.get("total_tokens", 0)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise OpenAiError("its answer has not the form of the protocol") from error
        if isinstance(tokens, int) and tokens > 0:
            self._work.job.add_tokens(tokens)
        return text if isinstance(text, str) else ""


@asynccontextmanager
async def _model(work: StepContext) -> AsyncIterator[_LanguageModel]:
    chosen = work.settings.language_model
    api = OpenAiClient(chosen.url or "", key=read_api_key(chosen.api_key_file), timeout_seconds=chosen.timeout_seconds)
    try:
        yield _LanguageModel(work, api)
    finally:
        await api.aclose()


async def _summarize(
    work: StepContext, model: _LanguageModel, composed: EnrichmentResult, page: PageText, recording: TranscriptResult
) -> EnrichmentResult:
    said = " ".join(segment.text for segment in recording.segments)
    parts = [f"# {work.session.session}", page.markdown[:MAX_PROMPT_CHARACTERS]]
    if said:
        parts.append(f"What was said:\n{said[:MAX_PROMPT_CHARACTERS]}")
    prompt = enrichment.build_summary_prompt(work.session.target_language)
    try:
        summary = await model.generate(prompt, "\n\n".join(parts), Summary, enrichment.parse_summary)
    except InvalidModelOutput as problem:
        await work.warn(f"There is no summary: the language model's answers could not be used ({problem}).")
        return composed
    return composed.model_copy(update={"summary": summary})


async def _translate(work: StepContext, model: _LanguageModel, composed: EnrichmentResult) -> EnrichmentResult:
    chosen, target = work.settings.language_model, work.session.target_language
    if len(composed.markdown) > chosen.max_characters:
        longest = f"{len(composed.markdown):,} characters are more than {chosen.max_characters:,}"
        await work.warn(f"{_not_translated(composed.language, target)}, and {longest}.")
        return composed
    originals = enrichment.split_markdown(composed.markdown, chosen.chunk_characters)
    prompt, texts, left = enrichment.build_translation_prompt(target), [], 0
    for number, original in enumerate(originals):
        await work.job.report_progress(
            82 + 8 * number / len(originals), f"Translating: {number} of {len(originals)} pieces"
        )
        try:
            read = partial(enrichment.parse_translation, original=original)
            texts.append(await model.generate(prompt, original, Translation, read))
        except InvalidModelOutput as problem:
            await work.job.log("warning", f"Piece {number + 1} is left as it was: {problem}")
            texts.append(original)
            left += 1
    if left == len(originals):
        why = "the language model's answers could not be used"
        await work.warn(f"{_not_translated(composed.language, target)}; {why}.")
        return composed
    if left:
        some = f"{left} of {len(originals)} pieces of the text"
        await work.warn(f"{some} are not translated: the language model's answers could not be used.")
    return composed.model_copy(update={"language": target, "markdown": "\n\n".join(texts)})
