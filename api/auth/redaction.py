"""api: what each role is shown of jobs, batches, deliveries and events. The only place where that is decided.

Every field is named here with a rule. A field that is not named is shown to nobody (documents) or only to those with
admin access (events), so a new field stays hidden until somebody decides. tests/api/test_disclosure.py compares the
tables with the documents and event types.

| Viewer | Sees |
|---|---|
| read or write access, the public | The work: parameters, status, progress, logs, steps, results, code and message of errors. Of a webhook its host and whether it arrived. Of the access lists and teams only their own names. A pseudonym of each worker. |
| admin access: the owner, `admin_access`, system admins | Everything but secrets, which are in no event. |
| monitor | The statistics, with the host names of workers; of jobs no more than anybody. |
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final
from urllib.parse import urlsplit

from jobledger.ledger.domain.access import AccessLevel, Principal
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.mongo.connection import Document


@dataclass(frozen=True, slots=True)
class Viewer:
    """Somebody who looks at a job, batch or delivery, and their right to it."""

    principal: Principal
    right: AccessLevel

    @property
    def has_full_access(self) -> bool:
        """Return whether everything but secrets is shown."""
        return self.right >= AccessLevel.ADMIN


FieldRule = Callable[[Any, Viewer], Any]
"""Returns what is shown of a field's value to a viewer without admin access."""


def _keep(value: Any, _viewer: Viewer) -> Any:
    return value


def _hide(_value: Any, _viewer: Viewer) -> None:
    return None


def _keep_own_names(names: Any, viewer: Viewer) -> list[str]:
    mine = viewer.principal.identities
    return [name for name in names or () if name in mine]


def _own_lists(access: Mapping[str, Any] | None, viewer: Viewer) -> Document | None:
    if access is None:
        return None
    lists = ("read_access", "write_access", "admin_access")
    return {
        "visibility": access.get("visibility"),
        **{name: _keep_own_names(access.get(name), viewer) for name in lists},
    }


def _host_of(url: Any, _viewer: Viewer) -> str:
    """Return scheme, host and port of a URL: path and query may hold a token."""
    try:
        parts = urlsplit(str(url))
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return ""
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")


def _webhook(webhook: Mapping[str, Any] | None, viewer: Viewer) -> Document | None:
    """Return a webhook, as a document has it or as an event does."""
    if webhook is None:
        return None
    shown: Document = {"url": _host_of(webhook["url"], viewer)}
    if "headers" in webhook:
        shown["headers"] = {}
    kept = ("include_markdown", "include_metadata", "has_own_secrets")
    return shown | {name: webhook[name] for name in kept if name in webhook}


def _error(error: Mapping[str, Any] | None, _viewer: Viewer) -> Document | None:
    return None if error is None else {"code": error["code"], "message": error["message"], "details": {}}


def _call_error(error: Mapping[str, Any] | None, _viewer: Viewer) -> Document | None:
    """Return an error of a webhook: its message may name addresses of the receiver's network."""
    if error is None:
        return None
    return {"code": error["code"], "message": f"The receiver was not told ({error['code']}).", "details": {}}


def _attempts(attempts: Any, viewer: Viewer) -> list[Document]:
    return [_filtered(attempt, ATTEMPT_RULES, viewer) for attempt in attempts]


def pseudonymize_worker(worker_id: Any, _viewer: Viewer | None = None) -> str | None:
    """Return a stable name of a worker that does not reveal its host.

    A worker's ID holds its host name and about 40 bits that nobody knows. Of 32 bits of digest, every guess of a
    host name explains as many as any other, so that trying them all confirms none.
    """
    if worker_id is None:
        return None
    return f"worker-{blake2b(str(worker_id).encode(errors='surrogatepass'), digest_size=4).hexdigest()}"


def _actor(actor: Any, viewer: Viewer) -> str:
    """Return who did something: a worker by its pseudonym, others than the viewer only by their kind."""
    kind, _, name = str(actor).partition(":")
    if kind == "worker":
        return f"worker:{pseudonymize_worker(name)}"
    if kind == "user" and name == viewer.principal.user_id:
        return str(actor)
    return kind


def _projection_error(error: Mapping[str, Any] | None, _viewer: Viewer) -> Document | None:
    """Return which event could not be projected, without the message: it may quote what the event holds."""
    return None if error is None else {**error, "message": "This does not show everything that has happened."}


