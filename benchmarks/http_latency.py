"""Compare the HTTP API with a minimal route, and its latency with a million jobs with that of a thousand jobs."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import multiprocessing.connection
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import structlog
import uvicorn
from bson import ObjectId
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.measurement import Result, compare_rates, percentile
from jobledger.cli.composition import start_roles
from jobledger.cli.settings_file import read_settings
from jobledger.ledger.domain.commands import SubmitJob
from jobledger.ledger.domain.events import EventMetadata, JobCancelled, JobSubmitted, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.store.command_handler import handle_command, new_job_id
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import Checkpoint
from jobledger.projections.engine.projector import Projector
from jobledger.projections.views import jobs
from jobledger.projections.views.statistics import counters_for_job

FEW_JOBS = 1000
JOBS_PER_REQUESTED_EVENT = 50
"""With the default of 20,000 events per round, there are a million jobs."""
CONNECTIONS = 8
MAX_RATIO = 3.0
_WARM_UP_TURNS = 5
_spawn = multiprocessing.get_context("spawn")
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
    async with connection.client() as client:
        await client.drop_database(connection.db_name)
        db = client[connection.db_name]
        job_id = await _submit_job(db, connection)
        async with (
            _run_server(_serve_baseline, connection) as baseline_port,
            _run_server(_serve_jobledger, connection) as jobledger_port,
        ):
            requests = max(200, events // 10)
            return [
                await compare_rates(
                    "http: GET one job; driver: Starlette route with one find_one",
                    lambda: _measure_rate(baseline_port, f"/{job_id}", requests),
                    lambda: _measure_rate(jobledger_port, f"/api/events/jobs/{job_id}", requests),
                    rounds=rounds,
                    min_ratio=0.6,
                )
            ]


async def run_at_scale(connection: Connection, *, events: int, rounds: int) -> list[Result]:
    """Compare the latency of lists, statistics and single reads with many jobs with that with a thousand jobs."""
    many_jobs = events * JOBS_PER_REQUESTED_EVENT
    latencies: list[dict[str, list[float]]] = []
    async with connection.client() as client:
        for number in (FEW_JOBS, many_jobs):
            await client.drop_database(connection.db_name)
            db = client[connection.db_name]
            await Projector(db, EventStore(db), connection, Checkpoint(db), holder="bench").prepare()
            samples = await _fill(db, number)
            async with _run_server(_serve_jobledger, connection) as port:
                latencies.append(await _measure_requests(port, samples, max(20, rounds * 30)))
    return [
        Result(
            f"http-scale: {name}: {many_jobs:,} jobs; baseline: {FEW_JOBS:,} jobs",
            _format_latencies(few),
            _format_latencies(many),
            percentile(many, 99) / percentile(few, 99),
            (statistics.median(many) / statistics.median(few), percentile(many, 99) / percentile(few, 99)),
            f"≤ {MAX_RATIO}",
            percentile(many, 99) <= MAX_RATIO * percentile(few, 99),
        )
        for (name, few), many in zip(latencies[0].items(), latencies[1].values(), strict=True)
    ]


def _format_latencies(seconds: Sequence[float]) -> str:
    return f"p50 {percentile(seconds, 50) * 1000:.1f} ms, p99 {percentile(seconds, 99) * 1000:.1f} ms"


# Test data ------------------------------------------------------------------------------------------------------


async def _submit_job(db: Database, connection: Connection) -> str:
    """Submit a job through the event_store, and write its view document as the projector would."""
    event_store = EventStore(db)
    await event_store.prepare()
    await Projector(db, event_store, connection, Checkpoint(db), holder="bench").prepare()
    job_id = new_job_id()
    submission = JobSubmitted(job_type="session", parameters={**_PARAMETERS, "track": "Main"}, user_id="bench")
    [submitted] = (
        await handle_command(event_store, job_id, SubmitJob(submission), meta=EventMetadata("user:bench"))
    ).events
    document = jobs.fold(None, submitted)
    assert document is not None  # noqa: S101 - narrows the type
    await db.jobs.insert_one(document)
    await event_store.aclose()
    return job_id


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
            increments.update(counters_for_job(job))
        samples.append(rng.choice(page))
        await db.jobs.insert_many(page, ordered=False)
    by_counter: dict[str, Counter[str]] = {}
    for (counter, field), amount in increments.items():
        by_counter.setdefault(counter, Counter())[field] += amount
    for counter, fields in by_counter.items():
        await db.statistics.update_one({"_id": counter}, {"$inc": dict(fields)}, upsert=True)
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
    document = jobs.fold(None, _recorded(submission, job_id, 1, time, 2 * index + 1))
    if index % 3:
        document = jobs.fold(document, _recorded(JobCancelled(by="bench"), job_id, 2, time, 2 * index + 2))
    assert document is not None  # noqa: S101 - narrows the type
    return document


def _recorded(
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

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return requests // CONNECTIONS * CONNECTIONS / (time.perf_counter() - begin)


async def _get(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> bytes:
    """Send one request on an open connection. This minimal client costs almost no time."""
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
    body = await reader.readexactly(length)
    assert b" 200 " in head.partition(b"\r\n")[0] + b" ", f"{path}: {head.decode()} {body.decode()}"  # noqa: S101
    return body


# Servers ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _run_server(target: Any, connection: Connection) -> AsyncIterator[int]:
    """Run a server in its own process, and yield its port."""
    receiver, sender = _spawn.Pipe(duplex=False)
    process = _spawn.Process(target=target, args=(connection, sender), daemon=True)
    process.start()
    try:
        yield await asyncio.to_thread(receiver.recv)
    finally:
        process.terminate()
        await asyncio.to_thread(process.join)


def _serve_jobledger(connection: Connection, port_sender: multiprocessing.connection.Connection) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))

    async def serve() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        with tempfile.TemporaryDirectory() as store:
            options = {
                "mongodb": {"uri": connection.uri, "db_name": connection.db_name},
                "api": {"port": 0},
                "results": {"store": store},
            }
            settings, _ = read_settings(None, options, defaults_only=True)
            async with start_roles(
                settings, connection, frozenset({"api"}), on_failure=lambda error: stop.set()
            ) as running:
                port_sender.send(int((running.url or "").rpartition(":")[2]))
                await stop.wait()

    asyncio.run(serve())


def _serve_baseline(connection: Connection, port_sender: multiprocessing.connection.Connection) -> None:
    async def serve() -> None:
        async with connection.client() as client:
            db = client[connection.db_name]

            async def get_job(request: Request) -> Response:
                job = await db.jobs.find_one({"_id": request.path_params["job_id"]})
                return Response(orjson.dumps(job), media_type="application/json")

            app = Starlette(routes=[Route("/{job_id}", get_job)])
            server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False, lifespan="off"))
            serving = asyncio.create_task(server.serve())
            while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
            port_sender.send(server.servers[0].sockets[0].getsockname()[1])
            await serving

    asyncio.run(serve())
