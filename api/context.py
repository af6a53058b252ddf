"""The dependencies of the routes, and functions that most routes use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel
from starlette.requests import Request

from jobledger.api.auth.browser_sessions import BrowserSessions
from jobledger.api.auth.permissions import AuthBackend, RevocationNotifier
from jobledger.api.auth.signed_links import SignedLinks
from jobledger.api.auth.stream_access import StreamAccessCache
from jobledger.api.completion_waiter import CompletionWaiter
from jobledger.api.dashboard.markdown_preview import MarkdownPreviewer
from jobledger.api.http.client_address import Network
from jobledger.api.http.errors import ApiError
from jobledger.api.http.limits import track_waiting_request
from jobledger.api.http.memory_budget import MemoryBudget
from jobledger.api.http.sse import LiveStreams
from jobledger.api.http.validation import Model, validate_content
from jobledger.api.settings import ApiSettings
from jobledger.api.submission.parameters import ParameterValidator
from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.mongo.connection import Database
from jobledger.ledger.net.url_policy import AllowedHosts
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.system.disk_space import DiskSpaceMonitor
from jobledger.projections.engine.checkpoint import CheckpointFollower
from jobledger.projections.engine.stalls import StallDetector
from jobledger.projections.slots import Views

_SHORT_WAIT_SECONDS: Final = 1.0
"""How long a request waits for the views before it counts as a waiting request."""
_VIEW_WAIT_SECONDS: Final = 9.0


@dataclass(frozen=True, slots=True)
class ApiContext:
    """The dependencies of the routes. The composition root creates them.

    Attributes:
        job_types: Maps a job type to the model of its parameters.
        unavailable_job_types: Maps a job type whose processor is installed but cannot be used to the reason.
        get_groups: Returns the groups of a user, as far as they are known.
        trusted_proxies: Networks of the proxies whose X-Forwarded-For header is used.
        has_access_log: Whether each request is logged.
        allowed_webhook_hosts: The private hosts that webhooks may be sent to.
        is_webhook_echo_enabled: Whether the API has a path that receives webhooks for tests.
        browser_sessions: None in authentication modes without sessions.
    """

    db: Database
    event_store: EventStore
    checkpoint: CheckpointFollower
    change_stream: ChangeStream
    file_store: FileStore
    job_types: Mapping[str, type[BaseModel]]
    parameter_validator: ParameterValidator
    previews: MarkdownPreviewer
    memory_budget: MemoryBudget
    unavailable_job_types: Mapping[str, str]
    allowed_hosts: tuple[str, ...]
    auth_backend: AuthBackend
    browser_sessions: BrowserSessions | None
    revocation_notifier: RevocationNotifier
    get_groups: Callable[[str], Collection[str]]
    completion_waiter: CompletionWaiter
    settings: ApiSettings
    trusted_proxies: Collection[Network]
    has_access_log: bool
    stream_access: StreamAccessCache
    stall_detector: StallDetector
    live_streams: LiveStreams
    signed_links: SignedLinks
    allowed_webhook_hosts: AllowedHosts
    is_webhook_echo_enabled: bool
    disk_monitor: DiskSpaceMonitor

    @property
    def views(self) -> Views:
        """The views in the active slot."""
        return self.checkpoint.views


def get_api_context(request: Request) -> ApiContext:
    """Return the dependencies that create_app() was called with."""
    ctx: ApiContext = request.app.state.context
    return ctx


def parse_query(request: Request, model: type[Model]) -> Model:
    """Validate the query parameters.

    Raises:
        ApiError: 422; the details list each wrong parameter.
    """
    return validate_content(model, dict(request.query_params))


async def wait_for_requested_position(request: Request) -> None:
    """Wait until the views have reached the `Ledger-Position` (or `min_position`) of the request, if it has one.

    Raises:
        ApiError: 400, the position is malformed; 422, it is after the end of the log; 503, the views did not reach it
            in time.
    """
    checkpoint = get_api_context(request).checkpoint
    requested = request.headers.get("ledger-position", request.query_params.get("min_position"))
    if requested is not None:
        if not requested.isascii() or not requested.isdecimal() or len(requested) > 18:
            message = f"Ledger-Position must be a whole number, got {requested[:40]!r}."
            raise ApiError(400, "malformed_position", message)
        if not await _wait_for_position(request, int(requested)):
            message = f"The views have reached position {checkpoint.position}, not {requested}. Retry in a moment."
            raise ApiError(503, "projection_lagging", message, retry_after_seconds=2)
    request.scope["ledger_position"] = checkpoint.position


async def _wait_for_position(request: Request, position: int) -> bool:
    """Wait until the views have reached a position. Return whether they reached it in time.

    Raises:
        ApiError: 422, the position is after the end of the log.
    """
    ctx = get_api_context(request)
    if ctx.checkpoint.position >= position:
        return True
    if not await ctx.event_store.may_have_reached(position):
        message = f"Ledger-Position: the log ends before position {position}. Send the value of an earlier response."
        raise ApiError(422, "invalid_content", message)
    if await _wait_for_checkpoint(ctx.checkpoint, position, _SHORT_WAIT_SECONDS):
        return True
    with track_waiting_request(request.scope) as is_allowed:
        return is_allowed and await _wait_for_checkpoint(ctx.checkpoint, position, _VIEW_WAIT_SECONDS)


async def _wait_for_checkpoint(checkpoint: CheckpointFollower, position: int, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await checkpoint.wait_for_position(position)
    except TimeoutError:
        return False
    return True
