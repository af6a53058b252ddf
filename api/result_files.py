"""Open stored result files for responses."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

import structlog
from starlette.requests import Request

from jobledger.api.context import get_api_context
from jobledger.api.http.errors import ApiError
from jobledger.api.http.streaming import run_until_first, wait_for_disconnect
from jobledger.ledger.domain.errors import FileDamaged, FileLost
from jobledger.ledger.files.file_store import OpenFile
from jobledger.ledger.mongo.connection import Document

_log = structlog.get_logger()
UNTRUSTED_CONTENT_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    # A result may be HTML or SVG from any source.
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; media-src 'self'; "
    "sandbox",
    "Cache-Control": "private, no-cache",
    "Referrer-Policy": "no-referrer",  # the URL may be a signed link
}
"""Headers of every response with content that users or processors made."""


async def open_result_file(request: Request, row: Document) -> OpenFile:
    """Open the content of a row of the view `files`. If the client disconnects, hashing a large file stops.

    Raises:
        ApiError: 500, the file is missing in the store or was changed there; 400, the client disconnected.
    """
    store = get_api_context(request).file_store
    try:
        return await _open_unless_disconnected(request, store.open(row["sha256"], row["size"]))
    except FileDamaged as error:
        _log.error("result file corrupted", path=row["path"], error=str(error))
        message = f"{row['path']} was changed in this server's results.store. Restore it from the backup."
        raise ApiError(500, "file_damaged", message) from error
    except FileLost as error:
        _log.error("result file missing", path=row["path"], error=str(error))
        message = (
            f"{row['path']} is missing in this server's results.store. All processes must use the same store: check "
            "results.store."
        )
        raise ApiError(500, "file_missing", message) from error


async def _open_unless_disconnected(request: Request, opening: Coroutine[Any, Any, OpenFile]) -> OpenFile:
    work = asyncio.create_task(opening, name="open-file")
    try:
        await run_until_first(work, wait_for_disconnect(request.receive))
    except BaseException:
        if work.done() and not work.cancelled() and work.exception() is None:  # it was opened before the cancellation
            await work.result().close()
        raise
    if work.cancelled():
        raise ApiError(400, "incomplete_body", "The client disconnected.")
    return work.result()
