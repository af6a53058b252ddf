"""Compare all files in the result store with the digests of the view `files`. Memory is bounded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pymongo import ASCENDING

from jobledger.ledger.domain.errors import FileDamaged, FileLost
from jobledger.ledger.files.file_store import FileStore, StoredFile
from jobledger.ledger.mongo.connection import translate_errors
from jobledger.projections.slots import Views
from jobledger.projections.views import files

_MAX_PROBLEMS: Final = 100
_ROWS_PER_PAGE: Final = 1000


class FileProblem(NamedTuple):
    """A result file that is missing or changed."""

    path: str
    sha256: str
    message: str


@dataclass(slots=True)
class FileVerificationResult:
    """Result of a file verification.

    Attributes:
        files: Number of distinct files in the view.
        missing: Number of files that the store does not contain.
        changed: Number of files with another content than recorded.
        orphans, orphan_bytes: Number and size of stored files that no result names. They belong to jobs that were
            deleted, that are running, or that never finished.
        problems: The first hundred missing or changed files.
    """

    files: int = 0
    missing: int = 0
    changed: int = 0
    orphans: int = 0
    orphan_bytes: int = 0
    problems: list[FileProblem] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Whether the store contains every recorded file with its recorded content."""
        return not self.missing and not self.changed


async def verify_files(
    views: Views, store: FileStore, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> FileVerificationResult:
    """Read every file that the view `files` names, and compare its content with the recorded digest.

    The view and the store are both read in the order of digests and merged, so memory holds neither of them.
    `on_progress` is called with the numbers of verified files and of all files.
    """
    result = FileVerificationResult()
    with translate_errors("counting the files"):
        total = await views[files.NAME].estimated_document_count()
    stored_files = store.list_files()
    stored = await anext(stored_files, None)
    async for path, sha256, size in _iter_recorded_files(views):
        while stored is not None and stored.sha256 < sha256:
            _count_orphan(result, stored)
            stored = await anext(stored_files, None)
        result.files += 1
        await _verify_file(result, store, path, sha256, size)
        if stored is not None and stored.sha256 == sha256:
            stored = await anext(stored_files, None)
        on_progress(result.files, max(total, result.files))
    while stored is not None:
        _count_orphan(result, stored)
        stored = await anext(stored_files, None)
    return result


async def _iter_recorded_files(views: Views) -> AsyncIterator[tuple[str, str, int]]:
    """Yield each recorded digest once and in order, with one of its paths and its size.

    Rows are read in pages. The server would close a cursor that stays open while whole files are hashed.
    """
    after = ""
    while True:
        with translate_errors("reading the recorded files"):
            cursor = views[files.NAME].find(
                {"sha256": {"$gt": after}},
                {"sha256": 1, "path": 1, "size": 1},
                sort=[("sha256", ASCENDING)],
                limit=_ROWS_PER_PAGE,
            )
            rows = await cursor.to_list()
        for row in rows:
            if row["sha256"] != after:
                after = row["sha256"]
                yield str(row["path"]), str(after), row["size"]
        if len(rows) < _ROWS_PER_PAGE:
            return


async def _verify_file(result: FileVerificationResult, store: FileStore, path: str, sha256: str, size: int) -> None:
    try:
        await store.verify(sha256, size)
    except (FileDamaged, FileLost, ValueError) as error:
        if isinstance(error, FileDamaged):
            result.changed += 1
        else:
            result.missing += 1
        if len(result.problems) < _MAX_PROBLEMS:
            result.problems.append(FileProblem(path, sha256, str(error)))


def _count_orphan(result: FileVerificationResult, stored: StoredFile) -> None:
    result.orphans += 1
    result.orphan_bytes += stored.size
