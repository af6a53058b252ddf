"""A server that implements the OpenAI API for chat and transcription. Like OpenAI, it rejects invalid requests."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from threading import Event, Lock, Thread
from typing import Any

KEY = "sk-test-0123456789"


@dataclass(frozen=True, slots=True)
class Reply:
    """A response with a status and headers. Bytes are sent as they are, other content as JSON."""

    status: int
    content: Any
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class FakeOpenAiServer:
    """A running server and its settings.

    `answer_chat` and `answer_speech` create the responses. Before that, each request takes one of `scripted_failures`:
    a status with headers, or "hang".
    """

    port: int = 0
    answer_chat: Callable[[dict[str, Any]], Any] = lambda body: {}
    answer_speech: Callable[[float], Any] = lambda seconds: {"text": ""}
    supports_schemas: bool = True
    speech_formats: Sequence[str] = ("json", "text", "srt", "verbose_json", "vtt")
    """Response formats of transcriptions that are not rejected."""
    rejection: str = "Incorrect API key provided"
    """Begin of the error message for a wrong key. The key follows."""
    scripted_failures: list[tuple[int, dict[str, str]] | str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    peak_concurrency: int = 0
    closing: Event = field(default_factory=Event)
    _active: int = 0
    _lock: Any = field(default_factory=Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @contextmanager
    def count_request(self) -> Iterator[None]:
        with self._lock:
            self._active += 1
            self.peak_concurrency = max(self.peak_concurrency, self._active)
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1


def chat_completion(content: Any, tokens: int = 10) -> dict[str, Any]:
    """Return the response of a chat model."""
    text = content if isinstance(content, str) else json.dumps(content)
    usage = {"prompt_tokens": tokens - 1, "completion_tokens": 1, "total_tokens": tokens}
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], "usage": usage}


def parse_multipart(content_type: str, body: bytes) -> dict[str, bytes]:
    message = BytesParser(policy=HTTP).parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    assert message.is_multipart()
    fields: dict[str, bytes] = {}
    for part in message.iter_parts():
        content: Any = part.get_payload(decode=True)
        fields[str(part.get_param("name", header="content-disposition"))] = content
    return fields


@contextmanager
def run_fake_openai() -> Iterator[FakeOpenAiServer]:
    """Run a server on a local port."""
    fake = FakeOpenAiServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Authorization") != f"Bearer {KEY}":
                return self._respond(401, _make_error(f"{fake.rejection}: {self.headers.get('Authorization')}"))
            return self._respond(200, {"object": "list", "data": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with fake.count_request():
                self._handle(body)

        def _handle(self, body: bytes) -> None:
            if self.headers.get("Authorization") != f"Bearer {KEY}":
                return self._respond(401, _make_error(f"{fake.rejection}: {self.headers.get('Authorization')}"))
            if fake.scripted_failures:
                failure = fake.scripted_failures.pop(0)
                if isinstance(failure, str):
                    fake.closing.wait()
                    return None
                return self._respond(failure[0], _make_error("busy"), failure[1])
            match self.path:
                case "/v1/chat/completions":
                    return self._complete_chat(json.loads(body))
                case "/v1/audio/transcriptions":
                    return self._transcribe(parse_multipart(self.headers["Content-Type"], body))
                case _:
                    return self._respond(404, _make_error(f"Unknown request URL: {self.path}"))

        def _complete_chat(self, request: dict[str, Any]) -> None:
            if self.headers["Content-Type"] != "application/json" or not request.get("model"):
                return self._respond(400, _make_error("you must provide a model parameter"))
            if "response_format" in request and not fake.supports_schemas:
                return self._respond(400, _make_error("response_format is not supported"))
            fake.requests.append(request)
            return self._respond(200, fake.answer_chat(request))

        def _transcribe(self, parts: dict[str, bytes]) -> None:
            if not parts.get("model") or "file" not in parts:
                return self._respond(400, _make_error("model and file are required"))
            with wave.open(BytesIO(parts["file"])) as sound:
                seconds = sound.getnframes() / sound.getframerate()
            fields = {name: value.decode() for name, value in parts.items() if name != "file"}
            if (name := fields.get("response_format", "json")) not in fake.speech_formats:
                return self._respond(400, _make_error(f"response_format {name!r} is not compatible with this model"))
            fake.requests.append({**fields, "seconds": seconds})
            return self._respond(200, fake.answer_speech(seconds))

        def _respond(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
            if isinstance(content, Reply):
                status, content, headers = content.status, content.content, content.headers
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.port = server.server_address[1]
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.closing.set()
        server.shutdown()
        server.server_close()


def _make_error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}
