"""projections: the fold. Events go in; what has to be written to which view comes out, and is written, exactly once.

A chunk's view writes and the checkpoint are one transaction, and the checkpoint's filter names where it began and who
may write (the fence): whoever has been replaced finds no such checkpoint, and what he wrote is undone.

A stream that cannot be folded, or whose document cannot be stored, is isolated
(projections/views/projection_errors.py): all
others go
on. A chunk that is too much for one transaction is written in parts.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import bson
import structlog
from bson.errors import BSONError
from pymongo import DeleteOne, InsertOne, ReplaceOne, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import BulkWriteError, OperationFailure, PyMongoError

from jobledger.ledger.domain.errors import LedgerUnavailable, UnreadableEvent, UnsupportedEvent
from jobledger.ledger.domain.events import (
    EVENT_TYPES,
    BatchDeleted,
    BatchPaused,
    BatchResumed,
    BatchSubmitted,
    DeliveryQueued,
    Event,
    JobProgressed,
    JobSubmitted,
    RecordedEvent,
)
from jobledger.ledger.mongo.connection import LENIENT_CODEC, Database, Document, is_transient, translate_errors
from jobledger.ledger.mongo.leader_election import LeadershipLost
from jobledger.ledger.mongo.transactions import run_transaction
from jobledger.ledger.store.event_store import EventStore, ReadPosition
from jobledger.projections.engine.document_cache import DocumentCache, DocumentKey
from jobledger.projections.slots import Views
from jobledger.projections.views import (
    batches,
    deliveries,
    files,
    jobs,
    list_index,
    queue,
    statistics,
    step_files,
    steps,
)
from jobledger.projections.views import endpoints as receivers
from jobledger.projections.views import projection_errors as failures

_log = structlog.get_logger()
PROJECTION_VERSION: Final = 13
"""Of all folds together. Whoever changes what a fold makes raises it; views of another version are made anew."""
MAX_LOADED_BYTES: Final = 64 * 1024 * 1024
"""Of the documents of one view that are loaded for one chunk, as BSON."""
MAX_LIST_INDEX_BYTES: Final = 64 * 1024 * 1024
"""Of the list index that a chunk makes or changes, in memory."""
_SLOW_SECONDS: Final = 5.0
"""A chunk that takes longer is followed by smaller ones: the server ends a transaction after 10 to 60 seconds."""
_MAX_CHUNK_EVENTS: Final = 8192
_MAX_REJECTED_WRITES: Final = 1000
"""Writes that the server refuses in one chunk, before it is taken for trouble of the server."""
_EVENTS_PER_YIELD: Final = 4  # the database waits for us at each turn of the loop: measured, 50 are a fifth slower
ALL_VIEWS: Final = (jobs, batches, queue, files, statistics, steps, step_files, deliveries, receivers, failures)
"""The views."""
FOLDED_VIEWS: Final = (jobs.NAME, batches.NAME, statistics.NAME, deliveries.NAME, receivers.NAME)
"""The views with documents that are folded on; all others follow from these."""
_QUEUE_CHANGING_EVENTS: Final = frozenset({BatchPaused.__name__, BatchResumed.__name__, BatchDeleted.__name__})
"""What may change whether a batch's waiting jobs are in the queue."""
_FIRST_EVENTS: Final = frozenset({JobSubmitted.__name__, BatchSubmitted.__name__, DeliveryQueued.__name__})
"""What begins a stream, so that there is no document of it yet."""
Write = InsertOne[Document] | ReplaceOne[Document] | UpdateOne | DeleteOne


_REDUCED: Final[Mapping[str, Callable[[Document, Document], Document]]] = {
    jobs.NAME: jobs.reduce_to_storable,
    batches.NAME: batches.reduce_to_storable,
    deliveries.NAME: deliveries.reduce_to_storable,
}
"""How a document that cannot be stored whole is stored. Of other views it is left out."""
_ROW_VIEWS: Final = (queue.NAME, files.NAME, steps.NAME, step_files.NAME)


