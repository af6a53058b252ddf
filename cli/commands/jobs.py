"""`jobledger jobs …`: list, inspect, follow, change, cancel and retry jobs over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import httpx
import orjson
import typer

from jobledger.cli.command_classes import CommandApp, use_options
from jobledger.cli.commands import job_changes, job_logs, resources
from jobledger.cli.commands.job_filters import build_job_filters
from jobledger.cli.commands.options import DEFAULT_URL, DryRunOption, JsonOption, UrlOption, YesOption
from jobledger.cli.commands.resources import format_iso_age, format_iso_timestamp
from jobledger.cli.output.documents import Document, Output, Rows, build_output
from jobledger.cli.output.formatting import format_count, format_duration

app = CommandApp(help="List, inspect, follow, change, cancel and retry jobs")
_LOG_ENTRIES: Final = 10
_MAX_OUTPUT_CHARACTERS: Final = 500
_OMITTED: Final = "too large for a list, see `jobs get`"
_WAITING_TEXTS: Final = {"worker": "waits for a worker", "batch_paused": "waits: its batch is paused"}


@app.command("ls")
@use_options(filters=build_job_filters, output=build_output)
def list_jobs(
    filters: Any,
    output: Any,
    oldest_first: resources.OldestFirstOption = False,
    limit: resources.LimitOption = 50,
    url: UrlOption = DEFAULT_URL,
) -> None:
    """List jobs

    Filters are combined. Output to a file or pipe is never truncated.

    Examples:
        jobledger jobs ls
        jobledger jobs ls --status failed --error FETCH_FAILED
        jobledger jobs ls --since 2h --search "opening keynote" -o wide
        jobledger jobs ls --batch batch-6b0c8f1a --json job_id,status,error.code
        jobledger jobs ls --status completed -o name | head -3
    """
    JOBS.print_list(url, {**filters, **resources.build_sort(oldest_first=oldest_first)}, limit, output)


def _format_name(job: Document) -> str:
    return str(job["job_name"] or job["parameters"].get("session") or job["job_type"])


def build_job_rows(jobs: Sequence[Document], output: Output) -> Rows:
    """Yield the header and the rows of a list of jobs."""
    more = ("TYPE", "ATTEMPT", "BATCH", "SUBMITTED") if output.is_wide else ()
    yield ("JOB", "STATUS", "AGE", "RUNTIME", "WORKER", *more, "NAME", "DETAIL")
    for job in jobs:
        batch, submitted = job["batch_id"] or "-", format_iso_timestamp(job["created_at"])
        yield (
            job["job_id"],
            resources.format_status(job),
            format_iso_age(job["created_at"]),
            _format_runtime(job),
            job["worker_id"] or "-",
            *((job["job_type"], f"{job['attempt']}/{job['max_attempts']}", batch, submitted) if output.is_wide else ()),
            _format_name(job),
            _format_detail(job),
        )


def _format_runtime(job: Document) -> str:
    """Return the time from the first start to the end, or until now."""
    if job["started_at"] is None or (job["completed_at"] is None and job["status"] != "processing"):
        return "-"
    end = datetime.now(UTC) if job["completed_at"] is None else datetime.fromisoformat(job["completed_at"])
    return format_duration((end - datetime.fromisoformat(job["started_at"])).total_seconds())


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
            return _format_error(job) or _WAITING_TEXTS.get(job.get("waiting_for") or "", "")
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


def _format_output(output: Any) -> str:
    text = orjson.dumps(output).decode()
    return text if len(text) <= _MAX_OUTPUT_CHARACTERS else f"{text[: _MAX_OUTPUT_CHARACTERS - 1]}…"


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
    yield "attempt", f"{job['attempt']} of {job['max_attempts']}{worker}"
    if job["retries"]:
        yield "retries", str(job["retries"])
    if waiting := job.get("waiting_for"):
        yield "waits for", waiting.replace("_", " ")
    if job["status"] == "processing":
        yield "progress", _format_detail(job)
    for name, value in job["parameters"].items():
        if value not in (None, "", [], {}):
            yield "parameter", f"{name}: {value}"
    if job["error"]:
        yield "error", _format_error(job)
    for step in job["steps"]:
        reused = f", reused from {step['reused_from']}" if step["reused_from"] else ""
        repeated = ", repeated by a restart" if step["repeat_on_restart"] else ""
        yield "step", f"{step['step']} in {format_duration(step['duration_s'])}{reused}{repeated}"
    for entry in job["logs"][-_LOG_ENTRIES:]:
        yield "log", job_logs.format_log_entry(entry)
    results = job["results"] or {"files": ()}
    for warning in results.get("metadata", {}).get("warnings", ()):
        yield "warning", warning
    if results.get("output") is not None:
        yield "output", _format_output(results["output"])
    if results.get("markdown_url"):
        yield "markdown", str(httpx.URL(url).join(results["markdown_url"]))
    for file in results["files"]:
        yield "file", f"{file['path']} ({file['size']:,} bytes)"


JOBS: Final = resources.Resource("job", "jobs", _format_name, build_job_rows, _list_details)
resources.add_get_command(
    app,
    JOBS,
    """Show a job's status, parameters, error, recent log and results

    `jobs logs` shows the whole log, `jobledger log history` all events.

    Examples:
        jobledger jobs get job-6b0c8f1a
        jobledger jobs get 6b0c8f1a -o yaml
        jobledger jobs get job-6b0c8f1a --json status,error.message,results.files
        jobledger jobs get job-6b0c8f1a --as-of 2026-02-01T09:30Z
    """,
)
job_logs.add_commands(app, JOBS)
resources.add_wait_command(
    app,
    JOBS,
    """Wait until jobs have ended

    Exits with 0 if all are completed, with 1 if one failed or was cancelled, and with 4 after the timeout.

    Examples:
        jobledger jobs wait job-6b0c8f1a --timeout 5m
    """,
)
resources.add_bulk_command(
    app,
    JOBS,
    build_job_filters,
    "cancel",
    """Cancel jobs, by ID or by filters

    Pending jobs do not start. Running jobs stop within seconds.

    Examples:
        jobledger jobs cancel job-6b0c8f1a --reason "wrong recording"
        jobledger jobs cancel --status pending --track Keynotes --dry-run
        jobledger jobs cancel --status pending --track Keynotes --yes
    """,
)


@app.command("retry")
@use_options(filters=build_job_filters)
def retry(
    filters: Any,
    ids: resources.OptionalIdsArgument = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a parameter first. With one ID only. Repeatable"),
    ] = None,
    reason: resources.ReasonOption = None,
    from_scratch: resources.FromScratchOption = False,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Retry finished jobs, by ID or by filters

    With filters and without --status, failed jobs are retried. Completed steps are reused, except those with a
    warning whose cause may be gone, such as a wrong key or a missing file. --set changes parameters of a job. The log
    records the difference.

    Examples:
        jobledger jobs retry job-6b0c8f1a
        jobledger jobs retry job-6b0c8f1a --set url=https://example.org/talk
        jobledger jobs retry --error FETCH_FAILED --dry-run
        jobledger jobs retry --error FETCH_FAILED --since 1d --yes
    """
    body = resources.build_restart_body(reason, from_scratch=from_scratch)
    if changes:
        job_changes.restart_with_changes(JOBS, url, ids or (), changes, body, dry_run=dry_run, as_json=as_json)
    elif ids and not filters and not dry_run:
        JOBS.run_action(url, ids, "restart", body, as_json=as_json)
    else:
        filters = {"status": "failed", **filters} if filters else filters
        body = {"action": "restart", **body}
        resources.run_bulk(JOBS, url, ids, filters, body, dry_run=dry_run, yes=yes, as_json=as_json, verb="retry")


