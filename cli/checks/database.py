"""Checks of `jobledger doctor` on the database: server, rights, log, views, workers and result store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from jobledger.cli.checks.mongodb_support import build_support_warning
from jobledger.cli.checks.result import CheckResult
from jobledger.cli.hosting.database import find_store_marker, open_database, open_file_store
from jobledger.cli.output.formatting import format_count, format_timestamp
from jobledger.cli.settings import Settings
from jobledger.ledger.domain.errors import JobledgerError, LogTruncated, ResourceUnavailable
from jobledger.ledger.domain.statuses import WaitingFor
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.gridfs import COLLECTIONS
from jobledger.ledger.mongo.connection import (
    OPLOG_ADVICE,
    Connection,
    Database,
    Document,
    read_oplog_window,
    read_transaction_limit_seconds,
    translate_errors,
)
from jobledger.ledger.mongo.embedded import TRANSACTION_SECONDS
from jobledger.ledger.mongo.leader_election import LeaderElection
from jobledger.ledger.outbox import submission as outbox
from jobledger.ledger.store.event_store import EventStore, ReadPosition
from jobledger.ledger.system.disk_space import find_existing_directory, find_write_problem
from jobledger.projections.engine.checkpoint import load_checkpoint
from jobledger.projections.engine.stalls import VIEWS_AHEAD_REASON, find_stall_reason
from jobledger.projections.slots import Views
from jobledger.projections.views import files, job_list, projection_errors, queue, step_files, waiting
from jobledger.workers import cleanup

_MAX_CLOCK_DIFFERENCE_SECONDS: Final = 2.0
_STALL_TIMEOUT_SECONDS: Final = 12.0
"""Longer than a failover of the projector."""
_POLL_INTERVAL_SECONDS: Final = 0.5
_MAX_SHOWN: Final = 5
_MAX_LAG_EVENTS: Final = 10_000
_MAX_WAIT: Final = timedelta(minutes=1)
"""How long a job may wait although slots are free: longer than the start of a worker with its plug-ins."""
_WAITING_TEXTS: Final[Mapping[WaitingFor, str]] = {
    "worker": "for a worker",
    "due_time": "for their start time",
    "retry": "for a retry",
    "batch_paused": "in paused batches",
}
_LOG_CHANGING_ACTIONS: Final = frozenset(
    {"update", "remove", "dropCollection", "dropDatabase", "renameCollectionSameDB", "anyAction"}
    | {"createIndex", "collMod", "convertToCapped"}  # TTL indexes and capped collections delete events
    | {"grantRole", "createRole", "updateRole", "grantPrivilege"}  # a user with these can grant itself the others
)
"""MongoDB actions by which events can be changed or removed."""
_ACTIVE_LEASE: Final = {"$expr": {"$gt": ["$lease_until", "$$NOW"]}}
"""Matches leases that their holders extend."""


async def check_database(settings: Settings, connection: Connection) -> AsyncIterator[CheckResult]:
    """Yield the results of all checks on a database."""
    try:
        async with open_database(connection) as db:
            for check in _CHECKS:
                with translate_errors("being checked"):
                    result = await check(db)
                yield result
            yield await _check_result_store(settings, db)
    except JobledgerError as error:
        yield CheckResult("MongoDB", is_ok=False, detail="not usable", advice=str(error))


async def _check_result_store(settings: Settings, db: Database) -> CheckResult:
    """Check whether result files can be stored. A missing directory is not created: its disk may be unmounted."""
    store = settings.results.store
    try:
        if isinstance(store, Path):
            detail = await _check_directory(store, db)
        else:
            await open_file_store(settings, db)
            detail = f"GridFS in {db.name} ({', '.join(COLLECTIONS)})"
    except JobledgerError as error:
        return CheckResult("Result files", is_ok=False, detail="not usable", advice=str(error))
    return CheckResult("Result files", is_ok=True, detail=detail)


async def _check_directory(root: Path, db: Database) -> str:
    marker = await find_store_marker(root, db)
    if not marker.is_new:
        await asyncio.to_thread(DirectoryStore(root, marker=marker).prepare)
        return str(root)
    if (problem := await asyncio.to_thread(lambda: find_write_problem(find_existing_directory(root), 0))) is not None:
        raise ResourceUnavailable(str(problem))
    return f"{root}, created by the first start"


async def _check_server(db: Database) -> CheckResult:
    hello = await db.client.admin.command("hello", compression=["zlib"])
    build = await db.client.admin.command("buildInfo")
    members = format_count(len(hello.get("hosts", [])), "member")
    detail = f"{build['version']}, replica set {hello['setName']} with {members}"
    warning = build_support_warning(
        build["version"], datetime.now(UTC).date(), zlib="zlib" in hello.get("compression", ())
    )
    return CheckResult("MongoDB", is_ok=True, detail=detail if warning is None else f"{detail}. Note: {warning}")


async def _check_clock(db: Database) -> CheckResult:
    local_time = datetime.now(UTC)
    # The response of a command ignores the client's `tz_aware`, so the codec options are passed.
    server_time = (await db.client.admin.command("hello", codec_options=db.codec_options))["localTime"]
    difference = (server_time - local_time).total_seconds()
    return CheckResult(
        "Clocks",
        abs(difference) < _MAX_CLOCK_DIFFERENCE_SECONDS,
        f"database server differs by {difference:+.2f} s",
        "Run a time service (chrony, systemd-timesyncd) on both machines. Jobs start by the server's clock, but log "
        "lines and JWT checks use this machine's clock.",
    )


async def _check_oplog(db: Database) -> CheckResult:
    window = await read_oplog_window(db)
    if window is None:
        return CheckResult("Oplog", is_ok=True, detail="not readable by this MongoDB user")
    detail = f"{window.size_mb:.0f} MB, covers {window.hours:.1f} h" + ("" if window.is_full else " so far")
    return CheckResult("Oplog", not window.is_too_short, detail, OPLOG_ADVICE)


async def _check_transaction_limit(db: Database) -> CheckResult:
    """Check how long readers wait for an appender that was killed inside a transaction."""
    seconds = await read_transaction_limit_seconds(db)
    if seconds is None:
        return CheckResult("Transactions", is_ok=True, detail="time limit not readable by this MongoDB user")
    detail = f"time limit {seconds} s"
    if seconds > TRANSACTION_SECONDS:
        command = f"{{setParameter: 1, transactionLifetimeLimitSeconds: {TRANSACTION_SECONDS}}}"
        detail += "; an appender that was killed can delay readers for this long. "
        detail += f"Run on each member: db.adminCommand({command})"
    return CheckResult("Transactions", is_ok=True, detail=detail)


async def _check_rights(db: Database) -> CheckResult:
    """Report whether this MongoDB user can change the log. Jobledger does not need that right."""
    status = await db.client.admin.command({"connectionStatus": 1, "showPrivileges": True})
    auth_info = status["authInfo"]
    if not auth_info["authenticatedUsers"]:
        return CheckResult("Rights", is_ok=True, detail="no authentication: every client has full access")
    actions = {
        action
        for privilege in auth_info["authenticatedUserPrivileges"]
        if _covers_events(privilege["resource"], db.name)
        for action in privilege["actions"]
    }
    if _LOG_CHANGING_ACTIONS & actions:
        detail = "this MongoDB user can change and remove events; `jobledger mongo-roles` prints a role that cannot"
    else:
        detail = "this MongoDB user can append events, but not change or remove them"
    return CheckResult("Rights", is_ok=True, detail=detail)


def _covers_events(resource: Mapping[str, Any], db_name: str) -> bool:
    """Return whether a privilege's resource includes the collection `events`."""
    if resource.get("anyResource"):
        return True
    return resource.get("db") in ("", db_name) and resource.get("collection") in ("", "events")


