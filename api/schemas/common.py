"""Request and response models that several topics share.

Routes send the documents of the views without passing them through the response models, because that would cost more
than the rest of the response. tests/api/test_answers.py checks that documents and models agree.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    WithJsonSchema,
    model_validator,
)

from jobledger.ledger.domain import limits
from jobledger.ledger.domain.canonical_json import MAX_SAFE_INTEGER
from jobledger.ledger.domain.events import AccessControl, truncate_to_milliseconds
from jobledger.ledger.domain.timestamps import EXAMPLE_TIMESTAMP, parse_timestamp
from jobledger.projections.views.paging import PageCursor

MAX_PAGE_SIZE = 1000

# Requests ---------------------------------------------------------------------------------------------------------


def _read_datetime(value: object) -> object:
    """Accept ISO 8601 only: pydantic would read a bare number as seconds since 1970."""
    if isinstance(value, datetime):
        return value
    if isinstance(value, str):
        return parse_timestamp(value)
    raise ValueError(f"expected a time with an offset, such as {EXAMPLE_TIMESTAMP}")


def _read_cursor(text: object) -> object:
    """Decode a cursor that `api.http.pagination.encode_cursor` made."""
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


class JobRestartBody(ReasonBody):
    """How to restart a job. By default, completed steps are reused."""

    reuse_steps: StrictBool = True


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
    def newest_first(self) -> bool:
        return self.sort.startswith("-")


class AsOfQuery(RequestModel):
    """Return the current state, or the state at a position of the log or at a time."""

    as_of: PointInTime | None = None
    min_position: str | None = None


class NoQuery(RequestModel):
    """No query parameters."""


class MinPositionQuery(RequestModel):
    """The position that the views must have reached."""

    min_position: str | None = None


# Responses --------------------------------------------------------------------------------------------------------


class FieldError(BaseModel):
    """An invalid field. `path` is its location, such as `jobs[3].parameters.url`."""

    path: str
    message: str


class ErrorResponse(BaseModel):
    """An error. `code` is for programs, `message` for people; `details.errors` lists invalid fields."""

    status: Literal["error"]
    code: str
    message: str
    details: dict[str, Any]


class SuccessResponse(BaseModel):
    """The request succeeded."""

    status: Literal["success"]


class ListResponse(SuccessResponse):
    total: int
    total_is_lower_bound: bool = Field(default=False, description="`total` is a lower bound.")
    next_cursor: str | None = Field(None, description="The cursor of the next page. Absent on the last page.")


class ProjectionError(BaseModel):
    """Why a document differs from the log: the event that could not be applied, or the content not stored."""

    position: int | None
    version: int | None
    type: str | None
    message: str


class PartialDocument(BaseModel):
    """Fields that are present only if a document is incomplete."""

    truncated: list[str] = Field([], description="Fields that are stored in part, because they are too large.")
    omitted: list[str] = Field(
        [], description="Large fields that lists leave out. They are empty here; read the single resource."
    )
    projection_error: ProjectionError | None = Field(
        None, description="Why this document differs from the log. The history is complete."
    )


class IndexResponse(SuccessResponse):
    """The URLs of the service."""

    service: Literal["jobledger"]
    jobs: str
    batches: str
    statistics: str
    log: str
    openapi: str
    docs: str
    dashboard: str
