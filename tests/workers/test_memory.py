"""The memory limit of child processes: a job that takes too much of it fails, and takes nobody along."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from jobledger.ledger.mongo.connection import Connection
from tests.support.role_runner import WorkerOptions, run_roles_in_process
from tests.support.slow_site import HEAD, SlowSite, serve_site

LIMIT_MB = 700  # a child with the session processor loaded takes about half of it, most of that never touched
OPTIONS = WorkerOptions(
    memory_limit_mb=LIMIT_MB,
    processors={"session": {"allowed_private_hosts": ["127.0.0.1"], "page_max_bytes": 10 * LIMIT_MB * 2**20}},
)
PARAGRAPH = b"<p>" + b"What was said there. " * 50_000 + b"</p>"


class GreatSite(SlowSite):
    """Has a page as large as the number in its path, in megabytes."""

    async def write_response(self, path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for _ in range(int(path.strip("/"))):
            writer.write(PARAGRAPH)
            await writer.drain()


async def no_pause(path: str) -> None:
    """Answer at once."""


CANNOT_BE_READ, CANNOT_BE_RECEIVED = 200, 2 * LIMIT_MB


@pytest.mark.parametrize("megabytes", [CANNOT_BE_READ, CANNOT_BE_RECEIVED])
async def test_a_job_that_needs_too_much_memory_fails_and_the_worker_goes_on(
    connection: Connection, store: Path, megabytes: int
) -> None:
    async with (
        serve_site(GreatSite(no_pause)) as site,
        run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as here,
    ):
        small, large, behind = [
            await here.submit(site.job_parameters(f"/{size}"), job_type="session", max_attempts=2)
            for size in (1, megabytes, 1)
        ]
        await here.wait_until_finished(small, large, behind)
        assert [(await here.load_job(job_id))["status"] for job_id in (small, large, behind)] == [
            "completed",
            "failed",
            "completed",
        ]
        # Received piece by piece, it may run out of memory anywhere, even where asyncio takes that for a broken
        # connection: then the job is said to have failed for another reason.
        if megabytes == CANNOT_BE_READ:
            failed = (await here.load_job(large))["error"]["code"]
            assert failed in ("OUT_OF_MEMORY", "PROCESS_KILLED", "PROCESS_DIED")
        assert (await here.wait_until_finished(await here.submit()))["status"] == "completed"
