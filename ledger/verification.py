"""ledger: does the log still say what was written? A check from event to event, in bounded memory.

Looked at are: the positions (dense), each stream's versions (dense, in the order of positions), each event's hash and
its link to the one before, and the fields of the envelope (none more, none less). Nothing is written: a hole that a
reader would fill is reported as one.

Not every falsification can be seen in the log alone. Who can write to the database can make a whole stream anew, hashes
and all, or take the end of the log away. Against that helps a position and hash noted elsewhere: `noted`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ledger.chain import GENESIS, chained_text
from ledger.envelope import VOID_STREAM, Head
from ledger.errors import InvalidEvent
from ledger.events import PositionVoided
from ledger.log import EventLog
from ledger.mongo import Document

_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "_id": int,
    "event_id": str,
    "stream": str,
    "version": int,
    "type": str,
    "schema": int,
    "time": datetime,
    "data": dict,
    "meta": dict,
    "prev": bytes,
    "hash": bytes,
}
_REMEMBERED_STREAMS = 50_000
_LOOKS_AT_A_HOLE = 5


@dataclass(frozen=True, slots=True)
class Wrong:
    """The first thing that is wrong: at which position, and what. Stream and version are None where nothing stands."""

    position: int
    what: str
    stream: str | None = None
    version: int | None = None

    def __str__(self) -> str:
        where = f" ({self.stream}, version {self.version})" if self.stream is not None else ""
        return f"position {self.position}{where}: {self.what}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many events were looked at, how many of them void, how far that went, and what is wrong, if anything.

    `position` and `hash` are those of the last event that was found right. Noted elsewhere, they prove later that the
    log up to there is still the same: `verify(noted=…)`.
    """

    events: int
    voided: int
    position: int
    hash: bytes
    wrong: Wrong | None


async def verify(
    log: EventLog,
    *,
    after: int = 0,
    upto: int | None = None,
    noted: tuple[int, bytes] | None = None,
    looked_at: Callable[[int, int], None] = lambda position, upto: None,
) -> Verdict:
    """Check the events behind `after` up to `upto`, or to what is the end now. Stops at the first that is wrong.

    `looked_at` is told after each page how far the check has come, and how far it will go.

    Raises:
        LedgerUnavailable: the database failed.
    """
    check = _Check(log)
    if (wrong := await check.outside(after)) is not None:
        return Verdict(0, 0, after, GENESIS, wrong)
    head = await log.head()
    if noted is not None and (wrong := await _other_than_noted(log, *noted)) is not None:
        return Verdict(0, 0, after, GENESIS, wrong)
    end = head if upto is None else min(upto, head)
    position, digest, events, voided = after, GENESIS, 0, 0
    async for page in _pages(log, after, end):
        if isinstance(page, Wrong):
            return Verdict(events, voided, position, digest, page)
        await check.prepare(page)
        for document in page:
            wrong = check.event(document)
            if wrong is not None:
                return Verdict(events, voided, position, digest, wrong)
            position, digest, events = document["_id"], document["hash"], events + 1
            voided += document["stream"] == VOID_STREAM
        looked_at(position, end)
    return Verdict(events, voided, position, digest, None)


async def _other_than_noted(log: EventLog, position: int, digest: bytes) -> Wrong | None:
    there = await log.stored(after=position - 1, limit=1)
    if not there:
        return Wrong(position, f"the log ends at position {await log.head()}, and was noted to have reached {position}")
    if there[0]["_id"] != position or there[0].get("hash") != digest:
        return Wrong(position, "what stands here is not what was noted")
    return None


