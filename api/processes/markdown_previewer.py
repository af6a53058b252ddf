"""Render Markdown in limited processes, with a cache."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from typing import Final

from markupsafe import Markup
from pydantic_core import to_json

from jobledger.api.processes.function_process_pool import CallFailed, FunctionProcessPool, ProcessPoolBusy

_MAX_PROCESSES: Final = 2
_QUEUE_TIMEOUT_SECONDS: Final = 1.0
_TIMEOUT_SECONDS: Final = 2.0
_CACHE_SIZE: Final = 32
_RETRY_SECONDS: Final = 60.0
"""Time until a failed call is repeated. It may have failed because the machine was busy."""


class MarkdownPreviewer:
    """Renders Markdown in limited processes and caches the last results. A cached None means that rendering failed."""

    def __init__(self, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._timeout_seconds = timeout_seconds
        self._pool = FunctionProcessPool(
            "jobledger.api.processes.markdown:render", processes=_MAX_PROCESSES, queue_seconds=_QUEUE_TIMEOUT_SECONDS
        )
        self._cache: OrderedDict[tuple[str, str], tuple[Markup | None, float]] = OrderedDict()
        """Results with their expiry, in seconds of the event loop's clock."""

    async def render(self, sha256: str, markdown: str, *, files_url: str) -> Markup | None:
        """Return Markdown as HTML, or None if rendering takes too long, is too large, or all processes are busy.

        Args:
            sha256: Digest of the Markdown. It identifies the cached result.
            markdown: The Markdown.
            files_url: URL of the folder that relative image paths refer to.
        """
        key, now = (sha256, files_url), asyncio.get_running_loop().time()
        html, expires_at = self._cache.get(key, (None, now))
        if expires_at <= now:
            try:
                rendered = await self._pool.call(to_json((markdown, files_url)), self._timeout_seconds)
                html = None if rendered is None else Markup(rendered)  # noqa: S704 - HTML in the text is escaped
                expires_at = math.inf
            except ProcessPoolBusy:
                return None
            except CallFailed:
                html, expires_at = None, now + _RETRY_SECONDS
        self._cache[key] = html, expires_at
        self._cache.move_to_end(key)
        if len(self._cache) > _CACHE_SIZE:
            self._cache.popitem(last=False)
        return html

    async def close(self) -> None:
        """Stop the processes."""
        await self._pool.close()
