"""api: what the routes work with, handed in by the composition root, and the small things that all of them do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from pydantic import BaseModel
from starlette.requests import Request

from jobledger.api.auth.browser_sessions import BrowserSessions
from jobledger.api.auth.permissions import AuthBackend, RevocationNotifier
from jobledger.api.auth.signed_links import SignedLinks
from jobledger.api.auth.visibility import Visibility
from jobledger.api.completion_waiter import CompletionWaiter
from jobledger.api.dashboard.markdown_preview import MarkdownPreviewer
from jobledger.api.http.errors import ApiError
from jobledger.api.http.limits import track_waiting_request
from jobledger.api.http.memory_budget import MemoryBudget
from jobledger.api.http.options import HttpOptions
from jobledger.api.http.sse import LiveStreams
from jobledger.api.http.validation import Model, validate_content
from jobledger.api.submission.parameters import ParameterValidator
from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.mongo.connection import Database
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.system.disk_space import DiskSpaceMonitor
from jobledger.projections.engine.checkpoint import Checkpoint
from jobledger.projections.engine.health import StallDetector
from jobledger.projections.slots import Views

_SHORT_WAIT_SECONDS: Final = 1.0
"""For how long a request waits for the views without being counted as held."""
_VIEW_WAIT_SECONDS: Final = 9.0


@dataclass(frozen=True, slots=True)
class WebhookOptions:
    """What the API has to do with webhooks. `sink`: it takes some itself, for trial; `allowed_private_hosts`: as in
    config."""

    echo_enabled: bool = False
    allowed_private_hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ApiContext:
    """The rooms below, as the API sees them. `job_types` maps a job type to the model of its parameters,
    `unusable_types` one whose processor is installed but cannot be used to the reason."""

    db: Database
    event_store: EventStore
    checkpoint: Checkpoint
    change_stream: ChangeStream
    file_store: FileStore
    job_types: Mapping[str, type[BaseModel]]
    parameter_validator: ParameterValidator
    previews: MarkdownPreviewer
    memory_budget: MemoryBudget
    unavailable_job_types: Mapping[str, str]
    max_body_bytes: int
    allowed_hosts: tuple[str, ...]
    auth_backend: AuthBackend
    browser_sessions: BrowserSessions | None
    revocation_notifier: RevocationNotifier
    public_origin: str | None
    get_groups: Callable[[str], Collection[str]]
    completion_waiter: CompletionWaiter
    http_options: HttpOptions
    visibility: Visibility
    stall_detector: StallDetector
    live_streams: LiveStreams
    signed_links: SignedLinks
    webhook_options: WebhookOptions = WebhookOptions()
    disk_monitor: DiskSpaceMonitor = field(default_factory=lambda: DiskSpaceMonitor({}, 0))

    @property
    def views(self) -> Views:
        """The views that are live now."""
        return self.checkpoint.views


def get_api_context(request: Request) -> ApiContext:
    """Return what was handed to the application."""
    found: ApiContext = request.app.state.context
    return found


def parse_query(request: Request, model: type[Model]) -> Model:
    """Return the query parameters as a model.

    Raises:
        ApiError: 422, naming each wrong parameter.
    """
    return validate_content(model, dict(request.query_params))


def check_disk_space(ctx: ApiContext) -> None:
    """Make sure that the disks have space for new work.

    Raises:
        ApiError: 507, a disk is nearly full.
    """
    if ctx.disk_monitor.problem is not None:
        raise ApiError(507, "insufficient_storage", ctx.disk_monitor.problem, retry_after_seconds=60)


async def wait_for_requested_position(request: Request) -> None:
    """Wait for the views if the request names a `Ledger-Position` (or `min_position`) that it wants to see.

    Raises:
        ApiError: 400 when it is no number, 422 when the log ends before, 503 when the views are too far behind.
    """
    checkpoint = get_api_context(request).checkpoint
    wanted = request.headers.get("ledger-position", request.query_params.get("min_position"))
    if wanted is not None:
        if not wanted.isascii() or not wanted.isdecimal() or len(wanted) > 18:
            raise ApiError(400, "malformed_position", f"{wanted[:40]!r} is not a position: expected a whole number.")
        if not await _views_reach(request, int(wanted)):
            message = f"The views have reached position {checkpoint.position}, not yet {wanted}."
            raise ApiError(503, "projection_lagging", message, retry_after_seconds=2)
    request.scope["ledger_position"] = checkpoint.position


async def _views_reach(request: Request, position: int) -> bool:
    """Wait until the views have reached a position of the log; return whether they have in time.

    Raises:
        ApiError: 422, when the log ends before.
    """
    known = get_api_context(request)
    if known.checkpoint.position >= position:
        return True
    if not await known.event_store.may_have_reached(position):
        message = f"Ledger-Position: the log ends before position {position}. Send one that was answered."
        raise ApiError(422, "invalid_content", message)
    if await _reached(known.checkpoint, position, _SHORT_WAIT_SECONDS):
        return True
    with track_waiting_request(request.scope) as allowed:
        return allowed and await _reached(known.checkpoint, position, _VIEW_WAIT_SECONDS)


async def _reached(checkpoint: Checkpoint, position: int, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await checkpoint.wait_for_position(position)
    except TimeoutError:
        return False
    return True


async def wait_for_views(request: Request, position: int) -> None:
    """Wait until the views have reached a position, as long as the caller waits.

    Raises:
        TimeoutError: the caller's time is over.
    """
    checkpoint = get_api_context(request).checkpoint
    await checkpoint.wait_for_position(position)
    request.scope["ledger_position"] = checkpoint.position
