"""Result files over their URLs: whole or in parts, cached, never a script, and nothing else of this machine."""

from __future__ import annotations

import asyncio
import os
import re
from contextlib import suppress
from datetime import UTC, datetime
from email import message_from_bytes
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest

from jobledger.api.http.streaming import content_disposition, content_type
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
from jobledger.ledger.store.command_handler import new_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from tests.api.conftest import DEADLINE_SECONDS, Api
from tests.support.role_runner import poll_until

FILES = "/api/events/files/"
CONTENT = bytes(range(256)) * 40


def file_tag(digest: str, media_type: str = "application/octet-stream") -> str:
    """Return a file's ETag without its quotes."""
    return compute_file_etag({"sha256": digest, "media_type": media_type}).strip('"')


async def add_file(
    api: Api, path: str, content: bytes | Path = CONTENT, media_type: str = "application/octet-stream"
) -> str:
    """Let a job have a result file under a path; return the file's digest."""
    store = DirectoryStore(api.store)
    if isinstance(content, Path):
        stored = await asyncio.to_thread(store.put_file, content)
    else:
        stored = await asyncio.to_thread(store.put_bytes, content)
    file = ResultFile(path=path, sha256=stored.sha256, size=stored.size, media_type=media_type)
    now = datetime.now(UTC)
    results = JobResults(files=[file], metadata=ResultMetadata(processed_at=now, duration=1.0))
    job = JobSubmitted(job_type="echo", parameters={}, user_id="local")
    happened = [job, JobClaimed(worker_id="w", attempt=1), JobCompleted(attempt=1, results=results)]
    recorded = await api.event_store.append(StreamAppend(new_job_id(), StreamHead(), happened, EventMetadata(), now))
    await api.get("/api/monitoring/events/stats", recorded[-1].position)
    return stored.sha256


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("talk.md", "text/markdown; charset=utf-8"),
        ("slide-1.jpg", "image/jpeg"),
        ("figure.svg", "image/svg+xml"),
        ("page.html", "text/html; charset=utf-8"),
        ("unknown", "application/octet-stream"),
    ],
)
async def test_a_file_is_served_as_what_it_is_and_can_never_run_a_script(
    api_without_worker: Api, name: str, media_type: str
) -> None:
    digest = await add_file(api_without_worker, f"c/t/{name}", media_type=media_type)
    answer = await api_without_worker.get(f"{FILES}c/t/{name}")

    assert answer.status_code == 200
    assert answer.content == CONTENT
    assert answer.headers["content-type"] == media_type
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert answer.headers["etag"] == f'"{file_tag(digest, media_type)}"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = [part.strip() for part in answer.headers["content-security-policy"].split(";")]
    assert "default-src 'none'" in policy
    assert "sandbox" in policy
    assert not [part for part in policy if part.startswith("script-src") or "allow-scripts" in part]


async def test_the_result_of_an_echo_job_has_a_media_type_that_browsers_read_as_text(api: Api) -> None:
    job = await api.wait_until_finished(await api.submit({"text": "ä"}))
    answer = await api.get(job["results"]["markdown_url"])

    assert answer.headers["content-type"] == "text/markdown; charset=utf-8"
    assert "ä" in answer.text


