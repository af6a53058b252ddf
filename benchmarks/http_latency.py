"""benchmarks: HTTP. One job beside a bare route that does the same, and lists of a million jobs beside a thousand."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import multiprocessing.connection
import random
import signal
import statistics as numbers
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
from jobledger.projections.views import jobs, statistics

FEW_JOBS = 1000
JOBS_PER_REQUESTED_EVENT = 50  # of the events of the other benchmarks: a million jobs
CONNECTIONS = 8
MAX_RATIO = 3.0
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
    """Measure a single read beside a bare one."""
    async with connection.client() as client:
        await client.drop_database(connection.db_name)
        db = client[connection.db_name]
        job_id = await _one_job(db, connection)
        async with _server(_serve_baseline, connection) as bare, _server(_serve_jobledger, connection) as ours:
            requests = max(200, events // 10)
            return [
                await compare_rates(
                    "GET of one job; a bare Starlette route with one find_one",
                    lambda: _rate(bare, f"/{job_id}", requests),
                    lambda: _rate(ours, f"/api/events/jobs/{job_id}", requests),
                    rounds=rounds,
                    min_ratio=0.6,
                )
            ]


async def run_at_scale(connection: Connection, *, events: int, rounds: int) -> list[Result]:
    """Measure lists, statistics and single reads with a thousand jobs, and with very many."""
    many = events * JOBS_PER_REQUESTED_EVENT
    measured: list[dict[str, list[float]]] = []
    async with connection.client() as client:
        for number in (FEW_JOBS, many):
            await client.drop_database(connection.db_name)
            db = client[connection.db_name]
            await Projector(db, EventStore(db), connection, Checkpoint(db), holder="bench").prepare()
            some = await _fill(db, number)
            async with _server(_serve_jobledger, connection) as ours:
                measured.append(await _measure_requests(ours, some, max(20, rounds * 30)))
    return [
        Result(
            f"{what}: {many:,} jobs; {FEW_JOBS:,} jobs",
            _delays(few),
            _delays(lots),
            percentile(lots, 99) / percentile(few, 99),
            (numbers.median(lots) / numbers.median(few), percentile(lots, 99) / percentile(few, 99)),
            f"≤ {MAX_RATIO}",
            percentile(lots, 99) <= MAX_RATIO * percentile(few, 99),
        )
        for (what, few), lots in zip(measured[0].items(), measured[1].values(), strict=True)
    ]


def _delays(seconds: Sequence[float]) -> str:
    return f"p50 {percentile(seconds, 50) * 1000:.1f} ms, p99 {percentile(seconds, 99) * 1000:.1f} ms"


# What there is ----------------------------------------------------------------------------------------------------


async def _one_job(db: Database, connection: Connection) -> str:
    """Submit a job through the log, and write its view as the projector would."""
    log = EventStore(db)
    await log.prepare()
    await Projector(db, log, connection, Checkpoint(db), holder="bench").prepare()
    job_id = new_job_id()
    asked = JobSubmitted(job_type="session", parameters={**_PARAMETERS, "track": "Main"}, user_id="bench")
    [submitted] = (await handle_command(log, job_id, SubmitJob(asked), meta=EventMetadata("user:bench"))).events
    document = jobs.fold(None, submitted)
    assert document is not None  # noqa: S101 - narrows the type
    await db.jobs.insert_one(document)
    await log.aclose()
    return job_id


async def _fill(db: Database, number: int) -> list[Document]:
    """Write the views of so many jobs as the projector would; return a few of them."""
    dice, kept = random.Random(1), []  # noqa: S311 - chance, no secret
    counted: Counter[tuple[str, str]] = Counter()
    begun = datetime.now(UTC) - timedelta(seconds=number)
    for begin in range(0, number, 1000):
        page = [
            _job(dice, begun + timedelta(seconds=index), index) for index in range(begin, min(begin + 1000, number))
        ]
        for job in page:
            counted.update(statistics.counters_for_job(job))
        kept.append(dice.choice(page))
        await db.jobs.insert_many(page, ordered=False)
    by_counter: dict[str, Counter[str]] = {}
    for (counter, field), amount in counted.items():
        by_counter.setdefault(counter, Counter())[field] += amount
    for counter, fields in by_counter.items():
        await db.statistics.update_one({"_id": counter}, {"$inc": dict(fields)}, upsert=True)
    return kept


def _job(dice: random.Random, moment: datetime, index: int) -> Document:
    """Return one job's document as it comes out of the fold: waiting, or cancelled."""
    job_id = f"job-{ObjectId()}"
    asked = JobSubmitted(
        job_type="session",
        parameters={**_PARAMETERS, "track": f"Track {dice.randrange(20)}"},
        batch_id=f"batch-{index // 500:024x}",
        user_id=f"user-{dice.randrange(50)}",
    )
    document = jobs.fold(None, _recorded(asked, job_id, 1, moment, 2 * index + 1))
    if index % 3:
        document = jobs.fold(document, _recorded(JobCancelled(by="bench"), job_id, 2, moment, 2 * index + 2))
    assert document is not None  # noqa: S101 - narrows the type
    return document


