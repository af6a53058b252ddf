"""Texts of the dashboard in English and German, from the gettext catalogs `locales/*.po`.

A message ID is a key such as `cancel_job`, not the English text. Placeholders are `{0}`, `{1}`, … A message with plural
forms takes its form from the first argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.resources import files
from typing import Final

from babel.messages.pofile import read_po
from babel.numbers import format_decimal
from markupsafe import Markup, escape

SUPPORTED_LANGUAGES: Final = ("en", "de")
_JOB_STATUSES: Final = ("pending", "processing", "completed", "failed", "cancelled")
SCRIPT_MESSAGE_KEYS: Final = (
    *_JOB_STATUSES,
    *("live", "reconnecting", "service_unreachable", "action_done"),
    *("selection", "confirm_bulk_restart", "confirm_bulk_cancel", "confirm_bulk_archive", "bulk_result"),
    *("attempt_number", "validation_passed", "invalid_json", "new_webhook_secrets"),
)
"""Messages that scripts show."""


@cache
def load_messages(language: str) -> Mapping[str, tuple[str, ...]]:
    """Return the catalog of a language: for each key the text, or the texts for one and for any other number."""
    with files(__package__).joinpath("locales", f"{language}.po").open("rb") as file:
        catalog = read_po(file)
    messages: dict[str, tuple[str, ...]] = {}
    for message in catalog:
        key = message.id if isinstance(message.id, str) else message.id[0]
        if key:  # the header of the catalog has an empty ID
            messages[key] = (message.string,) if isinstance(message.string, str) else tuple(message.string or ())
    return messages


def get_translator(language: str) -> Callable[..., str]:
    """Return the function `translate(key, *args)` that templates call `t`."""
    messages = load_messages(language)

    def translate(key: str, *args: object) -> str:
        forms = messages[key]
        text = forms[0 if args and args[0] == 1 else -1]
        values = [format_number(arg, language) if isinstance(arg, (int, float)) else arg for arg in args]
        if any(isinstance(value, Markup) for value in values):
            return escape(text).format(*values)
        return text.format(*values)

    return translate


def format_number(number: float, language: str) -> str:
    """Return a number as it is written in a language, with at most three decimal places: `1,234.5` or `1.234,5`."""
    return format_decimal(number, locale=language)


def get_script_messages(language: str) -> dict[str, tuple[str, ...]]:
    """Return the messages that scripts show, with their plural forms and placeholders."""
    messages = load_messages(language)
    return {key: messages[key] for key in SCRIPT_MESSAGE_KEYS}


def negotiate_language(accept_language: str) -> str:
    """Return the supported language that an `Accept-Language` header prefers (RFC 9110, 12.5.4)."""
    preferences: list[tuple[float, int, str]] = []
    for index, part in enumerate(accept_language.split(",")[:20]):
        name, _, quality = part.strip().partition(";q=")
        language = name.strip().partition("-")[0].lower()
        with suppress(ValueError):
            if language in SUPPORTED_LANGUAGES and float(quality or 1) > 0:
                preferences.append((-float(quality or 1), index, language))
    return min(preferences)[2] if preferences else SUPPORTED_LANGUAGES[0]