_CUT: Final[Mapping[str, FieldRule]] = {
    "truncated": _keep,
    "omitted": _keep,
    "projection_error": _projection_error,
}
JOB_RULES: Final[Mapping[str, FieldRule]] = {
    "job_id": _keep,
    "job_type": _keep,
    "job_name": _keep,
    "status": _keep,
    "created_at": _keep,
    "updated_at": _keep,
    "started_at": _keep,
    "completed_at": _keep,
    "parameters": _keep,
    "webhook": _webhook,
    "batch_id": _keep,
    "progress": _keep,
    "results": _keep,
    "error": _error,
    "logs": _keep,
    "worker_id": pseudonymize_worker,
    "attempt": _keep,
    "retries": _keep,
    "max_attempts": _keep,
    "timeout_s": _keep,
    "priority": _keep,
    "due_at": _keep,
    "user_id": _keep,
    "access_control": _own_lists,
    "teams": _keep_own_names,
    "cancel_requested": _keep,
    "archived": _keep,
    "steps": _keep,
    "version": _keep,
    "position": _keep,
    **_CUT,
}
BATCH_RULES: Final[Mapping[str, FieldRule]] = {
    "batch_id": _keep,
    "batch_name": _keep,
    "status": _keep,
    "created_at": _keep,
    "updated_at": _keep,
    "completed_at": _keep,
    "job_ids": _keep,
    "total_jobs": _keep,
    "pending_jobs": _keep,
    "processing_jobs": _keep,
    "completed_jobs": _keep,
    "failed_jobs": _keep,
    "cancelled_jobs": _keep,
    "webhook": _webhook,
    "parameters": _keep,
    "summary": _keep,
    "user_id": _keep,
    "access_control": _own_lists,
    "teams": _keep_own_names,
    "paused": _keep,
    "archived": _keep,
    "version": _keep,
    "position": _keep,
    **_CUT,
}
DELIVERY_RULES: Final[Mapping[str, FieldRule]] = {
    "delivery_id": _keep,
    "status": _keep,
    "type": _keep,
    "job_id": _keep,
    "batch_id": _keep,
    "source_version": _keep,
    "url": _host_of,
    "host": _keep,
    "endpoint_id": _hide,  # a digest of the URL, against which guesses of its token could be tried
    "sequence": _hide,
    "user_id": _keep,
    "created_at": _keep,
    "updated_at": _keep,
    "queued_at": _keep,
    "next_attempt_at": _keep,
    "delivered_at": _keep,
    "reason": _hide,
    "attempt": _keep,
    "attempts": _attempts,
    "version": _keep,
    "position": _keep,
    **_CUT,
}


def _blank(_value: Any, _viewer: Viewer) -> str:
    return ""


ATTEMPT_RULES: Final[Mapping[str, FieldRule]] = {
    "attempt": _keep,
    "attempted_at": _keep,
    "status_code": _keep,
    "error": _call_error,
    "response": _blank,
    "duration_s": _keep,
    "body_sha256": _hide,
    "next_attempt_at": _keep,
}
METADATA_RULES: Final[Mapping[str, FieldRule]] = {
    "actor": _actor,
    "correlation_id": _keep,
    "causation_id": _keep,
}
"""`request` and `traceparent` are not named: digests of requests, and of other systems."""