def _recorded(
    event: JobSubmitted | JobCancelled, stream: str, version: int, moment: datetime, position: int
) -> RecordedEvent:
    return RecordedEvent(
        {"_id": position, "stream": stream, "version": version, "type": type(event).__name__, "time": moment}, event
    )


# Asking -----------------------------------------------------------------------------------------------------------


async def _measure_requests(port: int, some: Sequence[Document], times: int) -> dict[str, list[float]]:
    """Return how long each kind of question took, one at a time, mixed."""
    dice = random.Random(2)  # noqa: S311 - chance, no secret
    delays: dict[str, list[float]] = {}
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for turn in range(times + 5):
        job = dice.choice(some)
        track = job["parameters"]["track"].replace(" ", "%20")
        for what, path in {
            "list, newest first": "/api/events/jobs",
            "list of a status": "/api/events/jobs?status=cancelled",
            "list of a track": f"/api/events/jobs?track={track}",
            "list of a batch": f"/api/events/jobs?batch_id={job['batch_id']}",
            # As many as a user has among the few, or the answers would differ in size.
            "list of a user": f"/api/events/jobs?user_id={job['user_id']}&status=pending&limit=5",
            "statistics": "/api/monitoring/events/stats",
            "single read": f"/api/events/jobs/{job['job_id']}",
            "dashboard, overview": "/monitoring/events",
            "dashboard, jobs": "/monitoring/events/jobs",
        }.items():
            begin = time.perf_counter()
            await _get(reader, writer, path)
            if turn >= 5:
                delays.setdefault(what, []).append(time.perf_counter() - begin)
    writer.close()
    return delays


async def _rate(port: int, path: str, requests: int) -> float:
    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(requests // CONNECTIONS):
            await _get(reader, writer, path)
        writer.close()

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return requests // CONNECTIONS * CONNECTIONS / (time.perf_counter() - begin)


async def _get(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> bytes:
    """One request on a connection that stays: a client that costs as good as nothing."""
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
    body = await reader.readexactly(length)
    assert b" 200 " in head.partition(b"\r\n")[0] + b" ", f"{path}: {head.decode()} {body.decode()}"  # noqa: S101
    return body


# Serving ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _server(target: Any, connection: Connection) -> AsyncIterator[int]:
    """Run a server in a process of its own; yield its port."""
    ours, theirs = _spawn.Pipe(duplex=False)
    process = _spawn.Process(target=target, args=(connection, theirs), daemon=True)
    process.start()
    try:
        yield await asyncio.to_thread(ours.recv)
    finally:
        process.terminate()
        await asyncio.to_thread(process.join)


def _serve_jobledger(connection: Connection, said: multiprocessing.connection.Connection) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))

    async def serve() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        with tempfile.TemporaryDirectory() as store:
            chosen = {
                "mongodb": {"uri": connection.uri, "db_name": connection.db_name},
                "api": {"port": 0},
                "results": {"store": store},
            }
            settings, _ = read_settings(None, chosen, defaults_only=True)
            async with start_roles(
                settings, connection, frozenset({"api"}), on_failure=lambda error: stop.set()
            ) as running:
                said.send(int((running.url or "").rpartition(":")[2]))
                await stop.wait()

    asyncio.run(serve())


def _serve_baseline(connection: Connection, said: multiprocessing.connection.Connection) -> None:
    async def serve() -> None:
        async with connection.client() as client:
            db = client[connection.db_name]

            async def single(request: Request) -> Response:
                job = await db.jobs.find_one({"_id": request.path_params["job_id"]})
                return Response(orjson.dumps(job), media_type="application/json")

            app = Starlette(routes=[Route("/{job_id}", single)])
            server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False, lifespan="off"))
            serving = asyncio.create_task(server.serve())
            while not server.started:  # noqa: ASYNC110 - uvicorn tells nobody
                await asyncio.sleep(0.01)
            said.send(server.servers[0].sockets[0].getsockname()[1])
            await serving

    asyncio.run(serve())
