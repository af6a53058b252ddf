"""The dependencies of the routes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel
from starlette.requests import Request

from jobledger.api.auth.browser_sessions import BrowserSessions
from jobledger.api.auth.permissions import AuthBackend, RevocationNotifier
from jobledger.api.auth.signed_links import SignedLinks
from jobledger.api.auth.stream_access import StreamAccessCache
from jobledger.api.finish_notifier import FinishNotifier
from jobledger.api.http.client_address import Network
from jobledger.api.http.memory_budget import MemoryBudget
from jobledger.api.http.sse import LiveStreams
from jobledger.api.processes.markdown_previewer import MarkdownPreviewer
from jobledger.api.processes.parameter_validator import ParameterValidator
from jobledger.api.settings import ApiSettings
from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.mongo.connection import Database
from jobledger.ledger.net.url_policy import AllowedHosts
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.system.disk_space import DiskSpaceMonitor
from jobledger.projections.engine.checkpoint import CheckpointFollower
from jobledger.projections.engine.dispatcher import Dispatcher
from jobledger.projections.engine.stalls import StallDetector
from jobledger.projections.slots import Views


@dataclass(frozen=True, slots=True)
class SubmissionDefaults:
    """What applies to jobs of a type whose submission does not say it.

    Attributes:
        max_attempts: The number of attempts.
        timeout_s: The timeout in seconds.
        is_retried: Whether failed jobs of the type may be retried.
    """

    max_attempts: int = 3
    timeout_s: float = 3600.0
    is_retried: bool = True


@dataclass(frozen=True, slots=True)
class ApiContext:
    """The dependencies of the routes. The composition root creates them.

    Attributes:
        job_types: Maps a job type to the model of its parameters.
        submission_defaults: Maps a job type to its defaults. One that is missing has `SubmissionDefaults()`.
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
    markdown_previewer: MarkdownPreviewer
    memory_budget: MemoryBudget
    unavailable_job_types: Mapping[str, str]
    allowed_hosts: tuple[str, ...]
    auth_backend: AuthBackend
    browser_sessions: BrowserSessions | None
    revocation_notifier: RevocationNotifier
    get_groups: Callable[[str], Collection[str]]
    finish_notifier: FinishNotifier
    settings: ApiSettings
    trusted_proxies: Collection[Network]
    has_access_log: bool
    stream_access: StreamAccessCache
    stall_detector: StallDetector
    dispatcher: Dispatcher
    live_streams: LiveStreams
    signed_links: SignedLinks
    allowed_webhook_hosts: AllowedHosts
    is_webhook_echo_enabled: bool
    disk_monitor: DiskSpaceMonitor
    submission_defaults: Mapping[str, SubmissionDefaults] = field(default_factory=dict)

    @property
    def views(self) -> Views:
        """The views in the active slot."""
        return self.checkpoint.views


def get_api_context(request: Request) -> ApiContext:
    """Return the dependencies that create_app() was called with."""
    ctx: ApiContext = request.app.state.context
    return ctx
