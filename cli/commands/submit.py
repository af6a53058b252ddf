"""`jobledger submit`: submit jobs over HTTP, and follow them on the API's live stream."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import httpx
import orjson
import typer
import yaml
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from jobledger.cli.commands.api_client import (
    build_unexpected_response_error,
    compute_retry_delay,
    open_async_client,
    parse_response,
)
from jobledger.cli.commands.options import DEFAULT_URL, UrlOption
from jobledger.cli.exit_codes import EXIT_FAILED
from jobledger.cli.output.formatting import format_count
from jobledger.cli.output.terminal_text import SafeConsole, echo, escape_line
from jobledger.ledger.domain.errors import ConfigurationError, LedgerUnavailable

_FINAL_STATUSES: Final = {"JobCompleted": "completed", "JobFailed": "failed", "JobCancelled": "cancelled"}
_STYLES: Final = {"completed": "green", "failed": "red", "cancelled": "yellow"}
_MAX_BARS: Final = 30
_RECONNECT_TIMEOUT_SECONDS: Final = 60.0
_STREAM_TIMEOUT: Final = httpx.Timeout(10, read=45)  # the server sends a heartbeat every 15 seconds
_UNAVAILABLE_STATUSES: Final = (429, 502, 503, 504)
"""HTTP statuses of the API, or of a proxy before it, while the stream cannot be served."""


def submit(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="JSON or YAML file: a job, a list of jobs, or a batch. Use - for standard input"
        ),
    ],
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the batch has finished. Exit with 1 if a job did not complete")
    ] = False,
    job_type: Annotated[str | None, typer.Option("--type", help="Submit every job as this job type")] = None,
    url: UrlOption = DEFAULT_URL,
) -> None:
    """Submit jobs in one atomic batch

    Uses the API key in JOBLEDGER_KEY if set.
    """
    batch = parse_batch(_read_file(file))
    if job_type is not None:
        batch["jobs"] = [_add_job_type(job, job_type) for job in batch["jobs"]]
    raise typer.Exit(asyncio.run(_submit_and_follow(url, batch, wait=wait)))


def _read_file(file: str) -> Any:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        return _parse(text)
    except FileNotFoundError:
        raise ConfigurationError(f"{file}: file not found.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"{file} is neither JSON nor YAML: {' '.join(str(error).split())}") from error


def _parse(text: str) -> Any:
    """Parse JSON, or else YAML. YAML rejects tabs and breaks escaped emoji, so it cannot parse all JSON."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return yaml.safe_load(text)


def parse_batch(content: Any) -> dict[str, Any]:
    """Return the request body for the content of a file: parameters of a session, a job, a list of them, or a batch.

    Raises:
        ConfigurationError: `content` is none of these.
    """
    if isinstance(content, list):
        return {"jobs": content}
    if isinstance(content, dict):
        batch = dict(content) if "jobs" in content else {"jobs": [content]}
        if not isinstance(batch["jobs"], list):
            raise ConfigurationError(f"jobs: expected a list of jobs, got {type(batch['jobs']).__name__}.")
        return batch
    raise ConfigurationError(f"Expected a job, a list of jobs, or a batch, got {type(content).__name__}.")


def _add_job_type(job: Any, job_type: str) -> Any:
    if not isinstance(job, dict):
        return job
    return {**job, "job_type": job_type} if "parameters" in job else {"job_type": job_type, "parameters": job}


def _get_display_name(job: Any) -> str:
    parameters = job.get("parameters", job)
    return str(job.get("job_name") or parameters.get("session") or "job")


async def _submit_and_follow(url: str, batch: dict[str, Any], *, wait: bool) -> int:
    """Return the exit code."""
    console = SafeConsole()
    async with open_async_client(url) as client:
        submitted, position = await submit_batch(client, batch)

        jobs = format_count(len(submitted["job_ids"]), "job")
        console.print(f"{submitted['batch_id']}: {jobs} accepted", highlight=False)
        for endpoint in submitted.get("webhook_secrets", ()):
            echo(f"Signing secret of {endpoint['url']}: {endpoint['secret']} (not shown again)", err=True)
        if not wait:
            return 0
        names = dict(zip(submitted["job_ids"], map(_get_display_name, batch["jobs"]), strict=True))
        statuses = await follow_batch(client, submitted, names, after=position, console=console)
    return 0 if all(status == "completed" for status in statuses.values()) else EXIT_FAILED


