"""projections: compare all files in the store with the digests on record, in bounded memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pymongo import ASCENDING

from jobledger.ledger.domain.errors import FileDamaged, FileLost
from jobledger.ledger.files.file_store import FileStore, StoredFile
from jobledger.ledger.mongo.connection import translate_errors
from jobledger.projections.slots import Views
from jobledger.projections.views.files import NAME

_SHOWN: Final = 100
_ROWS_AT_ONCE: Final = 1000


class FileProblem(NamedTuple):
    """A result file that is missing or was changed: its path, digest and what is wrong."""

    path: str
    sha256: str
    message: str


@dataclass(slots=True)
class FileVerificationResult:
    """Number of files on record and those with problems; the first hundred of these are in `problems`.

    `orphans` are files in the store that no result names: of jobs that were deleted, are running, or never ended.
    """

    files: int = 0
    missing: int = 0
    changed: int = 0
    orphans: int = 0
    orphan_bytes: int = 0
    problems: list[FileProblem] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Whether every file on record is there as it was stored."""
        return not self.missing and not self.changed


async def verify_files(
    views: Views, store: FileStore, *, on_progress: Callable[[int, int], None] = lambda done, whole: None
) -> FileVerificationResult:
    """Read every file that the view `files` names and compare its content with the digest on record.

    Both sides come sorted by digest and are merged, so that neither has to be in memory.

    Raises:
        LedgerUnavailable: The database failed.
    """
    verdict = FileVerificationResult()
    with translate_errors("counting the files"):
        whole = await views[NAME].estimated_document_count()
    stored = store.list_files()
    present = await anext(stored, None)
    async for path, sha256, size in _on_record(views):
        while present is not None and present.sha256 < sha256:
            _count_orphan(verdict, present)
            present = await anext(stored, None)
        verdict.files += 1
        await _verify_one(verdict, store, path, sha256, size)
        if present is not None and present.sha256 == sha256:
            present = await anext(stored, None)
        on_progress(verdict.files, max(whole, verdict.files))
    while present is not None:
        _count_orphan(verdict, present)
        present = await anext(stored, None)
    return verdict


async def _on_record(views: Views) -> AsyncIterator[tuple[str, str, int]]:
    """Yield each digest on record once, with one of its paths and its size, in order.

    Rows are read in pages, because a cursor that stays open while whole files are hashed is ended by the server.
    """
    after = ""
    while True:
        with translate_errors("reading the files on record"):
            query = {"sha256": {"$gt": after}}
            found = views[NAME].find(
                query, {"sha256": 1, "path": 1, "size": 1}, sort=[("sha256", ASCENDING)], limit=_ROWS_AT_ONCE
            )
            rows = await found.to_list()
        for row in rows:
            if row["sha256"] != after:
                after = row["sha256"]
                yield str(row["path"]), str(after), row["size"]
        if len(rows) < _ROWS_AT_ONCE:
            return


async def _verify_one(verdict: FileVerificationResult, store: FileStore, path: str, sha256: str, size: int) -> None:
    try:
        await store.verify(sha256, size)
    except FileDamaged as error:
        verdict.changed += 1
        what = str(error)
    except (FileLost, ValueError) as error:
        verdict.missing += 1
        what = str(error)
    else:
        return
    if len(verdict.problems) < _SHOWN:
        verdict.problems.append(FileProblem(path, sha256, what))


def _count_orphan(verdict: FileVerificationResult, stored: StoredFile) -> None:
    verdict.orphans += 1
    verdict.orphan_bytes += stored.size
