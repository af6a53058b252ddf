"""Child processes: a crash, a hang or a cancellation ends the child and never the worker, and none is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import CancelJob
from jobledger.ledger.domain.events import JobAttemptFailed, JobClaimed
from jobledger.ledger.mongo.connection import Connection
from jobledger.workers.sandbox import runner
from tests.processors.session.fixtures import CONFERENCE_PAGE, SiteResponse, html, serve_site
from tests.support.job_processes import has_exited, list_own_job_processes
from tests.support.role_runner import (
    RunningRoles,
    WorkerOptions,
    list_live_processes_in_session,
    poll_until,
    run_roles_in_process,
    run_roles_subprocess,
)


class SilentSite:
    """Accepts every question and answers none: whoever asks is a child at work, and stays one."""

    def __init__(self) -> None:
        self.asked = asyncio.Queue[None]()
        self.port = 0

    def job(self) -> dict[str, Any]:
        return {
            "event": "A conference",
            "session": "A talk",
            "url": f"http://127.0.0.1:{self.port}/talk",
            "filename": "talk.md",
            "track": "A track",
        }

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        self.asked.put_nowait(None)
        await reader.read()
        writer.close()


@pytest.fixture
async def site() -> AsyncIterator[SilentSite]:
    silent = SilentSite()
    server = await asyncio.start_server(silent.answer, "127.0.0.1", 0)
    silent.port = server.sockets[0].getsockname()[1]
    yield silent
    server.close()


@pytest.fixture
async def here(connection: Connection, store: Path) -> AsyncIterator[RunningRoles]:
    options = WorkerOptions(
        slots=2, shutdown_grace_seconds=0.2, processors={"session": {"allowed_private_hosts": ["127.0.0.1"]}}
    )
    async with run_roles_in_process(connection, store, projector=True, worker=options) as running:
        yield running


async def at_work(site: SilentSite) -> int:
    """Wait until a child is in the middle of its work; return its pid."""
    async with asyncio.timeout(30):  # the first child waits for the server process
        await site.asked.get()
    (child,) = list_own_job_processes()
    return child


async def test_what_a_child_says_reaches_the_log(here: RunningRoles, site: SilentSite) -> None:
    unreachable = {**site.job(), "url": "http://127.0.0.1:1/talk"}
    job_id = await here.submit(unreachable, job_type="session", max_attempts=2)
    job = await here.wait_until_finished(job_id, seconds=40)
    assert (job["status"], job["attempt"], job["retries"]) == ("failed", 2, 1)
    assert job["error"]["code"] not in ("PROCESS_DIED", "PROCESS_KILLED", "PROCESSOR_FAULT", "WORKER_FAULT")
    assert job["error"]["details"]["retryable"] is True
    await poll_until(lambda: not list_own_job_processes(), "the children have ended")


async def test_a_killed_child_fails_its_attempt_which_is_repeated(here: RunningRoles, site: SilentSite) -> None:
    job_id = await here.submit(site.job(), job_type="session")
    pid = await at_work(site)
    os.kill(pid, signal.SIGKILL)
    failed = await here.wait_for_event(JobAttemptFailed, job_id, seconds=10)
    assert isinstance(failed.event, JobAttemptFailed)
    assert failed.event.error.code == "PROCESS_KILLED"
    assert "SIGKILL" in failed.event.error.message
    assert failed.event.error.details == {"signal": "SIGKILL", "retryable": True}
    assert await at_work(site) != pid
    assert (await here.wait_for_event(JobClaimed, job_id, after=failed.position)).event.model_dump()["attempt"] == 2
    await here.handle_commands(job_id, CancelJob("user-1"))
    await here.wait_until_finished(job_id)


async def test_a_child_that_takes_too_long_is_killed(here: RunningRoles, site: SilentSite) -> None:
    job_id = await here.submit(site.job(), job_type="session", timeout_s=3, max_attempts=1)
    pid = await at_work(site)
    job = await here.wait_until_finished(job_id, seconds=6)
    assert (job["status"], job["error"]["code"]) == ("failed", "TIMEOUT")
    assert "3 seconds" in job["error"]["message"]
    await poll_until(lambda: has_exited(pid), "the child is gone", seconds=2)


async def test_cancelling_a_job_kills_its_child_within_two_seconds(here: RunningRoles, site: SilentSite) -> None:
    job_id = await here.submit(site.job(), job_type="session")
    pid = await at_work(site)
    await here.handle_commands(job_id, CancelJob("user-1", "no need"))
    await poll_until(lambda: has_exited(pid), "the child is gone", seconds=2)
    assert (await here.wait_until_finished(job_id))["status"] == "cancelled"
    assert list_own_job_processes() == []


def processes_of(program: Path) -> list[int]:
    """Return the processes that run a program, and those that run its sandbox."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(program).encode() in path.read_bytes() and not has_exited(int(path.parent.name)):
                found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not runner.is_available(), reason="needs Landlock, or bubblewrap (apt install bubblewrap)")
