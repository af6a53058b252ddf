"""cli: `jobledger jobs …`: how jobs stand, and what is done about them, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final

import httpx
import typer
from rich.text import Text

from jobledger.cli.api_client import HERE, UrlOption, given
from jobledger.cli.commands.resource_commands import (
    STYLES,
    AnewOption,
    ArchivedOption,
    AsOfOption,
    Document,
    IdsOption,
    LimitOption,
    OldestOption,
    ReasonOption,
    SearchOption,
    UserOption,
    act,
    common,
    id_of,
    lasting,
    listed,
    print_facts,
    print_json,
    restarting,
    show_list,
    single,
    time_of,
    when,
)
from jobledger.cli.formatting import lasted
from jobledger.cli.runtime import JsonOption
from jobledger.cli.terminal_text import visible
from jobledger.ledger.domain.errors import ConfigurationError

app = typer.Typer(help="Jobs: how they stand, and what is done about them, over HTTP.", no_args_is_help=True)
PATH: Final = "/api/events/jobs"
_LOG_LINES: Final = 10
_NOT_IN_LIST: Final = "too large for a list, see `jobs show`"
JobIds = Annotated[list[str], typer.Argument(metavar="ID...", help="Which jobs.")]


@app.command("list")
def listing(
    status: Annotated[
        str | None, typer.Option(help="pending, processing, completed, failed, cancelled.", show_default=False)
    ] = None,
    batch: Annotated[str | None, typer.Option("--batch", help="Those of this batch.")] = None,
    user: UserOption = None,
    track: Annotated[str | None, typer.Option(help="Those of this track.")] = None,
    event: Annotated[str | None, typer.Option(help="Those of this event.")] = None,
    day: Annotated[str | None, typer.Option(help="Those of this day.")] = None,
    job_type: Annotated[str | None, typer.Option("--type", help="Those of this type.")] = None,
    error: Annotated[str | None, typer.Option("--error", help="Those with this error code, such as TIMEOUT.")] = None,
    after: Annotated[
        str | None, typer.Option("--after", help="Submitted after this time, such as 2026-02-01T09:30:00Z.")
    ] = None,
    before: Annotated[str | None, typer.Option("--before", help="Submitted before this time.")] = None,
    search: SearchOption = None,
    archived: ArchivedOption = None,
    oldest_first: OldestOption = False,
    limit: LimitOption = 50,
    url: UrlOption = HERE,
    ids: IdsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show jobs and how they stand, those that fit all of the options."""
    query = {
        **common(user, search, archived, oldest_first=oldest_first),
        **{"status": status, "batch_id": batch, "track": track, "event": event, "day": day, "job_type": job_type},
        **{"error_code": error, "created_after": when(after, "--after"), "created_before": when(before, "--before")},
    }
    found, total = asyncio.run(listed(url, PATH, "jobs", query, limit))
    show_list(found, total, _job_rows, ids="job_id" if ids else None, as_json=as_json)


@app.command("show")
def show(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="Which job.")],
    as_of: AsOfOption = None,
    url: UrlOption = HERE,
    as_json: JsonOption = False,
) -> None:
    """Tell how a job stands: where it is, what went wrong, what it said last, what came out.

    `jobledger log show` tells its whole story, event by event, from the database.
    """
    job = asyncio.run(single(url, PATH, "job", _job_id(job_id), as_of))
    if as_json:
        print_json(job)
    else:
        print_facts(f"{job['job_id']}  ", _job_status(job), _job_facts(job, url))


@app.command("cancel")
def cancel(ids: JobIds, reason: ReasonOption = None, url: UrlOption = HERE, as_json: JsonOption = False) -> None:
    """Cancel jobs. One that waits is not started; one that runs is stopped within seconds."""
    _act_on(url, ids, "cancel", given({"reason": reason}), as_json=as_json)


@app.command("restart")
def restart(
    ids: JobIds,
    reason: ReasonOption = None,
    from_scratch: AnewOption = False,
    url: UrlOption = HERE,
    as_json: JsonOption = False,
) -> None:
    """Do jobs again that have ended. What they had finished is not repeated."""
    _act_on(url, ids, "restart", restarting(reason, from_scratch=from_scratch), as_json=as_json)


