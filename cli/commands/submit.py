"""`jobledger submit`: submit jobs over HTTP, and follow them on the API's live stream."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import httpx
import orjson
import typer
import yaml
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from jobledger.cli.commands.api_client import (
    RetrySchedule,
    build_unexpected_response_error,
    open_async_client,
    parse_response,
)
from jobledger.cli.commands.live_stream import stream_events
from jobledger.cli.commands.options import (
    DEFAULT_URL,
    JsonOption,
    TimeoutOption,
    UrlOption,
    parse_assignments,
    parse_duration,
)
from jobledger.cli.exit_codes import EXIT_FAILED, EXIT_UNAVAILABLE
from jobledger.cli.output.documents import Output
from jobledger.cli.output.errors import with_hint
from jobledger.cli.output.formatting import format_count
from jobledger.cli.output.terminal_text import SafeConsole, echo, escape_line
from jobledger.ledger.domain.errors import ConfigurationError

_FINAL_STATUSES: Final = {"JobCompleted": "completed", "JobFailed": "failed", "JobCancelled": "cancelled"}
_STYLES: Final = {"completed": "green", "failed": "red", "cancelled": "yellow"}
_MAX_BARS: Final = 30
_MAX_PRINTED_JOBS: Final = 20


def submit(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE",
            help="JSON or YAML files: a job, a list of jobs, or a batch. Use - for standard input",
        ),
    ] = None,
    job_type: Annotated[str | None, typer.Option("--type", help="Submit every job as this job type")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the batch, or of the only job")] = None,
    params: Annotated[
        list[str] | None,
        typer.Option("--param", metavar="NAME=VALUE", help="Parameter of every job; VALUE is JSON or text. Repeatable"),
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Idempotency key: repeating the command with it submits nothing again")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the batch has finished. Exit with 1 if a job did not complete")
    ] = False,
    timeout: TimeoutOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the request as JSON, and submit nothing")] = False,
    output: Annotated[
        Literal["json", "yaml", "name"] | None, typer.Option("--output", "-o", help="json, yaml or name (IDs only)")
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = DEFAULT_URL,
) -> None:
    """Submit jobs in one atomic batch

    Jobs come from files, or from --type and --param. `jobledger types ls` lists job types and their parameters. Uses
    the API key in JOBLEDGER_KEY if set.

    Examples:
        jobledger submit batch.yaml --wait
        jobledger submit opening.yaml keynote.yaml --name "Day 1" -o name
        jobledger submit --type echo --param text=hello --wait --timeout 5m
        jobledger submit batch.yaml --key import-2026-02-01
        jobledger submit batch.yaml --param source_language=fr --dry-run
        cat batch.yaml | jobledger submit - --json
    """
    chosen: Any = "json" if as_json else output
    limit = None if timeout is None else parse_duration(timeout, "--timeout").total_seconds()
    batch = build_batch(files or [], job_type, name, parse_assignments(params, "--param"))
    if dry_run:
        Output(chosen if chosen in ("json", "yaml") else "json").print_document(batch)
        echo(f"Not submitted: {format_count(len(batch['jobs']), 'job')}. Jobledger has not checked them.", err=True)
        return
    wait = wait or limit is not None
    raise typer.Exit(asyncio.run(_submit_and_follow(url, batch, key, chosen, wait=wait, limit=limit)))


def build_batch(
    files: Sequence[Path], job_type: str | None, name: str | None, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the request body for files and options.

    Raises:
        ConfigurationError: There are no jobs, or a file is not valid.
    """
    if not files and job_type is None:
        error = ConfigurationError("Nothing to submit: expected a file, or --type and --param.")
        raise with_hint(error, "See `jobledger submit --help` for examples.")
    parts = [parse_batch(_read_file(file)) for file in files] or [{"jobs": [{"parameters": {}}]}]
    batch: dict[str, Any] = {"jobs": [job for part in parts for job in part["jobs"]]}
    for part, file in zip(parts, files, strict=False):
        settings = {field: value for field, value in part.items() if field != "jobs"}
        if settings and len(parts) > 1:
            raise ConfigurationError(f"{file}: only a single file can have {', '.join(map(str, settings))}.")
        batch |= settings
    batch["jobs"] = [_change_job(job, job_type, parameters) for job in batch["jobs"]]
    if name is not None:
        only_job = batch["jobs"][0] if len(batch["jobs"]) == 1 else None
        if isinstance(only_job, dict) and "parameters" in only_job:
            only_job["job_name"] = name
        else:
            batch["batch_name"] = name
    return batch


