"""cli: `jobledger jobs …` and `jobledger batches …`: how the work stands, and what is done about it, over HTTP."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import httpx
import orjson
import typer
from rich.console import Console
from rich.text import Text

from cli.log import AS_OF, then_of
from cli.remote import HERE, Refused, UrlOption, api_at, content_of, given
from cli.running import JsonOption
from cli.telling import lasted, moment, printable
from ledger.errors import ConfigurationError

FAILED: Final = 1
jobs_app = typer.Typer(help="Jobs: how they stand, and what is done about them, over HTTP.", no_args_is_help=True)
batches_app = typer.Typer(help="Batches: how they stand, and what is done about them, over HTTP.", no_args_is_help=True)
_JOBS: Final = "/api/events/jobs"
_BATCHES: Final = "/api/events/batches"
_PAGE: Final = 500
_LOG_LINES: Final = 10
_TOO_FAST: Final = 429
_LONGEST_PAUSE_SECONDS: Final = 60.0
_STYLES: Final = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "processing": "cyan",
    "partial": "yellow",
}
_LONGEST_CELL: Final = 50
Document = dict[str, Any]
Rows = Callable[[Sequence[Document]], Iterable[Sequence[str | Text]]]
JobIds = Annotated[list[str], typer.Argument(metavar="ID...", help="Which jobs.")]
BatchIds = Annotated[list[str], typer.Argument(metavar="ID...", help="Which batches.")]
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="At most so many.")]
OldestOption = Annotated[bool, typer.Option("--oldest-first", help="Else the newest first.")]
SearchOption = Annotated[str | None, typer.Option("--search", help="Words, all of which must be found.")]
UserOption = Annotated[str | None, typer.Option("--user", help="Those of this user.")]
ArchivedOption = Annotated[
    bool | None, typer.Option("--archived/--not-archived", help="Only those put away, or only the others.")
]
AsOfOption = Annotated[str | None, typer.Option("--as-of", help=f"As it was then. {AS_OF}")]
IdsOption = Annotated[bool, typer.Option("--ids", help="Print nothing but the ids, for `xargs` and its like.")]
ReasonOption = Annotated[str | None, typer.Option(help="Why, for the record.")]
AnewOption = Annotated[bool, typer.Option("--from-scratch", help="Do finished steps once more, too.")]


# Jobs -----------------------------------------------------------------------------------------------------------------


@jobs_app.command("list")
def jobs_list(
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
        str | None, typer.Option("--after", help="Submitted after this time, such as 2026-02-01T09:30.")
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
        **_common(user, search, archived, oldest_first=oldest_first),
        **{"status": status, "batch_id": batch, "track": track, "event": event, "day": day, "job_type": job_type},
        **{"error_code": error, "created_after": _when(after, "--after"), "created_before": _when(before, "--before")},
    }
    found, total = asyncio.run(_listed(url, _JOBS, "jobs", query, limit))
    _show_list(found, total, _job_rows, ids="job_id" if ids else None, as_json=as_json)


@jobs_app.command("show")
def jobs_show(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="Which job.")],
    as_of: AsOfOption = None,
    url: UrlOption = HERE,
    as_json: JsonOption = False,
) -> None:
    """Tell how a job stands: where it is, what went wrong, what it said last, what came out.

    `jobledger log show` tells its whole story, event by event, from the database.
    """
    job = asyncio.run(_single(url, _JOBS, "job", _job_id(job_id), as_of))
    if as_json:
        _print_json(job)
    else:
        _print_facts(f"{job['job_id']}  ", _job_status(job), _job_facts(job, url))


@jobs_app.command("cancel")
def jobs_cancel(ids: JobIds, reason: ReasonOption = None, url: UrlOption = HERE, as_json: JsonOption = False) -> None:
    """Cancel jobs. One that waits is not started; one that runs is stopped within seconds."""
    _act_on_jobs(url, ids, "cancel", given({"reason": reason}), as_json=as_json)


@jobs_app.command("restart")
def jobs_restart(
    ids: JobIds,
    reason: ReasonOption = None,
    from_scratch: AnewOption = False,
    url: UrlOption = HERE,
    as_json: JsonOption = False,
) -> None:
    """Do jobs again that have ended. What they had finished is not repeated."""
    _act_on_jobs(url, ids, "restart", _restart(reason, from_scratch=from_scratch), as_json=as_json)


def _act_on_jobs(url: str, ids: Sequence[str], action: str, body: Document, *, as_json: bool) -> None:
    job_ids = [_job_id(job_id) for job_id in ids]

    def told(answer: Document) -> Text:
        return Text.assemble(answer["job_id"], " is ", _job_status(answer["job"]))

    _act(url, _JOBS, job_ids, action, body, ("job_id", "job"), told, as_json=as_json)


def _job_id(text: str) -> str:
    if text.startswith("batch-"):
        raise ConfigurationError(f"{text} is a batch: `jobledger batches …` knows it.")
    return _id(text, "job")


def _job_rows(jobs: Sequence[Document]) -> Iterator[Sequence[str | Text]]:
    yield ("job", "status", "submitted", "name", "how it stands")
    for job in jobs:
        yield (job["job_id"], _job_status(job), _time(job["created_at"]), _name(job), _standing(job))


def _job_status(job: Mapping[str, Any]) -> Text:
    text = Text(job["status"], style=_STYLES.get(job["status"], ""))
    if job["cancel_requested"] and job["status"] == "processing":
        return text.append(", to be cancelled", style="yellow")
    return text.append(", paused", style="yellow") if job.get("paused") else text


def _standing(job: Mapping[str, Any]) -> str:
    """Return in a few words what one wants to know of a job with this status."""
    match job["status"]:
        case "processing":
            progress = job["progress"]
            return printable(f"{progress['percent']:.0f} % {progress['step']} {progress['message']}").strip()
        case "completed":
            return f"{len(job['results']['files'])} files"
        case "pending" if job["due_at"]:
            return f"not before {_time(job['due_at'])}{_why(job)}"
        case "failed" | "pending":
            return _why(job).removeprefix(": ")
        case _:
            return ""


def _why(job: Mapping[str, Any]) -> str:
    error = job["error"]
    return f": {error['code']}: {printable(error['message'])}" if error else ""


def _job_facts(job: Mapping[str, Any], url: str) -> Iterator[tuple[str, str]]:
    yield "name", _name(job)
    yield "type", job["job_type"]
    yield "of", printable(job["user_id"])
    if job["batch_id"]:
        yield "batch", job["batch_id"]
    yield "submitted", _time(job["created_at"])
    if job["due_at"]:
        yield "not before", _time(job["due_at"])
    if job["started_at"]:
        yield "started", _time(job["started_at"])
    if job["completed_at"]:
        yield "ended", f"{_time(job['completed_at'])}{_after(job['started_at'], job['completed_at'])}"
    by = f", by {printable(job['worker_id'])}" if job["worker_id"] else ""
    yield "attempt", f"{job['attempt']}{by}"
    if job["retries"]:
        yield "repeated", f"{job['retries']} times"
    if job["status"] == "processing":
        yield "progress", _standing(job)
    if job["error"]:
        yield "error", _why(job).removeprefix(": ")
    for step in job["steps"]:
        reused = f", taken from {step['reused_from']}" if step["reused_from"] else ""
        yield "step", f"{printable(step['step'])} in {lasted(step['duration_s'])}{reused}"
    for line in job["logs"][-_LOG_LINES:]:
        yield "said", f"{_time(line['timestamp'])} {line['level']} {printable(line['message'])}"
    results = job["results"] or {"files": ()}
    for warning in results.get("metadata", {}).get("warnings", ()):
        yield "warning", printable(warning)
    if results.get("markdown_url"):
        yield "markdown", str(httpx.URL(url).join(results["markdown_url"]))
    for file in results["files"]:
        yield "file", f"{printable(file['path'])} ({file['size']:,} bytes)"


def _name(job: Mapping[str, Any]) -> str:
    return printable(str(job["job_name"] or job["parameters"].get("session") or job["job_type"]))


# Batches --------------------------------------------------------------------------------------------------------------


@batches_app.command("list")
def batches_list(
    status: Annotated[
        str | None, typer.Option(help="processing, completed, partial, failed, cancelled.", show_default=False)
    ] = None,
    user: UserOption = None,
    search: SearchOption = None,
    archived: ArchivedOption = None,
    oldest_first: OldestOption = False,
    limit: LimitOption = 50,
    url: UrlOption = HERE,
    ids: IdsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show batches, and how many of their jobs are how far."""
    query = {**_common(user, search, archived, oldest_first=oldest_first), "status": status}
    found, total = asyncio.run(_listed(url, _BATCHES, "batches", query, limit))
    _show_list(found, total, _batch_rows, ids="batch_id" if ids else None, as_json=as_json)


