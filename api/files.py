"""api: result files over their URLs."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from api.errors import ApiError
from api.services import services, views_reach_wanted_position
from projections import files as view

_NO_SCRIPTS: Final = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; media-src 'self'; sandbox"


async def single(request: Request) -> Response:
    """GET /api/events/files/{path}

    A path is only ever looked up in the view; it never touches a file system.
    """
    await views_reach_wanted_position(request)
    known, path = services(request), request.path_params["path"]
    file = await view.get(known.db, path)
    if file is None:
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
    return FileResponse(
        known.store.path(file["sha256"]),
        headers=headers,
        media_type=file["media_type"],
        filename=path.rpartition("/")[2],
        content_disposition_type="inline",
    )
