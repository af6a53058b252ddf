"""Request and response models of the event log: events, histories and log entries."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from jobledger.api.schemas.request_models import MAX_PAGE_SIZE, RequestModel
from jobledger.api.schemas.response_models import SuccessResponse
from jobledger.ledger.domain.canonical_json import MAX_SAFE_INTEGER
from jobledger.ledger.domain.events import LogEntry

_NEXT_PAGE = "The `after_version` of the next page. Absent on the last page."

# Requests ---------------------------------------------------------------------------------------------------------


class StreamQuery(RequestModel):
    """Which events to stream, and the position to start after."""

    after: int | None = Field(None, ge=0, le=MAX_SAFE_INTEGER)
    types: str | None = None
    job_id: str | None = None
    batch_id: str | None = None


class EventListQuery(RequestModel):
    """A page of the log."""

    after: int = Field(0, ge=0, le=MAX_SAFE_INTEGER)
    limit: int = Field(100, ge=1, le=MAX_PAGE_SIZE)
    types: str | None = None
    stream: str | None = Field(None, min_length=1, max_length=200)


class HistoryQuery(RequestModel):
    """A page of one stream, by the versions of its events."""

    after_version: int = Field(0, ge=0, le=MAX_SAFE_INTEGER)
    limit: int = Field(100, ge=1, le=MAX_PAGE_SIZE)


# Responses --------------------------------------------------------------------------------------------------------


class EventMetadataResource(BaseModel):
    """The origin of an event."""

    actor: str
    correlation_id: str = Field("", description="The batch of the event.")
    causation_id: str = ""
    traceparent: str = ""
    request_fingerprint: str = Field(
        "", description="Identifies the request with an Idempotency-Key that caused the event."
    )


class EventResource(BaseModel):
    """A recorded event. The fields of `data` depend on `type`."""

    position: int
    event_id: str
    stream: str
    version: int
    type: str
    time: datetime
    schema_version: int = Field(alias="schema")
    data: dict[str, Any]
    meta: EventMetadataResource
    hash: str | None = Field(description="null without admin access, because it covers hidden content.")
    unreadable: str | None = Field(None, description="Why an event that was changed in the database is not shown.")


class HistoryResponse(SuccessResponse):
    """A page of the events of one stream."""

    events: list[EventResource]
    next_after_version: int | None = Field(None, description=_NEXT_PAGE)


class LogEntryResource(LogEntry):
    """A log entry. Entries that were logged together come from one event and have the same `version`."""

    attempt: int | None
    version: int


class LogEntriesResponse(SuccessResponse):
    """A page of log entries."""

    logs: list[LogEntryResource]
    next_after_version: int | None = Field(None, description=_NEXT_PAGE)


class EventListResponse(SuccessResponse):
    """A page of the log. `last_position` is the last position scanned: the `after` of the next page."""

    events: list[EventResource]
    last_position: int
    head: int


class ProjectorStatus(BaseModel):
    """The position of the views, and how many positions they are behind the log."""

    position: int
    lag: int


class LogHeadResponse(SuccessResponse):
    """The newest and the oldest position of the log, and the position of the views."""

    head: int
    oldest: int
    projector: ProjectorStatus
