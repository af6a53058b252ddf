"""Jobledger for the comparison kit: one projector and two workers; jobs submitted by the event store or over HTTP.

The kit also reads this module with the system's Python, so other packages are imported in methods.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerkit import services
from peerkit.base import Adapter

if TYPE_CHECKING:
    from jobledger.ledger.domain.commands import SubmitJob

PYTHON = os.environ.get("PEERLAB_JOBLEDGER", "")
"""The Python of Jobledger's virtual environment."""
RUN_ROLE = Path(__file__).parents[1] / "run_role.py"
DATABASE = "event_processing"
JOBS_PER_CALL = 1000
WORKERS = 2
START_SECONDS = 40.0


class Jobledger(Adapter):  # type: ignore[misc]  # the kit has no types
    """Submits jobs by the event store in this process."""

    title = "jobledger + MongoDB (majority, journal), 2 workers, 1 projector"
    done_means = "counter `completed` of the views"
    bulk_note = "create_streams, 1000 jobs a call"
    crash_doc = "lease_seconds (10 s)"
    python = PYTHON or None

    def setup(self) -> None:
        import pymongo

        self.mongo = services.Mongo(self.run_dir)
        self.services.append(self.mongo)
        self.db = pymongo.MongoClient[dict[str, Any]](self.mongo.url)[DATABASE]
        self.environment = self.env(
            JOBLEDGER_MONGODB__URI=self.mongo.url,
            JOBLEDGER_MONGODB__DB_NAME=DATABASE,
            JOBLEDGER_RESULTS__STORE=self.run_dir / "results",
            JOBLEDGER_EVENT_WORKER__MAX_CONCURRENT=str(self.params["slots"]),
            JOBLEDGER_LOGGING__LEVEL="warning",
        )
        self.helpers.append(self.start_role("projector"))
        self.open()

    def start_role(self, role: str, **environment: str) -> subprocess.Popen[bytes]:
        with (self.run_dir / f"{role}.log").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own command line
                [PYTHON, str(RUN_ROLE), role],
                env={**self.environment, **environment},
                cwd=str(self.run_dir),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_workers(self, n: int | None = None) -> None:
        for _ in range(n or WORKERS):
            self.spawn_worker([PYTHON, RUN_ROLE, "worker"], self.environment)

    def open(self) -> None:
        """Open the event store."""
        from jobledger.ledger.mongo.connection import Connection
        from jobledger.ledger.store.event_store import EventStore

        self.loop = asyncio.new_event_loop()

        async def open_event_store() -> EventStore:
            self.client = Connection(self.mongo.url, DATABASE).create_client()
            event_store = EventStore(self.client[DATABASE])
            await event_store.prepare()
            return event_store

        self.event_store = self.loop.run_until_complete(open_event_store())

    def teardown(self) -> None:
        if hasattr(self, "event_store"):
            self.loop.run_until_complete(self.event_store.aclose())
            self.loop.run_until_complete(self.client.close())
            self.loop.close()
        super().teardown()

    async def _create_jobs(self, commands: list[SubmitJob]) -> None:
        from jobledger.ledger.domain.events import EventMetadata
        from jobledger.ledger.store.command_handler import create_job_id, create_streams

        streams = [(create_job_id(), command) for command in commands]
        await create_streams(self.event_store, streams, meta=EventMetadata("user:bench"))

    def submit(self, i: int) -> None:
        self.loop.run_until_complete(self._create_jobs([_build_command(i)]))

    def submit_many(self, n: int, start: int = 0) -> None:
        async def submit_one_by_one() -> None:
            for number in range(start, start + n):
                await self._create_jobs([_build_command(number)])

        self.loop.run_until_complete(submit_one_by_one())

    def submit_bulk(self, n: int, start: int = 0) -> None:
        async def submit() -> None:
            for begin in range(start, start + n, JOBS_PER_CALL):
                numbers = range(begin, min(begin + JOBS_PER_CALL, start + n))
                await self._create_jobs([_build_command(number) for number in numbers])

        self.loop.run_until_complete(submit())

    def submit_hold(self, i: int) -> None:
        self.loop.run_until_complete(self._create_jobs([_build_command(i, "hold")]))

    def done_count(self) -> int:
        time.sleep(0.01)
        counter: dict[str, Any] | None = self.db.statistics.find_one({"_id": "jobs"})
        return int((counter or {}).get("completed", 0))

    def versions(self) -> dict[str, str]:
        import pymongo

        return {"pymongo": pymongo.version, "mongod": self.mongo.version}


class JobledgerHttp(Jobledger):
    """Submits jobs over HTTP."""

    title = "jobledger over HTTP, 2 workers, 1 projector, 1 api"
    bulk_note = "POST /api/events/batches, 1000 jobs a call"

    def open(self) -> None:
        """Start the API, and wait until it is ready."""
        port = services.free_port()
        self.helpers.append(self.start_role("api", JOBLEDGER_API__PORT=str(port)))
        deadline = time.monotonic() + START_SECONDS
        self.connection = http.client.HTTPConnection("127.0.0.1", port)
        while not self._is_ready():
            if time.monotonic() > deadline:
                raise RuntimeError("the API is not ready")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            self.connection.request("GET", "/readyz")
            response = self.connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):
            self.connection.close()
            return False
        return response.status == 200

    def _post(self, path: str, body: object) -> None:
        key = f"{os.getpid()}-{time.monotonic_ns()}"
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        for _ in range(2):
            try:
                self.connection.request("POST", path, json.dumps(body).encode(), headers)
                response = self.connection.getresponse()
                text = response.read()
            except (OSError, http.client.HTTPException):  # the server has closed an idle connection
                self.connection.close()
                continue
            if response.status != 202:
                raise RuntimeError(f"{response.status} {text[:300]!r}")
            return
        raise RuntimeError("the API closes the connection")

    def submit(self, i: int) -> None:
        self._post("/api/events/jobs", _build_body(i))

    def submit_many(self, n: int, start: int = 0) -> None:
        for number in range(start, start + n):
            self.submit(number)

    def submit_bulk(self, n: int, start: int = 0) -> None:
        for begin in range(start, start + n, JOBS_PER_CALL):
            numbers = range(begin, min(begin + JOBS_PER_CALL, start + n))
            self._post("/api/events/batches", {"jobs": [_build_body(number) for number in numbers]})

    def submit_hold(self, i: int) -> None:
        self._post("/api/events/jobs", _build_body(i, "hold"))


def _build_body(number: int, job_type: str = "noop") -> dict[str, Any]:
    return {"job_type": job_type, "parameters": {"number": number}}


def _build_command(number: int, job_type: str = "noop") -> SubmitJob:
    from jobledger.ledger.domain.commands import SubmitJob
    from jobledger.ledger.domain.events import JobSubmitted

    return SubmitJob(JobSubmitted(job_type=job_type, parameters={"number": number}, user_id="bench"))


SYSTEMS = {}
if PYTHON:
    SYSTEMS = {
        "jobledger": (Jobledger, {"slots": 100, "n": 5000}),
        "jobledger-http": (JobledgerHttp, {"slots": 100, "n": 2000, "crash_like": "jobledger"}),
    }
