"""Large result files, and files that are damaged in the store."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from tests.api.conftest import Api
from tests.api.result_files import (
    CONTENT,
    FILES,
    LARGE_FILE_BYTES,
    MEMORY_LIMIT_BYTES,
    add_file,
    compute_opaque_tag,
    get_stored_path,
    is_open,
    measure_memory_bytes,
)
from tests.support.polling import DEADLINE_SECONDS, poll_until


async def add_large_file(api: Api, path: str) -> str:
    """Add a job with a sparse file of zeros and return its digest."""
    sparse = api.store / "sparse"
    sparse.touch()
    os.truncate(sparse, LARGE_FILE_BYTES)
    return await add_file(api, path, sparse)


async def add_distinct_file(api: Api) -> tuple[str, str]:
    """Add a file that no other test damages, because its path and its content are unique. Return path and digest."""
    path = f"{uuid4()}.bin"
    return path, await add_file(api, path, path.encode())


async def test_large_file_is_streamed_with_bounded_memory(
    api_without_worker: Api,
) -> None:
    await add_large_file(api_without_worker, "film.webm")
    before, peak, received = measure_memory_bytes(), 0, 0
    async with api_without_worker.http.stream("GET", f"{FILES}film.webm") as response:
        assert response.headers["content-length"] == str(LARGE_FILE_BYTES)
        async for chunk in response.aiter_raw():
            if received == 0:
                await asyncio.sleep(0.5)  # a slow client: what the server reads ahead is in memory
            received += len(chunk)
            peak = max(peak, measure_memory_bytes())
    assert received == LARGE_FILE_BYTES
    assert peak - before < MEMORY_LIMIT_BYTES


async def test_client_disconnect_closes_the_file(api_without_worker: Api) -> None:
    digest = await add_large_file(api_without_worker, "film.webm")
    stored = get_stored_path(api_without_worker, digest)
    async with api_without_worker.http.stream("GET", f"{FILES}film.webm") as response:
        async for _ in response.aiter_raw():
            break
        assert is_open(stored)
    await poll_until(lambda: not is_open(stored), "the file is closed")


@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=0-1"}, {"Range": "bytes=0-1,5-6"}, {"Range": "bytes=5-2"}])
async def test_finished_response_leaves_no_file_open(shared_api: Api, headers: dict[str, str]) -> None:
    digest = await add_file(shared_api, "a.bin")
    for method in ("GET", "HEAD"):
        response = await shared_api.http.request(method, f"{FILES}a.bin", headers=headers)
        assert response.status_code in (200, 206, 416)
    await poll_until(lambda: not is_open(get_stored_path(shared_api, digest)), "the file is closed")


async def test_file_truncated_during_response_breaks_the_connection(
    api_without_worker: Api,
) -> None:
    digest = await add_large_file(api_without_worker, "film.webm")

    async def read() -> None:
        async with api_without_worker.http.stream("GET", f"{FILES}film.webm") as response:
            async for _ in response.aiter_raw():
                os.truncate(get_stored_path(api_without_worker, digest), 10)

    with pytest.raises(httpx.RemoteProtocolError):
        await read()


@pytest.mark.parametrize("kind", ["link to a file", "directory", "pipe"])
async def test_store_entry_that_is_no_regular_file_is_missing(shared_api: Api, tmp_path: Path, kind: str) -> None:
    path, digest = await add_distinct_file(shared_api)
    stored = get_stored_path(shared_api, digest)
    stored.unlink()
    if kind == "link to a file":
        (tmp_path / digest).write_text("secret")
        stored.symlink_to(tmp_path / digest)
    elif kind == "directory":
        stored.mkdir()
    else:
        os.mkfifo(stored)
    await check_file_is_missing(shared_api, path)


async def test_file_behind_a_link_to_a_directory_is_missing(api_without_worker: Api, tmp_path: Path) -> None:
    digest = await add_file(api_without_worker, "a.bin")  # the only file: a shared store may have more in its folder
    stored = get_stored_path(api_without_worker, digest)
    stored.parent.rename(tmp_path / "elsewhere")
    stored.parent.symlink_to(tmp_path / "elsewhere")
    assert stored.read_bytes() == CONTENT
    await check_file_is_missing(api_without_worker, "a.bin")


async def check_file_is_missing(api: Api, path: str) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        response = await api.get(f"{FILES}{path}")
    assert (response.status_code, response.json()["code"]) == (500, "file_missing")


@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=0-3"}, {"Range": "bytes=0-1,3-4"}])
@pytest.mark.parametrize("was_served", [False, True])
async def test_changed_file_is_reported_as_damaged(shared_api: Api, headers: dict[str, str], was_served: bool) -> None:
    path, digest = await add_distinct_file(shared_api)
    if was_served:
        assert (await shared_api.get(f"{FILES}{path}")).headers["etag"] == f'"{compute_opaque_tag(digest)}"'
    stored = get_stored_path(shared_api, digest)
    content = stored.read_bytes()
    stored.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    for method in ("GET", "HEAD"):
        response = await shared_api.http.request(method, f"{FILES}{path}", headers=headers)
        assert response.status_code == 500
        assert "etag" not in response.headers
        if method == "GET":
            assert response.json()["code"] == "file_damaged"
            assert str(shared_api.store) not in response.text


async def test_grown_files_do_not_delay_an_intact_file(api_without_worker: Api) -> None:
    for number in range(3):
        digest = await add_file(api_without_worker, f"{number}.bin", b"%d" % number)
        if number:
            os.truncate(get_stored_path(api_without_worker, digest), 2**40)
    async with asyncio.timeout(DEADLINE_SECONDS):
        grown = await asyncio.gather(*(api_without_worker.get(f"{FILES}{number}.bin") for number in (1, 2)))
        assert [response.json()["code"] for response in grown] == ["file_damaged"] * 2
        assert (await api_without_worker.get(f"{FILES}0.bin")).content == b"0"


async def test_client_disconnect_stops_hashing_of_large_file(api_without_worker: Api) -> None:
    path = "large.bin"
    digest = await add_file(api_without_worker, path)
    await api_without_worker.db.files.update_many({"path": path}, {"$set": {"size": 2**40}})
    os.truncate(get_stored_path(api_without_worker, digest), 2**40)
    request = asyncio.create_task(api_without_worker.get(f"{FILES}{path}"))
    await poll_until(is_hashing, "the file is hashed")
    request.cancel()
    await poll_until(lambda: not is_hashing(), "hashing has ended")
    assert request.cancelled()


def is_hashing() -> bool:
    """Return whether a task checks the digest of a file before it is served."""
    return any(task.get_name() == "open-file" for task in asyncio.all_tasks())
