"""Import an exported event log into an empty database.

The import writes the events into a staging collection, verifies them like any log, and then renames the collection.
Before the rename the database has no log. After it the log is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from jobledger.ledger.domain.errors import ConfigurationError, DatabaseUnsuitable, LedgerUnavailable
from jobledger.ledger.mongo.connection import UNAUTHORIZED, Database, get_server_error_code, translate_errors
from jobledger.ledger.mongo.lease import OVERDUE_LEASE_FILTER
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.store.export_file import (
    ExportSummary,
    InvalidExportFile,
    ProgressCallback,
    check_export_file,
    iterate_documents,
    read_first_position,
)
from jobledger.ledger.store.hash_chain import GENESIS_HASH
from jobledger.ledger.store.verification import verify_log

STAGING_COLLECTION: Final = "events.import"
"""The collection that becomes the log once it is complete and verified."""


async def import_log(
    db: Database, paths: Sequence[Path], *, on_progress: ProgressCallback = lambda position, up_to: None
) -> ExportSummary:
    """Import the events of consecutive export files into a database without a log.

    An interrupted import is continued.

    Args:
        db: The database.
        paths: The files, in the order of positions or any other.
        on_progress: Called twice for each event, when it is written and when it is verified.

    Raises:
        ConfigurationError: The database has a log or is in use, or the files are not consecutive.
        InvalidExportFile: A file is not what was exported. The database still has no log.
        DatabaseUnsuitable: This user lacks privileges.
        LedgerUnavailable: The database failed. The same call continues.
    """
    files = _check_files(paths)
    last = files[-1][1]
    await _require_empty_database(db)
    staged = EventStore(db, collection=STAGING_COLLECTION)
    with translate_errors("writing the imported events"):
        position = await staged.read_head_position()
        if position > last.last:
            await db.drop_collection(STAGING_COLLECTION)
            position = 0
        for path, summary in files:
            if position >= summary.last:
                continue
            for page in iterate_documents(path, after=position):
                await db[STAGING_COLLECTION].insert_many(page)  # ordered: a continued import starts after the last
                position = page[-1]["_id"]
                on_progress(position, 2 * last.last)
    try:
        with translate_errors("checking the imported events"):
            await staged.prepare()
        verdict = await verify_log(
            staged,
            expected_digest=(last.last, last.log_digest),
            on_progress=lambda at, end: on_progress(end + at, end + end),
        )
        wrong = None if verdict.problem is None else str(verdict.problem)
    except DatabaseUnsuitable as error:
        wrong = str(error)
    if wrong is not None:
        await db.drop_collection(STAGING_COLLECTION)
        raise InvalidExportFile(f"These files do not contain what was exported: {wrong}. Nothing was imported.")
    await _publish_staged_log(db, last.last)
    return ExportSummary(1, last.last, last.log_digest, last.log_digest)


def _check_files(paths: Sequence[Path]) -> list[tuple[Path, ExportSummary]]:
    """Check all files and return them in the order of their events."""
    found: list[tuple[Path, ExportSummary]] = []
    for path in sorted(paths, key=lambda path: read_first_position(path)):
        expected = found[-1][1].last + 1 if found else 1
        summary = check_export_file(path, before=found[-1][1].log_digest if found else GENESIS_HASH)
        if summary.first != expected:
            raise ConfigurationError(
                f"{path} begins with position {summary.first} instead of {expected}: an import needs all events from "
                "the first, in one file or in consecutive files"
            )
        found.append((path, summary))
    return found


async def _require_empty_database(db: Database) -> None:
    with translate_errors("checking that the database is empty"):
        if await db.events.find_one({}, {"_id": 1}) is not None:
            raise ConfigurationError(
                f"the database {db.name} already has a log: import into an empty database (mongodb.db_name)"
            )
        views = await db.checkpoints.find_one({"_id": "views", "position": {"$gt": 0}})
        if views is not None:
            raise ConfigurationError(f"the database {db.name} has views of another log: an import needs an empty one")
        for collection in ("leaders", "workers"):
            active_lease = await db[collection].find_one({"released": False, "$nor": [OVERDUE_LEASE_FILTER]})
            if active_lease is not None:
                raise ConfigurationError(
                    f"a process uses the database {db.name} ({active_lease['_id']}): stop all processes before "
                    "an import"
                )


async def _publish_staged_log(db: Database, last: int) -> None:
    """Replace the empty log by the staged one. If a process has written events meanwhile, keep those instead."""
    replaced = "events.before-import"
    try:
        with translate_errors("renaming the imported events to the log"):
            await db.counters.update_one({"_id": "events"}, {"$max": {"next": last}}, upsert=True)
            if "events" in await db.list_collection_names():
                await db.events.rename(replaced, dropTarget=True)
            await db[STAGING_COLLECTION].rename("events")
            if await db[replaced].find_one({}) is None:
                await db.drop_collection(replaced)
                return
            await db.events.rename(STAGING_COLLECTION)
            await db[replaced].rename("events")
    except LedgerUnavailable as error:
        if get_server_error_code(error) == UNAUTHORIZED:
            raise DatabaseUnsuitable(
                "This user may not rename collections. Run the import as an administrator of the database (MongoDB "
                "role `dbOwner`)."
            ) from error
        raise
    raise ConfigurationError(
        f"another process wrote to the database {db.name} during the import: stop all Jobledger processes, then "
        "import again"
    )
