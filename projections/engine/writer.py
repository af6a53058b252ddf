"""Write chunks of events to the views, each event exactly once.

A large chunk is divided into parts. The writes of a part and the update of the checkpoint are one transaction. The
filter of that update contains the position where the part begins, and the fencing token or slots of this writer. A
process that was replaced finds no such checkpoint, and its transaction is aborted.

If a part exceeds the limits of a transaction, it is divided. If an event cannot be applied, or a document cannot be
stored, only its stream is isolated (projections/views/projection_errors.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import structlog
from bson.errors import BSONError
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import BulkWriteError, OperationFailure, PyMongoError

from jobledger.ledger.domain.errors import LedgerUnavailable, UnsupportedEvent
from jobledger.ledger.domain.events import JobProgressed, RecordedEvent
from jobledger.ledger.mongo.connection import Database, Document, is_transient, translate_errors
from jobledger.ledger.mongo.leader_election import LeadershipLost
from jobledger.ledger.mongo.transactions import run_transaction
from jobledger.ledger.store.event_store import ReadPosition
from jobledger.projections.engine.document_loader import BATCH_QUEUE_EVENTS, DocumentLoader
from jobledger.projections.engine.view_changes import ChunkTooLarge, ViewChanges, Write
from jobledger.projections.slots import Views
from jobledger.projections.views import projection_errors, statistics

_log = structlog.get_logger()
MAX_CHUNK_LIST_INDEX_BYTES: Final = 64 * 1024 * 1024
"""Maximum memory of the list index that a chunk writes."""
_SLOW_SECONDS: Final = 5.0
"""After a slower part, the next ones are smaller. The server aborts a transaction after 10 to 60 seconds."""
_MAX_PART_EVENTS: Final = 1280
"""Number of events in one transaction. While one part of a chunk is written, the next one is applied in memory."""
_MAX_REJECTED_WRITES: Final = 1000
"""Number of rejected writes in one chunk after which the writer assumes a server failure."""
_EVENTS_PER_YIELD: Final = 4
"""After so many events, a write in progress may continue. With 50 events, a rebuild is a fifth slower."""
_SERVER_ERROR_CODES: Final = frozenset({24, 46, 50, 112, 251, 262, 290, 14031})
"""Errors that do not concern a document: locks, time limits, write conflicts, a full disk."""
_TOO_LARGE_CODES: Final = frozenset({257, 388})
"""TransactionTooLarge, TransactionTooLargeForCache."""
BeforeWrite = Callable[[AsyncClientSession], Awaitable[None]]


class ProjectionWriter:
    """Applies events to one set of views. The filter on the checkpoint ensures that no other process writes to them.

    Args:
        checkpoint_id: ID of the checkpoint document that records the position of these views.
        checkpoint_filter: Fields that the checkpoint must have. Otherwise another process has taken over.
        last_applied: The last event that the views contain.
    """

    def __init__(
        self,
        db: Database,
        views: Views,
        *,
        checkpoint_id: str,
        checkpoint_filter: Mapping[str, Any],
        last_applied: ReadPosition,
    ) -> None:
        self._db = db
        self.views = views
        self._checkpoint_id = checkpoint_id
        self._checkpoint_filter = checkpoint_filter
        self._loader = DocumentLoader(db, views)
        self._unwritten: ViewChanges | None = None
        self._written = asyncio.Event()
        self._max_part_events = _MAX_PART_EVENTS
        self.position, self._hash = last_applied

    @property
    def last_applied(self) -> ReadPosition:
        """The last event that the views contain."""
        return ReadPosition(self.position, self._hash)

    async def apply(
        self, events: Sequence[RecordedEvent], *, before_write: BeforeWrite | None = None
    ) -> list[Document]:
        """Apply the events after `position` to the views.

        Many events are written in several transactions, each with its checkpoint.

        Args:
            before_write: Called at the start of the transaction that writes the last of the events. It is called again
                if the transaction is repeated.

        Returns:
            The documents of the changed batches, which may now be finished.

        Raises:
            LeadershipLost: Another process has taken over. Nothing more was written.
            LedgerUnavailable: The database failed.
            UnsupportedEvent: A later version of the program wrote one of the events. Those before it may be written.
        """
        changed_batches: dict[str, Document | None] = {}
        begin = 0
        being_written: Sequence[RecordedEvent] = ()
        writing: asyncio.Task[float] | None = None
        try:
            while begin < len(events) or writing is not None:
                part = events[begin : begin + self._max_part_events]
                try:
                    changes = await self._prepare_while(part, writing)
                except ChunkTooLarge as error:
                    if writing is not None and self.position < being_written[-1].position:
                        begin, part = begin - len(being_written), being_written
                    self._divide_parts(part, error)
                    writing = None
                    continue
                if writing is not None:
                    self._adapt_parts(len(being_written), writing.result())
                    writing = None
                if changes is not None:
                    begin, being_written = begin + len(part), part
                    write = self._write_part(changes, before_write if begin == len(events) else None)
                    writing = asyncio.create_task(write, name="write-views")
                    await asyncio.sleep(0)  # the write begins
                    changed_batches |= changes.current["batches"]
        finally:
            if writing is not None:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
        return [batch for batch in changed_batches.values() if batch is not None]

    async def _prepare_while(
        self, part: Sequence[RecordedEvent], writing: asyncio.Task[float] | None
    ) -> ViewChanges | None:
        """Wait until the previous part is written, and return the prepared part (None if it has no events).

        Raises:
            ChunkTooLarge: One of the two parts is too large. `position` tells which.
            LeadershipLost, LedgerUnavailable, UnsupportedEvent: As `apply`.
        """
        try:
            changes = await self.prepare(part) if part else None
        except (ChunkTooLarge, UnsupportedEvent):
            if writing is not None:
                await writing
            raise
        if writing is not None:
            await writing
        return changes

    async def _write_part(self, changes: ViewChanges, before_write: BeforeWrite | None) -> float:
        """Write a prepared part, and return how many seconds it took."""
        started = time.monotonic()
        await self.write(changes, before_write=before_write)
        return time.monotonic() - started

    def _divide_parts(self, part: Sequence[RecordedEvent], error: ChunkTooLarge) -> None:
        """Discard what is not written, and make the next parts smaller than one that was too large."""
        self.discard_unwritten()
        if len(part) == 1:
            raise LedgerUnavailable(
                f"The event at position {part[0].position} cannot be written to the views: {error}"
            ) from error
        self._max_part_events = len(part) // 2

    def _adapt_parts(self, events: int, seconds: float) -> None:
        """Choose the size of the next parts after one was written."""
        if seconds > _SLOW_SECONDS:
            self._max_part_events = max(1, events // 2)
        elif self._max_part_events < _MAX_PART_EVENTS:
            self._max_part_events = min(2 * self._max_part_events, _MAX_PART_EVENTS)

    async def prepare(self, events: Sequence[RecordedEvent]) -> ViewChanges:
        """Apply the next chunk in memory. Meanwhile, `write` may write the previous one.

        Raises:
            ChunkTooLarge: Several events exceed the memory limits.
            LedgerUnavailable: The database failed.
            UnsupportedEvent: A later version of the program wrote one of the events.
        """
        with translate_errors("loading documents of the views"):
            if self._unwritten is not None and any(event.type in BATCH_QUEUE_EVENTS for event in events):
                await self._written.wait()  # a query for the pending jobs must see the previous chunk
            changes = await self._loader.load(events, unwritten=self._unwritten, position=self.position)
        digest = events[-1].document.get("hash")  # events read without metadata have no hash
        changes.hash = digest if isinstance(digest, bytes) else None
        remaining = _drop_superseded_progress(events)
        if len(remaining) < len(events):
            changes.counter_increments[statistics.EVENTS, JobProgressed.__name__] += len(events) - len(remaining)
        for number, event in enumerate(remaining, 1):
            changes.apply(event)
            if changes.list_index_bytes > MAX_CHUNK_LIST_INDEX_BYTES and number < len(remaining):
                raise ChunkTooLarge(f"its documents have {changes.list_index_bytes} bytes of list index")
            if number % _EVENTS_PER_YIELD == 0 and self._unwritten is not None:
                await asyncio.sleep(0)  # lets the write of the previous chunk continue
        self._loader.cache_documents(changes)
        return changes

    async def write(self, changes: ViewChanges, *, before_write: BeforeWrite | None = None) -> None:
        """Write a prepared chunk. Chunks must be written one after the other in the order of the log.

        After any other exception than ChunkTooLarge, the writer must no longer be used.

        Raises:
            ChunkTooLarge: The chunk exceeds the limits of a transaction. Call `discard_unwritten` next.
            LeadershipLost, LedgerUnavailable: As `apply`.
        """
        self._unwritten = changes
        self._written.clear()
        try:
            with translate_errors("writing the views"):
                await self._write_or_isolate(changes, before_write)
        finally:
            self._written.set()  # also after an error: otherwise `prepare` would wait forever
        for key, projection_error in changes.new_errors:
            _log.error("stream isolated after projection error", document=key, **projection_error)
        reduced = self._loader.reduced
        if reduced or changes.unstorable:
            reduced.difference_update((view, key) for view, documents in changes.current.items() for key in documents)
            reduced.update(changes.unstorable)
        self.position, self._hash = changes.position, changes.hash
        self._unwritten = None

    def discard_unwritten(self) -> None:
        """Discard the events that were applied in memory and not written."""
        self._loader.clear_cache()
        self._unwritten = None
        self._written.set()

    async def _write_or_isolate(self, changes: ViewChanges, before_write: BeforeWrite | None) -> None:
        try:
            await self._write(changes, before_write, changes.build_writes(replaced=self._loader.reduced))
        except (_WriteRejected, PyMongoError, BSONError, ValueError, OverflowError) as error:
            if not _is_write_rejection(error):
                raise
            _log.warning(
                "chunk rejected, isolating its unstorable documents", position=changes.position, error=str(error)
            )
            await self._write_storable(changes, before_write)

    async def _write_storable(self, changes: ViewChanges, before_write: BeforeWrite | None) -> None:
        """Write a chunk with its unstorable documents reduced or skipped."""
        changes.mark_unstorable_documents()
        for _ in range(_MAX_REJECTED_WRITES):
            writes = changes.build_writes(replaced=self._loader.reduced, upserts=True)
            try:
                return await self._write(changes, before_write, writes)
            except _WriteRejected as rejected:
                view, key = rejected.view, rejected.key
                if (view, key) in changes.skipped or view in (projection_errors.NAME, statistics.NAME):
                    raise rejected.error from None
                message = f"The database rejected the document: {_get_server_message(rejected.error)}"
                changes.mark_unstorable(view, key, message)
        raise LedgerUnavailable(f"The database rejected more than {_MAX_REJECTED_WRITES} writes of one chunk.")

    async def _write(
        self,
        changes: ViewChanges,
        before_write: BeforeWrite | None,
        writes: Mapping[str, Sequence[tuple[str, Write]]],
    ) -> None:
        """Write a chunk and the checkpoint in one transaction."""
        own_checkpoint = {"_id": self._checkpoint_id, "position": self.position, **self._checkpoint_filter}
        update = {"$set": {"position": changes.position, "hash": changes.hash}}
        tries, started = 0, time.monotonic()

        async def write(session: AsyncClientSession) -> None:
            nonlocal tries
            tries += 1
            if tries > 1 and time.monotonic() - started > 2 * _SLOW_SECONDS:
                raise ChunkTooLarge("its transaction takes longer than the server allows")
            if before_write is not None:
                await before_write(session)
            result = await self._db.checkpoints.update_one(own_checkpoint, update, session=session)
            if not result.matched_count:
                raise LeadershipLost
            for view, view_writes in writes.items():
                try:
                    await self.views[view].bulk_write(
                        [write for _, write in view_writes], ordered=False, session=session
                    )
                except BulkWriteError as error:
                    write_errors = error.details.get("writeErrors", [])
                    if write_errors and _is_write_rejection(error):
                        raise _WriteRejected(view, view_writes[write_errors[0]["index"]][0], error) from error
                    raise

        try:
            await run_transaction(self._db, write)
        except OperationFailure as error:
            if error.code in _TOO_LARGE_CODES:
                raise ChunkTooLarge(str(error)) from error
            raise


def _drop_superseded_progress(events: Sequence[RecordedEvent]) -> list[RecordedEvent]:
    """Return the events without the progress reports that are followed by another one as the job's next event.

    Most events of a long job are progress reports, and each replaces the previous one completely (`jobs.fold`).
    """
    remaining: list[RecordedEvent] = []
    next_types: dict[str, str] = {}
    for event in reversed(events):
        stream, event_type = event.stream, event.type
        if event_type != JobProgressed.__name__ or next_types.get(stream) != event_type:
            remaining.append(event)
        next_types[stream] = event_type
    remaining.reverse()
    return remaining


class _WriteRejected(Exception):
    """The server rejected one document. Nothing of its chunk was written."""

    def __init__(self, view: str, key: str, error: BulkWriteError) -> None:
        super().__init__(str(error))
        self.view = view
        self.key = key
        self.error = error


def _is_write_rejection(error: Exception) -> bool:
    """Return whether an error means that a document of the chunk cannot be stored, however often it is tried."""
    if isinstance(error, _WriteRejected):
        return True
    if not isinstance(error, PyMongoError):
        return True  # the driver cannot encode the document as BSON
    if error.has_error_label("TransientTransactionError") or not is_transient(error):
        return False
    if isinstance(error, BulkWriteError):
        write_errors = error.details.get("writeErrors", [])
        return bool(write_errors) and write_errors[0].get("code") not in _SERVER_ERROR_CODES
    return False


def _get_server_message(error: BulkWriteError) -> str:
    """Return the server's message without the parts that differ between tries."""
    return str(error.details["writeErrors"][0].get("errmsg", "no reason given"))
