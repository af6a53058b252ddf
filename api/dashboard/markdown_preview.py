"""api: previews of Markdown results, for the page of a job."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from typing import Final

from markupsafe import Markup
from pydantic_core import to_json

from jobledger.api.processes.limited_function import CallFailed, LimitedFunction, ProcessPoolBusy

MAX_MARKDOWN_BYTES: Final = 256 * 1024
"""A talk of an hour with its transcript and a translation has about 100 KiB."""
_MAX_PROCESSES: Final = 2
_QUEUE_TIMEOUT_SECONDS: Final = 1.0
_TIMEOUT_SECONDS: Final = 2.0
_CACHE_SIZE: Final = 32
_RETRY_SECONDS: Final = 60.0
"""After a failed call. It may have failed because the machine was busy."""


class MarkdownPreviewer:
    """Renders Markdown in limited processes, and keeps the last results. None stands for text without a preview."""

    def __init__(self, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._seconds = timeout_seconds
        self._function = LimitedFunction(
            "jobledger.api.dashboard.markdown:render", processes=_MAX_PROCESSES, queue_seconds=_QUEUE_TIMEOUT_SECONDS
        )
        self._cached: OrderedDict[tuple[str, str], tuple[Markup | None, float]] = OrderedDict()
        """Results, and until when they hold."""

    async def render(self, sha256: str, markdown: str, *, files_url: str) -> Markup | None:
        """Return Markdown as HTML, or None if that takes too long, is too large, or cannot be done now.

        Args:
            sha256: Digest of the Markdown.
            markdown: The Markdown.
            files_at: Address of the folder with the files beside it.
        """
        key, now = (sha256, files_url), asyncio.get_running_loop().time()
        found, until = self._cached.get(key, (None, now))
        if until <= now:
            try:
                found, until = await self._call(markdown, files_url), math.inf
            except ProcessPoolBusy:
                return None
            except CallFailed:
                found, until = None, now + _RETRY_SECONDS
        self._cached[key] = found, until
        self._cached.move_to_end(key)
        if len(self._cached) > _CACHE_SIZE:
            self._cached.popitem(last=False)
        return found

    async def _call(self, markdown: str, files_at: str) -> Markup | None:
        html = await self._function.call(to_json((markdown, files_at)), self._seconds)
        return None if html is None else Markup(html)  # noqa: S704 - HTML in the text is escaped

    async def close(self) -> None:
        """End the processes."""
        await self._function.close()
