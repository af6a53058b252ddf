"""api: result files over their URLs, whole or in parts, and signed links to them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Coroutine, Sequence
from datetime import timedelta
from hashlib import blake2b
from typing import Any, Final

import structlog
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import can_read, require_user_id
from jobledger.api.auth.signed_links import FILES_URL, MAX_LIFETIME_SECONDS, is_signed_link_request
from jobledger.api.context import get_api_context, parse_query, wait_for_requested_position
from jobledger.api.http.bodies import read_optional_json_body
from jobledger.api.http.conditional import Conditional, Range
from jobledger.api.http.errors import ApiError, error_response, json_response
from jobledger.api.http.streaming import CloseableStreamingResponse, content_disposition, content_type
from jobledger.ledger.domain.errors import FileDamaged, FileLost
from jobledger.ledger.files.directory import OpenFile
from jobledger.ledger.mongo.connection import Document
from jobledger.projections.views import files as view

_log = structlog.get_logger()
UNTRUSTED_CONTENT_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    # A result may be HTML or SVG from anywhere.
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; media-src 'self'; "
    "sandbox",
    "Cache-Control": "private, no-cache",
    "Referrer-Policy": "no-referrer",  # the address may be a signed link
}
"""What is said with all content that others have made."""


class FileQuery(BaseModel):
    """How a file is wanted. `expires` and `signature` come with a signed link."""

    model_config = ConfigDict(extra="forbid")

    download: bool = False
    expires: str = ""
    signature: str = ""
    min_position: str | None = None


class LinkBody(BaseModel):
    """How long a signed link is to open."""

    model_config = ConfigDict(extra="forbid")

    expires_in_s: int = Field(3600, ge=1, le=MAX_LIFETIME_SECONDS)


async def get_file(request: Request) -> Response:
    """GET /api/events/files/{path}

    A path is only ever looked up in the view; it never touches a file system.
    """
    asked = parse_query(request, FileQuery)
    await wait_for_requested_position(request)
    row = await _by_link(request, asked) if is_signed_link_request(request) else await _readable(request)
    conditional = Conditional(request.headers, compute_file_etag(row), row["modified_at"])
    headers = {**UNTRUSTED_CONTENT_HEADERS, **conditional.headers}
    if conditional.is_not_modified():
        return Response(status_code=304, headers=headers)
    name = row["path"].rpartition("/")[2]
    headers |= {
        "Accept-Ranges": "bytes",
        "Content-Type": content_type(row["media_type"]),
        "Content-Disposition": content_disposition(name, attachment=asked.download),
    }
    file = await open_result_file(request, row)
    try:
        return await _answer(request, file, conditional, headers)
    except BaseException:
        await file.close()
        raise


async def create_signed_link(request: Request) -> Response:
    """POST /api/events/files/{path}/link"""
    body, _ = await read_optional_json_body(request, LinkBody)
    row = await _readable(request)
    require_user_id(request)  # a link outlives the right by which it was asked for, so somebody has to have asked
    until = (await get_api_context(request).event_store.server_time()).replace(microsecond=0) + timedelta(
        seconds=body.expires_in_s
    )
    url = await get_api_context(request).signed_links.create(row, until)
    return json_response({"status": "success", "url": url, "expires_at": until})


def compute_file_etag(row: Document) -> str:
    """Return the ETag of a result file: the digest of its content, and of the media type it is sent with."""
    return f'"{row["sha256"]}-{blake2b(row["media_type"].encode(), digest_size=4).hexdigest()}"'


def _path(request: Request) -> str:
    """Return the path as it was asked for: the router's `$` lets a line break at its end pass."""
    path: str = request.scope["path"]
    return path.removeprefix(FILES_URL).removesuffix("/link" if request.method == "POST" else "")


async def _readable(request: Request) -> Document:
    path = _path(request)
    row = await view.get(get_api_context(request).views, path)
    if row is None or not can_read(request, row):
        raise ApiError(404, "file_not_found", f"There is no result file {path[:200]}.")
    return row


async def _by_link(request: Request, asked: FileQuery) -> Document:
    known = get_api_context(request)
    row = await view.get(known.views, _path(request))
    await known.signed_links.verify(
        row, expires=asked.expires, signature=asked.signature, now=known.event_store.clock.estimate()
    )
    assert row is not None  # noqa: S101 - narrows the type; no link opens what is not there
    return row


async def open_result_file(request: Request, row: Document) -> OpenFile:
    """Open the content that a row of the view names. Hashing a large file ends when the client goes away.

    Raises:
        ApiError: 500, when it is not in the store, or was changed there; 400, when the client went away.
    """
    store = get_api_context(request).file_store
    try:
        return await _unless_gone(request, store.open(row["sha256"], row["size"]))
    except FileDamaged as error:
        _log.error("a result file was changed in the store", path=row["path"], error=str(error))
        message = f"{row['path']} was changed in this server's results.store and is not served."
        raise ApiError(500, "file_damaged", message) from error
    except FileLost as error:
        _log.error("a result file is not in the store", path=row["path"], error=str(error))
        message = (
            f"{row['path']} is on record, but not in this server's results.store: every process must see the same one."
        )
        raise ApiError(500, "file_missing", message) from error


async def _unless_gone(request: Request, opening: Coroutine[Any, Any, OpenFile]) -> OpenFile:
    work = asyncio.create_task(opening, name="open-file")
    gone = asyncio.create_task(_gone(request), name="open-file-gone")
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(400, "incomplete_body", "The client went away.")
    except BaseException:
        work.cancel()
        [file] = await asyncio.gather(work, return_exceptions=True)
        if not isinstance(file, BaseException):
            await file.close()
        raise
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
    return work.result()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer(request: Request, file: OpenFile, conditional: Conditional, headers: dict[str, str]) -> Response:
    """Return the file, or the parts of it that are asked for; whatever is returned closes it."""
    if request.method == "HEAD":  # ranges are for GET
        await file.close()
        return Response(headers={**headers, "Content-Length": str(file.size)})
    try:
        wanted = conditional.parse_ranges(file.size)
    except ApiError as refusal:
        await file.close()
        answer = error_response(refusal)
        answer.headers["Content-Range"] = f"bytes */{file.size}"
        return answer
    if len(wanted) > 1:
        return _several(file, wanted, headers)
    start, end = wanted[0] if wanted else (0, file.size)
    headers["Content-Length"] = str(end - start)
    if wanted:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    return CloseableStreamingResponse(file.read(start, end), 206 if wanted else 200, headers, on_close=file.close)


def _several(file: OpenFile, wanted: Sequence[Range], headers: dict[str, str]) -> Response:
    """Return several parts in one answer (RFC 9110, 14.6)."""
    boundary = secrets.token_hex(16)
    heads = [
        f"\r\n--{boundary}\r\nContent-Type: {headers['Content-Type']}\r\n"
        f"Content-Range: bytes {start}-{end - 1}/{file.size}\r\n\r\n".encode()
        for start, end in wanted
    ]
    last = f"\r\n--{boundary}--\r\n".encode()

    async def parts() -> AsyncGenerator[bytes, None]:
        for head, (start, end) in zip(heads, wanted, strict=True):
            yield head
            async for piece in file.read(start, end):
                yield piece
        yield last

    length = sum(end - start for start, end in wanted) + sum(map(len, heads)) + len(last)
    headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
    headers["Content-Length"] = str(length)
    return CloseableStreamingResponse(parts(), 206, headers, on_close=file.close)
