"""benchmarks: what auditors do with a long log, against a plain cursor that decodes the same events to dicts.

The log is one of conference sessions: each job is submitted in a batch of a hundred, claimed, gets on, says something,
finishes three steps, and is completed, twenty at a time: 31 events each, of which 24 tell of progress. That is little
for a job that takes minutes and may say how far it is twice a second.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measurement import Result, Stopwatch, compare_rates
from jobledger.cli.view_maintenance import clear_shadow_views, rebuild_views
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
"""A log has to be long to be measured: with the default of 20,000 events a round it has a million."""
_INTERLEAVED_JOBS, _JOBS_PER_BATCH = 20, 100
_START_TIME = datetime(2026, 11, 20, 9, tzinfo=UTC)


async def run(connection: Connection, *, events: int, rounds: int) -> list[Result]:
    """Measure verifying, exporting and folding a log of `events` times fifty events."""
    number = events * _EVENTS_PER_REQUESTED_EVENT
    rounds = max(1, rounds // 3)
    async with connection.client() as client:
        await client.drop_database(connection.db_name)
        db = client[connection.db_name]
        log = EventStore(db)
        await log.prepare()
        await _fill(db, number)
        plain = _rate(number, lambda: _cursor(db))
        return [
            await compare_rates(
                "log verify: hashes, links, versions, positions",
                plain,
                _rate(number, lambda: _verified(log)),
                rounds=rounds,
                min_ratio=0.15,
            ),
            await compare_rates(
                "log export", plain, _rate(number, lambda: _exported(log)), rounds=rounds, min_ratio=0.3
            ),
            await compare_rates(
                "log export, compressed",
                plain,
                _rate(number, lambda: _exported(log, "log.ndjson.zst")),
                rounds=rounds,
                min_ratio=0.3,
            ),
            await compare_rates(
                "replay: all views made anew, and switched",
                plain,
                _folded(connection, number),
                rounds=rounds,
                min_ratio=0.25,
                notes=(
                    f"{number:,} events; the most memory this process has had: "
                    f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB",
                ),
            ),
        ]


def _rate(number: int, work: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[float]]:
    async def measured() -> float:
        with Stopwatch() as watch:
            await work()
        return watch.rate(number)

    return measured


async def _cursor(db: Database) -> None:
    seen = 0
    async for _ in db.events.find({"_id": {"$gt": 0}}, sort=[("_id", 1)]):
        seen += 1


async def _verified(log: EventStore) -> None:
    verdict = await verify_log(log)
    if verdict.problem is not None:
        raise ValueError(f"the benchmark's log is wrong: {verdict.problem}")


async def _exported(log: EventStore, name: str = "log.ndjson") -> None:
    with TemporaryDirectory() as directory:
        await export_log(log, Path(directory) / name)


def _folded(connection: Connection, number: int) -> Callable[[], Awaitable[float]]:
    async def measured() -> float:
        with Stopwatch() as watch:
            await rebuild_views(connection, on_progress=lambda position, upto: None)
        await clear_shadow_views(connection)  # as a projector does after a while: not part of it
        return watch.rate(number)

    return measured


# The log --------------------------------------------------------------------------------------------------------------


async def _fill(db: Database, number: int) -> None:
    page: list[Document] = []
    for position, document in enumerate(_documents(), 1):
        document["_id"] = position
        page.append(document)
        if len(page) == 5000 or position == number:
            await db.events.insert_many(page, ordered=False)
            page = []
            if position % 100_000 == 0:
                sys.stderr.write(f"  written: {position:,} of {number:,} events\n")
        if position == number:
            break
    await db.counters.update_one({"_id": "events"}, {"$set": {"next": number}}, upsert=True)


def _documents() -> Iterator[Document]:
    """Yield events without end: batch after batch, twenty of its jobs at a time, event by event in turns."""
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
        yield from _documents_of(batch_id, [batch], meta, time)
        for begin in range(0, _JOBS_PER_BATCH, _INTERLEAVED_JOBS):
            stories = [_job_events(job_id, batch_id, time) for job_id in job_ids[begin : begin + _INTERLEAVED_JOBS]]
            made = [
                _documents_of(job_id, story, meta, time)
                for job_id, story in zip(job_ids[begin:], stories, strict=False)
            ]
            for at_once in zip(*made, strict=True):
                yield from at_once
            time += timedelta(minutes=7)


def _documents_of(stream: str, events: list[Event], meta: EventMetadata, time: datetime) -> list[Document]:
    made: list[Document] = []
    build_documents(StreamAppend(stream, StreamHead(), events, meta, time), made)
    return made


def _job_events(job_id: str, batch_id: str, time: datetime) -> list[Event]:
    words = "Wie aus einem Vortrag ein Text wird, den man lesen mag"
    parameters = {
        "session": f"{words} {job_id[-4:]}",
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

    def progressed(percent: int, step: str) -> list[JobProgressed]:
        return [
            JobProgressed(attempt=1, step=step, percent=percent + part, message=f"{step}: part {part} of 8")
            for part in range(8)
        ]

    def finished(step: str, seconds: float) -> StepCompleted:
        return StepCompleted(
            attempt=1, step=step, key=f"{step}-{job_id}" * 2, output={"sha256": "2" * 64}, duration_s=seconds
        )

    return [
        JobSubmitted(job_type="session", parameters=parameters, user_id="bench", batch_id=batch_id),
        JobClaimed(worker_id="worker-bench-1", attempt=1),
        *progressed(5, "page"),
        finished("page", 2.5),
        *progressed(30, "slides"),
        finished("slides", 61.0),
        JobLogged(attempt=1, entries=[LogEntry(timestamp=time, level="info", message="9 slides, 44 minutes of sound")]),
        *progressed(80, "transcript"),
        finished("transcript", 310.0),
        JobCompleted(attempt=1, results=results),
    ]
