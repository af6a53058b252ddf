"""Request and response models of jobs."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, StrictBool, WithJsonSchema, model_validator

from jobledger.api.schemas.request_models import (
    AccessBody,
    IsoDatetime,
    PageQuery,
    ReasonBody,
    RequestModel,
    SearchText,
)
from jobledger.api.schemas.response_models import ListResponse, PartialDocument, SuccessResponse
from jobledger.api.schemas.webhooks import AcceptedResponse, WebhookBody, WebhookResource
from jobledger.ledger.domain import limits
from jobledger.ledger.domain.events import AccessControl, ErrorInfo, JobResults, LogEntry
from jobledger.ledger.domain.statuses import JobStatus
from jobledger.projections.views.job_list import OMITTABLE_FIELDS, JobFilter

_SESSION_FIELDS = frozenset({"event", "session", "url", "filename", "track"})

# Requests ---------------------------------------------------------------------------------------------------------


class JobBody(RequestModel):
    """A job to submit. A bare session (its fields without `parameters` around them) is accepted, too."""

    parameters: dict[str, Any]
    job_type: str = Field("session", min_length=1, max_length=100)
    job_name: str | None = Field(None, max_length=limits.MAX_TITLE_CHARACTERS)
    webhook: WebhookBody | None = None
    priority: int = Field(1, strict=True, ge=-1000, le=1000, description="Jobs with a higher priority start first.")
    not_before: IsoDatetime | None = None
    max_attempts: int = Field(3, strict=True, ge=1, le=100)
    timeout_s: float = Field(3600.0, strict=True, gt=0, le=7 * 86_400)
    user_id: str | None = Field(None, min_length=1, max_length=limits.MAX_NAME_CHARACTERS)
    access_control: AccessBody = AccessBody()

    @model_validator(mode="before")
    @classmethod
    def _wrap_bare_session(cls, content: Any) -> Any:
        if isinstance(content, dict) and "parameters" not in content and content.keys() >= _SESSION_FIELDS:
            return {"parameters": content}
        return content


class JobRestartBody(ReasonBody):
    """How to restart a job. By default, completed steps are reused."""

    reuse_steps: StrictBool = True


class JobUpdateBody(RequestModel):
    """The fields to change; omitted fields keep their values. All but `access_control` require a pending job."""

    parameters: dict[str, Any] | None = None
    priority: int | None = Field(None, strict=True, ge=-1000, le=1000)
    not_before: IsoDatetime | None = None
    access_control: AccessBody | None = None

    @model_validator(mode="after")
    def _check_not_empty(self) -> JobUpdateBody:
        if not self.model_fields_set:
            raise ValueError(f"no field to change: name at least one of {', '.join(type(self).model_fields)}")
        return self


def _read_included_fields(text: object) -> object:
    names = text.split(",") if isinstance(text, str) else []
    if unknown := sorted({*names} - {*OMITTABLE_FIELDS}):
        raise ValueError(f"{unknown[0][:100]!r} is not one of {', '.join(OMITTABLE_FIELDS)}")
    return names


IncludedFields = Annotated[list[str], BeforeValidator(_read_included_fields), WithJsonSchema({"type": "string"})]


class JobListQuery(JobFilter, PageQuery):
    """Filters of jobs. `q`: all words occur in the name, ID, session, event, track, file name or speakers."""

    created_after: IsoDatetime | None = None
    created_before: IsoDatetime | None = None
    q: SearchText | None = None
    include: IncludedFields | None = Field(
        None, description=f"Fields to return whatever their size, separated by commas: {', '.join(OMITTABLE_FIELDS)}."
    )


# Responses --------------------------------------------------------------------------------------------------------


class Progress(BaseModel):
    """The progress of a job."""

    step: str
    percent: float = Field(ge=0, le=100)
    message: str


class Step(BaseModel):
    """A completed step. `key` is the digest of its inputs; `reused_from` is the job it was copied from.

    `cache_version` is the version of the processor whose other jobs may reuse the step. null: no other job may.
    """

    step: str
    key: str
    attempt: int
    finished_at: datetime
    duration_s: float
    tokens_used: int
    warnings: list[str]
    reused_from: str | None
    cache_version: str | None
    version: int


class ResultsResource(JobResults):
    """The results of a completed job."""

    markdown_file: str | None
    markdown_url: str | None


class JobResource(PartialDocument):
    """A job. Its ETag begins with `version`; `position` is the position of the last event applied."""

    job_id: str
    job_type: str
    job_name: str | None
    status: JobStatus
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    parameters: dict[str, Any]
    webhook: WebhookResource | None
    batch_id: str | None
    progress: Progress
    results: ResultsResource | None
    error: ErrorInfo | None = Field(description="The error of the last failed attempt.")
    logs: list[LogEntry] = Field(max_length=100, description="The newest log entries. `…/logs` returns all.")
    worker_id: str | None = Field(description="A pseudonym without admin access.")
    attempt: int
    retries: int
    max_attempts: int
    timeout_s: float
    priority: int
    due_at: datetime | None = Field(description="A pending job does not start before this time.")
    user_id: str
    access_control: AccessControl
    teams: list[str] = Field(
        description="The owner's groups at submission. Without admin access, this and the lists of "
        "`access_control` contain only the caller's own."
    )
    cancel_requested: bool
    archived: bool
    steps: list[Step]
    version: int
    position: int
    paused: bool = Field(description="The job is pending and its batch is paused.")


class JobResponse(SuccessResponse):
    """The job."""

    job: JobResource


class JobActionResponse(SuccessResponse):
    """The job after the action. null if the job is deleted."""

    job_id: str
    job: JobResource | None


class JobAcceptedResponse(AcceptedResponse):
    """The submitted job."""

    job_id: str
    job: JobResource


class JobListResponse(ListResponse):
    """A page of jobs."""

    jobs: list[JobResource]
