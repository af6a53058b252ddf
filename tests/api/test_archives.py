"""Results as one ZIP file: safe to unpack anywhere, its links work, and it is made while it is sent."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path, PurePosixPath
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.api.routes.archives import _comparison_key, _EntryNames, sanitize_path
from jobledger.ledger.domain.events import (
    AccessControl,
    BatchSubmitted,
    EventMetadata,
    JobClaimed,
    JobCompleted,
    JobResults,
    JobSubmitted,
    ResultFile,
    ResultMetadata,
)
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.store.command_handler import new_batch_id, new_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from tests.api.conftest import Api
from tests.api.test_files import LARGE, memory, reads
from tests.api.test_signed_links import guarded  # noqa: F401  a fixture
from tests.support.role_runner import poll_until

TYPES = {".md": "text/markdown", ".jpg": "image/jpeg"}
TALK = {
    "FOSDEM/Keynotes/welcome-1a/Welcome.md": b"# Welcome\n\n![](assets/slide-001.jpg)\n\n[home](../index.md)\n" * 50,
    "FOSDEM/Keynotes/welcome-1a/assets/slide-001.jpg": bytes(range(256)) * 100,
}


async def add_job(
    api: Api,
    contents: dict[str, bytes],
    *,
    batch_id: str | None = None,
    user_id: str = "local",
    done: bool = True,
    at: datetime | None = None,
) -> str:
    """Let a job have these result files."""
    files = []
    for path, content in contents.items():
        stored = await asyncio.to_thread(DirectoryStore(api.store).put_bytes, content)
        media_type = TYPES.get(Path(path).suffix, "application/octet-stream")
        files.append(ResultFile(path=path, sha256=stored.sha256, size=stored.size, media_type=media_type))
    now = at or datetime.now(UTC)
    results = JobResults(files=files, metadata=ResultMetadata(processed_at=now, duration=1.0))
    job = JobSubmitted(
        job_type="echo", parameters={}, user_id=user_id, batch_id=batch_id, access_control=AccessControl()
    )
    happened = [
        job,
        *([JobClaimed(worker_id="w", attempt=1), JobCompleted(attempt=1, results=results)] if done else []),
    ]
    job_id = new_job_id()
    recorded = await api.event_store.append(StreamAppend(job_id, StreamHead(), happened, EventMetadata(), now))
    await api.get("/healthz", recorded[-1].position)
    await api.get("/api/events/jobs", recorded[-1].position)
    return job_id


async def add_batch(api: Api, batch_id: str, job_ids: Sequence[str]) -> None:
    batch = BatchSubmitted(total_jobs=len(job_ids), job_ids=list(job_ids), user_id="local")
    recorded = await api.event_store.append(
        StreamAppend(batch_id, StreamHead(), [batch], EventMetadata(), datetime.now(UTC))
    )
    await api.get("/api/events/jobs", recorded[-1].position)


async def archive(api: Api, where: str, **headers: str) -> dict[str, bytes]:
    """Fetch an archive of a job or batch and read what is in it."""
    response = await api.get(f"/api/events/{where}/download-archive", **headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/zip"
    assert response.headers["content-disposition"] == f'attachment; filename="{where.partition("/")[2]}.zip"'
    with ZipFile(BytesIO(response.content)) as read:
        assert read.testzip() is None
        return {name: read.read(name) for name in read.namelist()}


async def test_job_archive_contains_files_and_keeps_markdown_links(api_without_worker: Api, tmp_path: Path) -> None:
    job_id = await add_job(api_without_worker, TALK)
    found = await archive(api_without_worker, f"jobs/{job_id}")

    assert found == {path.removeprefix("FOSDEM/Keynotes/welcome-1a/"): content for path, content in TALK.items()}
    for link in re.findall(r"!\[\]\(([^)]*)\)", found["Welcome.md"].decode()):
        assert link in found


async def test_job_archive_keeps_paths_relative_to_the_markdown(api_without_worker: Api) -> None:
    job_id = await add_job(
        api_without_worker, {"e/t/s/talk.md": b"[](../shared/a.jpg)", "e/t/shared/a.jpg": b"picture"}
    )
    assert set(await archive(api_without_worker, f"jobs/{job_id}")) == {"s/talk.md", "shared/a.jpg"}


async def test_archive_of_processed_job_can_be_extracted(api: Api, tmp_path: Path) -> None:
    job = await api.wait_until_finished(await api.submit({"text": "ä"}))
    response = await api.get(f"/api/events/jobs/{job['job_id']}/download-archive")
    (tmp_path / "a.zip").write_bytes(response.content)
    unpack = [sys.executable, "-m", "zipfile", "-e", "a.zip", "."]
    await asyncio.to_thread(subprocess.run, unpack, cwd=tmp_path, check=True)
    assert "ä" in (tmp_path / "echo.md").read_text(encoding="utf-8")


async def test_archive_of_same_results_is_identical(api_without_worker: Api) -> None:
    at = datetime(2025, 2, 1, 12, 30, 7, tzinfo=UTC)
    job_id = await add_job(api_without_worker, dict(reversed(TALK.items())), at=at)
    first = await api_without_worker.get(f"/api/events/jobs/{job_id}/download-archive")
    second = await api_without_worker.get(f"/api/events/jobs/{job_id}/download-archive")
    assert first.content == second.content
    with ZipFile(BytesIO(first.content)) as read:
        entries = read.infolist()
    assert [entry.filename for entry in entries] == ["Welcome.md", "assets/slide-001.jpg"]
    assert {entry.date_time[:5] for entry in entries} == {(2025, 2, 1, 12, 30)}
    assert {entry.external_attr >> 16 for entry in entries} == {0o100644}
    assert [entry.compress_type for entry in entries] == [ZIP_DEFLATED, ZIP_STORED]


async def test_archive_without_results_is_rejected(api_without_worker: Api) -> None:
    for job_id in (await add_job(api_without_worker, {}, done=False), await add_job(api_without_worker, {})):
        response = await api_without_worker.get(f"/api/events/jobs/{job_id}/download-archive")
        assert (response.status_code, response.json()["code"]) == (409, "no_results")
    batch_id = new_batch_id()
    await add_batch(
        api_without_worker, batch_id, [await add_job(api_without_worker, {}, batch_id=batch_id, done=False)]
    )
    response = await api_without_worker.get(f"/api/events/batches/{batch_id}/download-archive")
    assert (response.status_code, response.json()["code"]) == (409, "no_results")


@pytest.mark.parametrize("path", ["jobs/job-x", "jobs/x", "batches/batch-x", "batches/x"])
async def test_archive_of_missing_job_or_batch_is_not_found(api_without_worker: Api, path: str) -> None:
    response = await api_without_worker.get(f"/api/events/{path}/download-archive")
    assert response.status_code == 404
    assert response.json()["code"] in ("job_not_found", "batch_not_found")


async def test_archive_of_deleted_job_is_not_found(api_without_worker: Api) -> None:
    job_id = await add_job(api_without_worker, TALK)
    deleted = await api_without_worker.http.delete(f"/api/events/jobs/{job_id}")
    response = await api_without_worker.get(
        f"/api/events/jobs/{job_id}/download-archive", deleted.headers["ledger-position"]
    )
    assert response.status_code == 404


async def test_batch_archive_contains_files_of_all_finished_jobs(api_without_worker: Api) -> None:
    batch_id = new_batch_id()
    jobs = [{f"e/t/talk-{number}/talk.md": f"{number}".encode()} for number in range(150)]
    job_ids = [await add_job(api_without_worker, contents, batch_id=batch_id) for contents in jobs[:3]]
    job_ids.append(await add_job(api_without_worker, {}, batch_id=batch_id, done=False))
    await add_batch(api_without_worker, batch_id, job_ids)
    assert await archive(api_without_worker, f"batches/{batch_id}") == jobs[0] | jobs[1] | jobs[2]


async def test_batch_archive_contains_only_readable_jobs(guarded: Api) -> None:  # noqa: F811  the fixture
    batch_id = new_batch_id()
    mine = await add_job(guarded, {"mine.md": b"1"}, batch_id=batch_id)
    other = await add_job(guarded, {"other.md": b"2"}, batch_id=batch_id, user_id="other")
    await add_batch(guarded, batch_id, [other, mine])
    assert await archive(guarded, f"batches/{batch_id}") == {"mine.md": b"1"}
    for path in (f"batches/{batch_id}", f"jobs/{mine}"):
        stranger = await guarded.get(f"/api/events/{path}/download-archive", **{"x-user": "other"})
        assert stranger.status_code == 404
    hidden = new_batch_id()
    await add_batch(guarded, hidden, [other])
    assert (await guarded.get(f"/api/events/batches/{hidden}/download-archive")).status_code == 409


async def test_archive_head_request_has_no_body(api_without_worker: Api) -> None:
    job_id = await add_job(api_without_worker, TALK)
    response = await api_without_worker.http.head(f"/api/events/jobs/{job_id}/download-archive")
    assert (response.status_code, response.headers["content-type"], response.content) == (200, "application/zip", b"")


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file is a sparse one, whose content is not that of its digest."""

    async def check(*_: object) -> None:
        return

    monkeypatch.setattr("jobledger.ledger.files.integrity.IntegrityChecker.check", check)


