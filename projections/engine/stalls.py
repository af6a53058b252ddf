"""Detect that the views are stalled, and record and find the reason."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.limits import truncate_text
from jobledger.ledger.mongo.connection import Database, translate_errors
from jobledger.ledger.mongo.lease import OVERDUE_LEASE_FILTER
from jobledger.ledger.store.event_store import EVENTS_COLLECTION, EventStore
from jobledger.projections.engine.checkpoint import CheckpointFollower, load_checkpoint
from jobledger.projections.engine.view_registry import PROJECTION_VERSION

STALL_SECONDS: Final = 30.0
"""Longer than a failover of the projector (its lease, 10 s) and longer than the write of a chunk may take."""
VIEWS_AHEAD_REASON: Final = (
    "The views are ahead of the log: events at its end were removed, or an older copy was restored. "
    "Run `jobledger log verify`."
)
_STALL_ID: Final = "projector_stall"
"""The document of `checkpoints` with the reason of the projector's last stall."""
_MAX_REASON_CHARACTERS: Final = 1000


async def record_stall(db: Database, reason: str) -> None:
    """Store the reason why the projector has stopped at the current position."""
    position = (await load_checkpoint(db))["position"]
    with translate_errors("recording a stall of the projector"):
        text = truncate_text(reason, _MAX_REASON_CHARACTERS)
        stall = {"reason": text, "position": position, "recorded_at": datetime.now(UTC)}
        await db.checkpoints.update_one({"_id": _STALL_ID}, {"$set": stall}, upsert=True)


async def find_stall_reason(db: Database, position: int, head: int) -> str:
    """Return why the views stay at a position while the log is at `head`, as far as it is known."""
    with translate_errors("reading why the views are stalled"):
        stall = await db.checkpoints.find_one({"_id": _STALL_ID})
        if stall is not None and stall.get("position") == position:
            return str(stall["reason"])
        if position > head:
            return VIEWS_AHEAD_REASON
        leader = await db.leaders.find_one(
            {"_id": "projector", "released": False, "$nor": [OVERDUE_LEASE_FILTER]}, {"_id": 1}
        )
    if leader is None:
        return "No projector is running: start one (`jobledger projector`, or `jobledger up`)."
    return "A projector is running, but makes no progress. Its log contains the reason."


class StallDetector:
    """Detects that the views make no progress although the log does, or that they are ahead of the log.

    Add it as a listener to the process's change stream. It does not poll: it receives the events of the log and the
    changes of the checkpoint. Time counts from the last change of the checkpoint, or from the first event after it.
    Therefore, neither an idle nor a busy ledger counts as stalled.

    Attributes:
        head: The last known position of the log.
    """

    collection: Final = EVENTS_COLLECTION

    def __init__(self, event_store: EventStore, checkpoint: CheckpointFollower) -> None:
        self._event_store = event_store
        self._checkpoint = checkpoint
        self.head = 0
        self._position = 0
        self._since: float | None = None
        checkpoint.add_listener(self._on_checkpoint_change)

    def is_stalled(self) -> bool:
        """Return whether the views have stayed behind or ahead of the log for `STALL_SECONDS`.

        Views of another version are never stalled: they are outdated, and a rebuild is in progress.
        """
        if self._since is None or self._checkpoint.version != PROJECTION_VERSION:
            return False
        return time.monotonic() - self._since >= STALL_SECONDS

    async def resync(self, session: AsyncClientSession) -> None:
        """Read the head of the log when the change stream starts."""
        self._update_head(await self._event_store.read_head_position(session))

    def on_change(self, change: Mapping[str, Any]) -> None:
        """Process a change of the log."""
        position = change["documentKey"]["_id"]
        if change["operationType"] == "insert" and isinstance(position, int) and position > self.head:
            self._update_head(position)

    def _update_head(self, head: int) -> None:
        self.head = head
        if head == self._checkpoint.position:
            self._since = None
        elif self._since is None:
            self._since = time.monotonic()

    def _on_checkpoint_change(self) -> None:
        if self._checkpoint.position == self._position:
            return  # a new leader has taken over, and has not made progress yet
        self._position = self._checkpoint.position
        self._since = time.monotonic() if self.head != self._position else None
