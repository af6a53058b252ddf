"""api: who may see which events, by what the log says now. Used by live streams and pages of the log.

Why a revocation is never overlooked: `Visibility` follows the whole log itself, in dense order, and corrects what it
knows of a job or batch at each event that changes access to it. Before it answers for an event it has passed the
event's position, so it knows all changes that came before. What it does not know yet it reads from the log, and a
change that passes while it reads has it read again. Whoever asks for old events has it reach the head of the log first
(`reached`): so what was changed before they asked counts, too, even if it came long after those events. It begins where
the views are: up to there no position is missing, so nobody can still write one that it would never pass.
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
from jobledger.projections.engine.checkpoint import Checkpoint

_log = structlog.get_logger()
_KNOWN_STREAMS: Final = 20_000
_KINDS: Final = ("job-", "batch-")
_DELETED: Final = (JobDeleted, BatchDeleted)
_TELLS_OF_DELETION: Final = frozenset(event.__name__ for event in _DELETED)
_HARMLESS: Final = frozenset(
    name
    for name, event in EVENT_TYPES.items()
    if "access_control" not in event.model_fields and name not in _TELLS_OF_DELETION
)
"""The types that change nothing about access. What is not among them may, as one of a later version of this program."""
_ACCESS_ONLY: Final = override_payload_fields({"parameters": {}, "job_ids": []})
"""Payloads without what may be large and says nothing about access."""


@dataclass(frozen=True, slots=True)
class StreamAccess:
    """Who may see a job or batch, as of a version of its stream. `unreadable`: only a later program knows."""

    version: int
    owner: str = ""
    access_control: dict[str, Any] = field(default_factory=dict)
    teams: tuple[str, ...] = ()
    deleted: bool = False
    unreadable: bool = False

    def get_right(self, principal: Principal) -> AccessLevel:
        """Return somebody's right to it, or the one they had before it was deleted."""
        if self.unreadable:
            return AccessLevel.NONE
        return get_access_level(principal, owner=self.owner, access=self.access_control, teams=self.teams)

    def allows(self, principal: Principal) -> bool:
        """Return whether somebody may read it, or might before it was deleted."""
        return self.get_right(principal) >= AccessLevel.READ


def _access_after(access: StreamAccess | None, event: RecordedEvent) -> StreamAccess | None:
    """Return who may see a job or batch after one more of its events; None if it has not begun."""
    version = event.version
    if event.type in _HARMLESS or (access is not None and version <= access.version):
        return access
    try:
        happened: Event = event.event
    except UnreadableEvent:
        return StreamAccess(version, unreadable=True)
    if isinstance(happened, JobSubmitted | BatchSubmitted):
        return StreamAccess(version, happened.user_id, happened.access_control.model_dump(), tuple(happened.teams))
    if access is None or access.unreadable:
        return access
    if isinstance(happened, _DELETED):
        return replace(access, version=version, deleted=True)
    given = getattr(happened, "access_control", None)
    return access if given is None else replace(access, version=version, access_control=given.model_dump())


class Visibility:
    """Knows who may see the jobs and batches that are asked about, the latest of them; one for each process."""

    def __init__(self, log: EventStore, checkpoint: Checkpoint) -> None:
        self._log = log
        self._checkpoint = checkpoint
        self._known: OrderedDict[str, StreamAccess | None] = OrderedDict()
        self._position = -1
        self._moved = asyncio.Event()
        self._reading = asyncio.Lock()
        self._passed: set[str] = set()
        """Streams whose access has changed while others are being read."""

    async def run(self) -> None:
        """Follow the log until cancelled. Needs the process's change stream."""
        while True:
            try:
                await self._follow()
            except LedgerUnavailable as error:
                _log.warning("visibility updates interrupted, retrying", error=str(error))
                await asyncio.sleep(0.5)

    async def _follow(self) -> None:
        after = self._position if self._position >= 0 else self._checkpoint.position
        async with self._log.subscribe(after=after) as events:
            self._reach(after)
            while True:
                for event in await events.next_chunk():
                    self._pass(event)
                self._reach(events.position)

    def _reach(self, position: int) -> None:
        self._position = position
        self._moved.set()
        self._moved = asyncio.Event()

    def _pass(self, event: RecordedEvent) -> None:
        if event.type in _HARMLESS or not event.stream.startswith(_KINDS):
            return
        if self._reading.locked():
            self._passed.add(event.stream)
        if event.version == 1 or event.stream in self._known:
            self._keep(event.stream, _access_after(self._known.get(event.stream), event))

    def _keep(self, stream: str, access: StreamAccess | None) -> None:
        self._known[stream] = access
        self._known.move_to_end(stream)
        while len(self._known) > _KNOWN_STREAMS:
            self._known.popitem(last=False)

    async def wait_for_position(self, position: int) -> None:
        """Return once every change of access up to a position is known."""
        while self._position < position:
            await self._moved.wait()

    async def get_viewer(self, principal: Principal, event: RecordedEvent) -> Viewer | None:
        """Return somebody with their right to an event: that is, now, to the job or batch that it belongs to.

        None if they may not see it.

        Of what was deleted, those who could see it still see that it was, and nothing else.

        Raises:
            LedgerUnavailable: the log cannot be asked.
        """
        if principal.is_admin:
            return Viewer(principal, AccessLevel.ADMIN)
        access = await self.get_access(event.stream, at=event.position)
        if access is None or (access.deleted and event.type not in _TELLS_OF_DELETION):
            return None
        right = access.get_right(principal)
        return Viewer(principal, right) if right >= AccessLevel.READ else None

    async def can_follow(self, principal: Principal, stream: str) -> bool:
        """Return whether somebody may see a job or batch now. Who sees everything may follow the log of any stream.

        Raises:
            LedgerUnavailable: the log cannot be asked.
        """
        if principal.is_admin:
            return True
        access = await self.get_access(stream)
        return access is not None and not access.deleted and access.allows(principal)

    async def get_access(self, stream: str, *, at: int = 0) -> StreamAccess | None:
        """Return who may see a stream, with every change up to position `at`; None for everything that nobody owns."""
        if self._position < at:
            await self.wait_for_position(at)
        stream = _subject(stream)
        if not stream.startswith(_KINDS):
            return None
        while stream not in self._known:
            await self.load_access([stream])
        self._known.move_to_end(stream)
        return self._known[stream]

    async def load_access(self, streams: Iterable[str]) -> None:
        """Read in one go who may see these streams, as far as that is not known."""
        async with self._reading:  # one at a time: the others then find what this one has read
            wanted = {it for it in map(_subject, streams) if it.startswith(_KINDS)} - self._known.keys()
            while wanted:
                self._passed.clear()
                found = await self._read(wanted)
                # What has changed meanwhile may be missing in what was read: again.
                for stream in wanted - self._passed:
                    self._keep(stream, found[stream])
                wanted = (wanted & self._passed) - self._known.keys()

    async def _read(self, streams: Collection[str]) -> dict[str, StreamAccess | None]:
        found: dict[str, StreamAccess | None] = dict.fromkeys(streams)
        async with aclosing(
            self._log.iterate_stream_batches(streams, exclude_types=_HARMLESS, data_expression=_ACCESS_ONLY)
        ) as parts:
            async for events in parts:
                for event in events:
                    found[event.stream] = _access_after(found[event.stream], event)
        return found


def _subject(stream: str) -> str:
    """Return whose access counts: a delivery is seen by who may see the job or batch that it tells of."""
    return parse_source(stream) if stream.startswith("delivery-") else stream
