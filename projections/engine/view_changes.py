"""Apply a chunk of events in memory, and plan the writes to the views. This module does no I/O.

If an event cannot be applied, or a document cannot be stored, only its stream is isolated
(projections/views/projection_errors.py).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

from pymongo import DeleteOne, InsertOne, ReplaceOne, UpdateOne

from jobledger.ledger.domain.errors import UnsupportedEvent
from jobledger.ledger.domain.events import EVENT_TYPES, RecordedEvent
from jobledger.ledger.mongo.connection import Document
from jobledger.projections.engine.document_cache import DocumentKey
from jobledger.projections.engine.view_registry import DOCUMENT_VIEWS, ROW_VIEWS
from jobledger.projections.views import (
    batches,
    deliveries,
    endpoints,
    files,
    job_list,
    jobs,
    list_index,
    projection_errors,
    queue,
    statistics,
    step_files,
    steps,
)

Write = InsertOne[Document] | ReplaceOne[Document] | UpdateOne | DeleteOne


class _StreamView(Protocol):
    """A view module with one document for each stream."""

    @property
    def NAME(self) -> str: ...

    def fold(self, document: Document | None, event: RecordedEvent, /) -> Document | None:
        """Apply the next event of a stream."""

    def build_placeholder(self, event: RecordedEvent, /) -> Document | None:
        """Return a document for a stream whose first event cannot be applied. None: it can have no document."""

    def apply_to_isolated(self, document: Document, event: RecordedEvent, /) -> Document | None:
        """Apply an event to an isolated document. Only what is always readable is used, such as the type."""

    def reduce_to_storable(self, document: Document, /) -> Document:
        """Return a document that can be stored, without the fields that may be large."""


_STREAM_VIEWS: Final[Mapping[str, _StreamView]] = {"job": jobs, "batch": batches, "delivery": deliveries}
"""Views by stream type. A stream's ID begins with its type."""
_REDUCIBLE_VIEWS: Final = {view.NAME: view for view in _STREAM_VIEWS.values()}
"""Views by name whose documents can be stored reduced. A document of another view is skipped instead."""


class ChunkTooLarge(Exception):
    """A chunk exceeds the limits of a transaction or of memory. Nothing of it was written."""


