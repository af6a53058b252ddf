"""api: what is answered, as models: for the OpenAPI document, and for the tests that hold real answers against them.

The routes send the views' documents as they are, without going through these models, which would cost more than the
rest of an answer. tests/api/test_answers.py makes sure that the two say the same.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from jobledger.ledger.domain.events import AccessControl, Failure, JobResults, LogEntry
from jobledger.ledger.domain.statuses import BatchStatus, JobStatus


class FieldError(BaseModel):
    """One wrong field: where it stands, as `jobs[3].parameters.url`, and what would be right."""

    path: str
    message: str


class ErrorResponse(BaseModel):
    """Every failure. `code` is for programs, `message` for people; `details.errors` names wrong fields."""

    status: Literal["error"]
    code: str
    message: str
    details: dict[str, Any]


class SuccessResponse(BaseModel):
    """The envelope of every success."""

    status: Literal["success"]


# Jobs -------------------------------------------------------------------------------------------------------------


class WebhookResource(BaseModel):
    """A webhook. The values of its headers are hidden; without admin access their names and the URL's path are, too."""

    url: str
    headers: dict[str, Literal["***"]]
    include_markdown: bool
    include_metadata: bool
    signed: bool


class Progress(BaseModel):
    """How far a job is."""

    step: str
    percent: float = Field(ge=0, le=100)
    message: str


class Step(BaseModel):
    """A finished part of the work. `key` is the digest of its inputs; `reused_from` the job it was taken from.

    `cache_version` is the version of the processor whose other jobs may reuse the step, null if no other job may.
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


class ProjectionError(BaseModel):
    """Why a document does not show what the log says: which event could not be folded, or what could not be stored."""

    position: int | None
    version: int | None
    type: str | None
    message: str


class PartialDocument(BaseModel):
    """What is there only when a document does not show everything."""

    truncated: list[str] = Field([], description="Fields of which only a part is kept, because they are too large.")
    omitted: list[str] = Field(
        [], description="Large fields that are left out of lists, and are empty here: ask for the single one."
    )
    projection_error: ProjectionError | None = Field(
        None, description="Why this does not show what the log says. The history does."
    )


class JobResource(PartialDocument):
    """A job. Its ETag begins with `version`; `position` is that of the last event that is in it."""

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
    error: Failure | None = Field(description="Of the last attempt that failed.")
    logs: list[LogEntry] = Field(max_length=100, description="The newest; all of them: `…/logs`.")
    worker_id: str | None = Field(description="A pseudonym without admin access.")
    attempt: int
    retries: int
    max_attempts: int
    timeout_s: float
    priority: int
    due_at: datetime | None = Field(description="A waiting job is not started before.")
    user_id: str
    access_control: AccessControl
    teams: list[str] = Field(
        description="The groups that the owner was in when it was submitted. Without admin access, as in the lists of "
        "`access_control`, only the caller's own."
    )
    cancel_requested: bool
    archived: bool
    steps: list[Step]
    version: int
    position: int
    paused: bool = Field(description="It waits because its batch is paused.")


class JobResponse(SuccessResponse):
    """A job."""

    job: JobResource


class JobActionResponse(SuccessResponse):
    """A job as it is after what was done; null when it was deleted."""

    job_id: str
    job: JobResource | None


class NewWebhookSecret(BaseModel):
    """What webhooks to an endpoint are signed with. It is shown this once."""

    endpoint_id: str
    url: str
    secret: str


_NEW_SECRETS_DESCRIPTION = "Secrets of endpoints that were used for the first time. They are not shown again."


class JobAcceptedResponse(SuccessResponse):
    """A job that was submitted."""

    job_id: str
    job: JobResource
    webhook_secrets: list[NewWebhookSecret] = Field([], description=_NEW_SECRETS_DESCRIPTION)
    warnings: list[str] = []


class ListResponse(SuccessResponse):
    total: int
    total_is_lower_bound: bool = Field(default=False, description="There are at least so many.")
    next_cursor: str | None = Field(None, description="The cursor of the next page; there is none on the last.")


class JobListResponse(ListResponse):
    """A page of jobs."""

    jobs: list[JobResource]


# Batches ----------------------------------------------------------------------------------------------------------


class BatchSummaryResource(BaseModel):
    """What a batch's completed jobs took: seconds, and tokens of language models."""

    duration: float
    tokens_used: int


class BatchResource(PartialDocument):
    """A batch, and how many of its jobs are how far."""

    batch_id: str
    batch_name: str | None
    status: BatchStatus
    created_at: datetime
    updated_at: datetime
    completed_at: datetime | None
    job_ids: list[str] = Field(description="In lists only the first hundred.")
    total_jobs: int
    pending_jobs: int
    processing_jobs: int
    completed_jobs: int
    failed_jobs: int
    cancelled_jobs: int
    webhook: WebhookResource | None
    parameters: dict[str, Any]
    summary: BatchSummaryResource
    user_id: str
    access_control: AccessControl
    teams: list[str]
    paused: bool
    archived: bool
    version: int
    position: int


class BatchResponse(SuccessResponse):
    """A batch."""

    batch: BatchResource


class BatchListResponse(ListResponse):
    """A page of batches."""

    batches: list[BatchResource]


