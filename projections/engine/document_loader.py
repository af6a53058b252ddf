"""Load the documents that a chunk of events may change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from functools import partial
from typing import Any, Final

import bson

from jobledger.ledger.domain.delivery import build_endpoint_id
from jobledger.ledger.domain.errors import UnreadableEvent, UnsupportedEvent
from jobledger.ledger.domain.events import (
    BatchDeleted,
    BatchPaused,
    BatchResumed,
    BatchSubmitted,
    DeliveryQueued,
    Event,
    JobSubmitted,
    RecordedEvent,
)
from jobledger.ledger.mongo.connection import LENIENT_CODEC, Database, Document
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.document_cache import DocumentCache, DocumentKey
from jobledger.projections.engine.view_changes import ChunkTooLarge, ViewChanges
from jobledger.projections.slots import Views
from jobledger.projections.views import batches, deliveries, endpoints, jobs, projection_errors, statistics

MAX_LOADED_BYTES: Final = 64 * 1024 * 1024
"""Maximum BSON size of the documents of one view that are read for one chunk."""
BATCH_QUEUE_EVENTS: Final = frozenset({BatchPaused.__name__, BatchResumed.__name__, BatchDeleted.__name__})
"""Events of batches that may change whether their pending jobs are in the queue."""
_FIRST_EVENTS: Final = frozenset({JobSubmitted.__name__, BatchSubmitted.__name__, DeliveryQueued.__name__})
"""The first events of streams. Their documents do not exist yet."""


class DocumentLoader:
    """Reads documents from the changes that are being written, from a cache, or from the views.

    Attributes:
        reduced: Documents that the views contain only in reduced form.
    """

    def __init__(self, db: Database, views: Views) -> None:
        self._db = db
        self._views = views
        self._cache = DocumentCache()
        self.reduced: set[DocumentKey] = set()

    async def load(
        self, events: Sequence[RecordedEvent], *, unwritten: ViewChanges | None, position: int
    ) -> ViewChanges:
        """Load all documents that the events may change. Apply the events to the result.

        Args:
            unwritten: The changes of the previous chunk, if the database does not contain them yet.
            position: The last position that the views contain.

        Raises:
            ChunkTooLarge: The documents of several events exceed the memory limit.
        """
        read = partial(
            self._load_documents,
            max_bytes=MAX_LOADED_BYTES if len(events) > 1 else None,
            unwritten=unwritten,
            last_position=unwritten.position if unwritten is not None else position,
        )
        first_events = [event for event in events if event.version == 1 and event.type in _FIRST_EVENTS]
        new_streams = {event.stream for event in first_events}
        streams = {event.stream for event in events} - new_streams
        loaded = {jobs.NAME: await read(jobs.NAME, _select_streams("job", streams))}
        batch_ids = {job["batch_id"] for job in loaded[jobs.NAME].values()}
        batch_ids |= {
            getattr(_read_payload(event), "batch_id", None) for event in first_events if event.stream.startswith("job-")
        }
        batch_ids |= _select_streams("batch", streams)
        loaded[batches.NAME] = await read(batches.NAME, batch_ids - new_streams - {None})
        loaded[deliveries.NAME] = await read(deliveries.NAME, _select_streams("delivery", streams))
        queued = [_read_payload(event) for event in events if event.type == DeliveryQueued.__name__]
        endpoint_ids = {
            build_endpoint_id(payload.user_id, payload.webhook.url)
            for payload in queued
            if isinstance(payload, DeliveryQueued)
        }
        loaded[endpoints.NAME] = await read(endpoints.NAME, endpoint_ids)
        loaded[statistics.NAME] = await read(statistics.NAME, {statistics.FINISHED_BY_MINUTE})
        changed_queues = {event.stream for event in events if event.type in BATCH_QUEUE_EVENTS}
        changed_queues &= loaded[batches.NAME].keys()
        job_ids = [
            job_id for batch_id in sorted(changed_queues) for job_id in loaded[batches.NAME][batch_id]["job_ids"]
        ]
        return ViewChanges(loaded, await jobs.find_pending_jobs(self._views, job_ids) if job_ids else ())

    def cache_documents(self, changes: ViewChanges) -> None:
        """Keep the changed documents for the next chunks, except large ones."""
        for view, documents in changes.current.items():
            for key, document in documents.items():
                is_cached = document is not None and "large_fields" not in document
                self._cache.put((view, key), document if is_cached else None)
        self._cache.evict()

    def clear_cache(self) -> None:
        """Remove all documents from the cache."""
        self._cache.clear()

    async def _load_documents(
        self, view: str, keys: set[str], *, max_bytes: int | None, unwritten: ViewChanges | None, last_position: int
    ) -> dict[str, Document]:
        """Return documents by key, as they are after the event at `last_position`.

        Raises:
            ChunkTooLarge: The database returned more than `max_bytes`.
        """
        being_written = unwritten.current[view] if unwritten is not None else {}
        loaded = {key: document for key in keys if (document := self._cache.get((view, key))) is not None}
        # The database does not contain these changes yet, and the cache does not contain the large documents.
        loaded |= {key: document for key in being_written.keys() & keys if (document := being_written[key]) is not None}
        if missing := keys - loaded.keys() - being_written.keys():
            async for document in self._read_documents(view, missing, max_bytes):
                if projection_errors.REDUCED_FIELD in document:
                    self.reduced.add((view, document["_id"]))
                    if view == jobs.NAME:
                        document = await self._refold_job(document["_id"], last_position)
                loaded[document["_id"]] = document
        return loaded

    async def _read_documents(self, view: str, keys: Collection[str], max_bytes: int | None) -> AsyncIterator[Document]:
        size = 0
        raw_batches: Any = self._views[view].find_raw_batches({"_id": {"$in": sorted(keys)}})
        async for encoded in raw_batches:
            size += len(encoded)
            if max_bytes is not None and size > max_bytes:
                raise ChunkTooLarge(f"its documents in the view {view} have more than {max_bytes} bytes")
            for document in bson.decode_all(encoded, LENIENT_CODEC):
                yield document

    async def _refold_job(self, job_id: str, position: int) -> Document:
        """Return the complete document of a job that is stored reduced, from its events up to a position."""
        changes = ViewChanges()
        for event in await EventStore(self._db).read_stream(job_id):
            if event.position <= position:
                changes.apply(event)
        job = changes.get(jobs.NAME, job_id)
        assert job is not None  # noqa: S101 - the view contains the job, so it is not deleted
        return job


def _select_streams(stream_type: str, streams: set[str]) -> set[str]:
    return {stream for stream in streams if stream.startswith(f"{stream_type}-")}


def _read_payload(event: RecordedEvent) -> Event | None:
    """Return the payload of an event, or None if it is damaged.

    Raises:
        UnsupportedEvent: A later version of the program wrote the event.
    """
    try:
        return event.event
    except UnsupportedEvent:
        raise
    except UnreadableEvent:
        return None
