"""Append the jobs of the outbox to the log, each exactly once.

A document of the outbox becomes visible when the transaction of its program commits. The change stream signals it. The
relay reads all documents, appends their jobs, and deletes them. If it stops in between, the document is read again: the
stream of its job exists then, and begins with the fingerprint of the document. So two relays do no harm either.

A document that cannot become a job is moved to `outbox_rejected` with a reason. It does not delay the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

import bson
import structlog
from bson.raw_bson import RawBSONDocument
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.commands import SubmitJob
from jobledger.ledger.domain.errors import InvalidEvent, LedgerBusy, LedgerUnavailable, VersionConflict
from jobledger.ledger.domain.events import EventMetadata, JobSubmitted
from jobledger.ledger.domain.limits import fits_in_document
from jobledger.ledger.mongo.connection import LENIENT_CODEC, MAJORITY, Database, Document, translate_errors
from jobledger.ledger.outbox.submission import COLLECTION, REJECTED_COLLECTION, parse_document
from jobledger.ledger.store.command_handler import decider_for
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.ledger.store.event_store import EventStore

_log = structlog.get_logger()
_ENCODED: Final = bson.CodecOptions(document_class=RawBSONDocument, unicode_decode_error_handler="replace")
_PAGE_DOCUMENTS: Final = 100
_PAUSE_SECONDS: Final = 0.5
_PAUSE_AFTER_FAILURE_SECONDS: Final = 10.0
_MAX_KEPT_BYTES: Final = 8 * 1024 * 1024
_MAX_REASON_CHARACTERS: Final = 1000


@dataclass(slots=True)
class _Page:
    """The outcomes of the documents that were read together.

    Attributes:
        done: The IDs of the documents whose jobs are in the log.
        rejected: Documents that cannot become jobs, and the reasons.
        retry_error: Why others were not appended now.
    """

    done: list[Any] = field(default_factory=list)
    rejected: list[tuple[Document, str]] = field(default_factory=list)
    retry_error: LedgerUnavailable | LedgerBusy | None = None


class OutboxRelay:
    """Appends the jobs of the outbox. A listener of the process's change stream.

    Runs in the process of the leading projector, as its `leader_task`.
    """

    collection = COLLECTION

    def __init__(self, db: Database, event_store: EventStore) -> None:
        self._documents = db.get_collection(COLLECTION, codec_options=LENIENT_CODEC, read_concern=MAJORITY)
        self._rejected = db[REJECTED_COLLECTION]
        self._event_store = event_store
        self._inserted = asyncio.Event()

    async def resync(self, session: AsyncClientSession) -> None:
        self._inserted.set()

    def on_change(self, change: Mapping[str, Any]) -> None:
        if change["operationType"] == "insert":
            self._inserted.set()

    async def run(self) -> None:
        """Append jobs until cancelled. It begins with the documents that are left from before."""
        self._inserted.set()
        while True:
            await self._inserted.wait()
            self._inserted.clear()
            try:
                while await self._append_page():
                    pass
            except (LedgerUnavailable, LedgerBusy) as error:
                _log.warning("outbox interrupted, retrying", error=str(error))
                await asyncio.sleep(_PAUSE_SECONDS)
                self._inserted.set()
            except Exception:  # noqa: BLE001 - the projector beside it must continue
                _log.exception("outbox failed, retrying")
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_SECONDS)
                self._inserted.set()

    async def _append_page(self) -> bool:
        """Append the jobs of some documents, and delete these. Return whether there may be more."""
        with translate_errors("reading the outbox"):
            # A negative limit requests a single batch, and the server puts at most 16 MB into one.
            found = self._documents.find(sort=[("_id", 1)], limit=-_PAGE_DOCUMENTS, batch_size=_PAGE_DOCUMENTS)
            documents = await found.to_list()
        if not documents:
            return False
        page = await self._append_jobs(documents)
        for document, reason in page.rejected:
            await self._reject(document, reason)
        rejected_ids = [document["_id"] for document, _ in page.rejected]
        ids = [*page.done, *rejected_ids]
        with translate_errors("deleting documents of the outbox"):
            deleted = (await self._documents.delete_many({"_id": {"$in": ids}})).deleted_count
            if rejected_ids and deleted < len(ids):
                deleted += await self._delete_by_encoded_ids(rejected_ids)
        if page.retry_error is not None:
            raise page.retry_error
        return deleted > 0

    async def _delete_by_encoded_ids(self, ids: Sequence[Any]) -> int:
        """Delete rejected documents whose IDs the driver cannot reproduce, such as text that is not UTF-8.

        They sort first, and would keep the others out of every page.
        """
        keys = self._documents.with_options(codec_options=_ENCODED)
        found = keys.find({}, {"_id": 1}, sort=[("_id", 1)], limit=-_PAGE_DOCUMENTS, batch_size=_PAGE_DOCUMENTS)
        read = [key for key in await found.to_list() if bson.decode(key.raw, LENIENT_CODEC)["_id"] in ids]
        return sum([(await keys.delete_one(key)).deleted_count for key in read])

    async def _append_jobs(self, documents: Sequence[Document]) -> _Page:
        page, parsed, appends = _Page(), [], []
        now = self._event_store.clock.estimate()
        # One call for all: the event loop of a process with all roles may be busy, and each call waits for it.
        for document, result in await asyncio.to_thread(_parse_documents, documents):
            if isinstance(result, Exception):
                page.rejected.append((document, _describe(result)))
                continue
            job_id, submitted, fingerprint = result
            meta = EventMetadata(f"user:{submitted.user_id}", request_fingerprint=fingerprint)
            events = decider_for(job_id).decide(SubmitJob(submitted), None)
            appends.append(StreamAppend(job_id, StreamHead(), events, meta, now))
            parsed.append((document, fingerprint))
        async with aclosing(self._event_store.append_each(appends)) as written:
            async for outcomes in written:
                for index, outcome in outcomes:
                    document, fingerprint = parsed[index]
                    await self._add_outcome(page, document, fingerprint, outcome)
        return page

    async def _add_outcome(self, page: _Page, document: Document, fingerprint: str, outcome: object) -> None:
        match outcome:
            case VersionConflict():
                events = await self._event_store.read_stream(document["_id"], limit=1)
                if not events:
                    page.retry_error = LedgerBusy("Another process is just appending a job of the outbox.")
                elif events[0].meta.request_fingerprint == fingerprint:
                    page.done.append(document["_id"])  # another relay, or this one before a failure, has appended it
                else:
                    page.rejected.append((document, "a job with this ID exists: the key was used for another job"))
            case LedgerUnavailable() | LedgerBusy():
                page.retry_error = outcome
            case InvalidEvent() | Exception():
                page.rejected.append((document, _describe(outcome)))
            case _:
                page.done.append(document["_id"])

    async def _reject(self, document: Document, reason: str) -> None:
        """Keep a document that cannot become a job, with the reason. A large one is kept without its content."""
        _log.error("job of the outbox rejected", job_id=str(document["_id"])[:100], reason=reason)
        kept = document if fits_in_document(document, _MAX_KEPT_BYTES) else {"_id": document["_id"]}
        now = self._event_store.clock.estimate()
        with translate_errors("rejecting a document of the outbox"):
            await self._rejected.replace_one(
                {"_id": document["_id"]}, {**kept, "reason": reason, "rejected_at": now}, upsert=True
            )


def _parse_documents(documents: Sequence[Document]) -> list[tuple[Document, tuple[str, JobSubmitted, str] | Exception]]:
    """Return each document with its job as `parse_document` returns it, or why it cannot become one."""
    parsed: list[tuple[Document, tuple[str, JobSubmitted, str] | Exception]] = []
    for document in documents:
        try:
            parsed.append((document, parse_document(document)))
        except Exception as error:  # noqa: BLE001 - it concerns only this document
            parsed.append((document, error))
    return parsed


def _describe(error: Exception) -> str:
    text = str(error) if isinstance(error, ValueError | InvalidEvent) else repr(error)
    return text[:_MAX_REASON_CHARACTERS]
