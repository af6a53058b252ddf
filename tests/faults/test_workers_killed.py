"""kill -9 on workers, their children, the projector and mongod while jobs are done: every job ends, and in good order.

What "in good order" means is in `tests/support/history_check.py`.
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
from threading import Thread

import pytest

from jobledger.ledger.domain.commands import CancelJob
from jobledger.ledger.domain.errors import CommandRejected, LedgerUnavailable
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.embedded import EmbeddedServer
from tests.projections.expected_views import assert_views_match_log
from tests.support.history_check import check_history
from tests.support.installation import list_descendants
from tests.support.job_processes import list_job_processes
from tests.support.ledger_setup import load_event_documents
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.role_runner import (
    TERMINAL_EVENT_TYPES,
    RolesSubprocess,
    RunningRoles,
    list_live_processes_in_session,
    poll_until,
    run_roles_in_process,
    run_roles_subprocess,
)
from tests.support.slow_site import SlowSite, serve_site
from tests.support.soak_only import IS_SOAK_RUN

pytestmark = [needs_local_mongod, pytest.mark.timeout(180)]

LEASE_SECONDS = 2.0
WORKERS, SLOTS = 3, 5
INLINE, IN_CHILDREN, BATCH = (240, 60, 20) if IS_SOAK_RUN else (120, 30, 20)
MANY_ATTEMPTS, FEW_ATTEMPTS = 50, 2
WORKER, JOB, HELPER, PROJECTOR, MONGOD, WISH = "worker", "job", "helper", "projector", "mongod", "wish"
FAULTS = [WORKER] * 4 + [JOB] * 4 + [HELPER] * 2 + [PROJECTOR] * 2 + [MONGOD] * 2 + [WISH] * 2
FAULTS *= 2 if IS_SOAK_RUN else 1
BETWEEN_FAULTS = 8  # claims, at most
DEADLINE_SECONDS = 90.0


@dataclass
class Stage:
    """Everything that may be killed, started again at once; and what this process, which only watches, has seen."""

    server: EmbeddedServer
    here: RunningRoles
    stack: ExitStack
    workers: list[RolesSubprocess] = field(default_factory=list)
    projectors: list[RolesSubprocess] = field(default_factory=list)
    killed: list[RolesSubprocess] = field(default_factory=list)
    submitted: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    seen: list[RecordedEvent] = field(default_factory=list)
    claims: int = 0

    @property
    def waiting(self) -> set[str]:
        return self.submitted - self.ended

    async def start(self, role: str) -> RolesSubprocess:
        connection, store = self.here.connection, self.here.store.root
        real = self.stack.enter_context(
            run_roles_subprocess(connection, store, role, lease_seconds=LEASE_SECONDS, slots=SLOTS)
        )
        await real.wait_until_started()
        assert real.process.stdout is not None
        # What it has to say of a database that is away would fill the pipe some time, and then it would stand still.
        Thread(target=real.process.stdout.read, daemon=True).start()
        return real

    async def follow(self) -> None:
        """Take in everything that happens, whether or not the database is there."""
        async with self.here.event_store.subscribe(after=0) as events:
            while True:
                try:
                    chunk = await events.next_chunk()
                except LedgerUnavailable:
                    await asyncio.sleep(0.05)
                    continue
                self.seen += chunk
                self.claims += sum(event.type == "JobClaimed" for event in chunk)
                self.ended |= {event.stream for event in chunk if event.type in TERMINAL_EVENT_TYPES}

    async def claimed_again(self, times: int) -> None:
        """Wait until jobs have been claimed so many times more, or all of them have ended."""
        enough = self.claims + times
        await poll_until(
            lambda: self.claims >= enough or not self.waiting, f"{enough} claims", seconds=DEADLINE_SECONDS
        )

    async def befall(self, fault: str) -> None:
        match fault:
            case "worker":
                await self.replace_one_of(self.workers, fault)
            case "projector":
                await self.replace_one_of(self.projectors, fault)
            case "job":
                await poll_until(
                    lambda: not self.waiting or any(map(list_job_processes, self.workers)), "a job runs in a child"
                )
                kill_one_of(pid for worker in self.workers for pid in list_job_processes(worker))
            case "helper":  # the server process that forks children, or Python's own that clears up; or a job again
                kill_one_of(list_descendants(random.choice(self.workers).pid))
            case "mongod":
                os.kill(self.server.pid, signal.SIGKILL)
                await self.server.restart()  # in the main thread, as it has to be: we do not watch meanwhile
            case "wish":
                with suppress(LedgerUnavailable, CommandRejected):
                    await self.here.handle_commands(random.choice(sorted(self.waiting)), CancelJob("user-1"))

    async def replace_one_of(self, processes: list[RolesSubprocess], role: str) -> None:
        victim = processes.pop(random.randrange(len(processes)))
        victim.send_signal(signal.SIGKILL)
        assert await victim.wait_for_exit() == -signal.SIGKILL, f"a {role} has ended by itself"
        self.killed.append(victim)
        processes.append(await self.start(role))

    def errors(self, type_: str) -> Counter[str]:
        """Count, by their codes, the errors in all events of a type."""
        return Counter(event.data["error"]["code"] for event in self.seen if event.type == type_)


def kill_one_of(pids: Iterable[int]) -> None:
    if there := sorted(pids):
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(random.choice(there), signal.SIGKILL)


@asynccontextmanager
async def stage_on(server: EmbeddedServer, store: Path) -> AsyncIterator[Stage]:
    with ExitStack() as stack:
        async with run_roles_in_process(Connection(server.uri, "test"), store) as here:
            stage = Stage(server, here, stack)
            following = asyncio.create_task(stage.follow())
            try:
                stage.projectors.append(await stage.start(PROJECTOR))
                stage.workers += [await stage.start(WORKER) for _ in range(WORKERS)]
                yield stage
            finally:
                following.cancel()
                with suppress(asyncio.CancelledError):
                    await following


async def submit(here: RunningRoles, site: SlowSite) -> set[str]:
    """Submit jobs of both kinds in any order, some of them in batches; return their ids."""

    def echo() -> dict[str, float]:
        return {"seconds": random.uniform(0, 1.5)}

    def attempts() -> int:
        return random.choices([MANY_ATTEMPTS, FEW_ATTEMPTS], [9, 1])[0]

    jobs = [here.submit(echo(), max_attempts=attempts()) for _ in range(INLINE // 2)]
    jobs += [
        here.submit(site.job_parameters(f"/talk-{number}"), job_type="session", max_attempts=attempts())
        for number in range(IN_CHILDREN)
    ]
    random.shuffle(jobs)
    batches = [
        here.submit_batch(*(echo() for _ in range(BATCH)), max_attempts=MANY_ATTEMPTS)
        for _ in range(INLINE // 2 // BATCH)
    ]
    submitted = set(await asyncio.gather(*jobs))
    for _, job_ids in await asyncio.gather(*batches):
        submitted.update(job_ids)
    assert len(submitted) == INLINE + IN_CHILDREN
    return submitted


async def test_whatever_is_killed_every_job_ends_and_no_two_attempts_overlap(tmp_path: Path) -> None:
    async def pause(path: str) -> None:
        await asyncio.sleep(random.uniform(0.1, 1))

    with EmbeddedServer.start(tmp_path / "data", oplog_mb=256) as server:
        async with serve_site(SlowSite(pause)) as site, stage_on(server, tmp_path / "results") as stage:
            stage.submitted = await submit(stage.here, site)
            for fault in random.sample(FAULTS, len(FAULTS)):
                await stage.claimed_again(random.randint(1, BETWEEN_FAULTS))
                if stage.waiting:
                    await stage.befall(fault)
            await poll_until(lambda: not stage.waiting, "every job has ended", seconds=DEADLINE_SECONDS)

            documents = await load_event_documents(stage.here.db)
            check_history(documents, all_finished=True)
            few = {it["stream"] for it in documents if it["data"].get("max_attempts") == FEW_ATTEMPTS}
            assert {it["stream"] for it in documents if it["type"] == "JobFailed"} <= few, "too soon"
            await assert_views_match_log(stage.here)

            for role in stage.workers + stage.projectors:
                assert role.process.poll() is None, "a process has ended by itself"
            await poll_until(
                lambda: not any(list_live_processes_in_session(role.pid) for role in stage.killed),
                "nothing is left of the killed",
            )
            assert sum(event.type == "JobLeaseExpired" for event in stage.seen) > WORKERS, "nobody was killed at work"
            assert stage.errors("JobAttemptFailed")["PROCESS_KILLED"] > 0, "no child was killed at work"
