"""Tests of the memory limit of job processes: a job that exceeds it fails, and no other job does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from jobledger.ledger.mongo.connection import Connection
from tests.support.role_runner import WorkerOptions, run_roles_in_process
from tests.support.slow_site import HEAD, SlowSite, serve_site

LIMIT_MB = 700  # a job process with the session processor maps about half of it, and touches little of that
OPTIONS = WorkerOptions(
    memory_limit_mb=LIMIT_MB,
    processors={"session": {"allowed_private_hosts": ["127.0.0.1"], "page_max_bytes": 10 * LIMIT_MB * 2**20}},
)
PARAGRAPH = b"<p>" + b"The text of a talk.  " * 50_000 + b"</p>"


class LargeSite(SlowSite):
    """Returns a page whose size in megabytes is the number in its path."""

    async def write_response(self, path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for _ in range(int(path.strip("/"))):
            writer.write(PARAGRAPH)
            await writer.drain()


async def respond_at_once(path: str) -> None:
    """Respond without a pause."""


TOO_LARGE_TO_PARSE, TOO_LARGE_TO_RECEIVE = 200, 2 * LIMIT_MB


@pytest.mark.parametrize("megabytes", [TOO_LARGE_TO_PARSE, TOO_LARGE_TO_RECEIVE])
async def test_job_over_its_memory_limit_fails_and_worker_continues(
    connection: Connection, store: Path, megabytes: int
) -> None:
    async with (
        serve_site(LargeSite(respond_at_once)) as site,
        run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles,
    ):
        small, large, next_small = [
            await roles.submit(site.job_parameters(f"/{size}"), job_type="session", max_attempts=2)
            for size in (1, megabytes, 1)
        ]
        await roles.wait_until_finished(small, large, next_small)
        assert [(await roles.load_job(job_id))["status"] for job_id in (small, large, next_small)] == [
            "completed",
            "failed",
            "completed",
        ]
        # While it receives a page, it may run out of memory anywhere. asyncio may take that for a broken connection,
        # and then the job fails with another error.
        if megabytes == TOO_LARGE_TO_PARSE:
            code = (await roles.load_job(large))["error"]["code"]
            assert code in ("OUT_OF_MEMORY", "PROCESS_KILLED", "PROCESS_DIED")
        assert (await roles.wait_until_finished(await roles.submit()))["status"] == "completed"
