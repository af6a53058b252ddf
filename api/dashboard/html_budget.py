"""api: the budget of a page of the dashboard: how much HTML its values may become, however large the values are.

Templates output each value through `PageBudget.shown`, and loop over `PageBudget.rows`. A value may take a small share
of what is left, so late values are shown, too, but shorter. Loops end while there is enough left for what follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from markupsafe import Markup, escape

MAX_PAGE_BYTES: Final = 1280 * 1024
_MAX_VALUE_CHARACTERS: Final = 16 * 1024
_SHARE_DIVISOR: Final = 64
_RESERVE_BYTES: Final = 128 * 1024
"""For the values behind loops. Inside loops a value may take at least `_RESERVE_BYTES // _SHARE`, as long as a URL."""
_MIN_VALUE_CHARACTERS: Final = 200
"""Characters of a value that are always shown."""
_MARKUP_OVERHEAD_BYTES: Final = 40
"""What a template has around a value, on average."""


class HtmlBudget:
    """What is left of the budget of one page, in bytes of HTML."""

    def __init__(self) -> None:
        self._remaining_bytes = MAX_PAGE_BYTES
        self.is_truncated = False
        """Whether the page shows less than it was given."""

    def render_value(self, value: Any) -> Any:
        """Return a value as HTML, cut to what the budget allows. HTML that a template has made is returned as it is."""
        if isinstance(value, Markup):
            return value
        text = value if isinstance(value, str) else str(value)
        if len(text) > _MIN_VALUE_CHARACTERS:
            text = self._truncate(text)
        html = escape(text)
        self._remaining_bytes -= len(html.encode()) + _MARKUP_OVERHEAD_BYTES
        return html

    def limit_rows(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield items while there is a budget."""
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