async def add_large_job(api: Api) -> tuple[str, Path]:
    job_id = await add_job(api, {"film.bin": b"a large file", "z.md": b"the last one"})
    row = await api.db.files.find_one({"path": "film.bin"})
    assert row is not None
    stored = DirectoryStore(api.store).path(row["sha256"])
    os.truncate(stored, LARGE)
    return job_id, stored


async def pieces(api: Api, job_id: str) -> AsyncIterator[int]:
    async with api.http.stream("GET", f"/api/events/jobs/{job_id}/download-archive") as response:
        async for piece in response.aiter_raw():
            yield len(piece)


@pytest.mark.usefixtures("unchecked")
async def test_large_archive_is_streamed_with_bounded_memory(api_without_worker: Api) -> None:
    job_id, _ = await add_large_job(api_without_worker)
    before, most, received = memory(), 0, 0
    async for size in pieces(api_without_worker, job_id):
        if received == 0:
            await asyncio.sleep(0.5)
        received += size
        most = max(most, memory())
    assert received > LARGE
    assert most - before < 40 * 2**20


@pytest.mark.usefixtures("unchecked")
async def test_archive_client_disconnect_closes_the_file(api_without_worker: Api) -> None:
    job_id, stored = await add_large_job(api_without_worker)
    async with api_without_worker.http.stream("GET", f"/api/events/jobs/{job_id}/download-archive") as response:
        async for _ in response.aiter_raw():
            break
        assert reads(stored)
    await poll_until(lambda: not reads(stored), "the file is closed", seconds=5)


