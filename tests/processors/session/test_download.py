"""Downloads with retries: which errors are retried, how long the pauses are, and how a broken download continues."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from jobledger.workers.processor import ProcessorError
from jobledger.workers.processors.session import download as download_module
from jobledger.workers.processors.session.download import ProgressRange, download
from jobledger.workers.processors.session.fetcher import Fetcher, FetchResult
from jobledger.workers.processors.session.partial_file import PartialFile
from jobledger.workers.processors.session.result_layout import build_layout
from jobledger.workers.processors.session.step_context import Cancelled, StepContext
from tests.processors.session.fixtures import RecordingJob, make_parameters, make_settings
from tests.support.polling import poll_until

CONTENT = bytes(range(256)) * 2560
CHUNK = 65_536
"""Bytes are written to the file in chunks of this size."""
CHANGED = bytes(reversed(CONTENT))
ETAG: dict[str, Any] = {"ETag": '"v1"'}
Respond = Callable[[BaseHTTPRequestHandler], None]


@dataclass(slots=True)
class ScriptedSite:
    """A server that answers each request with the next response. The last response is repeated."""

    responses: list[Respond]
    requests: list[dict[str, str]] = field(default_factory=list)
    """The headers of the requests, with names in lower case."""
    url: str = ""


def send(status: int = 200, body: bytes = CONTENT, *, sent_bytes: int | None = None, **headers: Any) -> Respond:
    """Return a response. If `sent_bytes`, the connection closes after so many bytes of the body."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body[:sent_bytes])

    return respond


def send_part(first: int, body: bytes = CONTENT, **headers: Any) -> Respond:
    """Return the response to a request for the rest of the file."""
    content_range = f"bytes {first}-{len(body) - 1}/{len(body)}"
    return send(206, body[first:], **{"Content_Range": content_range, **headers})


@pytest.fixture
def scripted() -> Iterator[ScriptedSite]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            number = len(site.requests)
            site.requests.append({name.lower(): value for name, value in self.headers.items()})
            site.responses[min(number, len(site.responses) - 1)](self)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = ScriptedSite([], url=f"http://127.0.0.1:{server.server_port}/file")
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def make_context(tmp_path: Path, **settings: Any) -> StepContext:
    parameters = make_parameters()
    layout = build_layout(event="e", track="t", session="s", filename="f.md", job_id="job-1")
    values = make_settings(**settings)
    return StepContext(RecordingJob(parameters, tmp_path), parameters, values, layout, Fetcher(values))


async def run(ctx: StepContext, url: str, *, timeout_seconds: float = 60, **changes: Any) -> FetchResult:
    target = ctx.job.scratch_dir / "file"
    progress = ProgressRange("Fetching the file", 20, 35)
    limits = {"max_bytes": 1_000_000, "timeout_seconds": timeout_seconds}
    return await download(ctx, url, target, progress=progress, **{**limits, **changes})


async def run_failing(ctx: StepContext, url: str, **changes: Any) -> ProcessorError:
    with pytest.raises(ProcessorError) as caught:
        await run(ctx, url, **changes)
    return caught.value


def get_messages(ctx: StepContext) -> list[str]:
    assert isinstance(ctx.job, RecordingJob)
    return [message for _, message in ctx.job.progress]


async def test_transient_error_is_retried_and_progress_says_why(scripted: ScriptedSite, tmp_path: Path) -> None:
    scripted.responses = [send(503, b""), send()]
    ctx = make_context(tmp_path)
    fetched = await run(ctx, scripted.url)
    assert (fetched.size, (tmp_path / "file").read_bytes()) == (len(CONTENT), CONTENT)
    assert get_messages(ctx)[:2] == ["Fetching the file", "Fetching the file: HTTP 503, trying again in 0 s"]


async def test_permanent_error_is_not_retried(scripted: ScriptedSite, tmp_path: Path) -> None:
    scripted.responses = [send(404, b""), send()]
    error = await run_failing(make_context(tmp_path), scripted.url)
    assert (error.details["status_code"], len(scripted.requests)) == (404, 1)
    assert "tried" not in error.message


