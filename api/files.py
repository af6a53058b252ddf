"""api: result files over their URLs."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from api.access import may_see
from api.errors import ApiError, error_response
from api.services import services, views_reach_wanted_position
from projections import files as view

_log = structlog.get_logger()
_NO_SCRIPTS: Final = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; media-src 'self'; sandbox"


async def single(request: Request) -> Response:
    """GET /api/events/files/{path}

    A path is only ever looked up in the view; it never touches a file system.
    """
    await views_reach_wanted_position(request)
    known, path = services(request), request.path_params["path"]
    file = await view.get(known.db, path)
    if file is None or not may_see(request, file):
        raise ApiError(404, "file_not_found", f"There is no result file {path}.")
    etag = f'"{file["sha256"]}"'
    headers = {
        "ETag": etag,
        "Cache-Control": "private, no-cache",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": _NO_SCRIPTS,  # a result may be HTML or SVG from anywhere
    }
    if etag in (tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers=headers)
    stored = known.store.path(file["sha256"])
    try:
        found = await asyncio.to_thread(stored.stat)
    except OSError as error:
        _log.error("a result file is not in the store", path=path, stored=str(stored), error=error.strerror)
        message = f"{path} is on record, but not in this server's results.store: every process must see the same one."
        raise ApiError(500, "file_missing", message) from error
    return _Result(
        stored,
        headers=headers,
        stat_result=found,
        media_type=file["media_type"],
        filename=path.rpartition("/")[2],
        content_disposition_type="inline",
    )


class _Result(FileResponse):
    """A file. A range that it does not have is refused in our envelope, not in Starlette's plain text."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused: Message | None = None

        async def unless_refused(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                refused = message
            if refused is None:
                await send(message)

        await super().__call__(scope, receive, unless_refused)
        if refused is not None:
            answer = error_response(
                ApiError(416, "range_not_satisfiable", f"The file has no such range: it has {self.size} bytes.")
            )
            answer.headers["Content-Range"] = f"bytes */{self.size}"
            await answer(scope, receive, send)

    @property
    def size(self) -> int:
        return self.stat_result.st_size if self.stat_result else 0
