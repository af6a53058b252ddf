"""cli: `jobledger doctor`. Looks at everything a ledger needs and says what to do about what is wrong."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.text import Text

from jobledger.cli.composition import find_store_marker, open_database, open_file_store
from jobledger.cli.formatting import format_timestamp
from jobledger.cli.mongodb_support import support_warning
from jobledger.cli.settings import Settings
from jobledger.cli.terminal_text import SafeTable
from jobledger.ledger.domain.errors import (
    ConfigurationError,
    JobledgerError,
    LogTruncated,
    ResourceUnavailable,
    classify_os_error,
)
from jobledger.ledger.files import store_marker
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.gridfs import COLLECTIONS
from jobledger.ledger.mongo.connection import (
    OPLOG_ADVICE,
    Database,
    read_oplog_window,
    read_transaction_limit_seconds,
    translate_errors,
)
from jobledger.ledger.mongo.embedded import TRANSACTION_SECONDS, find_mongod
from jobledger.ledger.store.event_store import EventStore, ReadPosition
from jobledger.ledger.system.disk_space import MIB, find_write_problem, free_bytes, nearest_existing_directory
from jobledger.projections.engine.health import VIEWS_AHEAD_REASON, stall_reason
from jobledger.projections.slots import Views
from jobledger.projections.views import files, projection_errors, step_files
from jobledger.workers import cleanup
from jobledger.workers.child import confinement
from jobledger.workers.machine_health import MachineFailure
from jobledger.workers.registry import (
    ProcessorUnusable,
    check_plugins,
    check_preload,
    disable_job_type,
    is_built_in,
    load_processors,
    unusable_job_types,
)
from jobledger.workers.sandbox import restrictions, runner
from jobledger.workers.scratch import ScratchDirectory

_CLOCKS_APART_SECONDS = 2.0
_STALLED_AFTER_SECONDS = 12.0
"""Longer than the views wait for a fail-over of the projector."""
_LOOKS_AGAIN_SECONDS = 0.5
_FAILURES_SHOWN = 5
_CHANGING = frozenset(
    {"update", "remove", "dropCollection", "dropDatabase", "renameCollectionSameDB", "anyAction"}
    | {"createIndex", "collMod", "convertToCapped"}  # an index can let events expire, a capped collection forgets them
    | {"grantRole", "createRole", "updateRole", "grantPrivilege"}  # by which one may allow oneself the rest
)
"""The server's actions by which events can be changed or removed."""
_CODECS = {"av": "video and audio", "pypdfium2": "PDF slides", "PIL": "images", "trafilatura": "web pages"}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One thing that was looked at. `advice` is what to do when it is not `good`."""

    name: str
    is_ok: bool
    detail: str
    advice: str = ""


def results_table(findings: Iterable[CheckResult]) -> SafeTable:
    """Return findings for people."""
    table = SafeTable("", "", "", show_header=False)
    for finding in findings:
        sign = Text("ok", style="green") if finding.is_ok else Text("no", style="red")
        table.add_row(sign, finding.name, finding.detail if finding.is_ok else f"{finding.detail}. {finding.advice}")
    return table


def check_machine(settings: Settings) -> Iterator[CheckResult]:
    """Yield what can be seen without a database."""
    yield CheckResult("Python", sys.version_info >= (3, 11), sys.version.split()[0], "Python 3.11 or newer is needed.")
    if settings.mongodb.is_embedded:
        yield _finding("MongoDB server", lambda: str(find_mongod()))
        yield _space("Disk of the database", settings.mongodb.data_dir, settings)
    if isinstance(store := settings.results.store, Path):
        yield _space("Disk of the results", store, settings)
    for module, purpose in _CODECS.items():
        yield _finding(f"Library for {purpose}", partial(_version, module))
    check_plugins()
    for job_type in filter(is_built_in, list(load_processors())):
        try:
            check_preload(job_type)
        except ProcessorUnusable as error:
            disable_job_type(job_type, str(error))
    yield from check_confinement(settings)
    yield _finding("Job types", lambda: ", ".join(sorted(load_processors())))
    for job_type, why in unusable_job_types().items():
        yield CheckResult(f"Job type {job_type}", is_ok=False, detail="not usable", advice=why)
    yield _finding("Scratch space", lambda: _scratch(settings))


def check_confinement(settings: Settings) -> Iterator[CheckResult]:
    """Yield whether job processes and helper programs can be confined on this machine.

    Work goes on without, so only what the settings require is a fault.
    """
    mode, version = settings.event_worker.confinement, restrictions.landlock_version()
    if mode == "off":
        yield CheckResult("Confinement of jobs", is_ok=True, detail="off (event_worker.confinement)")
    elif version:
        limits = (
            "" if version >= restrictions.LANDLOCK_SIGNALS_VERSION else "; signals are not restricted before Linux 6.12"
        )
        if not restrictions.can_make_read_only():
            limits += "; modes and times of files are not protected, because jobs may not have mounts of their own"
        yield CheckResult("Confinement of jobs", is_ok=True, detail=f"Landlock, version {version}{limits}")
    else:
        found = "none: this kernel offers no Landlock" + (f". {confinement.LANDLOCK_ADVICE}" if mode == "auto" else "")
        yield CheckResult("Confinement of jobs", mode == "auto", found, confinement.LANDLOCK_ADVICE)
    trials = runner.probe_methods()
    if trials[-1].is_working:
        yield CheckResult("Sandbox for helper programs", is_ok=True, detail=trials[-1].method)
    else:
        reasons = "; ".join(f"{trial.method}: {trial.reason}" for trial in trials)
        found = f"none ({reasons}): LibreOffice and yt-dlp are not run. {runner.SANDBOX_ADVICE}"
        yield CheckResult("Sandbox for helper programs", is_ok=True, detail=found)


def _finding(what: str, look: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(what, is_ok=True, detail=look())
    except (JobledgerError, MachineFailure, ImportError, OSError) as error:
        return CheckResult(what, is_ok=False, detail="not usable", advice=str(error))


def _scratch(settings: Settings) -> str:
    worker = settings.event_worker
    scratch = ScratchDirectory(worker.scratch_dir, min_free_mb=worker.scratch_min_free_mb)
    try:
        scratch.check()
        return str(scratch.path.parent if scratch.path is not None else "")
    finally:
        scratch.close()


def _space(what: str, directory: Path, settings: Settings) -> CheckResult:
    """How much space is left, and whether that is enough to accept new jobs."""
    reserve = settings.results.min_free_mb
    try:
        free = free_bytes(nearest_existing_directory(directory)) / MIB
    except OSError as error:
        return CheckResult(what, is_ok=False, detail="cannot be looked at", advice=str(error))
    advice = f"New jobs are refused below {reserve} MiB (results.min_free_mb): free some space."
    return CheckResult(what, free >= reserve, f"{free:,.0f} MiB free", advice)


def _version(module: str) -> str:
    loaded = importlib.import_module(module)
    return str(getattr(loaded, "__version__", "installed"))


async def check_database(settings: Settings, uri: str) -> AsyncIterator[CheckResult]:
    """Yield what the database at `uri` shows."""
    try:
        async with open_database(settings.mongodb.make_connection(uri)) as db:
            for look in _DATABASE_CHECKS:
                with translate_errors("being looked at"):
                    finding = await look(db)
                yield finding
            yield await _result_files(settings, db)
    except JobledgerError as error:
        yield CheckResult("MongoDB", is_ok=False, detail="not usable", advice=str(error))


async def _result_files(settings: Settings, db: Database) -> CheckResult:
    """Whether result files can be stored. Creates no directory: one that is missing may be on a lost disk."""
    store = settings.results.store
    try:
        if isinstance(store, Path):
            found = await _directory(store, db)
        else:
            await open_file_store(settings, db)
            found = f"GridFS in {db.name} ({', '.join(COLLECTIONS)})"
    except JobledgerError as error:
        return CheckResult("Result files", is_ok=False, detail="not usable", advice=str(error))
    return CheckResult("Result files", is_ok=True, detail=found)


async def _directory(root: Path, db: Database) -> str:
    marker = await find_store_marker(root, db)
    if not marker.is_new:
        await asyncio.to_thread(DirectoryStore(root, marker=marker).prepare)
        return str(root)
    if (
        problem := await asyncio.to_thread(lambda: find_write_problem(nearest_existing_directory(root), 0))
    ) is not None:
        raise ResourceUnavailable(str(problem))
    return f"{root}, which the first start prepares"


async def accept_result_store(settings: Settings, uri: str) -> str:
    """Make the directory in `results.store` the ledger's store as it is; return what was done, for people.

    Raises:
        ConfigurationError: the files are in GridFS, or the directory cannot be written to.
        LedgerUnavailable: the database failed.
    """
    root = settings.results.store
    if not isinstance(root, Path):
        raise ConfigurationError("--accept-store is for a directory; results.store is 'gridfs'.")
    async with open_database(settings.mongodb.make_connection(uri)) as db:
        try:
            store_id = await store_marker.accept_directory(db, root)
        except OSError as error:
            raise classify_os_error(error, f"results.store: cannot write to {root}: {error.strerror}") from error
    return f"{root} is the result store of this ledger now (ID {store_id})."


async def _server(db: Database) -> CheckResult:
    hello = await db.client.admin.command("hello", compression=["zlib"])
    build = await db.client.admin.command("buildInfo")
    members = len(hello.get("hosts", []))
    found = f"{build['version']}, replica set {hello['setName']} with {members} member{'s' if members != 1 else ''}"
    warning = support_warning(build["version"], datetime.now(UTC).date(), zlib="zlib" in hello.get("compression", ()))
    return CheckResult("MongoDB", is_ok=True, detail=found if warning is None else f"{found}. Note: {warning}")


async def _clock(db: Database) -> CheckResult:
    asked = datetime.now(UTC)
    # A command's answer does not follow the client's `tz_aware` by itself.
    server = (await db.client.admin.command("hello", codec_options=db.codec_options))["localTime"]
    apart = (server - asked).total_seconds()
    return CheckResult(
        "Clocks",
        abs(apart) < _CLOCKS_APART_SECONDS,
        f"the server's is {apart:+.2f} s from ours",
        "Run a time service (chrony, systemd-timesyncd) on both: `not_before` is judged by the worker's clock.",
    )


async def _oplog(db: Database) -> CheckResult:
    window = await read_oplog_window(db)
    if window is None:
        return CheckResult("Oplog", is_ok=True, detail="may not be looked at by this user")
    found = f"{window.size_mb:.0f} MB, reaches back {window.hours:.1f} h" + ("" if window.is_full else " so far")
    return CheckResult("Oplog", not window.is_too_short, found, OPLOG_ADVICE)


async def _transactions(db: Database) -> CheckResult:
    """How long a writer killed in a transaction holds readers up."""
    seconds = await read_transaction_limit_seconds(db)
    if seconds is None:
        return CheckResult("Transactions", is_ok=True, detail="their time limit may not be looked at by this user")
    found = f"end after {seconds} s at the latest"
    if seconds > TRANSACTION_SECONDS:
        better = f"{{setParameter: 1, transactionLifetimeLimitSeconds: {TRANSACTION_SECONDS}}}"
        found += (
            f"; so long may a writer that is killed hold readers up. Better, on each member: db.adminCommand({better})"
        )
    return CheckResult("Transactions", is_ok=True, detail=found)


async def _rights(db: Database) -> CheckResult:
    """Whether the server would let us change the log: it need not."""
    status = await db.client.admin.command({"connectionStatus": 1, "showPrivileges": True})
    sign_in = status["authInfo"]
    if not sign_in["authenticatedUsers"]:
        return CheckResult("Rights", is_ok=True, detail="no sign-in: whoever reaches the server may do anything")
    powers = {
        action
        for privilege in sign_in["authenticatedUserPrivileges"]
        if _covers(privilege["resource"], db.name)
        for action in privilege["actions"]
    }
    if _CHANGING & powers:
        found = "this user may change and remove events; `jobledger doctor --role` prints a role that may not"
    else:
        found = "this user may add events, and the server lets it change none"
    return CheckResult("Rights", is_ok=True, detail=found)


def _covers(resource: Mapping[str, Any], db_name: str) -> bool:
    """Return whether a privilege's resource includes the collection `events`."""
    if resource.get("anyResource"):
        return True
    return resource.get("db") in ("", db_name) and resource.get("collection") in ("", "events")


