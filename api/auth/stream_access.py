"""The access rights to events, by the current state of the log. Live streams and pages of the log use them.

No revocation is missed, for these reasons:

- The cache subscribes to the whole log without gaps. It updates the rights to a job or batch at each event that
  changes them.
- It has processed the position of an event before it returns the rights to that event, so it has all earlier changes.
- It reads unknown rights from the log. If a change arrives during the read, it reads again.
- A request for old events waits until it has processed the head of the log (`wait_for_position`). Changes that came
  after those events, but before the request, therefore apply.
- It starts at the position of the views. There are no gaps up to there, so no event can be added that it would miss.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Final

import structlog

from jobledger.api.auth.redaction import Viewer
from jobledger.ledger.domain.access import AccessLevel, Principal, get_access_level
from jobledger.ledger.domain.delivery import parse_source
from jobledger.ledger.domain.errors import LedgerUnavailable, UnreadableEvent
from jobledger.ledger.domain.events import (
    EVENT_TYPES,
    BatchDeleted,
    BatchSubmitted,
    Event,
    JobDeleted,
    JobSubmitted,
    RecordedEvent,
)
from jobledger.ledger.store.event_store import EventStore, override_payload_fields
from jobledger.projections.engine.checkpoint import CheckpointFollower

_log = structlog.get_logger()
_MAX_STREAMS: Final = 20_000
_STREAM_PREFIXES: Final = ("job-", "batch-")
_DELETED: Final = (JobDeleted, BatchDeleted)
_DELETION_EVENT_TYPES: Final = frozenset(event.__name__ for event in _DELETED)
_IRRELEVANT_EVENT_TYPES: Final = frozenset(
    name
    for name, event in EVENT_TYPES.items()
    if "access_control" not in event.model_fields and name not in _DELETION_EVENT_TYPES
)
"""Types that do not change access rights. Unknown types of later versions may change them."""
_WITHOUT_LARGE_FIELDS: Final = override_payload_fields({"parameters": {}, "job_ids": []})
"""Payloads without fields that may be large and do not affect access rights."""


@dataclass(frozen=True, slots=True)
class StreamAccess:
    """Access rights to a job or batch as of a stream version.

    `is_unreadable`: an event that cannot be read may have changed the rights, so only admins have access.
    """

    version: int
    owner: str = ""
    access_control: dict[str, Any] = field(default_factory=dict)
    teams: tuple[str, ...] = ()
    is_deleted: bool = False
    is_unreadable: bool = False

    def get_level(self, principal: Principal) -> AccessLevel:
        """Return a principal's access level; after deletion, the level before it."""
        if self.is_unreadable:
            return AccessLevel.NONE
        return get_access_level(principal, owner=self.owner, access=self.access_control, teams=self.teams)


def _apply_event(access: StreamAccess | None, event: RecordedEvent) -> StreamAccess | None:
    """Return the access rights after another event; None before the first event."""
    version = event.version
    if event.type in _IRRELEVANT_EVENT_TYPES or (access is not None and version <= access.version):
        return access
    try:
        payload: Event = event.event
    except UnreadableEvent:
        return StreamAccess(version, is_unreadable=True)
    if isinstance(payload, JobSubmitted | BatchSubmitted):
        return StreamAccess(version, payload.user_id, payload.access_control.model_dump(), tuple(payload.teams))
    if access is None or access.is_unreadable:
        return access
    if isinstance(payload, _DELETED):
        return replace(access, version=version, is_deleted=True)
    changed = getattr(payload, "access_control", None)
    return access if changed is None else replace(access, version=version, access_control=changed.model_dump())


