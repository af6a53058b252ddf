"""session: the step `compose`, 80 to 90 percent of the job: summary, tags, translation; what fails is a warning."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, TypeVar

from pydantic import BaseModel

from jobledger.workers.processor import JSON
from jobledger.workers.processors.session import compose
from jobledger.workers.processors.session.compose import NotAccepted, Summary, Translation
from jobledger.workers.processors.session.markdown import Composed, Recording, language_of, primary
from jobledger.workers.processors.session.openai_api import ApiFailed, OpenAiApi, key_in
from jobledger.workers.processors.session.page import PageText
from jobledger.workers.processors.session.step_context import Work, digest_of

MATERIAL_CHARACTERS: Final = 30_000
"""So much of the page, and of what was said, is read for the summary."""
Accepted = TypeVar("Accepted")


def inputs(work: Work, page: PageText, recording: Recording) -> dict[str, JSON]:
    """Return all that the text depends on. Where the key lies, and how patient we are, is not part of it."""
    chosen = work.settings.language_model
    said = [segment.text for segment in recording.segments] if chosen.backend != "none" else []
    return {
        "content": digest_of([page.model_dump(mode="json"), said]),
        "title": work.session.session,
        "source_language": work.session.source_language,
        "target_language": work.session.target_language,
        "backend": chosen.backend,
        "url": chosen.url,
        "model": chosen.model,
        "piece_characters": chosen.piece_characters,
        "max_characters": chosen.max_characters,
        "temperature": chosen.temperature,
    }


async def run(work: Work, page: PageText, recording: Recording) -> JSON:
    """Ask the language model, where one is configured."""
    language, target = language_of(work.session, page), work.session.target_language
    composed = Composed(language=language, markdown=page.markdown)
    other = primary(language) != primary(target)
    if work.settings.language_model.backend == "none":
        if other:
            await work.warn(f"{_not_translated(language, target)}, and no language model is configured.")
        return _output(work, composed)
    await work.job.progress(80, "Composing")
    try:
        async with asyncio.timeout(work.settings.compose_timeout_seconds), _model(work) as model:
            composed = await _summarised(work, model, composed, page, recording)
            if other:
                composed = await _translated(work, model, composed)
    except TimeoutError:
        limit = f"within {work.settings.compose_timeout_seconds:g} seconds"
        await work.warn(f"The language model was not done {limit}: the text may be without summary or translation.")
    except ApiFailed as failed:
        await work.warn(f"The language model cannot be used: {failed}.")
    await work.job.progress(90, "The text is composed")
    return _output(work, composed)


def _output(work: Work, composed: Composed) -> JSON:
    return composed.model_copy(update={"warnings": work.warnings}).model_dump(mode="json")


def _not_translated(language: str, target: str) -> str:
    return f'The text is not translated: it is in "{language}", "{target}" was asked for'


class _Model:
    """A model that is asked for JSON, and told once what was wrong with it."""

    def __init__(self, work: Work, api: OpenAiApi) -> None:
        self._work = work
        self._api = api
        self._takes_schema = True

    async def ask(
        self, prompt: str, material: str, wanted: type[BaseModel], read: Callable[[str], Accepted]
    ) -> Accepted:
        """Return what `read` makes of the answer.

        Raises:
            NotAccepted: nor could it use the second one.
            ApiFailed: the endpoint failed.
        """
        messages = [{"role": "system", "content": prompt}, {"role": "user", "content": material}]
        answer = await self._answer(messages, wanted)
        try:
            return read(answer)
        except NotAccepted as problem:
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
        self._work.stop_if_cancelled()
        chosen = self._work.settings.language_model
        body: dict[str, Any] = {"model": chosen.model, "messages": messages}
        if chosen.temperature is not None:
            body["temperature"] = chosen.temperature
        if self._takes_schema:
            body["response_format"] = compose.schema_of(wanted)
        try:
            answer = await self._api.post("chat/completions", json=body)
        except ApiFailed as failed:
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
            raise ApiFailed("its answer has not the form of the protocol") from error
        if isinstance(tokens, int) and tokens > 0:
            self._work.job.spent(tokens)
        return text if isinstance(text, str) else ""


@asynccontextmanager
async def _model(work: Work) -> AsyncIterator[_Model]:
    chosen = work.settings.language_model
    api = OpenAiApi(chosen.url or "", key=key_in(chosen.api_key_file), timeout_seconds=chosen.timeout_seconds)
    try:
        yield _Model(work, api)
    finally:
        await api.aclose()


async def _summarised(work: Work, model: _Model, composed: Composed, page: PageText, recording: Recording) -> Composed:
    said = " ".join(segment.text for segment in recording.segments)
    parts = [f"# {work.session.session}", page.markdown[:MATERIAL_CHARACTERS]]
    if said:
        parts.append(f"What was said:\n{said[:MATERIAL_CHARACTERS]}")
    prompt = compose.summary_prompt(work.session.target_language)
    try:
        summary = await model.ask(prompt, "\n\n".join(parts), Summary, compose.read_summary)
    except NotAccepted as problem:
        await work.warn(f"There is no summary: the language model's answers could not be used ({problem}).")
        return composed
    return composed.model_copy(update={"summary": summary})


async def _translated(work: Work, model: _Model, composed: Composed) -> Composed:
    chosen, target = work.settings.language_model, work.session.target_language
    if len(composed.markdown) > chosen.max_characters:
        longest = f"{len(composed.markdown):,} characters are more than {chosen.max_characters:,}"
        await work.warn(f"{_not_translated(composed.language, target)}, and {longest}.")
        return composed
    originals = compose.pieces(composed.markdown, chosen.piece_characters)
    prompt, texts, left = compose.translation_prompt(target), [], 0
    for number, original in enumerate(originals):
        await work.job.progress(82 + 8 * number / len(originals), f"Translating: {number} of {len(originals)} pieces")
        try:
            read = partial(compose.read_translation, original=original)
            texts.append(await model.ask(prompt, original, Translation, read))
        except NotAccepted as problem:
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
