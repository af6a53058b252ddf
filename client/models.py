"""Jobs, batches and their parts, as the API returns them. Fields of later versions are ignored."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from jobledger.ledger.domain.events import AccessControl, ErrorInfo, JobResults, LogEntry
from jobledger.ledger.domain.statuses import TERMINAL_STATUSES, BatchStatus, JobStatus


class _Snapshot(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


Results = JobResults
"""The results of a completed job."""


class Progress(_Snapshot):
    """The progress of a job. `percent` is that of the whole job."""

    step: str
    percent: float
    message: str


class Step(_Snapshot):
    """A completed step. `reused_from` is the job that its output was copied from."""

    step: str
    key: str
    attempt: int
    finished_at: datetime
    duration_s: float
    tokens_used: int = 0
    warnings: list[str] = []
    reused_from: str | None = None
    cache_version: str | None = None
    repeat_on_restart: bool = False


class JobLogEntry(LogEntry):
    """An entry of a job's log."""

    attempt: int | None = None


class Job(_Snapshot):
    """A job, as it was when the API returned it.

    Attributes:
        error: The error of the last failed attempt.
        logs: The newest log entries.
        due_at: A pending job does not start before this time.
        version: The number of events of the job. `if_version` of a change requires it.
        position: The position of its last event in the log.
        paused: The job is pending, and its batch is paused.
        waiting_for: What a pending job waits for, if the API says so.
        omitted: Large fields that lists leave out. Read the single job for them.
        truncated: Fields that are incomplete because they are very large.
    """

    job_id: str
    job_type: str
    job_name: str | None = None
    status: JobStatus
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    parameters: dict[str, Any] = {}
    batch_id: str | None = None
    progress: Progress | None = None
    results: Results | None = None
    error: ErrorInfo | None = None
    logs: list[LogEntry] = []
    worker_id: str | None = None
    attempt: int = 0
    retries: int = 0
    max_attempts: int = 1
    timeout_s: float = 0.0
    priority: int = 0
    due_at: datetime | None = None
    user_id: str = ""
    access_control: AccessControl = AccessControl()
    teams: list[str] = []
    cancel_requested: bool = False
    archived: bool = False
    steps: list[Step] = []
    version: int
    position: int
    paused: bool = False
    waiting_for: str | None = None
    omitted: list[str] = []
    truncated: list[str] = []

    @property
    def is_finished(self) -> bool:
        """Whether the job is completed, failed or cancelled."""
        return self.status in TERMINAL_STATUSES


class BatchSummary(_Snapshot):
    """The cost of a batch's completed jobs: seconds, and tokens of language models."""

    duration: float = 0.0
    tokens_used: int = 0


class Batch(_Snapshot):
    """A batch with the number of its jobs by status, as it was when the API returned it.

    Attributes:
        job_ids: Its jobs in the order of submission. Lists of batches contain the first hundred.
        version: The number of events of the batch. `if_version` of a change requires it.
    """

    batch_id: str
    batch_name: str | None = None
    status: BatchStatus
    paused: bool = False
    archived: bool = False
    created_at: datetime
    updated_at: datetime
    completed_at: datetime | None = None
    job_ids: list[str] = []
    total_jobs: int = 0
    pending_jobs: int = 0
    processing_jobs: int = 0
    completed_jobs: int = 0
    failed_jobs: int = 0
    cancelled_jobs: int = 0
    parameters: dict[str, Any] = {}
    summary: BatchSummary = Field(default_factory=BatchSummary)
    user_id: str = ""
    access_control: AccessControl = AccessControl()
    teams: list[str] = []
    version: int
    position: int
    omitted: list[str] = []

    @property
    def is_finished(self) -> bool:
        """Whether all jobs of the batch are finished."""
        return self.status != "processing"


class JobCounts(_Snapshot):
    """How many jobs of a batch an action changed, left unchanged, and rejected."""

    total: int
    changed: int
    unchanged: int
    rejected: int


class RejectedJob(_Snapshot):
    """A job that an action did not change, and the reason."""

    job_id: str
    code: str
    message: str


class BatchChange(_Snapshot):
    """What an action on a batch did to its jobs. `rejections` lists the first hundred jobs that it did not change."""

    jobs: JobCounts
    rejections: list[RejectedJob] = []


class WebhookSecret(_Snapshot):
    """The signing secret of an endpoint that is used for the first time. The API does not show it again."""

    endpoint_id: str
    url: str
    secret: str = Field(repr=False)
