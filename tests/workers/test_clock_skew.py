"""Tests of clock skew: a worker whose clock is an hour off, or is set while it runs, starts no job early or late."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.events import JobAttemptFailed, JobClaimed, JobCompleted
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.server_clock import ServerClock
from tests.support.faketime import SkewedClock, needs_faketime
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process, run_roles_subprocess
from tests.support.soak_only import soak_only

MAX_DELAY_SECONDS = 15.0  # on a busy machine; far less than an hour
HOUR = 3600


async def assert_claimed_in_time(roles: RunningRoles, job_id: str, due: datetime, attempt: int = 1) -> None:
    try:
        claimed = await roles.wait_for_event(JobClaimed, job_id, predicate=lambda event: event.attempt == attempt)
    except TimeoutError:
        raise AssertionError(f"not claimed: {await roles.describe_history(job_id)}") from None
    delay = (datetime.now(UTC) - due).total_seconds()
    assert claimed is not None
    assert -0.2 < delay < MAX_DELAY_SECONDS, f"claimed {delay:.2f} s after it was due"


@needs_faketime
@pytest.mark.parametrize("ahead", [HOUR, -HOUR], ids=["ahead", "behind"])
async def test_worker_with_wrong_clock_starts_jobs_and_retries_when_due(
    connection: Connection, store: Path, tmp_path: Path, ahead: int
) -> None:
    clock = SkewedClock(tmp_path, 0)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        with run_roles_subprocess(connection, store, "worker", env=clock.env) as worker:
            await worker.wait_until_started()
            clock.set_offset(ahead)
            due = datetime.now(UTC) + timedelta(seconds=1.5)
            job_id = await roles.submit({"file": False}, not_before=due)
            await assert_claimed_in_time(roles, job_id, due)
            completed = await roles.wait_for_event(JobCompleted, job_id)
            assert abs((completed.time - datetime.now(UTC)).total_seconds()) < MAX_DELAY_SECONDS, "times of events"

            failing = await roles.submit({"fail": "busy", "transient": True}, max_attempts=2)
            failed = await roles.wait_for_event(JobAttemptFailed, failing)
            assert isinstance(failed.event, JobAttemptFailed)
            assert failed.event.retry_at is not None
            assert abs((failed.event.retry_at - failed.time).total_seconds()) < MAX_DELAY_SECONDS
            await assert_claimed_in_time(roles, failing, failed.event.retry_at, attempt=2)


async def test_clock_set_back_between_query_and_claim_loses_no_job(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read_ahead(self: ServerClock, client: Any) -> datetime:
        return self.estimate() + timedelta(seconds=1)

    monkeypatch.setattr(ServerClock, "now", read_ahead)  # workers query with this, and claim with `estimate`
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        due = datetime.now(UTC) + timedelta(seconds=0.8)
        job_id = await roles.submit({"file": False}, not_before=due)
        await assert_claimed_in_time(roles, job_id, due)


@soak_only
@needs_faketime
@pytest.mark.parametrize("step", [HOUR, -HOUR], ids=["forward", "back"])
async def test_clock_change_while_a_job_waits_has_no_effect(
    connection: Connection, store: Path, tmp_path: Path, step: int
) -> None:
    clock = SkewedClock(tmp_path, 0)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        with run_roles_subprocess(connection, store, "worker", env=clock.env) as worker:
            await worker.wait_until_started()
            due = datetime.now(UTC) + timedelta(seconds=2.5)
            job_id = await roles.submit({"file": False}, not_before=due)
            await roles.wait_for_views()
            time.sleep(0.5)  # noqa: ASYNC251 - until the worker has set its timer
            clock.set_offset(step)
            await assert_claimed_in_time(roles, job_id, due)
