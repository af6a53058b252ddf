"""Limit the HTML size of a dashboard page, however large the values on the page are.

Templates output each value through `HtmlBudget.render_value` and loop over `HtmlBudget.limit_rows`. A value may take a
small share of the remaining budget, so late values are shown as well, but shorter. Loops end while enough is left for
the rest of the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from markupsafe import Markup, escape

MAX_PAGE_BYTES: Final = 1280 * 1024
_MAX_VALUE_CHARACTERS: Final = 16 * 1024
_SHARE_DIVISOR: Final = 64
_RESERVE_BYTES: Final = 128 * 1024
"""Budget for the values after loops. In a loop a value may take at least `_RESERVE_BYTES // _SHARE_DIVISOR` characters.

That is the length of a long URL.
"""
_MIN_VALUE_CHARACTERS: Final = 200
"""Characters of a value that are always shown."""
_MARKUP_OVERHEAD_BYTES: Final = 40
"""Average size of the template's markup around a value."""


class HtmlBudget:
    """The remaining HTML budget of one page, in bytes."""

    def __init__(self) -> None:
        self._remaining_bytes = MAX_PAGE_BYTES
        self.is_truncated = False
        """Whether a value or a loop was shortened."""

    def render_value(self, value: Any) -> Any:
        """Return a value as HTML, truncated to the budget. `Markup` is returned unchanged."""
        if isinstance(value, Markup):
            return value
        text = value if isinstance(value, str) else str(value)
        if len(text) > _MIN_VALUE_CHARACTERS:
            text = self._truncate(text)
        html = escape(text)
        self._remaining_bytes -= len(html.encode()) + _MARKUP_OVERHEAD_BYTES
        return html

    def limit_rows(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield items until the budget is used up."""
        for item in items:
            if self._remaining_bytes <= _RESERVE_BYTES:
                self.is_truncated = True
                return
            yield item

    def _truncate(self, text: str) -> str:
        limit = max(_MIN_VALUE_CHARACTERS, min(_MAX_VALUE_CHARACTERS, self._remaining_bytes // _SHARE_DIVISOR))
        if len(text) <= limit:
            return text
        self.is_truncated = True
        return f"{text[:limit]} … (+{len(text) - limit:,})"
