"""Request and response models of webhooks: subscriptions of jobs, deliveries, endpoints and the webhook echo."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, Field, StrictBool

from jobledger.api.schemas.request_models import IsoDatetime, PageQuery, ReasonBody, RequestModel
from jobledger.api.schemas.response_models import ListResponse, PartialDocument, SuccessResponse
from jobledger.ledger.domain import limits
from jobledger.ledger.domain.canonical_json import MAX_SAFE_INTEGER
from jobledger.ledger.domain.events import ErrorInfo, WebhookEventType
from jobledger.ledger.domain.statuses import DeliveryStatus
from jobledger.ledger.domain.webhook_headers import find_header_problem
from jobledger.ledger.webhooks.signature import decode_secret

_MAX_GRACE_SECONDS = 30 * 86_400
_MAX_ECHOES_LISTED = 100

# Requests ---------------------------------------------------------------------------------------------------------


def _check_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected a URL that begins with http:// or https:// and has a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL must not contain a user name or password: send an Authorization header instead")
    return url


def _check_headers(headers: dict[str, str]) -> dict[str, str]:
    if (problem := find_header_problem(headers)) is not None:
        raise ValueError(f"{problem[0]}: {problem[1]}")
    return headers


def _check_secret(secret: str) -> str:
    decode_secret(secret)
    return secret


# No `$` at the beginning: MongoDB reads an object with $ref and $id as a reference to a document.
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9!#%&'*+.^_`|~-][A-Za-z0-9!#$%&'*+.^_`|~-]{0,99}$")]
HeaderValue = Annotated[str, Field(pattern=r"^[\t\x20-\x7e\u00a0-\u00ff]*$", max_length=8000)]


class WebhookBody(RequestModel):
    """Where to send a webhook when the job or batch finishes."""

    url: Annotated[str, Field(max_length=limits.MAX_URL_CHARACTERS), AfterValidator(_check_url)]
    headers: Annotated[dict[HeaderName, HeaderValue], AfterValidator(_check_headers)] = Field(
        {}, max_length=limits.MAX_WEBHOOK_HEADERS
    )
    include_markdown: StrictBool = False
    include_metadata: StrictBool = False
    secrets: list[Annotated[str, AfterValidator(_check_secret)]] = Field(
        [], max_length=2, description="Signing secrets (Standard Webhooks: whsec_…). Send two during a rotation."
    )


class DeliveryFilter(RequestModel):
    """Filters of deliveries. The deliveries of one job are visible to its readers, others to their owner."""

    status: DeliveryStatus | None = None
    type: WebhookEventType | None = None
    job_id: str | None = Field(None, max_length=200)
    batch_id: str | None = Field(None, max_length=200)
    endpoint_id: str | None = Field(None, max_length=200, description="The `endpoint_id` of a delivery.")
    host: str | None = Field(None, max_length=300, description="With the port, such as example.org:443.")
    after_sequence: int | None = Field(None, ge=0, le=MAX_SAFE_INTEGER)
    created_after: IsoDatetime | None = None
    created_before: IsoDatetime | None = None


class DeliveryListQuery(DeliveryFilter, PageQuery):
    """Filters of deliveries, and the page."""


class RedeliverBody(DeliveryFilter, ReasonBody):
    """The deliveries to repeat: abandoned ones, unless `status` names another status."""

    status: DeliveryStatus | None = "abandoned"
    after_sequence: int | None = Field(None, strict=True, ge=0, le=MAX_SAFE_INTEGER)


class EndpointListQuery(RequestModel):
    """A page of endpoints: the caller's own, or those of all users for admins.

    `after` is the last `endpoint_id` of the previous page.
    """

    limit: int = Field(100, ge=1, le=1000)
    after: str = Field("", max_length=100)


class RotateSecretBody(RequestModel):
    """How long the old secret keeps signing beside the new one, in seconds. 0 revokes it immediately."""

    grace_period_s: int = Field(86_400, strict=True, ge=0, le=_MAX_GRACE_SECONDS)


class WebhookEchoQuery(RequestModel):
    """How many received webhooks to return, newest first."""

    limit: int = Field(20, ge=1, le=_MAX_ECHOES_LISTED)


class AnyQuery(BaseModel):
    """Any query parameters: the URL of a webhook may have them."""


# Responses --------------------------------------------------------------------------------------------------------


class WebhookResource(BaseModel):
    """A webhook. Header values are hidden. Without admin access, header names and the URL's path are hidden, too."""

    url: str
    headers: dict[str, Literal["***"]]
    include_markdown: bool
    include_metadata: bool
    has_own_secrets: bool


class NewWebhookSecret(BaseModel):
    """The secret that signs webhooks to an endpoint. It is shown once."""

    endpoint_id: str
    url: str
    secret: str


class AcceptedResponse(SuccessResponse):
    """What was submitted, with the new signing secrets of its webhooks."""

    webhook_secrets: list[NewWebhookSecret] = Field(
        [], description="Secrets of endpoints that are used for the first time. They are not shown again."
    )
    warnings: list[str] = Field([])


class DeliveryAttempt(BaseModel):
    """One request to the endpoint. `error` is null after a 2xx; `response` is the beginning of its response body."""

    attempt: int
    attempted_at: datetime
    status_code: int | None
    error: ErrorInfo | None
    response: str
    duration_s: float
    body_sha256: str | None
    next_attempt_at: datetime | None


class DeliveryResource(PartialDocument):
    """A webhook delivery. `delivery_id` is its `webhook-id`; `sequence` counts the endpoint's deliveries from 1.

    Without admin access to the job or batch, `url` is only the host, and the endpoint's responses are hidden.
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
    attempts: list[DeliveryAttempt] = Field(description="The newest 50.")
    version: int
    position: int


class DeliveryListResponse(ListResponse):
    """A page of deliveries."""

    deliveries: list[DeliveryResource]


class DeliveryResponse(SuccessResponse):
    """The delivery."""

    delivery: DeliveryResource


class RedeliveryResponse(SuccessResponse):
    """How many deliveries were queued again. `has_more`: more match; repeat the request."""

    redelivered: int
    has_more: bool


class EndpointResource(BaseModel):
    """A URL that receives a user's webhooks. The old secret signs until `previous_secret_expires_at`."""

    endpoint_id: str
    url: str
    user_id: str
    created_at: datetime
    rotated_at: datetime | None
    previous_secret_expires_at: datetime | None
    revoked: bool = Field(description="It has no secret. Nothing is sent until the secret is rotated.")


class EndpointListResponse(SuccessResponse):
    """A page of endpoints."""

    endpoints: list[EndpointResource]


class RotatedSecretResponse(SuccessResponse, NewWebhookSecret):
    """The new secret of the endpoint. It is shown once."""


class EchoedWebhook(BaseModel):
    """A webhook that the echo endpoint received."""

    id: str
    received_at: datetime
    user_id: str
    headers: dict[str, str]
    body: str


class WebhookEchoResponse(SuccessResponse):
    """The webhook was stored."""

    received: EchoedWebhook


class WebhookEchoListResponse(SuccessResponse):
    """Received webhooks, newest first."""

    received: list[EchoedWebhook]
