"""The header `Prefer: wait` (RFC 7240): delay the response until a job or batch has finished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from starlette.requests import Request

from jobledger.api.http.limits import track_waiting_request

MAX_WAIT_SECONDS: Final = 60


@contextmanager
def apply_wait_preference(request: Request) -> Iterator[float]:
    """Yield how many seconds to wait, 0 for not at all. Count the request as waiting while the block runs.

    Releases the memory that was reserved for the body, because nothing of it is used after the wait. Adds the applied
    preference to the response. If too many requests are waiting, the preference is not applied (RFC 7240, 2).
    """
    seconds = _parse_wait_seconds(request)
    if not seconds:
        yield 0
        return
    with track_waiting_request(request.scope) as is_allowed:
        if is_allowed:
            request.scope["preference_applied"] = f"wait={seconds}"
            request.scope["memory_reservation"].release()
        yield seconds if is_allowed else 0


def prefers_wait(request: Request) -> bool:
    """Return whether the request asks to wait until a job or batch has finished."""
    return "prefer" in request.headers and _parse_wait_seconds(request) > 0


def _parse_wait_seconds(request: Request) -> int:
    """Return the seconds of `Prefer: wait`. RFC 7240 requires that malformed preferences are ignored."""
    for preference in ",".join(request.headers.getlist("prefer")).split(","):
        name, _, value = preference.partition("=")
        seconds = value.strip().strip('"')
        if name.strip().lower() == "wait" and seconds.isascii() and seconds.isdecimal() and len(seconds) < 9:
            return min(int(seconds), MAX_WAIT_SECONDS)
    return 0
