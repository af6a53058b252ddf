"""Translate the warnings of a document to its language. Pure. `messages.yaml` has the sentences.

Warnings are stored in English, because a job has them too. A part of a warning that is not listed stays in English.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from functools import cache, partial
from importlib.resources import files
from typing import Final

import yaml
from babel.numbers import format_decimal

_PLACEHOLDER: Final = re.compile(r"\{(number|text|url)(\d?)\}")
_VALUES: Final = {"number": r"(?<![\d,])\d[\d,]{0,20}(?:\.\d{1,9})?", "text": r".{1,300}?", "url": r"(?<!\S)\S{1,3000}"}


def localize_message(message: str, language: str) -> str:
    """Return a message with its known parts in a language, such as `de`."""
    for pattern, translation in _load_messages().get(language, ()):
        message = pattern.sub(partial(_fill, translation, language), message)
    return message


def _fill(translation: str, language: str, match: re.Match[str]) -> str:
    def get_value(placeholder: re.Match[str]) -> str:
        value = match[placeholder[1] + placeholder[2]]
        return _format_number(value, language) if placeholder[1] == "number" else value

    return _PLACEHOLDER.sub(get_value, translation)


def _format_number(text: str, language: str) -> str:
    try:
        return str(format_decimal(Decimal(text.replace(",", "")), locale=language))
    except InvalidOperation:
        return text


@cache
def _load_messages() -> dict[str, list[tuple[re.Pattern[str], str]]]:
    """Return patterns of the English messages, longest first, with the translations, by language."""
    source = yaml.safe_load(files(__package__).joinpath("messages.yaml").read_text(encoding="utf-8"))
    return {
        language: [(_compile(text), messages[text]) for text in sorted(messages, key=len, reverse=True)]
        for language, messages in source.items()
    }


def _compile(text: str) -> re.Pattern[str]:
    """Return the pattern of a message with placeholders."""
    pattern, end = "", 0
    for placeholder in _PLACEHOLDER.finditer(text):
        value = f"(?P<{placeholder[1]}{placeholder[2]}>{_VALUES[placeholder[1]]})"
        pattern += re.escape(text[end : placeholder.start()]) + value
        end = placeholder.end()
    return re.compile(pattern + re.escape(text[end:]))
