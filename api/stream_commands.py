"""Handle a command on the stream that a request names, once for each Idempotency-Key."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request

from jobledger.api.auth.permissions import require_access
from jobledger.api.context import get_api_context
from jobledger.api.http.bodies import run_off_loop
from jobledger.api.http.errors import ApiError
from jobledger.api.idempotency import RequestFingerprint, build_metadata
from jobledger.api.resources import BATCH, ResourceKind
from jobledger.ledger.domain.access import AccessLevel
from jobledger.ledger.domain.errors import CommandRejected
from jobledger.ledger.domain.events import EventMetadata, RecordedEvent
from jobledger.ledger.store.command_handler import Command, StreamState, handle_command

_VERSION_ETAG: Final = re.compile(r'(?:W/)?"(\d+)(?:-[0-9a-f]+)*"')


@dataclass(frozen=True, slots=True)
class LoadedStream:
    """A stream as the log has it, and what is needed to handle a command of a request on it.

    Attributes:
        fingerprint: Identifies the request; None without an Idempotency-Key.
        meta: The metadata of the command's events.
        check: Raises an error if the command is not allowed in a state of the stream.
    """

    stream_id: str
    events: list[RecordedEvent]
    stream_state: StreamState
    fingerprint: RequestFingerprint | None
    meta: EventMetadata
    check: Callable[[StreamState], None] = lambda stream_state: None

    def find_earlier(self) -> RecordedEvent | None:
        """Return the last event that the same request has caused before; None if it is not a repeated request."""
        return None if self.fingerprint is None else self.fingerprint.find_in(self.events)


async def load_for_change(
    request: Request,
    kind: ResourceKind,
    access_level: AccessLevel = AccessLevel.WRITE,
    *,
    content: Any = None,
    check_if_match: bool = True,
) -> LoadedStream:
    """Load the job or batch in the path, and check that the caller may change it.

    Args:
        access_level: The access that the change requires.
        content: The parsed body, which identifies a repeated request.
        check_if_match: Check that `If-Match` names the current version, unless the request is a repeated one.

    Raises:
        ApiError: 401, 403, 404, 412; 422, the Idempotency-Key was used with another body.
    """
    stream_id = kind.get_id_from_path(request)
    fingerprint = await run_off_loop(request, RequestFingerprint.from_request, request, content)
    event_store = get_api_context(request).event_store
    events = await event_store.read_stream(stream_id) if kind.is_id(stream_id) else []
    check = require_access(request, access_level, not_found_error=kind.build_not_found_error(stream_id))
    if check_if_match and (fingerprint is None or fingerprint.find_in(events) is None):
        check = _require_if_match(request, check)
    stream_state = StreamState().apply(events)
    check(stream_state)
    meta = build_metadata(request, fingerprint, stream_id if kind is BATCH else None)
    return LoadedStream(stream_id, events, stream_state, fingerprint, meta, check)


async def handle_once(request: Request, loaded: LoadedStream, command: Command) -> list[RecordedEvent]:
    """Handle a command, unless the same request has done it before.

    Returns:
        The events of the stream up to the last one of the command.

    Raises:
        ApiError: As `loaded.check`.
        CommandRejected: The stream's state does not allow the command.
    """
    event_store, fingerprint = get_api_context(request).event_store, loaded.fingerprint
    if (earlier := loaded.find_earlier()) is not None:
        return loaded.events[: earlier.version]
    try:
        result = await handle_command(
            event_store,
            loaded.stream_id,
            command,
            meta=loaded.meta,
            stream_state=loaded.stream_state,
            check=loaded.check,
        )
    except (CommandRejected, ApiError):
        if fingerprint is None:
            raise
        events = await event_store.read_stream(loaded.stream_id)
        if (earlier := fingerprint.find_in(events)) is None:
            raise
        return events[: earlier.version]  # a concurrent request with the same key was faster
    events = [*loaded.events, *result.events]
    version = result.stream_state.head.version
    if len(events) != version:  # another process has appended events, too
        events = await event_store.read_stream(loaded.stream_id)
    return events[:version]


def _require_if_match(request: Request, check: Callable[[StreamState], None]) -> Callable[[StreamState], None]:
    """Return a check that also requires the stream version that `If-Match` names, if the header is present.

    A command changes one stream, so only the version at the beginning of the ETag is compared. A job whose batch was
    paused meanwhile is no conflict. Weak tags are accepted because proxies that compress responses weaken them.

    The returned check raises ApiError 412 for another version.
    """
    if "if-match" not in request.headers:
        return check
    header = ",".join(request.headers.getlist("if-match"))

    def check_both(stream_state: StreamState) -> None:
        check(stream_state)
        version = stream_state.head.version
        if not _is_version_listed(header, version):
            message = f"Precondition failed: the resource has changed to version {version} (If-Match). Read it again."
            raise ApiError(412, "precondition_failed", message, details={"version": version})

    return check_both


def _is_version_listed(header: str, version: int) -> bool:
    if header.strip() == "*":
        return True
    tags = (_VERSION_ETAG.fullmatch(tag.strip()) for tag in header.split(","))
    return any(tag is not None and tag[1] == str(version) for tag in tags)
