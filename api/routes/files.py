"""Result files: download them whole or in parts, and create signed links to them."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from datetime import timedelta
from hashlib import blake2b

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import can_read, require_user_id
from jobledger.api.auth.signed_links import FILES_URL, is_signed_link_request
from jobledger.api.context import get_api_context
from jobledger.api.http.bodies import read_optional_json_body
from jobledger.api.http.conditional import ConditionalRequest, Range
from jobledger.api.http.errors import ApiError, build_error_response, build_json_response
from jobledger.api.http.streaming import CloseableStreamingResponse, format_content_disposition, format_content_type
from jobledger.api.http.validation import parse_query
from jobledger.api.ledger_position import wait_for_requested_position
from jobledger.api.openapi.operation import Operation
from jobledger.api.result_files import UNTRUSTED_CONTENT_HEADERS, open_result_file
from jobledger.api.schemas.files import FileQuery, LinkBody, SignedLinkResponse
from jobledger.ledger.files.file_store import OpenFile
from jobledger.ledger.mongo.connection import Document
from jobledger.projections.views import files as files_view


@Operation(
    "GET",
    "/api/events/files/{path:path}",
    response="*/*",
    query=FileQuery,
    is_from_views=True,
    error_codes=(
        "range_not_satisfiable",
        "link_expired",
        "link_invalid",
        "file_missing",
        "result_store_unavailable",
        "file_damaged",
    ),
    request_headers=("Range",),
    is_conditional=True,
)
async def get_file(request: Request) -> Response:
    """Download a result file.

    The path is only looked up in the view `files`. It is never used in a file system.
    """
    query = parse_query(request, FileQuery)
    await wait_for_requested_position(request)
    if is_signed_link_request(request):
        row = await _load_by_signed_link(request, query)
    else:
        row = await _load_readable(request)
    conditional = ConditionalRequest(request.headers, compute_file_etag(row), row["modified_at"])
    headers = {**UNTRUSTED_CONTENT_HEADERS, **conditional.headers}
    if conditional.is_not_modified():
        return Response(status_code=304, headers=headers)
    name = row["path"].rpartition("/")[2]
    headers |= {
        "Accept-Ranges": "bytes",
        "Content-Type": format_content_type(row["media_type"]),
        "Content-Disposition": format_content_disposition(name, attachment=query.download),
    }
    file = await open_result_file(request, row)
    try:
        return await _build_file_response(request, file, conditional, headers)
    except BaseException:
        await file.close()
        raise


@Operation(
    "POST",
    "/api/events/files/{path:path}/link",
    response=SignedLinkResponse,
    body=LinkBody,
    is_body_optional=True,
    can_append_events=False,
)
async def create_signed_link(request: Request) -> Response:
    """Create a signed link to a result file."""
    body, _ = await read_optional_json_body(request, LinkBody)
    row = await _load_readable(request)
    require_user_id(request)  # the link stays valid if access is revoked, so anonymous callers get none
    ctx = get_api_context(request)
    now = (await ctx.event_store.read_server_time()).replace(microsecond=0)
    expires_at = now + timedelta(seconds=body.expires_in_s)
    url = await ctx.signed_links.create(row, expires_at)
    return build_json_response({"status": "success", "url": url, "expires_at": expires_at})


def compute_file_etag(row: Document) -> str:
    """Return the ETag of a result file. It covers its content and its media type."""
    return f'"{row["sha256"]}-{blake2b(row["media_type"].encode(), digest_size=4).hexdigest()}"'


def _get_path(request: Request) -> str:
    """Return the requested path of the file. `path_params` would lack a line break at its end."""
    path: str = request.scope["path"]
    return path.removeprefix(FILES_URL).removesuffix("/link" if request.method == "POST" else "")


async def _load_readable(request: Request) -> Document:
    """Return the row of the view for the requested path.

    Raises:
        ApiError: 404.
    """
    path = _get_path(request)
    row = await files_view.get(get_api_context(request).views, path)
    if row is None or not can_read(request, row):
        raise ApiError(404, "file_not_found", f"Result file {path[:200]} not found.")
    return row


async def _load_by_signed_link(request: Request, query: FileQuery) -> Document:
    """Return the row of the view for a signed link.

    Raises:
        ApiError: 403, the link is invalid or has expired.
    """
    ctx = get_api_context(request)
    row = await files_view.get(ctx.views, _get_path(request))
    await ctx.signed_links.verify(
        row, expires=query.expires, signature=query.signature, now=ctx.event_store.clock.estimate()
    )
    assert row is not None  # noqa: S101 - narrows the type; verify() raises without a row
    return row


async def _build_file_response(
    request: Request, file: OpenFile, conditional: ConditionalRequest, headers: dict[str, str]
) -> Response:
    """Return the file or the requested parts of it. The response closes the file."""
    if request.method == "HEAD":  # RFC 9110, 14.2 defines Range for GET only
        await file.close()
        return Response(headers={**headers, "Content-Length": str(file.size)})
    try:
        ranges = conditional.parse_ranges(file.size)
    except ApiError as error:
        await file.close()
        response = build_error_response(error)
        response.headers["Content-Range"] = f"bytes */{file.size}"
        return response
    if len(ranges) > 1:
        return _build_multipart_response(file, ranges, headers)
    start, end = ranges[0] if ranges else (0, file.size)
    headers["Content-Length"] = str(end - start)
    if ranges:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    return CloseableStreamingResponse(file.read(start, end), 206 if ranges else 200, headers, on_close=file.close)


def _build_multipart_response(file: OpenFile, ranges: Sequence[Range], headers: dict[str, str]) -> Response:
    """Return several parts in one response (RFC 9110, 14.6)."""
    boundary = secrets.token_hex(16)
    part_headers = [
        f"\r\n--{boundary}\r\nContent-Type: {headers['Content-Type']}\r\n"
        f"Content-Range: bytes {start}-{end - 1}/{file.size}\r\n\r\n".encode()
        for start, end in ranges
    ]
    closing = f"\r\n--{boundary}--\r\n".encode()

    async def generate() -> AsyncGenerator[bytes, None]:
        for part_header, (start, end) in zip(part_headers, ranges, strict=True):
            yield part_header
            async for chunk in file.read(start, end):
                yield chunk
        yield closing

    length = sum(end - start for start, end in ranges) + sum(map(len, part_headers)) + len(closing)
    headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
    headers["Content-Length"] = str(length)
    return CloseableStreamingResponse(generate(), 206, headers, on_close=file.close)
