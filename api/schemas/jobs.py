"""Request and response models of jobs."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StrictBool, WithJsonSchema, model_validator

from jobledger.api.schemas.request_models import (
    AccessBody,
    Cursor,
    IsoDatetime,
    JobIdPrefix,
    PageQuery,
    ReasonBody,
    RequestModel,
    SearchText,
)
from jobledger.api.schemas.response_models import ListResponse, PartialDocument, SuccessResponse
from jobledger.api.schemas.webhooks import AcceptedResponse, WebhookBody, WebhookResource
from jobledger.ledger.domain import limits
from jobledger.ledger.domain.canonical_json import MAX_SAFE_INTEGER
from jobledger.ledger.domain.events import AccessControl, Asset, ErrorInfo, JobResults, LogEntry, ResultFile
from jobledger.ledger.domain.statuses import JobStatus, WaitingFor
from jobledger.projections.views.job_list import OMITTABLE_FIELDS, JobFilter
from jobledger.projections.views.list_index import split_words

BulkAction = Literal["cancel", "restart", "archive", "unarchive", "delete"]
MAX_BULK_JOBS = 10_000
_SESSION_FIELDS = frozenset({"event", "session", "url", "filename", "track"})

# Requests ---------------------------------------------------------------------------------------------------------


class JobBody(RequestModel):
    """A job to submit. A bare session (its fields without `parameters` around them) is accepted, too."""

    parameters: dict[str, Any]
    job_type: str = Field("session", min_length=1, max_length=limits.MAX_JOB_TYPE_CHARACTERS)
    job_name: str | None = Field(None, max_length=limits.MAX_TITLE_CHARACTERS)
    webhook: WebhookBody | None = None
    priority: int = Field(
        1,
        strict=True,
        ge=-limits.MAX_PRIORITY,
        le=limits.MAX_PRIORITY,
        description="Jobs with a higher priority start first.",
    )
    not_before: IsoDatetime | None = None
    max_attempts: int | None = Field(
        None, strict=True, ge=1, le=limits.MAX_ATTEMPTS, description="Default: that of the job type, usually 3."
    )
    timeout_s: float | None = Field(
        None,
        strict=True,
        gt=0,
        le=limits.MAX_TIMEOUT_SECONDS,
        description="Seconds. Default: that of the job type, usually 3600.",
    )
    user_id: str | None = Field(None, min_length=1, max_length=limits.MAX_NAME_CHARACTERS)
    access_control: AccessBody = AccessBody()

    @model_validator(mode="before")
    @classmethod
    def _wrap_bare_session(cls, content: Any) -> Any:
        if isinstance(content, dict) and "parameters" not in content and content.keys() >= _SESSION_FIELDS:
            return {"parameters": content}
        return content


class RestartBody(ReasonBody):
    """How to restart jobs.

    By default, completed steps are reused, except those with a warning whose cause may be gone (`repeat_on_restart`).
    """

    reuse_steps: StrictBool = Field(default=True, description="false: repeat all completed steps.")


class JobRestartBody(RestartBody):
    """How to restart a job.

    By default, completed steps are reused, except those with a warning whose cause may be gone (`repeat_on_restart`).
    """

    parameters: dict[str, Any] | None = Field(
        None,
        description="All parameters of the job from now on. Steps whose inputs stay the same are still reused. "
        "To change some of them only, read the job, change them, and send its ETag in `If-Match`.",
    )


class JobUpdateBody(RequestModel):
    """The fields to change; omitted fields keep their values. All but `access_control` require a pending job."""

    parameters: dict[str, Any] | None = None
    priority: int | None = Field(None, strict=True, ge=-limits.MAX_PRIORITY, le=limits.MAX_PRIORITY)
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


class JobFilterBody(JobFilter, RequestModel):
    """Filters of jobs. `q`: all words occur in the name, ID, session, event, track, file name or speakers."""

    created_after: IsoDatetime | None = None
    created_before: IsoDatetime | None = None
    q: SearchText | None = None
    id_prefix: JobIdPrefix | None = None


class BulkJobActionBody(ReasonBody):
    """An action on all jobs that match the filters, oldest first. Name at least one filter, or `all`.

    The action is decided for each job alone. If the response has a `next_cursor`, some jobs are left. Send the same
    body with it as `cursor`, and with the `position` of the response.
    """

    action: BulkAction
    filters: JobFilterBody = JobFilterBody()
    all: StrictBool = Field(default=False, description="Apply the action to all jobs, without filters.")
    dry_run: StrictBool = Field(default=False, description="Change nothing, and return what would change.")
    reuse_steps: StrictBool = Field(default=True, description="For `restart`. false: repeat all completed steps.")
    max_jobs: int = Field(MAX_BULK_JOBS, strict=True, ge=1, le=MAX_BULK_JOBS)
    position: int | None = Field(
        None,
        strict=True,
        ge=0,
        le=MAX_SAFE_INTEGER,
        description="Leave out jobs that were submitted after this position of the log. Default: the position of the "
        "views. Send the `position` of a dry run to change no jobs that it could not show.",
    )
    cursor: Cursor | None = None

    @model_validator(mode="after")
    def _check_filters(self) -> BulkJobActionBody:
        is_filtered = any(value is not None for value in dict(self.filters).values())
        if not is_filtered and not self.all:
            raise ValueError('no filter: name at least one in `filters`, or send `"all": true` for all jobs')
        if is_filtered and self.all:
            raise ValueError("`all` and `filters` exclude each other: send one of them")
        if self.filters.q is not None and not split_words(self.filters.q):
            raise ValueError("`filters.q` has no word, so it would match all jobs")
        if not self.reuse_steps and self.action != "restart":
            raise ValueError(f"`reuse_steps` is for `restart`, not for `{self.action}`")
        return self


class JobListQuery(JobFilterBody, PageQuery):
    """Filters of jobs, and the page.

    `q`: all words occur in the name, ID, session, event, track, file name or speakers. `id_prefix`: the beginning of
    the ID, at least eight characters after `job-`.
    """

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
    `repeat_on_restart`: a restart of the job repeats the step, because the cause of a warning may be gone.
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
    repeat_on_restart: bool
    version: int


class ResultsResource(JobResults):
    """The results of a completed job. `output` is the JSON value that the job returned."""

    output: Any
    markdown_file: str | None
    markdown_url: str | None
    assets: list[Asset]
    files: list[ResultFile]


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
    waiting_for: WaitingFor | None = Field(
        description="What a pending job waits for: `worker`, `due_time` (its `not_before`), `retry` (the next attempt "
        "after an error) or `batch_paused`. null: the job is not pending."
    )


class JobResponse(SuccessResponse):
    """The job."""

    job: JobResource


class JobActionResponse(SuccessResponse):
    """The job after the action. null if the job is deleted."""

    job_id: str
    job: JobResource | None


class BulkJobCounts(BaseModel):
    """How many jobs the action changed, left unchanged, and rejected."""

    total: int
    changed: int
    unchanged: int
    rejected: int


class RejectedJob(BaseModel):
    """A job that the action did not change, and the reason."""

    job_id: str
    code: str
    message: str


class BulkJobActionResponse(SuccessResponse):
    """What the action did to the jobs, or would do in a dry run. `rejections` and `job_ids` list the first 100."""

    dry_run: bool
    position: int = Field(description="Jobs that were submitted after this position were left out.")
    jobs: BulkJobCounts
    events: dict[str, int]
    rejections: list[RejectedJob]
    job_ids: list[str] = Field(description="The changed jobs.")
    next_cursor: str | None = Field(description="null: no matching job is left.")


class JobAcceptedResponse(AcceptedResponse):
    """The submitted job."""

    job_id: str
    job: JobResource


class JobListResponse(ListResponse):
    """A page of jobs."""

    jobs: list[JobResource]
