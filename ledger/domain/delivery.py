"""The decider of a delivery: the webhook message about a finished job or batch. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import blake2b
from typing import Final, assert_never

from jobledger.ledger.domain import commands, events, limits
from jobledger.ledger.domain.batch import Batch
from jobledger.ledger.domain.errors import InvalidState, NotFound
from jobledger.ledger.domain.job import Job
from jobledger.ledger.domain.statuses import DeliveryStatus

_PREFIX: Final = "delivery-"
_WEBHOOK_EVENT_TYPES: Final[dict[object, events.WebhookEventType]] = {
    events.JobCompleted: "job.completed",
    events.JobFailed: "job.failed",
    events.JobCancelled: "job.cancelled",
    "completed": "batch.completed",
    "partial": "batch.partial",
    "failed": "batch.failed",
}
"""By the type of the last event of a job, or by the status of a finished batch."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """The state of a delivery that decisions need.

    Attributes:
        spec: The event that queued it.
        status: Its status.
        attempt: The number of all attempts.
        counted_attempts: The number of attempts since it was last queued.
        due_at: When the next attempt is due.
    """

    spec: events.DeliveryQueued
    status: DeliveryStatus = "pending"
    attempt: int = 0
    counted_attempts: int = 0
    due_at: datetime | None = None


def build_delivery_id(source: str, version: int) -> str:
    """Return the ID of the delivery for the event at this version of a job's or batch's stream."""
    return f"{_PREFIX}{source}-{version}"


def parse_source(delivery_id: str) -> str:
    """Return the ID of the job or batch that a delivery reports on."""
    return delivery_id.removeprefix(_PREFIX).rpartition("-")[0]


def build_endpoint_id(user_id: str, url: str) -> str:
    """Return the ID of an endpoint: a URL and the user whose deliveries go there."""
    return blake2b(f"{len(user_id)}{user_id}{url}".encode(errors="surrogatepass"), digest_size=12).hexdigest()


def build_delivery(stream: str, source: Job | Batch, event: events.Event, version: int) -> events.DeliveryQueued | None:
    """Return the delivery for an event that finishes a job or batch with a webhook, else None."""
    event_type = _WEBHOOK_EVENT_TYPES.get(event.status if isinstance(event, events.BatchFinished) else type(event))
    webhook = source.spec.webhook
    if event_type is None or webhook is None:
        return None
    return events.DeliveryQueued(
        source=stream,
        source_version=version,
        event_type=event_type,
        user_id=source.spec.user_id,
        webhook=webhook,
        batch_id=source.spec.batch_id if isinstance(source, Job) else stream,
    )


def decide(command: commands.DeliveryCommand, delivery: Delivery | None) -> list[events.DeliveryEvent]:
    """Return the events that a command causes.

    Raises:
        NotFound: The delivery does not exist.
        InvalidState: The delivery's state does not allow the command.
    """
    if delivery is None:
        raise NotFound("the delivery does not exist")
    match command:
        case commands.RecordAttempt():
            return _record_attempt(command, delivery)
        case commands.AbandonDelivery():
            if delivery.status != "pending":
                raise InvalidState(f"the delivery is {delivery.status}: only a pending delivery can be abandoned")
            return [events.DeliveryAbandoned(reason=limits.truncate_text(command.reason, limits.MAX_REASON_CHARACTERS))]
        case commands.RequeueDelivery():
            return [events.DeliveryRequeued(by=command.by, reason=command.reason)]
        case _:
            assert_never(command)


def _record_attempt(command: commands.RecordAttempt, delivery: Delivery) -> list[events.DeliveryEvent]:
    """Record an attempt even if the delivery is not pending: its sender may have been suspended for a while.

    An error then changes nothing else.
    """
    is_pending = delivery.status == "pending"
    error = None if command.error is None else limits.truncate_error(command.error)
    attempted = events.DeliveryAttempted(
        attempt=delivery.attempt + 1,
        status_code=command.status_code,
        error=error,
        response=limits.truncate_text(command.response, limits.MAX_RESPONSE_CHARACTERS),
        duration_s=command.duration_s,
        body_sha256=command.body_sha256,
        next_attempt_at=command.next_attempt_at if is_pending and error is not None else None,
    )
    if error is None and delivery.status != "delivered":
        return [attempted, events.DeliverySucceeded(attempt=attempted.attempt)]
    if error is None or not is_pending or command.next_attempt_at is not None:
        return [attempted]
    return [
        attempted,
        events.DeliveryAbandoned(reason=limits.truncate_text(error.message, limits.MAX_REASON_CHARACTERS)),
    ]


def evolve(delivery: Delivery | None, event: events.DeliveryEvent) -> Delivery:
    """Return the delivery after an event. Events of the log are trusted, so nothing is rejected here."""
    if isinstance(event, events.DeliveryQueued):
        return Delivery(spec=event)
    if delivery is None:
        raise NotFound(f"{type(event).__name__} in a stream that does not begin with DeliveryQueued")
    match event:
        case events.DeliveryAttempted():
            due = event.next_attempt_at if delivery.status == "pending" else delivery.due_at
            return replace(delivery, attempt=event.attempt, counted_attempts=delivery.counted_attempts + 1, due_at=due)
        case events.DeliverySucceeded():
            return replace(delivery, status="delivered", due_at=None)
        case events.DeliveryAbandoned():
            return replace(delivery, status="abandoned", due_at=None)
        case events.DeliveryRequeued():
            return replace(delivery, status="pending", counted_attempts=0, due_at=None)
        case _:
            assert_never(event)
