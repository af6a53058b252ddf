"""`jobledger batches …`: list, inspect, cancel, restart, pause and resume batches over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final, get_args

import typer

from jobledger.cli.commands import resources
from jobledger.cli.commands.options import DEFAULT_URL, JsonOption, UrlOption
from jobledger.cli.commands.resources import Document
from jobledger.ledger.domain.statuses import BatchStatus, JobStatus, RestartScope

app = typer.Typer(help="List, inspect, cancel, restart, pause and resume batches", no_args_is_help=True)


@app.command("list")
def list_batches(
    status: Annotated[BatchStatus | None, typer.Option(help="Only batches with this status")] = None,
    user: Annotated[str | None, typer.Option(help="Only batches of this user")] = None,
    search: Annotated[str | None, typer.Option(help="Only batches with all these words in name or ID")] = None,
    archived: Annotated[
        bool | None, typer.Option("--archived/--not-archived", help="Only archived (or only non-archived) batches")
    ] = None,
    oldest_first: resources.OldestFirstOption = False,
    limit: resources.LimitOption = 50,
    url: UrlOption = DEFAULT_URL,
    ids: resources.IdsOption = False,
    as_json: JsonOption = False,
) -> None:
    """List batches with job counts by status

    Filters are combined.
    """
    query = {**resources.build_list_query(user, search, archived, oldest_first=oldest_first), "status": status}
    _BATCHES.print_list(url, query, limit, ids=ids, as_json=as_json)


def _format_name(batch: Document) -> str:
    return batch["batch_name"] or ""


def _format_counts(batch: Document) -> str:
    counts = [f"{count} {status}" for status in get_args(JobStatus) if (count := batch[f"{status}_jobs"])]
    return f"{batch['total_jobs']}: {', '.join(counts)}" if counts else str(batch["total_jobs"])


def _list_details(batch: Document, _url: str) -> Iterator[tuple[str, str]]:
    if batch["batch_name"]:
        yield "name", _format_name(batch)
    yield "owner", batch["user_id"]
    yield "submitted", resources.format_iso_timestamp(batch["created_at"])
    if batch["completed_at"]:
        yield "finished", resources.format_finish(batch, "created_at")
    yield "jobs", _format_counts(batch)
    if batch["archived"]:
        yield "archived", "yes"


_BATCHES: Final = resources.Resource("batch", "batches", "JOBS", _format_name, _format_counts, _list_details)
resources.add_show_command(
    app, _BATCHES, "Show a batch's status and job counts\n\n`jobledger jobs list --batch` lists its jobs."
)
resources.add_action_command(app, _BATCHES, "cancel", "Cancel all unfinished jobs of batches")


@app.command()
def restart(
    ids: resources.IdsArgument,
    only: Annotated[RestartScope, typer.Option(help="Jobs to restart, by status")] = "failed",
    reason: resources.ReasonOption = None,
    from_scratch: resources.FromScratchOption = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Restart a batch's failed jobs (or others, see --only)

    Completed steps are reused.
    """
    body = {**resources.build_restart_body(reason, from_scratch=from_scratch), "only": only}
    _BATCHES.run_action(url, ids, "restart", body, as_json=as_json)


resources.add_action_command(
    app,
    _BATCHES,
    "pause",
    "Pause batches\n\nTheir pending jobs do not start until the batch is resumed. Running jobs continue.",
)
resources.add_action_command(app, _BATCHES, "resume", "Resume paused batches")