@pytest.mark.usefixtures("unchecked")
async def test_archive_with_missing_later_file_breaks_the_connection(api_without_worker: Api) -> None:
    job_id, _ = await add_large_job(api_without_worker)
    row = await api_without_worker.db.files.find_one({"path": "z.md"})
    assert row is not None
    DirectoryStore(api_without_worker.store).path(row["sha256"]).unlink()
    with pytest.raises(httpx.RemoteProtocolError):
        _ = [size async for size in pieces(api_without_worker, job_id)]


@pytest.mark.usefixtures("unchecked")
async def test_archive_with_missing_first_file_responds_with_error(api_without_worker: Api) -> None:
    job_id, stored = await add_large_job(api_without_worker)
    stored.unlink()
    response = await api_without_worker.get(f"/api/events/jobs/{job_id}/download-archive")
    assert (response.status_code, response.json()["code"]) == (500, "file_missing")


async def test_archive_entries_with_colliding_names_stay_distinct(api_without_worker: Api) -> None:
    job_id = await add_job(
        api_without_worker, {"t/a:b.md": b"1", "t/a?b.md": b"2", "t/A_B.md": b"3", "t/../../etc/passwd": b"4"}
    )
    found = await archive(api_without_worker, f"jobs/{job_id}")
    assert sorted(found.values()) == [b"1", b"2", b"3", b"4"]
    assert len({name.casefold() for name in found}) == 4
    assert not any(".." in name or name.startswith("/") for name in found)


