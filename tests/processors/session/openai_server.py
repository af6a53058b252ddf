"""tests: a server that speaks the protocol of the OpenAI API strictly: what is not right is refused, as there."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from threading import Event, Lock, Thread
from typing import Any

KEY = "sk-test-0123456789"


@dataclass(slots=True)
class FakeOpenAiServer:
    """`chat` and `speech` make the answers; `troubles` come first: a status with headers, or "hang"."""

    port: int = 0
    answer_chat: Callable[[dict[str, Any]], Any] = lambda body: {}
    answer_speech: Callable[[float], Any] = lambda seconds: {"text": ""}
    supports_schemas: bool = True
    scripted_failures: list[tuple[int, dict[str, str]] | str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    peak_concurrency: int = 0
    closing: Event = field(default_factory=Event)
    _now: int = 0
    _lock: Any = field(default_factory=Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def entered(self, by: int) -> None:
        with self._lock:
            self._now += by
            self.peak_concurrency = max(self.peak_concurrency, self._now)


def chat_completion(content: Any, tokens: int = 10) -> dict[str, Any]:
    """An answer of a chat model."""
    text = content if isinstance(content, str) else json.dumps(content)
    usage = {"prompt_tokens": tokens - 1, "completion_tokens": 1, "total_tokens": tokens}
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], "usage": usage}


def parse_multipart(content_type: str, body: bytes) -> dict[str, bytes]:
    message = BytesParser(policy=HTTP).parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    assert message.is_multipart()
    found: dict[str, bytes] = {}
    for part in message.iter_parts():
        content: Any = part.get_payload(decode=True)
        found[str(part.get_param("name", header="content-disposition"))] = content
    return found


@contextmanager
def run_fake_openai() -> Iterator[FakeOpenAiServer]:
    """Serve on a port of this machine."""
    site = FakeOpenAiServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            site.entered(1)
            try:
                self._answer(body)
            finally:
                site.entered(-1)

        def _answer(self, body: bytes) -> None:
            if self.headers.get("Authorization") != f"Bearer {KEY}":
                return self._say(401, _error("Incorrect API key provided"))
            if site.scripted_failures:
                trouble = site.scripted_failures.pop(0)
                if isinstance(trouble, str):
                    site.closing.wait(30)
                    return None
                return self._say(trouble[0], _error("busy"), trouble[1])
            match self.path:
                case "/v1/chat/completions":
                    return self._chat(json.loads(body))
                case "/v1/audio/transcriptions":
                    return self._speech(parse_multipart(self.headers["Content-Type"], body))
                case _:
                    return self._say(404, _error(f"Unknown request URL: {self.path}"))

        def _chat(self, asked: dict[str, Any]) -> None:
            if self.headers["Content-Type"] != "application/json" or not asked.get("model"):
                return self._say(400, _error("you must provide a model parameter"))
            if "response_format" in asked and not site.supports_schemas:
                return self._say(400, _error("response_format is not supported"))
            site.requests.append(asked)
            return self._say(200, site.answer_chat(asked))

        def _speech(self, parts: dict[str, bytes]) -> None:
            if not parts.get("model") or "file" not in parts:
                return self._say(400, _error("model and file are required"))
            with wave.open(BytesIO(parts["file"])) as sound:
                seconds = sound.getnframes() / sound.getframerate()
            fields = {name: value.decode() for name, value in parts.items() if name != "file"}
            site.requests.append({**fields, "seconds": seconds})
            return self._say(200, site.answer_speech(seconds))

        def _say(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    site.port = server.server_address[1]
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.closing.set()
        server.shutdown()
        server.server_close()


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}
