"""Request and response models of batches."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field, model_validator

from jobledger.api.schemas.jobs import BulkJobCounts, RejectedJob, RestartBody
from jobledger.api.schemas.request_models import AccessBody, BatchIdPrefix, PageQuery, RequestModel, SearchText
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


class BatchRestartBody(RestartBody):
    """The jobs to restart: those with this status, or all finished jobs."""

    only: RestartScope = "failed"

    @model_validator(mode="before")
    @classmethod
    def _reject_parameters(cls, content: Any) -> Any:
        if isinstance(content, dict) and "parameters" in content:
            raise ValueError("`parameters` belong to one job: send them with the restart of that job")
        return content


class BatchUpdateBody(RequestModel):
    """Who may read or change the batch and each of its jobs."""

    access_control: AccessBody


class BatchListQuery(PageQuery):
    """Filters of batches. `q`: all words occur in the name or ID. `id_prefix`: the beginning of the ID."""

    status: BatchStatus | None = None
    user_id: str | None = None
    archived: bool | None = None
    q: SearchText | None = None
    id_prefix: BatchIdPrefix | None = None


# Responses --------------------------------------------------------------------------------------------------------


class BatchSummaryResource(BaseModel):
    """The cost of a batch's completed jobs: seconds, and tokens of language models."""

    duration: float
    tokens_used: int


class WaitingCounts(BaseModel):
    """Pending jobs by what they wait for."""

    worker: int
    due_time: int
    retry: int
    batch_paused: int


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
    waiting_for: WaitingCounts = Field(
        description="Pending jobs by what they wait for. In the response to the submission, all wait for a worker."
    )
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


class BatchActionResponse(SuccessResponse):
    """The batch after the action. null if the batch is deleted."""

    batch_id: str
    batch: BatchStateResource | None


class BulkActionResponse(BatchActionResponse):
    """The batch after the action, and what it did to the jobs. `rejections` lists the first 100."""

    jobs: BulkJobCounts
    events: dict[str, int]
    rejections: list[RejectedJob]
