"""Which fields of jobs, batches, deliveries and events a viewer sees. All rules are in this module.

Each field has a rule. A field without a rule is hidden from everyone (documents) or shown only with admin access
(events), so a new field stays hidden until a rule is added. tests/api/test_redaction.py compares the
tables with the documents and event types.

| Viewer | Sees |
|---|---|
| read or write access, the public | Parameters, status, progress, logs, steps, results, code and message of errors. Of a webhook its host and whether it was delivered. Of the access lists and teams only their own names. A pseudonym of each worker. |
| admin access: the owner, `admin_access`, the user role `admin` | Everything except secrets, which are not in events. |
| monitor | The statistics, with the host names of workers. No additional access to jobs. |
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
    """A principal with their access level to a job, batch or delivery."""

    principal: Principal
    access_level: AccessLevel

    @property
    def has_full_access(self) -> bool:
        """Whether everything except secrets is shown."""
        return self.access_level >= AccessLevel.ADMIN


FieldRule = Callable[[Any, Viewer], Any]
"""Returns what a viewer without admin access sees of a value that is not None. None needs no rule and stays None."""


def _keep(value: Any, _viewer: Viewer) -> Any:
    return value


def _keep_all(*names: str) -> dict[str, FieldRule]:
    return dict.fromkeys(names, _keep)


def _hide(_value: Any, _viewer: Viewer) -> None:
    return None


def _keep_own_names(names: Any, viewer: Viewer) -> list[str]:
    own_names = viewer.principal.identities
    return [name for name in names or () if name in own_names]


def _redact_access_lists(access: Mapping[str, Any], viewer: Viewer) -> Document:
    lists = ("read_access", "write_access", "admin_access")
    return {
        "visibility": access.get("visibility"),
        **{name: _keep_own_names(access.get(name), viewer) for name in lists},
    }


def _redact_url(url: Any, _viewer: Viewer) -> str:
    """Return scheme, host and port of a URL: path and query may hold a token."""
    try:
        parts = urlsplit(str(url))
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return ""
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")


def _redact_webhook(webhook: Mapping[str, Any], viewer: Viewer) -> Document:
    """Return a webhook of a document or of an event without what is private."""
    redacted: Document = {"url": _redact_url(webhook["url"], viewer)}
    if "headers" in webhook:
        redacted["headers"] = {}
    kept = ("include_markdown", "include_metadata", "has_own_secrets")
    return redacted | {name: webhook[name] for name in kept if name in webhook}


def _redact_error(error: Mapping[str, Any], _viewer: Viewer) -> Document:
    return {"code": error["code"], "message": error["message"], "details": {}}


def _redact_delivery_error(error: Mapping[str, Any], _viewer: Viewer) -> Document:
    """Return a delivery error without its message, which may name addresses of the endpoint's network."""
    return {"code": error["code"], "message": f"The delivery failed ({error['code']}).", "details": {}}


def _redact_attempts(attempts: Any, viewer: Viewer) -> list[Document]:
    return [_apply_rules(attempt, DELIVERY_ATTEMPT_FIELD_RULES, viewer) for attempt in attempts]


def pseudonymize_worker(worker_id: Any, _viewer: Viewer | None = None) -> str:
    """Return a stable pseudonym of a worker that does not reveal its host.

    A worker ID has the host name and about 40 random bits. The digest has 32 bits, so each guessed host name matches
    the pseudonym for some random bits. Trying host names therefore confirms none of them.
    """
    return f"worker-{blake2b(str(worker_id).encode(errors='surrogatepass'), digest_size=4).hexdigest()}"


def _redact_actor(actor: Any, viewer: Viewer) -> str:
    """Return an actor: a worker as its pseudonym, a user other than the viewer only as `user`."""
    actor_type, _, name = str(actor).partition(":")
    if actor_type == "worker":
        return f"worker:{pseudonymize_worker(name)}"
    if actor_type == "user" and name == viewer.principal.user_id:
        return str(actor)
    return actor_type


def _redact_projection_error(error: Mapping[str, Any], _viewer: Viewer) -> Document:
    """Return which event could not be projected, without the message, which may quote the event."""
    return {**error, "message": "This document is incomplete: an event could not be projected."}


