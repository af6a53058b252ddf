"""The step `enrich`: summary, tags and translation (progress 80 to 90 percent). Problems are only warnings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

from pydantic import BaseModel

from jobledger.workers.processor import JSON
from jobledger.workers.processors.session import document, enrichment
from jobledger.workers.processors.session.enrichment import InvalidModelOutput, Summary, Translation
from jobledger.workers.processors.session.openai_api import OpenAiClient, OpenAiError
from jobledger.workers.processors.session.page import PageText
from jobledger.workers.processors.session.step_context import StepContext, compute_json_digest

MAX_PROMPT_CHARACTERS: Final = 30_000
"""Maximum length of the page text, and of the transcript, in the prompt for the summary."""
Parsed = TypeVar("Parsed")


def build_inputs(ctx: StepContext, page: PageText, transcript: document.TranscriptResult) -> dict[str, JSON]:
    """Return the inputs of the step, without API key and timeouts. The step is not repeated with the same inputs."""
    settings = ctx.settings.language_model
    spoken = [segment.text for segment in transcript.segments] if settings.backend != "none" else []
    return {
        "content": compute_json_digest([page.model_dump(mode="json"), spoken]),
        "title": ctx.parameters.session,
        "source_language": ctx.parameters.source_language,
        "target_language": ctx.parameters.target_language,
        **settings.model_dump(mode="json", exclude={"api_key_file", "timeout_seconds"}),
    }


async def run(ctx: StepContext, page: PageText, transcript: document.TranscriptResult) -> document.EnrichmentResult:
    """Summarize and translate the text if a language model is configured."""
    language, target = document.resolve_language(ctx.parameters, page), ctx.parameters.target_language
    result = document.EnrichmentResult(language=language, markdown=page.markdown)
    result.warnings = ctx.warnings
    needs_translation = document.get_primary_subtag(language) != document.get_primary_subtag(target)
    if ctx.settings.language_model.backend == "none":
        if needs_translation:
            await ctx.warn(f"{_describe_untranslated(language, target)} No language model is configured.")
        return result
    await ctx.job.report_progress(80, "Summarizing")
    try:
        async with (
            asyncio.timeout(ctx.settings.enrich_timeout_seconds),
            OpenAiClient(ctx.settings.language_model) as api,
        ):
            model = _LanguageModel(ctx, api)
            await _summarize(ctx, model, result, transcript)
            if needs_translation:
                await _translate(ctx, model, result)
    except TimeoutError:
        limit = f"{ctx.settings.enrich_timeout_seconds:g} seconds"
        await ctx.warn(f"The language model did not finish within {limit}. Summary or translation may be missing.")
    except OpenAiError as error:
        await ctx.warn(f"The language model API failed: {error}.")
    await ctx.job.report_progress(90, "Text enriched")
    return result


def _describe_untranslated(language: str, target: str) -> str:
    return f'The text was not translated from "{language}" to "{target}".'


class _LanguageModel:
    """Generates JSON with a language model, with one retry for invalid output."""

    def __init__(self, ctx: StepContext, api: OpenAiClient) -> None:
        self._ctx = ctx
        self._api = api
        self._has_schema_support = True

    async def generate(self, prompt: str, text: str, schema: type[BaseModel], parse: Callable[[str], Parsed]) -> Parsed:
        """Generate output and parse it.

        Args:
            prompt: The system prompt.
            text: The untrusted text to process.
            schema: Schema of the output.
            parse: Parses the output. Raises InvalidModelOutput.

        Raises:
            InvalidModelOutput: The output of both tries is invalid.
            OpenAiError: The API failed.
        """
        messages = [{"role": "system", "content": prompt}, {"role": "user", "content": text}]
        output = await self._complete(messages, schema)
        try:
            return parse(output)
        except InvalidModelOutput as problem:
            await self._ctx.job.log("info", f"The language model's output is invalid: {problem}. Retrying.")
            request = f"The answer is invalid: {problem}. Answer again with only the JSON object."
            messages += [{"role": "assistant", "content": output}, {"role": "user", "content": request}]
        return parse(await self._complete(messages, schema))

    async def _complete(self, messages: list[dict[str, str]], schema: type[BaseModel]) -> str:
        self._ctx.raise_if_cancelled()
        settings = self._ctx.settings.language_model
        body: dict[str, Any] = {"model": settings.model, "messages": messages}
        if settings.temperature is not None:
            body["temperature"] = settings.temperature
        if self._has_schema_support:
            body["response_format"] = enrichment.build_response_format(schema)
        try:
            response = await self._api.post("chat/completions", json=body)
        except OpenAiError as error:
            if not self._has_schema_support or error.status not in (400, 422):
                raise
            self._has_schema_support = False  # not all servers support it; the prompt describes the same format
            return await self._complete(messages, schema)
        return self._extract_text(response)

    def _extract_text(self, response: Any) -> str:
        try:
            text = response["choices"][0]["message"]["content"]
            usage = response.get("usage") or {}
            tokens = usage.get("total_tokens", 0)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise OpenAiError("its response does not match the protocol") from error
        if isinstance(tokens, int) and tokens > 0:
            self._ctx.job.add_tokens(tokens)
        return text if isinstance(text, str) else ""


async def _summarize(
    ctx: StepContext, model: _LanguageModel, result: document.EnrichmentResult, transcript: document.TranscriptResult
) -> None:
    spoken = " ".join(segment.text for segment in transcript.segments)
    parts = [f"# {ctx.parameters.session}", result.markdown[:MAX_PROMPT_CHARACTERS]]
    if spoken:
        parts.append(f"Transcript:\n{spoken[:MAX_PROMPT_CHARACTERS]}")
    prompt = enrichment.build_summary_prompt(ctx.parameters.target_language)
    try:
        result.summary = await model.generate(prompt, "\n\n".join(parts), Summary, enrichment.parse_summary)
    except InvalidModelOutput as problem:
        await ctx.warn(f"There is no summary. The output of the language model is invalid: {problem}.")


async def _translate(ctx: StepContext, model: _LanguageModel, result: document.EnrichmentResult) -> None:
    settings, target = ctx.settings.language_model, ctx.parameters.target_language
    untranslated = _describe_untranslated(result.language, target)
    if len(result.markdown) > settings.max_characters:
        await ctx.warn(
            f"{untranslated} It has {len(result.markdown):,} characters, more than {settings.max_characters:,}."
        )
        return
    originals = enrichment.split_markdown(result.markdown, settings.chunk_characters)
    prompt, texts, failed = enrichment.build_translation_prompt(target), [], 0
    for number, original in enumerate(originals):
        message = f"Translating: {number} of {len(originals)} chunks"
        await ctx.report_part(message, 82, 90, number, len(originals))
        try:
            parse = partial(enrichment.parse_translation, original=original)
            texts.append(await model.generate(prompt, original, Translation, parse))
        except InvalidModelOutput as problem:
            await ctx.job.log("warning", f"Chunk {number + 1} was not translated: {problem}")
            texts.append(original)
            failed += 1
    if failed == len(originals):
        await ctx.warn(f"{untranslated} The output of the language model is invalid.")
        return
    if failed:
        chunks = f"{failed} of {len(originals)} chunks of the text"
        await ctx.warn(f"{chunks} were not translated. The output of the language model is invalid.")
    result.language, result.markdown = target, "\n\n".join(texts)
