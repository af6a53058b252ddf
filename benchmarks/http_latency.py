"""Compare the HTTP API with a minimal route, and its latency with a million jobs with that of a thousand jobs."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import uvicorn
from bson import ObjectId
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.measurement import Result, compare_latencies, compare_rates, measure_rate, open_empty_database
from benchmarks.processes import Pipe, run_processes, run_role
from jobledger.cli.hosting.server import open_listener
from jobledger.ledger.domain.events import JobCancelled, JobSubmitted, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.projections.engine.checkpoint import CheckpointFollower
from jobledger.projections.engine.projector import Projector
from jobledger.projections.views import job_list, jobs
from jobledger.projections.views.statistics import get_job_counters

FEW_JOBS = 1000
JOBS_PER_REQUESTED_EVENT = 50
"""With the default of 20,000 events per round, there are a million jobs."""
CONNECTIONS = 8
MAX_RATIO = 3.0
_WARM_UP_TURNS = 5
_PARAMETERS = {
    "event": "FOSDEM 2026",
    "session": "How to read a million rows",
    "url": "https://example.org/talk",
    "filename": "How-to-read-a-million-rows.md",
    "day": "Saturday",
    "target_language": "de",
}


async def run(connection: Connection, *, events: int, rounds: int) -> list[Result]:
    """Compare reading one job with a minimal route that reads the same document."""
    requests = max(200, events // 10)
    async with (
        _run_api(connection, 1) as (port, [job]),
        run_processes(1, _serve_baseline, connection) as [baseline],
    ):
        return [
            await compare_rates(
                "http: GET one job; driver: Starlette route with one find_one",
                lambda: _measure_rate(baseline.ready, f"/{job['_id']}", requests),
                lambda: _measure_rate(port, f"/api/events/jobs/{job['_id']}", requests),
                rounds=rounds,
                min_ratio=0.6,
            )
        ]


async def run_at_scale(connection: Connection, *, events: int, rounds: int) -> list[Result]:
    """Compare the latency of lists, statistics and single reads with many jobs with that with a thousand jobs."""
    many_jobs = events * JOBS_PER_REQUESTED_EVENT
    latencies: list[dict[str, list[float]]] = []
    for number in (FEW_JOBS, many_jobs):
        async with _run_api(connection, number) as (port, samples):
            latencies.append(await _measure_requests(port, samples, max(20, rounds * 30)))
    sizes = f"{many_jobs:,} jobs; baseline: {FEW_JOBS:,} jobs"
    comparisons = [
        compare_latencies(f"http-scale: {name}: {sizes}", few, many, max_ratio=MAX_RATIO, percent=99)
        for (name, few), many in zip(latencies[0].items(), latencies[1].values(), strict=True)
    ]
    return [replace(comparison, notes=()) for comparison in comparisons]


@asynccontextmanager
async def _run_api(connection: Connection, jobs: int) -> AsyncIterator[tuple[int, list[Document]]]:
    """Run the API with the views of this number of jobs. Yield its port and one job of each thousand."""
    async with open_empty_database(connection) as (db, event_store):
        await Projector(db, event_store, connection, CheckpointFollower(db), holder="bench").prepare()
        samples = await _fill(db, jobs)
        with tempfile.TemporaryDirectory() as store:
            async with run_processes(1, run_role, connection, Path(store), "api", 1) as [api]:
                yield int(api.ready.rpartition(":")[2]), samples


# Test data ------------------------------------------------------------------------------------------------------


async def _fill(db: Database, number: int) -> list[Document]:
    """Write the views of this number of jobs as the projector would. Return one job of each thousand."""
    rng, samples = random.Random(1), []  # noqa: S311 - test data, no secret
    increments: Counter[tuple[str, str]] = Counter()
    first_time = datetime.now(UTC) - timedelta(seconds=number)
    for begin in range(0, number, 1000):
        page = [
            _build_job(rng, first_time + timedelta(seconds=index), index)
            for index in range(begin, min(begin + 1000, number))
        ]
        for job in page:
            increments.update(get_job_counters(job))
        samples.append(rng.choice(page))
        await db.jobs.insert_many(page, ordered=False)
        await db.job_list.insert_many([job_list.build_row(job) for job in page], ordered=False)
    for (counter, field), amount in increments.items():
        await db.statistics.update_one({"_id": counter}, {"$inc": {field: amount}}, upsert=True)
    return samples


def _build_job(rng: random.Random, time: datetime, index: int) -> Document:
    """Return the document of a job: one of three is pending, the others are cancelled."""
    job_id = f"job-{ObjectId()}"
    submission = JobSubmitted(
        job_type="session",
        parameters={**_PARAMETERS, "track": f"Track {rng.randrange(20)}"},
        batch_id=f"batch-{index // 500:024x}",
        user_id=f"user-{rng.randrange(50)}",
    )
    document = jobs.fold(None, _record_event(submission, job_id, 1, time, 2 * index + 1))
    if index % 3:
        document = jobs.fold(document, _record_event(JobCancelled(by="user:bench"), job_id, 2, time, 2 * index + 2))
    assert document is not None  # noqa: S101 - narrows the type
    return document


def _record_event(
    event: JobSubmitted | JobCancelled, stream: str, version: int, time: datetime, position: int
) -> RecordedEvent:
    return RecordedEvent(
        {"_id": position, "stream": stream, "version": version, "type": type(event).__name__, "time": time}, event
    )


# Requests ---------------------------------------------------------------------------------------------------------


async def _measure_requests(port: int, samples: Sequence[Document], times: int) -> dict[str, list[float]]:
    """Return the latencies of each kind of request in seconds. Requests are sent one at a time and alternate."""
    rng = random.Random(2)  # noqa: S311 - test data, no secret
    latencies: dict[str, list[float]] = {}
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for turn in range(times + _WARM_UP_TURNS):
        job = rng.choice(samples)
        track = job["parameters"]["track"].replace(" ", "%20")
        for name, path in {
            "list, newest first": "/api/events/jobs",
            "list of a status": "/api/events/jobs?status=cancelled",
            "list of a track": f"/api/events/jobs?track={track}",
            "list of a status in a track": f"/api/events/jobs?status=pending&track={track}",
            "list of a batch": f"/api/events/jobs?batch_id={job['batch_id']}",
            # With few jobs, a user has no more than five, and the responses must have the same size.
            "list of a user": f"/api/events/jobs?user_id={job['user_id']}&status=pending&limit=5",
            "statistics": "/api/monitoring/events/stats",
            "single read": f"/api/events/jobs/{job['job_id']}",
            "dashboard, overview": "/monitoring/events",
            "dashboard, jobs": "/monitoring/events/jobs",
        }.items():
            begin = time.perf_counter()
            await _get(reader, writer, path)
            if turn >= _WARM_UP_TURNS:
                latencies.setdefault(name, []).append(time.perf_counter() - begin)
    writer.close()
    return latencies


async def _measure_rate(port: int, path: str, requests: int) -> float:
    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(requests // CONNECTIONS):
            await _get(reader, writer, path)
        writer.close()

    clients = asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return await measure_rate(requests // CONNECTIONS * CONNECTIONS, clients)


async def _get(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> bytes:
    """Send one request on an open connection. This minimal client costs almost no time."""
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
    body = await reader.readexactly(length)
    assert b" 200 " in head.partition(b"\r\n")[0] + b" ", f"{path}: {head.decode()} {body.decode()}"  # noqa: S101
    return body


# Baseline -------------------------------------------------------------------------------------------------------


def _serve_baseline(connection: Connection, pipe: Pipe) -> None:
    async def serve() -> None:
        async with connection.create_client() as client:
            db = client[connection.db_name]

            async def get_job(request: Request) -> Response:
                job = await db.jobs.find_one({"_id": request.path_params["job_id"]})
                return Response(orjson.dumps(job), media_type="application/json")

            app = Starlette(routes=[Route("/{job_id}", get_job)])
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
            with open_listener("127.0.0.1", 0) as listener:
                pipe.send(listener.getsockname()[1])
                await server.serve(sockets=[listener])

    asyncio.run(serve())
