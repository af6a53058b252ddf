"""Verify the log event by event, in bounded memory.

It checks that positions and the versions of each stream have no gaps, that versions are in the order of positions, each
event's hash and link to the previous event, and the storage format (`storage_format`). It writes nothing: it reports a
gap that a reader would fill.

The views and named subscriptions store their position and the hash of the last event they have read. With these,
verification finds a log whose end was removed, even if other events were appended afterwards.

The database alone cannot reveal every manipulation. An attacker with write access can rewrite a whole stream with its
hashes, swap events of different streams, or remove the end of the log together with the readers' positions. A digest of
the log that is kept elsewhere reveals these. Each verification of the whole log returns one, and `expected_digest`
compares with it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jobledger.ledger.domain.canonical_json import try_encode_canonical_json
from jobledger.ledger.domain.errors import InvalidEvent, JobledgerError, LedgerUnavailable, LogTruncated
from jobledger.ledger.domain.events import PositionVoided
from jobledger.ledger.mongo.connection import Database, Document, translate_errors
from jobledger.ledger.store.envelope import VOID_STREAM, StreamHead
from jobledger.ledger.store.event_store import EventStore, ReadPosition, StoredDocument
from jobledger.ledger.store.hash_chain import GENESIS_HASH, build_hash_input
from jobledger.ledger.store.storage_format import are_canonical, find_deviation

_MAX_CACHED_HEADS = 50_000
_MAX_GAP_READS = 5
_EVENTS_PER_QUERY = 200
_READERS: Sequence[tuple[str, Document, str]] = (
    ("checkpoints", {"_id": "views"}, "the views"),
    ("subscriptions", {}, "the subscription {0!r}"),
)
"""Readers that store their position in the database: collection, query, and name for messages."""


@dataclass(frozen=True, slots=True)
class IntegrityProblem:
    """The first problem: its position and description. Stream and version are None if unknown."""

    position: int
    description: str
    stream: str | None = None
    version: int | None = None

    def __str__(self) -> str:
        stream = [] if self.stream is None else [self.stream]
        version = [] if self.version is None else [f"version {self.version}"]
        where = f" ({', '.join(stream + version)})" if stream or version else ""
        return f"position {self.position}{where}: {self.description}"


@dataclass(frozen=True, slots=True)
class VerificationResult:
    """The number of verified events, how many of them are voided positions, and the problem, if any.

    `position` is that of the last correct event. `digest` covers all events up to there in their order, if verification
    began at the first. Kept elsewhere, it later proves that they are unchanged.
    """

    events: int
    voided: int
    position: int
    digest: bytes | None
    problem: IntegrityProblem | None
    last_reserved_position: int = 0
    """The largest reserved position if the log ends before it: appenders crashed, or the log's end was removed."""


async def verify_log(
    event_store: EventStore,
    *,
    after: int = 0,
    up_to: int | None = None,
    expected_digest: tuple[int, bytes] | None = None,
    on_progress: Callable[[int, int], None] = lambda position, up_to: None,
) -> VerificationResult:
    """Verify the events after `after`, up to `up_to` or the current end. Stops at the first problem.

    Args:
        event_store: The event store.
        after: Verify events after this position.
        up_to: The last position. Default: the current end.
        expected_digest: The position and digest of an earlier verification.
        on_progress: Called after each page with the current and the last position.

    Raises:
        ValueError: `expected_digest` needs all events up to its position, and the range excludes some.
        LedgerUnavailable: The database failed.
    """
    if expected_digest is not None and (after > 0 or (up_to is not None and up_to < expected_digest[0])):
        raise ValueError(
            f"`expected_digest` covers all events up to position {expected_digest[0]}: the range must include them"
        )
    if (problem := await _find_global_problem(event_store, after)) is not None:
        return VerificationResult(0, 0, after, None, problem)
    checker = _StreamChecker(event_store)
    # Read the positions of readers before the head. The head only grows, so no reader can be ahead of it.
    readers = await _load_reader_positions(event_store.db)
    last_reserved = await _load_last_reserved_position(event_store.db)
    head = await event_store.read_head_position()
    end = head if up_to is None else min(up_to, head)
    position, events, voided = after, 0, 0
    digest = None if after else GENESIS_HASH
    async with aclosing(_iterate_pages(event_store, after, end)) as pages:
        async for page in pages:
            if isinstance(page, IntegrityProblem):
                return VerificationResult(events, voided, position, digest, page)
            await checker.prepare(page)
            is_canonical = are_canonical(page)
            for document, raw in page:
                if (problem := checker.check_event(document, None if is_canonical else raw)) is not None:
                    return VerificationResult(events, voided, position, digest, problem)
                position, events = document["_id"], events + 1
                voided += document["stream"] == VOID_STREAM
                if digest is not None:
                    digest = hashlib.sha256(digest + document["hash"]).digest()
                    if expected_digest is not None and position == expected_digest[0] and digest != expected_digest[1]:
                        problem = IntegrityProblem(
                            position,
                            "the log up to here does not match the expected digest, although its hashes are correct",
                        )
                        return VerificationResult(events, voided, position, digest, problem)
            on_progress(position, end)
    if expected_digest is not None and position < expected_digest[0]:
        problem = IntegrityProblem(
            expected_digest[0],
            f"missing: the log ends at position {position}, but the expected digest covers position "
            f"{expected_digest[0]}",
        )
        return VerificationResult(events, voided, position, digest, problem)
    if up_to is not None and up_to <= head:
        return VerificationResult(events, voided, position, digest, None)
    problem = await _find_removed_end(event_store, readers)
    return VerificationResult(events, voided, position, digest, problem, last_reserved if last_reserved > head else 0)