@pytest.mark.parametrize("given", ['"{}"', 'W/"{}"', '"other", "{}"'])
async def test_a_file_that_the_client_has_already_is_not_sent_again(api_without_worker: Api, given: str) -> None:
    digest = await add_file(api_without_worker, "a.bin")
    answer = await api_without_worker.get(f"{FILES}a.bin", **{"If-None-Match": given.format(file_tag(digest))})

    assert answer.status_code == 304
    assert answer.content == b""
    assert answer.headers["etag"] == f'"{file_tag(digest)}"'
    other = await api_without_worker.get(f"{FILES}a.bin", **{"If-None-Match": '"something else"'})
    assert other.status_code == 200


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=10000-", 10000, 10240),
        ("bytes=-5", 10235, 10240),
        ("bytes=10230-99999", 10230, 10240),
    ],
)
async def test_a_part_of_a_file_is_just_that_part(api_without_worker: Api, asked: str, start: int, end: int) -> None:
    await add_file(api_without_worker, "film.webm", media_type="video/webm")
    answer = await api_without_worker.get(f"{FILES}film.webm", Range=asked)

    assert answer.status_code == 206
    assert answer.content == CONTENT[start:end]
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(CONTENT)}"


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=99999-",
        "bytes=5-2",
        "bytes",
        "bytes=",
        "bytes=a-b",
        "bytes=-0",
        "bytes=-",
        "bytes=0-1,x",
        "=",
        "bytes=1e9-",
        "bytes=" + "9" * 5000 + "-",
        "bytes=" + ",".join(f"{2 * part}-{2 * part}" for part in range(51)),
    ],
)
async def test_a_part_that_the_file_does_not_have_is_refused_in_the_envelope(
    api_without_worker: Api, asked: str
) -> None:
    await add_file(api_without_worker, "film.webm", media_type="video/webm")
    answer = await api_without_worker.get(f"{FILES}film.webm", Range=asked)

    assert answer.status_code == 416
    assert answer.json()["code"] == "range_not_satisfiable"
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"


async def test_a_range_of_another_version_of_the_file_is_answered_with_the_whole(api_without_worker: Api) -> None:
    await add_file(api_without_worker, "a.bin")
    answer = await api_without_worker.get(f"{FILES}a.bin", **{"Range": "bytes=0-9", "If-Range": '"an older digest"'})

    assert answer.status_code == 200
    assert answer.content == CONTENT


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ('quo"te.md', "quo_te.md"),
        ("semi;colon.md", "semi_colon.md"),
        ("back\\slash.md", "back_slash.md"),
        ("Umläute und Ελληνικά 日本.md", "Umlaute und ________ __.md"),
        ("per%2Fcent.md", "per_2Fcent.md"),
        ("%0d%0aX: y", "_0d_0aX_ y"),
    ],
)
async def test_a_file_with_an_odd_name_is_served_and_its_name_cannot_break_a_header(
    api_without_worker: Api, name: str, plain: str
) -> None:
    await add_file(api_without_worker, f"c/{name}")
    answer = await api_without_worker.get(f"{FILES}c/{quote(name, safe='')}")

    assert answer.status_code == 200
    disposition = answer.headers["content-disposition"]
    assert disposition == f"inline; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
    assert disposition.isascii()
    assert "x" not in answer.headers


async def test_a_head_request_tells_the_size_and_sends_nothing(api_without_worker: Api) -> None:
    await add_file(api_without_worker, "a.bin")
    answer = await api_without_worker.http.head(f"{FILES}a.bin")

    assert answer.status_code == 200
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert answer.content == b""


@pytest.mark.parametrize(
    "path",
    [
        "../../../../etc/passwd",
        "..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "..%5c..%5cetc%5cpasswd",
        "%252e%252e%252fetc%252fpasswd",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "c/./talk.md",
        "c/x/../talk.md",
        "c//talk.md",
        "c/talk.md/",
        "c/talk.md%00.jpg",
        "c/talk.md%0a",
        "c%2ftalk.md%2f",
        "c%5ctalk.md",
        "c/talk.md%e0%80%ae",
        "CON",
        "NUL.md",
        "c/COM1",
        "a/" * 1000,
        "%00",
        "C/TALK.MD",
        "c",
        "",
        "%ff%fe",
        "%ed%a0%80",
        "a" * 5000,
        "%24where",
    ],
)
async def test_a_path_that_is_not_exactly_a_result_is_not_found(api_without_worker: Api, path: str) -> None:
    await add_file(api_without_worker, "c/talk.md")
    status, text = await raw_get(api_without_worker, f"{FILES}{path}")

    assert status == 404, text
    assert '"code":"file_not_found"' in text or '"code":"not_found"' in text
    assert "root:" not in text


async def test_the_digest_of_a_file_is_no_way_to_it(api_without_worker: Api) -> None:
    digest = await add_file(api_without_worker, "c/talk.md")
    for path in (digest, f"{digest[:2]}/{digest}"):
        assert (await api_without_worker.get(f"{FILES}{path}")).status_code == 404