async def _log_state(db: Database) -> CheckResult:
    """Whether the views are at the head of the log, or get on at least."""
    log = EventStore(db)
    head, before = await log.head_position(), await _views_position(db)
    views, waited = before, 0.0
    while views < head and views == before and waited < _STALLED_AFTER_SECONDS:
        await asyncio.sleep(_LOOKS_AGAIN_SECONDS)
        waited += _LOOKS_AGAIN_SECONDS
        views = await _views_position(db)
    if views > await log.head_position():
        return CheckResult(
            "Log", is_ok=False, detail=f"{head} events, but the views have read {views}", advice=VIEWS_AHEAD_REASON
        )
    try:
        await log.check_not_truncated(await _read_by_views(db), "the views")
    except LogTruncated as truncated:
        return CheckResult("Log", is_ok=False, detail=str(truncated).rstrip("."), advice="See `jobledger log verify`.")
    found = f"{head} events, views at {views}"
    if views < head and views == before:
        stands = f"{found}, and not moving for {waited:.0f} s"
        return CheckResult("Log", is_ok=False, detail=stands, advice=await stall_reason(db, views, head))
    return CheckResult(
        "Log", head - views < 10_000, found, "The views are far behind, but they get on. More will follow."
    )


async def _views_position(db: Database) -> int:
    return (await _read_by_views(db)).position


