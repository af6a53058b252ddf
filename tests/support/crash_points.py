"""tests: a worker that also sends webhooks, and is killed (SIGKILL) when it gets to a point for the n-th time.

python -m tests.support.crash_points URI DB_NAME STORE POINT TIMES
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.envelope import StreamAppend
from jobledger.ledger.store.event_store import EventStore
from jobledger.workers.webhooks.sender import Sender, WebhookRequest, WebhookResponse
from tests.support.role_runner import FAST_WEBHOOKS, WorkerOptions, run_roles_in_process

CRASH_POINTS = (
    "before completion is appended",
    "after completion is appended",
    "before request is sent",
    "after request is sent",
    "before attempt is recorded",
    "after attempt is recorded",
)
_left = 0


def _pass(point: str, wanted: str) -> None:
    global _left
    if point == wanted:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def install_crash_point(wanted: str) -> None:
    """Put the point where it belongs."""
    append, send = EventStore.append, Sender.send

    async def dying_append(self: EventStore, *appends: StreamAppend) -> Any:
        kinds = {type(event).__name__ for it in appends for event in it.events}
        what = "completion is appended" if "JobCompleted" in kinds else "attempt is recorded"
        concerned = bool(kinds & {"JobCompleted", "DeliveryAttempted"})
        if concerned:
            _pass(f"before {what}", wanted)
        recorded = await append(self, *appends)
        if concerned:
            _pass(f"after {what}", wanted)
        return recorded

    async def dying_send(self: Sender, webhook: WebhookRequest) -> WebhookResponse:
        _pass("before request is sent", wanted)
        answer = await send(self, webhook)
        _pass("after request is sent", wanted)
        return answer

    EventStore.append = dying_append  # type: ignore[method-assign]
    Sender.send = dying_send  # type: ignore[method-assign]


async def main(uri: str, db_name: str, store: str) -> None:
    async with run_roles_in_process(
        Connection(uri, db_name),
        Path(store),
        worker=WorkerOptions(lease_seconds=1.5),
        webhooks=FAST_WEBHOOKS,
        webhooks_lease_seconds=1.5,
    ):
        print("running", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    _left = int(sys.argv[5])
    install_crash_point(sys.argv[4])
    asyncio.run(main(*sys.argv[1:4]))
