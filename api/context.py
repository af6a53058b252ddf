"""api: what the routes work with, handed in by the composition root, and the small things that all of them do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from pydantic import BaseModel
from starlette.requests import Request

from jobledger.api.auth.browser_sessions import Sessions
from jobledger.api.auth.permissions import Revocations, SignIn
from jobledger.api.auth.signed_links import Links
from jobledger.api.auth.visibility import Visibility
from jobledger.api.completion_waiter import Endings
from jobledger.api.dashboard.previews import Previews
from jobledger.api.http.errors import ApiError
from jobledger.api.http.memory_budget import MemoryBudget
from jobledger.api.http.middleware import Edge, held
from jobledger.api.http.sse import Streams
from jobledger.api.http.validation import Model, validated
from jobledger.api.submission.parameters import ParametersValidator
from jobledger.ledger.files.directory import FileStore
from jobledger.ledger.mongo.connection import Database
from jobledger.ledger.store.change_stream import Changes
from jobledger.ledger.store.event_store import EventLog
from jobledger.ledger.system.disk_space import StorageWatch
from jobledger.projections.engine.checkpoint import Checkpoint
from jobledger.projections.engine.health import StallWatch
from jobledger.projections.engine.slots import Views

LARGEST_PAGE: Final = 1000
_USUAL_LAG_SECONDS: Final = 1.0
"""For how long a request waits for the views without being counted as held."""
_VIEW_PATIENCE_SECONDS: Final = 9.0


@dataclass(frozen=True, slots=True)
class Webhooks:
    """What the API has to do with webhooks. `sink`: it takes some itself, for trial; `allow_private`: as in config."""

    sink: bool = False
    allow_private: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Services:
    """The rooms below, as the API sees them. `job_types` maps a job type to the model of its parameters,
    `unusable_types` one whose processor is installed but cannot be used to the reason."""

    db: Database
    log: EventLog
    checkpoint: Checkpoint
    changes: Changes
    store: FileStore
    job_types: Mapping[str, type[BaseModel]]
    parameters: ParametersValidator
    previews: Previews
    memory: MemoryBudget
    unusable_types: Mapping[str, str]
    largest_body_bytes: int
    allowed_hosts: tuple[str, ...]
    sign_in: SignIn
    sessions: Sessions | None
    revocations: Revocations
    public_origin: str | None
    groups_of: Callable[[str], Collection[str]]
    endings: Endings
    edge: Edge
    visibility: Visibility
    stall_watch: StallWatch
    streams: Streams
    links: Links
    webhooks: Webhooks = Webhooks()
    storage: StorageWatch = field(default_factory=lambda: StorageWatch({}, 0))

    @property
    def views(self) -> Views:
        """The views that are live now."""
        return self.checkpoint.views


def services(request: Request) -> Services:
    """Return what was handed to the application."""
    found: Services = request.app.state.services
    return found


def query_of(request: Request, model: type[Model]) -> Model:
    """Return the query parameters as a model.

    Raises:
        ApiError: 422, naming each wrong parameter.
    """
    return validated(model, dict(request.query_params))


def refuse_without_space(known: Services) -> None:
    """Make sure that the disks have space for new work.

    Raises:
        ApiError: 507, a disk is nearly full.
    """
    if known.storage.problem is not None:
        raise ApiError(507, "insufficient_storage", known.storage.problem, retry_after_seconds=60)


async def views_reach_wanted_position(request: Request) -> None:
    """Wait for the views if the request names a `Ledger-Position` (or `min_position`) that it wants to see.

    Raises:
        ApiError: 400 when it is no number, 422 when the log ends before, 503 when the views are too far behind.
    """
    checkpoint = services(request).checkpoint
    wanted = request.headers.get("ledger-position", request.query_params.get("min_position"))
    if wanted is not None:
        if not wanted.isascii() or not wanted.isdecimal() or len(wanted) > 18:
            raise ApiError(400, "malformed_position", f"{wanted[:40]!r} is not a position: expected a whole number.")
        if not await _views_reach(request, int(wanted)):
            message = f"The views have reached position {checkpoint.position}, not yet {wanted}."
            raise ApiError(503, "views_behind", message, retry_after_seconds=2)
    request.scope["ledger_position"] = checkpoint.position


async def _views_reach(request: Request, position: int) -> bool:
    """Wait until the views have reached a position of the log; return whether they have in time.

    Raises:
        ApiError: 422, when the log ends before.
    """
    known = services(request)
    if known.checkpoint.position >= position:
        return True
    if not await known.log.may_reach(position):
        message = f"Ledger-Position: the log ends before position {position}. Send one that was answered."
        raise ApiError(422, "invalid_content", message)
    if await _reached(known.checkpoint, position, _USUAL_LAG_SECONDS):
        return True
    with held(request.scope) as allowed:
        return allowed and await _reached(known.checkpoint, position, _VIEW_PATIENCE_SECONDS)


async def _reached(checkpoint: Checkpoint, position: int, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await checkpoint.reached(position)
    except TimeoutError:
        return False
    return True


async def views_show(request: Request, position: int) -> None:
    """Wait until the views have reached a position, as long as the caller waits.

    Raises:
        TimeoutError: the caller's time is over.
    """
    checkpoint = services(request).checkpoint
    await checkpoint.reached(position)
    request.scope["ledger_position"] = checkpoint.position