@batches_app.command("show")
def batches_show(
    batch_id: Annotated[str, typer.Argument(metavar="ID", help="Which batch.")],
    as_of: AsOfOption = None,
    url: UrlOption = HERE,
    as_json: JsonOption = False,
) -> None:
    """Tell how a batch stands. `jobledger jobs list --batch` shows its jobs."""
    batch = asyncio.run(_single(url, _BATCHES, "batch", _batch_id(batch_id), as_of))
    if as_json:
        _print_json(batch)
    else:
        _print_facts(f"{batch['batch_id']}  ", _batch_status(batch), _batch_facts(batch))


@batches_app.command("cancel")
def batches_cancel(
    ids: BatchIds, reason: ReasonOption = None, url: UrlOption = HERE, as_json: JsonOption = False
) -> None:
    """Cancel all jobs of batches that have not ended."""
    _act_on_batches(url, ids, "cancel", given({"reason": reason}), as_json=as_json)


@batches_app.command("restart")
def batches_restart(
    ids: BatchIds,
    only: Annotated[
        Literal["failed", "cancelled", "completed", "all"], typer.Option(help="Which of their jobs.")
    ] = "failed",
    reason: ReasonOption = None,
    from_scratch: AnewOption = False,
    url: UrlOption = HERE,
    as_json: JsonOption = False,
) -> None:
    """Do the jobs of batches again that have failed, or others. What they had finished is not repeated."""
    body = {**_restart(reason, from_scratch=from_scratch), "only": only}
    _act_on_batches(url, ids, "restart", body, as_json=as_json)