async def _check_log(db: Database) -> CheckResult:
    """Check whether the views are at the head of the log, or make progress."""
    event_store = EventStore(db)
    head, start = await event_store.read_head_position(), await _load_views_position(db)
    position, waited = start, 0.0
    while position < head and position == start and waited < _STALL_TIMEOUT_SECONDS:
        await asyncio.sleep(_POLL_INTERVAL_SECONDS)
        waited += _POLL_INTERVAL_SECONDS
        position = await _load_views_position(db)
    if position > await event_store.read_head_position():
        detail = f"{head} events, but the views are at position {position}"
        return CheckResult("Log", is_ok=False, detail=detail, advice=VIEWS_AHEAD_REASON)
    try:
        await event_store.check_not_truncated(ReadPosition.from_document(await load_checkpoint(db)), "the views")
    except LogTruncated as error:
        return CheckResult("Log", is_ok=False, detail=str(error).rstrip("."), advice="Run `jobledger log verify`.")
    detail = f"{head} events, views at {position}"
    if position < head and position == start:
        advice = await find_stall_reason(db, position, head)
        return CheckResult("Log", is_ok=False, detail=f"{detail}, no progress for {waited:.0f} s", advice=advice)
    is_ok = head - position < _MAX_LAG_EVENTS
    return CheckResult("Log", is_ok, detail, "The views lag far behind, but catch up. Check again later.")