async def _pages(log: EventLog, after: int, end: int) -> AsyncIterator[Sequence[Document] | Wrong]:
    """Yield dense pages. A hole that does not close is what is wrong: a writer may be slow, but not for ever."""
    looks = 0
    while after < end:
        page = [document for document in await log.stored(after=after, limit=1000) if document["_id"] <= end]
        dense = [document for place, document in enumerate(page, after + 1) if document["_id"] == place]
        if dense:
            yield dense
            after, looks = dense[-1]["_id"], 0
        elif page and not isinstance(page[0]["_id"], int):
            yield Wrong(after + 1, f"before it stands an event at {page[0]['_id']!r}, which is no position")
            return
        elif looks == _LOOKS_AT_A_HOLE:
            yield Wrong(
                after + 1,
                "missing. It was removed; or its writer died, and no reader has been there since to fill the place "
                "(then it is right once a projector or subscriber has run)",
            )
            return
        else:
            looks += 1
            await asyncio.sleep(log.patience_seconds / 2)


class _Check:
    """What has to be remembered: the ends of the streams met last. Others are looked up when they go on."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._heads: OrderedDict[str, Head] = OrderedDict()

    async def outside(self, after: int) -> Wrong | None:
        """Look for what no reader would see, in the order of positions."""
        if not await self._log.versions_are_unique():
            return Wrong(after, "the unique index on (stream, version) is missing: versions may stand there twice")
        if (stray := await self._log.stray()) is not None:
            return Wrong(after, f"there is an event at {stray['_id']!r}, which is no position")
        return None

    async def prepare(self, page: Sequence[Document]) -> None:
        """Look up the ends of streams that go on in this page and are not remembered."""
        wanted: dict[str, int] = {}
        for document in page:
            stream, version = document.get("stream"), document.get("version")
            if not isinstance(stream, str) or not isinstance(version, int):
                continue  # as `event` will find out
            if version > 1 and stream != VOID_STREAM and stream not in self._heads:
                wanted.setdefault(stream, version - 1)
        for stream, there in (await self._log.ends(wanted)).items():
            # Only what stands before: an end that comes later in the log is no end yet.
            if there["_id"] < page[0]["_id"]:
                self._heads[stream] = Head(there["version"], there["_id"], there["hash"])

    def event(self, document: Document) -> Wrong | None:
        """Return what is wrong with the next event, and remember it as the end of its stream."""
        if (what := _misshapen(document)) is not None:
            return _wrong(document, what)
        try:
            right = hashlib.sha256(chained_text(document)).digest() == document["hash"]
        except InvalidEvent as error:
            return _wrong(document, f"cannot be hashed: {error}")
        if not right:
            return _wrong(document, "its hash is not that of its content: one of the two was changed")
        if (what := self._unchained(document)) is not None:
            return _wrong(document, what)
        return None

    def _unchained(self, document: Document) -> str | None:
        stream, version, previous = document["stream"], document["version"], document["prev"]
        if stream == VOID_STREAM or document["type"] == PositionVoided.__name__:
            void: tuple[Any, ...] = (VOID_STREAM, document["_id"], PositionVoided.__name__, {}, GENESIS)
            is_one = (stream, version, document["type"], document["data"], previous) == void
            return None if is_one else "is neither an event nor a voided position"
        before = self._heads.pop(stream, Head())
        self._heads[stream] = Head(version, document["_id"], document["hash"])
        if len(self._heads) > _REMEMBERED_STREAMS:
            self._heads.popitem(last=False)
        if version != before.version + 1:
            there = f"version {before.version}" if before.version else "nothing"
            return f"in its stream, {there} stands before it: version {version - 1} is missing, or in the wrong place"
        if previous != before.hash:
            return "is not linked to the event before it in its stream: one of the two was made anew"
        return None


def _misshapen(document: Mapping[str, Any]) -> str | None:
    if more := document.keys() - _FIELDS.keys():
        return f"has fields that no event has: {', '.join(sorted(more))}"
    for name, kind in _FIELDS.items():
        if name not in document:
            return f"lacks the field {name}"
        value = document[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"its {name} is a {type(value).__name__}"
    return None


def _wrong(document: Mapping[str, Any], what: str) -> Wrong:
    return Wrong(int(document["_id"]), what, str(document.get("stream")), document.get("version"))
