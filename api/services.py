"""api: what the routes work with, handed in by the composition root, and the small things that all of them do."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from api.access import Revocations, SignIn
from api.endings import Endings
from api.errors import ApiError, invalid
from api.event_stream import Streams
from api.links import Links
from api.middleware import Edge
from api.sessions import Sessions
from api.visibility import Visibility
from ledger.changes import Changes
from ledger.files import FileStore
from ledger.log import EventLog
from ledger.mongo import Database
from projections.checkpoint import Checkpoint
from projections.views import Views

LARGEST_PAGE: Final = 1000
_VIEW_PATIENCE_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Webhooks:
    """What the API has to do with webhooks. `sink`: it takes some itself, for trial; `allow_private`: as in config."""

    sink: bool = False
    allow_private: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Services:
    """The rooms below, as the API sees them. `job_types` maps a job type to the model of its parameters."""

    db: Database
    log: EventLog
    checkpoint: Checkpoint
    changes: Changes
    store: FileStore
    job_types: Mapping[str, type[BaseModel]]
    largest_body_bytes: int
    allowed_hosts: tuple[str, ...]
    sign_in: SignIn
    sessions: Sessions | None
    revocations: Revocations
    public_origin: str | None
    endings: Endings
    edge: Edge
    visibility: Visibility
    streams: Streams
    links: Links
    webhooks: Webhooks = Webhooks()

    @property
    def views(self) -> Views:
        """The views that are live now."""
        return self.checkpoint.views


def services(request: Request) -> Services:
    """Return what was handed to the application."""
    found: Services = request.app.state.services
    return found


async def read_json(request: Request) -> Any:
    """Return the request's JSON body.

    Raises:
        ApiError: 415, 413 or 400, when it is not JSON, too large, or broken.
    """
    # Also what keeps other sites' pages from posting here: a browser sends this type across origins only when asked.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "unsupported_media_type", "Send JSON, with the header Content-Type: application/json.")
    limit = services(request).largest_body_bytes
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise ApiError(413, "too_large", f"The body is larger than {limit} bytes (api.max_body_bytes).")
    except ClientDisconnect as gone:
        raise ApiError(400, "incomplete_body", "The connection ended before the body did.") from gone
    try:
        return from_json(bytes(body), allow_inf_nan=False)  # keeps large integers, which orjson makes floats of
    except ValueError as error:
        message = f"The body is not JSON, or nested more than 100 levels deep: {error}"
        raise ApiError(400, "malformed_json", message) from error


Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], content: Any, *, within: tuple[str | int, ...] = ()) -> Model:
    """Return the content as a model.

    Raises:
        ApiError: 422, naming each wrong field.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise invalid(error, within=within) from error


def query_of(request: Request, model: type[Model]) -> Model:
    """Return the query parameters as a model.

    Raises:
        ApiError: 422, naming each wrong parameter.
    """
    return validated(model, dict(request.query_params))


async def views_reach_wanted_position(request: Request) -> None:
    """Wait for the views if the request names a `Ledger-Position` (or `min_position`) that it wants to see.

    Raises:
        ApiError: 400 when it is no number, 503 when the views are too far behind.
    """
    wanted = request.headers.get("ledger-position", request.query_params.get("min_position"))
    if wanted is None:
        return
    if not wanted.isascii() or not wanted.isdecimal() or len(wanted) > 18:
        raise ApiError(400, "malformed_position", f"{wanted[:40]!r} is not a position: expected a whole number.")
    checkpoint = services(request).checkpoint
    try:
        async with asyncio.timeout(_VIEW_PATIENCE_SECONDS):
            await checkpoint.reached(int(wanted))
    except TimeoutError:
        message = f"The views have reached position {checkpoint.position}, not yet {wanted}."
        raise ApiError(503, "views_behind", message, retry_after_seconds=2) from None