async def _read_by_views(db: Database) -> ReadPosition:
    return ReadPosition.from_document(await db.checkpoints.find_one({"_id": "views"}) or {"position": 0})


async def _projection_failures(db: Database) -> CheckResult:
    """Whether all documents of the views show what the log says."""
    found = await db.checkpoints.find_one({"_id": "views"}) or {}
    rows = await projection_errors.list_problems(Views(db, found.get("slots")), limit=_FAILURES_SHOWN + 1)
    if not rows:
        return CheckResult("Views", is_ok=True, detail="show what the log says")
    named = "; ".join(
        f"{row['key']} (event at position {row['position']}): {row['message']}" for row in rows[:_FAILURES_SHOWN]
    )
    more = " and more" if len(rows) > _FAILURES_SHOWN else ""
    advice = "The log has everything. Upgrade or mend the program, then rebuild the views: `jobledger replay`."
    return CheckResult("Views", is_ok=False, detail=f"do not show what the log says of {named}{more}", advice=advice)


async def _removals(db: Database) -> CheckResult:
    """Whether files of deleted jobs can be removed from the store."""
    found = await db.checkpoints.find_one({"_id": "views"}) or {}
    unknown = await files.find_jobs_with_unknown_files(Views(db, found.get("slots")), limit=_FAILURES_SHOWN)
    skipped = (await db.checkpoints.find_one({"_id": cleanup.CURSOR}) or {}).get(cleanup.SKIPPED, [])
    if unknown:
        advice = (
            f"Delete jobs whose steps name more than {step_files.MAX_STEP_FILES:,} files. For jobs that the "
            f"views do not show as "
            "the log has them, see above."
        )
        what = f"no file is removed, because the files of {', '.join(unknown)} are not all known"
        return CheckResult("Cleanup", is_ok=False, detail=what, advice=advice)
    if skipped:
        what = f"files and secrets of deleted jobs are left: {', '.join(skipped[-_FAILURES_SHOWN:])}"
        return CheckResult(
            "Cleanup", is_ok=False, detail=what, advice="Their events are damaged: `jobledger log verify`."
        )
    return CheckResult("Cleanup", is_ok=True, detail="files of deleted jobs are removed")


async def _workers(db: Database) -> CheckResult:
    """Whether living workers claim jobs, or have trouble with their machines."""
    alive = await db.workers.find({"$expr": {"$gt": ["$lease_until", "$$NOW"]}}).to_list()
    sick = [it for it in alive if it.get("problem")]
    since = "; ".join(
        f"{it['_id']} since {format_timestamp(it['unhealthy_since'], 'seconds')}: {it['problem']}" for it in sick
    )
    return CheckResult("Workers", not sick, f"{len(alive)} alive, {len(sick)} of them claim no jobs", since)


_DATABASE_CHECKS = (
    *(_server, _clock, _oplog, _transactions, _rights),
    *(_log_state, _projection_failures, _removals, _workers),
)
