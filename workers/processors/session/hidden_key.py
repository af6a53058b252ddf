"""Hide the API key in what a service returns: it may echo the key in an error or an answer, and both are published."""

from __future__ import annotations

import html
import re
from typing import Any, Final
from urllib.parse import quote

PLACEHOLDER: Final = "[API key]"
MIN_CHARACTERS: Final = 8
"""Shorter keys are not hidden. Services without access control get any word as a key, such as `none`."""
_MIN_CUT_CHARACTERS: Final = 24
"""A key of this length is also hidden if it was cut in its second half."""


class HiddenKey:
    """The key of one service, also in the forms that URLs and HTML give it."""

    def __init__(self, key: str | None) -> None:
        self._forms = _list_forms(key) if key is not None and len(key) >= MIN_CHARACTERS else []
        heads = {form if len(form) < _MIN_CUT_CHARACTERS else form[: len(form) // 2] for form in self._forms}
        self._head = re.compile("|".join(map(re.escape, sorted(heads)))) if heads else None

    def hide(self, text: str) -> str:
        """Return the text with a placeholder instead of the key."""
        parts: list[str] = []
        end = 0
        while self._head is not None and (match := self._head.search(text, end)) is not None:
            start = match.start()
            parts += text[end:start], PLACEHOLDER
            end = start + max(_count_equal(text, start, form) for form in self._forms)
        return "".join([*parts, text[end:]])

    def hide_in_json(self, value: Any) -> Any:
        """Return a JSON value with a placeholder instead of the key in its texts."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, dict):
            return {name: self.hide_in_json(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.hide_in_json(item) for item in value]
        return value


def _list_forms(key: str) -> list[str]:
    encoded = [quote(key, safe=""), quote(key)]
    lower = [re.sub("%[0-9A-F]{2}", lambda code: code[0].lower(), form) for form in encoded]
    return [key, *encoded, *lower, html.escape(key)]


def _count_equal(text: str, start: int, form: str) -> int:
    """Return how many characters of the text from `start` on are those of `form`."""
    return next((n for n, char in enumerate(form) if text[start + n : start + n + 1] != char), len(form))