class BatchAcceptedResponse(SuccessResponse):
    """A batch that was submitted, with all of its jobs."""

    batch_id: str
    job_ids: list[str]
    batch: BatchResource
    webhook_secrets: list[NewWebhookSecret] = Field([], description=_NEW_SECRETS_DESCRIPTION)
    warnings: list[str] = []


class BatchStateResource(BaseModel):
    """What a batch's own events say of it. The counts of its jobs are in the views, at the `Ledger-Position`."""

    batch_id: str
    batch_name: str | None
    status: BatchStatus
    paused: bool
    archived: bool
    version: int
    position: int


class BulkJobCounts(BaseModel):
    """What became of a batch's jobs."""

    total: int
    changed: int
    unchanged: int
    rejected: int


class RejectedJob(BaseModel):
    """A job that was left as it is, and why."""

    job_id: str
    code: str
    message: str


class BatchActionResponse(SuccessResponse):
    """A batch as it is after what was done; null when it was deleted."""

    batch_id: str
    batch: BatchStateResource | None


class BulkActionResponse(BatchActionResponse):
    """The same, and what was done to its jobs; `rejections` names the first hundred."""

    jobs: BulkJobCounts
    events: dict[str, int]
    rejections: list[RejectedJob]


# The log ----------------------------------------------------------------------------------------------------------


class EventMetadataResource(BaseModel):
    """Where an event comes from."""

    actor: str
    correlation_id: str = Field("", description="The batch it belongs to.")
    causation_id: str = ""
    traceparent: str = ""
    request: str = Field("", description="Tells a request with an Idempotency-Key that is repeated from a new one.")


class EventResource(BaseModel):
    """An event of the log. `data` depends on its `type`."""

    position: int
    event_id: str
    stream: str
    version: int
    type: str
    time: datetime
    schema_version: int = Field(alias="schema")
    data: dict[str, Any]
    meta: EventMetadataResource
    hash: str | None = Field(description="null without admin access: it covers what is hidden.")
    unreadable: str | None = Field(None, description="Why an event that was changed in the database cannot be shown.")


class HistoryResponse(SuccessResponse):
    """A page of one stream."""

    events: list[EventResource]
    next_after_version: int | None = Field(
        None, description="`after_version` of the next page; there is none on the last."
    )


class LogLineResource(LogEntry):
    """A log line. Several may come from one event, whose `version` they share."""

    attempt: int | None
    version: int


class LogLinesResponse(SuccessResponse):
    """A page of log lines."""

    logs: list[LogLineResource]
    next_after_version: int | None = Field(
        None, description="`after_version` of the next page; there is none on the last."
    )


class EventListResponse(SuccessResponse):
    """A page of the log. `last_position` is how far was looked: `after` of the next page."""

    events: list[EventResource]
    last_position: int
    head: int


class ProjectorStatus(BaseModel):
    position: int
    lag: int


class LogHeadResponse(SuccessResponse):
    """The last position of the log, the first, and how far the views are."""

    head: int
    oldest: int
    projector: ProjectorStatus


# The rest ---------------------------------------------------------------------------------------------------------


class SignedLinkResponse(SuccessResponse):
    """A link that opens a file without sign-in."""

    url: str
    expires_at: datetime


class JobCounts(BaseModel):
    total: int
    pending: int
    processing: int
    completed: int
    failed: int
    cancelled: int


class BatchCounts(BaseModel):
    total: int
    active: int


class WebhookCounts(BaseModel):
    total: int
    pending: int
    delivered: int
    abandoned: int


class TrackCounts(BaseModel):
    track: str = Field(alias="_id")
    count: int
    completed: int
    failed: int


class Throughput(BaseModel):
    """How many jobs ended a minute, on average."""

    last_minute: float
    last_hour: float


class Durations(BaseModel):
    """How long completed jobs took; null while there are none."""

    completed: int
    average_seconds: float | None
    p50_seconds: float | None
    p90_seconds: float | None
    p99_seconds: float | None


class MinuteStatistics(BaseModel):
    """What ended in one minute, and how long completed jobs took on average."""

    started_at: datetime
    completed: int
    failed: int
    cancelled: int
    average_seconds: float | None


class WorkerStatus(BaseModel):
    """A worker, how many jobs it may run, and how many it does."""

    worker_id: str
    host: str
    slots: int
    busy_slots: int
    lease_until: datetime = Field(description="By the database server's clock; extended while it lives.")
    problem: str | None = Field(description="Why it claims no jobs: its machine has trouble. null: it is healthy.")
    unhealthy_since: datetime | None


class LogStatus(BaseModel):
    head: int
    projection_position: int
    lag: int


class StatisticsContent(BaseModel):
    """Counters, never counted."""

    jobs: JobCounts
    batches: BatchCounts
    webhooks: WebhookCounts
    tracks: list[TrackCounts] = Field(description="The first thousand by name.")
    throughput: Throughput
    durations: Durations
    minutes: list[MinuteStatistics] = Field(description="The last 60, the oldest first.")
    workers: list[WorkerStatus]
    log: LogStatus


class StatisticsResponse(SuccessResponse):
    """How everything is."""

    stats: StatisticsContent


class ReadinessResponse(SuccessResponse):
    """It can serve. `projection_position` is the position that the views have reached."""

    projection_position: int


class IndexResponse(SuccessResponse):
    """Where things are."""

    service: Literal["jobledger"]
    jobs: str
    batches: str
    statistics: str
    log: str
    openapi: str
    docs: str
    dashboard: str