@dataclass(slots=True)
class Chunk:
    """Events being folded: the documents as they were loaded and as they are now, and what the counters gain. Pure.

    `position` and `hash` are those of the last event that was taken in; `waiting` are the jobs that waited when it
    began, of the batches that it pauses or resumes. `refused` are documents that cannot be stored whole, and why. Of
    these, and of the rows of jobs, `left_out` are not stored at all. `unfoldable` are documents that could not even be
    isolated. `isolated` is what has to be said in the program's log.
    """

    loaded: dict[str, dict[str, Document]]
    pending_jobs: Sequence[Document] = ()
    current: dict[str, dict[str, Document | None]] = field(default_factory=lambda: {view: {} for view in FOLDED_VIEWS})
    counter_increments: Counter[tuple[str, str]] = field(default_factory=Counter)
    position: int = 0
    hash: bytes | None = None
    unstorable: dict[DocumentKey, Document] = field(default_factory=dict)
    skipped: set[DocumentKey] = field(default_factory=set)
    unfoldable: dict[DocumentKey, Document] = field(default_factory=dict)
    isolated: list[tuple[str, Document]] = field(default_factory=list)
    list_index_bytes: int = 0
    """Bytes of the list index that has to be written."""

    def apply(self, event: RecordedEvent) -> None:
        """Take in one event. A stream that cannot be folded is isolated.

        Raises:
            NewerEvent: a later version of this program has written the event.
        """
        self.position = event.position
        self.counter_increments[statistics.EVENTS, event.type if event.type in EVENT_TYPES else statistics.UNKNOWN] += 1
        kind = event.stream.partition("-")[0]
        fold = _FOLDS.get(kind)
        if fold is None:
            return
        try:
            fold(self, event)
        except (UnsupportedEvent, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not stop the other streams
            self._isolate(kind, event, error)

    def get(self, view: str, key: str) -> Document | None:
        """Return a document as it is now."""
        return self.current[view][key] if key in self.current[view] else self.loaded[view].get(key)

    def _isolate(self, kind: str, event: RecordedEvent, error: Exception) -> None:
        """Go on without an event that cannot be folded. A fold takes in all of an event or nothing of it."""
        problem = failures.event_problem(event, error)
        self.isolated.append((event.stream, problem))
        try:
            self._record_problem(kind, event, problem)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - whatever it is, it must not stop the other streams
            self.unfoldable[_VIEW_OF[kind], event.stream] = problem

    def _record_problem(self, kind: str, event: RecordedEvent, problem: Document) -> None:
        """Say in a stream's document what the problem is, or else in the view of failures alone."""
        if kind == "job":
            before = self.get(jobs.NAME, event.stream)
            self._set_job(before, jobs.isolate(before, event, problem), event)
        elif kind == "batch":
            known = self.get(batches.NAME, event.stream)
            self._set_batch(event.stream, known, batches.isolate(known, event, problem))
        elif (delivery := self.get(deliveries.NAME, event.stream)) is not None:
            self._set_delivery(delivery, deliveries.isolate(delivery, event, problem))
        else:
            self.unfoldable[deliveries.NAME, event.stream] = problem

    def _fold_job(self, event: RecordedEvent) -> None:
        before = self.get("jobs", event.stream)
        after = jobs.fold(before, event)
        if after is not before:
            self._add_list_index_bytes(before, after)
            self._set_job(before, after, event)

    def _set_job(self, before: Document | None, after: Document | None, event: RecordedEvent) -> None:
        """Take in what has become of a job. What may fail comes first: all of it is taken in, or nothing."""
        if before and after and before["status"] == after["status"] == "processing":
            self.current["jobs"][event.stream] = after
            return  # progress and log lines: nothing but the job's own document changes
        then, now = statistics.counters_for_job(before), statistics.counters_for_job(after)
        spent = recent = None
        if after is not None and statistics.has_just_finished(before, after):
            spent = statistics.counters_for_completion(after)
            recent = statistics.count_finished_job(self.get(statistics.NAME, statistics.FINISHED_BY_MINUTE), after)
        batch_id = (after or before or {}).get("batch_id")
        batch = self.get("batches", batch_id) if batch_id else None
        batch_after = batches.apply_job_change(batch, before, after, event) if batch is not None else None
        self.current["jobs"][event.stream] = after
        _add(self.counter_increments, then, now)
        if spent is not None:
            self.counter_increments.update(spent)
            self.current[statistics.NAME][statistics.FINISHED_BY_MINUTE] = recent
        if batch is not None:
            self._set_batch(batch["batch_id"], batch, batch_after)

    def _fold_batch(self, event: RecordedEvent) -> None:
        before = self.get("batches", event.stream)
        after = batches.fold(before, event)
        self._add_list_index_bytes(before, after)
        self._set_batch(event.stream, before, after)

    def _add_list_index_bytes(self, before: Document | None, after: Document | None) -> None:
        if after is not None and (before is None or after["list_keys"] is not before["list_keys"]):
            self.list_index_bytes += list_index.estimate_list_index_memory(after)

    def _fold_delivery(self, event: RecordedEvent) -> None:
        before = self.get(deliveries.NAME, event.stream)
        after = deliveries.fold(before, event)
        if before is None:  # its number is how many its receiver has had before, in the order of the log
            receiver = receivers.add_delivery(self.get(receivers.NAME, after["endpoint_id"]), after)
            self.current[receivers.NAME][receiver["_id"]] = receiver
            after["sequence"] = receiver["delivery_count"]
        self._set_delivery(before, after)

    def _set_delivery(self, before: Document | None, after: Document) -> None:
        self.current[deliveries.NAME][after["_id"]] = after
        _add(self.counter_increments, statistics.counters_for_delivery(before), statistics.counters_for_delivery(after))

    def _set_batch(self, batch_id: str, before: Document | None, after: Document | None) -> None:
        self.current["batches"][batch_id] = after
        _add(self.counter_increments, statistics.counters_for_batch(before), statistics.counters_for_batch(after))

    def changed_rows(self) -> dict[str, dict[str, Document | None]]:
        """Return the rows that are new or different now, and None for those that are gone, by view."""
        queued: dict[str, Document | None] = {}
        served: dict[str, Document | None] = {}
        shared: dict[str, Document | None] = {}
        named: dict[str, Document | None] = {}
        batch_then, batch_now = self.loaded["batches"].get, partial(self.get, "batches")
        for job_id, after in self.current["jobs"].items():
            before = self.loaded["jobs"].get(job_id)
            _change(queued, _queued(before, batch_then), _queued(after, batch_now))
            try:
                _change(served, files.rows(before) if before else [], files.rows(after) if after else [])
                _change(shared, steps.rows(before) if before else [], steps.rows(after) if after else [])
                _change(named, step_files.rows(before) if before else [], step_files.rows(after) if after else [])
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not stop the other jobs
                if (jobs.NAME, job_id) not in self.unstorable:
                    self.mark_unstorable(jobs.NAME, job_id, f"Its files and steps cannot be listed: {error!r}")
        for job in self.pending_jobs:  # unchanged themselves, and not loaded whole
            if job["_id"] not in self.current["jobs"]:
                _change(queued, _queued(job, batch_then), _queued(job, batch_now))
        return {queue.NAME: queued, files.NAME: served, steps.NAME: shared, step_files.NAME: named}

    def _were_queued(self) -> set[str]:
        """Return the jobs here that had a row in the queue before: its rows are those of one job each."""
        batch_then = self.loaded["batches"].get
        jobs_then = (*self.loaded["jobs"].values(), *self.pending_jobs)
        return {job["_id"] for job in jobs_then if _queued(job, batch_then)}

    def mark_unstorable(self, view: str, key: str, message: str) -> None:
        """Store a document only reduced, because it cannot be stored whole. A row of a job is left out instead.

        A document that cannot be stored reduced either is left out, too.
        """
        if view in _ROW_VIEWS:
            row = self.changed_rows()[view].get(key) or {}
            self.skipped.add((view, key))
            view, key = jobs.NAME, row.get("job_id", key)
        elif (view, key) in self.unstorable:
            self.skipped.add((view, key))
        if (view, key) not in self.unstorable:
            problem = failures.document_problem(self.current.get(view, {}).get(key) or {}, message)
            self.unstorable[view, key] = problem
            self.isolated.append((key, problem))

    def mark_unstorable_documents(self) -> None:
        """Find the documents and rows that the database cannot take, each for itself."""
        for view, documents in {**self.current, **self.changed_rows()}.items():
            for key, document in documents.items():
                if document is not None and (why := failures.unstorable_reason(document)) is not None:
                    self.mark_unstorable(view, key, why)

    def build_writes(
        self, *, replaced: Collection[DocumentKey] = (), upserts: bool = False
    ) -> dict[str, list[tuple[str, Write]]]:
        """Return what has to be written to which view, each with its key.

        Args:
            replaced: Documents that are not stored as they were loaded: they are written whole.
            upserts: Insert nothing, replace: for views that somebody else has written to.
        """
        rows = self.changed_rows()  # first: it may refuse a job
        writes: dict[str, list[tuple[str, Write]]] = {}
        as_usual = not (self.unstorable or replaced or upserts)
        for view, documents in self.current.items():
            loaded = self.loaded[view]
            writes[view] = [
                (key, write)
                for key, document in documents.items()
                if (
                    write := _write(key, loaded.get(key), document)
                    if as_usual
                    else self._build_full_write(view, key, document, replaced, upserts=upserts)
                )
                is not None
            ]
        were_queued = self._were_queued()
        for view, changed in rows.items():
            # Whatever is known not to be there is inserted: an upsert looks for it first, and passes over all the keys
            # beside it that were deleted within the last minutes. Ten thousand rows took it 17 s, and inserts 0.2.
            writes[view] = [
                (key, DeleteOne({"_id": key}))
                if row is None or (view, key) in self.skipped
                else (key, InsertOne(row))
                if view == queue.NAME and key not in were_queued and not upserts
                else (key, ReplaceOne({"_id": key}, row, upsert=True))
                for key, row in changed.items()
            ]
        increments: dict[str, dict[str, int]] = {}
        # Zeros, too: which fields a counter has must not depend on where chunks end.
        for (counter, name), amount in self.counter_increments.items():
            increments.setdefault(counter, {})[name] = amount
        for key, by in increments.items():
            writes[statistics.NAME].append((key, UpdateOne({"_id": key}, {"$inc": by}, upsert=True)))
        writes[failures.NAME] = self._projection_error_writes(replaced)
        return {view: changes for view, changes in writes.items() if changes}

    def _build_full_write(
        self, view: str, key: str, document: Document | None, replaced: Collection[DocumentKey], *, upserts: bool
    ) -> Write | None:
        problem = self.unstorable.get((view, key))
        if document is not None and problem is not None:
            reduce = _REDUCED.get(view)
            if reduce is None or (view, key) in self.skipped:
                return DeleteOne({"_id": key})
            return ReplaceOne({"_id": key}, reduce(document, problem), upsert=True)
        if (view, key) in replaced or (upserts and document is not None):
            return DeleteOne({"_id": key}) if document is None else ReplaceOne({"_id": key}, document, upsert=True)
        return _write(key, self.loaded[view].get(key), document)

    def _projection_error_writes(self, replaced: Collection[DocumentKey]) -> list[tuple[str, Write]]:
        """Return what changes in the view of what could not be projected: for nearly all chunks nothing."""
        found: list[tuple[str, Write]] = []
        for (view, key), problem in {**self.unfoldable, **self.unstorable}.items():
            row = failures.build_row(view, key, problem)
            found.append((row["_id"], ReplaceOne({"_id": row["_id"]}, row, upsert=True)))
        for view in _REDUCED:
            loaded = self.loaded[view]
            for key, document in self.current[view].items():
                if self.unstorable and (view, key) in self.unstorable:
                    continue
                before = loaded.get(key)
                problem_now = document.get(failures.ERROR_FIELD) if document is not None else None
                was = before.get(failures.ERROR_FIELD) if before is not None else None
                if problem_now is not None and problem_now is not was:
                    row = failures.build_row(view, key, problem_now)
                    found.append((row["_id"], ReplaceOne({"_id": row["_id"]}, row, upsert=True)))
                elif problem_now is None and (was is not None or (view, key) in replaced):
                    found.append((f"{view}/{key}", DeleteOne({"_id": f"{view}/{key}"})))
        return found


_VIEW_OF: Final = {"job": jobs.NAME, "batch": batches.NAME, "delivery": deliveries.NAME}
_FOLDS: Final[Mapping[str, Callable[[Chunk, RecordedEvent], None]]] = {
    "job": Chunk._fold_job,
    "batch": Chunk._fold_batch,
    "delivery": Chunk._fold_delivery,
}


def _add(counted: Counter[tuple[str, str]], before: statistics.CounterFields, after: statistics.CounterFields) -> None:
    if before != after:
        for key in after:
            counted[key] += 1
        for key in before:
            counted[key] -= 1


def _queued(job: Document | None, batch_of: Callable[[str], Document | None]) -> list[Document]:
    return queue.rows(job, batch_of(job["batch_id"])) if job else []


def _change(rows: dict[str, Document | None], before: Sequence[Document], after: Sequence[Document]) -> None:
    """Note what has to be written so that a job's rows before become those after."""
    if not before and not after:  # as nearly always: this is the hottest place of the projector
        return
    old = {row["_id"]: row for row in before}
    new = {row["_id"]: row for row in after}
    rows.update((key, None) for key in old if key not in new)
    rows.update((key, row) for key, row in new.items() if row != old.get(key))


def _write(key: str, old: Document | None, new: Document | None) -> Write | None:
    """Return the smallest write that makes the old document the new one. Folds copy on change, so `is` tells."""
    if new is None:
        return DeleteOne({"_id": key}) if old else None
    if old is None:
        return InsertOne(new)
    change: Document = {}
    if changed := {name: value for name, value in new.items() if value is not old.get(name)}:
        change["$set"] = changed
    if gone := old.keys() - new.keys():
        change["$unset"] = dict.fromkeys(sorted(gone), "")
    return UpdateOne({"_id": key}, change) if change else None


def _readable(event: RecordedEvent) -> Event | None:
    """Return what happened, None if the event is damaged.

    Raises:
        NewerEvent: a later version of this program has written it.
    """
    try:
        return event.event
    except UnsupportedEvent:
        raise
    except UnreadableEvent:
        return None


def _drop_superseded_progress(events: Sequence[RecordedEvent]) -> list[RecordedEvent]:
    """Return the events without a job's progress that its next event here, progress again, replaces as a whole.

    Most events of a long job are such, and what each of them says is overwritten by the next (`jobs.fold`).
    """
    worth: list[RecordedEvent] = []
    next_of: dict[str, str] = {}
    for event in reversed(events):
        stream, kind = event.stream, event.type
        if kind != JobProgressed.__name__ or next_of.get(stream) != kind:
            worth.append(event)
        next_of[stream] = kind
    worth.reverse()
    return worth


class ChunkTooLarge(Exception):
    """A chunk is too much for one transaction, or for memory; nothing of it was written."""


class _WriteRejected(Exception):
    """The server refuses one document; nothing of its chunk was written."""

    def __init__(self, view: str, key: str, error: BulkWriteError) -> None:
        super().__init__(str(error))
        self.view = view
        self.key = key
        self.error = error


_SERVER_ERROR_CODES: Final = frozenset({24, 46, 50, 112, 251, 262, 290, 14031})
"""Codes of errors that say nothing about a document: locks, time limits, write conflicts, a full disk."""


_TOO_LARGE_CODES: Final = frozenset({257, 388})
"""TransactionTooLarge, TransactionTooLargeForCache."""


def _is_write_rejection(error: Exception) -> bool:
    """Return whether an error says that something in a chunk cannot be stored, however often it is tried."""
    if isinstance(error, _WriteRejected):
        return True
    if not isinstance(error, PyMongoError):
        return True  # the driver cannot write it in BSON
    if error.has_error_label("TransientTransactionError") or not is_transient(error):
        return False
    if isinstance(error, BulkWriteError):
        found = error.details.get("writeErrors", [])
        return bool(found) and found[0].get("code") not in _SERVER_ERROR_CODES
    return False


def _server_message(error: BulkWriteError) -> str:
    """Return what the server says, without what differs from time to time."""
    return str(error.details["writeErrors"][0].get("errmsg", "it does not say why"))


class ProjectionWriter:
    """Folds chunks of events into one set of views. Right as long as nobody else writes them, which the fence sees to.

    `checkpoint` is the document that says how far these views have got, and `fence` what it must hold, or somebody else
    has taken over.
    """

    def __init__(
        self, db: Database, views: Views, *, checkpoint: str, fence: Mapping[str, Any], read: ReadPosition
    ) -> None:
        self._db = db
        self.views = views
        self._checkpoint = checkpoint
        self._fence = fence
        self._cache = DocumentCache()
        self._unwritten: Chunk | None = None
        self._written = asyncio.Event()
        self._reduced: set[DocumentKey] = set()
        """Documents that are stored reduced."""
        self._max_chunk_events = _MAX_CHUNK_EVENTS
        self.position, self._hash = read
        """The last position that these views contain."""

    @property
    def last_applied(self) -> ReadPosition:
        """The last event that these views contain."""
        return ReadPosition(self.position, self._hash)

    async def apply(
        self,
        events: Sequence[RecordedEvent],
        *,
        before_write: Callable[[AsyncClientSession], Awaitable[None]] | None = None,
    ) -> list[Document]:
        """Fold the next events into the views; return the batches that were changed.

        `first` is called at the beginning of the transaction that writes the last of them, whenever it begins. What is
        too much for one transaction is written in several, each with its checkpoint: so nothing is folded twice.

        Raises:
            Deposed: somebody else has taken over; nothing was written.
            LedgerUnavailable: the database failed.
            NewerEvent: a later version of this program has written one of the events.
        """
        changed: dict[str, Document] = {}
        begin = 0
        while begin < len(events):
            part = events[begin : begin + self._max_chunk_events]
            is_last = begin + len(part) == len(events)
            begun = time.monotonic()
            try:
                chunk = await self.prepare(part)
                await self.write(chunk, before_write=before_write if is_last else None)
            except ChunkTooLarge as error:
                self.discard_unwritten()
                if len(part) == 1:
                    raise LedgerUnavailable(f"The event at position {part[0].position} is not written: {error}") from (
                        error
                    )
                self._max_chunk_events = len(part) // 2
                continue
            begin += len(part)
            if time.monotonic() - begun > _SLOW_SECONDS:
                self._max_chunk_events = max(1, len(part) // 2)
            elif self._max_chunk_events < _MAX_CHUNK_EVENTS:
                self._max_chunk_events *= 2
            changed |= {batch["_id"]: batch for batch in chunk.current["batches"].values() if batch is not None}
        return list(changed.values())

    async def prepare(self, events: Sequence[RecordedEvent]) -> Chunk:
        """Fold the next events in memory, for `write`. The chunk before need not have been written yet.

        Raises:
            ChunkTooLarge: several events concern more than may be in memory at once.
        """
        with translate_errors("loading what events are folded into"):
            if self._unwritten is not None and any(event.type in _QUEUE_CHANGING_EVENTS for event in events):
                await self._written.wait()  # whose jobs wait, the database has to know
            chunk = await self._load_chunk(events)
        digest = events[-1].document.get("hash")  # bare events have none
        chunk.hash = digest if isinstance(digest, bytes) else None
        told = _drop_superseded_progress(events)
        if len(told) < len(events):
            chunk.counter_increments[statistics.EVENTS, JobProgressed.__name__] += len(events) - len(told)
        for number, event in enumerate(told, 1):
            chunk.apply(event)
            if chunk.list_index_bytes > MAX_LIST_INDEX_BYTES and number < len(told):
                raise ChunkTooLarge(f"its documents have {chunk.list_index_bytes} bytes of list index")
            if number % _EVENTS_PER_YIELD == 0 and self._unwritten is not None:
                await asyncio.sleep(0)  # the chunk before is on its way to the database meanwhile
        self._cache_documents(chunk)
        return chunk

    async def write(
        self, chunk: Chunk, *, before_write: Callable[[AsyncClientSession], Awaitable[None]] | None = None
    ) -> None:
        """Write a prepared chunk; they have to be written one after the other, in their order.

        Raises:
            Deposed, LedgerUnavailable: as `fold`. Then this folder is good for nothing any more.
        """
        self._unwritten = chunk
        self._written.clear()
        try:
            with translate_errors("folding events into the views"):
                await self._write_or_isolate(chunk, before_write)
        finally:
            self._written.set()  # also after a failure: `prepare` must not wait for ever
        for key, problem in chunk.isolated:
            _log.error("document isolated after projection failure", document=key, **problem)
        for view, documents in chunk.current.items():
            if self._reduced or chunk.unstorable:
                self._reduced -= {(view, key) for key in documents}
        self._reduced |= chunk.unstorable.keys()
        self.position, self._hash = chunk.position, chunk.hash
        self._unwritten = None

    async def _write_or_isolate(
        self, chunk: Chunk, first: Callable[[AsyncClientSession], Awaitable[None]] | None
    ) -> None:
        try:
            await self._write(chunk, first, chunk.build_writes(replaced=self._reduced))
        except (_WriteRejected, PyMongoError, BSONError, ValueError, OverflowError) as error:
            if not _is_write_rejection(error):
                raise
            _log.warning("chunk write failed, writing documents one by one", position=chunk.position, error=str(error))
            await self._write_without_unstorable(chunk, first)

    async def _write_without_unstorable(
        self, chunk: Chunk, first: Callable[[AsyncClientSession], Awaitable[None]] | None
    ) -> None:
        """Write a chunk of which something was refused: without what cannot be stored."""
        chunk.mark_unstorable_documents()
        for _ in range(_MAX_REJECTED_WRITES):
            writes = chunk.build_writes(replaced=self._reduced, upserts=True)
            try:
                return await self._write(chunk, first, writes)
            except _WriteRejected as refused:
                view, key = refused.view, refused.key
                if (view, key) in chunk.skipped or view in (failures.NAME, statistics.NAME):
                    raise refused.error from None
                chunk.mark_unstorable(view, key, f"The database refuses the document: {_server_message(refused.error)}")
        raise LedgerUnavailable(f"The database refuses more than {_MAX_REJECTED_WRITES} writes of one chunk")

    async def _write(
        self,
        chunk: Chunk,
        first: Callable[[AsyncClientSession], Awaitable[None]] | None,
        writes: Mapping[str, Sequence[tuple[str, Write]]],
    ) -> None:
        mine = {"_id": self._checkpoint, "position": self.position, **self._fence}
        moved = {"$set": {"position": chunk.position, "hash": chunk.hash}}
        tries, begun = 0, time.monotonic()

        async def write(session: AsyncClientSession) -> None:
            nonlocal tries
            tries += 1
            if tries > 1 and time.monotonic() - begun > 2 * _SLOW_SECONDS:
                raise ChunkTooLarge("it takes longer than the server lets a transaction take")
            if first is not None:
                await first(session)
            if not (await self._db.checkpoints.update_one(mine, moved, session=session)).matched_count:
                raise LeadershipLost
            for view, changes in writes.items():
                try:
                    await self.views[view].bulk_write([change for _, change in changes], ordered=False, session=session)
                except BulkWriteError as error:
                    found = error.details.get("writeErrors", [])
                    if found and _is_write_rejection(error):
                        raise _WriteRejected(view, changes[found[0]["index"]][0], error) from error
                    raise

        try:
            await run_transaction(self._db, write)
        except OperationFailure as error:
            if error.code in _TOO_LARGE_CODES:
                raise ChunkTooLarge(str(error)) from error
            raise

    def discard_unwritten(self) -> None:
        """Forget what was folded and not written."""
        self._cache.clear()
        self._unwritten = None
        self._written.set()

    async def _load_chunk(self, events: Sequence[RecordedEvent]) -> Chunk:
        """Return an empty chunk, with everything that folding the events may concern.

        Raises:
            ChunkTooLarge: several events concern more than may be in memory at once.
        """
        most = MAX_LOADED_BYTES if len(events) > 1 else None
        firsts = [event for event in events if event.version == 1 and event.type in _FIRST_EVENTS]
        begun = {event.stream for event in firsts}  # of these there is nothing yet
        streams = {event.stream for event in events} - begun
        loaded = {"jobs": await self._documents("jobs", {name for name in streams if name.startswith("job-")}, most)}
        in_batches = {job["batch_id"] for job in loaded["jobs"].values()}
        in_batches |= {
            getattr(_readable(event), "batch_id", None) for event in firsts if event.stream.startswith("job-")
        }
        in_batches |= {name for name in streams if name.startswith("batch-")}
        loaded["batches"] = await self._documents("batches", in_batches - begun - {None}, most)
        told = {name for name in streams if name.startswith("delivery-")}
        loaded[deliveries.NAME] = await self._documents(deliveries.NAME, told, most)
        queued = [_readable(event) for event in events if event.type == DeliveryQueued.__name__]
        called = {receivers.endpoint_id(event) for event in queued if isinstance(event, DeliveryQueued)}
        loaded[receivers.NAME] = await self._documents(receivers.NAME, called)
        loaded[statistics.NAME] = await self._documents(statistics.NAME, {statistics.FINISHED_BY_MINUTE})
        switched = {event.stream for event in events if event.type in _QUEUE_CHANGING_EVENTS} & loaded["batches"].keys()
        concerned = [job_id for batch_id in sorted(switched) for job_id in loaded["batches"][batch_id]["job_ids"]]
        return Chunk(loaded, await jobs.find_pending_jobs(self.views, concerned) if concerned else ())

    async def _documents(self, view: str, keys: set[str], most: int | None = None) -> dict[str, Document]:
        """Return documents from what is being written, the cache, or the database: from that, `most` bytes at most.

        Raises:
            ChunkTooLarge: there are more.
        """
        coming = self._unwritten.current[view] if self._unwritten is not None else {}
        found = {key: document for key in keys if (document := self._cache.get((view, key))) is not None}
        # Of what is written just now the database does not know yet. Large documents are not in the cache.
        found |= {key: document for key in coming.keys() & keys if (document := coming[key]) is not None}
        if missing := keys - found.keys() - coming.keys():
            async for document in self._read_documents(view, missing, most):
                if failures.REDUCED_FIELD in document:
                    self._reduced.add((view, document["_id"]))
                    if view == jobs.NAME:
                        document = await self._refold_job(document["_id"])
                found[document["_id"]] = document
        return found

    async def _read_documents(self, view: str, keys: Collection[str], most: int | None) -> AsyncIterator[Document]:
        collection, size = self.views[view], 0
        batches_of_bson: Any = collection.find_raw_batches({"_id": {"$in": sorted(keys)}})
        async for batch in batches_of_bson:
            size += len(batch)
            if most is not None and size > most:
                raise ChunkTooLarge(f"its documents in the view {view} take more than {most} bytes")
            for document in bson.decode_all(batch, LENIENT_CODEC):
                yield document

    async def _refold_job(self, job_id: str) -> Document:
        """Fold a job that is stored reduced from its events, as far as these views have got."""
        upto = self._unwritten.position if self._unwritten is not None else self.position
        chunk = Chunk({view: {} for view in FOLDED_VIEWS})
        for event in await EventStore(self._db).read_stream(job_id):
            if event.position <= upto:
                chunk.apply(event)
        job = chunk.get(jobs.NAME, job_id)
        assert job is not None  # noqa: S101 - it is in the view, so it is not deleted
        return job

    def _cache_documents(self, chunk: Chunk) -> None:
        for view, documents in chunk.current.items():
            for key, document in documents.items():
                self._cache.put(
                    (view, key), document if document is not None and "large_fields" not in document else None
                )
        self._cache.evict()
