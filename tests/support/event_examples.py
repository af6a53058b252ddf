"""One complete example of every event. Add new fields here. The golden events do not change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from jobledger.ledger.domain.events import (
    AccessControl,
    Asset,
    BatchAccessChanged,
    BatchArchived,
    BatchDeleted,
    BatchFinished,
    BatchJobCounts,
    BatchPaused,
    BatchReopened,
    BatchResumed,
    BatchSubmitted,
    BatchSummary,
    BatchUnarchived,
    DeliveryAbandoned,
    DeliveryAttempted,
    DeliveryQueued,
    DeliveryRequeued,
    DeliverySucceeded,
    ErrorInfo,
    Event,
    JobAccessChanged,
    JobArchived,
    JobAttemptFailed,
    JobCancelled,
    JobCancelRequested,
    JobClaimed,
    JobCompleted,
    JobDeleted,
    JobFailed,
    JobLeaseExpired,
    JobLogged,
    JobProgressed,
    JobReleased,
    JobRestarted,
    JobResults,
    JobSubmitted,
    JobUnarchived,
    JobUpdated,
    LogEntry,
    PositionVoided,
    ResultFile,
    ResultMetadata,
    StepCompleted,
    Webhook,
    WorkerFenced,
    WorkerLost,
    WorkerStarted,
    WorkerStopped,
)

NOON = datetime(2025, 2, 1, 12, 0, 0, 123000, tzinfo=UTC)
ACCESS = AccessControl(visibility="team", read_access=["bob"], write_access=["carol"], admin_access=["dave"])
WEBHOOK = Webhook(
    url="https://example.org/hook",
    header_names=["Authorization"],
    secrets_ref="hook-1",
    include_markdown=True,
    include_metadata=True,
)
ERROR = ErrorInfo(
    code="PAGE_GONE", message="Die Seite gibt es nicht mehr: 404", details={"status": 404, "tries": [1, 2]}
)
DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
RESULTS = JobResults(
    markdown_file="/events/FOSDEM/talk.md",
    markdown_url="/api/events/files/FOSDEM/talk.md",
    assets=[Asset(type="image", path="/events/FOSDEM/1.png", url="/api/events/files/FOSDEM/1.png")],
    files=[ResultFile(path="FOSDEM/talk.md", sha256=DIGEST, size=4711, media_type="text/markdown")],
    metadata=ResultMetadata.model_validate(
        {"processed_at": NOON, "duration": 12.5, "tokens_used": 7, "warnings": ["no slides"], "language": "de"}
    ),
)

EVENT_EXAMPLES: tuple[Event, ...] = (
    JobSubmitted(
        job_type="session",
        parameters={"event": "FOSDEM 2025", "session": "Ökologisch, öffentlich & offen", "x": 0.1, "deep": [{"n": 1}]},
        batch_id="batch-679f3d0c8f1b2a0001000000",
        job_name="talk 1",
        user_id="alice",
        access_control=ACCESS,
        webhook=WEBHOOK,
        priority=5,
        not_before=NOON,
        max_attempts=4,
        timeout_s=90.5,
        template="default",
    ),
    JobClaimed(worker_id="worker-1", attempt=1, via="queue", seen=4, free_slots=5),
    JobProgressed(attempt=1, step="page", percent=12.5, message="Seite gelesen"),
    JobLogged(attempt=1, entries=[LogEntry(timestamp=NOON, level="info", message="hello\nworld")]),
    StepCompleted(
        attempt=1,
        step="page",
        key=DIGEST,
        output={"title": "A talk", "links": ["https://example.org"], "none": None},
        duration_s=0.25,
        tokens_used=3,
        warnings=["slow"],
        repeat_on_restart=True,
    ),
    JobReleased(worker_id="worker-1", attempt=1, reason="the worker is shutting down"),
    JobUpdated(by="user:alice", parameters={"event": "FOSDEM"}, priority=2, not_before=NOON + timedelta(hours=1)),
    JobAttemptFailed(attempt=2, error=ERROR, retry_at=NOON + timedelta(seconds=5)),
    JobLeaseExpired(worker_id="worker-2", attempt=3),
    JobCancelRequested(by="user:alice", reason="not needed"),
    JobCancelled(by="user:alice", reason="not needed"),
    JobRestarted(by="user:alice", reason="needed after all", reuse_steps=False),
    JobFailed(attempt=4, error=ERROR),
    JobCompleted(attempt=5, results=RESULTS),
    WorkerFenced(worker_id="worker-2", attempt=3, rejected_event="JobCompleted"),
    JobAccessChanged(by="user:alice", access_control=ACCESS),
    JobArchived(by="user:alice", reason="done"),
    JobUnarchived(by="user:alice", reason="not done"),
    JobDeleted(by="user:alice", reason="done"),
    BatchSubmitted(
        batch_name="FOSDEM",
        total_jobs=2,
        job_ids=["job-1", "job-2"],
        parameters={"event": "FOSDEM"},
        webhook=WEBHOOK,
        user_id="alice",
        access_control=ACCESS,
    ),
    BatchPaused(by="user:alice", reason="too early"),
    BatchResumed(by="user:alice", reason="now"),
    BatchFinished(
        status="partial",
        counts=BatchJobCounts(completed=1, failed=1, cancelled=0),
        summary=BatchSummary(duration=12.5, tokens_used=7),
    ),
    BatchReopened(),
    BatchAccessChanged(by="user:alice", access_control=ACCESS),
    BatchArchived(by="user:alice", reason="done"),
    BatchUnarchived(by="user:alice", reason="not done"),
    BatchDeleted(by="user:alice", reason="done"),
    DeliveryQueued(
        source="job-679f3d0c8f1b2a0001000000",
        source_version=5,
        event_type="job.completed",
        user_id="alice",
        webhook=WEBHOOK,
        batch_id="batch-679f3d0c8f1b2a0001000000",
    ),
    DeliveryAttempted(
        attempt=1,
        status_code=503,
        error=ErrorInfo(code="HTTP_ERROR", message="503 Service Unavailable"),
        response="gleich zurück",
        duration_s=0.25,
        body_sha256=DIGEST,
        next_attempt_at=NOON + timedelta(seconds=5),
    ),
    DeliverySucceeded(attempt=2),
    DeliveryAbandoned(reason="410 Gone"),
    DeliveryRequeued(by="user:alice", reason="the endpoint is back"),
    WorkerStarted(
        host="machine-1",
        slots=5,
        job_types=["echo", "session"],
        software_version="0.1.0",
        settings_digest="44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    ),
    WorkerStopped(reason="stopped"),
    WorkerLost(declared_by="machine-2-17-a1b2c3"),
    PositionVoided(),
)


def make_job_submitted(**changes: Any) -> JobSubmitted:
    """Return a small, valid job."""
    return JobSubmitted(**{"job_type": "echo", "parameters": {"text": "hello"}, "user_id": "alice", **changes})


def make_results() -> JobResults:
    return JobResults(metadata=ResultMetadata(processed_at=NOON, duration=1.5))
