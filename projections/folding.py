"""projections: the fold. Events go in; what has to be written to which view comes out, and is written, exactly once.

A chunk's view writes and the checkpoint are one transaction, and the checkpoint's filter names where it began and who
may write (the fence): whoever has been replaced finds no such checkpoint, and what he wrote is undone.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from pymongo import DeleteOne, InsertOne, ReplaceOne, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession

from ledger.events import BatchDeleted, BatchPaused, BatchResumed, DeliveryQueued, JobProgressed, Recorded
from ledger.leadership import Deposed
from ledger.mongo import Database, Document, driver_errors
from ledger.transactions import transaction
from projections import batches, deliveries, files, jobs, queue, receivers, statistics, steps
from projections.views import Views

VERSION: Final = 9
"""Of all folds together. Whoever changes what a fold makes raises it; views of another version are made anew."""
CACHED_DOCUMENTS: Final = 20_000
_EVENTS_A_TURN: Final = 4  # the database waits for us at each turn of the loop: measured, 50 are a fifth slower
ALL: Final = (jobs, batches, queue, files, statistics, steps, deliveries, receivers)
"""The views."""
FOLDED: Final = (jobs.NAME, batches.NAME, statistics.NAME, deliveries.NAME, receivers.NAME)
"""The views with documents that are folded on; all others follow from these."""
_SWITCHES: Final = frozenset({BatchPaused.__name__, BatchResumed.__name__, BatchDeleted.__name__})
"""What may change whether a batch's waiting jobs are in the queue."""
Write = InsertOne[Document] | ReplaceOne[Document] | UpdateOne | DeleteOne


@dataclass(slots=True)
class Chunk:
    """Events being folded: the documents as they were loaded and as they are now, and what the counters gain. Pure.

    `position` is that of the last event that was taken in; `waiting` are the jobs that waited when it began, of the
    batches that it pauses or resumes.
    """

    loaded: dict[str, dict[str, Document]]
    waiting: Sequence[Document] = ()
    now: dict[str, dict[str, Document | None]] = field(default_factory=lambda: {view: {} for view in FOLDED})
    counted: Counter[tuple[str, str]] = field(default_factory=Counter)
    position: int = 0

    def fold(self, event: Recorded) -> None:
        """Take in one event."""
        self.position = event.position
        self.counted[statistics.EVENTS, event.type] += 1
        kind = event.stream.partition("-")[0]
        if kind == "job":
            self._fold_job(event)
        elif kind == "batch":
            before = self.get("batches", event.stream)
            self._set_batch(event.stream, before, batches.fold(before, event))
        elif kind == "delivery":
            self._fold_delivery(event)

    def get(self, view: str, key: str) -> Document | None:
        """Return a document as it is now."""
        return self.now[view][key] if key in self.now[view] else self.loaded[view].get(key)

    def _fold_job(self, event: Recorded) -> None:
        before = self.get("jobs", event.stream)
        after = jobs.fold(before, event)
        if after is before:
            return
        self.now["jobs"][event.stream] = after
        if before and after and before["status"] == after["status"] == "processing":
            return  # progress and log lines: nothing but the job's own document changes
        _add(self.counted, statistics.of_job(before), statistics.of_job(after))
        if after is not None and statistics.ended(before, after):
            self.counted.update(statistics.of_end(after))
            recent = self.get(statistics.NAME, statistics.RECENT)
            self.now[statistics.NAME][statistics.RECENT] = statistics.recent_after(recent, after)
        batch_id = (after or before or {}).get("batch_id")
        batch = self.get("batches", batch_id) if batch_id else None
        if batch is not None:
            self._set_batch(batch["batch_id"], batch, batches.fold_job(batch, before, after, event))

    def _fold_delivery(self, event: Recorded) -> None:
        before = self.get(deliveries.NAME, event.stream)
        after = deliveries.fold(before, event)
        if before is None:  # its number is how many its receiver has had before, in the order of the log
            receiver = receivers.with_one_more(self.get(receivers.NAME, after["receiver"]), after)
            self.now[receivers.NAME][receiver["_id"]] = receiver
            after["sequence"] = receiver["deliveries"]
        self.now[deliveries.NAME][event.stream] = after
        _add(self.counted, statistics.of_delivery(before), statistics.of_delivery(after))

    def _set_batch(self, batch_id: str, before: Document | None, after: Document | None) -> None:
        self.now["batches"][batch_id] = after
        _add(self.counted, statistics.of_batch(before), statistics.of_batch(after))

    def rows(self) -> dict[str, dict[str, Document | None]]:
        """Return the rows that are new or different now, and None for those that are gone, by view."""
        queued: dict[str, Document | None] = {}
        served: dict[str, Document | None] = {}
        shared: dict[str, Document | None] = {}
        batch_then, batch_now = self.loaded["batches"].get, partial(self.get, "batches")
        for job_id, after in self.now["jobs"].items():
            before = self.loaded["jobs"].get(job_id)
            _change(queued, _queued(before, batch_then), _queued(after, batch_now))
            _change(served, files.rows(before) if before else [], files.rows(after) if after else [])
            _change(shared, steps.rows(before) if before else [], steps.rows(after) if after else [])
        for job in self.waiting:  # unchanged themselves, and not loaded whole
            if job["_id"] not in self.now["jobs"]:
                _change(queued, _queued(job, batch_then), _queued(job, batch_now))
        return {queue.NAME: queued, files.NAME: served, steps.NAME: shared}

    def _were_queued(self) -> set[str]:
        """Return the jobs here that had a row in the queue before: its rows are those of one job each."""
        batch_then = self.loaded["batches"].get
        jobs_then = (*self.loaded["jobs"].values(), *self.waiting)
        return {job["_id"] for job in jobs_then if _queued(job, batch_then)}

    def writes(self) -> dict[str, list[Write]]:
        """Return what has to be written to which view."""
        writes: dict[str, list[Write]] = {}
        for view, documents in self.now.items():
            writes[view] = [
                write
                for key, document in documents.items()
                if (write := _write(key, self.loaded[view].get(key), document)) is not None
            ]
        were_queued = self._were_queued()
        for view, rows in self.rows().items():
            # Whatever is known not to be there is inserted: an upsert looks for it first, and passes over all the keys
            # beside it that were deleted within the last minutes. Ten thousand rows took it 17 s, and inserts 0.2.
            writes[view] = [
                DeleteOne({"_id": key})
                if row is None
                else InsertOne(row)
                if view == queue.NAME and key not in were_queued
                else ReplaceOne({"_id": key}, row, upsert=True)
                for key, row in rows.items()
            ]
        increments: dict[str, dict[str, int]] = {}
        # Zeros, too: which fields a counter has must not depend on where chunks end.
        for (counter, name), amount in self.counted.items():
            increments.setdefault(counter, {})[name] = amount
        for key, by in increments.items():
            writes[statistics.NAME].append(UpdateOne({"_id": key}, {"$inc": by}, upsert=True))
        return {view: changes for view, changes in writes.items() if changes}