def _act_on(url: str, ids: Sequence[str], action: str, body: Document, *, as_json: bool) -> None:
    job_ids = [_job_id(job_id) for job_id in ids]

    def told(answer: Document) -> Text:
        return Text.assemble(answer["job_id"], " is ", _job_status(answer["job"]))

    act(url, PATH, job_ids, action, body, ("job_id", "job"), told, as_json=as_json)


def _job_id(text: str) -> str:
    if text.startswith("batch-"):
        raise ConfigurationError(f"{text} is a batch: `jobledger batches …` knows it.")
    return id_of(text, "job")


def _job_rows(jobs: Sequence[Document]) -> Iterator[Sequence[str | Text]]:
    yield ("job", "status", "submitted", "name", "how it stands")
    for job in jobs:
        yield (job["job_id"], _job_status(job), time_of(job["created_at"]), _name(job), _standing(job))


def _job_status(job: Mapping[str, Any]) -> Text:
    text = Text(job["status"], style=STYLES.get(job["status"], ""))
    if job["cancel_requested"] and job["status"] == "processing":
        return text.append(", to be cancelled", style="yellow")
    return text.append(", paused", style="yellow") if job.get("paused") else text


def _standing(job: Mapping[str, Any]) -> str:
    """Return in a few words what one wants to know of a job with this status."""
    match job["status"]:
        case "processing":
            progress = job["progress"]
            return visible(f"{progress['percent']:.0f} % {progress['step']} {progress['message']}").strip()
        case "completed":
            return _NOT_IN_LIST if _is_omitted(job, "results") else f"{len(job['results']['files'])} files"
        case "pending" if job["due_at"]:
            return f"not before {time_of(job['due_at'])}{_why(job)}"
        case "failed" | "pending":
            return _why(job).removeprefix(": ")
        case _:
            return ""


def _is_omitted(job: Mapping[str, Any], field: str) -> bool:
    """Return whether a list left out a field because it is large: it is empty in the answer then."""
    return field in job.get("omitted", ())


def _why(job: Mapping[str, Any]) -> str:
    if _is_omitted(job, "error"):
        return f": {_NOT_IN_LIST}"
    error = job["error"]
    return f": {error['code']}: {visible(error['message'])}" if error else ""


def _job_facts(job: Mapping[str, Any], url: str) -> Iterator[tuple[str, str]]:
    yield "name", _name(job)
    yield "type", job["job_type"]
    yield "of", visible(job["user_id"])
    if job["batch_id"]:
        yield "batch", job["batch_id"]
    yield "submitted", time_of(job["created_at"])
    if job["due_at"]:
        yield "not before", time_of(job["due_at"])
    if job["started_at"]:
        yield "started", time_of(job["started_at"])
    if job["completed_at"]:
        yield "ended", f"{time_of(job['completed_at'])}{lasting(job['started_at'], job['completed_at'])}"
    by = f", by {visible(job['worker_id'])}" if job["worker_id"] else ""
    yield "attempt", f"{job['attempt']}{by}"
    if job["retries"]:
        yield "repeated", f"{job['retries']} times"
    if job["status"] == "processing":
        yield "progress", _standing(job)
    if job["error"]:
        yield "error", _why(job).removeprefix(": ")
    for step in job["steps"]:
        reused = f", taken from {step['reused_from']}" if step["reused_from"] else ""
        yield "step", f"{visible(step['step'])} in {lasted(step['duration_s'])}{reused}"
    for line in job["logs"][-_LOG_LINES:]:
        yield "said", f"{time_of(line['timestamp'])} {line['level']} {visible(line['message'])}"
    results = job["results"] or {"files": ()}
    for warning in results.get("metadata", {}).get("warnings", ()):
        yield "warning", visible(warning)
    if results.get("markdown_url"):
        yield "markdown", str(httpx.URL(url).join(results["markdown_url"]))
    for file in results["files"]:
        yield "file", f"{visible(file['path'])} ({file['size']:,} bytes)"


def _name(job: Mapping[str, Any]) -> str:
    return visible(str(job["job_name"] or job["parameters"].get("session") or job["job_type"]))
