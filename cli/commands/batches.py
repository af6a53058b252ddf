"""`jobledger batches …`: list, inspect, cancel, restart, pause and resume batches over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, get_args

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
from jobledger.cli.options import DEFAULT_URL, JsonOption, UrlOption
from jobledger.cli.terminal_text import escape_line
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.domain.statuses import BatchStatus, JobStatus, RestartScope

app = typer.Typer(help="List, inspect, cancel, restart, pause and resume batches", no_args_is_help=True)
BATCHES_PATH: Final = "/api/events/batches"
BatchIds = Annotated[list[str], typer.Argument(metavar="ID...", help="Batch IDs")]


@app.command("list")
def list_batches(
    status: Annotated[BatchStatus | None, typer.Option(help="Only with this status", show_default=False)] = None,
    user: UserOption = None,
    search: SearchOption = None,
    archived: ArchivedOption = None,
    oldest_first: OldestFirstOption = False,
    limit: LimitOption = 50,
    url: UrlOption = DEFAULT_URL,
    ids: IdsOption = False,
    as_json: JsonOption = False,
) -> None:
    """List batches with job counts by status

    Filters are combined.
    """
    query = {**list_query(user, search, archived, oldest_first=oldest_first), "status": status}
    batches, total = asyncio.run(fetch_list(url, BATCHES_PATH, "batches", query, limit))
    print_list(batches, total, _batch_rows, plural="batches", id_field="batch_id" if ids else None, as_json=as_json)


@app.command("show")
def show_batch(
    batch_id: Annotated[str, typer.Argument(metavar="ID", help="Batch ID")],
    as_of: AsOfOption = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Show a batch's status and job counts

    `jobledger jobs list --batch` lists its jobs.
    """
    batch = asyncio.run(fetch_one(url, BATCHES_PATH, "batch", _batch_id(batch_id), as_of))
    if as_json:
        print_json(batch)
    else:
        print_details(f"{batch['batch_id']}  ", _batch_status(batch), _batch_details(batch))


@app.command("cancel")
def cancel(
    ids: BatchIds, reason: ReasonOption = None, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False
) -> None:
    """Cancel all unfinished jobs of batches"""
    _run(url, ids, "cancel", without_none({"reason": reason}), as_json=as_json)


@app.command("restart")
def restart(
    ids: BatchIds,
    only: Annotated[RestartScope, typer.Option(help="Jobs to restart, by status")] = "failed",
    reason: ReasonOption = None,
    from_scratch: FromScratchOption = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Restart a batch's failed jobs (or others, see --only)

    Completed steps are reused.
    """
    body = {**restart_body(reason, from_scratch=from_scratch), "only": only}
    _run(url, ids, "restart", body, as_json=as_json)


@app.command("pause")
def pause(
    ids: BatchIds, reason: ReasonOption = None, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False
) -> None:
    """Pause batches

    Their pending jobs do not start until the batch is resumed. Running jobs continue.
    """
    _run(url, ids, "pause", without_none({"reason": reason}), as_json=as_json)


@app.command("resume")
def resume(
    ids: BatchIds, reason: ReasonOption = None, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False
) -> None:
    """Resume paused batches"""
    _run(url, ids, "resume", without_none({"reason": reason}), as_json=as_json)


def _run(url: str, ids: Sequence[str], action: str, body: Document, *, as_json: bool) -> None:
    batch_ids = [_batch_id(batch_id) for batch_id in ids]

    def format_result(result: Document) -> Text:
        if (jobs := result.get("jobs")) is not None:
            return Text(f"{result['batch_id']}: {jobs['changed']} of {jobs['total']} jobs changed")
        return Text.assemble(result["batch_id"], " is ", _batch_status(result["batch"]))

    run_action(url, BATCHES_PATH, batch_ids, action, body, ("batch_id", "batch"), format_result, as_json=as_json)


def _batch_id(text: str) -> str:
    if text.startswith("job-"):
        raise ConfigurationError(f"{text} is a job ID: use `jobledger jobs`.")
    return parse_id(text, "batch")


def _batch_rows(batches: Sequence[Document]) -> Iterator[Sequence[str | Text]]:
    yield ("BATCH", "STATUS", "SUBMITTED", "NAME", "JOBS")
    for batch in batches:
        name = escape_line(batch["batch_name"] or "")
        created_at = format_iso_timestamp(batch["created_at"])
        yield (batch["batch_id"], _batch_status(batch), created_at, name, _format_counts(batch))


def _batch_status(batch: Mapping[str, Any]) -> Text:
    text = Text(batch["status"], style=STATUS_STYLES.get(batch["status"], ""))
    return text.append(", paused", style="yellow") if batch["paused"] else text


def _format_counts(batch: Mapping[str, Any]) -> str:
    counts = [f"{count} {status}" for status in get_args(JobStatus) if (count := batch[f"{status}_jobs"])]
    return f"{batch['total_jobs']}: {', '.join(counts)}" if counts else str(batch["total_jobs"])


def _batch_details(batch: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if batch["batch_name"]:
        yield "name", escape_line(batch["batch_name"])
    yield "owner", escape_line(batch["user_id"])
    yield "submitted", format_iso_timestamp(batch["created_at"])
    if batch["completed_at"]:
        elapsed = format_elapsed(batch["created_at"], batch["completed_at"])
        yield "finished", f"{format_iso_timestamp(batch['completed_at'])}{elapsed}"
    yield "jobs", _format_counts(batch)
    if batch["archived"]:
        yield "archived", "yes"
