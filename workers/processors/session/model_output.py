"""Read the output of a language model: find the JSON in it, and ignore harmless additions. Pure.

Models add a chain of thought, a Markdown fence or a sentence around the JSON, further fields, trailing commas, and line
breaks or invalid escapes in strings. All of this is accepted. The content is checked elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

_MAX_DECODE_ERRORS: Final = 50
_MAX_NESTED_TEXTS: Final = 3
_MAX_LIST_TEXTS: Final = 10_000
_DECODER: Final = json.JSONDecoder(strict=False)  # accepts line breaks in strings
_THOUGHTS: Final = re.compile(
    r"\s*(?:<(think|thinking|thought|reasoning)>.*?</\1>|\[THINK\].*?\[/THINK\])", re.DOTALL | re.IGNORECASE
)
_END_OF_THOUGHTS: Final = re.compile(r"</think(?:ing)?>|\[/THINK\]", re.IGNORECASE)
_CHAT_TOKEN: Final = re.compile(r"<\|[\w ]{1,40}\|>")
_FINAL_CHANNEL: Final = re.compile(r"<\|channel\|>\s*final\b[^<]{0,50}<\|message\|>")
_OPENING: Final = re.compile(r"[{\[]")
_FENCE: Final = re.compile(r"^(`{3,}|~{3,})[ \t]*([\w-]*)[ \t]*\n(.*)\n\1[ \t]*$", re.DOTALL | re.MULTILINE)
_INVALID_ESCAPE: Final = re.compile(r'\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4}|(.|\Z))', re.DOTALL)
_STRING_OR_COMMA: Final = re.compile(r'"(?:[^"\\]|\\.)*+"|,(?=\s*[}\]])', re.DOTALL)


class InvalidModelOutput(Exception):
    """The output of the model is invalid. The message is a clause with the reason.

    `details` quotes the output. The model gets it together with the message, but it is not published.
    """

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.details = details


def strip_thoughts(output: str) -> str:
    """Return the output without a chain of thought before the answer, and without tokens of a chat template."""
    text = output.removeprefix("\ufeff")
    if channels := list(_FINAL_CHANNEL.finditer(text)):
        text = text[channels[-1].end() :]
    while match := _THOUGHTS.match(text):
        text = text[match.end() :]
    start = text.find("{")
    if (match := _END_OF_THOUGHTS.search(text, 0, start if start >= 0 else len(text))) and text[match.end() :].strip():
        text = text[match.end() :]  # some chat templates contain the opening tag
    text = _CHAT_TOKEN.sub("", text).strip()
    if text.startswith('"') and text.endswith('"'):
        with suppress(ValueError):
            return str(_DECODER.decode(text))
    return text


def find_object(output: str, names: frozenset[str]) -> dict[str, Any] | None:
    """Return the last JSON object with one of the fields `names`, in any case and depth, or None."""
    for values in _decode(strip_thoughts(output)):
        objects = [found for value in values if (found := _unwrap(value, names)) is not None]
        if objects:
            return objects[-1]
    return None


def find_list(output: str, names: frozenset[str]) -> list[Any] | None:
    """Return the list in one of the fields `names`, or the only list of the output, or None."""
    answer = find_object(output, names)
    if answer is not None:
        return next((found for name in names if (found := _find_list_in(answer.get(name))) is not None), None)
    for values in _decode(strip_thoughts(output)):
        lists = [found for value in values if (found := _find_list_in(value)) is not None]
        if len(lists) == 1:
            return lists[0]
    return None


def _find_list_in(value: Any) -> list[Any] | None:
    """Return a list, or the list in an object of one field or in a string, or None."""
    for _ in range(_MAX_NESTED_TEXTS):
        if isinstance(value, dict):
            value = next(iter(value.values())) if len(value) == 1 else None
        if isinstance(value, str):
            value = next((values[0] for values in _decode(value) if len(values) == 1), None)
    return value if isinstance(value, list) and len(value) <= _MAX_LIST_TEXTS else None


def find_plain_text(output: str) -> str | None:
    """Return the output as a text that is no JSON, without a fence around it, or None if it looks like JSON."""
    text = strip_thoughts(output)
    fences = list(_FENCE.finditer(text))
    if len(fences) == 1 and fences[0][2].lower() in ("", "markdown", "md", "text", "json"):
        content = fences[0][3].strip()
        if fences[0][2].lower() in ("markdown", "md") or fences[0].start() == 0:
            text = content
    return None if not text or re.match(r"[\[{]\s*[\"'\[{}\]]", text) else text


def to_text(value: Any) -> str:
    """Return a text field as a string. Some models answer with a list of lines or parts."""
    if isinstance(value, list):
        return "\n\n".join(part for item in value[:_MAX_LIST_TEXTS] if (part := to_text_part(item)))
    return to_text_part(value)


def to_text_part(value: Any) -> str:
    """Return a string, the text of a part such as `{"type": "text", "text": "…"}`, or an empty string."""
    if isinstance(value, dict):
        value = value.get("text")
    return value if isinstance(value, str) else ""


def clean_text(text: str) -> str:
    """Return the text with line feeds as line ends and without control characters.

    A form feed or backspace is the `\\f` or `\\b` of a formula whose backslash the model did not escape.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\\f").replace("\b", "\\b")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufeff]", "", text)


def _decode(text: str) -> Iterator[list[Any]]:
    """Yield the JSON objects and lists in a text, and then those in the text without common errors."""
    for candidate in (text, _repair_json(text)):
        values: list[Any] = []
        position, errors = 0, 0
        while errors < _MAX_DECODE_ERRORS and (match := _OPENING.search(candidate, position)):
            try:
                value, position = _DECODER.raw_decode(candidate, match.start())
                values.append(value)
            except (ValueError, RecursionError):
                position, errors = match.start() + 1, errors + 1
        yield values


def _repair_json(text: str) -> str:
    """Return the text without trailing commas, and with the backslash of invalid escapes escaped."""
    text = _INVALID_ESCAPE.sub(_repair_escape, text)
    return _STRING_OR_COMMA.sub(lambda match: "" if match[0] == "," else match[0], text)


def _repair_escape(match: re.Match[str]) -> str:
    if match[1] is None:
        return match[0]
    return "'" if match[1] == "'" else f"\\\\{match[1]}"


def _unwrap(value: Any, names: frozenset[str], depth: int = 0) -> dict[str, Any] | None:
    """Return the object with one of the fields `names`, which may be in a list, in a single field, or in a string."""
    if depth > _MAX_NESTED_TEXTS:
        return None
    if isinstance(value, list) and len(value) == 1:
        return _unwrap(value[0], names, depth + 1)
    if isinstance(value, str) and value.lstrip().startswith(("{", "```", "[")):
        inner = next((values[0] for values in _decode(value) if len(values) == 1), None)
        return _unwrap(inner, names, depth + 1)
    if not isinstance(value, dict):
        return None
    fields = {str(name).strip().lower(): item for name, item in value.items()}
    matching = [fields[name] for name in names if name in fields]
    if matching:
        nested = (_unwrap(item, names, depth + 1) for item in matching if isinstance(item, str | dict))
        return next((item for item in nested if item is not None), fields)
    if len(fields) == 1:
        return _unwrap(next(iter(fields.values())), names, depth + 1)
    return None