async def _load_reader_positions(db: Database) -> dict[str, ReadPosition]:
    """Return the positions of the views and of each named subscription, if this user may read them."""
    found: dict[str, ReadPosition] = {}
    for collection, query, name in _READERS:
        with suppress(LedgerUnavailable), translate_errors("reading the positions of readers"):
            async for reader in db[collection].find(query, {"position": 1, "hash": 1}):
                if isinstance(reader.get("position"), int):
                    found[name.format(reader["_id"])] = ReadPosition.from_document(reader)
    return found


async def _load_last_reserved_position(db: Database) -> int:
    """Return the largest position that an appender has reserved; 0 if unknown."""
    with suppress(LedgerUnavailable), translate_errors("reading the counter of positions"):
        counter = await db.counters.find_one({"_id": "events"})
        if counter is not None and isinstance(counter.get("next"), int):
            return int(counter["next"])
    return 0


async def _find_removed_end(event_store: EventStore, readers: Mapping[str, ReadPosition]) -> IntegrityProblem | None:
    """Look for evidence of removed events: readers that were further, or that had read other events."""
    for reader, read in sorted(readers.items(), key=lambda item: item[1].position, reverse=True):
        try:
            await event_store.check_not_truncated(read, reader)
        except LogTruncated as truncated:
            head = await event_store.read_head_position()
            if head < read.position:
                return IntegrityProblem(head + 1, f"missing. {truncated}")
            return IntegrityProblem(read.position, f"replaced. {truncated}")
    return None


async def _find_global_problem(event_store: EventStore, after: int) -> IntegrityProblem | None:
    """Look for problems that a walk through the positions does not find."""
    with translate_errors("reading the log"):
        stray = await event_store.events.find_one(
            {"$or": [{"_id": {"$lt": 1}}, {"_id": {"$not": {"$type": ["int", "long"]}}}]}, {"_id": 1}
        )
    if stray is not None:
        return IntegrityProblem(after, f"there is an event at {stray['_id']!r}, which is not a valid position")
    # The first append creates the index, so an empty log has none.
    if not await event_store.has_unique_version_index() and await event_store.read_head_position():
        return IntegrityProblem(
            after, "the unique index on (stream, version) is missing: a stream may contain the same version twice"
        )
    return None


