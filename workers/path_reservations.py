"""workers: which job a result path belongs to.

The first job that saves a path keeps it until the job is deleted, also while it has failed or is restarted: its
finished steps name the path. Another job that saves the same path gets a distinct one, with a mark before the
extension.
"""

from __future__ import annotations

from typing import Final

from pymongo import ReturnDocument

from jobledger.ledger.domain.events import JobDeleted
from jobledger.ledger.mongo.connection import Database, translate_errors
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.slots import Views
from jobledger.projections.views import files
from jobledger.workers.processor import ProcessorError
from jobledger.workers.result_paths import generate_candidates, normalize_path

COLLECTION: Final = "result_paths"


class PathReservations:
    """Reserves result paths. A reservation is a document `{_id: path, job_id}`."""

    def __init__(self, db: Database, log: EventStore, views: Views) -> None:
        self._db = db
        self._log = log
        self._views = views

    async def reserve(self, path: str, job_id: str) -> str:
        """Reserve a path for a job and return it, or the distinct path that the job gets because it is taken.

        Raises:
            ProcessorError: INVALID_PATH; PATH_TAKEN, if other jobs have all paths that this one could get.
            LedgerUnavailable: the database failed.
        """
        path = normalize_path(path)
        for candidate in generate_candidates(path, job_id):
            if await self._try_reserve(candidate, job_id):
                return candidate
        raise ProcessorError("PATH_TAKEN", f"Other jobs have the result path '{path}' and all paths derived from it.")

    async def _try_reserve(self, path: str, job_id: str) -> bool:
        """Return whether the path is the job's from now on.

        Two jobs cannot both get it: `_id` is unique, and the update that replaces a deleted owner names that owner.
        """
        with translate_errors("reserving a result path"):
            if await files.has_other_owner(self._views, path, job_id):  # also of a log that was imported
                return False
            while True:
                reservation = await self._db[COLLECTION].find_one_and_update(
                    {"_id": path},
                    {"$setOnInsert": {"job_id": job_id}},
                    upsert=True,
                    return_document=ReturnDocument.AFTER,
                )
                assert reservation is not None  # noqa: S101 - narrows the type; it was inserted if there was none
                owner = reservation["job_id"]
                if owner == job_id:
                    return True
                if not await self._is_deleted(owner):
                    return False
                replaced = await self._db[COLLECTION].update_one(
                    {"_id": path, "job_id": owner}, {"$set": {"job_id": job_id}}
                )
                if replaced.matched_count:
                    return True

    async def _is_deleted(self, job_id: str) -> bool:
        if await self._log.read_stream(job_id, types=(JobDeleted,), limit=1):
            return True
        return not await self._log.read_stream(job_id, limit=1)  # the log was replaced by another one
