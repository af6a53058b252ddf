"""Request and response models of batches."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from jobledger.api.schemas.jobs import JobRestartBody
from jobledger.api.schemas.request_models import AccessBody, PageQuery, RequestModel, SearchText
from jobledger.api.schemas.response_models import ListResponse, PartialDocument, SuccessResponse
from jobledger.api.schemas.webhooks import AcceptedResponse, WebhookBody, WebhookResource
from jobledger.ledger.domain import limits
from jobledger.ledger.domain.events import AccessControl
from jobledger.ledger.domain.statuses import BatchStatus, RestartScope

# Requests ---------------------------------------------------------------------------------------------------------


class BatchBody(RequestModel):
    """A batch to submit. `parameters` are defaults for the parameters of each job."""

    jobs: list[Any] = Field(min_length=1, max_length=limits.MAX_BATCH_JOBS)
    batch_name: str | None = Field(None, max_length=limits.MAX_TITLE_CHARACTERS)
    parameters: dict[str, Any] = Field({})
    webhook: WebhookBody | None = None
    user_id: str | None = Field(None, min_length=1, max_length=limits.MAX_NAME_CHARACTERS)
    access_control: AccessBody = AccessBody()


class BatchRestartBody(JobRestartBody):
    """The jobs to restart: those with this status, or all finished jobs."""

    only: RestartScope = "failed"


class BatchUpdateBody(RequestModel):
    """Who may read or change the batch and each of its jobs."""

    access_control: AccessBody


class BatchListQuery(PageQuery):
    """Filters of batches. `q`: all words occur in the name or ID."""

    status: BatchStatus | None = None
    user_id: str | None = None
    archived: bool | None = None
    q: SearchText | None = None


# Responses --------------------------------------------------------------------------------------------------------


class BatchSummaryResource(BaseModel):
    """The cost of a batch's completed jobs: seconds, and tokens of language models."""

    duration: float
    tokens_used: int


class BatchStateResource(BaseModel):
    """The batch according to its own events. The views have its job counts at the `Ledger-Position`."""

    batch_id: str
    batch_name: str | None
    status: BatchStatus
    paused: bool
    archived: bool
    version: int
    position: int


class BatchResource(BatchStateResource, PartialDocument):
    """A batch with job counts by status."""

    created_at: datetime
    updated_at: datetime
    completed_at: datetime | None
    job_ids: list[str] = Field(description="Lists return only the first 100.")
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


class BatchResponse(SuccessResponse):
    """The batch."""

    batch: BatchResource


class BatchListResponse(ListResponse):
    """A page of batches."""

    batches: list[BatchResource]


class BatchAcceptedResponse(AcceptedResponse):
    """The submitted batch with all of its jobs."""

    batch_id: str
    job_ids: list[str]
    batch: BatchResource


class BulkJobCounts(BaseModel):
    """How many jobs of the batch the action changed, left unchanged, and rejected."""

    total: int
    changed: int
    unchanged: int
    rejected: int


class RejectedJob(BaseModel):
    """A job that the action did not change, and the reason."""

    job_id: str
    code: str
    message: str


class BatchActionResponse(SuccessResponse):
    """The batch after the action. null if the batch is deleted."""

    batch_id: str
    batch: BatchStateResource | None


class BulkActionResponse(BatchActionResponse):
    """The batch after the action, and what it did to the jobs. `rejections` lists the first 100."""

    jobs: BulkJobCounts
    events: dict[str, int]
    rejections: list[RejectedJob]
