"""ledger: the rules of a delivery, which tells somebody by webhook that a job or batch has ended. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import blake2b
from typing import Final, assert_never

from jobledger.ledger.domain import limits
from jobledger.ledger.domain.batch import Batch
from jobledger.ledger.domain.commands import AbandonDelivery, DeliveryCommand, RecordAttempt, RequeueDelivery
from jobledger.ledger.domain.errors import InvalidState, NotFound
from jobledger.ledger.domain.events import (
    BatchFinished,
    DeliveryAbandoned,
    DeliveryAttempted,
    DeliveryEvent,
    DeliveryQueued,
    DeliveryRequeued,
    DeliverySucceeded,
    Event,
    JobCancelled,
    JobCompleted,
    JobFailed,
    WebhookEventType,
)
from jobledger.ledger.domain.job import Job
from jobledger.ledger.domain.statuses import DeliveryStatus

_PREFIX: Final = "delivery-"
_ENDS: Final[dict[type[Event], WebhookEventType]] = {
    JobCompleted: "job.completed",
    JobFailed: "job.failed",
    JobCancelled: "job.cancelled",
}
_BATCH_ENDS: Final[dict[str, WebhookEventType]] = {
    "completed": "batch.completed",
    "partial": "batch.partial",
    "failed": "batch.failed",
}


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the rules need to know of a delivery.

    `attempt` numbers the calls of the receiver, `counted` those since it was queued last; `due` is when to call again.
    """

    spec: DeliveryQueued
    status: DeliveryStatus = "pending"
    attempt: int = 0
    counted_attempts: int = 0
    due_at: datetime | None = None


def delivery_id_for(source: str, version: int) -> str:
    """Return the id of the delivery that tells of the end of a job or batch with the event of this version."""
    return f"{_PREFIX}{source}-{version}"


def parse_source(delivery_id: str) -> str:
    """Return the job or batch that a delivery tells of."""
    return delivery_id.removeprefix(_PREFIX).rpartition("-")[0]


def endpoint_id_for(user_id: str, url: str) -> str:
    """Return the id of a receiver: an address, and the user who has deliveries sent there."""
    return blake2b(f"{len(user_id)}{user_id}{url}".encode(errors="surrogatepass"), digest_size=12).hexdigest()


def delivery_for_event(stream: str, source: Job | Batch, event: Event, version: int) -> DeliveryQueued | None:
    """Return what is to be told of an event of a job or batch, None if it is no end or nobody has asked for that."""
    if isinstance(event, BatchFinished):
        tells: WebhookEventType | None = _BATCH_ENDS[event.status]
    else:
        tells = _ENDS.get(type(event))
    webhook = source.spec.webhook
    if tells is None or webhook is None:
        return None
    return DeliveryQueued(
        source=stream,
        source_version=version,
        event_type=tells,
        user_id=source.spec.user_id,
        webhook=webhook,
        batch_id=source.spec.batch_id if isinstance(source, Job) else stream,
    )


def decide(command: DeliveryCommand, delivery: Delivery | None) -> list[DeliveryEvent]:
    """Answer a command with the events it causes, or refuse it.

    Raises:
        NotFound, WrongState: the rules say no.
    """
    if delivery is None:
        raise NotFound("there is no such delivery")
    match command:
        case RecordAttempt():
            return _attempted(command, delivery)
        case AbandonDelivery():
            if delivery.status != "pending":
                raise InvalidState(f"the delivery is {delivery.status} already")
            return [DeliveryAbandoned(reason=limits.truncate_text(command.reason, limits.MAX_REASON_CHARACTERS))]
        case RequeueDelivery():
            return [DeliveryRequeued(by=command.by, reason=command.reason)]
        case _:
            assert_never(command)


def _attempted(command: RecordAttempt, delivery: Delivery) -> list[DeliveryEvent]:
    """What was sent was sent, even if it is delivered by now: of two senders one may have been frozen for a while.

    What came of it later than an end changes nothing but the record.
    """
    pending = delivery.status == "pending"
    error = None if command.error is None else limits.truncate_failure(command.error)
    attempted = DeliveryAttempted(
        attempt=delivery.attempt + 1,
        status_code=command.status_code,
        error=error,
        response=limits.truncate_text(command.response, limits.MAX_RESPONSE_CHARACTERS),
        duration_s=command.duration_s,
        body_sha256=command.body_sha256,
        next_attempt_at=command.next_attempt_at if pending and error is not None else None,
    )
    if error is None:
        ended = delivery.status == "delivered"
        return [attempted] if ended else [attempted, DeliverySucceeded(attempt=attempted.attempt)]
    if not pending or command.next_attempt_at is not None:
        return [attempted]
    return [attempted, DeliveryAbandoned(reason=limits.truncate_text(error.message, limits.MAX_REASON_CHARACTERS))]


def evolve(delivery: Delivery | None, event: DeliveryEvent) -> Delivery:
    """Return the delivery as it is after the event. The log is trusted: nothing is refused here."""
    if isinstance(event, DeliveryQueued):
        return Delivery(spec=event)
    if delivery is None:
        raise NotFound(f"{type(event).__name__} in a stream that does not begin with DeliveryQueued")
    match event:
        case DeliveryAttempted():
            due = event.next_attempt_at if delivery.status == "pending" else delivery.due_at
            return replace(delivery, attempt=event.attempt, counted_attempts=delivery.counted_attempts + 1, due_at=due)
        case DeliverySucceeded():
            return replace(delivery, status="delivered", due_at=None)
        case DeliveryAbandoned():
            return replace(delivery, status="abandoned", due_at=None)
        case DeliveryRequeued():
            return replace(delivery, status="pending", counted_attempts=0, due_at=None)
        case _:
            assert_never(event)
