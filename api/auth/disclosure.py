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

from jobledger.ledger.domain.access import Principal, Right
from jobledger.ledger.domain.events import Recorded
from jobledger.ledger.mongo.connection import Document


@dataclass(frozen=True, slots=True)
class Viewer:
    """Somebody who looks at a job, batch or delivery, and their right to it."""

    principal: Principal
    right: Right

    @property
    def sees_all(self) -> bool:
        """Return whether everything but secrets is shown."""
        return self.right >= Right.ADMIN


Rule = Callable[[Any, Viewer], Any]
"""Returns what is shown of a field's value to a viewer without admin access."""


def _shown(value: Any, _viewer: Viewer) -> Any:
    return value


def _hidden(_value: Any, _viewer: Viewer) -> None:
    return None


def _own(names: Any, viewer: Viewer) -> list[str]:
    mine = viewer.principal.names
    return [name for name in names or () if name in mine]


def _own_lists(access: Mapping[str, Any] | None, viewer: Viewer) -> Document | None:
    if access is None:
        return None
    lists = ("read_access", "write_access", "admin_access")
    return {"visibility": access.get("visibility"), **{name: _own(access.get(name), viewer) for name in lists}}


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
    kept = ("include_markdown", "include_metadata", "signed")
    return shown | {name: webhook[name] for name in kept if name in webhook}


def _error(error: Mapping[str, Any] | None, _viewer: Viewer) -> Document | None:
    return None if error is None else {"code": error["code"], "message": error["message"], "details": {}}


def _call_error(error: Mapping[str, Any] | None, _viewer: Viewer) -> Document | None:
    """Return an error of a webhook: its message may name addresses of the receiver's network."""
    if error is None:
        return None
    return {"code": error["code"], "message": f"The receiver was not told ({error['code']}).", "details": {}}


def _attempts(attempts: Any, viewer: Viewer) -> list[Document]:
    return [_filtered(attempt, ATTEMPT, viewer) for attempt in attempts]


def pseudonym(worker_id: Any, _viewer: Viewer | None = None) -> str | None:
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
        return f"worker:{pseudonym(name)}"
    if kind == "user" and name == viewer.principal.user_id:
        return str(actor)
    return kind


def _projection_error(error: Mapping[str, Any] | None, _viewer: Viewer) -> Document | None:
    """Return which event could not be projected, without the message: it may quote what the event holds."""
    return None if error is None else {**error, "message": "This does not show everything that has happened."}


_CUT: Final[Mapping[str, Rule]] = {
    "truncated": _shown,
    "omitted": _shown,
    "projection_error": _projection_error,
}
JOB: Final[Mapping[str, Rule]] = {
    "job_id": _shown,
    "job_type": _shown,
    "job_name": _shown,
    "status": _shown,
    "created_at": _shown,
    "updated_at": _shown,
    "started_at": _shown,
    "completed_at": _shown,
    "parameters": _shown,
    "webhook": _webhook,
    "batch_id": _shown,
    "progress": _shown,
    "results": _shown,
    "error": _error,
    "logs": _shown,
    "worker_id": pseudonym,
    "attempt": _shown,
    "retries": _shown,
    "max_attempts": _shown,
    "timeout_s": _shown,
    "priority": _shown,
    "due_at": _shown,
    "user_id": _shown,
    "access_control": _own_lists,
    "teams": _own,
    "cancel_requested": _shown,
    "archived": _shown,
    "steps": _shown,
    "version": _shown,
    "position": _shown,
    **_CUT,
}
BATCH: Final[Mapping[str, Rule]] = {
    "batch_id": _shown,
    "batch_name": _shown,
    "status": _shown,
    "created_at": _shown,
    "updated_at": _shown,
    "completed_at": _shown,
    "job_ids": _shown,
    "total_jobs": _shown,
    "pending_jobs": _shown,
    "processing_jobs": _shown,
    "completed_jobs": _shown,
    "failed_jobs": _shown,
    "cancelled_jobs": _shown,
    "webhook": _webhook,
    "parameters": _shown,
    "summary": _shown,
    "user_id": _shown,
    "access_control": _own_lists,
    "teams": _own,
    "paused": _shown,
    "archived": _shown,
    "version": _shown,
    "position": _shown,
    **_CUT,
}
DELIVERY: Final[Mapping[str, Rule]] = {
    "delivery_id": _shown,
    "status": _shown,
    "type": _shown,
    "job_id": _shown,
    "batch_id": _shown,
    "source_version": _shown,
    "url": _host_of,
    "host": _shown,
    "receiver": _hidden,  # a digest of the URL, against which guesses of its token could be tried
    "sequence": _hidden,
    "user_id": _shown,
    "created_at": _shown,
    "updated_at": _shown,
    "queued_at": _shown,
    "next_at": _shown,
    "delivered_at": _shown,
    "reason": _hidden,
    "attempt": _shown,
    "attempts": _attempts,
    "version": _shown,
    "position": _shown,
    **_CUT,
}


def _nothing(_value: Any, _viewer: Viewer) -> str:
    return ""


