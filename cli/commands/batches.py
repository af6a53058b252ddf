"""`jobledger batches …`: list, inspect, cancel, retry, pause and resume batches over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final, get_args

import typer

from jobledger.cli.command_classes import CommandApp, use_options
from jobledger.cli.commands import resources
from jobledger.cli.commands.options import DEFAULT_URL, JsonOption, UrlOption
from jobledger.cli.output.documents import Document, Output, Rows, build_output
from jobledger.ledger.domain.statuses import BatchStatus, JobStatus, RestartScope

app = CommandApp(help="List, inspect, cancel, retry, pause and resume batches")


@app.command("ls")
@use_options(output=build_output)
def list_batches(
    output: Any,
    status: Annotated[BatchStatus | None, typer.Option(help="Only batches with this status")] = None,
    user: Annotated[str | None, typer.Option(help="Only batches of this user")] = None,
    search: Annotated[str | None, typer.Option(help="Only batches with all these words in name or ID")] = None,
    archived: Annotated[
        bool | None, typer.Option("--archived/--not-archived", help="Only archived, or only other batches")
    ] = None,
    oldest_first: resources.OldestFirstOption = False,
    limit: resources.LimitOption = 50,
    url: UrlOption = DEFAULT_URL,
) -> None:
    """List batches with job counts by status

    Filters are combined. Output to a file or pipe is never truncated.

    Examples:
        jobledger batches ls
        jobledger batches ls --status partial --json batch_id,failed_jobs
    """
    query = {**resources.build_list_query(user, search, archived), **resources.build_sort(oldest_first=oldest_first)}
    BATCHES.print_list(url, query if status is None else {**query, "status": status}, limit, output)


def _format_name(batch: Document) -> str:
    return batch["batch_name"] or "-"


def _build_rows(batches: Sequence[Document], output: Output) -> Rows:
    yield ("BATCH", "STATUS", "AGE", *(("USER", "SUBMITTED") if output.is_wide else ()), "NAME", "JOBS")
    for batch in batches:
        submitted = resources.format_iso_timestamp(batch["created_at"])
        yield (
            batch["batch_id"],
            resources.format_status(batch),
            resources.format_iso_age(batch["created_at"]),
            *((batch["user_id"], submitted) if output.is_wide else ()),
            _format_name(batch),
            _format_counts(batch),
        )


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


BATCHES: Final = resources.Resource("batch", "batches", _format_name, _build_rows, _list_details)
resources.add_get_command(
    app,
    BATCHES,
    """Show a batch's status and job counts

    `jobledger jobs ls --batch` lists its jobs.

    Examples:
        jobledger batches get batch-6b0c8f1a
        jobledger batches get batch-6b0c8f1a --json status,failed_jobs
    """,
)
resources.add_wait_command(
    app,
    BATCHES,
    """Wait until batches have ended

    Exits with 0 if all of their jobs are completed, with 1 if not, and with 4 after the timeout.

    Examples:
        jobledger batches wait batch-6b0c8f1a --timeout 1h30m
    """,
)
resources.add_action_command(
    app,
    BATCHES,
    "cancel",
    """Cancel all unfinished jobs of batches

    Examples:
        jobledger batches cancel batch-6b0c8f1a --reason "wrong files"
    """,
)


@app.command("retry")
def retry(
    ids: resources.IdsArgument,
    only: Annotated[RestartScope, typer.Option(help="Jobs to retry, by status")] = "failed",
    reason: resources.ReasonOption = None,
    from_scratch: resources.FromScratchOption = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Retry a batch's failed jobs (or others, see --only)

    Completed steps are reused, except those with a warning whose cause may be gone, such as a wrong key or a missing
    file.

    Examples:
        jobledger batches retry batch-6b0c8f1a
        jobledger batches retry batch-6b0c8f1a --only completed --from-scratch
    """
    body = {**resources.build_restart_body(reason, from_scratch=from_scratch), "only": only}
    BATCHES.run_action(url, ids, "restart", body, as_json=as_json)


resources.add_action_command(
    app,
    BATCHES,
    "pause",
    """Pause batches

    Their pending jobs do not start until the batch is resumed. Running jobs continue.

    Examples:
        jobledger batches pause batch-6b0c8f1a --reason "the media server is down"
    """,
)
resources.add_action_command(
    app,
    BATCHES,
    "resume",
    """Resume paused batches

    Examples:
        jobledger batches resume batch-6b0c8f1a
    """,
)
resources.add_export_command(
    app,
    BATCHES,
    """Download the result files of all jobs of a batch as a ZIP archive

    Examples:
        jobledger batches export batch-6b0c8f1a --to day-1.zip
    """,
)
