"""Select events of the log for a caller: by type, job and batch, and by access."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from jobledger.api.auth.stream_access import StreamAccessCache
from jobledger.api.http.errors import ApiError
from jobledger.api.resources import BATCH, JOB
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.events import EVENT_TYPES, PositionVoided, RecordedEvent

_VISIBILITY_TIMEOUT_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class EventFilter:
    """The events that a caller asks for: of `types` (empty: all), of a job, or of a batch and its jobs."""

    types: frozenset[str]
    job_id: str | None = None
    batch_id: str | None = None

    @property
    def stream_ids(self) -> list[str]:
        """The job and the batch that the caller must be able to read."""
        return [stream for stream in (self.job_id, self.batch_id) if stream is not None]

    def matches(self, event: RecordedEvent) -> bool:
        """Return whether the caller asks for an event. Voided positions are returned only if `types` names them."""
        if event.type not in self.types if self.types else event.type == PositionVoided.__name__:
            return False
        if self.job_id is not None and event.stream != self.job_id:
            return False
        return self.batch_id is None or self.batch_id in (event.stream, event.meta.correlation_id)


def parse_event_types(text: str | None) -> frozenset[str]:
    """Return the event types of a list with commas. Empty: all types.

    Raises:
        ApiError: 422, there is no such type.
    """
    names = text.split(",") if text else []
    if unknown := [name for name in names if name not in EVENT_TYPES]:
        message = f"types: unknown event type {unknown[0][:100]!r}. docs/reference/events.md lists the event types."
        raise ApiError(422, "unknown_event_type", message)
    return frozenset(names)


async def wait_for_stream_access(stream_access: StreamAccessCache, position: int) -> None:
    """Wait until this process knows all access changes up to a position.

    Raises:
        ApiError: 503, this takes too long.
    """
    try:
        async with asyncio.timeout(_VISIBILITY_TIMEOUT_SECONDS):
            await stream_access.wait_for_position(position)
    except TimeoutError:
        message = "This process has not read all access changes yet. Retry in a moment."
        raise ApiError(503, "visibility_not_ready", message, retry_after_seconds=2) from None


async def check_readable(stream_access: StreamAccessCache, principal: Principal, stream: str) -> None:
    """Check that a job or batch exists and that a principal may read it.

    Raises:
        ApiError: 404.
    """
    if not await stream_access.can_follow(principal, stream) or (
        principal.is_admin and await stream_access.get_access(stream) is None
    ):
        raise (BATCH if BATCH.is_id(stream) else JOB).not_found_error(stream)
