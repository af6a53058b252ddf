"""Base classes, field types and query parameters of requests that several topics share."""

from __future__ import annotations

from base64 import urlsafe_b64decode
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from jobledger.ledger.domain import limits
from jobledger.ledger.domain.canonical_json import MAX_SAFE_INTEGER
from jobledger.ledger.domain.events import AccessControl, truncate_to_milliseconds
from jobledger.ledger.domain.timestamps import EXAMPLE_TIMESTAMP, parse_timestamp
from jobledger.projections.views.paging import PageCursor, PageRequest

MAX_PAGE_SIZE = 1000


def _read_datetime(value: object) -> object:
    """Accept ISO 8601 only: pydantic would read a bare number as seconds since 1970."""
    if isinstance(value, datetime):
        return value
    if isinstance(value, str):
        return parse_timestamp(value)
    raise ValueError(f"expected a time with an offset, such as {EXAMPLE_TIMESTAMP}")


def _read_cursor(text: object) -> object:
    """Decode a cursor that `api.pagination.encode_cursor` made."""
    if not isinstance(text, str):
        return text
    try:
        milliseconds, _, key = urlsafe_b64decode(text.encode()).decode().partition(" ")
        return PageCursor(datetime.fromtimestamp(int(milliseconds) / 1000, UTC), key)
    except (ValueError, OverflowError, OSError):
        raise ValueError("not a cursor: send the `next_cursor` of the previous page") from None


def _read_point_in_time(text: object) -> object:
    if not isinstance(text, str):
        return text
    if text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= MAX_SAFE_INTEGER:
        return int(text)
    if "-" not in text:
        raise ValueError(f"expected a position of the log, or a time with an offset, such as {EXAMPLE_TIMESTAMP}")
    return truncate_to_milliseconds(parse_timestamp(text))


IsoDatetime = Annotated[datetime, BeforeValidator(_read_datetime), AfterValidator(truncate_to_milliseconds)]
PointInTime = Annotated[int | datetime, BeforeValidator(_read_point_in_time), WithJsonSchema({"type": "string"})]
Cursor = Annotated[PageCursor, BeforeValidator(_read_cursor), WithJsonSchema({"type": "string"})]
SearchText = Annotated[str, Field(min_length=1, max_length=200)]
JobIdPrefix = Annotated[str, Field(pattern=r"^job-[0-9A-Za-z_-]{8,}$", max_length=200)]
"""The first eight digits of an ID are a time in seconds, so few IDs begin with the same."""
BatchIdPrefix = Annotated[str, Field(pattern=r"^batch-[0-9A-Za-z_-]{8,}$", max_length=200)]
AccessNames = Annotated[
    list[Annotated[str, Field(max_length=limits.MAX_NAME_CHARACTERS)]], Field(max_length=limits.MAX_ACCESS_NAMES)
]


class RequestModel(BaseModel):
    """A request body or the query parameters of a request. Unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid")


class AccessBody(AccessControl):
    """Who else may read or change the resource."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    read_access: AccessNames = Field([])
    write_access: AccessNames = Field([])
    admin_access: AccessNames = Field([])

    @model_validator(mode="after")
    def _check_total(self) -> AccessBody:
        total = len(self.read_access) + len(self.write_access) + len(self.admin_access)
        if total > limits.MAX_ACCESS_NAMES:
            raise ValueError(f"the lists have {total} names together, at most {limits.MAX_ACCESS_NAMES} are allowed")
        return self


class ReasonBody(RequestModel):
    """Why an action is done. The reason is recorded in the event."""

    reason: str | None = Field(None, max_length=limits.MAX_REASON_CHARACTERS)


class PageQuery(RequestModel):
    """A page of a list. `cursor` continues after the previous page, regardless of later writes."""

    limit: int = Field(100, ge=1, le=MAX_PAGE_SIZE)
    skip: int = Field(0, ge=0, le=1_000_000)
    cursor: Cursor | None = None
    sort: Literal["-created_at", "created_at"] = "-created_at"
    min_position: str | None = None

    @model_validator(mode="after")
    def _check_cursor_or_skip(self) -> PageQuery:
        if self.cursor is not None and self.skip:
            raise ValueError("use either `cursor` or `skip`, not both")
        return self

    @property
    def page_request(self) -> PageRequest:
        return PageRequest(self.limit, self.skip, self.cursor, newest_first=self.sort.startswith("-"))


class AsOfQuery(RequestModel):
    """Return the current state, or the state at a position of the log or at a time."""

    as_of: PointInTime | None = None
    min_position: str | None = None


class NoQuery(RequestModel):
    """No query parameters."""


class MinPositionQuery(RequestModel):
    """The position that the views must have reached."""

    min_position: str | None = None
