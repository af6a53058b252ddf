"""A worker and webhook sender that is killed (SIGKILL) when it reaches a crash point for the n-th time.

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
from jobledger.workers.webhooks.webhook_client import WebhookClient, WebhookRequest, WebhookResponse
from tests.support.role_runner import FAST_WEBHOOKS, WorkerOptions, run_roles_in_process

CRASH_POINTS = (
    "before completion is appended",
    "after completion is appended",
    "before request is sent",
    "after request is sent",
    "before attempt is recorded",
    "after attempt is recorded",
)
_remaining = 0


def _reach(point: str, crash_point: str) -> None:
    global _remaining
    if point == crash_point:
        _remaining -= 1
        if _remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def install_crash_point(crash_point: str) -> None:
    """Patch the method at the crash point."""
    append, send = EventStore.append, WebhookClient.send

    async def append_or_crash(self: EventStore, *appends: StreamAppend) -> Any:
        kinds = {type(event).__name__ for stream_append in appends for event in stream_append.events}
        action = "completion is appended" if "JobCompleted" in kinds else "attempt is recorded"
        has_crash_point = bool(kinds & {"JobCompleted", "DeliveryAttempted"})
        if has_crash_point:
            _reach(f"before {action}", crash_point)
        recorded = await append(self, *appends)
        if has_crash_point:
            _reach(f"after {action}", crash_point)
        return recorded

    async def send_or_crash(self: WebhookClient, webhook: WebhookRequest) -> WebhookResponse:
        _reach("before request is sent", crash_point)
        response = await send(self, webhook)
        _reach("after request is sent", crash_point)
        return response

    EventStore.append = append_or_crash  # type: ignore[method-assign]
    WebhookClient.send = send_or_crash  # type: ignore[method-assign]


async def main(uri: str, db_name: str, store: str) -> None:
    async with run_roles_in_process(
        Connection(uri, db_name),
        Path(store),
        worker=WorkerOptions(lease_seconds=1.5),
        webhooks=FAST_WEBHOOKS.model_copy(update={"lease_seconds": 1.5}),
    ):
        print("running", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    _remaining = int(sys.argv[5])
    install_crash_point(sys.argv[4])
    asyncio.run(main(*sys.argv[1:4]))