async def raw_get(api: Api, path: str) -> tuple[int, str]:
    """GET a path exactly as it is written: no client tidies it up."""
    host, port = api.http.base_url.host, api.http.base_url.port
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    return int(head.split()[1]), body.decode()


def moved_away(api: Api) -> Path:
    return api.store.rename(api.store.with_suffix(".away"))


@pytest.mark.parametrize("mount_point", [False, True], ids=["missing", "empty mount point"])
async def test_file_of_a_store_that_is_away_is_unavailable_until_it_is_back(
    api_without_worker: Api, mount_point: bool
) -> None:
    await add_file(api_without_worker, "away.bin")
    away = moved_away(api_without_worker)
    try:
        if mount_point:
            api_without_worker.store.mkdir()
        answer = await api_without_worker.get(f"{FILES}away.bin")
        assert (answer.status_code, answer.json()["code"]) == (503, "file_store_unavailable")
        assert "file store" in answer.json()["message"]
        assert str(api_without_worker.store) not in answer.text
        assert "retry-after" in answer.headers
    finally:
        if mount_point:
            api_without_worker.store.rmdir()  # nothing was written there
        away.rename(api_without_worker.store)
    assert (await api_without_worker.get(f"{FILES}away.bin")).status_code == 200


async def test_files_of_a_deleted_job_are_no_longer_served(api: Api) -> None:
    job = await api.wait_until_finished(await api.submit())
    url = job["results"]["markdown_url"]
    assert (await api.get(url)).status_code == 200
    deleted = await api.http.delete(f"/api/events/jobs/{job['job_id']}")

    answer = await api.get(url, deleted.headers["ledger-position"])
    assert answer.status_code == 404
    assert answer.json()["code"] == "file_not_found"


async def test_a_file_whose_bytes_are_gone_is_a_fault_that_says_what_to_look_at(api_without_worker: Api) -> None:
    digest = await add_file(api_without_worker, "a.bin")
    await asyncio.to_thread(DirectoryStore(api_without_worker.store).path(digest).unlink)
    answer = await api_without_worker.get(f"{FILES}a.bin")

    content: dict[str, Any] = answer.json()
    assert answer.status_code == 500
    assert content["code"] == "file_missing"
    assert "results.store" in content["message"]
    assert str(api_without_worker.store) not in answer.text


# Conditions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"If-Match": '"{}"'}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Match": '"other", "{}"'}, 200),
        ({"If-Match": '"other"'}, 412),
        ({"If-Match": 'W/"{}"'}, 412),
        ({"If-Match": "{}"}, 412),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": "nonsense"}, 200),
        ({"If-Match": '"other"', "If-None-Match": '"{}"'}, 412),
        ({"If-Match": '"{}"', "If-None-Match": '"{}"'}, 304),
        ({"If-Modified-Since": "Wed, 01 Jan 2200 00:00:00 GMT"}, 304),
        ({"If-Modified-Since": "Wed, 01 Jan 2020 00:00:00 GMT"}, 200),
        ({"If-Modified-Since": "yesterday"}, 200),
        ({"If-Modified-Since": "Wed, 01 Jan 2200 00:00:00 GMT", "If-None-Match": '"other"'}, 200),
        ({"If-Unmodified-Since": "Wed, 01 Jan 2020 00:00:00 GMT"}, 412),
        ({"If-Unmodified-Since": "Wed, 01 Jan 2200 00:00:00 GMT"}, 200),
        ({"If-Unmodified-Since": "Wed, 01 Jan 2020 00:00:00 GMT", "If-Match": '"{}"'}, 200),
    ],
)
async def test_conditions_are_answered_as_the_rfc_wants(
    api_without_worker: Api, headers: dict[str, str], status: int
) -> None:
    digest = await add_file(api_without_worker, "a.bin")
    for method in ("GET", "HEAD"):
        asked = {name: value.format(file_tag(digest)) for name, value in headers.items()}
        answer = await api_without_worker.http.request(method, f"{FILES}a.bin", headers=asked)
        assert answer.status_code == status
    answer = await api_without_worker.get(
        f"{FILES}a.bin", **{name: value.format(file_tag(digest)) for name, value in headers.items()}
    )
    if status == 412:
        assert answer.json()["code"] == "precondition_failed"
        assert answer.json()["details"] == {"etag": f'"{file_tag(digest)}"'}
    if status == 304:
        assert answer.content == b""


