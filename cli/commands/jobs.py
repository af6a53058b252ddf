"""`jobledger jobs …`: list, inspect, cancel and restart jobs over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final

import httpx
import typer

from jobledger.cli.commands import resources
from jobledger.cli.commands.options import DEFAULT_URL, JsonOption, UrlOption, parse_time_option
from jobledger.cli.commands.resources import Document, format_iso_timestamp
from jobledger.cli.output.formatting import format_count, format_duration
from jobledger.ledger.domain.statuses import JobStatus

app = typer.Typer(help="List, inspect, cancel and restart jobs", no_args_is_help=True)
_LOG_ENTRIES: Final = 10
_OMITTED: Final = "too large for a list, see `jobs show`"


@app.command("list")
def list_jobs(
    status: Annotated[JobStatus | None, typer.Option(help="Only jobs with this status")] = None,
    batch: Annotated[str | None, typer.Option(help="Only jobs of this batch")] = None,
    user: Annotated[str | None, typer.Option(help="Only jobs of this user")] = None,
    track: Annotated[str | None, typer.Option(help="Only jobs of this track")] = None,
    event: Annotated[str | None, typer.Option(help="Only jobs of this conference")] = None,
    day: Annotated[str | None, typer.Option(help="Only jobs of this day")] = None,
    language: Annotated[str | None, typer.Option(help="Only jobs with this target language, e.g. en")] = None,
    job_type: Annotated[str | None, typer.Option("--type", help="Only jobs of this job type")] = None,
    error: Annotated[str | None, typer.Option(help="Only jobs with this error code, e.g. TIMEOUT")] = None,
    created_after: Annotated[
        str | None, typer.Option(help="Only jobs submitted after this time, e.g. 2026-02-01T09:30Z")
    ] = None,
    created_before: Annotated[str | None, typer.Option(help="Only jobs submitted before this time")] = None,
    search: Annotated[
        str | None,
        typer.Option(help="Only jobs with all these words in name, ID, session, event, track, file name or speakers"),
    ] = None,
    archived: Annotated[
        bool | None, typer.Option("--archived/--not-archived", help="Only archived (or only non-archived) jobs")
    ] = None,
    oldest_first: resources.OldestFirstOption = False,
    limit: resources.LimitOption = 50,
    url: UrlOption = DEFAULT_URL,
    ids: resources.IdsOption = False,
    as_json: JsonOption = False,
) -> None:
    """List jobs

    Filters are combined.
    """
    query = {
        **resources.build_list_query(user, search, archived, oldest_first=oldest_first),
        "status": status,
        "batch_id": batch,
        "track": track,
        "event": event,
        "day": day,
        "language": language,
        "job_type": job_type,
        "error_code": error,
        "created_after": parse_time_option(created_after, "--created-after"),
        "created_before": parse_time_option(created_before, "--created-before"),
    }
    _JOBS.print_list(url, query, limit, ids=ids, as_json=as_json)


def _format_name(job: Document) -> str:
    return str(job["job_name"] or job["parameters"].get("session") or job["job_type"])


def _format_detail(job: Document) -> str:
    """Return what matters most for a job with this status: progress, files, error, or start time."""
    match job["status"]:
        case "processing":
            progress = job["progress"]
            return f"{progress['percent']:.0f} % {progress['step']} {progress['message']}".strip()
        case "completed":
            return _OMITTED if _is_omitted(job, "results") else format_count(len(job["results"]["files"]), "file")
        case "pending" if job["due_at"]:
            error = _format_error(job)
            return f"not before {format_iso_timestamp(job['due_at'])}{': ' if error else ''}{error}"
        case "failed" | "pending":
            return _format_error(job)
        case _:
            return ""


def _is_omitted(job: Document, field: str) -> bool:
    """Return whether a list omitted a large field. The field is empty then."""
    return field in job.get("omitted", ())


def _format_error(job: Document) -> str:
    if _is_omitted(job, "error"):
        return _OMITTED
    error = job["error"]
    return f"{error['code']}: {error['message']}" if error else ""


def _list_details(job: Document, url: str) -> Iterator[tuple[str, str]]:
    yield "name", _format_name(job)
    yield "type", job["job_type"]
    yield "owner", job["user_id"]
    if job["batch_id"]:
        yield "batch", job["batch_id"]
    for label, field in (("submitted", "created_at"), ("not before", "due_at"), ("started", "started_at")):
        if job[field]:
            yield label, format_iso_timestamp(job[field])
    if job["completed_at"]:
        yield "finished", resources.format_finish(job, "started_at")
    worker = f" on {job['worker_id']}" if job["worker_id"] else ""
    yield "attempt", f"{job['attempt']}{worker}"
    if job["retries"]:
        yield "retries", str(job["retries"])
    if job["status"] == "processing":
        yield "progress", _format_detail(job)
    if job["error"]:
        yield "error", _format_error(job)
    for step in job["steps"]:
        reused = f", reused from {step['reused_from']}" if step["reused_from"] else ""
        yield "step", f"{step['step']} in {format_duration(step['duration_s'])}{reused}"
    for entry in job["logs"][-_LOG_ENTRIES:]:
        yield "log", f"{format_iso_timestamp(entry['timestamp'])} {entry['level']} {entry['message']}"
    results = job["results"] or {"files": ()}
    for warning in results.get("metadata", {}).get("warnings", ()):
        yield "warning", warning
    if results.get("markdown_url"):
        yield "markdown", str(httpx.URL(url).join(results["markdown_url"]))
    for file in results["files"]:
        yield "file", f"{file['path']} ({file['size']:,} bytes)"


_JOBS: Final = resources.Resource("job", "jobs", "DETAIL", _format_name, _format_detail, _list_details)
resources.add_show_command(
    app, _JOBS, "Show a job's status, error, recent log and results\n\n`jobledger log history` shows its events."
)
resources.add_action_command(
    app, _JOBS, "cancel", "Cancel jobs\n\nPending jobs do not start. Running jobs stop within seconds."
)


@app.command()
def restart(
    ids: resources.IdsArgument,
    reason: resources.ReasonOption = None,
    from_scratch: resources.FromScratchOption = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Restart finished jobs

    Completed steps are reused.
    """
    body = resources.build_restart_body(reason, from_scratch=from_scratch)
    _JOBS.run_action(url, ids, "restart", body, as_json=as_json)
