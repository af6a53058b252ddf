"""`jobledger jobs …`: list, inspect, cancel and restart jobs over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final

import httpx
import typer
from rich.text import Text

from jobledger.cli.api_client import without_none
from jobledger.cli.commands.resource_commands import (
    STATUS_STYLES,
    ArchivedOption,
    AsOfOption,
    Document,
    FromScratchOption,
    IdsOption,
    LimitOption,
    OldestFirstOption,
    ReasonOption,
    SearchOption,
    UserOption,
    fetch_list,
    fetch_one,
    format_elapsed,
    format_iso_timestamp,
    list_query,
    parse_id,
    print_details,
    print_json,
    print_list,
    restart_body,
    run_action,
)
from jobledger.cli.formatting import format_duration
from jobledger.cli.options import DEFAULT_URL, JsonOption, UrlOption, parse_time_option
from jobledger.cli.terminal_text import escape_line
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.domain.statuses import JobStatus

app = typer.Typer(help="List, inspect, cancel and restart jobs", no_args_is_help=True)
JOBS_PATH: Final = "/api/events/jobs"
_LOG_LINES: Final = 10
_OMITTED: Final = "too large for a list, see `jobs show`"
JobIds = Annotated[list[str], typer.Argument(metavar="ID...", help="Job IDs")]


@app.command("list")
def list_jobs(
    status: Annotated[JobStatus | None, typer.Option(help="Only with this status", show_default=False)] = None,
    batch: Annotated[str | None, typer.Option("--batch", help="Only of this batch")] = None,
    user: UserOption = None,
    track: Annotated[str | None, typer.Option(help="Only of this track")] = None,
    event: Annotated[str | None, typer.Option(help="Only of this event")] = None,
    day: Annotated[str | None, typer.Option(help="Only of this day")] = None,
    job_type: Annotated[str | None, typer.Option("--type", help="Only of this job type")] = None,
    error: Annotated[str | None, typer.Option("--error", help="Only with this error code, e.g. TIMEOUT")] = None,
    created_after: Annotated[
        str | None, typer.Option("--created-after", help="Only submitted after this time, e.g. 2026-02-01T09:30:00Z")
    ] = None,
    created_before: Annotated[
        str | None, typer.Option("--created-before", help="Only submitted before this time")
    ] = None,
    search: SearchOption = None,
    archived: ArchivedOption = None,
    oldest_first: OldestFirstOption = False,
    limit: LimitOption = 50,
    url: UrlOption = DEFAULT_URL,
    ids: IdsOption = False,
    as_json: JsonOption = False,
) -> None:
    """List jobs

    Filters are combined.
    """
    query = {
        **list_query(user, search, archived, oldest_first=oldest_first),
        "status": status,
        "batch_id": batch,
        "track": track,
        "event": event,
        "day": day,
        "job_type": job_type,
        "error_code": error,
        "created_after": parse_time_option(created_after, "--created-after"),
        "created_before": parse_time_option(created_before, "--created-before"),
    }
    jobs, total = asyncio.run(fetch_list(url, JOBS_PATH, "jobs", query, limit))
    print_list(jobs, total, _job_rows, plural="jobs", id_field="job_id" if ids else None, as_json=as_json)


@app.command("show")
def show_job(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="Job ID")],
    as_of: AsOfOption = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Show a job's status, error, recent log and results

    `jobledger log history` shows its events.
    """
    job = asyncio.run(fetch_one(url, JOBS_PATH, "job", _job_id(job_id), as_of))
    if as_json:
        print_json(job)
    else:
        print_details(f"{job['job_id']}  ", _job_status(job), _job_details(job, url))


