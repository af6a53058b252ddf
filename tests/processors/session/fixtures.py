"""tests: a small conference site on 127.0.0.1, the material on it, and a job that remembers what it was told."""

from __future__ import annotations

import asyncio
import io
import json
import math
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import av
import hypothesis
from fpdf import FPDF
from fpdf.enums import AccessPermission

from jobledger.workers.processor import JSON, LogLevel, SavedFile
from jobledger.workers.processors.session import SessionParameters, SessionSettings

LOCAL_HOSTS = ["127.0.0.1"]

without_deadline = hypothesis.settings(deadline=None)
"""For laws: that the machine was busy is no counterexample."""


@dataclass(frozen=True, slots=True)
class SiteResponse:
    """What the site answers. `announced` is a Content-Length other than the true one."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    content_length: int | None = None


def html(text: str, *, status: int = 200) -> SiteResponse:
    return SiteResponse(text.encode(), status, {"Content-Type": "text/html; charset=utf-8"})


def redirect(location: str) -> SiteResponse:
    return SiteResponse(status=302, headers={"Location": location})


class Site:
    """Answers what was put under a path, 404 elsewhere; `asked` lists the paths in the order they came."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.requested_paths: list[str] = []
        self.credentials: list[str | None] = []
        self.responses: dict[str, SiteResponse] = {}
        self.hanging_paths: set[str] = set()
        self.closing = Event()

    def put(self, path: str, answer: SiteResponse) -> str:
        self.responses[path] = answer
        return self.url(path)

    def put_hanging(self, path: str) -> str:
        """An address that accepts the question and never answers."""
        self.hanging_paths.add(path)
        return self.url(path)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@contextmanager
