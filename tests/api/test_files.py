"""The route of result files: whole files, ranges, conditional requests, headers and missing files.

Tests that share an API add the same file under the same path, because a path leads to the job that completed first.
"""

from __future__ import annotations

import asyncio
import re
from email import message_from_bytes
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest

from jobledger.api.http.streaming import format_content_disposition, format_content_type
from tests.api.conftest import Api
from tests.api.result_files import CONTENT, FILES, add_file, compute_opaque_tag, get_stored_path
from tests.support.polling import DEADLINE_SECONDS


def format_headers(headers: dict[str, str], digest: str) -> dict[str, str]:
    """Return headers with the file's ETag in place of `{}`."""
    return {name: value.format(compute_opaque_tag(digest)) for name, value in headers.items()}


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
async def test_file_has_its_media_type_and_cannot_run_scripts(shared_api: Api, name: str, media_type: str) -> None:
    digest = await add_file(shared_api, f"c/t/{name}", media_type=media_type)
    response = await shared_api.get(f"{FILES}c/t/{name}")

    assert response.status_code == 200
    assert response.content == CONTENT
    assert response.headers["content-type"] == media_type
    assert response.headers["content-length"] == str(len(CONTENT))
    assert response.headers["etag"] == f'"{compute_opaque_tag(digest, media_type)}"'
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = [part.strip() for part in response.headers["content-security-policy"].split(";")]
    assert "default-src 'none'" in policy
    assert "sandbox" in policy
    assert not [part for part in policy if part.startswith("script-src") or "allow-scripts" in part]


async def test_echo_result_is_markdown_with_charset(api: Api) -> None:
    job = await api.wait_until_finished(await api.submit({"text": "ä"}))
    response = await api.get(job["results"]["markdown_url"])

    assert response.headers["content-type"] == "text/markdown; charset=utf-8"
    assert "ä" in response.text


@pytest.mark.parametrize("if_none_match", ['"{}"', 'W/"{}"', '"other", "{}"'])
async def test_file_with_matching_etag_is_not_modified(shared_api: Api, if_none_match: str) -> None:
    digest = await add_file(shared_api, "a.bin")
    headers = format_headers({"If-None-Match": if_none_match}, digest)
    response = await shared_api.get(f"{FILES}a.bin", **headers)

    assert response.status_code == 304
    assert response.content == b""
    assert response.headers["etag"] == f'"{compute_opaque_tag(digest)}"'
    response = await shared_api.get(f"{FILES}a.bin", **{"If-None-Match": '"something else"'})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("byte_range", "start", "end"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=10000-", 10000, 10240),
        ("bytes=-5", 10235, 10240),
        ("bytes=10230-99999", 10230, 10240),
    ],
)
async def test_range_request_returns_the_requested_bytes(
    shared_api: Api, byte_range: str, start: int, end: int
) -> None:
    await add_file(shared_api, "film.webm", media_type="video/webm")
    response = await shared_api.get(f"{FILES}film.webm", Range=byte_range)

    assert response.status_code == 206
    assert response.content == CONTENT[start:end]
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/{len(CONTENT)}"


