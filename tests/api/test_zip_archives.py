"""Test ZIP archives of results: content, portable entry names, streaming and errors."""

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

from jobledger.api.routes.zip_archives import _build_comparison_key, _EntryNames, sanitize_path
from jobledger.ledger.domain.events import BatchSubmitted, EventMetadata
from jobledger.ledger.store.command_handler import create_batch_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from tests.api.conftest import Api
from tests.api.result_files import (
    LARGE_FILE_BYTES,
    MEMORY_LIMIT_BYTES,
    add_job,
    add_job_with_files,
    get_stored_path,
    is_open,
    measure_memory_bytes,
)
from tests.support.polling import poll_until

TALK = {
    "FOSDEM/Keynotes/welcome-1a/Welcome.md": b"# Welcome\n\n![](assets/slide-001.jpg)\n\n[home](../index.md)\n" * 50,
    "FOSDEM/Keynotes/welcome-1a/assets/slide-001.jpg": bytes(range(256)) * 100,
}


async def add_batch(api: Api, batch_id: str, job_ids: Sequence[str], user_id: str = "local") -> None:
    batch = BatchSubmitted(total_jobs=len(job_ids), job_ids=list(job_ids), user_id=user_id)
    recorded = await api.event_store.append(
        StreamAppend(batch_id, StreamHead(), [batch], EventMetadata(), datetime.now(UTC))
    )
    await api.get("/api/events/jobs", recorded[-1].position)