async def _load_views_position(db: Database) -> int:
    return int((await load_checkpoint(db))["position"])


async def _check_projection_failures(db: Database) -> CheckResult:
    """Check whether all documents of the views match the log."""
    views = Views(db, (await load_checkpoint(db)).get("slots"))
    rows = await projection_errors.list_errors(views, limit=_MAX_SHOWN + 1)
    if not rows:
        return CheckResult("Views", is_ok=True, detail="match the log")
    failures = "; ".join(
        f"{row['key']} (event at position {row['position']}): {row['message']}" for row in rows[:_MAX_SHOWN]
    )
    more = " and more" if len(rows) > _MAX_SHOWN else ""
    advice = "The log is complete. Upgrade or fix Jobledger, then run `jobledger views rebuild`."
    return CheckResult("Views", is_ok=False, detail=f"do not match the log for {failures}{more}", advice=advice)


async def _check_cleanup(db: Database) -> CheckResult:
    """Check whether files of deleted jobs can be removed from the result store."""
    views = Views(db, (await load_checkpoint(db)).get("slots"))
    job_ids = await files.find_jobs_with_unknown_files(views, limit=_MAX_SHOWN)
    skipped = (await db.checkpoints.find_one({"_id": cleanup.CURSOR}) or {}).get(cleanup.SKIPPED, [])
    if job_ids:
        advice = (
            f"Delete jobs whose steps have more than {step_files.MAX_STEP_FILES:,} files. For jobs whose view does not "
            "match the log, see Views above."
        )
        detail = f"no files are removed, because not all files of {', '.join(job_ids)} are known"
        return CheckResult("Cleanup", is_ok=False, detail=detail, advice=advice)
    if skipped:
        detail = f"files and secrets of these deleted jobs remain: {', '.join(skipped[-_MAX_SHOWN:])}"
        advice = "Their events are damaged: run `jobledger log verify`."
        return CheckResult("Cleanup", is_ok=False, detail=detail, advice=advice)
    return CheckResult("Cleanup", is_ok=True, detail="files of deleted jobs are removed")


async def _check_outbox(db: Database) -> CheckResult:
    """Check whether all jobs that programs have submitted in their transactions could be appended."""
    waiting = await db[outbox.COLLECTION].estimated_document_count()
    rejected = await db[outbox.REJECTED_COLLECTION].estimated_document_count()
    if not rejected:
        return CheckResult("Outbox", is_ok=True, detail=f"{format_count(waiting, 'job')} waiting")
    shown = await db[outbox.REJECTED_COLLECTION].find({}, {"reason": 1}, sort=[("_id", 1)], limit=_MAX_SHOWN).to_list()
    reasons = "; ".join(f"{str(document['_id'])[:40]}: {str(document.get('reason'))[:200]}" for document in shown)
    detail = f"{format_count(rejected, 'document')} rejected: {reasons}"
    advice = (
        f"Correct the program, submit these jobs again, and delete the documents from {outbox.REJECTED_COLLECTION}."
    )
    return CheckResult("Outbox", is_ok=False, detail=detail, advice=advice)


