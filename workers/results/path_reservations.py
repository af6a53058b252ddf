"""Reserve result paths for jobs.

The first job that saves a file under a path owns it until the job is deleted. Failing or restarting the job does not
release it, because its completed steps refer to the path. Another job that saves the same path gets a different one,
with a suffix before the extension.
"""

from __future__ import annotations

from typing import Final

from pymongo import ReturnDocument

from jobledger.ledger.mongo.connection import Database, translate_errors
from jobledger.ledger.store.command_handler import is_deleted
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.slots import Views
from jobledger.projections.views import files
from jobledger.workers.processor import ProcessorError
from jobledger.workers.results.paths import generate_candidates, normalize_path

COLLECTION: Final = "result_paths"


class PathReservations:
    """Reserves result paths. A reservation is a document `{_id: path, job_id}`."""

    def __init__(self, db: Database, event_store: EventStore, views: Views) -> None:
        self._db = db
        self._event_store = event_store
        self._views = views

    async def reserve(self, path: str, job_id: str) -> str:
        """Reserve a path for a job.

        Returns:
            The path, or a path derived from it if another job owns the path.

        Raises:
            ProcessorError: INVALID_PATH, or PATH_TAKEN if other jobs own all candidate paths.
            LedgerUnavailable: The database failed.
        """
        path = normalize_path(path)
        for candidate in generate_candidates(path, job_id):
            if await self._try_reserve(candidate, job_id):
                return candidate
        raise ProcessorError("PATH_TAKEN", f"Other jobs own the result path '{path}' and all paths derived from it.")

    async def _try_reserve(self, path: str, job_id: str) -> bool:
        """Reserve a path and return True, or return False if another job owns it.

        Two jobs cannot both get it: `_id` is unique, and the update that replaces a deleted owner matches that owner.
        """
        with translate_errors("reserving a result path"):
            if await files.belongs_to_other_job(self._views, path, job_id):  # an imported log has no reservations
                return False
            while True:
                reservation = await self._db[COLLECTION].find_one_and_update(
                    {"_id": path},
                    {"$setOnInsert": {"job_id": job_id}},
                    upsert=True,
                    return_document=ReturnDocument.AFTER,
                )
                assert reservation is not None  # noqa: S101 - the upsert returns a document
                owner = reservation["job_id"]
                if owner == job_id:
                    return True
                is_known = bool(await self._event_store.read_stream(owner, limit=1))  # else the log was replaced
                if is_known and not await is_deleted(self._event_store, owner):
                    return False
                replaced = await self._db[COLLECTION].update_one(
                    {"_id": path, "job_id": owner}, {"$set": {"job_id": job_id}}
                )
                if replaced.matched_count:
                    return True
