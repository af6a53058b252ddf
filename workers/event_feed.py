"""Deliver the events that a worker observes: from the change stream, or during a flood from the log.

With a backlog, a worker needs few of the thousands of events that come in a second: cancellations, pauses, and a sample
of the claims, which shows who else is claiming. Each event costs the server and each worker as much by the change
stream as the rest of the job does. So a busy worker pauses the change stream for a few seconds and reads the log
several times a second. Whatever it misses, such as an event that was inserted late at an earlier position, it finds by
the resync when the change stream is opened again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any, Final

import structlog

from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import CheckpointFollower

_log = structlog.get_logger()
_FLOOD_EVENTS_PER_SECOND: Final = 300
_MEASURE_SECONDS: Final = 0.25
_READ_SECONDS: Final = 0.2
"""Time between two reads of the log in a flood."""
_MAX_FLOOD_SECONDS: Final = 4.0
"""Time after which the change stream is opened again, and with it the load is measured again."""
_OTHER_THAN_CLAIM: Final[Document] = {"type": {"$ne": "JobClaimed"}}
_SAMPLED_CLAIM: Final[Document] = {"_id": {"$mod": [4, 0]}}


class EventFeed:
    """The events that a worker observes.

    Args:
        event_types: Their types.
        pause_stream: `ChangeStream.pause`. None: other roles of this process need the stream.
        needs_jobs: Returns whether the worker must hear of new jobs at once.
        handle: Called with the document of each event. During a flood, it lacks most of its payload.
    """

    def __init__(
        self,
        event_store: EventStore,
        checkpoint: CheckpointFollower,
        *,
        event_types: Collection[str],
        pause_stream: Callable[[], AbstractContextManager[None]] | None,
        needs_jobs: Callable[[], bool],
        handle: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._event_store = event_store
        self._checkpoint = checkpoint
        self._event_types = event_types
        self._pause_stream = pause_stream
        self._needs_jobs = needs_jobs
        self._handle = handle
        self._position = 0
        """The largest position of an event that was handled."""
        self._count = 0
        self._counted_since = 0.0
        self._flood_begun = asyncio.Event()
        self._hurry = asyncio.Event()

    def on_change(self, change: Mapping[str, Any]) -> None:
        """Handle a change of the log."""
        if change["operationType"] != "insert":
            return
        document = change["fullDocument"]
        self._position = max(self._position, document["_id"])
        self._count += 1
        now = asyncio.get_running_loop().time()
        if (seconds := now - self._counted_since) > _MEASURE_SECONDS:
            if self._count / seconds > _FLOOD_EVENTS_PER_SECOND:
                self._flood_begun.set()
            self._counted_since, self._count = now, 0
        self._handle(document)

    def hurry(self) -> None:
        """End a flood, because the worker needs jobs."""
        self._hurry.set()

    async def run(self) -> None:
        """Read the log during floods, until cancelled."""
        while self._pause_stream is not None:
            self._flood_begun.clear()
            await self._flood_begun.wait()
            if not self._needs_jobs():
                with self._pause_stream():
                    await self._read_log()

    async def _read_log(self) -> None:
        loop = asyncio.get_running_loop()
        end_at = loop.time() + _MAX_FLOOD_SECONDS
        self._hurry.clear()
        while not self._needs_jobs() and loop.time() < end_at:
            with suppress(TimeoutError):
                async with asyncio.timeout(_READ_SECONDS):
                    await self._hurry.wait()
                return
            try:
                await self._checkpoint.refresh()
                documents, self._position = await self._event_store.find_events(
                    {"type": {"$in": sorted(self._event_types)}, "$or": [_OTHER_THAN_CLAIM, _SAMPLED_CLAIM]},
                    after=self._position,
                    fields=("stream", "version", "type", "data.worker_id"),
                )
            except LedgerUnavailable as error:
                _log.warning("reading the log interrupted", error=str(error))
                return
            for document in documents:
                self._handle_safely(document)

    def _handle_safely(self, document: Mapping[str, Any]) -> None:
        try:
            self._handle(document)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            # A damaged document, written by another program, must not end the feed.
            _log.error("unreadable event", position=document["_id"], error=repr(error))
