"""Render a page that needs JavaScript with a headless Chromium in the sandbox.

Chromium has no network at all. It hands each request to this process over the Chrome DevTools Protocol
(https://chromedevtools.github.io/devtools-protocol/), and `fetcher` answers it within the limits of all downloads. Of
the services in `allowed_private_hosts`, a page reaches only its own site. Images, media, fonts and styles are not
fetched.

Needed is the program `chromium-headless-shell`. The browser Chromium itself does not run in the sandbox, because it
opens a local socket at its start.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from jobledger.workers.processor import ProcessorError
from jobledger.workers.processors.session.fetcher import ByteBudget, Fetcher, FetchResult, Request
from jobledger.workers.processors.session.settings import SessionSettings
from jobledger.workers.sandbox import runner

INSTALL_ADVICE: Final = "Install Chromium's headless shell (Debian: apt-get install chromium-headless-shell)."
MAX_FURTHER_SECONDS: Final = 10
_COMMANDS: Final = ("chromium-headless-shell", "chrome-headless-shell")
_MAX_REQUESTS: Final = 300
_MAX_CONCURRENT_REQUESTS: Final = 8
_VIRTUAL_MILLISECONDS: Final = 10_000
"""Timers of the page run for so long, in virtual time that passes while no request is pending."""
_MAX_MESSAGE_FACTOR: Final = 4
"""A character of the page may take several bytes in a message."""
_FETCHED_TYPES: Final = frozenset({"Document", "Script", "XHR", "Fetch"})
_NOT_SENT_HEADERS: Final = frozenset(
    {"host", "content-length", "connection", "accept-encoding", "user-agent", "cookie", "authorization", "te"}
)
_NOSCRIPT: Final = re.compile(r"<noscript\b.*?(</noscript\s*>|\Z)", re.IGNORECASE | re.DOTALL)
_LIMITS: Final = runner.ResourceLimits(cpu_seconds=120, data_bytes=1024**3, file_bytes=256 * 1024**2)
_OPTIONS: Final = (
    *(
        "--headless",
        "--no-sandbox",
        "--no-zygote",
        "--in-process-gpu",
        "--single-process",
        "--disable-gpu",
        "--disable-dev-shm-usage",
    ),
    *("--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-sync"),
    *(
        "--disable-extensions",
        "--disable-breakpad",
        "--no-first-run",
        "--mute-audio",
        "--disable-site-isolation-trials",
    ),
    *("--disable-features=IsolateOrigins,site-per-process", "--remote-debugging-pipe"),
)


_METHODS: Final = frozenset({"GET", "HEAD", "POST"})


class PageNotRendered(Exception):
    """The page could not be rendered. The text is a sentence that states the reason."""


async def render_page(
    page: FetchResult, *, scratch: Path, fetcher: Fetcher, settings: SessionSettings, seconds: float
) -> FetchResult:
    """Return the HTML of `page` after its scripts have run.

    Args:
        page: The page as it was fetched. It is not fetched again.
        scratch: Directory for Chromium's files. It must not exist yet. It is removed.
        fetcher: Answers the requests of the page.
        settings: The program, and the maximum size of the page and of all that it transfers together.
        seconds: Timeout. What the page shows then is returned. Starting Chromium and reading the page may take another
            `MAX_FURTHER_SECONDS`.

    Raises:
        PageNotRendered: Chromium is not installed, cannot run in the sandbox, or fails.
    """
    program = await asyncio.to_thread(_find_program, settings.chromium_command)
    await asyncio.to_thread(scratch.mkdir)
    options = [*_OPTIONS, f"--user-agent={settings.user_agent}", f"--user-data-dir={scratch}/profile"]
    helper = runner.Program([str(program), *options], scratch, [program.resolve().parent], limits=_LIMITS)
    started = time.monotonic()
    try:
        async with (
            asyncio.timeout(seconds + MAX_FURTHER_SECONDS),
            runner.open_program(helper, max_message=_MAX_MESSAGE_FACTOR * settings.page_max_bytes) as (reader, writer),
        ):
            restricted = fetcher.restrict_to(page.endpoint)
            browser = _Browser(reader, writer, page, restricted, ByteBudget(settings.page_max_bytes))
            url, html = await browser.render(seconds)
    except runner.SandboxUnavailable as error:
        raise PageNotRendered(f"Chromium cannot run in a sandbox: {error}") from error
    except (TimeoutError, OSError, EOFError, ValueError, KeyError, asyncio.LimitOverrunError, _CommandFailed) as error:
        reason = str(error) or type(error).__name__
        raise PageNotRendered(f"Chromium failed: {reason[:200]}.") from error
    finally:
        await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)
    html = _NOSCRIPT.sub("", html)  # a browser that runs scripts does not show it
    body = html.encode("utf-8", "replace")[: settings.page_max_bytes]
    return FetchResult(
        url, "text/html; charset=utf-8", len(body), time.monotonic() - started, body, redirects=page.redirects
    )


def _find_program(command: str | None) -> Path:
    names = (command,) if command is not None else _COMMANDS
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        raise PageNotRendered(f"{names[0]} is not installed. {INSTALL_ADVICE}")
    return Path(path)


class _CommandFailed(Exception):
    """Chromium could not do what a command asked for."""


@dataclass
class _Browser:
    """One page in one Chromium. Commands and events have the names of the DevTools Protocol."""

    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter
    _page: FetchResult
    _fetcher: Fetcher
    _budget: ByteBudget
    _remaining_requests: int = _MAX_REQUESTS
    _session: str | None = None
    _last_id: int = 0
    _replies: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_MAX_CONCURRENT_REQUESTS))

    async def render(self, seconds: float) -> tuple[str, str]:
        """Load the page, let its scripts run, and return its URL and HTML."""
        reading = asyncio.create_task(self._read_messages())
        rendering = asyncio.create_task(self._load_and_dump(seconds))
        try:
            await asyncio.wait({reading, rendering}, return_when=asyncio.FIRST_COMPLETED)
            if not rendering.done():
                reading.result()  # raises the reason why Chromium sends nothing more
            return rendering.result()
        finally:
            tasks = {reading, rendering, *self._tasks}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _load_and_dump(self, seconds: float) -> tuple[str, str]:
        target = await self._call("Target.createTarget", url="about:blank")
        attached = await self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        await self._call("Fetch.enable", patterns=[{"urlPattern": "*"}])
        await self._call("Page.enable")
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._call("Page.navigate", url=self._page.url)
                await self._call(
                    "Emulation.setVirtualTimePolicy",
                    policy="pauseIfNetworkFetchesPending",
                    budget=_VIRTUAL_MILLISECONDS,
                    maxVirtualTimeTaskStarvationCount=10_000,
                )
                await self._idle.wait()
        document = await self._call("DOM.getDocument", depth=0)
        html = await self._call("DOM.getOuterHTML", nodeId=document["root"]["nodeId"])
        return str(document["root"].get("documentURL") or self._page.url), str(html["outerHTML"])

    async def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._last_id += 1
        reply = self._replies[self._last_id] = asyncio.get_running_loop().create_future()
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._writer.write(json.dumps(message).encode() + b"\0")
        await self._writer.drain()
        answer = await reply
        if "error" in answer:
            raise _CommandFailed(f"{method}: {answer['error'].get('message')}")
        result: dict[str, Any] = answer.get("result", {})
        return result

    async def _read_messages(self) -> None:
        while True:
            message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
            match message.get("method"):
                case None:
                    if (reply := self._replies.pop(message.get("id"), None)) and not reply.done():
                        reply.set_result(message)
                case "Fetch.requestPaused":
                    self._start(self._answer_request(message["params"]))
                case "Page.javascriptDialogOpening":
                    self._start(self._dismiss_dialog())
                case "Emulation.virtualTimeBudgetExpired":
                    self._idle.set()

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dismiss_dialog(self) -> None:
        with suppress(_CommandFailed):
            await self._call("Page.handleJavaScriptDialog", accept=False)

    async def _answer_request(self, event: Mapping[str, Any]) -> None:
        identifier = event["requestId"]
        try:
            response = await self._respond(event)
        except ValueError:  # such as a header that cannot be sent
            response = None
        except ProcessorError as error:
            status = error.details.get("status_code") if error.code == "HTTP_ERROR" else None
            response = _build_response(event["request"], b"", status=status) if status else None
        with suppress(_CommandFailed):  # the page has gone elsewhere meanwhile
            if response is None:  # "Aborted" leaves the document as it is
                reason = "Aborted" if event["resourceType"] == "Document" else "BlockedByClient"
                await self._call("Fetch.failRequest", requestId=identifier, errorReason=reason)
            else:
                await self._call("Fetch.fulfillRequest", requestId=identifier, **response)

    async def _respond(self, event: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the response to a request of the page, or None to block it."""
        request, kind = event["request"], event["resourceType"]
        if kind == "Document" and request["url"] == self._page.url.partition("#")[0] and request["method"] == "GET":
            return _build_response(request, self._page.body, self._page.content_type)
        if kind == "Stylesheet":  # scripts may wait for it
            return _build_response(request, b"", "text/css")
        if request["method"] == "OPTIONS":  # may the page send a request to another site?
            return _build_response(request, b"")
        if kind not in _FETCHED_TYPES or request["method"] not in _METHODS:
            return None
        if self._remaining_requests <= 0:
            return None
        self._remaining_requests -= 1
        self._budget.take(len(json.dumps(request)), request["url"])  # what is kept while it waits for a slot
        body = request.get("postData")
        headers = {
            name: value
            for name, value in request.get("headers", {}).items()
            if name.lower() not in _NOT_SENT_HEADERS and not name.lower().startswith(("sec-", "x-devtools"))
        }
        async with self._slots:
            if self._budget.remaining <= 0:
                return None
            fetched = await self._fetcher.fetch(
                request["url"],
                max_bytes=self._budget.remaining,
                timeout_seconds=30,
                request=Request(request["method"], headers, body.encode() if body else None),
                budget=self._budget,
            )
        return _build_response(request, fetched.body, fetched.content_type)


def _build_response(
    request: Mapping[str, Any], body: bytes, content_type: str = "", *, status: int = 200
) -> dict[str, Any]:
    """Build a response that any page may read: there are no cookies and logins that it could exploit."""
    sent = {name.lower(): value for name, value in request["headers"].items()}
    headers = {
        "Content-Type": content_type,
        "Access-Control-Allow-Origin": sent.get("origin", "*"),
        "Access-Control-Allow-Credentials": "true",
        "Access-Control-Allow-Methods": sent.get("access-control-request-method", ""),
        "Access-Control-Allow-Headers": sent.get("access-control-request-headers", ""),
    }
    return {
        "responseCode": status,
        "responseHeaders": [{"name": name, "value": value} for name, value in headers.items() if value],
        "body": base64.b64encode(body).decode(),
    }
