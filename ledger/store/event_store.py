"""The event store: append events, read them and subscribe to them.

Only this package accesses the collection `events`. `appender` describes how positions are assigned and gaps are filled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any, Final, NamedTuple

import bson
import structlog
from pymongo import ASCENDING, DESCENDING
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError, OperationFailure, PyMongoError

from jobledger.ledger.domain.canonical_json import TextTooLong
from jobledger.ledger.domain.errors import DatabaseUnsuitable, LogTruncated
from jobledger.ledger.domain.events import Event, EventMetadata, RecordedEvent
from jobledger.ledger.mongo.connection import (
    DURABLE,
    INDEX_CONFLICTS,
    LENIENT_CODEC,
    LOCAL,
    MAJORITY,
    UNAUTHORIZED,
    Database,
    Document,
    summarize_error,
    translate_errors,
)
from jobledger.ledger.mongo.server_clock import get_server_clock
from jobledger.ledger.store.appender import Appender, EventStoreLimits
from jobledger.ledger.store.envelope import StreamAppend, StreamHead, build_documents
from jobledger.ledger.store.gap_filler import GapFiller
from jobledger.ledger.store.live_tail import LiveTail
from jobledger.ledger.store.pending_appends import AppendOutcomes
from jobledger.ledger.store.subscription import Subscription
from jobledger.ledger.system.histogram import DurationHistogram

_log = structlog.get_logger()
StoredDocument = tuple[Document, bytes]
"""A document of the log and the BSON from which it was decoded."""
EVENTS_COLLECTION: Final = "events"
MAX_POSITION = 2**63 - 1  # the largest integer of BSON
_ENCODE_CHUNK_BYTES = 64 * 1024
"""After this many bytes of an append, other tasks may run. A larger event is encoded in a thread."""
_HEAD_READ_TRIES = 8
_WITHOUT_METADATA = {"event_id": 0, "meta": 0, "prev": 0, "hash": 0}
_LOCATION_FIELDS = dict.fromkeys(("stream", "version", "type", "schema", "time"), 1)
_EVENTS_PER_READ = 1000
_VERSIONS = [("stream", ASCENDING), ("version", ASCENDING)]
_POSITIONS = [("_id", ASCENDING)]


class ReadPosition(NamedTuple):
    """The position of the last event that a reader has read, and its hash if known."""

    position: int
    hash: bytes | None = None

    @classmethod
    def from_document(cls, stored: Mapping[str, Any]) -> ReadPosition:
        """Return the position in a document with the fields `position` and `hash`."""
        return cls(int(stored["position"]), stored.get("hash"))


class EventStore:
    """The log of one database and its API. A listener of the process's `ChangeStream`."""

    def __init__(
        self, db: Database, limits: EventStoreLimits | None = None, *, collection: str = EVENTS_COLLECTION
    ) -> None:
        """Open the log in a collection. Only an import uses, and reads, another one than `events`."""
        self.collection = collection
        self.db = db
        self.limits = limits or EventStoreLimits()
        self.events = db.get_collection(
            collection, codec_options=LENIENT_CODEC, write_concern=DURABLE, read_concern=MAJORITY
        )
        self._appender = Appender(db, self.events, self.limits)
        self.clock = get_server_clock(db.client)
        """The database server's clock. It decides when something is due."""
        self._tail = LiveTail(self.limits.max_tail_events, self.limits.max_tail_bytes)
        self._gap_filler = GapFiller(self.events, self._appender, self._tail, self.limits.gap_timeout_seconds)
        self.may_have_lost_events = False
        """Whether events may have been removed: one was deleted, or the change stream was opened again."""
        self.append_durations = DurationHistogram()
        """The durations of successful appends."""

    async def prepare(self) -> None:
        """Create the index that makes versions unique. If this user may not create it, check that it exists.

        Raises:
            DatabaseUnsuitable: The index is missing and cannot be created. The message says how to fix it.
            LedgerUnavailable: The database is unreachable.
        """
        with translate_errors("preparing the log"):
            try:
                await self.events.create_index(_VERSIONS, unique=True)
            except DuplicateKeyError as error:
                raise DatabaseUnsuitable(
                    f"Two events have the same version of a stream: {summarize_error(error)}"
                ) from error
            except OperationFailure as error:
                if error.code not in {*INDEX_CONFLICTS, UNAUTHORIZED}:
                    raise
                if await self.has_unique_version_index():  # under another name, or made by an administrator
                    return
                if error.code in INDEX_CONFLICTS:
                    raise DatabaseUnsuitable(
                        "The index of `events` on (stream, version) is not unique: drop it, and Jobledger recreates it."
                    ) from error
                create = f"db.getSiblingDB({self.db.name!r}).events.createIndex"
                raise DatabaseUnsuitable(
                    "The unique index of `events` on (stream, version) is missing, and this user may not create "
                    f"it. An administrator can, in mongosh: {create}({{stream: 1, version: 1}}, {{unique: true}})"
                ) from error

    async def read_server_time(self) -> datetime:
        """Return the database server's time, or the last estimate if the server does not respond."""
        try:
            return await self.clock.now(self.db.client)
        except PyMongoError as error:
            _log.warning("server time unavailable", error=summarize_error(error))
            return self.clock.estimate()

    async def aclose(self) -> None:
        """Stop background tasks after pending appends have finished."""
        await self._appender.wait_until_idle()
        await self._gap_filler.aclose()

    # Append -------------------------------------------------------------------------------------------------------

    async def append(self, *appends: StreamAppend) -> list[RecordedEvent]:
        """Append events to their streams, all or none, and return them in the given order.

        Returned events are durable: a majority has journaled them.

        Raises:
            VersionConflict: A stream is not at the expected version. Nothing was written.
            InvalidEvent: An event cannot be stored.
            LedgerBusy: Too many events are queued.
            LedgerUnavailable: The database did not respond in time. Whether the events were written is unknown.
            ValueError: Two of the appends are to the same stream.
        """
        if len(appends) > 1:
            _check_distinct_streams(appends)
        documents: list[Document] = []
        events: list[Event] = []
        size = based_on_position = 0
        pause_at = _ENCODE_CHUNK_BYTES
        for append in appends:
            if size > pause_at:  # other requests are served meanwhile; nothing is reserved yet
                pause_at = size + _ENCODE_CHUNK_BYTES
                await asyncio.sleep(0)
            size += await _build_documents(append, documents)
            events += append.events
            if append.head.position > based_on_position:
                based_on_position = append.head.position
        if not documents:
            return []
        await self._write(documents, size, based_on_position)
        return list(map(RecordedEvent, documents, events))

    async def append_with_next(
        self, append: StreamAppend, next_event: Event, next_meta: EventMetadata
    ) -> RecordedEvent:
        """Append one event and, directly after it, another one to the same stream. Return the first.

        One insert writes both. The second event is never written without the first one, but perhaps not at all: it is
        tried once. Only the log shows whether it was written.

        Raises:
            VersionConflict, InvalidEvent, LedgerBusy, LedgerUnavailable: As `append`, for the first event.
        """
        documents: list[Document] = []
        size = await _build_documents(append, documents)
        [document] = documents
        head = StreamHead(document["version"], append.head.position, document["hash"])
        next_documents: list[Document] = []
        size += await _build_documents(
            StreamAppend(append.stream, head, [next_event], next_meta, append.time), next_documents
        )
        await self._write(documents, size, append.head.position, next_documents[0])
        return RecordedEvent(document, *append.events)

    async def _write(
        self, documents: list[Document], size: int, based_on_position: int, next_document: Document | None = None
    ) -> None:
        begun = time.monotonic()
        outcomes = AppendOutcomes(1)
        self._appender.write(documents, size, based_on_position, partial(outcomes.set, 0), next_document)
        [(_, error)] = await outcomes.wait()
        if error is not None:
            raise error
        self.append_durations.observe(time.monotonic() - begun)

    async def append_each(
        self, appends: Sequence[StreamAppend]
    ) -> AsyncGenerator[Sequence[tuple[int, list[RecordedEvent] | Exception]]]:
        """Append events to their streams, each append independently of the others.

        They are written together, so many of them cost less than many calls of `append`. If the caller stops early,
        they may be written nevertheless.

        Args:
            appends: The events of different streams. None may be without events.

        Yields:
            The outcomes of each write, by index in `appends`: the events, which are durable, or an error as `append`
            raises it. Each append has one outcome.
        """
        begun = time.monotonic()
        outcomes = AppendOutcomes(len(appends))
        written: list[list[Document]] = []
        bytes_since_pause = 0
        for index, append in enumerate(appends):
            if bytes_since_pause > _ENCODE_CHUNK_BYTES:
                bytes_since_pause = 0
                await asyncio.sleep(0)
            documents: list[Document] = []
            written.append(documents)
            try:
                size = await _build_documents(append, documents)
                bytes_since_pause += size
                self._appender.write(documents, size, append.head.position, partial(outcomes.set, index))
            except Exception as error:  # noqa: BLE001 - it concerns only this append
                outcomes.set(index, error)
        while new := await outcomes.wait():
            if any(error is None for _, error in new):
                self.append_durations.observe(time.monotonic() - begun)
            yield [
                (index, list(map(RecordedEvent, written[index], appends[index].events)) if error is None else error)
                for index, error in new
            ]

    # Read ---------------------------------------------------------------------------------------------------------

    async def read_stream(
        self,
        stream: str,
        *,
        after_version: int = 0,
        limit: int = 0,
        types: Collection[type[Event]] | None = None,
        single_batch: bool = False,
    ) -> list[RecordedEvent]:
        """Return the events of one stream in order, at most `limit` of them; 0 means all.

        With `single_batch` there are fewer if they are large: the server puts at most 16 MB into a batch.
        """
        with translate_errors(f"reading {stream}"):
            query: Document = {"stream": stream, "version": {"$gt": after_version}}
            if types is not None:
                query["type"] = {"$in": sorted(wanted.__name__ for wanted in types)}
            sized = {"limit": -limit, "batch_size": limit} if single_batch and limit else {"limit": limit}
            found = self.events.find(query, sort=[("version", ASCENDING)], **sized)
            return [RecordedEvent(document) async for document in found]

    async def iterate_stream(self, stream: str, *, after_version: int = 0) -> AsyncGenerator[RecordedEvent, None]:
        """Yield the events of one stream in order. At most 16 MB of them, one batch, are in memory.

        Raises:
            LedgerUnavailable: The database failed.
        """
        with translate_errors(f"reading {stream}"):
            query: Document = {"stream": stream, "version": {"$gt": after_version}}
            async with self.events.find(query, sort=[("version", ASCENDING)]) as found:
                async for document in found:
                    yield RecordedEvent(document)

    async def iterate_stream_batches(
        self, streams: Collection[str], *, exclude_types: Collection[str] = (), data_expression: Document | None = None
    ) -> AsyncGenerator[list[RecordedEvent], None]:
        """Yield the events of many streams in batches of at most 16 MB.

        The streams follow each other, and the events of each are in order.

        Args:
            streams: The names of the streams.
            exclude_types: Types of events to omit.
            data_expression: The payload to load (`override_payload_fields`), without IDs, hashes and metadata. Default:
                all fields.

        Raises:
            LedgerUnavailable: The database failed.
        """
        query: Document = {"stream": {"$in": list(streams)}}
        if exclude_types:
            query["type"] = {"$nin": sorted(exclude_types)}
        fields = None if data_expression is None else {**_LOCATION_FIELDS, "data": data_expression}
        with translate_errors(f"reading {len(streams)} streams"):
            async with self.events.find_raw_batches(
                query, fields, sort=_VERSIONS, batch_size=_EVENTS_PER_READ
            ) as found:
                part: Any  # the driver yields bytes, unlike its type hints
                async for part in found:
                    yield list(map(RecordedEvent, bson.decode_all(part, LENIENT_CODEC)))

    async def find_last_versions(self, streams: Collection[str], event_type: type[Event]) -> dict[str, int]:
        """Return the version of the last event of a type in each of these streams that has one.

        Raises:
            LedgerUnavailable: The database failed.
        """
        query: Document = {"stream": {"$in": list(streams)}, "type": event_type.__name__}
        with translate_errors(f"reading {len(streams)} streams"):
            found = self.events.find(query, {"stream": 1, "version": 1}, sort=_VERSIONS)
            return {document["stream"]: document["version"] async for document in found}

    async def find_events(self, query: Document, *, after: int, fields: Collection[str]) -> tuple[list[Document], int]:
        """Return some fields of the matching events after a position, in order, and the current head of the log.

        Unlike `read`, it does not wait for slow appenders: the result may lack events that are inserted later at
        earlier positions.

        Raises:
            LedgerUnavailable: The database failed.
        """
        head = await self.read_head_position()
        with translate_errors("reading the log"):
            found = self.events.find(
                {**query, "$and": [{"_id": {"$gt": after, "$lte": head}}]}, dict.fromkeys(fields, 1), sort=_POSITIONS
            )
            return await found.to_list(), max(after, head)

    async def read_head_position(self, session: AsyncClientSession | None = None) -> int:
        """Return the largest position in the log, 0 if it is empty. With `session`, as of the session's time."""
        with translate_errors("reading the head of the log"):
            return await self._appender.read_head_position(session)

    async def may_have_reached(self, position: int) -> bool:
        """Return whether the log has this position or a later one, even if a majority may not have it yet.

        A majority read may lag after a failover. A local read at the primary has everything that was durable.
        """
        local = self.events.with_options(read_concern=LOCAL)
        with translate_errors("looking for a position of the log"):
            return await local.find_one({"_id": {"$gte": position}}, {"_id": 1}) is not None

    async def check_not_truncated(self, last_read: ReadPosition, reader: str) -> None:
        """Check that the log still has the event that `reader` ("the views", for example) has read last.

        Events that were read are durable. So a log that ends before, or has another event there, has lost its end. A
        majority read may lag for a moment after a failover, so the check repeats for several seconds before it fails.

        Raises:
            LogTruncated: The log ends before that position, or has another event or none there.
        """
        position, head = last_read.position, 0
        for look in range(_HEAD_READ_TRIES):
            if look:
                await asyncio.sleep(self.limits.gap_timeout_seconds / 2)
            head = await self.read_head_position()
            if head >= position and (not position or last_read.hash in (None, await self.read_hash_at(position))):
                return
        if head >= position:
            raise LogTruncated(
                f"{reader[0].upper()}{reader[1:]} had reached position {position}, and the log has another event there "
                "now: events were removed, or an older copy of the log was restored, and others were appended."
            )
        raise LogTruncated(
            f"The log ends at position {head}, but {reader} had reached position {position}: events at the end were "
            "removed, or an older copy of the log was restored."
        )

    async def read_hash_at(self, position: int) -> bytes | None:
        """Return the hash of the event at a position, None if there is none."""
        with translate_errors("reading the log"):
            found = await self.events.find_one({"_id": position}, {"hash": 1})
        return None if found is None else found.get("hash")

    async def read_oldest_position(self) -> int:
        """Return the smallest position in the log, 0 when it is empty."""
        with translate_errors("reading the beginning of the log"):
            first = await self.events.find_one({"_id": {"$gte": 0}}, {"_id": 1}, sort=_POSITIONS)
            return first["_id"] if first else 0

    async def read_version_at(self, stream: str, position: int) -> int:
        """Return the version that a stream had at a position, 0 if it had not begun. Reads the later events."""
        with translate_errors(f"reading the version of {stream}"):
            query = {"stream": stream, "_id": {"$lte": position}}
            last = await self.events.find_one(query, {"version": 1}, sort=[("version", DESCENDING)], hint=_VERSIONS)
            return last["version"] if last else 0

    async def read(
        self, *, after: int = 0, limit: int | None = None, without_metadata: bool = False
    ) -> list[RecordedEvent]:
        """Return up to `limit` events after a position, in order and without gaps. Empty if there are none.

        Waits for slow appenders, then voids the gaps they left (see `appender`). With `without_metadata` the events
        have no IDs, hashes and metadata, which projections do not need.
        """
        check_position(after)
        fields = _WITHOUT_METADATA if without_metadata else None
        limit = limit or self.limits.page_events
        with translate_errors("reading the log"):
            while True:
                query = {"_id": {"$gt": after}}
                # A negative limit requests a single batch, and the server puts at most 16 MB into one.
                cursor = self.events.find(query, fields, sort=_POSITIONS, limit=-limit, batch_size=limit)
                documents = await cursor.to_list()
                events = [
                    RecordedEvent(it) for position, it in enumerate(documents, after + 1) if it["_id"] == position
                ]
                if events or not documents:
                    return events
                await self._gap_filler.wait_for_gaps(after, documents)

    async def read_newest(
        self, limit: int, *, up_to: int, types: Collection[str] = (), streams: Collection[str] = ()
    ) -> list[RecordedEvent]:
        """Return the newest events up to a position, in order. Positions that are not written yet are left out.

        Args:
            limit: Maximum number of events.
            up_to: Last position.
            types: Only events of these types. Empty: all. The database reads all events until it has found enough.
            streams: Only events of these streams, and of those that these streams caused. Empty: all.
        """
        query: Document = {"_id": {"$gt": 0, "$lte": up_to}}
        if types:
            query["type"] = {"$in": sorted(types)}
        if streams:
            names = {"$in": sorted(streams)}
            query["$or"] = [{"stream": names}, {"meta.correlation_id": names}]
        with translate_errors("reading the log"):
            newest = await self.events.find(query, sort=[("_id", DESCENDING)], limit=limit).to_list()
        return [RecordedEvent(document) for document in reversed(newest)]

    async def read_documents(self, *, after: int, limit: int) -> list[StoredDocument]:
        """Return documents after a position as they are stored, even if damaged. May have gaps."""
        with translate_errors("reading the log"):
            query = {"_id": {"$gt": after}}
            found = self.events.find_raw_batches(query, sort=_POSITIONS, limit=-limit, batch_size=limit)
            batches: list[Any] = await found.to_list()  # the driver yields bytes, unlike its type hints
            return [stored for batch in batches for stored in _split_batch(batch)]

    async def has_unique_version_index(self) -> bool:
        """Return whether the unique index on (stream, version) exists."""
        with translate_errors("reading the indexes of the log"):
            indexes = await self.events.index_information()
        return any(
            index["key"] == _VERSIONS and index.get("unique") and "partialFilterExpression" not in index
            for index in indexes.values()
        )

    # Subscribe ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def subscribe(
        self, *, after: int, types: Collection[type[Event]] | None = None, chunk_bytes: int | None = None
    ) -> AsyncIterator[Subscription]:
        """Subscribe to every event after a position, first from history and then live. No event is missed.

        The process's change stream must be running. A slow subscriber needs no queue, only a cursor. With
        `chunk_bytes`, chunks have at most this size (approximate JSON bytes, at least one event), and nothing is read
        ahead. This suits many subscribers that may be slow.
        """
        check_position(after)
        subscription = Subscription(self.read, self._tail, after, types, chunk_bytes)
        try:
            yield subscription
        finally:
            subscription.close()

    async def resync(self, session: AsyncClientSession) -> None:
        self.may_have_lost_events = True
        self._tail.reset_to(await self._appender.read_head_position(session))

    def on_change(self, change: Mapping[str, Any]) -> None:
        if change["operationType"] == "insert" and isinstance(change["fullDocument"]["_id"], int):
            self._tail.add(change["fullDocument"])
            self._gap_filler.schedule()
        elif change["operationType"] == "delete":  # `resync` follows
            self.may_have_lost_events = True
            self._tail.clear()