def _add(counted: Counter[tuple[str, str]], before: statistics.Contribution, after: statistics.Contribution) -> None:
    if before != after:
        for key in after:
            counted[key] += 1
        for key in before:
            counted[key] -= 1


def _queued(job: Document | None, batch_of: Callable[[str], Document | None]) -> list[Document]:
    return queue.rows(job, batch_of(job["batch_id"])) if job else []


def _change(rows: dict[str, Document | None], before: Sequence[Document], after: Sequence[Document]) -> None:
    """Note what has to be written so that a job's rows before become those after."""
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
    changed = {name: value for name, value in new.items() if value is not old.get(name)}
    return UpdateOne({"_id": key}, {"$set": changed}) if changed else None


def _worth_folding(events: Sequence[Recorded]) -> list[Recorded]:
    """Return the events without a job's progress that its next event here, progress again, replaces as a whole.

    Most events of a long job are such, and what each of them says is overwritten by the next (`jobs.fold`).
    """
    worth: list[Recorded] = []
    next_of: dict[str, str] = {}
    for event in reversed(events):
        stream, kind = event.stream, event.type
        if kind != JobProgressed.__name__ or next_of.get(stream) != kind:
            worth.append(event)
        next_of[stream] = kind
    worth.reverse()
    return worth


class Folder:
    """Folds chunks of events into one set of views. Right as long as nobody else writes them, which the fence sees to.

    `checkpoint` is the document that says how far these views have got, and `fence` what it must hold, or somebody else
    has taken over.
    """

    def __init__(self, db: Database, views: Views, *, checkpoint: str, fence: Mapping[str, Any], position: int) -> None:
        self._db = db
        self.views = views
        self._checkpoint = checkpoint
        self._fence = fence
        self._cache: OrderedDict[tuple[str, str], Document] = OrderedDict()
        self._unwritten: Chunk | None = None
        self._written = asyncio.Event()
        self.position = position
        """The last position that these views contain."""

    async def fold(
        self, events: Sequence[Recorded], *, first: Callable[[AsyncClientSession], Awaitable[None]] | None = None
    ) -> list[Document]:
        """Fold the next events into the views; return the batches that were changed.

        `first` is called at the beginning of the transaction, whenever it begins.

        Raises:
            Deposed: somebody else has taken over; nothing was written.
            LedgerUnavailable: the database failed.
        """
        chunk = await self.prepare(events)
        await self.write(chunk, first=first)
        return [batch for batch in chunk.now["batches"].values() if batch is not None]

    async def prepare(self, events: Sequence[Recorded]) -> Chunk:
        """Fold the next events in memory, for `write`. The chunk before need not have been written yet."""
        with driver_errors("loading what events are folded into"):
            if self._unwritten is not None and any(event.type in _SWITCHES for event in events):
                await self._written.wait()  # whose jobs wait, the database has to know
            chunk = await self._load(events)
        told = _worth_folding(events)
        if len(told) < len(events):
            chunk.counted[statistics.EVENTS, JobProgressed.__name__] += len(events) - len(told)
        for number, event in enumerate(told, 1):
            chunk.fold(event)
            if number % _EVENTS_A_TURN == 0 and self._unwritten is not None:
                await asyncio.sleep(0)  # the chunk before is on its way to the database meanwhile
        self._remember(chunk)
        return chunk

    async def write(
        self, chunk: Chunk, *, first: Callable[[AsyncClientSession], Awaitable[None]] | None = None
    ) -> None:
        """Write a prepared chunk; they have to be written one after the other, in their order.

        Raises:
            Deposed, LedgerUnavailable: as `fold`. Then this folder is good for nothing any more.
        """
        self._unwritten = chunk
        self._written.clear()
        writes = chunk.writes()
        mine = {"_id": self._checkpoint, "position": self.position, **self._fence}
        moved = {"$set": {"position": chunk.position}}

        async def write(session: AsyncClientSession) -> None:
            if first is not None:
                await first(session)
            if not (await self._db.checkpoints.update_one(mine, moved, session=session)).matched_count:
                raise Deposed
            for view, changes in writes.items():
                await self.views[view].bulk_write(changes, ordered=False, session=session)

        with driver_errors("folding events into the views"):
            await transaction(self._db, write)
        self.position = chunk.position
        self._unwritten = None
        self._written.set()

    async def _load(self, events: Sequence[Recorded]) -> Chunk:
        """Return an empty chunk, with everything that folding the events may concern."""
        firsts = [event for event in events if event.version == 1]
        begun = {event.stream for event in firsts}  # of these there is nothing yet
        streams = {event.stream for event in events} - begun
        loaded = {"jobs": await self._documents("jobs", {name for name in streams if name.startswith("job-")})}
        in_batches = {job["batch_id"] for job in loaded["jobs"].values()}
        in_batches |= {getattr(event.event, "batch_id", None) for event in firsts if event.stream.startswith("job-")}
        in_batches |= {name for name in streams if name.startswith("batch-")}
        loaded["batches"] = await self._documents("batches", in_batches - begun - {None})
        told = {name for name in streams if name.startswith("delivery-")}
        loaded[deliveries.NAME] = await self._documents(deliveries.NAME, told)
        queued = [event.event for event in events if event.type == DeliveryQueued.__name__]
        called = {receivers.key(event) for event in queued if isinstance(event, DeliveryQueued)}
        loaded[receivers.NAME] = await self._documents(receivers.NAME, called)
        loaded[statistics.NAME] = await self._documents(statistics.NAME, {statistics.RECENT})
        switched = {event.stream for event in events if event.type in _SWITCHES} & loaded["batches"].keys()
        concerned = [job_id for batch_id in sorted(switched) for job_id in loaded["batches"][batch_id]["job_ids"]]
        return Chunk(loaded, await jobs.waiting_among(self.views, concerned) if concerned else ())

    async def _documents(self, view: str, keys: set[str]) -> dict[str, Document]:
        """Return documents from what is being written, the cache, or the database."""
        coming = self._unwritten.now[view] if self._unwritten is not None else {}
        found = {key: document for key in keys if (document := self._cache.get((view, key))) is not None}
        if missing := keys - found.keys() - coming.keys():  # of what is deleted now, the database does not know yet
            async for document in self.views[view].find({"_id": {"$in": sorted(missing)}}):
                found[document["_id"]] = document
        return found

    def _remember(self, chunk: Chunk) -> None:
        for view, documents in chunk.now.items():
            for key, document in documents.items():
                self._cache.pop((view, key), None)
                if document is not None:
                    self._cache[view, key] = document
        while len(self._cache) > CACHED_DOCUMENTS:
            self._cache.popitem(last=False)
