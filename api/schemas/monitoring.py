"""Response models of statistics and health checks."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field

from jobledger.api.schemas.batches import WaitingCounts
from jobledger.api.schemas.response_models import SuccessResponse


class JobCounts(BaseModel):
    """Jobs by status."""

    total: int
    pending: int
    processing: int
    completed: int
    failed: int
    cancelled: int


class BatchCounts(BaseModel):
    """All batches, and those with unfinished jobs."""

    total: int
    active: int


class WebhookCounts(BaseModel):
    """Deliveries by status."""

    total: int
    pending: int
    delivered: int
    abandoned: int


class TrackCounts(BaseModel):
    """The jobs of one track."""

    track: str = Field(alias="_id")
    count: int
    completed: int
    failed: int


class Throughput(BaseModel):
    """Finished jobs per minute, on average."""

    last_minute: float
    last_hour: float


class Durations(BaseModel):
    """Run times of completed jobs. null if there are none."""

    completed: int
    average_seconds: float | None
    p50_seconds: float | None
    p90_seconds: float | None
    p99_seconds: float | None


class MinuteStatistics(BaseModel):
    """The jobs that finished in one minute, and the average run time of the completed ones."""

    started_at: datetime
    completed: int
    failed: int
    cancelled: int
    average_seconds: float | None


class WorkerStatus(BaseModel):
    """An active worker. `slots` is how many jobs it can run at a time, `busy_slots` how many it runs."""

    worker_id: str
    host: str
    slots: int
    busy_slots: int
    lease_until: datetime = Field(description="By the clock of the database server. Heartbeats extend it.")
    problem: str | None = Field(description="Why the worker claims no jobs: a problem of its machine. null: healthy.")
    unhealthy_since: datetime | None


class LogStatus(BaseModel):
    """The newest position of the log, the position of the views, and the difference."""

    head: int
    projection_position: int
    lag: int


class StatisticsContent(BaseModel):
    """Statistics from the counters of the views."""

    jobs: JobCounts
    waiting_for: WaitingCounts
    batches: BatchCounts
    webhooks: WebhookCounts
    tracks: list[TrackCounts] = Field(description="The first 1000 by name.")
    throughput: Throughput
    durations: Durations
    minutes: list[MinuteStatistics] = Field(description="The last 60 minutes, oldest first.")
    workers: list[WorkerStatus]
    log: LogStatus


class StatisticsResponse(SuccessResponse):
    """Statistics of jobs, batches, webhooks, workers and views."""

    stats: StatisticsContent


class ReadinessResponse(SuccessResponse):
    """The server is ready. `projection_position` is the position of the views."""

    projection_position: int