job_changes.add_edit_command(app, JOBS)
resources.add_export_command(
    app,
    JOBS,
    """Download the result files of a job as a ZIP archive

    Examples:
        jobledger jobs export job-6b0c8f1a
        jobledger jobs export job-6b0c8f1a --to talk.zip
    """,
)


@app.command("delete")
@use_options(filters=build_job_filters)
def delete(
    filters: Any,
    ids: resources.OptionalIdsArgument = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Delete jobs and their files, by ID or by filters

    Running jobs are cancelled first, if they are named by ID. The events of a deleted job stay in the log.

    Examples:
        jobledger jobs delete --status cancelled --created-before 2026-02-01T09:30Z --dry-run
        jobledger jobs delete job-6b0c8f1a --yes
    """
    if ids and not filters and not dry_run:
        JOBS.delete(url, ids, yes=yes, as_json=as_json)
    else:
        resources.run_bulk(JOBS, url, ids, filters, {"action": "delete"}, dry_run=dry_run, yes=yes, as_json=as_json)


for _action, _summary in (("archive", "Archive jobs"), ("unarchive", "Unarchive jobs")):
    resources.add_bulk_command(
        app,
        JOBS,
        build_job_filters,
        _action,
        f"""{_summary}, by ID or by filters

        Examples:
            jobledger jobs {_action} job-6b0c8f1a
        """,
    )
