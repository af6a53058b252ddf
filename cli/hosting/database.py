"""Open the database and the result store that the settings name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog

from jobledger.cli.hosting.embedded_restarts import start_when_space_available
from jobledger.cli.settings import Settings
from jobledger.ledger.domain.errors import (
    ConfigurationError,
    LedgerUnavailable,
    ResourceUnavailable,
    classify_os_error,
)
from jobledger.ledger.files import store_marker
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.files.gridfs import GridFSStore
from jobledger.ledger.files.store_marker import StoreMarker
from jobledger.ledger.mongo.connection import OPLOG_ADVICE, Connection, Database, check_server, read_oplog_window
from jobledger.ledger.mongo.embedded import EmbeddedServer, find_running_server
from jobledger.projections.engine.checkpoint import load_checkpoint
from jobledger.projections.slots import Views
from jobledger.projections.views.files import has_any_file

_CLOSE_TIMEOUT_SECONDS: Final = 1.0
_log = structlog.get_logger()


@contextmanager
def open_database_server(settings: Settings, *, start: bool) -> Iterator[tuple[str, EmbeddedServer | None]]:
    """Yield the URI of the database, and the embedded server if this process has started it.

    Args:
        settings: The settings.
        start: Start an embedded server. Otherwise it must be running.

    Raises:
        DatabaseUnsuitable: The embedded server cannot run.
        LedgerUnavailable: No embedded server is running.
    """
    mongodb = settings.mongodb
    if not mongodb.is_embedded:
        yield mongodb.uri.get_secret_value(), None
        return
    if not start:
        uri = find_running_server(mongodb.data_dir)
        if uri is None:
            raise LedgerUnavailable(
                f"No embedded MongoDB server is running on {mongodb.data_dir}: start `jobledger up` first, "
                "or set mongodb.uri to a replica set."
            )
        yield uri, None
        return
    with start_when_space_available(mongodb.data_dir, oplog_mb=mongodb.embedded_oplog_mb) as server:
        yield server.uri, server


@asynccontextmanager
async def open_database(connection: Connection) -> AsyncIterator[Database]:
    """Yield the database, after checking that the server is suitable.

    Raises:
        DatabaseUnsuitable, LedgerUnavailable: The database cannot be used or reached.
    """
    client = connection.create_client()
    try:
        db = client[connection.db_name]
        await check_server(db)
        if (window := await read_oplog_window(db)) is not None and window.is_too_short:
            _log.warning("oplog window too short", hours=round(window.hours, 1), hint=OPLOG_ADVICE)
        yield db
    finally:
        await close_with_timeout(client.close())


async def close_with_timeout(closing: Coroutine[Any, Any, None]) -> None:
    """Close a resource. Give up after a second, because a database that does not respond would block forever."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
            await closing


async def open_file_store(settings: Settings, db: Database) -> FileStore:
    """Return the store of result files, even if its directory is not writable now.

    Roles start without a writable store: reading does not need it, and a worker claims no jobs until it can write.

    Raises:
        ConfigurationError: The directory cannot be used.
        LedgerUnavailable: The database failed.
    """
    if isinstance(settings.results.store, Path):
        return await _open_directory_store(settings.results.store, db)
    grid = GridFSStore(db)
    await grid.prepare()
    return grid


async def _open_directory_store(root: Path, db: Database) -> DirectoryStore:
    """Return the store in a directory. Only a new ledger creates the directory: see `ledger/files/store_marker.py`."""
    marker = await find_store_marker(root, db)
    if marker.store_id:
        marker = await store_marker.record_marker(db, marker, is_created=False)
    store = DirectoryStore(root, marker=marker)
    try:
        await asyncio.to_thread(store.prepare)
    except ResourceUnavailable as error:
        _log.warning("result store not writable, workers are waiting", reason=str(error))
    else:
        await store_marker.record_marker(db, marker, is_created=True)
    return store


async def find_store_marker(root: Path, db: Database) -> StoreMarker:
    """Return the marker by which a directory is recognized as the result store. Writes nothing.

    Raises:
        ConfigurationError, ResourceUnavailable: The directory cannot be read.
        LedgerUnavailable: The database failed.
    """
    checkpoint = await load_checkpoint(db)
    try:
        has_files = partial(has_any_file, Views(db, checkpoint.get("slots")))
        return await store_marker.determine_marker(db, root, has_files=has_files)
    except OSError as error:
        raise classify_os_error(error, f"results.store: cannot read {root}: {error.strerror}") from error


async def accept_result_store(settings: Settings, connection: Connection) -> str:
    """Accept the directory in `results.store` as the ledger's result store. Return a message for the user.

    Raises:
        ConfigurationError: The files are in GridFS, or the directory cannot be written to.
        LedgerUnavailable: The database failed.
    """
    root = settings.results.store
    if not isinstance(root, Path):
        raise ConfigurationError("--accept-result-store needs a directory, but results.store is 'gridfs'.")
    async with open_database(connection) as db:
        try:
            store_id = await store_marker.accept_directory(db, root)
        except OSError as error:
            raise classify_os_error(error, f"results.store: cannot write to {root}: {error.strerror}") from error
    return f"{root} is now the result store of this ledger (ID {store_id})."