async def test_what_was_not_changed_since_it_was_fetched_is_not_sent_again(api_without_worker: Api) -> None:
    await add_file(api_without_worker, "a.bin")
    fetched = (await api_without_worker.get(f"{FILES}a.bin")).headers["last-modified"]
    answer = await api_without_worker.get(f"{FILES}a.bin", **{"If-Modified-Since": fetched})
    assert (answer.status_code, answer.headers["last-modified"]) == (304, fetched)


async def test_a_download_that_broke_off_goes_on_if_the_file_is_still_the_same(api_without_worker: Api) -> None:
    digest = await add_file(api_without_worker, "a.bin")
    whole = await api_without_worker.get(f"{FILES}a.bin")
    for same in (f'"{file_tag(digest)}"', whole.headers["last-modified"]):
        answer = await api_without_worker.get(f"{FILES}a.bin", **{"Range": "bytes=10000-", "If-Range": same})
        assert (answer.status_code, answer.content) == (206, CONTENT[10000:])
    for other in (f'W/"{file_tag(digest)}"', "Wed, 01 Jan 2020 00:00:00 GMT"):
        answer = await api_without_worker.get(f"{FILES}a.bin", **{"Range": "bytes=10000-", "If-Range": other})
        assert (answer.status_code, answer.content) == (200, CONTENT)


async def test_a_range_in_units_that_nobody_knows_is_answered_with_the_whole(api_without_worker: Api) -> None:
    await add_file(api_without_worker, "a.bin")
    answer = await api_without_worker.get(f"{FILES}a.bin", Range="lines=1-2")
    assert (answer.status_code, answer.content) == (200, CONTENT)


async def test_several_parts_come_in_one_answer_each_saying_where_it_belongs(api_without_worker: Api) -> None:
    await add_file(api_without_worker, "a.bin", media_type="text/plain")
    answer = await api_without_worker.get(f"{FILES}a.bin", Range="bytes=-5, 0-9, 5-12, 99999-, 100-100")

    assert answer.status_code == 206
    assert answer.headers["content-length"] == str(len(answer.content))
    message = message_from_bytes(b"Content-Type: " + answer.headers["content-type"].encode() + b"\n\n" + answer.content)
    parts = [part for part in message.walk() if not part.is_multipart()]
    places = [part["content-range"] for part in parts]
    assert places == [
        f"bytes 0-12/{len(CONTENT)}",
        f"bytes 100-100/{len(CONTENT)}",
        f"bytes 10235-10239/{len(CONTENT)}",
    ]
    assert {part["content-type"] for part in parts} == {"text/plain; charset=utf-8"}
    for expected in (CONTENT[:13], CONTENT[100:101], CONTENT[-5:]):
        assert b"\r\n\r\n" + expected + b"\r\n--" in answer.content


async def test_a_head_request_knows_no_ranges(api_without_worker: Api) -> None:
    await add_file(api_without_worker, "a.bin")
    answer = await api_without_worker.http.head(f"{FILES}a.bin", headers={"Range": "bytes=0-9"})
    assert (answer.status_code, answer.headers["content-length"]) == (200, str(len(CONTENT)))
    assert answer.headers["accept-ranges"] == "bytes"


async def test_an_empty_file_is_served_and_has_no_parts(api_without_worker: Api) -> None:
    await add_file(api_without_worker, "empty.md", b"", "text/markdown")
    whole = await api_without_worker.get(f"{FILES}empty.md")
    part = await api_without_worker.get(f"{FILES}empty.md", Range="bytes=0-")
    assert (whole.status_code, whole.headers["content-length"], part.status_code) == (200, "0", 416)