@batches_app.command("pause")
def batches_pause(
    ids: BatchIds, reason: ReasonOption = None, url: UrlOption = HERE, as_json: JsonOption = False
) -> None:
    """Start none of the batches' waiting jobs until they are resumed. Those that run go on."""
    _act_on_batches(url, ids, "pause", given({"reason": reason}), as_json=as_json)


@batches_app.command("resume")
def batches_resume(
    ids: BatchIds, reason: ReasonOption = None, url: UrlOption = HERE, as_json: JsonOption = False
) -> None:
    """Go on with batches that were paused."""
    _act_on_batches(url, ids, "resume", given({"reason": reason}), as_json=as_json)


def _act_on_batches(url: str, ids: Sequence[str], action: str, body: Document, *, as_json: bool) -> None:
    batch_ids = [_batch_id(batch_id) for batch_id in ids]

    def told(answer: Document) -> Text:
        if (jobs := answer.get("jobs")) is not None:
            return Text(f"{answer['batch_id']}: {jobs['changed']} of {jobs['total']} jobs changed")
        return Text.assemble(answer["batch_id"], " is ", _batch_status(answer["batch"]))

    _act(url, _BATCHES, batch_ids, action, body, ("batch_id", "batch"), told, as_json=as_json)


def _batch_id(text: str) -> str:
    if text.startswith("job-"):
        raise ConfigurationError(f"{text} is a job: `jobledger jobs …` knows it.")
    return _id(text, "batch")


def _batch_rows(batches: Sequence[Document]) -> Iterator[Sequence[str | Text]]:
    yield ("batch", "status", "submitted", "name", "jobs")
    for batch in batches:
        name = printable(batch["batch_name"] or "")
        yield (batch["batch_id"], _batch_status(batch), _time(batch["created_at"]), name, _counts(batch))


def _batch_status(batch: Mapping[str, Any]) -> Text:
    text = Text(batch["status"], style=_STYLES.get(batch["status"], ""))
    return text.append(", paused", style="yellow") if batch["paused"] else text


def _counts(batch: Mapping[str, Any]) -> str:
    statuses = ("pending", "processing", "completed", "failed", "cancelled")
    counts = [f"{number} {status}" for status in statuses if (number := batch[f"{status}_jobs"])]
    return f"{batch['total_jobs']}: {', '.join(counts)}" if counts else str(batch["total_jobs"])


def _batch_facts(batch: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if batch["batch_name"]:
        yield "name", printable(batch["batch_name"])
    yield "of", printable(batch["user_id"])
    yield "submitted", _time(batch["created_at"])
    if batch["completed_at"]:
        yield "ended", f"{_time(batch['completed_at'])}{_after(batch['created_at'], batch['completed_at'])}"
    yield "jobs", _counts(batch)
    if batch["archived"]:
        yield "archived", "yes"


# Both -----------------------------------------------------------------------------------------------------------------


def _id(text: str, kind: str) -> str:
    if not re.fullmatch(rf"{kind}-[A-Za-z0-9_-]+", text):
        raise ConfigurationError(f"{text!r} is no id of a {kind}: expected one that begins with {kind}-.")
    return text


def _common(user: str | None, search: str | None, archived: bool | None, *, oldest_first: bool) -> Document:
    put_away = None if archived is None else str(archived).lower()
    sort = "created_at" if oldest_first else "-created_at"
    return {"user_id": user, "q": search or None, "archived": put_away, "sort": sort}


def _when(text: str | None, option: str) -> str | None:
    """Return a time as the API wants it; one without a zone is of this machine."""
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text).astimezone(UTC).isoformat()
    except (ValueError, OverflowError):
        raise ConfigurationError(f"{option} {text}: expected a time such as 2026-02-01T09:30:00Z") from None


def _restart(reason: str | None, *, from_scratch: bool) -> Document:
    return {**given({"reason": reason}), "reuse_steps": not from_scratch}


