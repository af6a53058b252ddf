"""Add jobs with result files, and inspect how this process serves the files."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from jobledger.api.routes.files import compute_file_etag
from jobledger.ledger.domain.events import (
    EventMetadata,
    JobClaimed,
    JobCompleted,
    JobResults,
    JobSubmitted,
    ResultFile,
    ResultMetadata,
)
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.store.command_handler import create_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from tests.api.conftest import Api

FILES = "/api/events/files/"
CONTENT = bytes(range(256)) * 40
LARGE_FILE_BYTES = 400 * 2**20
MEMORY_LIMIT_BYTES = 40 * 2**20
"""What serving a file of LARGE_FILE_BYTES may add to the memory of this process."""
OCTET_STREAM = "application/octet-stream"
_MEDIA_TYPES = {".md": "text/markdown", ".jpg": "image/jpeg"}


def compute_opaque_tag(digest: str, media_type: str = OCTET_STREAM) -> str:
    """Return a file's ETag without its quotes."""
    return compute_file_etag({"sha256": digest, "media_type": media_type}).strip('"')


async def store_file(api: Api, path: str, content: bytes | Path, media_type: str | None = None) -> ResultFile:
    """Store a file and return its entry in the results of a job. The suffix is the default for the media type."""
    store = DirectoryStore(api.store)
    if isinstance(content, Path):
        stored = await asyncio.to_thread(store.put_file, content)
    else:
        stored = await asyncio.to_thread(store.put_bytes, content)
    media_type = media_type or _MEDIA_TYPES.get(Path(path).suffix, OCTET_STREAM)
    return ResultFile(path=path, sha256=stored.sha256, size=stored.size, media_type=media_type)


async def add_job(
    api: Api,
    files: Sequence[ResultFile] = (),
    *,
    batch_id: str | None = None,
    user_id: str = "local",
    is_finished: bool = True,
    at: datetime | None = None,
) -> str:
    """Append a job with these result files, wait until the views contain it, and return its ID."""
    now = at or datetime.now(UTC)
    results = JobResults(files=list(files), metadata=ResultMetadata(processed_at=now, duration=1.0))
    submitted = JobSubmitted(job_type="echo", parameters={}, user_id=user_id, batch_id=batch_id)
    finished = [JobClaimed(worker_id="w", attempt=1), JobCompleted(attempt=1, results=results)]
    events = [submitted, *(finished if is_finished else [])]
    job_id = create_job_id()
    recorded = await api.event_store.append(StreamAppend(job_id, StreamHead(), events, EventMetadata(), now))
    await api.get("/api/events/jobs", recorded[-1].position)
    return job_id


async def add_job_with_files(
    api: Api,
    contents: Mapping[str, bytes],
    *,
    batch_id: str | None = None,
    user_id: str = "local",
    at: datetime | None = None,
) -> str:
    """Store files with these paths and contents, add a finished job that has them, and return its ID."""
    files = [await store_file(api, path, content) for path, content in contents.items()]
    return await add_job(api, files, batch_id=batch_id, user_id=user_id, at=at)


async def add_file(api: Api, path: str, content: bytes | Path = CONTENT, media_type: str = OCTET_STREAM) -> str:
    """Add a finished job with one result file and return the file's digest."""
    file = await store_file(api, path, content, media_type)
    await add_job(api, [file])
    return file.sha256


def get_stored_path(api: Api, digest: str) -> Path:
    """Return where the store keeps a file."""
    return DirectoryStore(api.store).get_path(digest)


def measure_memory_bytes() -> int:
    """Return the resident memory of this process, in which the API runs."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def is_open(path: Path) -> bool:
    """Return whether this process has the file open."""
    targets = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the descriptor was closed meanwhile
            targets.add(link.readlink())
    return path in targets