async def test_last_error_names_the_number_of_tries(scripted: ScriptedSite, tmp_path: Path) -> None:
    scripted.responses = [send(503, b"")]
    error = await run_failing(make_context(tmp_path), scripted.url)
    assert (error.code, error.details["tries"], len(scripted.requests)) == ("HTTP_ERROR", 4, 4)
    assert error.message.endswith("responded with 503 (Service Unavailable). It was tried 4 times.")


async def test_pause_is_not_shorter_than_retry_after(scripted: ScriptedSite, tmp_path: Path) -> None:
    scripted.responses = [send(429, b"", Retry_After="1"), send()]
    ctx, started = make_context(tmp_path), time.monotonic()
    await run(ctx, scripted.url)
    assert time.monotonic() - started >= 1
    assert "Fetching the file: HTTP 429, trying again in 1 s" in get_messages(ctx)


async def test_error_is_raised_at_once_if_retry_after_exceeds_timeout(scripted: ScriptedSite, tmp_path: Path) -> None:
    scripted.responses = [send(503, b"", Retry_After="120"), send()]
    error = await run_failing(make_context(tmp_path), scripted.url, timeout_seconds=60)
    assert (error.details["retry_after"], len(scripted.requests)) == (120, 1)


async def test_cancelled_job_does_not_wait_for_the_next_try(
    scripted: ScriptedSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "RETRY_DELAYS_SECONDS", (3600,))
    scripted.responses = [send(503, b"")]
    ctx = make_context(tmp_path)
    running = asyncio.create_task(run(ctx, scripted.url, timeout_seconds=7200))
    await poll_until(lambda: any("trying again" in message for message in get_messages(ctx)))
    assert isinstance(ctx.job, RecordingJob)
    ctx.job.cancel_at_percent = 0
    with pytest.raises(Cancelled):
        await asyncio.wait_for(running, 10)


@pytest.mark.parametrize(
    ("headers", "validator"),
    [
        (ETAG, '"v1"'),
        (
            {"Last_Modified": "Wed, 01 Jan 2025 00:00:00 GMT", "Date": "Wed, 01 Jan 2025 00:01:00 GMT"},
            "Wed, 01 Jan 2025 00:00:00 GMT",
        ),
    ],
)
async def test_broken_download_continues_where_it_ended(
    headers: dict[str, Any], validator: str, scripted: ScriptedSite, tmp_path: Path
) -> None:
    first = send(sent_bytes=2 * CHUNK, Content_Type="video/webm", **headers)
    scripted.responses = [first, send(503, b""), send_part(2 * CHUNK, **headers)]
    ctx, media_types = make_context(tmp_path), list[str]()
    fetched = await run(ctx, scripted.url, check_media_type=media_types.append)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert (fetched.size, fetched.media_type, set(media_types)) == (len(CONTENT), "video/webm", {"video/webm"})
    assert "range" not in scripted.requests[0]
    for request in scripted.requests[1:]:
        assert (request["range"], request["if-range"]) == ("bytes=131072-", validator)
    assert "Fetching the file: incomplete response, continuing after 131.1 kB in 0 s" in get_messages(ctx)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"ETag": 'W/"v1"'},
        {"ETag": 'W/"v1"', "Last_Modified": "Wed, 01 Jan 2025 00:00:00 GMT", "Date": "Wed, 01 Jan 2025 01:00:00 GMT"},
        {"Last_Modified": "Wed, 01 Jan 2025 00:00:00 GMT", "Date": "Wed, 01 Jan 2025 00:00:00 GMT"},
        {"Last_Modified": "yesterday", "Date": "today"},
        {"ETag": "v1"},
    ],
)
async def test_broken_download_without_strong_validator_begins_again(
    headers: dict[str, Any], scripted: ScriptedSite, tmp_path: Path
) -> None:
    scripted.responses = [send(sent_bytes=2 * CHUNK, **headers), send()]
    await run(make_context(tmp_path), scripted.url)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [request for request in scripted.requests if "range" in request] == []


