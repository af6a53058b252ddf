"""kill -9 on workers, over and over, while they work: every job ends, and no two attempts at it ever overlap."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from ledger.events import (
    JobAttemptFailed,
    JobCancelled,
    JobClaimed,
    JobCompleted,
    JobFailed,
    JobLeaseExpired,
    JobReleased,
    Recorded,
)
from ledger.mongo import Connection
from tests.projections.refold import assert_views_equal_the_log
from tests.support.running import RealProcess, process, real_process

LEASE_SECONDS = 1.0
WORKERS, KILLS, JOBS = 3, 6, 40
FREES = (JobAttemptFailed, JobLeaseExpired, JobReleased)
ENDS = (JobCompleted, JobFailed, JobCancelled)


def overlaps(history: Sequence[Recorded]) -> list[str]:
    """Tell what is wrong with a job's history: attempts that overlap, ends without a beginning."""
    wrong, live, before, expired = [], None, 0, False
    for event in history:
        happened = event.event
        if isinstance(happened, JobClaimed):
            if live is not None:
                wrong.append(f"{event.position}: attempt {happened.attempt} begins while {live} lives")
            if happened.attempt != before + 1:
                wrong.append(f"{event.position}: attempt {happened.attempt} follows {before}")
            live = before = happened.attempt
        elif isinstance(happened, FREES + ENDS):
            attempt = getattr(happened, "attempt", live)
            # A lease that has expired for the last time is followed by the job's failure, in the same transaction.
            if not (expired and isinstance(happened, JobFailed)) and (live is None or attempt != live):
                wrong.append(f"{event.position}: {event.type} of attempt {attempt} while {live} lives")
            live = None
        expired = isinstance(happened, JobLeaseExpired)
    return wrong


@pytest.mark.timeout(180)
async def test_every_job_ends_and_no_two_attempts_overlap(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    dice = random.Random(20)
    connection, store = Connection(mongodb_uri, db_name), tmp_path / "results"
    with ExitStack() as stack:

        def start() -> RealProcess:
            return stack.enter_context(real_process(connection, store, "worker", lease_seconds=LEASE_SECONDS, slots=4))

        async with process(connection, store, projector=True) as here:
            workers = [start() for _ in range(WORKERS)]
            await asyncio.gather(*(worker.started() for worker in workers))
            job_ids = [await here.submit({"seconds": dice.uniform(0.2, 2)}, max_attempts=50) for _ in range(JOBS)]
            position = 0
            for _ in range(KILLS):
                # Whenever some more jobs have been claimed, the worker that claimed last is killed, or another.
                for _ in range(dice.randrange(1, 6)):
                    position = (await here.heard(JobClaimed, after=position)).position
                victim = workers.pop(dice.randrange(len(workers)))
                victim.send(signal.SIGKILL)
                await victim.gone()
                workers.append(start())
                await workers[-1].started()
            await here.ended(*job_ids, seconds=60)

            lost = 0
            for job_id in job_ids:
                history = await here.log.read_stream(job_id)
                assert overlaps(history) == []
                assert isinstance(history[-1].event, JobCompleted), [event.type for event in history]
                lost += sum(isinstance(event.event, JobLeaseExpired) for event in history)
            assert lost > 0, "nobody was killed at work: the test shows nothing"
            await assert_views_equal_the_log(here)