# What it is, and what it is called --------------------------------------------------------------------------------


async def test_a_file_can_be_asked_for_as_a_download(api_without_worker: Api) -> None:
    await add_file(api_without_worker, "c/talk.md", media_type="text/markdown")
    shown = await api_without_worker.get(f"{FILES}c/talk.md")
    saved = await api_without_worker.get(f"{FILES}c/talk.md?download=1")
    wrong = await api_without_worker.get(f"{FILES}c/talk.md?download=maybe")
    assert shown.headers["content-disposition"] == 'inline; filename="talk.md"'
    assert saved.headers["content-disposition"] == 'attachment; filename="talk.md"'
    assert (wrong.status_code, wrong.json()["details"]["errors"][0]["path"]) == (422, "download")


@pytest.mark.parametrize("name", ["a\r\nX: y", 'a"; x="', "a\\", "\x00\x7f", "‮gpj.exe", "日本", ""])
def test_no_name_breaks_out_of_its_header(name: str) -> None:
    header = content_disposition(name, attachment=True)
    kind, plain, *encoded = re.split(r"; (?=filename)", header)
    assert (kind, header.isascii(), header.isprintable()) == ("attachment", True, True)
    assert re.fullmatch(r'filename="[^"\\]*"', plain)
    assert unquote("".join(encoded).removeprefix("filename*=UTF-8''")) in (name, "")


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("text/markdown", "text/markdown; charset=utf-8"),
        ("text/plain; charset=latin-1", "text/plain; charset=latin-1"),
        ("image/svg+xml", "image/svg+xml"),
        ("text/html\r\nX: y", "application/octet-stream"),
        ('text/html; x="\r\n"', "application/octet-stream"),
        ("text", "application/octet-stream"),
        ("", "application/octet-stream"),
        ("text/html, text/plain", "application/octet-stream"),
    ],
)
def test_a_media_type_is_sent_as_one_or_not_at_all(given: str, sent: str) -> None:
    assert content_type(given) == sent


# Large files, and what lies in the store --------------------------------------------------------------------------


LARGE = 400 * 2**20


async def add_large_file(api: Api, path: str) -> str:
    """A file of zeros, which takes no place on the disk."""
    sparse = api.store / "sparse"
    sparse.touch()
    os.truncate(sparse, LARGE)
    return await add_file(api, path, sparse)


def memory() -> int:
    """What this process, in which the API runs, holds in memory now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def reads(path: Path) -> bool:
    """Whether this process has the file open."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.add(link.readlink())
    return path in found


async def test_a_large_file_is_never_held_in_memory_neither_for_a_slow_client_nor_for_a_fast_one(
    api_without_worker: Api,
) -> None:
    await add_large_file(api_without_worker, "film.webm")
    before, most, received = memory(), 0, 0
    async with api_without_worker.http.stream("GET", f"{FILES}film.webm") as answer:
        assert answer.headers["content-length"] == str(LARGE)
        async for piece in answer.aiter_raw():
            if received == 0:
                await asyncio.sleep(0.5)  # a slow client: whatever is read ahead meanwhile lies in memory
            received += len(piece)
            most = max(most, memory())
    assert received == LARGE
    assert most - before < 40 * 2**20


async def test_when_the_client_goes_away_the_file_is_no_longer_read(api_without_worker: Api) -> None:
    digest = await add_large_file(api_without_worker, "film.webm")
    stored = DirectoryStore(api_without_worker.store).path(digest)
    async with api_without_worker.http.stream("GET", f"{FILES}film.webm") as answer:
        async for _ in answer.aiter_raw():
            break
        assert reads(stored)
    await poll_until(lambda: not reads(stored), "the file is closed", seconds=5)


