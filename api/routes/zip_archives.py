"""Download the result files of a job, or of all jobs of a batch, as one ZIP file that is generated while it is sent."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import PurePosixPath
from posixpath import commonpath
from typing import Final
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import can_read
from jobledger.api.context import get_api_context
from jobledger.api.http.errors import ApiError
from jobledger.api.http.streaming import CloseableStreamingResponse, format_content_disposition
from jobledger.api.ledger_position import wait_for_requested_position
from jobledger.api.openapi.operation import Operation
from jobledger.api.resources import BATCH, JOB, load_or_404
from jobledger.api.result_files import UNTRUSTED_CONTENT_HEADERS, open_result_file
from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.mongo.connection import Document
from jobledger.projections.views import files as files_view

_COMPRESSED_TYPES: Final = ("text/", "application/json", "application/xml", "image/svg")
"""Media types that compression makes smaller. Images and recordings are compressed already."""
_FORBIDDEN: Final = re.compile(r'[<>:"|?*\\\x00-\x1f\x7f]')
_DEVICE_NAME: Final = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
_MAX_NAME_BYTES: Final = 200
_ERROR_CODES: Final = ("no_results", "file_missing", "file_damaged", "result_store_unavailable")


@Operation(
    "GET",
    "/api/events/jobs/{job_id}/download-archive",
    response="application/zip",
    is_from_views=True,
    error_codes=_ERROR_CODES,
)
async def download_job_archive(request: Request) -> Response:
    """Download a job's result files as a ZIP file."""
    await wait_for_requested_position(request)
    job = await load_or_404(request, JOB)
    rows = [row async for row in _iterate_readable_files(request, [job["job_id"]])]
    directory = commonpath([f"/{row['path'].rpartition('/')[0]}" for row in rows]) if rows else ""
    return await _build_archive_response(request, job["job_id"], [job["job_id"]], directory)


@Operation(
    "GET",
    "/api/events/batches/{batch_id}/download-archive",
    response="application/zip",
    is_from_views=True,
    error_codes=_ERROR_CODES,
)
async def download_batch_archive(request: Request) -> Response:
    """Download the result files of a batch's jobs as a ZIP file.

    The archive has the files of all jobs that the caller may read.
    """
    await wait_for_requested_position(request)
    batch = await load_or_404(request, BATCH)
    return await _build_archive_response(request, batch["batch_id"], batch["job_ids"])


async def _iterate_readable_files(request: Request, job_ids: Sequence[str]) -> AsyncIterator[Document]:
    async for row in files_view.iter_job_files(get_api_context(request).views, job_ids):
        if can_read(request, row):
            yield row


async def _build_archive_response(
    request: Request, resource_id: str, job_ids: Sequence[str], directory: str = ""
) -> Response:
    """Return an archive of the files of jobs, by their paths relative to a directory.

    Raises:
        ApiError: 409, there are no files; as `open_result_file`.
    """
    first = await anext(_iterate_readable_files(request, job_ids), None)
    if first is None:
        raise ApiError(409, "no_results", f"{resource_id} has no result files yet.")
    rows = _iterate_readable_files(request, job_ids)
    entries = ((f"/{row['path']}".removeprefix(directory), row) async for row in rows)
    headers = {
        **UNTRUSTED_CONTENT_HEADERS,
        "Content-Type": "application/zip",
        "Content-Disposition": format_content_disposition(f"{resource_id}.zip", attachment=True),
    }
    # Open one file before the response starts: an error can be returned only until then.
    await (await open_result_file(request, first)).close()
    if request.method == "HEAD":
        return Response(headers=headers)
    return CloseableStreamingResponse(generate_zip(get_api_context(request).file_store, entries), 200, headers)


async def generate_zip(store: FileStore, entries: AsyncIterator[tuple[str, Document]]) -> AsyncGenerator[bytes, None]:
    """Yield a ZIP file. The same entries make the same bytes.

    Args:
        entries: For each file, its path in the archive and its row of the view `files`.

    Raises:
        FileLost: A file is missing in the store.
        LedgerUnavailable: The database failed.
    """
    buffer, names = _WriteBuffer(), _EntryNames()
    with ZipFile(buffer, "w") as archive:
        async for path, row in entries:
            file = await store.open(row["sha256"], row["size"])
            try:
                with archive.open(_build_entry(names.add(sanitize_path(path)), row, file.size), "w") as entry:
                    async for chunk in file.read(0, file.size):
                        entry.write(chunk)
                        yield buffer.take()
            finally:
                await file.close()
    yield buffer.take()


def _build_entry(name: str, row: Document, size: int) -> ZipInfo:
    modified = row["modified_at"]
    entry = ZipInfo(
        name, (modified.year, modified.month, modified.day, modified.hour, modified.minute, modified.second)
    )
    entry.create_system = 3  # Unix, whatever this system is, because external_attr has Unix permissions
    entry.external_attr = 0o100644 << 16
    entry.compress_type = ZIP_DEFLATED if row["media_type"].startswith(_COMPRESSED_TYPES) else ZIP_STORED
    entry.file_size = size  # decides whether sizes are written with 64 bits
    return entry


class _WriteBuffer:
    """A write-only file. `take` removes and returns what was written."""

    def __init__(self) -> None:
        self._written = bytearray()

    def write(self, data: bytes) -> int:
        self._written += data
        return len(data)

    def flush(self) -> None:
        """Do nothing: there is no other buffer."""

    def close(self) -> None:
        """Do nothing: `take` still returns the rest."""

    def take(self) -> bytes:
        written = bytes(self._written)
        self._written.clear()
        return written


def sanitize_path(path: str) -> str:
    """Return a path that can be unpacked anywhere: relative, without `..`, with names that all systems allow.

    Processors choose the paths of their results. The paths of sessions are not changed.
    """
    parts = (part for part in PurePosixPath(path).parts if part not in ("/", "//", ".", ".."))
    return "/".join(map(_sanitize_name, parts)) or "file"


def _sanitize_name(name: str) -> str:
    safe = _FORBIDDEN.sub("_", name).encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
    if safe.endswith((" ", ".")):
        safe = safe.rstrip(" .") + "_"
    return f"_{safe}" if _DEVICE_NAME.fullmatch(safe) else safe


class _EntryNames:
    """The names of an archive's entries. Each can be unpacked beside all others, in any file system.

    If two entries collide, the later one gets a number. Two files with one name collide, and a file and a directory.
    Names that differ only in case or Unicode normalization are equal in some file systems, so they collide, too.
    """

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._directories: set[str] = set()
        self._numbers: dict[str, int] = {}

    def add(self, path: str) -> str:
        """Return the entry name for a sanitized path."""
        *directories, file = path.split("/")
        parent = ""
        for name in directories:
            parent = self._add_directory(parent + name) + "/"
        number = 1
        while (key := _build_comparison_key(name := _add_number(parent + file, number))) in self._files or (
            key in self._directories
        ):
            number += 1
        self._files.add(key)
        return name

    def _add_directory(self, path: str) -> str:
        number = self._numbers.get(_build_comparison_key(path), 1)
        while (key := _build_comparison_key(name := _add_number(path, number))) in self._files:
            number += 1
        self._numbers[_build_comparison_key(path)] = number
        self._directories.add(key)
        return name


def _add_number(path: str, number: int) -> str:
    whole = PurePosixPath(path)
    return path if number == 1 else str(whole.with_stem(f"{whole.stem}-{number}"))


def _build_comparison_key(path: str) -> str:
    """Return the same text for all names that a file system may treat as equal."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())