async def fetch_archive(api: Api, path: str) -> dict[str, bytes]:
    """Fetch the archive of a job or batch and return its files. The path is that below `/api/events`."""
    response = await api.get(f"/api/events/{path}/download-archive")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/zip"
    assert response.headers["content-disposition"] == f'attachment; filename="{path.partition("/")[2]}.zip"'
    with ZipFile(BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


async def test_job_archive_contains_files_and_keeps_markdown_links(shared_api: Api, tmp_path: Path) -> None:
    job_id = await add_job_with_files(shared_api, TALK)
    files = await fetch_archive(shared_api, f"jobs/{job_id}")

    assert files == {path.removeprefix("FOSDEM/Keynotes/welcome-1a/"): content for path, content in TALK.items()}
    for link in re.findall(r"!\[\]\(([^)]*)\)", files["Welcome.md"].decode()):
        assert link in files


async def test_job_archive_keeps_paths_relative_to_the_markdown(shared_api: Api) -> None:
    job_id = await add_job_with_files(
        shared_api, {"e/t/s/talk.md": b"[](../shared/a.jpg)", "e/t/shared/a.jpg": b"picture"}
    )
    assert set(await fetch_archive(shared_api, f"jobs/{job_id}")) == {"s/talk.md", "shared/a.jpg"}


async def test_archive_of_processed_job_can_be_extracted(api: Api, tmp_path: Path) -> None:
    job = await api.wait_until_finished(await api.submit({"text": "ä"}))
    response = await api.get(f"/api/events/jobs/{job['job_id']}/download-archive")
    (tmp_path / "a.zip").write_bytes(response.content)
    extract = [sys.executable, "-m", "zipfile", "-e", "a.zip", "."]
    await asyncio.to_thread(subprocess.run, extract, cwd=tmp_path, check=True)
    assert "ä" in (tmp_path / "echo.md").read_text(encoding="utf-8")


async def test_archive_of_same_results_is_identical(shared_api: Api) -> None:
    at = datetime(2025, 2, 1, 12, 30, 7, tzinfo=UTC)
    job_id = await add_job_with_files(shared_api, dict(reversed(TALK.items())), at=at)
    first = await shared_api.get(f"/api/events/jobs/{job_id}/download-archive")
    second = await shared_api.get(f"/api/events/jobs/{job_id}/download-archive")
    assert first.content == second.content
    with ZipFile(BytesIO(first.content)) as archive:
        entries = archive.infolist()
    assert [entry.filename for entry in entries] == ["Welcome.md", "assets/slide-001.jpg"]
    assert {entry.date_time[:5] for entry in entries} == {(2025, 2, 1, 12, 30)}
    assert {entry.external_attr >> 16 for entry in entries} == {0o100644}
    assert [entry.compress_type for entry in entries] == [ZIP_DEFLATED, ZIP_STORED]


async def test_archive_without_results_is_rejected(shared_api: Api) -> None:
    for job_id in (await add_job(shared_api, is_finished=False), await add_job(shared_api)):
        response = await shared_api.get(f"/api/events/jobs/{job_id}/download-archive")
        assert (response.status_code, response.json()["code"]) == (409, "no_results")
    batch_id = create_batch_id()
    await add_batch(shared_api, batch_id, [await add_job(shared_api, batch_id=batch_id, is_finished=False)])
    response = await shared_api.get(f"/api/events/batches/{batch_id}/download-archive")
    assert (response.status_code, response.json()["code"]) == (409, "no_results")


@pytest.mark.parametrize("path", ["jobs/job-x", "jobs/x", "batches/batch-x", "batches/x"])
async def test_archive_of_missing_job_or_batch_is_not_found(shared_api: Api, path: str) -> None:
    response = await shared_api.get(f"/api/events/{path}/download-archive")
    assert response.status_code == 404
    assert response.json()["code"] in ("job_not_found", "batch_not_found")


async def test_archive_of_deleted_job_is_not_found(api_without_worker: Api) -> None:
    job_id = await add_job_with_files(api_without_worker, TALK)
    deleted = await api_without_worker.http.delete(f"/api/events/jobs/{job_id}")
    response = await api_without_worker.get(
        f"/api/events/jobs/{job_id}/download-archive", deleted.headers["ledger-position"]
    )
    assert response.status_code == 404


async def test_batch_archive_contains_files_of_all_finished_jobs(shared_api: Api) -> None:
    batch_id = create_batch_id()
    jobs = [{f"e/t/talk-{number}/talk.md": f"{number}".encode()} for number in range(3)]
    job_ids = [await add_job_with_files(shared_api, contents, batch_id=batch_id) for contents in jobs]
    job_ids.append(await add_job(shared_api, batch_id=batch_id, is_finished=False))
    await add_batch(shared_api, batch_id, job_ids)
    assert await fetch_archive(shared_api, f"batches/{batch_id}") == jobs[0] | jobs[1] | jobs[2]


async def test_batch_archive_contains_only_readable_jobs(header_auth_api: Api) -> None:
    alice, bob = header_auth_api.as_user("alice"), header_auth_api.as_user("bob")
    batch_id = create_batch_id()
    alices_job = await add_job_with_files(alice, {"a.md": b"1"}, batch_id=batch_id, user_id="alice")
    bobs_job = await add_job_with_files(bob, {"b.md": b"2"}, batch_id=batch_id, user_id="bob")
    await add_batch(alice, batch_id, [bobs_job, alices_job], user_id="alice")
    assert await fetch_archive(alice, f"batches/{batch_id}") == {"a.md": b"1"}
    for path in (f"batches/{batch_id}", f"jobs/{alices_job}"):
        assert (await bob.get(f"/api/events/{path}/download-archive")).status_code == 404
    unreadable_batch_id = create_batch_id()
    await add_batch(alice, unreadable_batch_id, [bobs_job], user_id="alice")
    response = await alice.get(f"/api/events/batches/{unreadable_batch_id}/download-archive")
    assert response.status_code == 409


async def test_archive_head_request_has_no_body(shared_api: Api) -> None:
    job_id = await add_job_with_files(shared_api, TALK)
    response = await shared_api.http.head(f"/api/events/jobs/{job_id}/download-archive")
    assert (response.status_code, response.headers["content-type"], response.content) == (200, "application/zip", b"")


@pytest.fixture
def no_integrity_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """No check of digests, because the content of a sparse file does not match its digest."""

    async def check(*_: object) -> None:
        return

    monkeypatch.setattr("jobledger.ledger.files.file_store.IntegrityChecker.check", check)


async def find_stored_path(api: Api, path: str) -> Path:
    row = await api.db.files.find_one({"path": path})
    assert row is not None
    return get_stored_path(api, row["sha256"])


async def add_job_with_large_file(api: Api) -> tuple[str, Path]:
    """Add a job with a large sparse file `film.bin` and a small `z.md`. Return its ID and the large file."""
    job_id = await add_job_with_files(api, {"film.bin": b"a large file", "z.md": b"the last one"})
    large_file = await find_stored_path(api, "film.bin")
    os.truncate(large_file, LARGE_FILE_BYTES)
    return job_id, large_file


async def stream_chunk_sizes(api: Api, job_id: str) -> AsyncIterator[int]:
    async with api.http.stream("GET", f"/api/events/jobs/{job_id}/download-archive") as response:
        async for chunk in response.aiter_raw():
            yield len(chunk)


@pytest.mark.usefixtures("no_integrity_check")
async def test_large_archive_is_streamed_with_bounded_memory(api_without_worker: Api) -> None:
    job_id, _ = await add_job_with_large_file(api_without_worker)
    before, peak, received = measure_memory_bytes(), 0, 0
    async for size in stream_chunk_sizes(api_without_worker, job_id):
        if received == 0:
            await asyncio.sleep(0.5)  # a slow client: what the server reads ahead is in memory
        received += size
        peak = max(peak, measure_memory_bytes())
    assert received > LARGE_FILE_BYTES
    assert peak - before < MEMORY_LIMIT_BYTES


@pytest.mark.usefixtures("no_integrity_check")
async def test_archive_client_disconnect_closes_the_file(api_without_worker: Api) -> None:
    job_id, large_file = await add_job_with_large_file(api_without_worker)
    async with api_without_worker.http.stream("GET", f"/api/events/jobs/{job_id}/download-archive") as response:
        async for _ in response.aiter_raw():
            break
        assert is_open(large_file)
    await poll_until(lambda: not is_open(large_file), "the file is closed")


@pytest.mark.usefixtures("no_integrity_check")
async def test_archive_with_missing_later_file_breaks_the_connection(api_without_worker: Api) -> None:
    job_id, _ = await add_job_with_large_file(api_without_worker)
    (await find_stored_path(api_without_worker, "z.md")).unlink()
    with pytest.raises(httpx.RemoteProtocolError):
        _ = [size async for size in stream_chunk_sizes(api_without_worker, job_id)]


@pytest.mark.usefixtures("no_integrity_check")
async def test_archive_with_missing_first_file_responds_with_error(api_without_worker: Api) -> None:
    job_id, large_file = await add_job_with_large_file(api_without_worker)
    large_file.unlink()
    response = await api_without_worker.get(f"/api/events/jobs/{job_id}/download-archive")
    assert (response.status_code, response.json()["code"]) == (500, "file_missing")


async def test_archive_entries_with_colliding_names_stay_distinct(shared_api: Api) -> None:
    job_id = await add_job_with_files(
        shared_api, {"t/a:b.md": b"1", "t/a?b.md": b"2", "t/A_B.md": b"3", "t/../../etc/passwd": b"4"}
    )
    files = await fetch_archive(shared_api, f"jobs/{job_id}")
    assert sorted(files.values()) == [b"1", b"2", b"3", b"4"]
    assert len({name.casefold() for name in files}) == 4
    assert not any(".." in name or name.startswith("/") for name in files)


@pytest.mark.parametrize(
    ("path", "expected"),
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
def test_sanitize_path_returns_portable_path(path: str, expected: str) -> None:
    assert sanitize_path(path) == expected


@given(st.text(max_size=300))
def test_sanitize_path_never_leaves_the_target_directory(path: str) -> None:
    sanitized = sanitize_path(path.encode(errors="replace").decode())
    parts = sanitized.split("/")
    assert not {"", ".", ".."} & set(parts)
    assert not re.search(r'[<>:"|?*\\\x00-\x1f]', sanitized)
    assert all(len(part.encode()) <= 201 and not part.endswith((".", " ")) for part in parts)
    assert sanitize_path(sanitized) == sanitized


PARTS = st.sampled_from(["x", "X", "y", "x-2", "x-2-2", "x.md", "x-2.md", "\u00e9", "e\u0301", "\u00c9", "ss"])
PATHS = st.lists(st.lists(PARTS, min_size=1, max_size=4).map("/".join), max_size=12)


@given(PATHS)
def test_entry_names_of_any_paths_never_conflict(paths: list[str]) -> None:
    names = _EntryNames()
    entries = [names.add(sanitize_path(path)) for path in paths]
    files = [_build_comparison_key(entry) for entry in entries]
    directories = {_build_comparison_key(str(parent)) for entry in entries for parent in PurePosixPath(entry).parents}
    assert len(set(files)) == len(files), entries
    assert not directories & set(files), entries


@given(st.lists(st.sampled_from(["a/talk.md", "a/b/slide.jpg", "c.md", "a/c.md"]), unique=True))
def test_entry_names_without_conflict_equal_the_paths(paths: list[str]) -> None:
    names = _EntryNames()
    assert [names.add(path) for path in paths] == paths


CONFLICTING_PATHS = [
    ["x", "x/y", "x/z"],
    ["x/y", "X"],
    ["x.md", "x.md/y/z", "x.md/y"],
    ["caf\u00e9", "cafe\u0301/menu"],
    ["same.md", "SAME.md"],
]


@pytest.mark.parametrize("kind", ["jobs", "batches"])
@pytest.mark.parametrize("paths", CONFLICTING_PATHS, ids=" ".join)
async def test_archive_with_conflicting_paths_can_be_extracted(
    shared_api: Api, tmp_path: Path, paths: list[str], kind: str
) -> None:
    contents = {f"talk/{path}": f"{number} {paths}".encode() for number, path in enumerate(paths)}
    if kind == "jobs":
        resource = f"jobs/{await add_job_with_files(shared_api, contents)}"
    else:  # a batch with one job for each file
        batch_id = create_batch_id()
        job_ids = [
            await add_job_with_files(shared_api, {path: content}, batch_id=batch_id)
            for path, content in contents.items()
        ]
        await add_batch(shared_api, batch_id, job_ids)
        resource = f"batches/{batch_id}"
    response = await shared_api.get(f"/api/events/{resource}/download-archive")
    (tmp_path / "a.zip").write_bytes(response.content)
    commands = [[sys.executable, "-m", "zipfile", "-e", "a.zip", "python"]]
    if unzip := shutil.which("unzip"):
        commands.append([unzip, "-q", "a.zip", "-d", "unzip"])
    for command in commands:
        await asyncio.to_thread(subprocess.run, command, cwd=tmp_path, check=True, stdin=subprocess.DEVNULL)
        extracted = [file.read_bytes() for file in (tmp_path / command[-1]).rglob("*") if file.is_file()]
        assert sorted(extracted) == sorted(contents.values())
