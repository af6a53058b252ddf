"""Compare verification, export and view rebuild of a long log with a plain cursor that decodes the same events.

The log contains conference sessions in batches of a hundred jobs, of which twenty are interleaved. Each job has 31
events: it is submitted, claimed, logs a line, finishes three steps and is completed, and 24 events report progress.
This is few for a job that takes minutes and may report progress twice per second.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measurement import Result, compare_rates, measure_rate, open_empty_database, read_in_order
from jobledger.cli.administration.view_maintenance import open_rebuild, rebuild_views
from jobledger.ledger.domain import events as domain
from jobledger.ledger.domain.events import Event, EventMetadata
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.store.command_handler import create_batch_id, create_job_id
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
    async with open_empty_database(connection) as (db, event_store):
        await _fill(db, number)
        comparisons = (
            (
                "log verify: hashes, links, versions, positions",
                lambda: measure_rate(number, _verify(event_store)),
                0.15,
            ),
            ("log export", lambda: measure_rate(number, _export(event_store)), 0.3),
            ("log export, compressed", lambda: measure_rate(number, _export(event_store, "log.ndjson.zst")), 0.3),
            ("views rebuild: all views, with the switch", lambda: _measure_rebuild(connection, number), 0.25),
        )
        results = [
            await compare_rates(
                name,
                lambda: measure_rate(number, read_in_order(db.events)),
                measure,
                rounds=max(1, rounds // 3),
                min_ratio=min_ratio,
            )
            for name, measure, min_ratio in comparisons
        ]
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results[-1] = replace(results[-1], notes=(f"{number:,} events; peak memory of this process: {peak_mb:,.0f} MB",))
    return results


async def _verify(event_store: EventStore) -> None:
    result = await verify_log(event_store)
    if result.problem is not None:
        raise ValueError(f"the log of the benchmark is invalid: {result.problem}")


async def _export(event_store: EventStore, name: str = "log.ndjson") -> None:
    with TemporaryDirectory() as directory:
        await export_log(event_store, Path(directory) / name)


async def _measure_rebuild(connection: Connection, number: int) -> float:
    rate = await measure_rate(number, rebuild_views(connection, on_progress=lambda position, total: None))
    async with open_rebuild(connection) as rebuild:
        await rebuild.clear_shadow()  # the projector does this later, so it is not measured
    return rate


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
        batch_id, job_ids = create_batch_id(), [create_job_id() for _ in range(_JOBS_PER_BATCH)]
        meta = EventMetadata("user:bench", correlation_id=batch_id)
        batch = domain.BatchSubmitted(
            batch_name="Tag 1",
            total_jobs=_JOBS_PER_BATCH,
            job_ids=job_ids,
            user_id="bench",
            parameters={"event": "Conf"},
        )
        yield from _build_stream(batch_id, [batch], meta, time)
        for begin in range(0, _JOBS_PER_BATCH, _INTERLEAVED_JOBS):
            streams = [
                _build_stream(job_id, _build_job_events(job_id, batch_id, time), meta, time)
                for job_id in job_ids[begin : begin + _INTERLEAVED_JOBS]
            ]
            for documents in zip(*streams, strict=True):
                yield from documents
            time += timedelta(minutes=7)


def _build_stream(stream: str, events: list[Event], meta: EventMetadata, time: datetime) -> list[Document]:
    documents: list[Document] = []
    build_documents(StreamAppend(stream, StreamHead(), events, meta, time), documents)
    return documents


def _build_job_events(job_id: str, batch_id: str, time: datetime) -> list[Event]:
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
    results = domain.JobResults(
        markdown_file=f"/events/{path}",
        markdown_url=f"/api/events/files/{path}",
        files=[
            domain.ResultFile(path=path, sha256="0" * 64, size=20_000, media_type="text/markdown"),
            domain.ResultFile(path=f"{job_id}/slide-1.jpg", sha256="1" * 64, size=90_000, media_type="image/jpeg"),
        ],
        metadata=domain.ResultMetadata(processed_at=time, duration=420.5, tokens_used=9000),
    )

    def report_progress(percent: int, step: str) -> list[domain.JobProgressed]:
        return [
            domain.JobProgressed(attempt=1, step=step, percent=percent + part, message=f"{step}: part {part} of 8")
            for part in range(8)
        ]

    def finish_step(step: str, seconds: float) -> domain.StepCompleted:
        return domain.StepCompleted(
            attempt=1, step=step, key=f"{step}-{job_id}" * 2, output={"sha256": "2" * 64}, duration_s=seconds
        )

    return [
        domain.JobSubmitted(job_type="session", parameters=parameters, user_id="bench", batch_id=batch_id),
        domain.JobClaimed(worker_id="worker-bench-1", attempt=1),
        *report_progress(5, "page"),
        finish_step("page", 2.5),
        *report_progress(30, "slides"),
        finish_step("slides", 61.0),
        domain.JobLogged(
            attempt=1, entries=[domain.LogEntry(timestamp=time, level="info", message="9 slides, 44 minutes of sound")]
        ),
        *report_progress(80, "transcript"),
        finish_step("transcript", 310.0),
        domain.JobCompleted(attempt=1, results=results),
    ]
