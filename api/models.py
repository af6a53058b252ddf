"""api: the bodies and query parameters that are accepted."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from api.services import LARGEST_PAGE
from ledger.chain import LARGEST_INTEGER
from ledger.events import AccessControl, milliseconds

LARGEST_BATCH = 10_000
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


def _in_utc(moment: datetime) -> datetime:
    try:
        return milliseconds(moment)
    except OverflowError:
        raise ValueError("this moment has no date in UTC: expected the years 1 to 9999") from None


Moment = Annotated[datetime, AfterValidator(_in_utc)]
# No `$` at its beginning: the database reads an object with $ref and $id as a reference to a document.
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9!#%&'*+.^_`|~-][A-Za-z0-9!#$%&'*+.^_`|~-]{0,99}$")]
HeaderValue = Annotated[str, Field(pattern=r"^[\t\x20-\x7e\u00a0-\u00ff]*$", max_length=8000)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WebhookBody(_Body):
    """Whom to tell when the job or batch has ended."""

    url: Annotated[str, Field(max_length=2000), AfterValidator(_web_address)]
    headers: dict[HeaderName, HeaderValue] = Field({}, max_length=50)
    include_markdown: bool = False
    include_metadata: bool = False


class AccessBody(AccessControl):
    """Who else may see or change it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class JobBody(_Body):
    """What is asked for. A bare session (its fields, without `parameters` around them) is understood, too."""

    parameters: dict[str, Any]
    job_type: str = Field("session", min_length=1, max_length=100)
    job_name: str | None = Field(None, max_length=500)
    webhook: WebhookBody | None = None
    priority: int = Field(1, ge=-1000, le=1000, description="Higher is sooner.")
    not_before: Moment | None = None
    max_attempts: int = Field(3, ge=1, le=100)
    timeout_s: float = Field(3600.0, gt=0, le=7 * 86_400)
    user_id: str | None = Field(None, min_length=1, max_length=200)
    access_control: AccessBody = AccessBody()

    @model_validator(mode="before")
    @classmethod
    def _bare_session(cls, content: Any) -> Any:
        if isinstance(content, dict) and "parameters" not in content and content.keys() >= _SESSION_SHAPE:
            return {"parameters": content}
        return content


class BatchBody(_Body):
    """Jobs that belong together. `parameters` are defaults for each job's own."""

    jobs: list[Any] = Field(min_length=1, max_length=LARGEST_BATCH)
    batch_name: str | None = Field(None, max_length=500)
    parameters: dict[str, Any] = {}
    webhook: WebhookBody | None = None
    user_id: str | None = Field(None, min_length=1, max_length=200)
    access_control: AccessBody = AccessBody()


class ReasonBody(_Body):
    """Why something is done, for the record."""

    reason: str | None = Field(None, max_length=2000)


class RestartBody(ReasonBody):
    reuse_steps: bool = True


class BatchRestartBody(RestartBody):
    """Which of a batch's jobs: those that ended so, or all that have ended."""

    only: Literal["failed", "cancelled", "completed", "all"] = "failed"


class Page(_Body):
    """Which part of a list."""

    limit: int = Field(100, ge=1, le=LARGEST_PAGE)
    skip: int = Field(0, ge=0, le=1_000_000)
    min_position: str | None = None


class JobList(Page):
    """Which jobs."""

    status: Literal["pending", "processing", "completed", "failed", "cancelled"] | None = None
    batch_id: str | None = None
    user_id: str | None = None
    track: str | None = None
    job_type: str | None = None
    archived: bool | None = None
    created_after: Moment | None = None
    created_before: Moment | None = None


class BatchList(Page):
    """Which batches."""

    status: Literal["processing", "completed", "partial", "failed"] | None = None
    user_id: str | None = None
    archived: bool | None = None


class StreamQuery(_Body):
    """Which events, beginning where."""

    after: int | None = Field(None, ge=0, le=LARGEST_INTEGER)
    types: str | None = None
    job_id: str | None = None
    batch_id: str | None = None


class EventsQuery(_Body):
    """Which page of the log."""

    after: int = Field(0, ge=0, le=LARGEST_INTEGER)
    limit: int = Field(100, ge=1, le=LARGEST_PAGE)
    types: str | None = None
    stream: str | None = Field(None, min_length=1, max_length=200)


class HistoryQuery(_Body):
    """Which page of one stream, by the versions of its events."""

    after_version: int = Field(0, ge=0, le=LARGEST_INTEGER)
    limit: int = Field(100, ge=1, le=LARGEST_PAGE)
