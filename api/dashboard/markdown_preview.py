"""Previews of Markdown results for job pages."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from markupsafe import Markup
from pydantic_core import to_json

from jobledger.api.processes.limited_function import CallFailed, LimitedFunction, ProcessPoolBusy
from jobledger.ledger.domain.errors import FileLost, FileStoreUnavailable
from jobledger.ledger.files.file_store import FileStore

MAX_MARKDOWN_BYTES: Final = 256 * 1024
"""A one-hour talk with its transcript and a translation has about 100 KiB."""
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
        self._function = LimitedFunction(
            "jobledger.api.dashboard.markdown:render", processes=_MAX_PROCESSES, queue_seconds=_QUEUE_TIMEOUT_SECONDS
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
                rendered = await self._function.call(to_json((markdown, files_url)), self._timeout_seconds)
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
        await self._function.close()


async def render_result_preview(
    previewer: MarkdownPreviewer, file_store: FileStore, results: Mapping[str, Any], root_path: str
) -> str | None:
    """Return the preview of a job's Markdown result, from the results that the API returns.

    It is HTML as `Markup`, or text if the result is too large or takes too long to render. None without a readable
    result.
    """
    path = (results.get("markdown_file") or "").removeprefix("/events/")
    markdown_file = next((file for file in results.get("files", ()) if file["path"] == path), None)
    if markdown_file is None:
        return None
    try:
        content = await _read_prefix(file_store, markdown_file, MAX_MARKDOWN_BYTES + 1)
    except (FileLost, FileStoreUnavailable):
        return None  # the response of the file itself reports the error
    text = content.decode("utf-8", "replace")
    if len(content) > MAX_MARKDOWN_BYTES:
        return text
    folder = quote(path.rpartition("/")[0], safe="/&,+;=@!$~")
    files_url = f"{root_path}api/events/files/{folder}/"
    return await previewer.render(markdown_file["sha256"], text, files_url=files_url) or text


async def _read_prefix(file_store: FileStore, file: Mapping[str, Any], limit: int) -> bytes:
    """Return the first `limit` bytes of a result file.

    Raises:
        FileLost: The file is missing or was changed.
        FileStoreUnavailable: The file store does not respond.
    """
    reader = await file_store.open(file["sha256"], file["size"])
    try:
        return b"".join([chunk async for chunk in reader.read(0, min(reader.size, limit))])
    finally:
        await reader.close()