class StreamAccessCache:
    """Cache of the access rights to jobs and batches, most recently used first. One for each process."""

    def __init__(self, event_store: EventStore, checkpoint: CheckpointFollower) -> None:
        self._event_store = event_store
        self._checkpoint = checkpoint
        self._access: OrderedDict[str, StreamAccess | None] = OrderedDict()
        self._position = -1
        self._position_changed = asyncio.Event()
        self._load_lock = asyncio.Lock()
        self._changed_during_load: set[str] = set()
        """Streams whose access rights changed while rights are being loaded."""

    async def run(self) -> None:
        """Process the events of the log until cancelled. Needs the process's change stream."""
        while True:
            try:
                await self._process_events()
            except LedgerUnavailable as error:
                _log.warning("updates of access rights interrupted, retrying", error=str(error))
                await asyncio.sleep(0.5)

    async def _process_events(self) -> None:
        after = self._position if self._position >= 0 else self._checkpoint.position
        async with self._event_store.subscribe(after=after) as events:
            self._set_position(after)
            while True:
                for event in await events.read_chunk():
                    self._process_event(event)
                self._set_position(events.position)

    def _set_position(self, position: int) -> None:
        self._position = position
        self._position_changed.set()
        self._position_changed = asyncio.Event()

    def _process_event(self, event: RecordedEvent) -> None:
        if event.type in _IRRELEVANT_EVENT_TYPES or not event.stream.startswith(_STREAM_PREFIXES):
            return
        if self._load_lock.locked():
            self._changed_during_load.add(event.stream)
        if event.version == 1 or event.stream in self._access:
            self._store(event.stream, _apply_event(self._access.get(event.stream), event))

    def _store(self, stream: str, access: StreamAccess | None) -> None:
        self._access[stream] = access
        self._access.move_to_end(stream)
        while len(self._access) > _MAX_STREAMS:
            self._access.popitem(last=False)

    async def wait_for_position(self, position: int) -> None:
        """Return when all events up to a position have been processed."""
        while self._position < position:
            await self._position_changed.wait()

    async def get_viewer(self, principal: Principal, event: RecordedEvent) -> Viewer | None:
        """Return the principal with their current access level to the job or batch of an event.

        None if the principal may not see the event. Of a deleted job or batch, only the deletion event remains visible
        to principals who had access.

        Raises:
            LedgerUnavailable: The log cannot be read.
        """
        if principal.is_admin:
            return Viewer(principal, AccessLevel.ADMIN)
        access = await self.get_access(event.stream, at=event.position)
        if access is None or (access.is_deleted and event.type not in _DELETION_EVENT_TYPES):
            return None
        level = access.get_level(principal)
        return Viewer(principal, level) if level >= AccessLevel.READ else None

    async def can_follow(self, principal: Principal, stream: str) -> bool:
        """Return whether a principal may read a job or batch now. Admins may read each stream.

        Raises:
            LedgerUnavailable: The log cannot be read.
        """
        if principal.is_admin:
            return True
        access = await self.get_access(stream)
        return access is not None and not access.is_deleted and access.get_level(principal) >= AccessLevel.READ

    async def get_access(self, stream: str, *, at: int = 0) -> StreamAccess | None:
        """Return the access rights to a stream, with all changes up to position `at`; None without an owner."""
        if self._position < at:
            await self.wait_for_position(at)
        stream = _get_source(stream)
        if not stream.startswith(_STREAM_PREFIXES):
            return None
        while stream not in self._access:
            await self.load_access([stream])
        self._access.move_to_end(stream)
        return self._access[stream]

    async def load_access(self, streams: Iterable[str]) -> None:
        """Load the access rights to streams that are not in the cache, in one read."""
        async with self._load_lock:  # one load at a time: later callers find its results in the cache
            missing = {
                stream for stream in map(_get_source, streams) if stream.startswith(_STREAM_PREFIXES)
            } - self._access.keys()
            while missing:
                self._changed_during_load.clear()
                loaded = await self._read(missing)
                # The result may lack changes that arrived during the read: read those streams again.
                for stream in missing - self._changed_during_load:
                    self._store(stream, loaded[stream])
                missing = (missing & self._changed_during_load) - self._access.keys()

    async def _read(self, streams: Collection[str]) -> dict[str, StreamAccess | None]:
        access: dict[str, StreamAccess | None] = dict.fromkeys(streams)
        async with aclosing(
            self._event_store.iterate_stream_batches(
                streams, exclude_types=_IRRELEVANT_EVENT_TYPES, data_expression=_WITHOUT_LARGE_FIELDS
            )
        ) as chunks:
            async for events in chunks:
                for event in events:
                    access[event.stream] = _apply_event(access[event.stream], event)
        return access


def _get_source(stream: str) -> str:
    """Return the stream whose access rights apply: for a delivery its job or batch."""
    return parse_source(stream) if stream.startswith("delivery-") else stream
