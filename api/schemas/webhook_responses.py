"""api: what is answered about webhooks, as models; as api/schemas/responses.py."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field

from jobledger.api.schemas.responses import ListResponse, PartialDocument, SuccessResponse
from jobledger.ledger.domain.events import Failure, WebhookEventType
from jobledger.ledger.domain.statuses import DeliveryStatus


class DeliveryAttempt(BaseModel):
    """One call of a receiver. `error` is null if it answered with 2xx; `response` is the beginning of its answer."""

    attempt: int
    attempted_at: datetime
    status_code: int | None
    error: Failure | None
    response: str
    duration_s: float
    body_sha256: str | None
    next_attempt_at: datetime | None


class DeliveryResource(PartialDocument):
    """A webhook, sent or to be sent. `sequence` is its number for its `endpoint_id`, 1, 2, 3 …; the id is `webhook-id`.

    Without admin access to the job or batch, `url` is only its host, and what the receiver answered is hidden.
    """

    delivery_id: str
    status: DeliveryStatus
    type: WebhookEventType
    job_id: str | None
    batch_id: str | None
    source_version: int
    url: str
    host: str
    endpoint_id: str | None = Field(description="null without admin access.")
    sequence: int | None
    user_id: str
    created_at: datetime
    updated_at: datetime
    queued_at: datetime
    next_attempt_at: datetime | None
    delivered_at: datetime | None
    reason: str | None
    attempt: int
    attempts: list[DeliveryAttempt] = Field(description="The newest fifty.")
    version: int
    position: int


class DeliveryListResponse(ListResponse):
    """A page of webhooks."""

    deliveries: list[DeliveryResource]


class DeliveryResponse(SuccessResponse):
    """One webhook."""

    delivery: DeliveryResource


class RedeliveryResponse(SuccessResponse):
    """How many are to be sent again. `has_more`: there are others; ask again."""

    redelivered: int
    has_more: bool


class EndpointResource(BaseModel):
    """A URL to which webhooks of a user go. `previous_secret_expires_at`: so long an old secret signs beside the new
    one."""

    endpoint_id: str
    url: str
    user_id: str
    created_at: datetime
    rotated_at: datetime | None
    previous_secret_expires_at: datetime | None
    revoked: bool = Field(description="It has no secret, and nothing is sent, until its secret is rotated.")


class EndpointListResponse(SuccessResponse):
    """A page of endpoints."""

    endpoints: list[EndpointResource]


class RotatedSecretResponse(SuccessResponse):
    """The new secret of an endpoint. It is shown this once."""

    endpoint_id: str
    url: str
    secret: str


class EchoedWebhook(BaseModel):
    """What the sink was sent."""

    id: str
    received_at: datetime
    user_id: str
    headers: dict[str, str]
    body: str


class WebhookEchoResponse(SuccessResponse):
    """The sink has kept it."""

    received: EchoedWebhook


class WebhookEchoListResponse(SuccessResponse):
    """What the sink was sent, the newest first."""

    received: list[EchoedWebhook]