_SUBMISSION: Final[Mapping[str, FieldRule]] = {
    "user_id": _keep,
    "access_control": _own_lists,
    "teams": _keep_own_names,
    "webhook": _webhook,
    "parameters": _keep,
}
_OF_WORKER: Final[Mapping[str, FieldRule]] = {"worker_id": pseudonymize_worker, "attempt": _keep}
_BY: Final[Mapping[str, FieldRule]] = {"by": _actor, "reason": _keep}
_ACCESS: Final[Mapping[str, FieldRule]] = {"by": _actor, "access_control": _own_lists}
EVENT_RULES: Final[Mapping[str, Mapping[str, FieldRule]]] = {
    "JobSubmitted": {
        **_SUBMISSION,
        **dict.fromkeys(("job_type", "batch_id", "job_name", "priority", "not_before", "max_attempts"), _keep),
        **dict.fromkeys(("timeout_s", "template"), _keep),
    },
    "JobClaimed": _OF_WORKER,
    "JobProgressed": dict.fromkeys(("attempt", "step", "percent", "message"), _keep),
    "JobLogged": dict.fromkeys(("attempt", "entries"), _keep),
    "StepCompleted": dict.fromkeys(
        ("attempt", "step", "key", "output", "duration_s", "tokens_used", "warnings", "reused_from", "cache_version"),
        _keep,
    ),
    "JobCompleted": dict.fromkeys(("attempt", "results"), _keep),
    "JobAttemptFailed": {"attempt": _keep, "error": _error, "retry_at": _keep},
    "JobFailed": {"attempt": _keep, "error": _error},
    "JobLeaseExpired": _OF_WORKER,
    "JobReleased": {**_OF_WORKER, "reason": _blank, "is_machine_failure": _keep},
    "JobCancelRequested": _BY,
    "JobCancelled": _BY,
    "JobRestarted": {**_BY, "reuse_steps": _keep},
    "JobUpdated": {"by": _actor, **dict.fromkeys(("parameters", "priority", "not_before"), _keep)},
    "JobAccessChanged": _ACCESS,
    "JobArchived": _BY,
    "JobUnarchived": _BY,
    "JobDeleted": _BY,
    "WorkerFenced": {**_OF_WORKER, "rejected_event": _keep},
    "BatchSubmitted": {**_SUBMISSION, **dict.fromkeys(("batch_name", "total_jobs", "job_ids"), _keep)},
    "BatchPaused": _BY,
    "BatchResumed": _BY,
    "BatchFinished": dict.fromkeys(("status", "counts", "summary"), _keep),
    "BatchReopened": {},
    "BatchAccessChanged": _ACCESS,
    "BatchArchived": _BY,
    "BatchUnarchived": _BY,
    "BatchDeleted": _BY,
    "DeliveryQueued": {
        **dict.fromkeys(("source", "source_version", "event_type", "user_id", "batch_id"), _keep),
        "webhook": _webhook,
    },
    "DeliveryAttempted": {name: rule for name, rule in ATTEMPT_RULES.items() if name != "attempted_at"},
    "DeliverySucceeded": {"attempt": _keep},
    "DeliveryAbandoned": {"reason": _blank},
    "DeliveryRequeued": _BY,
    "PositionVoided": {},
}


def _filtered(document: Mapping[str, Any], rules: Mapping[str, FieldRule], viewer: Viewer) -> Document:
    return {name: rules[name](value, viewer) for name, value in document.items() if name in rules}


FILTER_FIELDS: Final[Mapping[str, str]] = {
    "after_sequence": "sequence",
    **dict.fromkeys(("created_after", "created_before", "cursor", "sort"), "created_at"),
    **dict.fromkeys(("track", "event", "day", "language"), "parameters"),
}
"""Which field a filter compares, where it has another name."""


def find_hidden_filters(names: Iterable[str], rules: Mapping[str, FieldRule]) -> list[str]:
    """Return the filters that compare a field which is not shown without admin access: their matches would tell it."""
    return [name for name in names if rules.get(FILTER_FIELDS.get(name, name), _keep) is not _keep]


def redact_document(document: Document, rules: Mapping[str, FieldRule], viewer: Viewer) -> Document:
    """Return a document of a view as the viewer sees it; `rules` is JOB, BATCH or DELIVERY."""
    if viewer.has_full_access:
        return {name: value for name, value in document.items() if name in rules}
    return _filtered(document, rules, viewer)


def redact_event(event: RecordedEvent, viewer: Viewer) -> Document:
    """Return an event as the viewer sees it. Its hash covers what is hidden, so it is hidden, too."""
    data, meta, digest = event.data, event.meta.to_document(), event.hash.hex()
    hidden = not viewer.has_full_access
    return {
        "position": event.position,
        "event_id": event.event_id,
        "stream": event.stream,
        "version": event.version,
        "type": event.type,
        "time": event.time,
        "schema": event.schema,
        "data": _filtered(event.payload, EVENT_RULES.get(event.type, {}), viewer) if hidden else data,
        "meta": _filtered(meta, METADATA_RULES, viewer) if hidden else meta,
        "hash": None if hidden else digest,
    }
