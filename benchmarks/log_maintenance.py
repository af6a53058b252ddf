"""Compare verification, export and view rebuild of a long log with a plain cursor that decodes the same events.

The log contains conference sessions in batches of a hundred jobs, of which twenty are interleaved. Each job has 31
events: it is submitted, claimed, logs a line, finishes three steps and is completed, and 24 events report progress.
This is few for a job that takes minutes and may report progress twice per second.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measurement import Result, Stopwatch, compare_rates
from jobledger.cli.view_maintenance import open_rebuild, rebuild_views
from jobledger.ledger.domain.events import (
    BatchSubmitted,
    Event,
    EventMetadata,
    JobClaimed,
    JobCompleted,
    JobLogged,
    JobProgressed,
    JobResults,
    JobSubmitted,
    LogEntry,
    ResultFile,
    ResultMetadata,
    StepCompleted,
)
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.store.command_handler import new_batch_id, new_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead, build_documents
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.store.export import export_log
from jobledger.ledger.store.verification import verify_log

_EVENTS_PER_REQUESTED_EVENT = 50
"""The log has a million events with the default of 20,000 events per round."""
_INTERLEAVED_JOBS, _JOBS_PER_BATCH = 20, 100
_START_TIME = datetime(2026, 11, 20, 9, tzinfo=UTC)


async def run(connection: Connection, *, events: int, rounds: int) -> list[Result]:
    """Measure verification, export and view rebuild with a log of fifty times `events` events."""
    number = events * _EVENTS_PER_REQUESTED_EVENT
    rounds = max(1, rounds // 3)
    async with connection.client() as client:
        await client.drop_database(connection.db_name)
        db = client[connection.db_name]
        event_store = EventStore(db)
        await event_store.prepare()
        await _fill(db, number)
        baseline = _measure_rate(number, lambda: _read_cursor(db))
        return [
            await compare_rates(
                "log verify: hashes, links, versions, positions",
                baseline,
                _measure_rate(number, lambda: _verify(event_store)),
                rounds=rounds,
                min_ratio=0.15,
            ),
            await compare_rates(
                "log export",
                baseline,
                _measure_rate(number, lambda: _export(event_store)),
                rounds=rounds,
                min_ratio=0.3,
            ),
            await compare_rates(
                "log export, compressed",
                baseline,
                _measure_rate(number, lambda: _export(event_store, "log.ndjson.zst")),
                rounds=rounds,
                min_ratio=0.3,
            ),
            await compare_rates(
                "views rebuild: all views, with the switch",
                baseline,
                _measure_rebuild(connection, number),
                rounds=rounds,
                min_ratio=0.25,
                notes=(
                    f"{number:,} events; peak memory of this process: "
                    f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB",
                ),
            ),
        ]


def _measure_rate(number: int, work: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[float]]:
    async def measure() -> float:
        with Stopwatch() as watch:
            await work()
        return watch.rate(number)

    return measure


async def _read_cursor(db: Database) -> None:
    seen = 0
    async for _ in db.events.find({"_id": {"$gt": 0}}, sort=[("_id", 1)]):
        seen += 1


async def _verify(event_store: EventStore) -> None:
    result = await verify_log(event_store)
    if result.problem is not None:
        raise ValueError(f"the log of the benchmark is invalid: {result.problem}")


async def _export(event_store: EventStore, name: str = "log.ndjson") -> None:
    with TemporaryDirectory() as directory:
        await export_log(event_store, Path(directory) / name)


def _measure_rebuild(connection: Connection, number: int) -> Callable[[], Awaitable[float]]:
    async def measure() -> float:
        with Stopwatch() as watch:
            await rebuild_views(connection, on_progress=lambda position, total: None)
        async with open_rebuild(connection) as rebuild:
            await rebuild.clear_shadow()  # the projector does this later, so it is not measured
        return watch.rate(number)

    return measure


# The log --------------------------------------------------------------------------------------------------------------


async def _fill(db: Database, number: int) -> None:
    page: list[Document] = []
    for position, document in enumerate(_generate_documents(), 1):
        document["_id"] = position
        page.append(document)
        if len(page) == 5000 or position == number:
            await db.events.insert_many(page, ordered=False)
            page = []
            if position % 100_000 == 0:
                sys.stderr.write(f"  {position:,} of {number:,} events written\n")
        if position == number:
            break
    await db.counters.update_one({"_id": "events"}, {"$set": {"next": number}}, upsert=True)


def _generate_documents() -> Iterator[Document]:
    """Yield the documents of batch after batch without end. The events of twenty jobs at a time are interleaved."""
    time = _START_TIME
    while True:
        batch_id, job_ids = new_batch_id(), [new_job_id() for _ in range(_JOBS_PER_BATCH)]
        meta = EventMetadata("user:bench", correlation_id=batch_id)
        batch = BatchSubmitted(
            batch_name="Tag 1",
            total_jobs=_JOBS_PER_BATCH,
            job_ids=job_ids,
            user_id="bench",
            parameters={"event": "Conf"},
        )
        yield from _build_stream(batch_id, [batch], meta, time)
        for begin in range(0, _JOBS_PER_BATCH, _INTERLEAVED_JOBS):
            streams = [
                _build_stream(job_id, _job_events(job_id, batch_id, time), meta, time)
                for job_id in job_ids[begin : begin + _INTERLEAVED_JOBS]
            ]
            for documents in zip(*streams, strict=True):
                yield from documents
            time += timedelta(minutes=7)


def _build_stream(stream: str, events: list[Event], meta: EventMetadata, time: datetime) -> list[Document]:
    documents: list[Document] = []
    build_documents(StreamAppend(stream, StreamHead(), events, meta, time), documents)
    return documents


def _job_events(job_id: str, batch_id: str, time: datetime) -> list[Event]:
    title = "Wie aus einem Vortrag ein Text wird, den man lesen mag"
    parameters = {
        "session": f"{title} {job_id[-4:]}",
        "event": "Conf",
        "track": f"Track {int(job_id[-2:], 16) % 8}",
        "day": "2026-11-20",
        "url": f"https://conf.example/talks/{job_id}",
        "video_url": f"https://media.example/{job_id}.webm",
        "target_language": "de",
    }
    path = f"{job_id}/{job_id}.md"
    results = JobResults(
        markdown_file=f"/events/{path}",
        markdown_url=f"/api/events/files/{path}",
        files=[
            ResultFile(path=path, sha256="0" * 64, size=20_000, media_type="text/markdown"),
            ResultFile(path=f"{job_id}/slide-1.jpg", sha256="1" * 64, size=90_000, media_type="image/jpeg"),
        ],
        metadata=ResultMetadata(processed_at=time, duration=420.5, tokens_used=9000),
    )

    def report_progress(percent: int, step: str) -> list[JobProgressed]:
        return [
            JobProgressed(attempt=1, step=step, percent=percent + part, message=f"{step}: part {part} of 8")
            for part in range(8)
        ]

    def finish_step(step: str, seconds: float) -> StepCompleted:
        return StepCompleted(
            attempt=1, step=step, key=f"{step}-{job_id}" * 2, output={"sha256": "2" * 64}, duration_s=seconds
        )

    return [
        JobSubmitted(job_type="session", parameters=parameters, user_id="bench", batch_id=batch_id),
        JobClaimed(worker_id="worker-bench-1", attempt=1),
        *report_progress(5, "page"),
        finish_step("page", 2.5),
        *report_progress(30, "slides"),
        finish_step("slides", 61.0),
        JobLogged(attempt=1, entries=[LogEntry(timestamp=time, level="info", message="9 slides, 44 minutes of sound")]),
        *report_progress(80, "transcript"),
        finish_step("transcript", 310.0),
        JobCompleted(attempt=1, results=results),
    ]
