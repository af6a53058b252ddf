"""Previews of Markdown results for job pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from jobledger.api.processes.markdown_previewer import MarkdownPreviewer
from jobledger.ledger.domain.errors import FileLost, FileStoreUnavailable
from jobledger.ledger.files.file_store import FileStore

MAX_MARKDOWN_BYTES: Final = 256 * 1024
"""A one-hour talk with its transcript and a translation has about 100 KiB."""


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
        FileStoreUnavailable: The result store does not respond.
    """
    reader = await file_store.open(file["sha256"], file["size"])
    try:
        return b"".join([chunk async for chunk in reader.read(0, min(reader.size, limit))])
    finally:
        await reader.close()