async def submit_batch(client: httpx.AsyncClient, batch: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Submit a batch. Return the response, and the position before the batch's first event.

    Raises:
        ConfigurationError: The batch cannot be written as JSON, or authentication failed.
        RequestRejected: The API rejected the batch.
        httpx.HTTPError: the API does not respond.
    """
    try:
        body = orjson.dumps(batch)
    except TypeError as error:  # YAML has types that JSON lacks: numbers as keys, bytes, sets, unbounded integers
        raise ConfigurationError(f"The batch cannot be written as JSON: {error}") from error
    response = await client.post("/api/events/batches", content=body, headers={"Content-Type": "application/json"})
    content = parse_response(response, "batch_id", "job_ids", "batch")
    if "Ledger-Position" not in response.headers:
        raise build_unexpected_response_error(response)
    # The batch and its jobs are written in one commit: the last position minus their number is the position before it.
    return content, int(response.headers["Ledger-Position"]) - content["batch"]["total_jobs"] - 1


async def stream_events(client: httpx.AsyncClient, *, after: int, batch_id: str) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a batch and its jobs as they happen. Reconnects after interruptions.

    Raises:
        LedgerUnavailable: The API did not respond for a minute.
    """
    lost_at: float | None = None
    while True:
        delay = 1.0
        try:
            query = {"after": str(after), "batch_id": batch_id}
            async with client.stream("GET", "/api/ledger/stream", params=query, timeout=_STREAM_TIMEOUT) as response:
                if response.status_code in _UNAVAILABLE_STATUSES:
                    delay = compute_retry_delay(response)
                    raise httpx.HTTPStatusError(
                        f"HTTP status {response.status_code}", request=response.request, response=response
                    )
                if response.is_error:
                    await response.aread()
                    parse_response(response)  # raises the error
                async for line in _iterate_lines(response):
                    lost_at = None
                    if line.startswith(b"data:"):
                        event: dict[str, Any] = orjson.loads(line.removeprefix(b"data:"))
                        after = event["position"]
                        yield event
        except httpx.HTTPError as error:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > _RECONNECT_TIMEOUT_SECONDS:
                raise LedgerUnavailable(f"Lost the connection to {client.base_url}: {error}") from error
        await asyncio.sleep(delay)


async def _iterate_lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield lines of Server-Sent Events. `aiter_lines` would also split at U+2028 and similar, inside the JSON."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")


async def follow_batch(
    client: httpx.AsyncClient,
    submitted: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    after: int,
    console: SafeConsole,
) -> dict[str, str]:
    """Show the progress of a batch until it has finished. Return each job's final status.

    A terminal shows one bar for the batch and one for each running job. Otherwise each finished job is one line.

    Args:
        client: Client of the API.
        submitted: Response to the submission.
        names: Display names by job ID.
        after: Position before the batch's first event.
        console: Where to print.
    """
    batch_id, total = submitted["batch_id"], len(names)
    statuses: dict[str, str] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("[dim]{task.fields[message]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        batch_bar = progress.add_task(f"[bold]{format_count(total, 'job')}", total=total, message="")
        bars: dict[str, TaskID] = {}
        async for event in stream_events(client, after=after, batch_id=batch_id):
            job_id, data, event_type = event["stream"], event["data"], event["type"]
            if event_type == "BatchFinished":
                return statuses
            if job_id not in names:
                continue
            if event_type == "JobClaimed" and len(bars) < _MAX_BARS and job_id not in bars:
                bars[job_id] = progress.add_task(escape(_truncate(names[job_id])), total=100, message="starting")
            elif event_type == "JobProgressed" and job_id in bars:
                message = escape(_truncate(data["message"], 50))
                progress.update(bars[job_id], completed=data["percent"], message=message)
            elif event_type == "JobAttemptFailed" and job_id in bars:
                error = escape(_truncate(data["error"]["message"]))
                progress.update(bars[job_id], completed=0, message=f"will retry: {error}")
            elif event_type in _FINAL_STATUSES:
                statuses[job_id] = _FINAL_STATUSES[event_type]
                progress.update(batch_bar, completed=len(statuses), message=_format_counts(statuses))
                if job_id in bars:
                    progress.remove_task(bars.pop(job_id))
                print_finished_job(console, names[job_id], event_type, data)
    return statuses


def print_finished_job(console: SafeConsole, name: str, event_type: str, data: Mapping[str, Any]) -> None:
    """Print a job's final status, and its error if it failed.

    Args:
        console: Where to print.
        name: Display name of the job.
        event_type: The event that finished the job.
        data: Data of that event.
    """
    status = _FINAL_STATUSES[event_type]
    error = f": {data['error']['message']}" if event_type == "JobFailed" else ""
    console.print(Text.assemble((f"{status:>9}", _STYLES[status]), f" {escape_line(name + error)}"), soft_wrap=True)


def _format_counts(statuses: Mapping[str, str]) -> str:
    values = list(statuses.values())
    return ", ".join(f"{values.count(status)} {status}" for status in _STYLES if status in values)


def _truncate(text: str, length: int = 40) -> str:
    text = escape_line(text)
    return text if len(text) <= length else text[: length - 1] + "…"
