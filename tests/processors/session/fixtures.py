"""A conference website on 127.0.0.1, files to put on it, and a job context that records its calls."""

from __future__ import annotations

import asyncio
import io
import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
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
import yaml
from fpdf import FPDF
from fpdf.enums import AccessPermission

from jobledger.workers.processor import JSON, LogLevel, Results, SavedFile
from jobledger.workers.processors.session import SessionParameters, SessionSettings
from jobledger.workers.processors.session.document import (
    EnrichmentResult,
    SessionContent,
    SlidesResult,
    TranscriptResult,
    resolve_language,
)
from jobledger.workers.processors.session.page import PageText
from jobledger.workers.processors.session.pdf_rendering import Slide
from jobledger.workers.results.typed_values import dump_value, get_return_adapter, load_value

LOCAL_HOSTS = ["127.0.0.1"]
_SAMPLES_FILE = Path(__file__).resolve().parents[4] / "shared" / "data" / "fosdem-2025-sessions.json"

without_deadline = hypothesis.settings(deadline=None)
"""Settings of property tests. A busy machine must not fail an example."""


@dataclass(frozen=True, slots=True)
class SiteResponse:
    """A response of the site. `content_length` replaces the true Content-Length header."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    content_length: int | None = None


def html(text: str, *, status: int = 200) -> SiteResponse:
    return SiteResponse(text.encode(), status, {"Content-Type": "text/html; charset=utf-8"})


def redirect(location: str) -> SiteResponse:
    return SiteResponse(status=302, headers={"Location": location})


class Site:
    """A website. It returns the response that was put under a path, or 404.

    `requested_paths` lists the paths of all requests in order. `posted` lists path, content type and body of POSTs.
    `failures` are responses that are sent first, one for each request of their path.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port = port
        self.host = host
        self.requested_paths: list[str] = []
        self.credentials: list[str | None] = []
        self.posted: list[tuple[str, str | None, bytes]] = []
        self.responses: dict[str, SiteResponse] = {}
        self.failures: dict[str, list[SiteResponse]] = {}
        self.hanging_paths: set[str] = set()
        self.closing = Event()

    def put(self, path: str, response: SiteResponse) -> str:
        self.responses[path] = response
        return self.url(path)

    def put_hanging(self, path: str) -> str:
        """Return a URL that accepts a request and never responds."""
        self.hanging_paths.add(path)
        return self.url(path)

    def url(self, path: str) -> str:
        return f"http://{self.host}:{self.port}{path}"


