"""`jobledger jobs logs` and `jobledger jobs watch`: read and follow the log entries and the events of jobs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args

import httpx
import typer

from jobledger.cli.commands import resources
from jobledger.cli.commands.api_client import open_async_client, open_client, parse_response
from jobledger.cli.commands.live_stream import stream_events
from jobledger.cli.commands.options import DEFAULT_URL, UrlOption, parse_duration
from jobledger.cli.exit_codes import EXIT_FAILED
from jobledger.cli.output.terminal_text import SafeConsole, echo, echo_text, print_json

if TYPE_CHECKING:
    from jobledger.cli.command_classes import CommandApp
    from jobledger.cli.commands.resources import Resource
    from jobledger.cli.output.documents import Document

LogLevel = Literal["debug", "info", "warning", "error"]
_LEVELS: Final[tuple[str, ...]] = get_args(LogLevel)
_FINAL_EVENTS: Final = frozenset({"JobCompleted", "JobFailed", "JobCancelled", "JobDeleted"})
_PAGE_SIZE: Final = 1000
_STYLES: Final = {"JobCompleted": "green", "JobFailed": "red", "JobAttemptFailed": "red", "JobCancelled": "yellow"}


def add_commands(app: CommandApp, jobs: Resource) -> None:
    """Add the commands `logs` and `watch`."""

    @app.command("logs")
    def print_logs(
        job_id: resources.IdArgument,
        follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for new entries until the job ends")] = False,
        level: Annotated[LogLevel, typer.Option(help="Entries of this level and above")] = "debug",
        since: Annotated[str | None, typer.Option(metavar="DURATION", help="Entries of this time, e.g. 10m")] = None,
        attempt: Annotated[int | None, typer.Option(min=1, help="Entries of this attempt")] = None,
        lines: Annotated[
            int | None, typer.Option("--lines", "-n", min=0, max=100_000, help="Only the last entries")
        ] = None,
        url: UrlOption = DEFAULT_URL,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per entry")] = False,
    ) -> None:
        """Show the log of a job

        Examples:
            jobledger jobs logs job-6b0c8f1a
            jobledger jobs logs job-6b0c8f1a --follow
            jobledger jobs logs job-6b0c8f1a --level warning --since 10m --attempt 3
            jobledger jobs logs job-6b0c8f1a -n 20 --json
        """
        oldest = None if since is None else datetime.now(UTC) - parse_duration(since, "--since")
        log = _JobLog(jobs, level, oldest, attempt, as_json=as_json)
        with open_client(url) as client:
            found_id = jobs.resolve_id(client, job_id)
            log.show(log.read_new(client, found_id), lines)
            if follow:
                # Events that are recorded between reading the log and the status are read by the next request.
                is_running = not resources.is_finished(jobs.load(client, found_id))
                position = parse_response(client.get("/api/ledger/head"), "head")["head"]
                log.show(log.read_new(client, found_id))
                if is_running:
                    asyncio.run(_follow_log(url, client, found_id, position, log))

    @app.command("watch")
    def watch(
        job_id: Annotated[str, typer.Argument(metavar="ID", help="ID of a job, or its unique beginning")],
        url: UrlOption = DEFAULT_URL,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per event")] = False,
    ) -> None:
        """Show what happens to a job until it ends

        Exits with 0 if it completed, and with 1 if it failed or was cancelled.

        Examples:
            jobledger jobs watch job-6b0c8f1a
        """
        with open_client(url) as client:
            position = parse_response(client.get("/api/ledger/head"), "head")["head"]
            job = jobs.load(client, jobs.resolve_id(client, job_id))
        if not as_json:
            echo(f"{job['job_id']} is {job['status']}")
        status = job["status"]
        if not resources.is_finished(job):
            status = asyncio.run(_watch(url, job["job_id"], position, as_json=as_json))
        raise typer.Exit(0 if status in ("completed", "JobCompleted") else EXIT_FAILED)


class _JobLog:
    """Reads the log of a job and prints the entries that the options select."""

    def __init__(
        self, jobs: Resource, level: LogLevel, oldest: datetime | None, attempt: int | None, *, as_json: bool
    ) -> None:
        self._jobs = jobs
        self._levels = frozenset(_LEVELS[_LEVELS.index(level) :])
        self._oldest = oldest
        self._attempt = attempt
        self._as_json = as_json
        self._version = 0

    def read_new(self, client: httpx.Client, job_id: str) -> Iterable[Document]:
        """Yield the entries after those that were read before."""
        while True:
            query = {"after_version": self._version, "limit": _PAGE_SIZE}
            response = resources.send(client, "GET", f"{self._jobs.path}/{job_id}/logs", params=query)
            page = parse_response(response, "logs")
            yield from filter(self._is_selected, page["logs"])
            if page["logs"]:
                self._version = max(self._version, page["logs"][-1]["version"])
            if (next_version := page.get("next_after_version")) is None:
                return
            self._version = next_version

    def show(self, entries: Iterable[Document], lines: int | None = None) -> None:
        """Print entries, or only the last ones."""
        for entry in entries if lines is None else deque(entries, lines):
            if self._as_json:
                print_json(entry)
            else:
                echo_text(format_log_entry(entry))

    def _is_selected(self, entry: Document) -> bool:
        level = entry["level"] if entry["level"] in _LEVELS else "error"
        is_recent = self._oldest is None or datetime.fromisoformat(entry["timestamp"]) >= self._oldest
        return level in self._levels and is_recent and self._attempt in (None, entry["attempt"])


def format_log_entry(entry: Document) -> str:
    """Return a log entry as one line: time, level and message."""
    return f"{resources.format_iso_timestamp(entry['timestamp'])} {entry['level']:<7} {entry['message']}"


async def _follow_log(url: str, client: httpx.Client, job_id: str, position: int, log: _JobLog) -> None:
    """Print new entries until the job ends. An event of the job is the signal to read them."""
    async for event in _stream_job(url, job_id, position):
        await asyncio.to_thread(lambda: log.show(log.read_new(client, job_id)))
        if event["type"] in _FINAL_EVENTS:
            return


async def _watch(url: str, job_id: str, position: int, *, as_json: bool) -> str:
    """Print the events of a job until it ends. Return the type of its last event."""
    console = SafeConsole()
    async for event in _stream_job(url, job_id, position):
        if as_json:
            print_json(event)
        elif event["type"] not in ("JobLogged", "StepCompleted"):
            time = resources.format_iso_timestamp(event["time"])
            style = _STYLES.get(event["type"], "")
            console.print(f"{time} {event['type']} {_describe(event)}".rstrip(), style=style, soft_wrap=True)
        if event["type"] in _FINAL_EVENTS:
            return str(event["type"])
    return ""


async def _stream_job(url: str, job_id: str, position: int) -> AsyncIterator[dict[str, Any]]:
    async with (
        open_async_client(url) as client,
        aclosing(stream_events(client, after=position, job_id=job_id)) as events,
    ):
        async for event in events:
            yield event


def _describe(event: dict[str, Any]) -> str:
    """Return what an event of a job says, in a few words."""
    data: dict[str, Any] = event["data"]
    match event["type"]:
        case "JobClaimed":
            return f"attempt {data['attempt']} on {data.get('worker_id') or 'a worker'}"
        case "JobProgressed":
            return f"{data['percent']:.0f} % {data.get('step') or ''} {data.get('message') or ''}"
        case "JobFailed" | "JobAttemptFailed":
            return f"{data['error']['code']}: {data['error']['message']}"
        case _:
            return ""
