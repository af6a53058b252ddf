"""Result files over their URLs: whole or in parts, cached, never a script, and nothing else of this machine."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import pytest

from ledger.envelope import Append, Head
from ledger.events import JobClaimed, JobCompleted, JobResults, JobSubmitted, Meta, ResultFile, ResultMetadata
from ledger.files import DirectoryStore
from ledger.handle import new_job_id
from tests.api.conftest import Api

FILES = "/api/events/files/"
CONTENT = bytes(range(256)) * 40


async def add_file(api: Api, path: str, content: bytes = CONTENT, media_type: str = "application/octet-stream") -> str:
    """Let a job have a result file under a path; return the file's digest."""
    stored = await asyncio.to_thread(DirectoryStore(api.store).put_bytes, content)
    file = ResultFile(path=path, sha256=stored.sha256, size=stored.size, media_type=media_type)
    now = datetime.now(UTC)
    results = JobResults(files=[file], metadata=ResultMetadata(processed_at=now, duration=1.0))
    job = JobSubmitted(job_type="echo", parameters={}, user_id="local")
    happened = [job, JobClaimed(worker_id="w", attempt=1), JobCompleted(attempt=1, results=results)]
    recorded = await api.log.append(Append(new_job_id(), Head(), happened, Meta(), now))
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
    idle_api: Api, name: str, media_type: str
) -> None:
    digest = await add_file(idle_api, f"c/t/{name}", media_type=media_type)
    answer = await idle_api.get(f"{FILES}c/t/{name}")

    assert answer.status_code == 200
    assert answer.content == CONTENT
    assert answer.headers["content-type"] == media_type
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert answer.headers["etag"] == f'"{digest}"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = [part.strip() for part in answer.headers["content-security-policy"].split(";")]
    assert "default-src 'none'" in policy
    assert "sandbox" in policy
    assert not [part for part in policy if part.startswith("script-src") or "allow-scripts" in part]


async def test_the_result_of_an_echo_job_has_a_media_type_that_browsers_read_as_text(api: Api) -> None:
    job = await api.ended(await api.submit({"text": "ä"}))
    answer = await api.get(job["results"]["markdown_url"])

    assert answer.headers["content-type"] == "text/markdown; charset=utf-8"
    assert "ä" in answer.text


@pytest.mark.parametrize("given", ['"{}"', 'W/"{}"', '"other", "{}"'])
async def test_a_file_that_the_client_has_already_is_not_sent_again(idle_api: Api, given: str) -> None:
    digest = await add_file(idle_api, "a.bin")
    answer = await idle_api.get(f"{FILES}a.bin", **{"If-None-Match": given.format(digest)})

    assert answer.status_code == 304
    assert answer.content == b""
    assert answer.headers["etag"] == f'"{digest}"'
    other = await idle_api.get(f"{FILES}a.bin", **{"If-None-Match": '"something else"'})
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
async def test_a_part_of_a_file_is_just_that_part(idle_api: Api, asked: str, start: int, end: int) -> None:
    await add_file(idle_api, "film.webm", media_type="video/webm")
    answer = await idle_api.get(f"{FILES}film.webm", Range=asked)

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
    ]
    + ["bytes=" + "9" * 5000 + "-", "bytes=" + ",".join(f"{2 * part}-{2 * part}" for part in range(51))],
)
async def test_a_part_that_the_file_does_not_have_is_refused_in_the_envelope(idle_api: Api, asked: str) -> None:
    await add_file(idle_api, "film.webm", media_type="video/webm")
    answer = await idle_api.get(f"{FILES}film.webm", Range=asked)

    assert answer.status_code == 416
    assert answer.json()["code"] == "range_not_satisfiable"
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"


async def test_a_range_of_another_version_of_the_file_is_answered_with_the_whole(idle_api: Api) -> None:
    await add_file(idle_api, "a.bin")
    answer = await idle_api.get(f"{FILES}a.bin", **{"Range": "bytes=0-9", "If-Range": '"an older digest"'})

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
        ("a\r\nX: y", "a__X_ y"),
    ],
)
async def test_a_file_with_an_odd_name_is_served_and_its_name_cannot_break_a_header(
    idle_api: Api, name: str, plain: str
) -> None:
    await add_file(idle_api, f"c/{name}")
    answer = await idle_api.get(f"{FILES}c/{quote(name, safe='')}")

    assert answer.status_code == 200
    disposition = answer.headers["content-disposition"]
    assert disposition == f"inline; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
    assert disposition.isascii()
    assert "x" not in answer.headers


async def test_a_head_request_tells_the_size_and_sends_nothing(idle_api: Api) -> None:
    await add_file(idle_api, "a.bin")
    answer = await idle_api.http.head(f"{FILES}a.bin")

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
        "C/TALK.MD",
        "c",
        "",
        "%ff%fe",
        "%ed%a0%80",
        "a" * 5000,
        "%24where",
    ],
)
async def test_a_path_that_is_not_exactly_a_result_is_not_found(idle_api: Api, path: str) -> None:
    await add_file(idle_api, "c/talk.md")
    status, text = await raw_get(idle_api, f"{FILES}{path}")

    assert status == 404, text
    assert '"code":"file_not_found"' in text or '"code":"not_found"' in text
    assert "root:" not in text


async def test_the_digest_of_a_file_is_no_way_to_it(idle_api: Api) -> None:
    digest = await add_file(idle_api, "c/talk.md")
    for path in (digest, f"{digest[:2]}/{digest}"):
        assert (await idle_api.get(f"{FILES}{path}")).status_code == 404


async def raw_get(api: Api, path: str) -> tuple[int, str]:
    """GET a path exactly as it is written: no client tidies it up."""
    host, port = api.http.base_url.host, api.http.base_url.port
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    return int(head.split()[1]), body.decode()


async def test_files_of_a_deleted_job_are_no_longer_served(api: Api) -> None:
    job = await api.ended(await api.submit())
    url = job["results"]["markdown_url"]
    assert (await api.get(url)).status_code == 200
    deleted = await api.http.delete(f"/api/events/jobs/{job['job_id']}")

    answer = await api.get(url, deleted.headers["ledger-position"])
    assert answer.status_code == 404
    assert answer.json()["code"] == "file_not_found"


async def test_a_file_whose_bytes_are_gone_is_a_fault_that_says_what_to_look_at(idle_api: Api) -> None:
    digest = await add_file(idle_api, "a.bin")
    await asyncio.to_thread(DirectoryStore(idle_api.store).path(digest).unlink)
    answer = await idle_api.get(f"{FILES}a.bin")

    content: dict[str, Any] = answer.json()
    assert answer.status_code == 500
    assert content["code"] == "file_missing"
    assert "results.store" in content["message"]
    assert str(idle_api.store) not in answer.text