def _read_file(path: Path) -> Any:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return _parse(data.decode("utf-8-sig"))
    except FileNotFoundError:
        error = ConfigurationError(f"{path}: file not found.")
        raise with_hint(error, "Without a file, use --type TYPE --param NAME=VALUE.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigurationError(f"{path} is neither JSON nor YAML: {' '.join(str(error).split())}") from error


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


def _change_job(job: Any, job_type: str | None, parameters: Mapping[str, Any]) -> Any:
    """Return a job with another type and more parameters. A job that is not an object is left to the API to reject."""
    if not isinstance(job, dict) or (job_type is None and not parameters):
        return job
    body = dict(job) if "parameters" in job else {"parameters": job}
    if job_type is not None:
        body["job_type"] = job_type
    if isinstance(body["parameters"], dict):
        body["parameters"] = {**body["parameters"], **parameters}
    return body


def _get_display_name(job: Any) -> str:
    parameters = job.get("parameters", job)
    return str(job.get("job_name") or parameters.get("session") or job.get("job_type") or "job")


async def _submit_and_follow(
    url: str, batch: dict[str, Any], key: str | None, output: Any, *, wait: bool, limit: float | None
) -> int:
    """Submit a batch, print it, and perhaps wait for it. Return the exit code."""
    console = SafeConsole(stderr=output is not None)
    statuses: dict[str, str] = {}
    is_late = False
    async with open_async_client(url) as client:
        submitted, position = await submit_batch(client, batch, key)
        names = dict(zip(submitted["job_ids"], map(_get_display_name, batch["jobs"]), strict=True))
        if output is None:
            _print_submitted(submitted, names)
        for endpoint in submitted.get("webhook_secrets", ()):
            echo(f"Signing secret of {endpoint['url']}: {endpoint['secret']} (not shown again)", err=True)
        if wait:
            try:
                async with asyncio.timeout(limit):
                    statuses = await follow_batch(client, submitted, names, after=position, console=console)
            except TimeoutError:
                is_late = True
    if output == "name":
        echo(*submitted["job_ids"])
    elif output is not None:
        fields = {name: submitted[name] for name in ("batch_id", "job_ids")}
        Output(output).print_document({**fields, **({"statuses": statuses} if wait else {})})
    if is_late:
        echo(f"error: {submitted['batch_id']} has not finished in time. It continues.", err=True)
        echo(f"hint: Wait for it with `jobledger batches wait {submitted['batch_id']}`.", err=True)
        return EXIT_UNAVAILABLE
    return 0 if all(status == "completed" for status in statuses.values()) else EXIT_FAILED


def _print_submitted(submitted: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Print the ID of a batch, and the IDs of its first jobs."""
    echo(f"{submitted['batch_id']}: {format_count(len(names), 'job')} accepted")
    for job_id in list(names)[:_MAX_PRINTED_JOBS]:
        echo(f"  {job_id}  {names[job_id]}")
    if len(names) > _MAX_PRINTED_JOBS:
        echo(f"  … and {len(names) - _MAX_PRINTED_JOBS} more (-o name prints all)")


async def submit_batch(
    client: httpx.AsyncClient, batch: Mapping[str, Any], key: str | None = None
) -> tuple[dict[str, Any], int]:
    """Submit a batch. Return the response, and the position before the batch's first event.

    Raises:
        ConfigurationError: The batch cannot be written as JSON, or authentication failed.
        RequestRejected: The API rejected the batch.
        httpx.HTTPError: the API does not respond.

    Args:
        client: Client of the API.
        batch: The request body.
        key: The Idempotency-Key.
    """
    try:
        body = orjson.dumps(batch)
    except TypeError as error:  # YAML has types that JSON lacks: numbers as keys, bytes, sets, unbounded integers
        raise ConfigurationError(f"The batch cannot be written as JSON: {error}") from error
    response = await _send(client, body, key)
    content = parse_response(response, "batch_id", "job_ids", "batch")
    if "Ledger-Position" not in response.headers:
        raise build_unexpected_response_error(response)
    # The batch and its jobs are written in one commit: the last position minus their number is the position before it.
    return content, int(response.headers["Ledger-Position"]) - content["batch"]["total_jobs"] - 1


async def _send(client: httpx.AsyncClient, body: bytes, key: str | None) -> httpx.Response:
    schedule = RetrySchedule(key)
    headers = {"Content-Type": "application/json", **schedule.headers}
    while True:
        try:
            response = await client.post("/api/events/batches", content=body, headers=headers)
        except httpx.HTTPError as error:
            if (delay := schedule.next_delay(error)) is None:
                raise
        else:
            if (delay := schedule.next_delay(response)) is None:
                return response
        await asyncio.sleep(delay)


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
        disable=not console.has_terminal,
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
