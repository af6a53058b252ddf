"""Jobledger: an event-sourced job queue on MongoDB.

The names in `__all__` are the public API. Each is imported on first use, so `import jobledger` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from jobledger.client.asynchronous.batches import AsyncBatchHandle
    from jobledger.client.asynchronous.client import AsyncClient
    from jobledger.client.asynchronous.event_stream import AsyncEventStream
    from jobledger.client.asynchronous.jobs import AsyncJobHandle
    from jobledger.client.errors import (
        ApiUnavailableError,
        AuthenticationError,
        CheckpointError,
        ClientError,
        ConflictError,
        ForbiddenError,
        InvalidRequestError,
        InvalidResultError,
        JobCancelledError,
        JobFailedError,
        NotFoundError,
        RateLimitError,
        ServerError,
        UnexpectedResponseError,
        WaitTimeoutError,
    )
    from jobledger.client.models import Batch, BatchChange, Job
    from jobledger.client.submission import NewJob, Webhook
    from jobledger.client.synchronous.batches import BatchHandle
    from jobledger.client.synchronous.client import Client
    from jobledger.client.synchronous.event_stream import EventStream
    from jobledger.client.synchronous.jobs import JobHandle
    from jobledger.ledger.domain.errors import JobledgerError
    from jobledger.ledger.domain.events import (
        AccessControl,
        BatchAccessChanged,
        BatchArchived,
        BatchDeleted,
        BatchFinished,
        BatchPaused,
        BatchReopened,
        BatchResumed,
        BatchSubmitted,
        BatchUnarchived,
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
        JobSubmitted,
        JobUnarchived,
        JobUpdated,
        RecordedEvent,
        StepCompleted,
        WorkerFenced,
    )
    from jobledger.ledger.subscriber import ledger_client
    from jobledger.workers.job_types.app import App
    from jobledger.workers.job_types.context import Context, SyncContext
    from jobledger.workers.job_types.function import JobFunction, job
    from jobledger.workers.processor import (
        JobContext,
        PermanentError,
        Processor,
        ProcessorError,
        Results,
        SavedFile,
        TransientError,
    )
    from jobledger.workers.retry import Retry

__all__ = [
    "AccessControl",
    "ApiUnavailableError",
    "App",
    "AsyncBatchHandle",
    "AsyncClient",
    "AsyncEventStream",
    "AsyncJobHandle",
    "AuthenticationError",
    "Batch",
    "BatchAccessChanged",
    "BatchArchived",
    "BatchChange",
    "BatchDeleted",
    "BatchFinished",
    "BatchHandle",
    "BatchPaused",
    "BatchReopened",
    "BatchResumed",
    "BatchSubmitted",
    "BatchUnarchived",
    "CheckpointError",
    "Client",
    "ClientError",
    "ConflictError",
    "Context",
    "EventStream",
    "ForbiddenError",
    "InvalidRequestError",
    "InvalidResultError",
    "Job",
    "JobAccessChanged",
    "JobArchived",
    "JobAttemptFailed",
    "JobCancelRequested",
    "JobCancelled",
    "JobCancelledError",
    "JobClaimed",
    "JobCompleted",
    "JobContext",
    "JobDeleted",
    "JobFailed",
    "JobFailedError",
    "JobFunction",
    "JobHandle",
    "JobLeaseExpired",
    "JobLogged",
    "JobProgressed",
    "JobReleased",
    "JobRestarted",
    "JobSubmitted",
    "JobUnarchived",
    "JobUpdated",
    "JobledgerError",
    "NewJob",
    "NotFoundError",
    "PermanentError",
    "Processor",
    "ProcessorError",
    "RateLimitError",
    "RecordedEvent",
    "Results",
    "Retry",
    "SavedFile",
    "ServerError",
    "StepCompleted",
    "SyncContext",
    "TransientError",
    "UnexpectedResponseError",
    "WaitTimeoutError",
    "Webhook",
    "WorkerFenced",
    "__version__",
    "job",
    "ledger_client",
]

_MODULES: Final = {
    "AccessControl": "jobledger.ledger.domain.events",
    "ApiUnavailableError": "jobledger.client.errors",
    "App": "jobledger.workers.job_types.app",
    "AsyncBatchHandle": "jobledger.client.asynchronous.batches",
    "AsyncClient": "jobledger.client.asynchronous.client",
    "AsyncEventStream": "jobledger.client.asynchronous.event_stream",
    "AsyncJobHandle": "jobledger.client.asynchronous.jobs",
    "AuthenticationError": "jobledger.client.errors",
    "Batch": "jobledger.client.models",
    "BatchAccessChanged": "jobledger.ledger.domain.events",
    "BatchArchived": "jobledger.ledger.domain.events",
    "BatchChange": "jobledger.client.models",
    "BatchDeleted": "jobledger.ledger.domain.events",
    "BatchFinished": "jobledger.ledger.domain.events",
    "BatchHandle": "jobledger.client.synchronous.batches",
    "BatchPaused": "jobledger.ledger.domain.events",
    "BatchReopened": "jobledger.ledger.domain.events",
    "BatchResumed": "jobledger.ledger.domain.events",
    "BatchSubmitted": "jobledger.ledger.domain.events",
    "BatchUnarchived": "jobledger.ledger.domain.events",
    "CheckpointError": "jobledger.client.errors",
    "Client": "jobledger.client.synchronous.client",
    "ClientError": "jobledger.client.errors",
    "ConflictError": "jobledger.client.errors",
    "Context": "jobledger.workers.job_types.context",
    "EventStream": "jobledger.client.synchronous.event_stream",
    "ForbiddenError": "jobledger.client.errors",
    "InvalidRequestError": "jobledger.client.errors",
    "InvalidResultError": "jobledger.client.errors",
    "Job": "jobledger.client.models",
    "JobAccessChanged": "jobledger.ledger.domain.events",
    "JobArchived": "jobledger.ledger.domain.events",
    "JobAttemptFailed": "jobledger.ledger.domain.events",
    "JobCancelRequested": "jobledger.ledger.domain.events",
    "JobCancelled": "jobledger.ledger.domain.events",
    "JobCancelledError": "jobledger.client.errors",
    "JobClaimed": "jobledger.ledger.domain.events",
    "JobCompleted": "jobledger.ledger.domain.events",
    "JobContext": "jobledger.workers.processor",
    "JobDeleted": "jobledger.ledger.domain.events",
    "JobFailed": "jobledger.ledger.domain.events",
    "JobFailedError": "jobledger.client.errors",
    "JobFunction": "jobledger.workers.job_types.function",
    "JobHandle": "jobledger.client.synchronous.jobs",
    "JobLeaseExpired": "jobledger.ledger.domain.events",
    "JobLogged": "jobledger.ledger.domain.events",
    "JobProgressed": "jobledger.ledger.domain.events",
    "JobReleased": "jobledger.ledger.domain.events",
    "JobRestarted": "jobledger.ledger.domain.events",
    "JobSubmitted": "jobledger.ledger.domain.events",
    "JobUnarchived": "jobledger.ledger.domain.events",
    "JobUpdated": "jobledger.ledger.domain.events",
    "JobledgerError": "jobledger.ledger.domain.errors",
    "NewJob": "jobledger.client.submission",
    "NotFoundError": "jobledger.client.errors",
    "PermanentError": "jobledger.workers.processor",
    "Processor": "jobledger.workers.processor",
    "ProcessorError": "jobledger.workers.processor",
    "RateLimitError": "jobledger.client.errors",
    "RecordedEvent": "jobledger.ledger.domain.events",
    "Results": "jobledger.workers.processor",
    "Retry": "jobledger.workers.retry",
    "SavedFile": "jobledger.workers.processor",
    "ServerError": "jobledger.client.errors",
    "StepCompleted": "jobledger.ledger.domain.events",
    "SyncContext": "jobledger.workers.job_types.context",
    "TransientError": "jobledger.workers.processor",
    "UnexpectedResponseError": "jobledger.client.errors",
    "WaitTimeoutError": "jobledger.client.errors",
    "Webhook": "jobledger.client.submission",
    "WorkerFenced": "jobledger.ledger.domain.events",
    "job": "jobledger.workers.job_types.function",
    "ledger_client": "jobledger.ledger.subscriber",
}


def __getattr__(name: str) -> object:
    """Load a public name (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("jobledger")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'jobledger' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
