"""Compute the expected views from the log: without a projector, chunks or database writes.

Also random histories of jobs and batches, for tests that compare both.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

from jobledger.ledger.domain.canonical_json import encode_canonical_json
from jobledger.ledger.domain.commands import (
    Archive,
    CancelJob,
    ChangeAccess,
    ClaimJob,
    ConfirmCancel,
    Delete,
    ExpireLease,
    FailAttempt,
    PauseBatch,
    ReleaseJob,
    RestartJob,
    ResumeBatch,
    Unarchive,
    UpdateJob,
)
from jobledger.ledger.domain.errors import CommandRejected
from jobledger.ledger.domain.events import (
    AccessControl,
    ErrorInfo,
    JobResults,
    LogEntry,
    RecordedEvent,
    ResultFile,
    ResultMetadata,
)
from jobledger.ledger.mongo.connection import Database, Document
from jobledger.ledger.store.command_handler import Command
from jobledger.projections import slots
from jobledger.projections.engine.checkpoint import load_checkpoint
from jobledger.projections.views import batches, files, job_list, jobs, queue, statistics, steps
from tests.support.role_runner import RunningRoles
from tests.support.worker_reports import report_log, report_progress, report_results, report_step

Views = dict[str, list[str]]
"""The documents of each view in canonical form, sorted."""
COMPARED_VIEWS = (jobs, job_list, batches, queue, files, statistics, steps)


def fold_views(events: list[RecordedEvent]) -> Views:
    """Fold a whole log, event by event, and derive every view from the last state."""
    job: dict[str, Document | None] = {}
    batch: dict[str, Document | None] = {}
    counters: Counter[tuple[str, str]] = Counter()
    recent: Document | None = None
    for event in events:
        counters[statistics.EVENTS, event.type] += 1
        match event.stream.partition("-")[0]:
            case "job":
                before = job.get(event.stream)
                after = job[event.stream] = jobs.fold(before, event)
                if after and statistics.has_just_finished(before, after):
                    counters.update(statistics.build_completion_increments(after))
                    recent = statistics.count_finished_job(recent, after)
                batch_id = (after or before or {}).get("batch_id")
                # Progress and log entries of a running job do not change its batch.
                running = before and after and before["status"] == after["status"] == "processing"
                batch_before = batch.get(batch_id) if batch_id else None
                if after is not before and not running and batch_id and batch_before is not None:
                    batch[batch_id] = batches.apply_job_change(batch_before, before, after, event)
            case "batch":
                batch[event.stream] = batches.fold(batch.get(event.stream), event)
    job_documents = [document for document in job.values() if document]
    for document in job_documents:
        counters.update(statistics.get_job_counters(document))
    for document in filter(None, batch.values()):
        counters.update(statistics.get_batch_counters(document))
    return _to_canonical_json(
        {
            "jobs": job_documents,
            "job_list": [job_list.build_row(document) for document in job_documents],
            "batches": [document for document in batch.values() if document],
            "queue": [
                row for document in job_documents for row in queue.build_rows(document, batch.get(document["batch_id"]))
            ],
            "files": [row for document in job_documents for row in files.build_rows(document)],
            "steps": [row for document in job_documents for row in steps.build_rows(document)],
            "statistics": _drop_zeros([*_counter_documents(counters), *([recent] if recent else [])]),
        }
    )


def _counter_documents(amounts: Counter[tuple[str, str]]) -> list[Document]:
    counters: dict[str, Document] = {}
    for (key, name), amount in amounts.items():
        counters.setdefault(key, {"_id": key})[name] = amount
    return list(counters.values())


async def load_views(db: Database, *, zeros: bool = True) -> Views:
    """Return the active views. Without `zeros`, leave out counters that are zero."""
    active = slots.Views(db, (await load_checkpoint(db)).get("slots"))
    documents = {view.NAME: [document async for document in active[view.NAME].find()] for view in COMPARED_VIEWS}
    if not zeros:
        documents["statistics"] = _drop_zeros(documents["statistics"])
    return _to_canonical_json(documents)


def _drop_zeros(counters: list[Document]) -> list[Document]:
    return [
        {name: value for name, value in counter.items() if value != 0}
        for counter in counters
        if any(value for name, value in counter.items() if name != "_id")
    ]


def _to_canonical_json(views: dict[str, list[Document]]) -> Views:
    return {name: sorted(encode_canonical_json(document).decode() for document in views[name]) for name in views}


async def assert_views_match_log(roles: RunningRoles) -> None:
    """Wait for the views, then compare them with a fresh fold of the whole log."""
    while True:
        head = await roles.event_store.read_head_position()
        await roles.wait_for_views(head)
        events, actual = await roles.read_all_events(), await load_views(roles.db, zeros=False)
        if head == len(events) == await roles.event_store.read_head_position():
            break  # otherwise the projector has appended an event of a batch meanwhile
    for name, documents in fold_views(events).items():
        assert actual[name] == documents, f"the view `{name}` differs from the log"


# Random histories -----------------------------------------------------------------------------------------------------


def make_results(job_id: str, *, tokens: int = 10) -> JobResults:
    return JobResults(
        markdown_file=f"/events/{job_id}/a.md",
        markdown_url=f"/api/events/files/{job_id}/a.md",
        files=[ResultFile(path=f"{job_id}/a.md", sha256="0" * 64, size=3, media_type="text/markdown")],
        metadata=ResultMetadata(processed_at=datetime.now(UTC), duration=1.5, tokens_used=tokens, warnings=["hm"]),
    )


def make_empty_results(**metadata: Any) -> JobResults:
    """Return results without files."""
    return JobResults(metadata=ResultMetadata(processed_at=datetime.now(UTC), duration=1.0, **metadata))


def make_failure(message: str = "it broke") -> ErrorInfo:
    return ErrorInfo(code="BROKEN", message=message, details={"retryable": True})


async def run_random_job_commands(roles: RunningRoles, job_ids: list[str], dice: random.Random, *, steps: int) -> None:
    """Handle `steps` random commands of these jobs. Most of them are valid in the state of the job."""
    attempts: dict[str, int] = dict.fromkeys(job_ids, 1)
    for _ in range(steps):
        job_id = dice.choice(job_ids)
        try:
            events = await roles.handle_commands(job_id, _choose_command(job_id, attempts[job_id], dice))
        except CommandRejected:
            continue
        for event in events:
            if event.type == "JobClaimed":
                attempts[job_id] = event.event.model_dump()["attempt"]


async def run_random_batch_commands(
    roles: RunningRoles, batch_ids: list[str], dice: random.Random, *, steps: int
) -> None:
    """Pause, resume, archive and unarchive these batches at random."""
    commands: list[Command] = [PauseBatch("user-1"), ResumeBatch("user-1"), Archive("user-1"), Unarchive("user-1")]
    for _ in range(steps):
        await roles.handle_commands(dice.choice(batch_ids), dice.choices(commands, [4, 4, 1, 1])[0])


async def run_random_history(roles: RunningRoles, dice: random.Random, *, writers: int = 4, steps: int = 60) -> None:
    """Submit two batches and single jobs of several tracks, and handle random commands of them concurrently."""
    batch_one, one = await roles.submit_batch(*({"track": track} for track in "AABBC"))
    batch_two, two = await roles.submit_batch({}, {"track": "A"}, max_attempts=2)
    alone = [await roles.submit({"track": "C"}, priority=number) for number in range(3)]
    job_ids = one + two + alone
    shares = [job_ids[start::writers] for start in range(writers)]
    await asyncio.gather(
        *(run_random_job_commands(roles, share, random.Random(dice.random()), steps=steps) for share in shares),
        run_random_batch_commands(roles, [batch_one, batch_two], random.Random(dice.random()), steps=steps // 2),
    )


def _choose_command(job_id: str, attempt: int, dice: random.Random) -> Command:
    now, worker = datetime.now(UTC), "worker-1"
    weighted_commands: list[tuple[int, Any]] = [
        (30, ClaimJob(worker, now + timedelta(hours=1))),
        (10, report_progress(worker, attempt, "page", dice.random() * 100, "on it")),
        (8, report_log(worker, attempt, (LogEntry(timestamp=now, level="info", message=f"line {dice.random()}"),))),
        (4, report_step(worker, attempt, "page", "key", {"a": 1}, 0.5, tokens_used=3, warnings=["warned"])),
        (4, report_step(worker, attempt, "slides", "slides", {}, 0.5, warnings=["404"], repeat_on_restart=True)),
        (12, report_results(worker, attempt, make_results(job_id, tokens=dice.randrange(100)))),
        (6, FailAttempt(worker, attempt, make_failure(), now + timedelta(minutes=5))),
        (4, FailAttempt(worker, attempt, make_failure(), None)),
        (4, ReleaseJob(worker, attempt, "shutdown")),
        (4, ExpireLease(worker, attempt)),
        (4, CancelJob("user-1", "no longer wanted")),
        (2, ConfirmCancel(worker, attempt)),
        (6, RestartJob("user-1")),
        (2, RestartJob("user-1", parameters={"track": dice.choice("ABC")})),
        (6, UpdateJob("user-1", {"track": dice.choice("ABC")}, dice.randrange(5), now + timedelta(hours=2))),
        (2, ChangeAccess("user-1", AccessControl(visibility="team"))),
        (2, Archive("user-1")),
        (2, Unarchive("user-1")),
        (1, Delete("user-1")),
    ]
    weights, commands = zip(*weighted_commands, strict=True)
    command: Command = dice.choices(commands, weights)[0]
    return command