@dataclass(slots=True)
class ViewChanges:
    """The changes that a chunk of events makes to the views: applies the events and builds the writes.

    A chunk is a sequence of consecutive events.

    Attributes:
        loaded: Documents as they were before the chunk, by view and key.
        pending_jobs: The pending jobs, before the chunk, of the batches that it pauses, resumes or deletes.
        current: Documents that the chunk changed, by view and key. None: deleted.
        counter_increments: Increments by counter document and field.
        position, hash: Position and hash of the last applied event.
        unstorable: The projection errors of documents that cannot be stored completely. They are stored reduced.
        skipped: Rows, and documents of `unstorable`, that are not stored at all.
        errors_without_document: The projection errors of streams that have no document to show them.
        new_errors: Keys and projection errors to log after the chunk was written.
        list_rows: New rows of `job_list` by job. The other rows change only in their status, or not at all.
        list_index_bytes: Estimated memory of the list index that the chunk writes.
    """

    loaded: dict[str, dict[str, Document]] = field(default_factory=lambda: {view: {} for view in DOCUMENT_VIEWS})
    pending_jobs: Sequence[Document] = ()
    current: dict[str, dict[str, Document | None]] = field(
        default_factory=lambda: {view: {} for view in DOCUMENT_VIEWS}
    )
    counter_increments: Counter[tuple[str, str]] = field(default_factory=Counter)
    position: int = 0
    hash: bytes | None = None
    unstorable: dict[DocumentKey, Document] = field(default_factory=dict)
    skipped: set[DocumentKey] = field(default_factory=set)
    errors_without_document: dict[DocumentKey, Document] = field(default_factory=dict)
    new_errors: list[tuple[str, Document]] = field(default_factory=list)
    list_rows: dict[str, Document] = field(default_factory=dict)
    list_index_bytes: int = 0

    # Applying events ------------------------------------------------------------------------------------------------

    def apply(self, event: RecordedEvent) -> None:
        """Apply one event. A stream whose event cannot be applied is isolated.

        Raises:
            UnsupportedEvent: A later version of the program wrote the event.
        """
        self.position = event.position
        self.counter_increments[statistics.EVENTS, event.type if event.type in EVENT_TYPES else statistics.UNKNOWN] += 1
        view = _STREAM_VIEWS.get(event.stream.partition("-")[0])
        if view is None:
            return
        before = self.get(view.NAME, event.stream)
        try:
            if before is not None and projection_errors.has_unapplied_event(before):
                after = view.apply_to_isolated(before, event)
            else:
                after = view.fold(before, event)
            self._set_document(view.NAME, before, after, event)
        except (UnsupportedEvent, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not stop the other streams
            self._isolate(view, before, event, projection_errors.build_event_error(event, error))

    def _isolate(
        self, view: _StreamView, before: Document | None, event: RecordedEvent, projection_error: Document
    ) -> None:
        """Apply only the type of an event that cannot be applied, and keep the projection error."""
        self.new_errors.append((event.stream, projection_error))
        try:
            document = before or view.build_placeholder(event)
            if document is None:
                self.errors_without_document[view.NAME, event.stream] = projection_error
                return
            isolated = {**document, projection_errors.ERROR_FIELD: projection_error}
            self._set_document(view.NAME, before, view.apply_to_isolated(isolated, event), event)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - whatever it is, it must not stop the other streams
            self.errors_without_document[view.NAME, event.stream] = projection_error

    def get(self, view: str, key: str) -> Document | None:
        """Return a document as it is after the applied events, or None."""
        return self.current[view][key] if key in self.current[view] else self.loaded[view].get(key)

    def _set_document(self, view: str, before: Document | None, after: Document | None, event: RecordedEvent) -> None:
        if after is before:
            return  # there was no document, and there is none
        if (
            after is not None
            and "list_keys" in after
            and (before is None or after["list_keys"] is not before["list_keys"])
        ):
            self.list_index_bytes += list_index.estimate_list_index_memory(after)
        if view == jobs.NAME:
            row = self._build_list_row(event.stream, before, after)
            self._set_job(before, after, event)
            if row is not None:
                self.list_rows[event.stream] = row
        elif view == batches.NAME:
            self._set_batch(event.stream, before, after)
        elif after is not None:
            self._set_delivery(before, after)

    def _build_list_row(self, job_id: str, before: Document | None, after: Document | None) -> Document | None:
        """Return the new row of a job in `job_list`. None: only its status changes, or nothing."""
        if after is None:
            return None
        if job_list.needs_new_row(before, after):
            row = job_list.build_row(after)
            self.list_index_bytes += sum(map(list_index.estimate_list_index_memory, (after, row)))
            return row
        is_outdated = job_id in self.list_rows and before is not None and job_list.has_new_status(before, after)
        return job_list.build_row(after) if is_outdated else None

    def _set_job(self, before: Document | None, after: Document | None, event: RecordedEvent) -> None:
        """Set a job's document and update its batch and the counters.

        All steps that may fail come first, so the event is applied completely or not at all.
        """
        if before and after and before["status"] == after["status"] == "processing":
            self.current["jobs"][event.stream] = after
            return  # progress and log entries change only the job's own document
        counters_before, counters_after = statistics.get_job_counters(before), statistics.get_job_counters(after)
        completion = finished_by_minute = None
        if after is not None and statistics.has_just_finished(before, after):
            completion = statistics.build_completion_increments(after)
            minutes = self.get(statistics.NAME, statistics.FINISHED_BY_MINUTE)
            finished_by_minute = statistics.count_finished_job(minutes, after)
        batch_id = (after or before or {}).get("batch_id")
        batch = self.get("batches", batch_id) if batch_id else None
        batch_after = batches.apply_job_change(batch, before, after, event) if batch is not None else None
        self.current["jobs"][event.stream] = after
        self._add_difference(counters_before, counters_after)
        if completion is not None:
            for key, amount in completion.items():
                self.counter_increments[key] += amount
            self.current[statistics.NAME][statistics.FINISHED_BY_MINUTE] = finished_by_minute
        if batch is not None:
            self._set_batch(batch["batch_id"], batch, batch_after)

    def _set_batch(self, batch_id: str, before: Document | None, after: Document | None) -> None:
        self.current["batches"][batch_id] = after
        self._add_difference(statistics.get_batch_counters(before), statistics.get_batch_counters(after))

    def _set_delivery(self, before: Document | None, after: Document) -> None:
        if before is None:
            endpoint = endpoints.add_delivery(self.get(endpoints.NAME, after["endpoint_id"]), after)
            self.current[endpoints.NAME][endpoint["_id"]] = endpoint
            after["sequence"] = endpoint["delivery_count"]
        self.current[deliveries.NAME][after["_id"]] = after
        self._add_difference(statistics.get_delivery_counters(before), statistics.get_delivery_counters(after))

    def _add_difference(self, before: statistics.CounterFields, after: statistics.CounterFields) -> None:
        if before != after:
            for key in after:
                self.counter_increments[key] += 1
            for key in before:
                self.counter_increments[key] -= 1

    # Documents that cannot be stored --------------------------------------------------------------------------------

    def mark_unstorable(self, view: str, key: str, message: str) -> None:
        """Store a document reduced, or skip it if it already is. A row is skipped, and its job is stored reduced."""
        if view in ROW_VIEWS:
            row = self.build_changed_rows().get(view, {}).get(key) or {}
            self.skipped.add((view, key))
            view, key = jobs.NAME, row.get("job_id", key)
        elif (view, key) in self.unstorable:
            self.skipped.add((view, key))
        if (view, key) not in self.unstorable:
            projection_error = projection_errors.build_document_error(
                self.current.get(view, {}).get(key) or {}, message
            )
            self.unstorable[view, key] = projection_error
            self.new_errors.append((key, projection_error))

    def mark_unstorable_documents(self) -> None:
        """Mark all documents and rows that the database cannot store."""
        for view, documents in {**self.current, **self.build_changed_rows()}.items():
            for key, document in documents.items():
                if document is not None and (reason := projection_errors.find_unstorable_reason(document)) is not None:
                    self.mark_unstorable(view, key, reason)

    # Planning writes ------------------------------------------------------------------------------------------------

    def build_changed_rows(self) -> dict[str, dict[str, Document | None]]:
        """Return the new and changed rows by view and key, except those of `job_list`. None: the row is deleted."""
        rows: dict[str, dict[str, Document | None]] = {view: {} for view in ROW_VIEWS if view != job_list.NAME}
        batch_before, batch_now = self.loaded["batches"].get, partial(self.get, "batches")
        for job_id, after in self.current["jobs"].items():
            before = self.loaded["jobs"].get(job_id)
            _add_changed_rows(
                rows[queue.NAME], _build_queue_rows(before, batch_before), _build_queue_rows(after, batch_now)
            )
            try:
                for view in (files, steps, step_files):
                    _add_changed_rows(
                        rows[view.NAME],
                        view.build_rows(before) if before else [],
                        view.build_rows(after) if after else [],
                    )
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not stop the other jobs
                if (jobs.NAME, job_id) not in self.unstorable:
                    message = f"The rows of its files and steps cannot be built: {error!r}"
                    self.mark_unstorable(jobs.NAME, job_id, message)
        for job in self.pending_jobs:  # these jobs did not change and are not loaded completely
            if job["_id"] not in self.current["jobs"]:
                _add_changed_rows(
                    rows[queue.NAME], _build_queue_rows(job, batch_before), _build_queue_rows(job, batch_now)
                )
        return rows

    def build_writes(
        self, *, replaced: Collection[DocumentKey] = (), upserts: bool = False
    ) -> dict[str, list[tuple[str, Write]]]:
        """Return the writes to each view, with the key of each write.

        Args:
            replaced: Documents that are stored in another form than they were loaded. They are written completely.
            upserts: Replace documents instead of inserting them, for views to which another writer has written.
        """
        rows = self.build_changed_rows()  # first, because it may mark a job as unstorable
        writes: defaultdict[str, list[tuple[str, Write]]] = defaultdict(list)
        for view, documents in self.current.items():
            for key, document in documents.items():
                if (write := self._build_write(view, key, document, replaced, upserts=upserts)) is not None:
                    writes[view].append((key, write))
        jobs_before = (*self.loaded["jobs"].values(), *self.pending_jobs)
        queued_before = {job["_id"] for job in jobs_before if _build_queue_rows(job, self.loaded["batches"].get)}
        for view, changed in rows.items():
            # A row that does not exist yet is inserted. An upsert would first search for it, and pass all neighboring
            # keys that were deleted in the last minutes. For ten thousand rows, upserts took 17 s and inserts 0.2 s.
            writes[view] = [
                (key, DeleteOne({"_id": key}))
                if row is None or (view, key) in self.skipped
                else (key, InsertOne(row))
                if view == queue.NAME and key not in queued_before and not upserts
                else (key, _build_upsert(key, row))
                for key, row in changed.items()
            ]
        for key, job in self.current[jobs.NAME].items():
            if (write := self._build_list_write(key, job, replaced, upserts=upserts)) is not None:
                writes[job_list.NAME].append((key, write))
        increments: dict[str, dict[str, int]] = {}
        # Zeros are written as well: the fields of a counter must not depend on where chunks end.
        for (counter, name), amount in self.counter_increments.items():
            increments.setdefault(counter, {})[name] = amount
        for key, by in increments.items():
            writes[statistics.NAME].append((key, UpdateOne({"_id": key}, {"$inc": by}, upsert=True)))
        writes[projection_errors.NAME] = self._build_projection_error_writes(replaced)
        return {view: changes for view, changes in writes.items() if changes}

    def _build_write(
        self, view: str, key: str, document: Document | None, replaced: Collection[DocumentKey], *, upserts: bool
    ) -> Write | None:
        projection_error = self.unstorable.get((view, key))
        if document is not None and projection_error is not None:
            if view not in _REDUCIBLE_VIEWS or (view, key) in self.skipped:
                return DeleteOne({"_id": key})
            reduced = _REDUCIBLE_VIEWS[view].reduce_to_storable(document)
            error_fields = {projection_errors.REDUCED_FIELD: True, projection_errors.ERROR_FIELD: projection_error}
            return _build_upsert(key, {**reduced, **error_fields})
        if (view, key) in replaced or (upserts and document is not None):
            return DeleteOne({"_id": key}) if document is None else _build_upsert(key, document)
        return _build_minimal_write(key, self.loaded[view].get(key), document)

    def _build_list_write(
        self, job_id: str, job: Document | None, replaced: Collection[DocumentKey], *, upserts: bool
    ) -> Write | None:
        """Return the write of a job's row in `job_list`."""
        before = self.loaded[jobs.NAME].get(job_id)
        if job is None or not self.skipped.isdisjoint(((job_list.NAME, job_id), (jobs.NAME, job_id))):
            return DeleteOne({"_id": job_id}) if before is not None or upserts else None
        if (jobs.NAME, job_id) in self.unstorable:
            return _build_upsert(job_id, job_list.build_row(jobs.reduce_to_storable(job)))
        if upserts or (jobs.NAME, job_id) in replaced:
            return _build_upsert(job_id, job_list.build_row(job))
        if before is None:
            return InsertOne(self.list_rows[job_id])
        if job_id in self.list_rows:
            return ReplaceOne({"_id": job_id}, self.list_rows[job_id])
        if job_list.has_new_status(before, job):
            return UpdateOne({"_id": job_id}, {"$set": job_list.build_status_changes(job)})
        return None

    def _build_projection_error_writes(self, replaced: Collection[DocumentKey]) -> list[tuple[str, Write]]:
        """Return the writes to the view of errors. Nearly all chunks have none."""
        errors = {**self.errors_without_document, **self.unstorable}
        writes: list[tuple[str, Write]] = []
        for view in _REDUCIBLE_VIEWS:
            loaded = self.loaded[view]
            for key, document in self.current[view].items():
                if self.unstorable and (view, key) in self.unstorable:
                    continue
                before = loaded.get(key)
                error_now = document.get(projection_errors.ERROR_FIELD) if document is not None else None
                error_before = before.get(projection_errors.ERROR_FIELD) if before is not None else None
                if error_now is not None and error_now is not error_before:
                    errors[view, key] = error_now
                elif error_now is None and (error_before is not None or (view, key) in replaced):
                    writes.append((f"{view}/{key}", DeleteOne({"_id": f"{view}/{key}"})))
        for (view, key), projection_error in errors.items():
            row = projection_errors.build_row(view, key, projection_error)
            writes.append((row["_id"], _build_upsert(row["_id"], row)))
        return writes


def _build_queue_rows(job: Document | None, get_batch: Callable[[str], Document | None]) -> list[Document]:
    return queue.build_rows(job, get_batch(job["batch_id"])) if job else []


def _add_changed_rows(
    changed: dict[str, Document | None], before: Sequence[Document], after: Sequence[Document]
) -> None:
    """Add the rows that differ between the previous and the current rows of a job."""
    if not before and not after:  # nearly always: this is the hottest place of the projector
        return
    old = {row["_id"]: row for row in before}
    new = {row["_id"]: row for row in after}
    changed.update((key, None) for key in old if key not in new)
    changed.update((key, row) for key, row in new.items() if row != old.get(key))


def _build_upsert(key: str, document: Document) -> Write:
    return ReplaceOne({"_id": key}, document, upsert=True)


def _build_minimal_write(key: str, old: Document | None, new: Document | None) -> Write | None:
    """Return the smallest write that changes the old document to the new one.

    Folds replace values and never change them in place, so `is` recognizes unchanged values.
    """
    if new is None:
        return DeleteOne({"_id": key}) if old else None
    if old is None:
        return InsertOne(new)
    update: Document = {}
    if changed := {name: value for name, value in new.items() if value is not old.get(name)}:
        update["$set"] = changed
    if removed := old.keys() - new.keys():
        update["$unset"] = dict.fromkeys(sorted(removed), "")
    return UpdateOne({"_id": key}, update) if update else None
