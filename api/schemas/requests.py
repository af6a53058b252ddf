"""api: the bodies and query parameters that are accepted."""

from __future__ import annotations

from base64 import urlsafe_b64decode
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

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

from jobledger.api.context import MAX_PAGE_SIZE
from jobledger.ledger.domain import limits
from jobledger.ledger.domain.events import AccessControl, WebhookEventType, truncate_to_milliseconds
from jobledger.ledger.domain.statuses import BatchStatus, DeliveryStatus, JobStatus, RestartScope
from jobledger.ledger.domain.timestamps import EXAMPLE_TIMESTAMP, parse_timestamp
from jobledger.ledger.domain.webhook_headers import find_header_problem
from jobledger.ledger.net.webhook_signature import decode_secret
from jobledger.ledger.store.hash_chain import MAX_SAFE_INTEGER
from jobledger.projections.views.job_list import OMITTABLE_FIELDS
from jobledger.projections.views.paging import PageCursor

MAX_BATCH_JOBS = limits.MAX_BATCH_JOBS
_SESSION_SHAPE = frozenset({"event", "session", "url", "filename", "track"})


def _web_address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected an address that begins with http:// or https:// and names a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "no user or password in the address, which everyone sees: send an Authorization header instead"
        )
    return url


def _sendable(headers: dict[str, str]) -> dict[str, str]:
    if (found := find_header_problem(headers)) is not None:
        raise ValueError(f"{found[0]}: {found[1]}")
    return headers


def _signing_secret(secret: str) -> str:
    decode_secret(secret)
    return secret


def _moment(given: object) -> object:
    """Read ISO 8601 only: pydantic would take a bare number for seconds since 1970."""
    if isinstance(given, datetime):
        return given
    if isinstance(given, str):
        return parse_timestamp(given)
    raise ValueError(f"expected a time with an offset, such as {EXAMPLE_TIMESTAMP}")


IsoDatetime = Annotated[datetime, BeforeValidator(_moment), AfterValidator(truncate_to_milliseconds)]
# No `$` at its beginning: the database reads an object with $ref and $id as a reference to a document.
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9!#%&'*+.^_`|~-][A-Za-z0-9!#$%&'*+.^_`|~-]{0,99}$")]
HeaderValue = Annotated[str, Field(pattern=r"^[\t\x20-\x7e\u00a0-\u00ff]*$", max_length=8000)]


def _cursor(text: object) -> object:
    if not isinstance(text, str):
        return text
    try:
        moment, _, key = urlsafe_b64decode(text.encode()).decode().partition(" ")
        return PageCursor(datetime.fromtimestamp(int(moment) / 1000, UTC), key)
    except (ValueError, OverflowError, OSError):
        raise ValueError("this is not a cursor: take `next_cursor` from the page before") from None


def _then(text: object) -> object:
    if not isinstance(text, str):
        return text
    if text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= MAX_SAFE_INTEGER:
        return int(text)
    if "-" not in text:
        raise ValueError(f"expected a position of the log, or a time with an offset, such as {EXAMPLE_TIMESTAMP}")
    return truncate_to_milliseconds(parse_timestamp(text))