async def _build_documents(append: StreamAppend, documents: list[Document]) -> int:
    """Append the documents of an append to a list, and return their size. Large ones are built in a thread."""
    try:
        return build_documents(append, documents, _ENCODE_CHUNK_BYTES)
    except TextTooLong:
        return await asyncio.to_thread(build_documents, append, documents)


def override_payload_fields(fields: Document) -> Document:
    """Return an expression for payloads in which these fields are replaced. A damaged payload stays unchanged."""
    return {"$cond": [{"$eq": [{"$type": "$data"}, "object"]}, {"$mergeObjects": ["$data", fields]}, "$data"]}


def _split_batch(batch: bytes) -> Iterator[StoredDocument]:
    begin = 0
    for document in bson.decode_all(batch, LENIENT_CODEC):
        end = begin + int.from_bytes(batch[begin : begin + 4], "little")
        yield document, batch[begin:end]
        begin = end


def check_position(after: Any) -> int:
    """Return a position that a caller has given.

    Raises:
        ValueError: No event can have this position, and gaps before it could not be filled.
    """
    if isinstance(after, int) and not isinstance(after, bool) and 0 <= after <= MAX_POSITION:
        return after
    raise ValueError(f"`after` must be a position, 0 (the beginning of the log) to {MAX_POSITION}, got {after!r}")


def _check_distinct_streams(appends: Iterable[StreamAppend]) -> None:
    """Reject two appends to one stream: they would always conflict with each other."""
    streams: set[str] = set()
    for append in appends:
        if append.stream in streams:
            raise ValueError(f"two appends to the stream {append.stream} in one call: combine their events in one")
        streams.add(append.stream)
