"""Tests of the lifetime of job processes: a crash, a hang or a cancellation ends the process, and never the worker."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from jobledger.ledger.domain.commands import CancelJob
from jobledger.ledger.domain.events import JobAttemptFailed, JobClaimed
from jobledger.ledger.mongo.connection import Connection
from jobledger.workers.sandbox import runner
from tests.processors.session.fixtures import CONFERENCE_PAGE, SiteResponse, html, serve_site
from tests.support.installation import has_exited
from tests.support.job_processes import list_own_job_processes
from tests.support.polling import poll_until
from tests.support.role_runner import (
    RunningRoles,
    WorkerOptions,
    list_live_processes_in_session,
    run_roles_in_process,
    run_roles_subprocess,
)
from tests.support.slow_site import SlowSite
from tests.support.slow_site import serve_site as serve_slow_site
from tests.support.suspension import suspend

EXIT_SECONDS = 15.0
"""Within this time a job process ends. It is less than any timeout that would end the process anyway."""


async def wait_forever(_path: str) -> None:
    await asyncio.Event().wait()


@pytest.fixture
async def site() -> AsyncIterator[SlowSite]:
    """A website that never responds, so that a job process that requests a page stays at work."""
    async with serve_slow_site(SlowSite(wait_forever)) as running:
        yield running


@pytest.fixture
async def roles(connection: Connection, store: Path) -> AsyncIterator[RunningRoles]:
    options = WorkerOptions(
        max_concurrent=2, shutdown_grace_seconds=0.2, processors={"session": {"allowed_private_hosts": ["127.0.0.1"]}}
    )
    async with run_roles_in_process(connection, store, projector=True, worker=options) as running:
        yield running


async def wait_for_request(site: SlowSite) -> None:
    async with asyncio.timeout(60):  # the first job process waits for the fork server
        await site.requested_paths.get()


async def wait_for_job_process(site: SlowSite) -> int:
    """Wait until a job process requests the page. Return its process ID."""
    await wait_for_request(site)
    (pid,) = list_own_job_processes()
    return pid


async def test_error_of_job_process_is_recorded(roles: RunningRoles, site: SlowSite) -> None:
    unreachable = {**site.job_parameters(), "url": "http://127.0.0.1:1/talk"}
    job_id = await roles.submit(unreachable, job_type="session", max_attempts=2)
    job = await roles.wait_until_finished(job_id)
    assert (job["status"], job["attempt"], job["retries"]) == ("failed", 2, 1)
    assert job["error"]["code"] not in ("PROCESS_DIED", "PROCESS_KILLED", "PROCESSOR_FAULT", "WORKER_FAULT")
    assert job["error"]["details"]["retryable"] is True
    await poll_until(lambda: not list_own_job_processes(), "the job processes have exited")


async def test_killed_job_process_fails_its_attempt_and_job_is_retried(roles: RunningRoles, site: SlowSite) -> None:
    job_id = await roles.submit(site.job_parameters(), job_type="session")
    pid = await wait_for_job_process(site)
    os.kill(pid, signal.SIGKILL)
    failed = await roles.wait_for_event(JobAttemptFailed, job_id, seconds=EXIT_SECONDS)
    assert isinstance(failed.event, JobAttemptFailed)
    assert failed.event.error.code == "PROCESS_KILLED"
    assert "SIGKILL" in failed.event.error.message
    assert failed.event.error.details == {"signal": "SIGKILL", "retryable": True}
    assert await wait_for_job_process(site) != pid
    assert (await roles.wait_for_event(JobClaimed, job_id, after=failed.position)).event.model_dump()["attempt"] == 2
    await roles.handle_commands(job_id, CancelJob("user-1"))
    await roles.wait_until_finished(job_id)


async def test_job_process_over_its_time_limit_is_killed(roles: RunningRoles, site: SlowSite) -> None:
    job_id = await roles.submit(site.job_parameters(), job_type="session", timeout_s=6, max_attempts=1)
    pid = await wait_for_job_process(site)
    job = await roles.wait_until_finished(job_id, seconds=6 + EXIT_SECONDS)
    assert (job["status"], job["error"]["code"]) == ("failed", "TIMEOUT")
    assert "6 seconds" in job["error"]["message"]
    await poll_until(lambda: has_exited(pid), "the job process has exited", seconds=EXIT_SECONDS)


async def test_cancelled_job_process_is_killed(roles: RunningRoles, site: SlowSite) -> None:
    job_id = await roles.submit(site.job_parameters(), job_type="session")
    pid = await wait_for_job_process(site)
    await roles.handle_commands(job_id, CancelJob("user-1", "no need"))
    await poll_until(lambda: has_exited(pid), "the job process has exited", seconds=EXIT_SECONDS)
    assert (await roles.wait_until_finished(job_id))["status"] == "cancelled"
    assert list_own_job_processes() == []


def list_processes_of(program: Path) -> list[int]:
    """Return the processes that run a program, and those that run its sandbox."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(program).encode() in path.read_bytes() and not has_exited(int(path.parent.name)):
                pids.append(int(path.parent.name))
    return pids


