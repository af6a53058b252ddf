"""Actions that save, change or forge files, and damage scratch directories."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from jobledger.ledger.domain.limits import MAX_FILE_BYTES
from jobledger.workers.child.messages import FileSaved
from jobledger.workers.processor import JobContext, ProcessorError, Results, SavedFile
from tests.support.misbehaving.processor import action, write_marker_file


@action
async def save(job: JobContext) -> Results:
    saved = await job.save(f"misbehaving/{job.job_id}.md", b"# text\n", "text/markdown")
    return Results(markdown=saved)


class CustomPath(type(Path())):  # type: ignore[misc]  # PosixPath
    """A path with custom methods."""

    def open(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a method of the path was called")

    resolve = exists = is_symlink = replace = chmod = unlink = open


def _create_irregular_file(kind: str, path: Path) -> Path:
    """Create a file that is not regular, or a regular file with an unusual path. Return its path."""
    match kind:
        case "FIFO":
            os.mkfifo(path)
        case "link to a FIFO":
            os.mkfifo(path.with_suffix(".fifo"))
            path.symlink_to(path.with_suffix(".fifo"))
        case "socket":
            socket.socket(socket.AF_UNIX).bind(str(path))
        case "device":
            return Path("/dev/zero")
        case "directory":
            path.mkdir()
        case "link to a file":
            path.with_suffix(".txt").write_bytes(b"# text\n")
            path.symlink_to(path.with_suffix(".txt"))
        case "custom path":
            path.write_bytes(b"# text\n")
            return CustomPath(path)
    return path


@action
async def save_irregular_file(job: JobContext) -> Results:
    kind = job.parameters.kind
    path = _create_irregular_file(kind, job.scratch_dir / "file")
    return Results(markdown=await job.save(f"misbehaving/{job.job_id}.md", path, "text/markdown"))


@action
async def share_a_step(job: JobContext) -> Results:
    async def step() -> str:
        return "done"

    await job.step("shared", step, share=timedelta(days=1))
    return Results()


@action
async def save_many(job: JobContext) -> Results:
    """Send more requests than the worker answers at a time."""
    write_marker_file(job, os.getpid())
    await asyncio.gather(*(job.save(f"many/{number}.txt", b"text", "text/plain") for number in range(300)))
    return Results()


@action
async def save_the_same(job: JobContext) -> Results:
    """Save the same content many times concurrently, and then once more."""
    paths = [f"same/{job.job_id}/{number}.txt" for number in range(20)]
    saved = await asyncio.gather(*(job.save(path, b"blank", "text/plain") for path in paths))
    last = await job.save(f"same/{job.job_id}/again.txt", b"blank", "text/plain")
    return Results(assets=[*saved, last])


@action
async def leave_a_file(job: JobContext) -> Results:
    (job.scratch_dir / "much").touch()
    return Results()


@action
async def fail_once_and_leave_a_file(job: JobContext) -> Results:
    (job.scratch_dir / "much").touch()
    if job.attempt == 1:
        raise ProcessorError("AGAIN", "again", transient=True)
    await asyncio.sleep(3600)
    return Results()


@action
async def save_too_large(job: JobContext) -> Results:
    large = job.scratch_dir / "large"
    large.touch()
    os.truncate(large, MAX_FILE_BYTES + 1)
    return Results(markdown=await job.save("large.md", large, "text/markdown"))


@action
async def claim_foreign_file(job: JobContext) -> Results:
    """Claim to have saved a file of another job by its digest. Continue with any response."""
    inbox = job._assignment.inbox_dir  # type: ignore[attr-defined]
    sha256, store = job.parameters.value["sha256"], job.parameters.value["store"]
    inbox.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (inbox / sha256[:2]).symlink_to(Path(store, sha256[:2]))
    for _ in range(3):
        with suppress(ProcessorError):
            await job._send(FileSaved(sha256, "mine.md"))  # type: ignore[attr-defined]
    return Results(markdown=SavedFile(path="mine.md", sha256=sha256, size=1, media_type="text/markdown"))


@action
async def modify_saved_file(job: JobContext) -> Results:
    """Modify a saved file before the worker moves it."""
    content = os.urandom(1000)
    inbox = job._assignment.inbox_dir  # type: ignore[attr-defined]
    stop = threading.Event()

    def change() -> None:
        changes = 0
        while not stop.is_set() and changes < 100:  # limit the disk load
            for path in inbox.glob("*/*"):
                try:
                    path.chmod(0o600)
                    path.write_bytes(b"changed")
                    changes += 1
                except OSError:
                    continue

    thread = threading.Thread(target=change)
    thread.start()
    try:
        saved = await job.save(f"misbehaving/{job.job_id}.md", content, "text/markdown")
    finally:
        stop.set()
        thread.join()
    return Results(markdown=saved)


@action
async def fill_the_disk(job: JobContext) -> Results:
    (job.scratch_dir / "file").write_bytes(b"x")
    raise OSError(28, "No space left on device", str(job.scratch_dir / "file"))


def make_forged_file(job: JobContext, digest: str = "a" * 64) -> SavedFile:
    return SavedFile(path=f"misbehaving/{job.job_id}.md", sha256=digest, size=5, media_type="text/markdown")


@action
async def forge_digest(job: JobContext) -> Results:
    return Results(markdown=make_forged_file(job, job.parameters.value or "a" * 64))


@action
async def forge_asset(job: JobContext) -> Results:
    saved = await job.save(f"misbehaving/{job.job_id}", b"text", "text/plain")
    return Results(markdown=saved, assets=[make_forged_file(job)])


@action
async def forge_step(job: JobContext) -> Results:
    """Return a forged file in the output of a step, for the next attempt."""

    saved = await job.save(f"misbehaving/{job.job_id}", b"text", "text/plain")

    async def step() -> Any:
        file = make_forged_file(job) if job.parameters.value == "digest" else saved.model_copy(update={"size": 5})
        return {"files": [{"image": file.model_dump()}]}

    await job.step("page", step)
    return Results()


@action
async def forge_size(job: JobContext) -> Results:
    saved = await job.save(f"misbehaving/{job.job_id}.md", b"0123456789", "text/markdown")
    return Results(markdown=saved.model_copy(update={"size": job.parameters.code}))


@action
async def save_in_step(job: JobContext) -> Results:
    """Return a file in the results that an earlier attempt or another job saved in a step."""

    async def step() -> Any:
        saved = await job.save(f"misbehaving/{job.job_id}.md", b"of a step", "text/markdown")
        return {"files": [saved.model_dump()]}

    share = timedelta(days=1) if job.parameters.value == "share" else None
    output = await job.step("page", step, share=share)
    if job.parameters.value == "retry" and job.attempt == 1:
        raise ProcessorError("AGAIN", "again", transient=True)
    return Results(markdown=SavedFile.model_validate(output["files"][0]))


@action
async def nest_directories(job: JobContext) -> Results:
    path = os.open(job.scratch_dir, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=path)
        path, parent = os.open("d", os.O_RDONLY, dir_fd=path), path
        os.close(parent)
    os.fchmod(path, 0)
    os.close(path)
    return Results()


@action
async def lock_scratch(job: JobContext) -> Results:
    """Remove all permissions of the directory of all jobs, once, and fail as another job would."""
    marker = Path(job.parameters.file)
    if not marker.exists():  # noqa: ASYNC240
        marker.touch()  # noqa: ASYNC240
        job.scratch_dir.parents[1].chmod(0)
        raise PermissionError(13, "Permission denied", str(job.scratch_dir))
    return Results()
