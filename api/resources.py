"""What routes of jobs and routes of batches do in the same way: load, and wait until they are finished.

A resource is a job or a batch. Each has an event stream and a document in the views.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

import orjson
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import can_read, get_viewer
from jobledger.api.auth.redaction import Viewer
from jobledger.api.context import get_api_context
from jobledger.api.finish_notifier import find_end_position
from jobledger.api.http.conditional import ConditionalRequest, compute_etag
from jobledger.api.http.credential_expiry import limit_while_authenticated
from jobledger.api.http.errors import ApiError, encode_json
from jobledger.api.http.preferences import apply_wait_preference, prefers_wait
from jobledger.api.http.validation import parse_query
from jobledger.api.ledger_position import wait_for_requested_position
from jobledger.api.schemas.request_models import AsOfQuery
from jobledger.ledger.domain.errors import UnreadableEvent
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.slots import Views
from jobledger.projections.views import batches, jobs
from jobledger.projections.views.documents import Fold

_UNFINISHED: Final = frozenset({"pending", "processing"})


@dataclass(frozen=True, slots=True)
class ResourceKind:
    """A kind of resource.

    Attributes:
        name: `job` or `batch`: the prefix of its IDs and the field of its document in responses.
        path_segment: `jobs` or `batches`: its part of paths.
        load: Returns the document that the views have, or None.
        fold: Folds an event of the resource's own stream into its document.
    """

    name: Literal["job", "batch"]
    path_segment: str
    load: Callable[[Views, EventStore, str], Awaitable[Document | None]]
    fold: Fold

    def is_id(self, stream_id: str) -> bool:
        """Return whether an ID has the prefix of this kind."""
        return stream_id.startswith(f"{self.name}-")

    def get_id_from_path(self, request: Request) -> str:
        """Return the ID in the request's path."""
        return str(request.path_params[f"{self.name}_id"])

    def build_not_found_error(self, resource_id: str, problem: str = "not found") -> ApiError:
        """Return the error for a resource that does not exist or that the caller may not read."""
        return ApiError(404, f"{self.name}_not_found", f"{self.name.capitalize()} {resource_id} {problem}.")

    def fold_submitted(self, event: RecordedEvent) -> Document:
        """Return the document of a submitted resource from its first event."""
        document = self.fold(None, event)
        assert document is not None  # noqa: S101 - narrows the type; the first event creates the document
        return document


JOB: Final = ResourceKind("job", "jobs", jobs.get, jobs.fold)
BATCH: Final = ResourceKind("batch", "batches", batches.get, batches.fold_own_events)


async def load_or_404(request: Request, kind: ResourceKind) -> Document:
    """Return the job or batch in the request's path, as the views have it.

    Raises:
        ApiError: 404.
    """
    ctx, resource_id = get_api_context(request), kind.get_id_from_path(request)
    document = await kind.load(ctx.views, ctx.event_store, resource_id) if kind.is_id(resource_id) else None
    if document is None or not can_read(request, document):
        raise kind.build_not_found_error(resource_id)
    return document


async def load_document(request: Request, stream_id: str) -> Document | None:
    """Return the document of a job or batch, None if it does not exist. The caller must check access."""
    ctx = get_api_context(request)
    for resource in (JOB, BATCH):
        if resource.is_id(stream_id):
            return await resource.load(ctx.views, ctx.event_store, stream_id)
    return None


async def load_for_read(request: Request, kind: ResourceKind) -> tuple[Document, Viewer, int | datetime | None]:
    """Load the job or batch that a GET request asks for. With `Prefer: wait`, wait until it is finished first.

    Returns:
        The current document, the caller's access to it, and the requested point in time. Current access also decides
        about states in the past.

    Raises:
        ApiError: 404, 422, 503.
    """
    await wait_for_requested_position(request)
    as_of = parse_query(request, AsOfQuery).as_of
    if as_of is None and prefers_wait(request) and (await load_or_404(request, kind))["status"] in _UNFINISHED:
        await wait_until_finished(request, kind.get_id_from_path(request))
    document = await load_or_404(request, kind)
    return document, get_viewer(request, document), as_of


async def wait_until_finished(request: Request, resource_id: str) -> None:
    """If the caller prefers to wait, wait until the resource is finished and the views show it, or the time is over.

    Later reads of the resource, its files or lists then agree with the response.
    """
    ctx = get_api_context(request)
    with apply_wait_preference(request) as seconds, suppress(TimeoutError):
        if not seconds:
            return
        async with limit_while_authenticated(request, seconds), ctx.finish_notifier.watch(resource_id) as wake_up:
            while (position := await find_end_position(ctx.event_store, resource_id)) is None:
                await wake_up.wait()
                wake_up.clear()
            await ctx.checkpoint.wait_for_position(position)
            request.scope["ledger_position"] = ctx.checkpoint.position


@contextmanager
def translate_damaged_events(stream: str) -> Iterator[None]:
    """Raise ApiError 409 if the past state of a job or batch cannot be read: an event was changed in the database."""
    try:
        yield
    except (UnreadableEvent, AttributeError, LookupError, TypeError) as error:
        message = f"The state of {stream} at that time cannot be read: an event is damaged. Run `jobledger log verify`."
        raise ApiError(409, "event_damaged", message) from error


def build_conditional_response(request: Request, name: str, document: Document) -> Response:
    """Return a job or batch as the viewer sees it, or 304 if the client has exactly this.

    Args:
        request: The request.
        name: Field of the response that holds the document.
        document: All fields that are shown, including `version`.

    Raises:
        ApiError: 412.
    """
    text = encode_json(document)
    conditional = ConditionalRequest(request.headers, compute_etag(text, version=document["version"]))
    headers = {"Cache-Control": "private, no-cache", "Vary": "Authorization, Cookie"}
    content = encode_json({"status": "success", name: orjson.Fragment(text)})
    return conditional.respond(content, "application/json", headers)
