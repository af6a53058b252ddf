"""Identify the directory of the result store. A marker file in it holds an ID that the database also holds.

So no process writes to a wrong directory: a missing one, the empty mount point of an unmounted disk, or the store of
another ledger.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pymongo import ReturnDocument

from jobledger.ledger.domain.errors import FileStoreUnavailable
from jobledger.ledger.mongo.connection import Database, Document, translate_errors
from jobledger.ledger.system.private_files import create_file, make_private_directory

COLLECTION: Final = "result_store"
MARKER_FILE_NAME: Final = "store-id"
"""The marker file in the root of a store. Its first line is the ID."""
_DIRECTORY: Final = "directory"
_ID: Final = re.compile(r"[0-9a-f]{32}")
_NOTE: Final = "This file identifies the result store of a Jobledger installation. Keep it with the files beside it.\n"
_ADVICE: Final = (
    "Mount its disk, restore the directory, or correct results.store. Nothing is written until then. If its files are "
    "lost for good, `jobledger doctor --accept-result-store` accepts the directory as it is"
)


@dataclass(frozen=True, slots=True)
class StoreMarker:
    """The expected content of a store's marker file.

    An empty `store_id` matches no directory: the ledger has files, but their location is not recorded. `is_new`: a
    directory without a marker becomes the store.
    """

    store_id: str
    is_new: bool = False

    def check_directory(self, root: Path) -> None:
        """Check that a directory is the store.

        Raises:
            FileStoreUnavailable: It is missing, or is another directory.
            OSError: It cannot be read.
        """
        found = read_marker(root)
        if found == self.store_id:
            return
        if not root.exists():
            problem = f"the result store {root} is missing"
        elif not root.is_dir():
            problem = f"the result store {root} is not a directory"
        elif found is None:
            problem = f"{root} is not the result store of this ledger: it has no file '{MARKER_FILE_NAME}'"
        else:
            problem = f"{root} is the result store of another ledger: its file '{MARKER_FILE_NAME}' has another ID"
        raise FileStoreUnavailable(f"results.store: {problem}. {_ADVICE}")

    def write(self, root: Path) -> None:
        """Create the directory and its marker, unless it has one. Several processes may call this at the same time.

        Raises:
            OSError: That failed.
        """
        make_private_directory(root)
        if read_marker(root) is not None:
            return
        with create_file(root / MARKER_FILE_NAME, root) as file:
            file.write(f"{self.store_id}\n{_NOTE}".encode())


def read_marker(root: Path) -> str | None:
    """Return the ID in a directory's marker file; None if there is no such file.

    Raises:
        OSError: It cannot be read.
    """
    try:
        descriptor = os.open(root / MARKER_FILE_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with os.fdopen(descriptor, "rb") as file:
        found = file.readline(100).decode(errors="replace").strip()
    return found if _ID.fullmatch(found) else None


async def determine_marker(db: Database, root: Path, *, has_files: Callable[[], Awaitable[bool]]) -> StoreMarker:
    """Return the marker that the store of a ledger has or will get. Writes nothing.

    A ledger without files gets a new store. So does a ledger whose files were stored before markers existed.

    Args:
        db: The database.
        root: The directory.
        has_files: Returns whether the ledger has recorded files.

    Raises:
        LedgerUnavailable: The database failed.
        OSError: The directory cannot be read.
    """
    with translate_errors("looking for the ID of the result store"):
        recorded = await db[COLLECTION].find_one({"_id": _DIRECTORY})
    if recorded is not None and recorded["created"]:
        return StoreMarker(recorded["store_id"])
    present = read_marker(root)
    store_id = recorded["store_id"] if recorded is not None else present
    if present is not None or not (_holds_files(root) or not await has_files()):
        return StoreMarker(store_id or "")
    return StoreMarker(store_id or secrets.token_hex(16), is_new=True)


async def record_marker(db: Database, marker: StoreMarker, *, is_created: bool) -> StoreMarker:
    """Record the ID of the store, unless one is recorded. Return the marker with the recorded ID.

    Raises:
        LedgerUnavailable: The database failed.
    """
    change = {"$setOnInsert": {"store_id": marker.store_id}, "$max": {"created": is_created}}
    with translate_errors("recording the ID of the result store"):
        # If two processes insert it at the same time, the server repeats the second upsert as an update.
        found = await db[COLLECTION].find_one_and_update(
            {"_id": _DIRECTORY}, change, upsert=True, return_document=ReturnDocument.AFTER
        )
    assert found is not None  # noqa: S101 - an upsert
    return StoreMarker(found["store_id"], marker.is_new)


async def accept_directory(db: Database, root: Path) -> str:
    """Make a directory the ledger's store, whatever it contains, and return its ID. Creates it if it is missing.

    Raises:
        LedgerUnavailable: The database failed.
        OSError: The directory cannot be written to.
    """
    with translate_errors("looking for the ID of the result store"):
        known: Document | None = await db[COLLECTION].find_one({"_id": _DIRECTORY})
    store_id = read_marker(root) or (known["store_id"] if known is not None else secrets.token_hex(16))
    StoreMarker(store_id).write(root)
    with translate_errors("recording the ID of the result store"):
        change = {"$set": {"store_id": store_id, "created": True}}
        await db[COLLECTION].update_one({"_id": _DIRECTORY}, change, upsert=True)
    return store_id


def _holds_files(root: Path) -> bool:
    return any(len(path.name) == 64 for path in root.glob("[0-9a-f][0-9a-f]/*"))