ATTEMPT: Final[Mapping[str, Rule]] = {
    "attempt": _shown,
    "at": _shown,
    "status_code": _shown,
    "error": _call_error,
    "response": _nothing,
    "duration_s": _shown,
    "body_sha256": _hidden,
    "next_at": _shown,
}
META: Final[Mapping[str, Rule]] = {
    "actor": _actor,
    "correlation_id": _shown,
    "causation_id": _shown,
}
"""`request` and `traceparent` are not named: digests of requests, and of other systems."""

_SUBMISSION: Final[Mapping[str, Rule]] = {
    "user_id": _shown,
    "access_control": _own_lists,
    "teams": _own,
    "webhook": _webhook,
    "parameters": _shown,
}
_OF_WORKER: Final[Mapping[str, Rule]] = {"worker_id": pseudonym, "attempt": _shown}
_BY: Final[Mapping[str, Rule]] = {"by": _actor, "reason": _shown}
_ACCESS: Final[Mapping[str, Rule]] = {"by": _actor, "access_control": _own_lists}
EVENTS: Final[Mapping[str, Mapping[str, Rule]]] = {
    "JobSubmitted": {
        **_SUBMISSION,
        **dict.fromkeys(("job_type", "batch_id", "job_name", "priority", "not_before", "max_attempts"), _shown),
        **dict.fromkeys(("timeout_s", "template"), _shown),
    },
    "JobClaimed": _OF_WORKER,
    "JobProgressed": dict.fromkeys(("attempt", "step", "percent", "message"), _shown),
    "JobLogged": dict.fromkeys(("attempt", "entries"), _shown),
    "StepCompleted": dict.fromkeys(
        ("attempt", "step", "key", "output", "duration_s", "tokens_used", "warnings", "reused_from", "shared_version"),
        _shown,
    ),
    "JobCompleted": dict.fromkeys(("attempt", "results"), _shown),
    "JobAttemptFailed": {"attempt": _shown, "error": _error, "retry_at": _shown},
    "JobFailed": {"attempt": _shown, "error": _error},
    "JobLeaseExpired": _OF_WORKER,
    "JobReleased": {**_OF_WORKER, "reason": _nothing, "machine_trouble": _shown},
    "JobCancelRequested": _BY,
    "JobCancelled": _BY,
    "JobRestarted": {**_BY, "reuse_steps": _shown},
    "JobUpdated": {"by": _actor, **dict.fromkeys(("parameters", "priority", "not_before"), _shown)},
    "JobAccessChanged": _ACCESS,
    "JobArchived": _BY,
    "JobUnarchived": _BY,
    "JobDeleted": _BY,
    "WorkerFenced": {**_OF_WORKER, "refused": _shown},
    "BatchSubmitted": {**_SUBMISSION, **dict.fromkeys(("batch_name", "total_jobs", "job_ids"), _shown)},
    "BatchPaused": _BY,
    "BatchResumed": _BY,
    "BatchFinished": dict.fromkeys(("status", "counts", "summary"), _shown),
    "BatchReopened": {},
    "BatchAccessChanged": _ACCESS,
    "BatchArchived": _BY,
    "BatchUnarchived": _BY,
    "BatchDeleted": _BY,
    "DeliveryQueued": {
        **dict.fromkeys(("source", "source_version", "tells", "user_id", "batch_id"), _shown),
        "webhook": _webhook,
    },
    "DeliveryAttempted": {name: rule for name, rule in ATTEMPT.items() if name != "at"},
    "DeliverySucceeded": {"attempt": _shown},
    "DeliveryAbandoned": {"reason": _nothing},
    "DeliveryRequeued": _BY,
    "PositionVoided": {},
}


def _filtered(document: Mapping[str, Any], rules: Mapping[str, Rule], viewer: Viewer) -> Document:
    return {name: rules[name](value, viewer) for name, value in document.items() if name in rules}


FIELD_OF_FILTER: Final[Mapping[str, str]] = {
    "after_sequence": "sequence",
    **dict.fromkeys(("created_after", "created_before", "cursor", "sort"), "created_at"),
    **dict.fromkeys(("track", "event", "day", "language"), "parameters"),
}
"""Which field a filter compares, where it has another name."""


def hidden_filters(names: Iterable[str], rules: Mapping[str, Rule]) -> list[str]:
    """Return the filters that compare a field which is not shown without admin access: their matches would tell it."""
    return [name for name in names if rules.get(FIELD_OF_FILTER.get(name, name), _shown) is not _shown]


def shown(document: Document, rules: Mapping[str, Rule], viewer: Viewer) -> Document:
    """Return a document of a view as the viewer sees it; `rules` is JOB, BATCH or DELIVERY."""
    if viewer.sees_all:
        return {name: value for name, value in document.items() if name in rules}
    return _filtered(document, rules, viewer)


def shown_event(event: Recorded, viewer: Viewer) -> Document:
    """Return an event as the viewer sees it. Its hash covers what is hidden, so it is hidden, too."""
    data, meta, digest = event.data, event.meta.payload(), event.hash.hex()
    hidden = not viewer.sees_all
    return {
        "position": event.position,
        "event_id": event.event_id,
        "stream": event.stream,
        "version": event.version,
        "type": event.type,
        "time": event.time,
        "schema": event.schema,
        "data": _filtered(event.fields, EVENTS.get(event.type, {}), viewer) if hidden else data,
        "meta": _filtered(meta, META, viewer) if hidden else meta,
        "hash": None if hidden else digest,
    }