_DOCUMENT_RULES: Final[Mapping[str, FieldRule]] = {
    **_keep_all("user_id", "status", "created_at", "updated_at", "version", "position", "truncated", "omitted"),
    "projection_error": _redact_projection_error,
}
"""Rules for fields of all documents."""
_SUBMISSION_RULES: Final[Mapping[str, FieldRule]] = {
    **_keep_all("user_id", "parameters"),
    "access_control": _redact_access_lists,
    "teams": _keep_own_names,
    "webhook": _redact_webhook,
}
"""Rules for fields of jobs, batches and their submission events."""
JOB_FIELD_RULES: Final[Mapping[str, FieldRule]] = {
    **_DOCUMENT_RULES,
    **_SUBMISSION_RULES,
    **_keep_all("job_id", "job_type", "job_name", "batch_id", "priority", "max_attempts", "timeout_s", "due_at"),
    **_keep_all("started_at", "completed_at", "attempt", "retries", "cancel_requested", "archived"),
    **_keep_all("progress", "results", "logs", "steps"),
    "error": _redact_error,
    "worker_id": pseudonymize_worker,
}
BATCH_FIELD_RULES: Final[Mapping[str, FieldRule]] = {
    **_DOCUMENT_RULES,
    **_SUBMISSION_RULES,
    **_keep_all("batch_id", "batch_name", "job_ids", "completed_at", "summary", "paused", "archived"),
    **_keep_all("total_jobs", "pending_jobs", "processing_jobs", "completed_jobs", "failed_jobs", "cancelled_jobs"),
}
DELIVERY_FIELD_RULES: Final[Mapping[str, FieldRule]] = {
    **_DOCUMENT_RULES,
    **_keep_all("delivery_id", "type", "job_id", "batch_id", "source_version", "host", "attempt"),
    **_keep_all("queued_at", "next_attempt_at", "delivered_at"),
    "url": _redact_url,
    "endpoint_id": _hide,  # a digest of the URL, with which guesses of a token in the URL could be checked
    "sequence": _hide,
    "reason": _hide,
    "attempts": _redact_attempts,
}


def _clear(_value: Any, _viewer: Viewer) -> str:
    return ""


DELIVERY_ATTEMPT_FIELD_RULES: Final[Mapping[str, FieldRule]] = {
    **_keep_all("attempt", "attempted_at", "status_code", "duration_s", "next_attempt_at"),
    "error": _redact_delivery_error,
    "response": _clear,
    "body_sha256": _hide,
}
METADATA_FIELD_RULES: Final[Mapping[str, FieldRule]] = {
    "actor": _redact_actor,
    **_keep_all("correlation_id", "causation_id"),
}
"""`request_fingerprint` and `traceparent` have no rule: they are digests of requests, and IDs of other systems."""

