"""Read your own writes: the header `Ledger-Position` of a request names a position that the views must have reached."""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.requests import Request

from jobledger.api.context import get_api_context
from jobledger.api.http.errors import ApiError
from jobledger.api.http.limits import track_waiting_request
from jobledger.projections.engine.checkpoint import CheckpointFollower

_SHORT_WAIT_SECONDS: Final = 1.0
"""How long a request waits for the views before it counts as a waiting request."""
_VIEW_WAIT_SECONDS: Final = 9.0


async def wait_for_requested_position(request: Request) -> None:
    """Wait until the views have reached the `Ledger-Position` (or `min_position`) of the request, if it has one.

    Raises:
        ApiError: 400, the position is malformed; 422, it is after the end of the log; 503, the views did not reach it
            in time.
    """
    checkpoint = get_api_context(request).checkpoint
    requested = request.headers.get("ledger-position", request.query_params.get("min_position"))
    if requested is not None:
        if not requested.isascii() or not requested.isdecimal() or len(requested) > 18:
            message = f"Ledger-Position must be a whole number, got {requested[:40]!r}."
            raise ApiError(400, "malformed_position", message)
        if not await _wait_for_position(request, int(requested)):
            message = f"The views have reached position {checkpoint.position}, not {requested}. Retry in a moment."
            raise ApiError(503, "projection_lagging", message, retry_after_seconds=2)
    request.scope["ledger_position"] = checkpoint.position


async def _wait_for_position(request: Request, position: int) -> bool:
    """Wait until the views have reached a position. Return whether they reached it in time.

    Raises:
        ApiError: 422, the position is after the end of the log.
    """
    ctx = get_api_context(request)
    if ctx.checkpoint.position >= position:
        return True
    if not await ctx.event_store.may_have_reached(position):
        message = f"Ledger-Position: the log ends before position {position}. Send the value of an earlier response."
        raise ApiError(422, "invalid_content", message)
    if await _wait_for_checkpoint(ctx.checkpoint, position, _SHORT_WAIT_SECONDS):
        return True
    with track_waiting_request(request.scope) as is_allowed:
        return is_allowed and await _wait_for_checkpoint(ctx.checkpoint, position, _VIEW_WAIT_SECONDS)


async def _wait_for_checkpoint(checkpoint: CheckpointFollower, position: int, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await checkpoint.wait_for_position(position)
    except TimeoutError:
        return False
    return True
