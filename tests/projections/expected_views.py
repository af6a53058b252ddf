"""tests: what the views have to be, told anew from the log: no projector, no chunks, no database writes."""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

from jobledger.ledger.domain.canonical_json import canonical_json
from jobledger.ledger.domain.commands import (
    AddLogEntries,
    Archive,
    CancelJob,
    ChangeAccess,
    ClaimJob,
    CompleteJob,
    CompleteStep,
    ConfirmCancel,
    Delete,
    ExpireLease,
    FailAttempt,
    PauseBatch,
    ReleaseJob,
    ReportProgress,
    RestartJob,
    ResumeBatch,
    Unarchive,
    UpdateJob,
)
from jobledger.ledger.domain.errors import CommandRejected
from jobledger.ledger.domain.events import (
    AccessControl,
    Failure,
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
from jobledger.projections.views import batches, files, jobs, queue, statistics, steps
from tests.support.role_runner import RunningRoles

Views = dict[str, list[str]]
"""The documents of each view in canonical form, sorted."""


def fold_views(events: list[RecordedEvent]) -> Views:
    """Fold a whole log, event by event, and derive every view from where that ends."""
    job: dict[str, Document | None] = {}
    batch: dict[str, Document | None] = {}
    counted: Counter[tuple[str, str]] = Counter()
    recent: Document | None = None
    for event in events:
        counted[statistics.EVENTS, event.type] += 1
        match event.stream.partition("-")[0]:
            case "job":
                before = job.get(event.stream)
                after = job[event.stream] = jobs.fold(before, event)
                if after and statistics.has_just_finished(before, after):
                    counted.update(statistics.counters_for_completion(after))
                    recent = statistics.count_finished_job(recent, after)
                batch_id = (after or before or {}).get("batch_id")
                # What a running job says along the way does not concern its batch.
                running = before and after and before["status"] == after["status"] == "processing"
                known = batch.get(batch_id) if batch_id else None
                if after is not before and not running and batch_id and known is not None:
                    batch[batch_id] = batches.apply_job_change(known, before, after, event)
            case "batch":
                batch[event.stream] = batches.fold(batch.get(event.stream), event)
    live = [document for document in job.values() if document]
    for document in live:
        counted.update(statistics.counters_for_job(document))
    for document in filter(None, batch.values()):
        counted.update(statistics.counters_for_batch(document))
    return _canonical(
        {
            "jobs": live,
            "batches": [document for document in batch.values() if document],
            "queue": [row for document in live for row in queue.rows(document, batch.get(document["batch_id"]))],
            "files": [row for document in live for row in files.rows(document)],
            "steps": [row for document in live for row in steps.rows(document)],
            "statistics": _nonzero([*_counters(counted), *([recent] if recent else [])]),
        }
    )


def _counters(counted: Counter[tuple[str, str]]) -> list[Document]:
    counters: dict[str, Document] = {}
    for (key, name), amount in counted.items():
        counters.setdefault(key, {"_id": key})[name] = amount
    return list(counters.values())


async def load_views(db: Database, *, zeros: bool = True) -> Views:
    """Return what the views say now; without `zeros`, a counter that has gone back to zero is as one that never was."""
    live = slots.Views(db, (await load_checkpoint(db)).get("slots"))
    found = {
        view.NAME: [document async for document in live[view.NAME].find()]
        for view in (jobs, batches, queue, files, statistics, steps)
    }
    if not zeros:
        found["statistics"] = _nonzero(found["statistics"])
    return _canonical(found)


def _nonzero(counters: list[Document]) -> list[Document]:
    return [
        {name: value for name, value in counter.items() if value != 0}
        for counter in counters
        if any(value for name, value in counter.items() if name != "_id")
    ]


def _canonical(views: dict[str, list[Document]]) -> Views:
    return {view: sorted(canonical_json(document).decode() for document in found) for view, found in views.items()}


async def assert_views_match_log(here: RunningRoles) -> None:
    """Wait for the views, then compare them with a fresh fold of the whole log."""
    while True:
        head = await here.event_store.head_position()
        await here.wait_for_views(head)
        events, found = await here.read_all_events(), await load_views(here.db, zeros=False)
        if head == len(events) == await here.event_store.head_position():
            break  # else the projector has recorded something about a batch meanwhile
    wanted = fold_views(events)
    for view, documents in wanted.items():
        assert found[view] == documents, f"the view `{view}` is not what the log says"


# Histories --------------------------------------------------------------------------------------------------------


def make_results(job_id: str, *, tokens: int = 10) -> JobResults:
    return JobResults(
        markdown_file=f"/events/{job_id}/a.md",
        markdown_url=f"/api/events/files/{job_id}/a.md",
        files=[ResultFile(path=f"{job_id}/a.md", sha256="0" * 64, size=3, media_type="text/markdown")],
        metadata=ResultMetadata(processed_at=datetime.now(UTC), duration=1.5, tokens_used=tokens, warnings=["hm"]),
    )


def make_failure(message: str = "it broke") -> Failure:
    return Failure(code="BROKEN", message=message, details={"retryable": True})


async def run_random_job_commands(here: RunningRoles, job_ids: list[str], dice: random.Random, *, steps: int) -> None:
    """Let the jobs live through `steps` things that happen to them, most of them sensible."""
    attempts: dict[str, int] = dict.fromkeys(job_ids, 1)
    for _ in range(steps):
        job_id = dice.choice(job_ids)
        try:
            events = await here.handle_commands(job_id, _something(job_id, attempts[job_id], dice))
        except CommandRejected:
            continue
        for event in events:
            if event.type == "JobClaimed":
                attempts[job_id] = event.event.model_dump()["attempt"]


async def run_random_batch_commands(
    here: RunningRoles, batch_ids: list[str], dice: random.Random, *, steps: int
) -> None:
    """Pause and resume the batches, put them out of sight and back, while their jobs live."""
    things: list[Command] = [PauseBatch("user-1"), ResumeBatch("user-1"), Archive("user-1"), Unarchive("user-1")]
    for _ in range(steps):
        await here.handle_commands(dice.choice(batch_ids), dice.choices(things, [4, 4, 1, 1])[0])


def _something(job_id: str, attempt: int, dice: random.Random) -> Command:
    now, worker = datetime.now(UTC), "worker-1"
    things: list[tuple[int, Any]] = [
        (30, ClaimJob(worker, now + timedelta(hours=1))),
        (10, ReportProgress(worker, attempt, "page", dice.random() * 100, "on it")),
        (8, AddLogEntries(worker, attempt, (LogEntry(timestamp=now, level="info", message=f"line {dice.random()}"),))),
        (4, CompleteStep(worker, attempt, "page", "key", {"a": 1}, 0.5, 3, ("warned",))),
        (12, CompleteJob(worker, attempt, make_results(job_id, tokens=dice.randrange(100)))),
        (6, FailAttempt(worker, attempt, make_failure(), now + timedelta(minutes=5))),
        (4, FailAttempt(worker, attempt, make_failure(), None)),
        (4, ReleaseJob(worker, attempt, "shutdown")),
        (4, ExpireLease(worker, attempt)),
        (4, CancelJob("user-1", "no longer wanted")),
        (2, ConfirmCancel(worker, attempt)),
        (8, RestartJob("user-1")),
        (6, UpdateJob("user-1", {"track": dice.choice("ABC")}, dice.randrange(5), now + timedelta(hours=2))),
        (2, ChangeAccess("user-1", AccessControl(visibility="team"))),
        (2, Archive("user-1")),
        (2, Unarchive("user-1")),
        (1, Delete("user-1")),
    ]
    thing: Command = dice.choices([thing for _, thing in things], [weight for weight, _ in things])[0]
    return thing