async def _iterate_pages(
    event_store: EventStore, after: int, end: int
) -> AsyncGenerator[Sequence[StoredDocument] | IntegrityProblem, None]:
    """Yield pages without gaps, or the problem if a gap remains after waiting for slow appenders.

    The next page is read while the caller checks this one.
    """
    gap_reads, fetching = 0, asyncio.ensure_future(event_store.read_documents(after=after, limit=1000))
    try:
        while after < end:
            page = await fetching
            numbered = zip(page, range(after + 1, end + 1), strict=False)
            consecutive = [stored for stored, _ in takewhile(lambda pair: pair[0][0]["_id"] == pair[1], numbered)]
            if consecutive:
                after, gap_reads = consecutive[-1][0]["_id"], 0
            elif gap_reads == _MAX_GAP_READS:
                yield IntegrityProblem(
                    after + 1,
                    "missing. The event was removed, or its appender crashed and no reader has filled the gap yet. "
                    "If an appender crashed, run a projector or subscriber, then verify again",
                )
                return
            else:
                gap_reads += 1
                await asyncio.sleep(event_store.limits.gap_timeout_seconds / 2)
            if after < end:
                fetching = asyncio.ensure_future(event_store.read_documents(after=after, limit=1000))
                await asyncio.sleep(0)  # start the read
            if consecutive:
                yield consecutive
    finally:
        fetching.cancel()
        with suppress(asyncio.CancelledError, JobledgerError):
            await fetching


class _StreamChecker:
    """The heads of the most recent streams. Heads of other streams are loaded when they continue."""

    def __init__(self, event_store: EventStore) -> None:
        self._event_store = event_store
        self._heads: OrderedDict[str, StreamHead] = OrderedDict()

    async def prepare(self, page: Sequence[StoredDocument]) -> None:
        """Load the heads of streams that continue in this page and are not in memory. Evict the oldest heads."""
        while len(self._heads) > _MAX_CACHED_HEADS:
            self._heads.popitem(last=False)
        previous: dict[str, int] = {}
        for document, _ in page:
            stream, version = document.get("stream"), document.get("version")
            if not isinstance(stream, str) or not isinstance(version, int):
                continue  # `check_event` reports it
            if version > 1 and stream != VOID_STREAM and stream not in self._heads:
                previous.setdefault(stream, version - 1)
        keys = [{"stream": stream, "version": version} for stream, version in previous.items()]
        fields = {"stream": 1, "version": 1, "hash": 1}
        with translate_errors("reading the log"):
            for begin in range(0, len(keys), _EVENTS_PER_QUERY):
                query = {"$or": keys[begin : begin + _EVENTS_PER_QUERY]}
                async for event in self._event_store.events.find(query, fields):
                    if event["_id"] < page[0][0]["_id"]:  # events of this page or later are checked in their turn
                        head = StreamHead(event["version"], event["_id"], event.get("hash", b""))
                        self._heads[event["stream"]] = head

    def check_event(self, document: Document, raw: bytes | None) -> IntegrityProblem | None:
        """Return the problem of the next event, if any, and keep it as the head of its stream."""
        data = try_encode_canonical_json(document.get("data"))
        problem = (
            find_deviation(document, raw, data) or _find_wrong_hash(document, data) or self._find_broken_link(document)
        )
        if problem is None:
            return None
        stream, version = document.get("stream"), document.get("version")
        return IntegrityProblem(
            int(document["_id"]),
            problem,
            stream if isinstance(stream, str) else None,
            version if isinstance(version, int) and not isinstance(version, bool) else None,
        )

    def _find_broken_link(self, document: Document) -> str | None:
        stream, version, previous = document["stream"], document["version"], document["prev"]
        if stream == VOID_STREAM or document["type"] == PositionVoided.__name__:
            void: tuple[Any, ...] = (VOID_STREAM, document["_id"], PositionVoided.__name__, {}, GENESIS_HASH)
            is_void = (stream, version, document["type"], document["data"], previous) == void
            return None if is_void else "is neither an event nor a voided position"
        before = self._heads.pop(stream, StreamHead())
        self._heads[stream] = StreamHead(version, document["_id"], document["hash"])
        if version != before.version + 1:
            found = f"version {before.version}" if before.version else "no event"
            return f"in its stream, {found} precedes it: version {version - 1} is missing, or in the wrong place"
        if previous != before.hash:
            return "is not linked to the event before it in its stream: one of the two was replaced"
        return None


def _find_wrong_hash(document: Document, data: bytes | None) -> str | None:
    try:
        is_intact = hashlib.sha256(build_hash_input(document, data)).digest() == document["hash"]
    except InvalidEvent as error:
        return f"cannot be hashed: {error}"
    return None if is_intact else "its hash does not match its content: one of the two was changed"