@pytest.mark.parametrize(
    "responses",
    [
        [send(200, CHANGED)],
        [send(200, CHANGED, sent_bytes=CHUNK, ETag='"v2"'), send_part(CHUNK, CHANGED, ETag='"v2"')],
        [send(416, b""), send(200, CHANGED)],
        [send(403, b""), send(200, CHANGED)],
        [send_part(0, CHANGED), send(200, CHANGED)],
        [send_part(3 * CHUNK, CHANGED), send(200, CHANGED)],
        [send(206, CHANGED[2 * CHUNK :]), send(200, CHANGED)],
        [send(206, CHANGED[2 * CHUNK :], Content_Range="bytes 131072-"), send(200, CHANGED)],
        [send_part(2 * CHUNK, CHANGED, Content_Encoding="gzip"), send(200, CHANGED)],
        [send_part(2 * CHUNK, CHANGED, ETag='"v2"'), send(200, CHANGED)],
    ],
    ids=[
        "whole",
        "whole in parts",
        "416",
        "403",
        "part 0",
        "part 3",
        "no range",
        "bad range",
        "encoded",
        "other version",
    ],
)
async def test_bytes_of_two_versions_are_never_mixed(
    responses: list[Respond], scripted: ScriptedSite, tmp_path: Path
) -> None:
    scripted.responses = [send(sent_bytes=2 * CHUNK, **ETAG), *responses]
    assert (await run(make_context(tmp_path), scripted.url)).size == len(CHANGED)
    assert (tmp_path / "file").read_bytes() == CHANGED
    assert len(scripted.requests) == 1 + len(responses)


def test_response_with_other_version_discards_written_bytes(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "file", validator='"v1"')
    file.path.write_bytes(b"old")
    assert file.build_headers()["Range"] == "bytes=3-"
    file.begin(httpx.Response(200, headers={"ETag": '"v2"'}))
    assert (file.validator, file.size, file.build_headers()) == ('"v2"', 0, {})


async def test_part_that_ends_before_the_file_is_continued(scripted: ScriptedSite, tmp_path: Path) -> None:
    middle = send(
        206, CONTENT[2 * CHUNK : 3 * CHUNK], Content_Range=f"bytes {2 * CHUNK}-{3 * CHUNK - 1}/{len(CONTENT)}"
    )
    scripted.responses = [send(sent_bytes=2 * CHUNK, **ETAG), middle, send_part(3 * CHUNK)]
    await run(make_context(tmp_path), scripted.url)
    assert (tmp_path / "file").read_bytes() == CONTENT


async def test_limit_of_size_counts_all_parts(scripted: ScriptedSite, tmp_path: Path) -> None:
    body = CONTENT + bytes(CHUNK)
    rest = send(206, body[2 * CHUNK :], Content_Range=f"bytes {2 * CHUNK}-{len(body) - 1}/*")
    scripted.responses = [send(sent_bytes=2 * CHUNK, **ETAG), rest]
    error = await run_failing(make_context(tmp_path), scripted.url, max_bytes=len(CONTENT) + 10)
    assert (error.code, len(scripted.requests)) == ("TOO_LARGE", 2)
    assert "is larger than 655.4 kB" in error.message


async def test_download_that_advances_is_continued_more_often(
    scripted: ScriptedSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "_MIN_PROGRESS_BYTES", CHUNK)

    def respond(handler: BaseHTTPRequestHandler) -> None:
        first = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        part = CONTENT[first:]
        content_range = f"bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}"
        send(206 if first else 200, part, sent_bytes=CHUNK, Content_Range=content_range, **ETAG)(handler)

    scripted.responses = [respond]
    await run(make_context(tmp_path), scripted.url)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(scripted.requests) == 10
