"""Ask a language model for JSON, adapt to what its API offers, and let it correct invalid output."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from jobledger.workers.processor import JobContext
from jobledger.workers.processors.session.enrichment import build_response_format
from jobledger.workers.processors.session.model_output import InvalidModelOutput, to_text, to_text_part
from jobledger.workers.processors.session.openai_api import ErrorKind, OpenAiClient, OpenAiError
from jobledger.workers.processors.session.settings import LanguageModelSettings

MAX_REPAIRS: Final = 2
_MAX_TOKENS: Final = 100_000_000
_MAX_ECHO_FACTOR: Final = 3
"""Invalid output that is much longer than the request is not sent back with the request to correct it."""
_MIN_ECHO_CHARACTERS: Final = 2000
_FORMAT_WORDS: Final = ("response_format", "json", "schema", "format", "grammar")
Parsed = TypeVar("Parsed")


class UnusableAnswer(Exception):
    """The model gives no usable answer to this text. The message is a clause with the reason.

    `is_too_long` is whether a shorter text may help, and `is_temporary` whether the same text may be accepted later.
    """

    def __init__(self, reason: str, *, is_too_long: bool = False, is_temporary: bool = False) -> None:
        super().__init__(reason)
        self.is_too_long = is_too_long
        self.is_temporary = is_temporary


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    finish_reason: str


class LanguageModel:
    """One model of one API during an attempt. It remembers which options the API rejects."""

    def __init__(self, job: JobContext, settings: LanguageModelSettings, api: OpenAiClient) -> None:
        self._job = job
        self._settings = settings
        self._api = api
        self._formats = ["json_schema", "json_object", "none"]
        self._has_temperature = settings.temperature is not None
        self._has_system_role = True
        self._is_accepted = False

    async def generate(
        self, prompt: str, text: str, schema: str, parse: Callable[[str], Parsed], *, max_repairs: int = MAX_REPAIRS
    ) -> Parsed:
        """Generate output and parse it. Invalid output is sent back with the error at most `max_repairs` times.

        Args:
            prompt: The system prompt.
            text: The untrusted text to process.
            schema: Name of the schema of the output, see `build_response_format`.
            parse: Parses the output, in a thread. Raises InvalidModelOutput.
            max_repairs: How often the model may correct its output.

        Raises:
            UnusableAnswer: The output stays invalid, or the API rejects this text.
            OpenAiError: The API failed. Further requests would fail too.
        """
        request = [{"role": "system", "content": prompt}, {"role": "user", "content": text}]
        messages = request
        for remaining in range(max_repairs, -1, -1):
            answer = await self._complete(messages, schema)
            try:
                _check_finish_reason(answer)
                return await asyncio.to_thread(parse, answer.text)
            except InvalidModelOutput as problem:
                if not remaining:
                    raise UnusableAnswer(f"the output of the language model is invalid: {problem}") from problem
                await self._job.log("info", f"The language model's output is invalid: {problem}. Retrying.")
                messages = request + _build_repair(answer.text, problem, len(text))
        raise AssertionError("the last answer returns or raises")

    async def _complete(self, messages: list[dict[str, str]], schema: str) -> _Answer:
        while True:
            try:
                response = await self._api.post("chat/completions", json=self._build_body(messages, schema))
                break
            except OpenAiError as error:
                if error.kind is ErrorKind.REQUEST and self._give_up_option(str(error).lower()):
                    continue
                if error.kind is ErrorKind.SERVICE and not (error.is_timeout and self._is_accepted):
                    raise
                if error.kind is ErrorKind.REQUEST and not self._is_accepted:
                    raise
                is_too_long = error.kind is not ErrorKind.REQUEST
                raise UnusableAnswer(
                    f"the language model API failed: {error}", is_too_long=is_too_long, is_temporary=error.is_timeout
                ) from error
        self._is_accepted = True
        self._count_tokens(response)
        return _read_answer(response)

    def _build_body(self, messages: list[dict[str, str]], schema: str) -> dict[str, Any]:
        if not self._has_system_role:
            first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            messages = [first, *messages[2:]]
        body: dict[str, Any] = {"model": self._settings.model, "messages": messages}
        if self._has_temperature:
            body["temperature"] = self._settings.temperature
        if self._formats[0] != "none":
            body["response_format"] = build_response_format(schema if self._formats[0] == "json_schema" else None)
        return body

    def _give_up_option(self, error: str) -> bool:
        """Stop sending an option that the API may have rejected. Return whether there was one.

        Not all servers support all options. The prompt describes the same format.
        """
        if self._has_temperature and "temperature" in error:
            self._has_temperature = False
        elif self._has_system_role and "system role" in error:
            self._has_system_role = False
        elif len(self._formats) > 1 and (not self._is_accepted or any(word in error for word in _FORMAT_WORDS)):
            self._formats.pop(0)
        elif self._has_temperature and not self._is_accepted:
            self._has_temperature = False
        else:
            return False
        return True

    def _count_tokens(self, response: Any) -> None:
        usage = response.get("usage") if isinstance(response, dict) else None
        tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
        if isinstance(tokens, int | float) and not isinstance(tokens, bool) and 0 < tokens < _MAX_TOKENS:
            self._job.add_tokens(int(tokens))


def _build_repair(output: str, problem: InvalidModelOutput, length: int) -> list[dict[str, str]]:
    """Return the messages after the request that let the model correct its output."""
    if not output.strip() or len(output) > max(_MIN_ECHO_CHARACTERS, _MAX_ECHO_FACTOR * length):
        return []
    details = f" ({problem.details})" if problem.details else ""
    request = f"The answer is invalid: {problem}{details}. Answer again with only the JSON object."
    return [{"role": "assistant", "content": output}, {"role": "user", "content": request}]


def _check_finish_reason(answer: _Answer) -> None:
    """Raise UnusableAnswer if the answer is not complete: another try would give the same."""
    if answer.finish_reason in ("length", "max_tokens", "model_length"):
        raise UnusableAnswer("the answer of the language model was cut at its maximum length", is_too_long=True)
    if answer.finish_reason == "content_filter":
        raise UnusableAnswer("a content filter of the language model API rejected the text", is_too_long=True)


def _read_answer(response: Any) -> _Answer:
    """Return the text of a chat completion. It is empty if the model has not answered.

    Raises:
        OpenAiError: The response is no chat completion.
    """
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list):
        raise OpenAiError("its response does not match the protocol")
    choice = choices[0] if choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    if not isinstance(message, dict):
        message = {"content": choice.get("text")}
    return _Answer(_find_text(message), str(choice.get("finish_reason") or ""))


def _find_text(message: dict[str, Any]) -> str:
    """Return the content of a message, or else what some APIs use instead of it."""
    content = message.get("content")
    if isinstance(content, list):
        text = "".join(to_text_part(part) for part in content)
    elif isinstance(content, dict):
        text = json.dumps(content, ensure_ascii=False)
    else:
        text = content if isinstance(content, str) else ""
    if text.strip():
        return text
    calls = message.get("tool_calls")
    function = calls[0].get("function") if isinstance(calls, list) and calls and isinstance(calls[0], dict) else None
    alternatives = [function.get("arguments") if isinstance(function, dict) else None, message.get("refusal")]
    for name in ("reasoning_content", "reasoning"):
        reasoning = to_text(message.get(name))
        alternatives.append(reasoning if "{" in reasoning else None)
    return next((value for value in alternatives if isinstance(value, str) and value.strip()), "")