async def _check_workers(db: Database) -> CheckResult:
    """Check whether all active workers claim jobs."""
    workers = await db.workers.find(_ACTIVE_LEASE).to_list()
    unhealthy = [worker for worker in workers if worker.get("problem")]
    problems = "; ".join(
        f"{worker['_id']} since {format_timestamp(worker['unhealthy_since'], 'seconds')}: {worker['problem']}"
        for worker in unhealthy
    )
    detail = f"{len(workers)} active" + (f", {len(unhealthy)} not claiming jobs" if unhealthy else "")
    return CheckResult("Workers", not unhealthy, detail, problems)


async def _check_projector(db: Database) -> CheckResult:
    """Check whether a projector is the leader, if there is anything to project."""
    leader = await db[LeaderElection.collection].find_one({"_id": "projector", **_ACTIVE_LEASE})
    if leader is not None:
        return CheckResult("Projector", is_ok=True, detail=f"{leader['holder']} keeps the views up to date")
    lag = await EventStore(db).read_head_position() - await _load_views_position(db)
    is_needed = lag > 0 or await db[outbox.COLLECTION].estimated_document_count() > 0
    advice = "Start `jobledger projector` or `jobledger up`."
    return CheckResult("Projector", not is_needed, "none active", advice)


async def _check_jobs(db: Database) -> CheckResult:
    """Check whether jobs wait for a worker that does not exist, or run on workers that have no lease.

    Jobs that wait for their start time, for a retry or for their paused batch are not stuck.
    """
    views, now = Views(db, (await load_checkpoint(db)).get("slots")), await EventStore(db).read_server_time()
    active = await db.workers.find(_ACTIVE_LEASE, {"slots": 1}).to_list()
    running = await job_list.find_running_jobs(views)
    counts = await waiting.count_all_jobs(views, now)
    kinds = ", ".join(f"{counts[kind]} {text}" for kind, text in _WAITING_TEXTS.items() if counts[kind])
    detail = f"{len(running)} running" + (f"; waiting: {kinds}" if kinds else "")
    worker_ids = {worker["_id"] for worker in active}
    if stuck := [job["_id"] for job in running if job["worker_id"] not in worker_ids]:
        examples = ", ".join(stuck[:_MAX_SHOWN]) + (" and more" if len(stuck) > _MAX_SHOWN else "")
        detail = f"{detail}; {len(stuck)} stuck, because their workers are gone: {examples}"
        advice = "An active worker continues them when their leases expire. Start `jobledger worker` if there is none."
        return CheckResult("Jobs", is_ok=False, detail=detail, advice=advice)
    has_free_slots = sum(worker.get("slots", 0) for worker in active) > len(running)
    if has_free_slots and (types := await _find_types_without_worker(views, running, now)):
        detail = f"{detail}; no worker takes those of type {', '.join(types[:_MAX_SHOWN])}, although slots are free"
        advice = "Start a worker that has these job types, or read in the log of the workers why it cannot use them."
        return CheckResult("Jobs", is_ok=False, detail=detail, advice=advice)
    advice = "No worker is active, so no job starts. Start `jobledger worker` or `jobledger up`."
    return CheckResult("Jobs", not counts["worker"] or bool(active), detail, advice)


async def _find_types_without_worker(views: Views, running: Sequence[Document], now: datetime) -> list[str]:
    """Return the types of jobs that have waited for a while, and of which no job runs."""
    is_running = {job["job_type"] for job in running}
    oldest = await queue.find_oldest_claimable_by_type(views, now=now)
    return sorted(name for name, since in oldest.items() if now - since > _MAX_WAIT and name not in is_running)


_CHECKS: Final = (
    _check_server,
    _check_clock,
    _check_oplog,
    _check_transaction_limit,
    _check_rights,
    _check_log,
    _check_projection_failures,
    _check_cleanup,
    _check_outbox,
    _check_workers,
    _check_projector,
    _check_jobs,
)