@contextmanager
def serve_site(host: str = "127.0.0.1") -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.requested_paths.append(self.path)
            site.credentials.append(self.headers["Authorization"])
            if self.path in site.hanging_paths:
                site.closing.wait()
                return
            response = site.responses.get(self.path, html("<p>nothing here</p>", status=404))
            if site.failures.get(self.path):
                response = site.failures[self.path].pop(0)
            self.send_response_only(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            content_length = len(response.body) if response.content_length is None else response.content_length
            self.send_header("Content-Length", str(content_length))
            self.end_headers()
            self.wfile.write(response.body)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            site.posted.append((self.path, self.headers["Content-Type"], body))
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer((host, 0), Handler)
    site = Site(server.server_port, host)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


_running_steps: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("running_steps", default=())
"""The keys of the steps that run in the current task, outermost first."""


class RecordingJob:
    """A job context for a processor that records all calls.

    Pass the `steps` of one to another to simulate the next attempt of the same job. `get_steps_after_restart` returns
    the steps for an attempt after a restart.
    """

    def __init__(
        self,
        parameters: SessionParameters,
        scratch: Path,
        *,
        job_id: str = "job-1",
        attempt: int = 1,
        steps: dict[tuple[str, str], tuple[JSON, list[str]]] | None = None,
        cancel_at_percent: float = math.inf,
    ) -> None:
        self.parameters = parameters
        self.scratch_dir = scratch
        self.job_id = job_id
        self.attempt = attempt
        self.steps = {} if steps is None else steps
        self.executed_steps: list[str] = []
        self.progress: list[tuple[float, str]] = []
        self.log_messages: list[str] = []
        self.warnings: list[str] = []
        self._repeated_steps: set[tuple[str, str]] = set()
        self.tokens = 0
        self.files: dict[str, bytes] = {}
        self.share_max_ages: dict[str, timedelta | None] = {}
        self.cancel_at_percent = cancel_at_percent

    @property
    def is_cancelled(self) -> bool:
        return bool(self.progress) and self.progress[-1][0] >= self.cancel_at_percent

    @property
    def saved_files(self) -> list[SavedFile]:
        raise NotImplementedError("the session processor lists its files itself")

    async def step(
        self, name: str, function: Callable[..., Any], /, *args: Any, share: timedelta | None = None, **kwargs: Any
    ) -> Any:
        self.share_max_ages[name] = share
        adapter = get_return_adapter(function)
        key = (name, json.dumps(args, sort_keys=True))
        if key in self.steps:
            output, warnings = self.steps[key]
            self.warnings += warnings
            return load_value(adapter, output)
        self.executed_steps.append(name)
        earlier_warnings = len(self.warnings)
        token = _running_steps.set((*_running_steps.get(), key))
        try:
            output = dump_value(adapter, await function(*args, **kwargs), name)
        finally:
            _running_steps.reset(token)
        self.steps[key] = (output, self.warnings[earlier_warnings:])
        return load_value(adapter, output)

    def get_steps_after_restart(self) -> dict[tuple[str, str], tuple[JSON, list[str]]]:
        """Return the steps that a restart of the job reuses."""
        return {key: step for key, step in self.steps.items() if key not in self._repeated_steps}

    def add_tokens(self, tokens: int) -> None:
        self.tokens += tokens

    async def report_progress(self, percent: float, message: str) -> None:
        self.progress.append((percent, message))

    async def log(self, level: LogLevel, message: str, *, logger: str = "") -> None:
        self.log_messages.append(message)

    async def warn(self, message: str, *, repeat_on_restart: bool = False) -> None:
        self.warnings.append(message)
        if repeat_on_restart:
            self._repeated_steps.update(_running_steps.get())

    async def save(self, path: str, content: bytes | Path, media_type: str) -> SavedFile:
        if isinstance(content, Path):
            data = await asyncio.to_thread(content.read_bytes)
            await asyncio.to_thread(content.unlink)
        else:
            data = content
        self.files[path] = data
        return SavedFile(path=path, sha256=sha256(data).hexdigest(), size=len(data), media_type=media_type)


def make_parameters(**changes: Any) -> SessionParameters:
    """Return parameters like those of the FOSDEM samples."""
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


def load_samples() -> list[dict[str, Any]]:
    """Return the parameters of real sessions, or of made-up ones where the file does not exist."""
    if _SAMPLES_FILE.exists():
        samples: list[dict[str, Any]] = json.loads(_SAMPLES_FILE.read_text())
        return samples
    parameters = make_parameters().model_dump(exclude={"extra"})
    return [
        parameters | {"session": f"Talk {number}: “näher” 💌 \u00a01", "speakers": speakers, "video_url": video}
        for number in range(50)
        for speakers in (None, ["Stephen  Walli", 'Richard "RichiH" H.'])
        for video in (None, f"https://video.conference.example/{number}/talk.av1.webm")
    ]


def make_page_text(**changes: Any) -> PageText:
    values: dict[str, Any] = {
        "url": "u",
        "title": "t",
        "language": "en",
        "intro": None,
        "keywords": [],
        "markdown": "The text.",
    }
    return PageText.model_validate(values | changes)


def make_content(
    parameters: SessionParameters,
    page_text: PageText,
    transcript: TranscriptResult | None = None,
    slides: list[Slide] | None = None,
) -> SessionContent:
    """Return the content of a document, without translation."""
    return SessionContent(
        page_text,
        EnrichmentResult(language=resolve_language(parameters, page_text), markdown=page_text.markdown),
        transcript or TranscriptResult(missing_reason="There is no transcript. No recording was given."),
        SlidesResult(slides=slides or []),
    )


def read_document(job: RecordingJob, results: Results) -> str:
    """Return the Markdown file that a job has saved."""
    assert results.markdown is not None
    return job.files[results.markdown.path].decode()


def split_front_matter(document: str) -> tuple[dict[str, Any], str]:
    """Return the front matter and the body of a document."""
    match = re.fullmatch(r"---\n(.*?\n)---\n(.*)", document, re.DOTALL)
    assert match
    front_matter = yaml.safe_load(match[1])
    assert isinstance(front_matter, dict)
    return front_matter, match[2]


def make_settings(**changes: Any) -> SessionSettings:
    """Return settings that allow downloads from the local site."""
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
    pages: int, *, width: float = 254, height: float = 143, password: str | None = None, title: str = "Slide of a talk"
) -> bytes:
    """Return a PDF with a title on each page. Sizes are in millimetres; the default is 16:9."""
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
        document.text(20, 40, f"{title} {number}")
    if password:
        document.set_encryption("owner", password, permissions=AccessPermission.none())
    return bytes(document.output())


def make_pdf_with_image(columns: int, rows: int) -> bytes:
    """Return a small PDF of one page with a black image of `columns` × `rows` pixels."""
    pixels = zlib.compressobj(9)
    packed = b"".join(pixels.compress(bytes(columns)) for _ in range(rows)) + pixels.flush()
    drawing = b"q 200 0 0 200 0 0 cm /I Do Q"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] /Contents 4 0 R "
        b"/Resources << /XObject << /I 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawing), drawing),
        b"<< /Type /XObject /Subtype /Image /Width %d /Height %d /ColorSpace /DeviceGray /BitsPerComponent 8 "
        b"/Filter /FlateDecode /Length %d >>\nstream\n%s\nendstream" % (columns, rows, len(packed), packed),
    ]
    parts = [b"%PDF-1.4\n"]
    offsets = []
    for number, content in enumerate(objects, 1):
        offsets.append(sum(map(len, parts)))
        parts.append(b"%d 0 obj\n%s\nendobj\n" % (number, content))
    start = sum(map(len, parts))
    parts.append(b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % offset for offset in offsets))
    parts.append(b"trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % start)
    return b"".join(parts)


def make_video(seconds: float, *, sound: bool = True, container: str = "matroska") -> bytes:
    """Return a grey video, with a stereo tone of 440 Hz at 44.1 kHz if `sound`."""
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
                media.mux(tone.encode(_make_tone_frame(number)))
        media.mux(picture.encode())
        if tone:
            media.mux(tone.encode())
    return buffer.getvalue()


def _make_tone_frame(tenth: int) -> av.AudioFrame:
    samples = 4_410
    frame = av.AudioFrame(format="s16", layout="stereo", samples=samples)
    first = tenth * samples
    wave = [int(9_000 * math.sin(2 * math.pi * 440 * (first + n) / 44_100)) for n in range(samples)]
    frame.planes[0].update(b"".join(struct.pack("<hh", value, value) for value in wave))
    frame.sample_rate = 44_100
    frame.pts = first
    frame.time_base = Fraction(1, 44_100)
    return frame
