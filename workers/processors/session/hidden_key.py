"""Hide the API key in what a service returns: it may echo the key in an error or an answer, and both are published."""

from __future__ import annotations

import re
from typing import Any, Final

PLACEHOLDER: Final = "[API key]"
_MIN_CUT_CHARACTERS: Final = 24
"""A key of this length is also hidden if it was cut in its second half."""
_ENTITIES: Final = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "apos"}


class HiddenKey:
    """The key of one service, also if some of its characters are escaped as in JSON, URLs or HTML.

    Args:
        key: The key. Its characters are printable and ASCII.
        min_characters: Shorter keys are not hidden. They may be words.
        may_be_cut: Whether a long key is also hidden if its end is missing.
    """

    def __init__(self, key: str | None, *, min_characters: int, may_be_cut: bool) -> None:
        usable = key if key is not None and len(key) >= min_characters else ""
        patterns = list(map(_build_pattern, usable))
        head = len(usable) // 2 if may_be_cut and len(usable) >= _MIN_CUT_CHARACTERS else len(usable)
        self._head = re.compile("".join(patterns[:head])) if usable else None
        self._rest = list(map(re.compile, patterns[head:]))

    def hide(self, text: str) -> str:
        """Return the text with a placeholder instead of the key."""
        parts: list[str] = []
        end = 0
        while self._head is not None and (match := self._head.search(text, end)) is not None:
            parts += text[end : match.start()], PLACEHOLDER
            end = match.end()
            for pattern in self._rest:
                if (following := pattern.match(text, end)) is None:
                    break
                end = following.end()
        return "".join([*parts, text[end:]])

    def hide_in_json(self, value: Any) -> Any:
        """Return a JSON value with a placeholder instead of the key in its texts.

        Raises:
            RecursionError: The value is nested hundreds of levels deep.
        """
        if self._head is None:
            return value
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, dict):
            return {name: self.hide_in_json(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.hide_in_json(item) for item in value]
        return value


def _build_pattern(character: str) -> str:
    """Return a regular expression for a character and its escaped forms. The time to search grows linearly."""
    code = ord(character)
    escaped = f"%{code:02x}|&#0{{0,4}}{code};|&#x0{{0,4}}{code:x};|u00{code:02x}"
    entity = f"&{_ENTITIES[character]};|" if character in _ENTITIES else ""
    return (
        rf"\\{{0,8}}(?:{entity}(?i:{escaped})|{re.escape(character)})"  # `&` itself last: it begins the escaped forms
    )