async def _listed(url: str, path: str, name: str, query: Document, limit: int) -> tuple[list[Document], str]:
    """Return the first of what fits, page by page, and how many there are in words."""
    found: list[Document] = []
    cursor: str | None = None
    async with api_at(url) as client:
        while True:
            asked = given({**query, "cursor": cursor, "limit": min(_PAGE, limit - len(found))})
            content = content_of(await client.get(path, params=asked), name, "total")
            found += content[name]
            cursor = content.get("next")
            if cursor is None or len(found) >= limit:
                more = "more than " if content.get("total_is_lower_bound") else ""
                return found, f"{more}{content['total']}"


async def _single(url: str, path: str, kind: str, name: str, as_of: str | None) -> Document:
    then = None if as_of is None else str(then_of(as_of, "--as-of"))
    async with api_at(url) as client:
        found: Document = content_of(await client.get(f"{path}/{name}", params=given({"as_of": then})), kind)[kind]
    return found


def _act(
    url: str,
    path: str,
    ids: Sequence[str],
    action: str,
    body: Document,
    needed: Sequence[str],
    told: Callable[[Document], Text],
    *,
    as_json: bool,
) -> None:
    """Do something to one after the other; what is refused does not keep the rest back, but is told, and in the end."""
    console = Console()
    todo = list(dict.fromkeys(ids))
    answers: list[Document] = []
    refusals = 0

    async def ask(client: httpx.AsyncClient, name: str) -> Document:
        """Ask, as slowly as the API wants it."""
        while True:
            answer = await client.post(f"{path}/{name}/{action}", json=body)
            if answer.status_code != _TOO_FAST:
                return content_of(answer, *needed)
            await asyncio.sleep(min(float(answer.headers.get("Retry-After", 1)), _LONGEST_PAUSE_SECONDS))

    async def ask_all() -> None:
        nonlocal refusals
        async with api_at(url) as client:
            while todo:
                try:
                    answer = await ask(client, todo[0])
                except Refused as refused:
                    refusals += 1
                    answers.append({"id": todo[0], "error": str(refused)})
                    typer.echo(f"{todo[0]}: {refused}", err=True)
                else:
                    answers.append({"id": todo[0], **{key: it for key, it in answer.items() if key != "status"}})
                    refusals += answer.get("jobs", {}).get("refused", 0)
                    if not as_json:
                        console.print(told(answer), highlight=False, soft_wrap=True)
                    for job in answer.get("refused", ()):
                        typer.echo(f"{job['job_id']}: {job['message']}", err=True)
                del todo[0]

    try:
        asyncio.run(ask_all())
    finally:
        if as_json:
            _print_json(answers)
        if todo:
            typer.echo(f"not done, or not known to be done: {' '.join(todo)}", err=True)
    raise typer.Exit(FAILED if refusals else 0)


def _show_list(found: Sequence[Document], total: str, rows: Rows, *, ids: str | None, as_json: bool) -> None:
    if (as_json or ids is not None) and total != str(len(found)):
        typer.echo(f"note: these are {len(found)} of {total}; --limit tells how many to show", err=True)
    if as_json:
        _print_json(found)
    elif ids is not None:
        for it in found:
            typer.echo(it[ids])
    elif found:
        _print_table(list(rows(found)))
        typer.echo(f"{len(found)} of {total}")
    else:
        typer.echo("There are none.")


def _print_table(rows: Sequence[Sequence[str | Text]]) -> None:
    """Ids are never cut, for they are what one copies; on a terminal other texts are, and longer lines are wrapped."""
    console = Console()
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    for row in cells:
        for cell in row if console.is_terminal else ():
            cell.truncate(_LONGEST_CELL, overflow="ellipsis")
    widths = [max(cell.cell_len for cell in column) for column in zip(*cells, strict=True)]
    cells[0] = [Text(cell.plain, style="bold") for cell in cells[0]]
    for row in cells:
        for cell, width in zip(row[:-1], widths, strict=False):
            cell.pad_right(width - cell.cell_len)
        console.print(Text("  ").join(row), highlight=False, soft_wrap=True)


def _print_facts(title: str, status: Text, facts: Iterator[tuple[str, str]]) -> None:
    console = Console()
    console.print(Text.assemble((title, "bold"), status), highlight=False, soft_wrap=True)
    last = ""
    for name, fact in facts:
        line = Text.assemble((f"  {name if name != last else '':<11}", "dim"), fact)
        console.print(line, highlight=False, soft_wrap=True)
        last = name


def _print_json(content: Any) -> None:
    typer.echo(orjson.dumps(content))


def _time(text: str) -> str:
    return moment(datetime.fromisoformat(text))[:-4]


def _after(begin: str | None, end: str) -> str:
    if begin is None:
        return ""
    return f", after {lasted((datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds())}"