PointInTime = Annotated[int | datetime, BeforeValidator(_then), WithJsonSchema({"type": "string"})]
Cursor = Annotated[PageCursor, BeforeValidator(_cursor), WithJsonSchema({"type": "string"})]
SearchText = Annotated[str, Field(min_length=1, max_length=200)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WebhookBody(_Body):
    """Whom to tell when the job or batch has ended."""

    url: Annotated[str, Field(max_length=limits.MAX_URL_CHARACTERS), AfterValidator(_web_address)]
    headers: Annotated[dict[HeaderName, HeaderValue], AfterValidator(_sendable)] = Field(
        {}, max_length=limits.MAX_WEBHOOK_HEADERS
    )
    include_markdown: StrictBool = False
    include_metadata: StrictBool = False
    secrets: list[Annotated[str, AfterValidator(_signing_secret)]] = Field(
        [], max_length=2, description="What to sign with (Standard Webhooks: whsec_…); two while it is being replaced."
    )


AccessNames = Annotated[
    list[Annotated[str, Field(max_length=limits.MAX_NAME_CHARACTERS)]], Field(max_length=limits.MAX_ACCESS_NAMES)
]


class AccessBody(AccessControl):
    """Who else may see or change it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    read_access: AccessNames = Field([])
    write_access: AccessNames = Field([])
    admin_access: AccessNames = Field([])

    @model_validator(mode="after")
    def _few_names(self) -> AccessBody:
        found = len(self.read_access) + len(self.write_access) + len(self.admin_access)
        if found > limits.MAX_ACCESS_NAMES:
            raise ValueError(f"{found} names in all lists together: at most {limits.MAX_ACCESS_NAMES} are allowed")
        return self


class JobBody(_Body):
    """What is asked for. A bare session (its fields, without `parameters` around them) is understood, too."""

    parameters: dict[str, Any]
    job_type: str = Field("session", min_length=1, max_length=100)
    job_name: str | None = Field(None, max_length=limits.MAX_TITLE_CHARACTERS)
    webhook: WebhookBody | None = None
    priority: int = Field(1, strict=True, ge=-1000, le=1000, description="Higher is sooner.")
    not_before: IsoDatetime | None = None
    max_attempts: int = Field(3, strict=True, ge=1, le=100)
    timeout_s: float = Field(3600.0, strict=True, gt=0, le=7 * 86_400)
    user_id: str | None = Field(None, min_length=1, max_length=limits.MAX_NAME_CHARACTERS)
    access_control: AccessBody = AccessBody()

    @model_validator(mode="before")
    @classmethod
    def _bare_session(cls, content: Any) -> Any:
        if isinstance(content, dict) and "parameters" not in content and content.keys() >= _SESSION_SHAPE:
            return {"parameters": content}
        return content


class BatchBody(_Body):
    """Jobs that belong together. `parameters` are defaults for each job's own."""

    jobs: list[Any] = Field(min_length=1, max_length=MAX_BATCH_JOBS)
    batch_name: str | None = Field(None, max_length=limits.MAX_TITLE_CHARACTERS)
    parameters: dict[str, Any] = {}
    webhook: WebhookBody | None = None
    user_id: str | None = Field(None, min_length=1, max_length=limits.MAX_NAME_CHARACTERS)
    access_control: AccessBody = AccessBody()


class ReasonBody(_Body):
    """Why something is done, for the record."""

    reason: str | None = Field(None, max_length=limits.MAX_REASON_CHARACTERS)


class JobRestartBody(ReasonBody):
    reuse_steps: StrictBool = True


class BatchRestartBody(JobRestartBody):
    """Which of a batch's jobs: those that ended so, or all that have ended."""

    only: RestartScope = "failed"


class JobUpdateBody(_Body):
    """What is to be changed; what is not named stays as it is. All but `access_control` only while the job waits."""

    parameters: dict[str, Any] | None = None
    priority: int | None = Field(None, strict=True, ge=-1000, le=1000)
    not_before: IsoDatetime | None = None
    access_control: AccessBody | None = None

    @model_validator(mode="after")
    def _something(self) -> JobUpdateBody:
        if not self.model_fields_set:
            raise ValueError(f"nothing is to be changed: name one of {', '.join(type(self).model_fields)}")
        return self


class BatchUpdateBody(_Body):
    """Who may see or change the batch and each of its jobs."""

    access_control: AccessBody


class PageQuery(_Body):
    """Which part of a list. `cursor` goes on where the last page ended, whatever was written since."""

    limit: int = Field(100, ge=1, le=MAX_PAGE_SIZE)
    skip: int = Field(0, ge=0, le=1_000_000)
    cursor: Cursor | None = None
    sort: Literal["-created_at", "created_at"] = "-created_at"
    min_position: str | None = None

    @model_validator(mode="after")
    def _one_way_to_go_on(self) -> PageQuery:
        if self.cursor is not None and self.skip:
            raise ValueError("`cursor` or `skip`, not both")
        return self

    @property
    def newest_first(self) -> bool:
        return self.sort.startswith("-")


def _included(text: object) -> object:
    names = text.split(",") if isinstance(text, str) else []
    if unknown := sorted({*names} - {*OMITTABLE_FIELDS}):
        raise ValueError(
            f"{unknown[0][:100]!r} is none of the fields that lists leave out: {', '.join(OMITTABLE_FIELDS)}"
        )
    return names


IncludedFields = Annotated[list[str], BeforeValidator(_included), WithJsonSchema({"type": "string"})]


class JobListQuery(PageQuery):
    """Which jobs. `q`: all of these words are in the job's name, id, session, event, track, file name or speakers."""

    status: JobStatus | None = None
    batch_id: str | None = None
    user_id: str | None = None
    track: str | None = None
    event: str | None = None
    day: str | None = None
    language: str | None = None
    error_code: str | None = None
    job_type: str | None = None
    archived: bool | None = None
    created_after: IsoDatetime | None = None
    created_before: IsoDatetime | None = None
    q: SearchText | None = None
    include: IncludedFields | None = Field(
        None, description=f"Fields that are wanted however large they are, with commas: {', '.join(OMITTABLE_FIELDS)}."
    )


class BatchListQuery(PageQuery):
    """Which batches. `q`: all of these words are in the batch's name or id."""

    status: BatchStatus | None = None
    user_id: str | None = None
    archived: bool | None = None
    q: SearchText | None = None


class DeliveryFilter(_Body):
    """Which webhooks. Those of one job are shown to whoever may see it; others to its owner."""

    status: DeliveryStatus | None = None
    type: WebhookEventType | None = None
    job_id: str | None = Field(None, max_length=200)
    batch_id: str | None = Field(None, max_length=200)
    endpoint_id: str | None = Field(None, max_length=200, description="The receiver's id, as each delivery names it.")
    host: str | None = Field(None, max_length=300, description="With the port: example.org:443")
    after_sequence: int | None = Field(None, ge=0, le=MAX_SAFE_INTEGER)
    created_after: IsoDatetime | None = None
    created_before: IsoDatetime | None = None


class DeliveryListQuery(DeliveryFilter, PageQuery):
    """Which webhooks, sent or to be sent."""


class RedeliverBody(DeliveryFilter, ReasonBody):
    """Which webhooks to send again: those that were given up, unless another `status` is named."""

    status: DeliveryStatus | None = "abandoned"
    after_sequence: int | None = Field(None, strict=True, ge=0, le=MAX_SAFE_INTEGER)


class AsOfQuery(_Body):
    """How a job is shown: as it is, or as it was at a position of the log or a moment."""

    as_of: PointInTime | None = None
    min_position: str | None = None


class NoQuery(_Body):
    """No query parameters."""


class MinPositionQuery(_Body):
    """The position that the views have to show."""

    min_position: str | None = None


class AnyQuery(BaseModel):
    """Whatever the address of a webhook has."""


class StreamQuery(_Body):
    """Which events, beginning where."""

    after: int | None = Field(None, ge=0, le=MAX_SAFE_INTEGER)
    types: str | None = None
    job_id: str | None = None
    batch_id: str | None = None


class EventListQuery(_Body):
    """Which page of the log."""

    after: int = Field(0, ge=0, le=MAX_SAFE_INTEGER)
    limit: int = Field(100, ge=1, le=MAX_PAGE_SIZE)
    types: str | None = None
    stream: str | None = Field(None, min_length=1, max_length=200)


class HistoryQuery(_Body):
    """Which page of one stream, by the versions of its events."""

    after_version: int = Field(0, ge=0, le=MAX_SAFE_INTEGER)
    limit: int = Field(100, ge=1, le=MAX_PAGE_SIZE)