@pytest.mark.parametrize("asked", [{}, {"Range": "bytes=0-1"}, {"Range": "bytes=0-1,5-6"}, {"Range": "bytes=5-2"}])
async def test_no_answer_leaves_a_file_open(api_without_worker: Api, asked: dict[str, str]) -> None:
    digest = await add_file(api_without_worker, "a.bin")
    for method in ("GET", "HEAD"):
        await api_without_worker.http.request(method, f"{FILES}a.bin", headers=asked)
    await poll_until(
        lambda: not reads(DirectoryStore(api_without_worker.store).path(digest)), "the file is closed", seconds=5
    )


async def test_a_file_that_becomes_shorter_while_it_is_sent_ends_in_a_broken_connection(
    api_without_worker: Api,
) -> None:
    digest = await add_large_file(api_without_worker, "film.webm")

    async def read() -> None:
        async with api_without_worker.http.stream("GET", f"{FILES}film.webm") as answer:
            async for _ in answer.aiter_raw():
                os.truncate(DirectoryStore(api_without_worker.store).path(digest), 10)

    with pytest.raises(httpx.RemoteProtocolError):
        await read()


@pytest.mark.parametrize("what", ["a link to a file", "a link to a directory", "a directory", "a pipe"])
async def test_what_is_no_file_in_the_store_is_not_followed(api_without_worker: Api, tmp_path: Path, what: str) -> None:
    digest = await add_file(api_without_worker, "a.bin")
    stored = DirectoryStore(api_without_worker.store).path(digest)
    stored.unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / digest).write_text("secret")
    if what == "a link to a file":
        stored.symlink_to(tmp_path / "elsewhere" / digest)
    elif what == "a link to a directory":
        stored.parent.rmdir()
        stored.parent.symlink_to(tmp_path / "elsewhere")
    elif what == "a directory":
        stored.mkdir()
    else:
        os.mkfifo(stored)
    async with asyncio.timeout(5):
        answer = await api_without_worker.get(f"{FILES}a.bin")
    assert (answer.status_code, answer.json()["code"]) == (500, "file_missing")


@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=0-3"}, {"Range": "bytes=0-1,3-4"}])
@pytest.mark.parametrize("seen_before", [False, True])
async def test_a_changed_file_is_never_served_with_the_recorded_digest(
    api_without_worker: Api, headers: dict[str, str], seen_before: bool
) -> None:
    digest = await add_file(api_without_worker, "a.bin")
    if seen_before:
        assert (await api_without_worker.get(f"{FILES}a.bin")).headers["etag"] == f'"{file_tag(digest)}"'
    stored = DirectoryStore(api_without_worker.store).path(digest)
    content = stored.read_bytes()
    stored.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    for method in ("GET", "HEAD"):
        answer = await api_without_worker.http.request(method, f"{FILES}a.bin", headers=headers)
        assert answer.status_code == 500
        assert "etag" not in answer.headers
        if method == "GET":
            assert answer.json()["code"] == "file_damaged"
            assert str(api_without_worker.store) not in answer.text


async def test_grown_files_do_not_keep_a_whole_one_waiting(api_without_worker: Api) -> None:
    for number in range(3):
        digest = await add_file(api_without_worker, f"{number}.bin", b"%d" % number)
        if number:
            os.truncate(DirectoryStore(api_without_worker.store).path(digest), 2**40)
    async with asyncio.timeout(DEADLINE_SECONDS):
        grown = await asyncio.gather(*(api_without_worker.get(f"{FILES}{number}.bin") for number in (1, 2)))
        assert [answer.json()["code"] for answer in grown] == ["file_damaged"] * 2
        assert (await api_without_worker.get(f"{FILES}0.bin")).content == b"0"


async def test_hashing_of_a_large_file_ends_when_the_client_goes_away(api_without_worker: Api) -> None:
    path = "large.bin"
    digest = await add_file(api_without_worker, path)
    await api_without_worker.db.files.update_many({"path": path}, {"$set": {"size": 2**40}})
    os.truncate(DirectoryStore(api_without_worker.store).path(digest), 2**40)
    with pytest.raises(httpx.ReadTimeout):
        await api_without_worker.http.get(f"{FILES}{path}", timeout=0.3)
    await poll_until(lambda: not any(it.get_name() == "open-file" for it in asyncio.all_tasks()), "hashing has ended")