@pytest.mark.skipif(not runner.is_available(), reason="install bubblewrap: apt-get install bubblewrap")
@pytest.mark.parametrize("end", ["cancelled", "killed"])
async def test_programs_of_a_processor_end_with_its_job_process(
    end: str, connection: Connection, store: Path, tmp_path: Path
) -> None:
    program = tmp_path / "soffice"
    program.write_text("#!/bin/sh\nsleep 1000 &\nwait\n")
    program.chmod(0o755)
    settings = {"allowed_private_hosts": ["127.0.0.1"], "libreoffice_command": str(program)}
    options = WorkerOptions(processors={"session": settings})
    with serve_site() as conference:
        async with run_roles_in_process(connection, store, projector=True, worker=options) as roles:
            parameters = {
                **SlowSite(wait_forever).job_parameters(),
                "url": conference.put("/talk", html(CONFERENCE_PAGE)),
                "attachments_url": conference.put("/deck.ppt", SiteResponse(b"\xd0\xcf\x11\xe0")),
            }
            job_id = await roles.submit(parameters, job_type="session", max_attempts=1)
            await poll_until(lambda: len(list_processes_of(program)) >= 2, "the program runs in its sandbox")
            (pid,) = list_own_job_processes()
            if end == "cancelled":
                await roles.handle_commands(job_id, CancelJob("user-1"))
            else:
                os.kill(pid, signal.SIGKILL)
            await poll_until(lambda: list_processes_of(program) == [], "the program has exited", seconds=EXIT_SECONDS)
            assert (await roles.wait_until_finished(job_id))["status"] == {
                "cancelled": "cancelled",
                "killed": "failed",
            }[end]


async def test_cancelled_job_process_is_killed_when_stopped_by_sigstop(roles: RunningRoles, site: SlowSite) -> None:
    job_id = await roles.submit(site.job_parameters(), job_type="session")
    pid = await wait_for_job_process(site)
    suspend(pid)
    await roles.handle_commands(job_id, CancelJob("user-1"))
    await poll_until(lambda: has_exited(pid), "the job process has exited", seconds=EXIT_SECONDS)
    assert (await roles.wait_until_finished(job_id))["status"] == "cancelled"


async def test_job_cancelled_during_process_start_leaves_no_process(roles: RunningRoles, site: SlowSite) -> None:
    job_ids = [await roles.submit(site.job_parameters(), job_type="session") for _ in range(2)]
    for job_id in job_ids:
        await roles.wait_for_event(JobClaimed, job_id)
        await roles.handle_commands(job_id, CancelJob("user-1"))
    await roles.wait_until_finished(*job_ids)
    await poll_until(lambda: not list_own_job_processes(), "the job processes have exited")


@pytest.mark.parametrize("recipients", ["worker", "whole session"])
async def test_worker_on_sigterm_releases_its_job_and_leaves_no_process(
    connection: Connection, store: Path, site: SlowSite, recipients: str
) -> None:
    """A service manager sends the signal to every process of a service."""
    async with run_roles_in_process(connection, store, projector=True) as roles:
        job_id = await roles.submit(site.job_parameters(), job_type="session", max_attempts=1)
        with run_roles_subprocess(connection, store, "worker", shutdown_grace_seconds=1) as worker:
            await worker.wait_until_started()
            await wait_for_request(site)
            assert len(list_live_processes_in_session(worker.pid)) >= 3, "a worker, a fork server, a job process"
            if recipients == "worker":
                worker.send_signal(signal.SIGTERM)
            else:
                for pid in list_live_processes_in_session(worker.pid):
                    os.kill(pid, signal.SIGTERM)
            assert await worker.wait_for_exit() == 0
            await poll_until(
                lambda: list_live_processes_in_session(worker.pid) == [],
                "all processes have exited",
                seconds=EXIT_SECONDS,
            )
        history = [event for event in await roles.read_event_types(job_id) if event != "JobProgressed"]
        assert history == ["JobSubmitted", "JobClaimed", "JobReleased"]


async def test_killed_worker_leaves_no_process(connection: Connection, store: Path, site: SlowSite) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        job_id = await roles.submit(site.job_parameters(), job_type="session", max_attempts=1)
        with run_roles_subprocess(connection, store, "worker") as worker:
            await worker.wait_until_started()
            await wait_for_request(site)
            worker.send_signal(signal.SIGKILL)
            await poll_until(
                lambda: list_live_processes_in_session(worker.pid) == [],
                "all processes have exited",
                seconds=EXIT_SECONDS,
            )
        history = [event for event in await roles.read_event_types(job_id) if event != "JobProgressed"]
        assert history == ["JobSubmitted", "JobClaimed"]
