"""The process that runs all roles for the fixture `ledger`. It serves one test after the other.

`python -m jobledger.testing.ledger_process FD` reads requests from a socket, one JSON object a line, and responds to
each with one. It ends when the socket is closed. Modules stay loaded, so that the next test starts fast.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from typing import Any, Final

import orjson

from jobledger.cli.composition import Role, RunningProcess, start_roles
from jobledger.cli.hosting.logging_setup import configure_logging
from jobledger.cli.settings_file import read_settings
from jobledger.ledger.domain.batch import Batch
from jobledger.ledger.domain.delivery import Delivery
from jobledger.ledger.domain.events import JobSubmitted
from jobledger.ledger.domain.job import Job
from jobledger.ledger.domain.statuses import TERMINAL_STATUSES
from jobledger.ledger.mongo.server_clock import get_server_clock
from jobledger.ledger.outbox.submission import COLLECTION as OUTBOX
from jobledger.ledger.store.command_handler import Aggregate, decider_for
from jobledger.projections.engine.checkpoint import load_checkpoint
from jobledger.testing.adjustable_clock import AdjustableClock, AdjustableConnection
from jobledger.workers.child.containment import new_event_loop

MAX_LINE_BYTES: Final = 64 * 1024 * 1024
_POLL_SECONDS: Final = 0.02
_ROLES: Final[frozenset[Role]] = frozenset({"api", "projector", "webhook-sender"})


class _Log:
    """The aggregates of the whole log. Test logs are small."""

    def __init__(self, process: RunningProcess) -> None:
        self._event_store = process.event_store
        self._db = process.db
        self.position = 0
        self.streams: dict[str, Aggregate] = {}
        self.submitted: list[dict[str, Any]] = []

    async def read(self) -> None:
        """Read the events that are new."""
        while page := await self._event_store.read(after=self.position):
            for event in page:
                self.position = event.position
                if event.stream == "void":
                    continue
                if isinstance(event.event, JobSubmitted):
                    job = event.event
                    fields = {"job_id": event.stream, "job_type": job.job_type, "parameters": job.parameters}
                    self.submitted.append(fields)
                state = decider_for(event.stream).evolve(self.streams.get(event.stream), event.event)
                self.streams[event.stream] = state

    async def find_open_work(self) -> list[str]:
        """Return descriptions of what can continue now: running and due jobs, and due messages of webhooks."""
        await self.read()
        if await self._db[OUTBOX].find_one({}, {"_id": 1}) is not None:
            return ["a job that was submitted in a transaction is not in the log yet"]
        checkpoint = await load_checkpoint(self._db)
        if checkpoint["position"] < self.position:
            return ["the views are behind the log"]
        now = self._event_store.clock.estimate()
        open_work = []
        for stream, state in self.streams.items():
            match state:
                case Job(status="processing"):
                    open_work.append(f"{stream} ({state.spec.job_type}) is running attempt {state.attempt}")
                case Job(status="pending", is_deleted=False) if not self._is_paused(state):
                    if state.due_at is None or state.due_at <= now:
                        open_work.append(f"{stream} ({state.spec.job_type}) is pending and due")
                case Batch(status="processing") if all(map(self._is_finished, state.spec.job_ids)):
                    open_work.append(f"{stream} has no unfinished jobs and is not finished")
                case Delivery(status="pending") if state.due_at is None or state.due_at <= now:
                    open_work.append(f"{stream} is a webhook message that is due")
        return open_work

    def _is_finished(self, job_id: str) -> bool:
        job = self.streams.get(job_id)
        return isinstance(job, Job) and job.status in TERMINAL_STATUSES

    def _is_paused(self, job: Job) -> bool:
        batch = self.streams.get(job.spec.batch_id or "")
        return isinstance(batch, Batch) and batch.is_paused


class _Server:
    """Runs the roles of one test at a time."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._process: RunningProcess | None = None
        self._log: _Log | None = None
        self._failures: list[BaseException] = []

    async def handle(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Handle a request and return the response."""
        match request:
            case {"command": "start"}:
                return await self._start(request["uri"], request["settings"], has_worker=request["worker"])
            case {"command": "stop"}:
                await self.stop()
                return {}
            case {"command": "advance", "seconds": float() | int() as seconds}:
                return self._advance(timedelta(seconds=seconds))
            case {"command": "wait_until_idle", "seconds": float() | int() as seconds}:
                return await self._wait_until_idle(seconds)
            case {"command": "submitted"}:
                log = self._require_log()
                await log.read()
                return {"submitted": log.submitted}
        raise ValueError(f"unknown request {request!r}")

    async def _start(self, uri: str, settings: Mapping[str, Any], *, has_worker: bool) -> dict[str, Any]:
        read, _ = read_settings(None, settings, defaults_only=True)
        configure_logging(read.logging)
        mongodb = read.mongodb
        connection = AdjustableConnection(uri, mongodb.db_name, mongodb.max_pool_size, mongodb.connect_timeout_ms)
        selected: frozenset[Role] = _ROLES | {"worker"} if has_worker else _ROLES
        self._failures.clear()
        roles = start_roles(read, connection, selected, on_failure=self._failures.append)
        self._process = await self._stack.enter_async_context(roles)
        self._log = _Log(self._process)
        return {"url": self._process.url}

    async def stop(self) -> None:
        """Stop the roles."""
        self._process = self._log = None
        await self._stack.aclose()

    def _require_log(self) -> _Log:
        if self._failures:
            raise self._failures[0]
        assert self._log is not None  # noqa: S101 - the fixture has started it
        return self._log

    def _advance(self, duration: timedelta) -> dict[str, Any]:
        assert self._process is not None  # noqa: S101 - the fixture has started it
        clock = get_server_clock(self._process.db.client)
        assert isinstance(clock, AdjustableClock)  # noqa: S101 - that of `AdjustableConnection`
        clock.offset += duration
        return {}

    async def _wait_until_idle(self, seconds: float) -> dict[str, Any]:
        """Wait until nothing can continue now. Otherwise, the response says what is open."""
        open_work: list[str] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while open_work := await self._require_log().find_open_work():  # noqa: ASYNC110 - no notification
                    await asyncio.sleep(_POLL_SECONDS)
        return {"open": open_work}


async def _serve(connection: socket.socket) -> None:
    server = _Server()
    reader, writer = await asyncio.open_connection(sock=connection, limit=MAX_LINE_BYTES)
    while line := await reader.readline():
        try:
            response = await server.handle(orjson.loads(line))
        except Exception as error:  # noqa: BLE001 - the test reports it
            response = {"error": f"{type(error).__name__}: {error}"}
        writer.write(orjson.dumps(response) + b"\n")
        await writer.drain()
    await server.stop()


if __name__ == "__main__":
    os.set_inheritable(int(sys.argv[1]), False)  # noqa: FBT003 - it takes no name
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(socket.socket(fileno=int(sys.argv[1]))))
