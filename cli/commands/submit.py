"""cli: submit over HTTP and follow what becomes of it, by the API's live stream. Nothing is asked twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import httpx
import orjson
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from jobledger.cli.api_client import parse_response, retry_delay, unexpected_response
from jobledger.cli.terminal_text import SafeConsole, escape_line
from jobledger.ledger.domain.errors import ConfigurationError, LedgerUnavailable

_ENDED: Final = {"JobCompleted": "completed", "JobFailed": "failed", "JobCancelled": "cancelled"}
_STYLES: Final = {"completed": "green", "failed": "red", "cancelled": "yellow"}
_BARS_SHOWN: Final = 30
_PATIENCE_SECONDS: Final = 60.0
_AWAY: Final = (429, 502, 503, 504)
"""What the API, or a proxy in front of it, answers while it cannot serve the stream."""


def parse_batch(content: Any) -> dict[str, Any]:
    """Return a batch body for what a user may write into a file: a session, a job, a list of them, or a batch.

    Raises:
        ConfigurationError: it is none of these.
    """
    if isinstance(content, list):
        return {"jobs": content}
    if isinstance(content, dict):
        batch = dict(content) if "jobs" in content else {"jobs": [content]}
        if not isinstance(batch["jobs"], list):
            raise ConfigurationError(f"jobs: expected a list of sessions, found {type(batch['jobs']).__name__}")
        return batch
    raise ConfigurationError(f"expected a session, a list of sessions, or a batch; found {type(content).__name__}")


async def submit_batch(client: httpx.AsyncClient, batch: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Submit a batch and return the answer and the position behind which its story begins.

    Raises:
        ConfigurationError: JSON cannot say it, or the API does not know who we are.
        Refused: the API said no.
        httpx.HTTPError: it does not answer.
    """
    try:
        body = orjson.dumps(batch)
    except TypeError as error:  # YAML knows more than JSON: names that are numbers, bytes, sets, endless integers
        raise ConfigurationError(f"what is to be submitted cannot be written as JSON: {error}") from error
    answer = await client.post("/api/events/batches", content=body, headers={"Content-Type": "application/json"})
    content = parse_response(answer, "batch_id", "job_ids", "batch")
    if "Ledger-Position" not in answer.headers:
        raise unexpected_response(answer)
    # The jobs' own events were written with the batch; nothing of the story is before them.
    return content, int(answer.headers["Ledger-Position"]) - content["batch"]["total_jobs"] - 1


async def stream_events(client: httpx.AsyncClient, *, after: int, batch_id: str) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a batch and its jobs as they happen, across interruptions.

    Raises:
        LedgerUnavailable: the API has been away for about a minute.
    """
    lost_at: float | None = None
    while True:
        pause = 1.0
        try:
            query = {"after": str(after), "batch_id": batch_id}
            async with client.stream("GET", "/api/ledger/stream", params=query, timeout=_stream_timeout()) as answer:
                if answer.status_code in _AWAY:
                    pause = retry_delay(answer)
                    raise httpx.HTTPStatusError(
                        f"it answers {answer.status_code}", request=answer.request, response=answer
                    )
                if answer.is_error:
                    await answer.aread()
                    parse_response(answer)  # raises what it is
                async for line in _lines(answer):
                    lost_at = None
                    if line.startswith(b"data:"):
                        event: dict[str, Any] = orjson.loads(line.removeprefix(b"data:"))
                        after = event["position"]
                        yield event
        except httpx.HTTPError as error:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > _PATIENCE_SECONDS:
                raise LedgerUnavailable(f"The connection to {client.base_url} is lost: {error}") from error
        await asyncio.sleep(pause)


async def _lines(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Yield lines as Server-Sent Events have them; `aiter_lines` also breaks at U+2028 and its like, amid the JSON."""
    rest = b""
    async for part in answer.aiter_bytes():
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r")


def _stream_timeout() -> httpx.Timeout:
    return httpx.Timeout(10, read=45)  # the server sends a sign of life every 15 seconds


async def follow_batch(
    client: httpx.AsyncClient,
    submitted: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    after: int,
    console: SafeConsole,
) -> dict[str, str]:
    """Show the progress of a batch until it has ended; return each job's final status.

    On a terminal there are live bars, one for the whole and one for each job at work; elsewhere a line for each end.
    """
    batch_id, total = submitted["batch_id"], len(names)
    ended: dict[str, str] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("[dim]{task.fields[message]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        whole = progress.add_task(f"[bold]{total} jobs", total=total, message="")
        bars: dict[str, TaskID] = {}
        async for event in stream_events(client, after=after, batch_id=batch_id):
            job_id, data, kind = event["stream"], event["data"], event["type"]
            if kind == "BatchFinished":
                return ended
            if job_id not in names:
                continue
            if kind == "JobClaimed" and len(bars) < _BARS_SHOWN and job_id not in bars:
                bars[job_id] = progress.add_task(escape(_short(names[job_id])), total=100, message="starting")
            elif kind == "JobProgressed" and job_id in bars:
                progress.update(bars[job_id], completed=data["percent"], message=escape(_short(data["message"], 50)))
            elif kind == "JobAttemptFailed" and job_id in bars:
                why = escape(_short(data["error"]["message"]))
                progress.update(bars[job_id], completed=0, message=f"will be repeated: {why}")
            elif kind in _ENDED:
                ended[job_id] = _ENDED[kind]
                progress.update(whole, completed=len(ended), message=_tally(ended))
                if job_id in bars:
                    progress.remove_task(bars.pop(job_id))
                _tell(console, names[job_id], kind, data)
    return ended


def _tell(console: SafeConsole, name: str, kind: str, data: Mapping[str, Any]) -> None:
    status = _ENDED[kind]
    why = f": {data['error']['message']}" if kind == "JobFailed" else ""
    console.print(Text.assemble((f"{status:>9}", _STYLES[status]), f" {escape_line(name + why)}"), soft_wrap=True)


def _tally(ended: Mapping[str, str]) -> str:
    counts = [f"{list(ended.values()).count(status)} {status}" for status in _STYLES if status in ended.values()]
    return ", ".join(counts)


def _short(text: str, length: int = 40) -> str:
    text = escape_line(text)
    return text if len(text) <= length else text[: length - 1] + "…"