_WORKER_RULES: Final[Mapping[str, FieldRule]] = {"worker_id": pseudonymize_worker, **_keep_all("attempt")}
_ACTION_RULES: Final[Mapping[str, FieldRule]] = {"by": _redact_actor, **_keep_all("reason")}
_ACCESS_RULES: Final[Mapping[str, FieldRule]] = {"by": _redact_actor, "access_control": _redact_access_lists}
_ACTION_EVENTS: Final = (
    *("JobCancelRequested", "JobCancelled", "JobArchived", "JobUnarchived", "JobDeleted", "DeliveryRequeued"),
    *("BatchPaused", "BatchResumed", "BatchArchived", "BatchUnarchived", "BatchDeleted"),
)
EVENT_FIELD_RULES: Final[Mapping[str, Mapping[str, FieldRule]]] = {
    **dict.fromkeys(_ACTION_EVENTS, _ACTION_RULES),
    "JobClaimed": {**_WORKER_RULES, **_keep_all("via", "seen"), "free_slots": _hide},
    "JobLeaseExpired": _WORKER_RULES,
    **dict.fromkeys(("JobAccessChanged", "BatchAccessChanged"), _ACCESS_RULES),
    "JobSubmitted": {
        **_SUBMISSION_RULES,
        **_keep_all("job_type", "batch_id", "job_name", "priority", "not_before", "max_attempts"),
        **_keep_all("timeout_s", "template"),
    },
    "JobProgressed": _keep_all("attempt", "step", "percent", "message"),
    "JobLogged": _keep_all("attempt", "entries"),
    "StepCompleted": {
        **_keep_all("attempt", "step", "key", "output", "duration_s", "tokens_used", "warnings"),
        **_keep_all("reused_from", "cache_version", "repeat_on_restart", "files"),
    },
    "JobCompleted": _keep_all("attempt", "results"),
    "JobAttemptFailed": {"error": _redact_error, **_keep_all("attempt", "retry_at")},
    "JobFailed": {"error": _redact_error, **_keep_all("attempt")},
    "JobReleased": {**_WORKER_RULES, "reason": _clear, **_keep_all("is_machine_failure")},
    "JobRestarted": {**_ACTION_RULES, **_keep_all("reuse_steps")},
    "JobUpdated": {"by": _redact_actor, **_keep_all("parameters", "priority", "not_before", "difference")},
    "WorkerFenced": {**_WORKER_RULES, **_keep_all("rejected_event")},
    "BatchSubmitted": {**_SUBMISSION_RULES, **_keep_all("batch_name", "total_jobs", "job_ids")},
    "BatchFinished": _keep_all("status", "counts", "summary"),
    "BatchReopened": {},
    "DeliveryQueued": {
        **_keep_all("source", "source_version", "event_type", "user_id", "batch_id"),
        "webhook": _redact_webhook,
    },
    "DeliveryAttempted": {name: rule for name, rule in DELIVERY_ATTEMPT_FIELD_RULES.items() if name != "attempted_at"},
    "DeliverySucceeded": _keep_all("attempt"),
    "DeliveryAbandoned": {"reason": _clear},
    "WorkerStarted": dict.fromkeys(("host", "slots", "job_types", "software_version", "settings_digest"), _hide),
    "WorkerStopped": {"reason": _hide},
    "WorkerLost": {"declared_by": _hide},
    "PositionVoided": {},
}


def _apply_rules(document: Mapping[str, Any], rules: Mapping[str, FieldRule], viewer: Viewer) -> Document:
    return {
        name: None if value is None else rules[name](value, viewer) for name, value in document.items() if name in rules
    }


FILTER_FIELDS: Final[Mapping[str, str]] = {
    "after_sequence": "sequence",
    **dict.fromkeys(("created_after", "created_before", "cursor", "sort"), "created_at"),
    **dict.fromkeys(("track", "event", "day", "language"), "parameters"),
    "waiting_for": "due_at",
}
"""Maps a filter to the field that it compares, if the names differ."""


def find_hidden_filters(names: Iterable[str], rules: Mapping[str, FieldRule]) -> list[str]:
    """Return the filters on fields that are hidden without admin access: their matches would reveal the values."""
    return [name for name in names if rules.get(FILTER_FIELDS.get(name, name), _keep) is not _keep]


def redact_document(document: Document, rules: Mapping[str, FieldRule], viewer: Viewer) -> Document:
    """Return a document as the viewer sees it. `rules` is such as JOB_FIELD_RULES."""
    if viewer.has_full_access:
        return {name: value for name, value in document.items() if name in rules}
    return _apply_rules(document, rules, viewer)


def redact_event(event: RecordedEvent, viewer: Viewer) -> Document:
    """Return an event as the viewer sees it. The hash covers hidden fields, so it is hidden with them."""
    data, meta, digest = event.data, event.meta.to_document(), event.hash.hex()
    is_redacted = not viewer.has_full_access
    return {
        "position": event.position,
        "event_id": event.event_id,
        "stream": event.stream,
        "version": event.version,
        "type": event.type,
        "time": event.time,
        "schema": event.schema,
        "data": _apply_rules(event.payload_fields, EVENT_FIELD_RULES.get(event.type, {}), viewer)
        if is_redacted
        else data,
        "meta": _apply_rules(meta, METADATA_FIELD_RULES, viewer) if is_redacted else meta,
        "hash": None if is_redacted else digest,
    }
