"""Wrong clocks: a worker whose clock is an hour off, or is set while it runs, starts nothing early and nothing late."""

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

LATE_SECONDS = 5.0  # far less than an hour, even on a busy machine
HOUR = 3600


async def claimed_in_time(here: RunningRoles, job_id: str, due: datetime, attempt: int = 1) -> None:
    try:
        claimed = await here.wait_for_event(JobClaimed, job_id, predicate=lambda event: event.attempt == attempt)
    except TimeoutError:
        raise AssertionError(f"not claimed: {await here.describe_history(job_id)}") from None
    late = (datetime.now(UTC) - due).total_seconds()
    assert claimed is not None
    assert -0.2 < late < LATE_SECONDS, f"claimed {late:.2f} s after it was due"


@needs_faketime
@pytest.mark.parametrize("ahead", [HOUR, -HOUR], ids=["ahead", "behind"])
async def test_worker_with_wrong_clock_starts_jobs_and_retries_when_they_are_due(
    connection: Connection, store: Path, tmp_path: Path, ahead: int
) -> None:
    clock = SkewedClock(tmp_path, 0)
    async with run_roles_in_process(connection, store, projector=True) as here:
        with run_roles_subprocess(connection, store, "worker", env=clock.env) as worker:
            await worker.wait_until_started()
            clock.set_offset(ahead)
            due = datetime.now(UTC) + timedelta(seconds=1.5)
            job_id = await here.submit({"file": False}, not_before=due)
            await claimed_in_time(here, job_id, due)
            completed = await here.wait_for_event(JobCompleted, job_id)
            assert abs((completed.time - datetime.now(UTC)).total_seconds()) < LATE_SECONDS, "times of events"

            failing = await here.submit({"fail": "busy", "transient": True}, max_attempts=2)
            failed = await here.wait_for_event(JobAttemptFailed, failing)
            assert isinstance(failed.event, JobAttemptFailed)
            assert failed.event.retry_at is not None
            assert 0 < (failed.event.retry_at - failed.time).total_seconds() < LATE_SECONDS
            await claimed_in_time(here, failing, failed.event.retry_at, attempt=2)


async def test_clock_set_back_between_look_and_claim_leaves_no_job_behind(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ahead(self: ServerClock, client: Any) -> datetime:
        return self.estimate() + timedelta(seconds=1)

    monkeypatch.setattr(ServerClock, "now", ahead)  # workers look with this, and claim with `estimate`
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        due = datetime.now(UTC) + timedelta(seconds=0.8)
        job_id = await here.submit({"file": False}, not_before=due)
        await claimed_in_time(here, job_id, due)


@soak_only
@needs_faketime
@pytest.mark.parametrize("step", [HOUR, -HOUR], ids=["forward", "back"])
async def test_clock_set_while_a_job_waits_changes_nothing(
    connection: Connection, store: Path, tmp_path: Path, step: int
) -> None:
    clock = SkewedClock(tmp_path, 0)
    async with run_roles_in_process(connection, store, projector=True) as here:
        with run_roles_subprocess(connection, store, "worker", env=clock.env) as worker:
            await worker.wait_until_started()
            due = datetime.now(UTC) + timedelta(seconds=2.5)
            job_id = await here.submit({"file": False}, not_before=due)
            await here.wait_for_views()
            time.sleep(0.5)  # noqa: ASYNC251 - the worker has set its timer
            clock.set_offset(step)
            await claimed_in_time(here, job_id, due)