def serve_site() -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.requested_paths.append(self.path)
            site.credentials.append(self.headers["Authorization"])
            if self.path in site.hanging_paths:
                site.closing.wait()
                return
            answer = site.responses.get(self.path, html("<p>nothing here</p>", status=404))
            self.send_response_only(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header(
                "Content-Length", str(len(answer.body) if answer.content_length is None else answer.content_length)
            )
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = Site(server.server_port)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class RecordingJob:
    """The job a processor sees. Give the `steps` of one to the next, and it is the next attempt at the same job."""

    def __init__(
        self,
        parameters: SessionParameters,
        scratch: Path,
        *,
        job_id: str = "job-1",
        attempt: int = 1,
        steps: dict[tuple[str, str], tuple[JSON, list[str]]] | None = None,
        cancel_at: float = math.inf,
    ) -> None:
        self.parameters = parameters
        self.scratch_dir = scratch
        self.job_id = job_id
        self.attempt = attempt
        self.steps = {} if steps is None else steps
        self.ran: list[str] = []
        self.told: list[tuple[float, str]] = []
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self.tokens = 0
        self.files: dict[str, bytes] = {}
        self.shared: dict[str, timedelta | None] = {}
        self._cancel_at = cancel_at

    @property
    def is_cancelled(self) -> bool:
        return bool(self.told) and self.told[-1][0] >= self._cancel_at

    async def run_step(
        self,
        name: str,
        inputs: Mapping[str, JSON],
        function: Callable[[], Awaitable[JSON]],
        *,
        share_max_age: timedelta | None = None,
    ) -> JSON:
        self.shared[name] = share_max_age
        key = (name, json.dumps(inputs, sort_keys=True))
        if key in self.steps:
            output, warnings = self.steps[key]
            self.warnings += warnings
            return output
        self.ran.append(name)
        already = len(self.warnings)
        output = json.loads(json.dumps(await function()))
        self.steps[key] = (output, self.warnings[already:])
        return output

    def add_tokens(self, tokens: int) -> None:
        self.tokens += tokens

    async def report_progress(self, percent: float, message: str) -> None:
        self.told.append((percent, message))

    async def log(self, level: LogLevel, message: str) -> None:
        self.lines.append(message)

    async def warn(self, message: str) -> None:
        self.warnings.append(message)

    async def save(self, path: str, content: bytes | Path, media_type: str) -> SavedFile:
        if isinstance(content, Path):
            data = await asyncio.to_thread(content.read_bytes)
            await asyncio.to_thread(content.unlink)
        else:
            data = content
        self.files[path] = data
        return SavedFile(path=path, sha256=sha256(data).hexdigest(), size=len(data), media_type=media_type)


def make_parameters(**changes: Any) -> SessionParameters:
    """A session of the shape of the samples."""
    values: dict[str, Any] = {
        "event": "ExampleConf 2025",
        "session": "Ledgers that never forget",
        "url": "https://conference.example/talks/ledgers",
        "filename": "Ledgers-that-never-forget.md",
        "track": "Databases-3",
        "day": "Saturday",
        "starttime": "10:00",
        "endtime": "10:30",
        "speakers": ["Ada Example", 'Grace "GH" Sample'],
        "video_url": None,
        "attachments_url": None,
        "source_language": "en",
        "target_language": "en",
    }
    return SessionParameters.model_validate(values | changes)


def make_settings(**changes: Any) -> SessionSettings:
    """Settings that may fetch from the local site."""
    return SessionSettings.model_validate({"allowed_private_hosts": LOCAL_HOSTS} | changes)


CONFERENCE_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>ExampleConf 2025 - Ledgers that never forget</title>
<meta name="description" content="Why an append-only log is the calmest way to keep state.">
<meta name="keywords" content="databases, event sourcing"><script>var tracking = 1;</script></head>
<body>
<div id="header"><p id="logo"><a href="/2025/">ExampleConf'25</a></p></div>
<nav id="menu"><ul><li><a href="/2025/schedule/">Schedule</a></li><li><a href="/2025/news/">News</a></li></ul></nav>
<div id="main"><div id="pagetitles"><h1>Ledgers that never forget</h1></div>
<ul class="side-box"><li><strong>Track</strong>: <a href="/track/db">Databases</a></li>
<li><strong>Room</strong>: H.1301</li></ul>
<div class="event-abstract">
<p>State that is overwritten is <em>gone</em>. An append-only log keeps it;
see <a href="../paper.html">our paper</a>.</p>
<h2>What you will learn</h2>
<ul><li>How <strong>optimistic</strong> appends work</li><li>When <code>seq &lt; 2</code> is a lie</li></ul>
<h3>Agenda</h3>
<ol><li>History</li><li>Demonstration</li></ol>
<table><tr><th>Version</th><th>Year</th></tr><tr><td>1.0</td><td>2023</td></tr><tr><td>2.0</td><td>2025</td></tr></table>
<p>Never write &lt;script&gt;alert(1)&lt;/script&gt; into a page, nor ![this](http://tracker.example/x.png).</p>
<pre><code>git clone https://conference.example/ledger.git
cd ledger</code></pre>
</div></div>
<footer><p>Licensed under Creative Commons</p><a href="/imprint">Imprint</a></footer></body></html>"""


def make_pdf(
    pages: int, *, width: float = 254, height: float = 143, password: str | None = None, words: str = "Slide of a talk"
) -> bytes:
    """Slides of 16:9 with a title each; sizes in millimetres."""
    document = FPDF(
        unit="mm",
        format=(min(width, height), max(width, height)),
        orientation="landscape" if width > height else "portrait",
    )
    document.set_font("Helvetica", size=28)
    for number in range(1, pages + 1):
        document.add_page()
        document.set_fill_color(20, 60, 120)
        document.rect(0, 0, width, 6, style="F")
        document.text(20, 40, f"{words} {number}")
    if password:
        document.set_encryption("owner", password, permissions=AccessPermission.none())
    return bytes(document.output())


def make_video(seconds: float, *, sound: bool = True, container: str = "matroska") -> bytes:
    """A grey picture, with a tone of 440 Hz in stereo at 44.1 kHz when `sound`."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as media:
        picture = media.add_stream("mpeg4", rate=10)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        tone = media.add_stream("pcm_s16le" if container == "matroska" else "aac", rate=44_100) if sound else None
        for number in range(int(seconds * 10)):
            frame = av.VideoFrame(64, 48, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([128]) * plane.buffer_size)
            frame.pts = number
            media.mux(picture.encode(frame))
            if tone:
                media.mux(tone.encode(_tone(number)))
        media.mux(picture.encode())
        if tone:
            media.mux(tone.encode())
    return buffer.getvalue()


def _tone(tenth: int) -> av.AudioFrame:
    samples = 4_410
    frame = av.AudioFrame(format="s16", layout="stereo", samples=samples)
    first = tenth * samples
    wave = [int(9_000 * math.sin(2 * math.pi * 440 * (first + n) / 44_100)) for n in range(samples)]
    frame.planes[0].update(b"".join(struct.pack("<hh", value, value) for value in wave))
    frame.sample_rate = 44_100
    frame.pts = first
    frame.time_base = Fraction(1, 44_100)
    return frame