@app.command("cancel")
def cancel(ids: JobIds, reason: ReasonOption = None, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Cancel jobs

    Pending jobs do not start. Running jobs stop within seconds.
    """
    _run(url, ids, "cancel", without_none({"reason": reason}), as_json=as_json)


@app.command("restart")
def restart(
    ids: JobIds,
    reason: ReasonOption = None,
    from_scratch: FromScratchOption = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Restart finished jobs

    Completed steps are reused.
    """
    _run(url, ids, "restart", restart_body(reason, from_scratch=from_scratch), as_json=as_json)


def _run(url: str, ids: Sequence[str], action: str, body: Document, *, as_json: bool) -> None:
    job_ids = [_job_id(job_id) for job_id in ids]

    def format_result(result: Document) -> Text:
        return Text.assemble(result["job_id"], " is ", _job_status(result["job"]))

    run_action(url, JOBS_PATH, job_ids, action, body, ("job_id", "job"), format_result, as_json=as_json)


def _job_id(text: str) -> str:
    if text.startswith("batch-"):
        raise ConfigurationError(f"{text} is a batch ID: use `jobledger batches`.")
    return parse_id(text, "job")


def _job_rows(jobs: Sequence[Document]) -> Iterator[Sequence[str | Text]]:
    yield ("JOB", "STATUS", "SUBMITTED", "NAME", "DETAIL")
    for job in jobs:
        yield (
            job["job_id"],
            _job_status(job),
            format_iso_timestamp(job["created_at"]),
            _display_name(job),
            _status_detail(job),
        )


def _job_status(job: Mapping[str, Any]) -> Text:
    text = Text(job["status"], style=STATUS_STYLES.get(job["status"], ""))
    if job["cancel_requested"] and job["status"] == "processing":
        return text.append(", cancelling", style="yellow")
    return text.append(", paused", style="yellow") if job.get("paused") else text


def _status_detail(job: Mapping[str, Any]) -> str:
    """Return what matters most for a job with this status: progress, files, error, or start time."""
    match job["status"]:
        case "processing":
            progress = job["progress"]
            return escape_line(f"{progress['percent']:.0f} % {progress['step']} {progress['message']}").strip()
        case "completed":
            return _OMITTED if _is_omitted(job, "results") else f"{len(job['results']['files'])} files"
        case "pending" if job["due_at"]:
            error = _format_error(job)
            return f"not before {format_iso_timestamp(job['due_at'])}{': ' if error else ''}{error}"
        case "failed" | "pending":
            return _format_error(job)
        case _:
            return ""


def _is_omitted(job: Mapping[str, Any], field: str) -> bool:
    """Return whether a list omitted a large field. The field is empty then."""
    return field in job.get("omitted", ())


def _format_error(job: Mapping[str, Any]) -> str:
    if _is_omitted(job, "error"):
        return _OMITTED
    error = job["error"]
    return f"{error['code']}: {escape_line(error['message'])}" if error else ""


def _job_details(job: Mapping[str, Any], url: str) -> Iterator[tuple[str, str]]:
    yield "name", _display_name(job)
    yield "type", job["job_type"]
    yield "owner", escape_line(job["user_id"])
    if job["batch_id"]:
        yield "batch", job["batch_id"]
    yield "submitted", format_iso_timestamp(job["created_at"])
    if job["due_at"]:
        yield "not before", format_iso_timestamp(job["due_at"])
    if job["started_at"]:
        yield "started", format_iso_timestamp(job["started_at"])
    if job["completed_at"]:
        elapsed = format_elapsed(job["started_at"], job["completed_at"])
        yield "finished", f"{format_iso_timestamp(job['completed_at'])}{elapsed}"
    worker = f" on {escape_line(job['worker_id'])}" if job["worker_id"] else ""
    yield "attempt", f"{job['attempt']}{worker}"
    if job["retries"]:
        yield "retries", str(job["retries"])
    if job["status"] == "processing":
        yield "progress", _status_detail(job)
    if job["error"]:
        yield "error", _format_error(job)
    for step in job["steps"]:
        reused = f", reused from {step['reused_from']}" if step["reused_from"] else ""
        yield "step", f"{escape_line(step['step'])} in {format_duration(step['duration_s'])}{reused}"
    for line in job["logs"][-_LOG_LINES:]:
        yield "log", f"{format_iso_timestamp(line['timestamp'])} {line['level']} {escape_line(line['message'])}"
    results = job["results"] or {"files": ()}
    for warning in results.get("metadata", {}).get("warnings", ()):
        yield "warning", escape_line(warning)
    if results.get("markdown_url"):
        yield "markdown", str(httpx.URL(url).join(results["markdown_url"]))
    for file in results["files"]:
        yield "file", f"{escape_line(file['path'])} ({file['size']:,} bytes)"


def _display_name(job: Mapping[str, Any]) -> str:
    return escape_line(str(job["job_name"] or job["parameters"].get("session") or job["job_type"]))
