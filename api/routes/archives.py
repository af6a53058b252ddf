"""api: the results of a job, or of all jobs of a batch, as one ZIP file, made while it is sent."""

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
from jobledger.api.context import ApiContext, get_api_context, wait_for_requested_position
from jobledger.api.http.errors import ApiError
from jobledger.api.http.streaming import CloseableStreamingResponse, content_disposition
from jobledger.api.routes.files import UNTRUSTED_CONTENT_HEADERS, open_result_file
from jobledger.api.routes.jobs import load_job_or_404
from jobledger.ledger.files.directory import FileStore
from jobledger.ledger.mongo.connection import Document
from jobledger.projections.views import batches
from jobledger.projections.views import files as view

_COMPRESSED: Final = ("text/", "application/json", "application/xml", "image/svg")
"""What becomes smaller: images and recordings are compressed already, and would only cost time."""
_FORBIDDEN: Final = re.compile(r'[<>:"|?*\\\x00-\x1f\x7f]')
_DEVICE: Final = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
_LONGEST_PART_BYTES: Final = 200


async def download_job_archive(request: Request) -> Response:
    """GET /api/events/jobs/{job_id}/download-archive"""
    await wait_for_requested_position(request)
    job = await load_job_or_404(request)
    rows = [row async for row in view.iter_job_files(get_api_context(request).views, [job["job_id"]])]
    if not rows:
        message = f"Job {job['job_id']} is {job['status']} and has no result files."
        raise ApiError(409, "no_results", message)
    directory = commonpath([f"/{row['path'].rpartition('/')[0]}" for row in rows])

    async def entries() -> AsyncIterator[tuple[str, Document]]:
        for row in rows:
            yield f"/{row['path']}".removeprefix(directory), row

    return await _archive(request, job["job_id"], rows[0], entries())


async def download_batch_archive(request: Request) -> Response:
    """GET /api/events/batches/{batch_id}/download-archive: of all its jobs that have results and may be seen."""
    await wait_for_requested_position(request)
    known, batch_id = get_api_context(request), request.path_params["batch_id"]
    batch = await batches.get(known.views, known.event_store, batch_id) if batch_id.startswith("batch-") else None
    if batch is None or not can_read(request, batch):
        raise ApiError(404, "batch_not_found", f"There is no batch {batch_id}.")
    first = await anext(_visible(request, known, batch["job_ids"]), None)
    if first is None:
        raise ApiError(409, "no_results", f"None of the jobs of batch {batch_id} has result files yet.")

    async def entries() -> AsyncIterator[tuple[str, Document]]:
        async for row in _visible(request, known, batch["job_ids"]):
            yield row["path"], row

    return await _archive(request, batch_id, first, entries())


async def _visible(request: Request, known: ApiContext, job_ids: Sequence[str]) -> AsyncIterator[Document]:
    async for row in view.iter_job_files(known.views, job_ids):
        if can_read(request, row):
            yield row


async def _archive(
    request: Request, name: str, first: Document, entries: AsyncIterator[tuple[str, Document]]
) -> Response:
    headers = {
        **UNTRUSTED_CONTENT_HEADERS,
        "Content-Type": "application/zip",
        "Content-Disposition": content_disposition(f"{name}.zip", attachment=True),
    }
    known = get_api_context(request)
    await (
        await open_result_file(request, first)
    ).close()  # a store that is not the right one is told while it still can be
    if request.method == "HEAD":
        return Response(headers=headers)
    return CloseableStreamingResponse(generate_zip(known.file_store, entries), 200, headers)


async def generate_zip(store: FileStore, entries: AsyncIterator[tuple[str, Document]]) -> AsyncGenerator[bytes, None]:
    """Yield a ZIP file of rows of the view `files`, each under a name; the same rows make the same bytes.

    Raises:
        FileLost: one of them is not in the store.
        LedgerUnavailable: the database failed.
    """
    outlet, names = _Outlet(), _Names()
    with ZipFile(outlet, "w") as archive:
        async for path, row in entries:
            file = await store.open(row["sha256"], row["size"])
            try:
                with archive.open(_entry(names.add(sanitize_path(path)), row, file.size), "w") as entry:
                    async for piece in file.read(0, file.size):
                        entry.write(piece)
                        yield outlet.take()
            finally:
                await file.close()
    yield outlet.take()


def _entry(name: str, row: Document, size: int) -> ZipInfo:
    at = row["modified_at"]
    entry = ZipInfo(name, (at.year, at.month, at.day, at.hour, at.minute, at.second))
    entry.create_system = 3  # Unix, wherever we run: what follows are its permissions
    entry.external_attr = 0o100644 << 16
    entry.compress_type = ZIP_DEFLATED if row["media_type"].startswith(_COMPRESSED) else ZIP_STORED
    entry.file_size = size  # decides whether its sizes are written in 64 bits
    return entry


class _Outlet:
    """A file that can only be written to: what has been written is taken out at once."""

    def __init__(self) -> None:
        self._written = bytearray()

    def write(self, data: bytes) -> int:
        self._written += data
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """What has not been taken stays."""

    def take(self) -> bytes:
        written = bytes(self._written)
        self._written.clear()
        return written


def sanitize_path(path: str) -> str:
    """Return a path that can be unpacked anywhere: relative, without steps upwards, of names that every system takes.

    Job types choose the paths of their results; those of sessions are like that, and stay as they are.
    """
    parts = (part for part in PurePosixPath(path).parts if part not in ("/", "//", ".", ".."))
    return "/".join(map(_safe_name, parts)) or "file"


def _safe_name(name: str) -> str:
    safe = _FORBIDDEN.sub("_", name).encode()[:_LONGEST_PART_BYTES].decode(errors="ignore")
    if safe.endswith((" ", ".")):
        safe = safe.rstrip(" .") + "_"
    return f"_{safe}" if _DEVICE.fullmatch(safe) else safe


class _Names:
    """Names for the entries of an archive: each can be unpacked beside all others, in any file system.

    Of two that would be in each other's way the later one gets a number: two files of one name, or a file and a
    directory. Names that differ in case or Unicode normalization only are the same in some file systems.
    """

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._directories: set[str] = set()
        self._numbers: dict[str, int] = {}

    def add(self, path: str) -> str:
        """Return the name for the file with a path, a safe one."""
        *directories, file = path.split("/")
        parent = ""
        for name in directories:
            parent = self._directory(parent + name) + "/"
        number = 1
        while (key := _key(found := _numbered(parent + file, number))) in self._files or key in self._directories:
            number += 1
        self._files.add(key)
        return found

    def _directory(self, path: str) -> str:
        number = self._numbers.get(_key(path), 1)
        while (key := _key(found := _numbered(path, number))) in self._files:
            number += 1
        self._numbers[_key(path)] = number
        self._directories.add(key)
        return found


def _numbered(path: str, number: int) -> str:
    whole = PurePosixPath(path)
    return path if number == 1 else str(whole.with_stem(f"{whole.stem}-{number}"))


def _key(path: str) -> str:
    """Return the same text for all names that a file system may take for the same."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())
