"""SIGKILL for workers, job processes, the projector and mongod while jobs run: each job finishes by the rules.

`tests/support/history_check.py` contains the rules.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobledger.ledger.domain.commands import CancelJob
from jobledger.ledger.domain.errors import CommandRejected, LedgerUnavailable
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.embedded import EmbeddedServer
from jobledger.ledger.store.command_handler import DISPATCH_ACTOR
from tests.projections.expected_views import assert_views_match_log
from tests.support.history_check import check_history
from tests.support.installation import list_descendants
from tests.support.job_processes import list_job_processes
from tests.support.ledger_setup import load_event_documents
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import poll_until
from tests.support.role_runner import (
    TERMINAL_EVENT_TYPES,
    RolesSubprocess,
    RunningRoles,
    list_live_processes_in_session,
    run_roles_in_process,
    run_roles_subprocess,
)
from tests.support.slow_site import SlowSite, serve_site
from tests.support.soak_only import IS_SOAK_RUN

pytestmark = [needs_local_mongod, pytest.mark.timeout(180)]

LEASE_SECONDS = 2.0
WORKERS, SLOTS = 3, 5
INLINE, IN_JOB_PROCESSES, BATCH = (240, 60, 20) if IS_SOAK_RUN else (120, 30, 20)
MANY_ATTEMPTS, FEW_ATTEMPTS = 50, 2
WORKER, JOB, HELPER, PROJECTOR, MONGOD, CANCEL = "worker", "job", "helper", "projector", "mongod", "cancel"
FAULTS = [WORKER] * 4 + [JOB] * 4 + [HELPER] * 2 + [PROJECTOR] * 2 + [MONGOD] * 2 + [CANCEL] * 2
FAULTS *= 2 if IS_SOAK_RUN else 1
MAX_CLAIMS_BETWEEN_FAULTS = 8
FINISH_SECONDS = 90.0
SUBMIT_SECONDS = 15.0


@dataclass
class Cluster:
    """The processes that may be killed and are replaced at once, and the events that this process has read."""

    server: EmbeddedServer
    observer: RunningRoles
    stack: ExitStack
    workers: list[RolesSubprocess] = field(default_factory=list)
    projectors: list[RolesSubprocess] = field(default_factory=list)
    killed: list[RolesSubprocess] = field(default_factory=list)
    submitted: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    events: list[RecordedEvent] = field(default_factory=list)
    claims: int = 0

    @property
    def waiting(self) -> set[str]:
        return self.submitted - self.finished

    async def start(self, role: str) -> RolesSubprocess:
        connection, store = self.observer.connection, self.observer.store.root
        process = self.stack.enter_context(
            run_roles_subprocess(connection, store, role, lease_seconds=LEASE_SECONDS, slots=SLOTS)
        )
        await process.wait_until_started()
        return process

    async def follow(self) -> None:
        """Collect all events, also after outages of the database."""
        async with self.observer.event_store.subscribe(after=0) as events:
            while True:
                try:
                    chunk = await events.read_chunk()
                except LedgerUnavailable:
                    await asyncio.sleep(0.05)
                    continue
                self.events += chunk
                self.submitted |= {event.stream for event in chunk if event.type == "JobSubmitted"}
                self.claims += sum(event.type == "JobClaimed" for event in chunk)
                self.finished |= {event.stream for event in chunk if event.type in TERMINAL_EVENT_TYPES}

    async def wait_for_claims(self, count: int) -> None:
        """Wait for this number of claims, or until all jobs finished."""
        target = self.claims + count
        await poll_until(lambda: self.claims >= target or not self.waiting, f"{target} claims", seconds=FINISH_SECONDS)

    async def cause(self, fault: str) -> None:
        match fault:
            case "worker":
                await self.replace_random(self.workers, fault)
            case "projector":
                await self.replace_random(self.projectors, fault)
            case "job":
                await poll_until(
                    lambda: not self.waiting or any(map(list_job_processes, self.workers)), "a job process runs"
                )
                kill_random(pid for worker in self.workers for pid in list_job_processes(worker))
            case "helper":  # the fork server, the resource tracker of Python, or a job process
                kill_random(list_descendants(random.choice(self.workers).pid))
            case "mongod":
                os.kill(self.server.pid, signal.SIGKILL)
                await self.server.restart()  # it must run in the main thread, so `follow` pauses
            case "cancel":
                with suppress(LedgerUnavailable, CommandRejected):
                    await self.observer.handle_commands(random.choice(sorted(self.waiting)), CancelJob("user-1"))

    async def replace_random(self, processes: list[RolesSubprocess], role: str) -> None:
        victim = processes.pop(random.randrange(len(processes)))
        victim.send_signal(signal.SIGKILL)
        assert await victim.wait_for_exit() == -signal.SIGKILL, f"a {role} exited by itself"
        self.killed.append(victim)
        processes.append(await self.start(role))

    def errors(self, type_: str) -> Counter[str]:
        """Count the errors in all events of a type by code."""
        return Counter(event.data["error"]["code"] for event in self.events if event.type == type_)


def kill_random(pids: Iterable[int]) -> None:
    if candidates := sorted(pids):
        with suppress(ProcessLookupError):  # it exited meanwhile
            os.kill(random.choice(candidates), signal.SIGKILL)


@asynccontextmanager
async def run_cluster(server: EmbeddedServer, store: Path) -> AsyncIterator[Cluster]:
    with ExitStack() as stack:
        async with run_roles_in_process(Connection(server.uri, "test"), store, dispatches=True) as observer:
            cluster = Cluster(server, observer, stack)
            following = asyncio.create_task(cluster.follow())
            try:
                cluster.projectors.append(await cluster.start(PROJECTOR))
                cluster.workers += [await cluster.start(WORKER) for _ in range(WORKERS)]
                yield cluster
            finally:
                following.cancel()
                with suppress(asyncio.CancelledError):
                    await following


async def submit_jobs(observer: RunningRoles, site: SlowSite) -> None:
    """Submit inline jobs and jobs in processes in random order, some in batches, and some only later."""

    def echo_parameters() -> dict[str, float]:
        return {"seconds": random.uniform(0, 1.5)}

    def choose_max_attempts() -> int:
        return random.choices([MANY_ATTEMPTS, FEW_ATTEMPTS], [9, 1])[0]

    async def submit_later() -> str:
        """Submit a job when free workers may wait for jobs, so that it is claimed for one of them."""
        await asyncio.sleep(random.uniform(0, SUBMIT_SECONDS))
        return await observer.submit(echo_parameters(), max_attempts=choose_max_attempts())

    jobs = [submit_later() for _ in range(INLINE // 2)]
    jobs += [
        observer.submit(site.job_parameters(f"/talk-{number}"), job_type="session", max_attempts=choose_max_attempts())
        for number in range(IN_JOB_PROCESSES)
    ]
    random.shuffle(jobs)
    batches = [
        observer.submit_batch(*(echo_parameters() for _ in range(BATCH)), max_attempts=MANY_ATTEMPTS)
        for _ in range(INLINE // 2 // BATCH)
    ]
    await asyncio.gather(*jobs, *batches)


async def test_killed_processes_let_each_job_finish_without_overlapping_attempts(tmp_path: Path) -> None:
    async def pause(path: str) -> None:
        await asyncio.sleep(random.uniform(0.1, 1))

    with EmbeddedServer.start(tmp_path / "data", oplog_mb=256) as server:
        async with serve_site(SlowSite(pause)) as site, run_cluster(server, tmp_path / "results") as cluster:
            submitting = asyncio.create_task(submit_jobs(cluster.observer, site))
            await poll_until(lambda: cluster.waiting, "the first jobs are submitted")
            for fault in random.sample(FAULTS, len(FAULTS)):
                await cluster.wait_for_claims(random.randint(1, MAX_CLAIMS_BETWEEN_FAULTS))
                if cluster.waiting:
                    await cluster.cause(fault)
            await submitting
            await poll_until(lambda: len(cluster.submitted) == INLINE + IN_JOB_PROCESSES, "all jobs are submitted")
            await poll_until(lambda: not cluster.waiting, "each job finished", seconds=FINISH_SECONDS)

            documents = await load_event_documents(cluster.observer.db)
            check_history(documents, all_finished=True)
            jobs_with_few_attempts = {
                document["stream"] for document in documents if document["data"].get("max_attempts") == FEW_ATTEMPTS
            }
            failed = {document["stream"] for document in documents if document["type"] == "JobFailed"}
            assert failed <= jobs_with_few_attempts, "a job failed too early"
            await assert_views_match_log(cluster.observer)

            for role in cluster.workers + cluster.projectors:
                assert role.process.poll() is None, "a process exited by itself"
            await poll_until(
                lambda: not any(list_live_processes_in_session(role.pid) for role in cluster.killed),
                "no descendant of a killed process remains",
            )
            assert sum(event.type == "JobLeaseExpired" for event in cluster.events) > WORKERS, (
                "no worker was killed while it ran jobs"
            )
            assert any(event.type == "JobClaimed" and event.meta.actor == DISPATCH_ACTOR for event in cluster.events), (
                "no job was claimed for a worker when it was submitted"
            )
            assert cluster.errors("JobAttemptFailed")["PROCESS_KILLED"] > 0, (
                "no job process was killed while it ran a job"
            )
