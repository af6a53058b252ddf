"""The process that sends webhooks is killed at each crash point. Each finished job has one message with one ID."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobledger.ledger.domain.events import DeliverySucceeded, Webhook
from jobledger.ledger.mongo.connection import Connection
from tests.support.crash_points import CRASH_POINTS
from tests.support.role_runner import FAST_WEBHOOKS, WorkerOptions, run_roles_in_process
from tests.support.webhook_endpoint import run_webhook_endpoint

JOBS = 6
CRASH_AFTER = 3  # times that the crash point is reached


def start_crashing_process(connection: Connection, store: Path, point: str) -> subprocess.Popen[bytes]:
    arguments = [connection.uri, connection.db_name, str(store), point, str(CRASH_AFTER)]
    return subprocess.Popen([sys.executable, "-m", "tests.support.crash_points", *arguments], stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("point", CRASH_POINTS)
async def test_sender_killed_at_a_crash_point_delivers_each_message_under_one_id(
    mongodb_uri: str, db_name: str, tmp_path: Path, point: str
) -> None:
    connection, store = Connection(mongodb_uri, db_name), tmp_path / "results"
    async with run_webhook_endpoint() as endpoint, run_roles_in_process(connection, store, projector=True) as roles:
        webhook = Webhook(url=endpoint.url(), include_metadata=True)
        job_ids = [await roles.submit({"number": number}, webhook=webhook) for number in range(JOBS)]
        process = start_crashing_process(connection, store, point)
        assert await asyncio.to_thread(process.wait, 60) == -signal.SIGKILL
        async with run_roles_in_process(
            connection,
            store,
            worker=WorkerOptions(lease_seconds=1.5),
            webhooks=FAST_WEBHOOKS.model_copy(update={"lease_seconds": 1.5}),
        ):
            for job_id in job_ids:
                await roles.wait_until_finished(job_id)
            delivered: set[str] = set()
            async with asyncio.timeout(60), roles.event_store.subscribe(after=0, types=(DeliverySucceeded,)) as events:
                async for event in events:
                    delivered.add(event.stream)
                    if len(delivered) == JOBS:
                        break
        log = await roles.read_all_events()
    completed = {event.stream: event.version for event in log if event.type == "JobCompleted"}
    assert completed.keys() == set(job_ids)
    expected = {f"delivery-{job_id}-{version}" for job_id, version in completed.items()}
    assert {event.stream for event in log if event.type == "DeliveryQueued"} == expected
    assert {request.webhook_id for request in endpoint.requests} == expected
    assert {request.json_body["job"]["job_id"] for request in endpoint.requests} == set(job_ids)
    bodies = {(request.webhook_id, request.body) for request in endpoint.requests}
    assert len(bodies) == JOBS, "a repeated message has an identical body"
    assert len(endpoint.requests) <= JOBS + FAST_WEBHOOKS.max_concurrent_per_host, (
        "only messages in flight are repeated"
    )