@pytest.mark.parametrize(
    ("path", "safe"),
    [
        ("FOSDEM 2025/Ökologisch & offen/talk-1a/talk.md", "FOSDEM 2025/Ökologisch & offen/talk-1a/talk.md"),
        ("../../etc/passwd", "etc/passwd"),
        ("/etc/passwd", "etc/passwd"),
        ("//host/share", "host/share"),
        ("a/./b//c", "a/b/c"),
        ("..\\..\\x", ".._.._x"),
        ("C:\\x", "C__x"),
        ("con/NUL.txt/com1/console", "_con/_NUL.txt/_com1/console"),
        ("a./b ", "a_/b_"),
        ("a\x00\r\nb", "a___b"),
        ("", "file"),
        ("..", "file"),
    ],
)
def test_sanitize_path_returns_portable_path(path: str, safe: str) -> None:
    assert sanitize_path(path) == safe


@given(st.text(max_size=300))
def test_sanitize_path_never_leaves_the_target_directory(path: str) -> None:
    safe = sanitize_path(path.encode(errors="replace").decode())
    parts = safe.split("/")
    assert not {"", ".", ".."} & set(parts)
    assert not re.search(r'[<>:"|?*\\\x00-\x1f]', safe)
    assert all(len(part.encode()) <= 201 and not part.endswith((".", " ")) for part in parts)
    assert sanitize_path(safe) == safe


PARTS = st.sampled_from(["x", "X", "y", "x-2", "x-2-2", "x.md", "x-2.md", "\u00e9", "e\u0301", "\u00c9", "ss"])
PATHS = st.lists(st.lists(PARTS, min_size=1, max_size=4).map("/".join), max_size=12)


@given(PATHS)
def test_entry_names_of_any_paths_never_conflict(paths: list[str]) -> None:
    names = _EntryNames()
    found = [names.add(sanitize_path(path)) for path in paths]
    files = [_comparison_key(name) for name in found]
    directories = {_comparison_key(str(parent)) for name in found for parent in PurePosixPath(name).parents}
    assert len(set(files)) == len(files), found
    assert not directories & set(files), found


@given(st.lists(st.sampled_from(["a/talk.md", "a/b/slide.jpg", "c.md", "a/c.md"]), unique=True))
def test_entry_names_without_conflict_equal_the_paths(paths: list[str]) -> None:
    names = _EntryNames()
    assert [names.add(path) for path in paths] == paths


CLASHES = [
    ["x", "x/y", "x/z"],
    ["x/y", "X"],
    ["x.md", "x.md/y/z", "x.md/y"],
    ["caf\u00e9", "cafe\u0301/menu"],
    ["same.md", "SAME.md"],
]


@pytest.mark.parametrize("kind", ["jobs", "batches"])
@pytest.mark.parametrize("paths", CLASHES, ids=" ".join)
async def test_archive_with_conflicting_paths_can_be_extracted(
    api_without_worker: Api, tmp_path: Path, paths: list[str], kind: str
) -> None:
    contents = {f"evil/{path}": f"{number} {paths}".encode() for number, path in enumerate(paths)}
    if kind == "jobs":
        where = f"jobs/{await add_job(api_without_worker, contents)}"
    else:  # each file is of another job
        batch_id = new_batch_id()
        job_ids = [await add_job(api_without_worker, {path: it}, batch_id=batch_id) for path, it in contents.items()]
        await add_batch(api_without_worker, batch_id, job_ids)
        where = f"batches/{batch_id}"
    response = await api_without_worker.get(f"/api/events/{where}/download-archive")
    (tmp_path / "a.zip").write_bytes(response.content)
    commands = [[sys.executable, "-m", "zipfile", "-e", "a.zip", "python"]]
    if unzip := shutil.which("unzip"):
        commands.append([unzip, "-q", "a.zip", "-d", "unzip"])
    for command in commands:
        await asyncio.to_thread(subprocess.run, command, cwd=tmp_path, check=True, stdin=subprocess.DEVNULL)
        found = sorted(it.read_bytes() for it in (tmp_path / command[-1]).rglob("*") if it.is_file())
        assert found == sorted(contents.values())
