"""projections: whether the views are kept up to date, and if they are not, why."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.limits import truncate_text
from jobledger.ledger.mongo.connection import Database, translate_errors
from jobledger.ledger.mongo.lease import EXPIRED_LEASE_FILTER
from jobledger.ledger.store.event_store import EVENTS_COLLECTION, EventStore
from jobledger.projections.engine.checkpoint import VIEWS_CHECKPOINT_ID, Checkpoint
from jobledger.projections.engine.writer import PROJECTION_VERSION

STALL_SECONDS: Final = 30.0
"""Longer than a fail-over of the projector takes (its lease, 10 s), and longer than a chunk may take to be written."""
_NOTE: Final = "projector_stall"
"""The document of `checkpoints` that says why a projector stands still."""
_REASON_CHARACTERS: Final = 1000


VIEWS_AHEAD_REASON: Final = (
    "Events at the end of the log were removed, or an older copy was restored: `jobledger log verify`."
)
"""Why views are ahead of the log."""


async def record_stall(db: Database, reason: str) -> None:
    """Put on record why the projector stands still.

    Raises:
        LedgerUnavailable: the database failed.
    """
    with translate_errors("noting why the projector stands still"):
        found = await db.checkpoints.find_one({"_id": VIEWS_CHECKPOINT_ID}) or {}
        text = truncate_text(reason, _REASON_CHARACTERS)
        said = {"reason": text, "position": found.get("position", 0), "recorded_at": datetime.now(UTC)}
        await db.checkpoints.update_one({"_id": _NOTE}, {"$set": said}, upsert=True)


async def stall_reason(db: Database, position: int, head: int) -> str:
    """Return why the views do not get beyond a position although the log is at `head`, as far as that is known.

    Raises:
        LedgerUnavailable: the database failed.
    """
    with translate_errors("looking for why the views stand still"):
        said = await db.checkpoints.find_one({"_id": _NOTE})
        if said is not None and said.get("position") == position:
            return str(said["reason"])
        if position > head:
            return VIEWS_AHEAD_REASON
        leads = await db.leaders.find_one(
            {"_id": "projector", "released": False, "$nor": [EXPIRED_LEASE_FILTER]}, {"_id": 1}
        )
    if leads is None:
        return "No projector is running: start one (`jobledger projector`, or `jobledger up`)."
    return "A projector is running, but does not get on: its log says why."


class StallDetector:
    """Notices that the views do not get on although the log does, or are ahead of it. A listener of the change stream.

    Nothing is polled: the log's events and the checkpoint's moves are heard. The time counts from the last move, or
    from the event with which the log got ahead. So neither an idle ledger nor a busy one is taken for stalled. Views
    are ahead of a log whose end was removed, or that was restored from an older copy.
    """

    collection: Final = EVENTS_COLLECTION

    def __init__(self, log: EventStore, checkpoint: Checkpoint) -> None:
        self._log = log
        self._checkpoint = checkpoint
        self._head = 0
        self._position = 0
        self._since: float | None = None
        checkpoint.add_listener(self._on_checkpoint_change)

    def is_stalled(self, seconds: float = STALL_SECONDS) -> bool:
        """Return whether the views have been at another position than the log, and not moved, for so many seconds.

        Views of another version are being rebuilt meanwhile: they are old, but this is no fault.
        """
        if self._since is None or self._checkpoint.version != PROJECTION_VERSION:
            return False
        return time.monotonic() - self._since >= seconds

    @property
    def head(self) -> int:
        """The newest position of the log that was heard of."""
        return self._head

    async def resync(self, session: AsyncClientSession) -> None:
        self._update_head(await self._log.head_position(session))

    def on_change(self, change: Mapping[str, Any]) -> None:
        position = change["documentKey"]["_id"]
        if change["operationType"] == "insert" and isinstance(position, int) and position > self._head:
            self._update_head(position)

    def _update_head(self, head: int) -> None:
        self._head = head
        if head == self._checkpoint.position:
            self._since = None
        elif self._since is None:
            self._since = time.monotonic()

    def _on_checkpoint_change(self) -> None:
        if self._checkpoint.position == self._position:
            return  # a new leader has taken over, and has done nothing yet
        self._position = self._checkpoint.position
        self._since = time.monotonic() if self._head != self._position else None
