"""Record submitted jobs and batches, once for each Idempotency-Key, and respond with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bson import ObjectId
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.context import ApiContext, get_api_context
from jobledger.api.http.errors import ApiError, build_json_response
from jobledger.api.http.preferences import prefers_wait
from jobledger.api.idempotency import RequestFingerprint, build_metadata
from jobledger.api.resources import BATCH, ResourceKind, wait_until_finished
from jobledger.api.submission.builder import WebhookSecrets
from jobledger.ledger.domain.commands import SubmitBatch, SubmitJob
from jobledger.ledger.domain.errors import VersionConflict
from jobledger.ledger.domain.events import BatchSubmitted, EventMetadata, JobSubmitted, RecordedEvent
from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.ledger.store.command_handler import create_streams
from jobledger.ledger.webhooks.endpoint_secrets import Endpoint, RevealedSecret, ensure_secrets, reveal_new_secrets


@dataclass(frozen=True, slots=True)
class Submission:
    """A recorded job or batch.

    Attributes:
        stream_id: Its ID.
        position: The position of the last event of the submission.
        new_secrets: Secrets that were created for its webhooks.
        document: The submitted resource. None if the caller prefers to wait: it may be large, and the wait long.
    """

    stream_id: str
    position: int
    new_secrets: Collection[RevealedSecret]
    document: Document | None


def create_id(prefix: str, fingerprint: RequestFingerprint | None, number: int = 0) -> str:
    """Return a new ID. With an Idempotency-Key, a repeated request gets the same ID for the same `number`."""
    return f"{prefix}-{ObjectId() if fingerprint is None else fingerprint.derive_id(number)}"


async def find_earlier_submission(
    request: Request, kind: ResourceKind, resource_id: str, fingerprint: RequestFingerprint | None
) -> Submission | None:
    """Return the submission of an earlier request with the same key.

    Raises:
        ApiError: 422, the earlier request had another body.
    """
    if fingerprint is None:
        return None
    events = await get_api_context(request).event_store.read_stream(resource_id, limit=1)
    first_event = fingerprint.find_in(events)
    return None if first_event is None else _build_submission(request, kind, first_event)


async def record_submission(
    request: Request,
    kind: ResourceKind,
    first_events: Mapping[str, BatchSubmitted | JobSubmitted],
    secrets: Collection[WebhookSecrets],
    fingerprint: RequestFingerprint | None,
) -> Submission:
    """Append the first event of a job, or those of a batch and its jobs. Store the secrets of their webhooks before.

    Args:
        first_events: The events by stream ID, the batch first.

    Raises:
        ApiError: 507, a disk is nearly full.
        InvalidEvent: An event is too large, or has content that cannot be stored.
    """
    ctx, resource_id = get_api_context(request), next(iter(first_events))
    if ctx.disk_monitor.problem is not None:
        raise ApiError(507, "insufficient_storage", ctx.disk_monitor.problem, retry_after_seconds=60)
    endpoints = {
        Endpoint(event.user_id, event.webhook.url)
        for event in first_events.values()
        if event.webhook is not None and not event.webhook.has_own_secrets
    }
    await ensure_secrets(ctx.db, endpoints)
    if secrets:
        with translate_errors("storing the secrets of webhooks"):
            await ctx.db.webhook_secrets.insert_many(secret.to_document() for secret in secrets)
    commands = [
        (stream_id, SubmitBatch(event) if isinstance(event, BatchSubmitted) else SubmitJob(event))
        for stream_id, event in first_events.items()
    ]
    meta = build_metadata(request, fingerprint, resource_id if kind is BATCH else None)
    try:
        recorded = await _append_first_events(ctx, commands, meta)
    except VersionConflict:  # a concurrent request with the same key was faster
        if (earlier := await find_earlier_submission(request, kind, resource_id, fingerprint)) is None:
            raise
        return earlier
    return _build_submission(request, kind, recorded, await reveal_new_secrets(ctx.db, endpoints))


async def _append_first_events(
    ctx: ApiContext, commands: Sequence[tuple[str, SubmitBatch | SubmitJob]], meta: EventMetadata
) -> RecordedEvent:
    """Append the first events of new streams, and return the first one."""
    stream_id, command = commands[0]
    if isinstance(command, SubmitJob):
        return await ctx.dispatcher.submit_job(stream_id, command, meta=meta)
    jobs = {job_id: command.job for job_id, command in commands if isinstance(command, SubmitJob)}
    with ctx.dispatcher.expect_jobs(jobs):
        return (await create_streams(ctx.event_store, commands, meta=meta))[0]


def _build_submission(
    request: Request, kind: ResourceKind, first_event: RecordedEvent, new_secrets: Collection[RevealedSecret] = ()
) -> Submission:
    """Return the submission that began with an event. One commit wrote a batch and its jobs, the batch first."""
    position = first_event.position + (first_event.payload_fields["total_jobs"] if kind is BATCH else 0)
    document = None if prefers_wait(request) else kind.fold_submitted(first_event)
    return Submission(first_event.stream, position, new_secrets, document)


async def load_submitted(request: Request, kind: ResourceKind, submission: Submission) -> Document:
    """Return the submitted resource. If the caller prefers to wait, wait until it is finished first."""
    if submission.document is not None:
        return submission.document
    ctx, stream_id = get_api_context(request), submission.stream_id
    await wait_until_finished(request, stream_id)
    document = await kind.load(ctx.views, ctx.event_store, stream_id)
    # The first event remains if the resource was deleted during the wait.
    return document or kind.fold_submitted((await ctx.event_store.read_stream(stream_id, limit=1))[0])


def build_accepted_response(
    request: Request, kind: ResourceKind, submission: Submission, position: int, content: dict[str, Any]
) -> Response:
    """Return the response to a submission: 202 with the ID, `content` and new secrets.

    `position` is the position of the document in `content`.
    """
    prefix = get_api_context(request).signed_links.path_prefix
    accepted = {"status": "success", f"{kind.name}_id": submission.stream_id, **content}
    if submission.new_secrets:
        accepted["webhook_secrets"] = [secret.to_response() for secret in submission.new_secrets]
    headers = {
        "Location": f"{prefix}/api/events/{kind.path_segment}/{submission.stream_id}",
        "Ledger-Position": str(max(position, submission.position)),
    }
    return build_json_response(accepted, 202, headers)