@pytest.mark.parametrize(
    "byte_range",
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
async def test_invalid_range_is_rejected_with_error_body(shared_api: Api, byte_range: str) -> None:
    await add_file(shared_api, "film.webm", media_type="video/webm")
    response = await shared_api.get(f"{FILES}film.webm", Range=byte_range)

    assert response.status_code == 416
    assert response.json()["code"] == "range_not_satisfiable"
    assert response.headers["content-range"] == f"bytes */{len(CONTENT)}"


async def test_range_with_outdated_if_range_returns_whole_file(shared_api: Api) -> None:
    await add_file(shared_api, "a.bin")
    response = await shared_api.get(f"{FILES}a.bin", **{"Range": "bytes=0-9", "If-Range": '"an older digest"'})

    assert response.status_code == 200
    assert response.content == CONTENT


@pytest.mark.parametrize(
    ("name", "ascii_name"),
    [
        ('quo"te.md', "quo_te.md"),
        ("semi;colon.md", "semi_colon.md"),
        ("back\\slash.md", "back_slash.md"),
        ("Umläute und Ελληνικά 日本.md", "Umlaute und ________ __.md"),
        ("per%2Fcent.md", "per_2Fcent.md"),
        ("%0d%0aX: y", "_0d_0aX_ y"),
    ],
)
async def test_file_name_with_special_characters_is_encoded_in_header(
    shared_api: Api, name: str, ascii_name: str
) -> None:
    await add_file(shared_api, f"c/{name}")
    response = await shared_api.get(f"{FILES}c/{quote(name, safe='')}")

    assert response.status_code == 200
    disposition = response.headers["content-disposition"]
    assert disposition == f"inline; filename=\"{ascii_name}\"; filename*=UTF-8''{quote(name, safe='')}"
    assert disposition.isascii()
    assert "x" not in response.headers


async def test_head_request_returns_size_without_body(shared_api: Api) -> None:
    await add_file(shared_api, "a.bin")
    response = await shared_api.http.head(f"{FILES}a.bin")

    assert response.status_code == 200
    assert response.headers["content-length"] == str(len(CONTENT))
    assert response.content == b""


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
async def test_path_that_is_not_a_result_path_is_not_found(shared_api: Api, path: str) -> None:
    await add_file(shared_api, "c/talk.md")
    status, text = await get_raw_path(shared_api, f"{FILES}{path}")

    assert status == 404, text
    assert '"code":"file_not_found"' in text or '"code":"not_found"' in text
    assert "root:" not in text


async def test_digest_as_path_is_not_found(shared_api: Api) -> None:
    digest = await add_file(shared_api, "c/talk.md")
    for path in (digest, f"{digest[:2]}/{digest}"):
        assert (await shared_api.get(f"{FILES}{path}")).status_code == 404


async def get_raw_path(api: Api, path: str) -> tuple[int, str]:
    """GET a path exactly as given, without the normalization of an HTTP client. Return status and body."""
    host, port = api.http.base_url.host, api.http.base_url.port
    async with asyncio.timeout(DEADLINE_SECONDS):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    return int(head.split()[1]), body.decode()


def move_store(api: Api) -> Path:
    """Rename the directory of the store and return its new path."""
    return api.store.rename(api.store.with_suffix(".moved"))


@pytest.mark.parametrize("is_mount_point", [False, True], ids=["missing", "empty mount point"])
async def test_file_of_missing_store_is_unavailable_until_store_returns(
    api_without_worker: Api, is_mount_point: bool
) -> None:
    await add_file(api_without_worker, "a.bin")
    moved_store = move_store(api_without_worker)
    try:
        if is_mount_point:
            api_without_worker.store.mkdir()
        response = await api_without_worker.get(f"{FILES}a.bin")
        assert (response.status_code, response.json()["code"]) == (503, "result_store_unavailable")
        assert "result store" in response.json()["message"]
        assert str(api_without_worker.store) not in response.text
        assert "retry-after" in response.headers
    finally:
        if is_mount_point:
            api_without_worker.store.rmdir()  # fails if something was written there
        moved_store.rename(api_without_worker.store)
    assert (await api_without_worker.get(f"{FILES}a.bin")).status_code == 200


async def test_file_of_deleted_job_is_not_found(api: Api) -> None:
    job = await api.wait_until_finished(await api.submit())
    url = job["results"]["markdown_url"]
    assert (await api.get(url)).status_code == 200
    deleted = await api.http.delete(f"/api/events/jobs/{job['job_id']}")

    response = await api.get(url, deleted.headers["ledger-position"])
    assert response.status_code == 404
    assert response.json()["code"] == "file_not_found"


async def test_file_missing_in_store_responds_with_setting_to_check(api_without_worker: Api) -> None:
    digest = await add_file(api_without_worker, "a.bin")
    get_stored_path(api_without_worker, digest).unlink()
    response = await api_without_worker.get(f"{FILES}a.bin")

    content: dict[str, Any] = response.json()
    assert response.status_code == 500
    assert content["code"] == "file_missing"
    assert "results.store" in content["message"]
    assert str(api_without_worker.store) not in response.text


# Conditional requests -----------------------------------------------------------------------------------------------


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
async def test_conditional_request_follows_rfc_9110(shared_api: Api, headers: dict[str, str], status: int) -> None:
    digest = await add_file(shared_api, "a.bin")
    for method in ("GET", "HEAD"):
        request_headers = format_headers(headers, digest)
        response = await shared_api.http.request(method, f"{FILES}a.bin", headers=request_headers)
        assert response.status_code == status
    response = await shared_api.get(f"{FILES}a.bin", **format_headers(headers, digest))
    if status == 412:
        assert response.json()["code"] == "precondition_failed"
        assert response.json()["details"] == {"etag": f'"{compute_opaque_tag(digest)}"'}
    if status == 304:
        assert response.content == b""


async def test_file_unchanged_since_last_modified_is_not_modified(shared_api: Api) -> None:
    await add_file(shared_api, "a.bin")
    last_modified = (await shared_api.get(f"{FILES}a.bin")).headers["last-modified"]
    response = await shared_api.get(f"{FILES}a.bin", **{"If-Modified-Since": last_modified})
    assert (response.status_code, response.headers["last-modified"]) == (304, last_modified)


async def test_range_with_if_range_continues_only_an_unchanged_file(shared_api: Api) -> None:
    digest = await add_file(shared_api, "a.bin")
    whole = await shared_api.get(f"{FILES}a.bin")
    for validator in (f'"{compute_opaque_tag(digest)}"', whole.headers["last-modified"]):
        response = await shared_api.get(f"{FILES}a.bin", **{"Range": "bytes=10000-", "If-Range": validator})
        assert (response.status_code, response.content) == (206, CONTENT[10000:])
    for validator in (f'W/"{compute_opaque_tag(digest)}"', "Wed, 01 Jan 2020 00:00:00 GMT"):
        response = await shared_api.get(f"{FILES}a.bin", **{"Range": "bytes=10000-", "If-Range": validator})
        assert (response.status_code, response.content) == (200, CONTENT)


async def test_range_in_unknown_unit_returns_whole_file(shared_api: Api) -> None:
    await add_file(shared_api, "a.bin")
    response = await shared_api.get(f"{FILES}a.bin", Range="lines=1-2")
    assert (response.status_code, response.content) == (200, CONTENT)


async def test_multiple_ranges_return_multipart_response(shared_api: Api) -> None:
    await add_file(shared_api, "ranges.txt", media_type="text/plain")
    response = await shared_api.get(f"{FILES}ranges.txt", Range="bytes=-5, 0-9, 5-12, 99999-, 100-100")

    assert response.status_code == 206
    assert response.headers["content-length"] == str(len(response.content))
    message = message_from_bytes(
        b"Content-Type: " + response.headers["content-type"].encode() + b"\n\n" + response.content
    )
    parts = [part for part in message.walk() if not part.is_multipart()]
    assert [part["content-range"] for part in parts] == [
        f"bytes 0-12/{len(CONTENT)}",
        f"bytes 100-100/{len(CONTENT)}",
        f"bytes 10235-10239/{len(CONTENT)}",
    ]
    assert {part["content-type"] for part in parts} == {"text/plain; charset=utf-8"}
    for expected in (CONTENT[:13], CONTENT[100:101], CONTENT[-5:]):
        assert b"\r\n\r\n" + expected + b"\r\n--" in response.content


async def test_head_request_ignores_range(shared_api: Api) -> None:
    await add_file(shared_api, "a.bin")
    response = await shared_api.http.head(f"{FILES}a.bin", headers={"Range": "bytes=0-9"})
    assert (response.status_code, response.headers["content-length"]) == (200, str(len(CONTENT)))
    assert response.headers["accept-ranges"] == "bytes"


async def test_empty_file_is_served_and_has_no_ranges(shared_api: Api) -> None:
    await add_file(shared_api, "empty.md", b"", "text/markdown")
    whole = await shared_api.get(f"{FILES}empty.md")
    part = await shared_api.get(f"{FILES}empty.md", Range="bytes=0-")
    assert (whole.status_code, whole.headers["content-length"], part.status_code) == (200, "0", 416)


# Media types and names ----------------------------------------------------------------------------------------------


async def test_download_parameter_sets_attachment_disposition(shared_api: Api) -> None:
    await add_file(shared_api, "c/download.md", media_type="text/markdown")
    inline = await shared_api.get(f"{FILES}c/download.md")
    attachment = await shared_api.get(f"{FILES}c/download.md?download=1")
    invalid = await shared_api.get(f"{FILES}c/download.md?download=maybe")
    assert inline.headers["content-disposition"] == 'inline; filename="download.md"'
    assert attachment.headers["content-disposition"] == 'attachment; filename="download.md"'
    assert (invalid.status_code, invalid.json()["details"]["errors"][0]["path"]) == (422, "download")


@pytest.mark.parametrize("name", ["a\r\nX: y", 'a"; x="', "a\\", "\x00\x7f", "‮gpj.exe", "日本", ""])
def test_content_disposition_escapes_any_name(name: str) -> None:
    header = format_content_disposition(name, attachment=True)
    disposition, ascii_name, *encoded = re.split(r"; (?=filename)", header)
    assert (disposition, header.isascii(), header.isprintable()) == ("attachment", True, True)
    assert re.fullmatch(r'filename="[^"\\]*"', ascii_name)
    assert unquote("".join(encoded).removeprefix("filename*=UTF-8''")) in (name, "")


@pytest.mark.parametrize(
    ("media_type", "expected"),
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
def test_content_type_of_invalid_media_type_is_octet_stream(media_type: str, expected: str) -> None:
    assert format_content_type(media_type) == expected
