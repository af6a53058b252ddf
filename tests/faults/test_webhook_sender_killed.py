"""Whoever sends webhooks is killed at every step: each end is told, under one id, and none under a second."""

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
TIMES = 3


def dying(connection: Connection, store: Path, point: str) -> subprocess.Popen[bytes]:
    arguments = [connection.uri, connection.db_name, str(store), point, str(TIMES)]
    return subprocess.Popen([sys.executable, "-m", "tests.support.crash_points", *arguments], stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("point", CRASH_POINTS)
async def test_killed_at_any_step_each_end_is_told_under_one_id(
    mongodb_uri: str, db_name: str, tmp_path: Path, point: str
) -> None:
    connection, store = Connection(mongodb_uri, db_name), tmp_path / "results"
    async with run_webhook_endpoint() as cms, run_roles_in_process(connection, store, projector=True) as here:
        hook = Webhook(url=cms.url(), include_metadata=True)
        job_ids = [await here.submit({"number": number}, webhook=hook) for number in range(JOBS)]
        killed = dying(connection, store, point)
        assert await asyncio.to_thread(killed.wait, 30) == -signal.SIGKILL
        async with run_roles_in_process(
            connection,
            store,
            worker=WorkerOptions(lease_seconds=1.5),
            webhooks=FAST_WEBHOOKS,
            webhooks_lease_seconds=1.5,
        ):
            for job_id in job_ids:
                await here.wait_until_finished(job_id)
            told: set[str] = set()
            async with asyncio.timeout(30), here.event_store.subscribe(after=0, types=(DeliverySucceeded,)) as events:
                async for event in events:
                    told.add(event.stream)
                    if len(told) == JOBS:
                        break
        log = await here.read_all_events()
    ends = {it.stream: it.version for it in log if it.type == "JobCompleted"}
    assert ends.keys() == set(job_ids)
    expected = {f"delivery-{job_id}-{version}" for job_id, version in ends.items()}
    assert {it.stream for it in log if it.type == "DeliveryQueued"} == expected
    assert {it.webhook_id for it in cms.requests} == expected
    assert {it.json_body["job"]["job_id"] for it in cms.requests} == set(job_ids)
    bodies = {(it.webhook_id, it.body) for it in cms.requests}
    assert len(bodies) == JOBS, "sent again, it is the same to the letter"
    assert len(cms.requests) <= JOBS + FAST_WEBHOOKS.limits.max_concurrent_per_host, (
        "only what was on its way came twice"
    )