@pytest.mark.parametrize("end", ["cancelled", "killed"])
async def test_programs_that_a_processor_has_started_end_with_its_child(
    end: str, connection: Connection, store: Path, tmp_path: Path
) -> None:
    program = tmp_path / "soffice"
    program.write_text("#!/bin/sh\nsleep 1000 &\nwait\n")
    program.chmod(0o755)
    settings = {"allowed_private_hosts": ["127.0.0.1"], "libreoffice_command": str(program)}
    options = WorkerOptions(processors={"session": settings})
    with serve_site() as conference:
        async with run_roles_in_process(connection, store, projector=True, worker=options) as here:
            asked = {
                **SilentSite().job(),
                "url": conference.put("/talk", html(CONFERENCE_PAGE)),
                "attachments_url": conference.put("/deck.ppt", SiteResponse(b"\xd0\xcf\x11\xe0")),
            }
            job_id = await here.submit(asked, job_type="session", max_attempts=1)
            await poll_until(lambda: len(processes_of(program)) >= 2, "the program runs in its sandbox", seconds=30)
            (child,) = list_own_job_processes()
            if end == "cancelled":
                await here.handle_commands(job_id, CancelJob("user-1"))
            else:
                os.kill(child, signal.SIGKILL)
            await poll_until(lambda: processes_of(program) == [], "the program is gone", seconds=2)
            assert (await here.wait_until_finished(job_id))["status"] == {"cancelled": "cancelled", "killed": "failed"}[
                end
            ]


async def test_a_frozen_child_is_killed_all_the_same(here: RunningRoles, site: SilentSite) -> None:
    job_id = await here.submit(site.job(), job_type="session")
    pid = await at_work(site)
    os.kill(pid, signal.SIGSTOP)
    await here.handle_commands(job_id, CancelJob("user-1"))
    await poll_until(lambda: has_exited(pid), "the child is gone", seconds=2)
    assert (await here.wait_until_finished(job_id))["status"] == "cancelled"


async def test_a_job_cancelled_while_its_child_is_being_started_leaves_no_child(
    here: RunningRoles, site: SilentSite
) -> None:
    job_ids = [await here.submit(site.job(), job_type="session") for _ in range(2)]
    for job_id in job_ids:
        await here.wait_for_event(JobClaimed, job_id)
        await here.handle_commands(job_id, CancelJob("user-1"))
    await here.wait_until_finished(*job_ids)
    await poll_until(lambda: not list_own_job_processes(), "the children have ended")


@pytest.mark.parametrize("whom", ["the worker", "the whole group"])
async def test_a_worker_that_is_told_to_stop_gives_its_job_back_and_leaves_no_process(
    connection: Connection, store: Path, site: SilentSite, whom: str
) -> None:
    """A service manager tells every process of a service to stop, not only the first."""
    async with run_roles_in_process(connection, store, projector=True) as here:
        job_id = await here.submit(site.job(), job_type="session", max_attempts=1)
        with run_roles_subprocess(connection, store, "worker", shutdown_grace_seconds=1) as worker:
            await worker.wait_until_started()
            async with asyncio.timeout(30):
                await site.asked.get()
            assert len(list_live_processes_in_session(worker.pid)) >= 3, "a worker, a server process, a child"
            if whom == "the worker":
                worker.send_signal(signal.SIGTERM)
            else:
                for pid in list_live_processes_in_session(worker.pid):
                    os.kill(pid, signal.SIGTERM)
            assert await worker.wait_for_exit() == 0
            await poll_until(lambda: list_live_processes_in_session(worker.pid) == [], "nothing is left", seconds=5)
        history = [event for event in await here.read_event_types(job_id) if event != "JobProgressed"]
        assert history == ["JobSubmitted", "JobClaimed", "JobReleased"]


async def test_a_killed_worker_takes_its_children_with_it(
    connection: Connection, store: Path, site: SilentSite
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        job_id = await here.submit(site.job(), job_type="session", max_attempts=1)
        with run_roles_subprocess(connection, store, "worker", lease_seconds=2) as worker:
            await worker.wait_until_started()
            async with asyncio.timeout(30):
                await site.asked.get()
            worker.send_signal(signal.SIGKILL)
            await poll_until(lambda: list_live_processes_in_session(worker.pid) == [], "nothing is left", seconds=5)
        history = [event for event in await here.read_event_types(job_id) if event != "JobProgressed"]
        assert history == ["JobSubmitted", "JobClaimed"]
