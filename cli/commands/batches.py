"""cli: `jobledger batches …`: how batches stand, and what is done about them, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import typer
from rich.text import Text

from jobledger.cli.api_client import DEFAULT_URL, UrlOption, without_none
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
from jobledger.cli.runtime import JsonOption
from jobledger.cli.terminal_text import escape_line
from jobledger.ledger.domain.errors import ConfigurationError

app = typer.Typer(help="Batches: how they stand, and what is done about them, over HTTP.", no_args_is_help=True)
BATCHES_PATH: Final = "/api/events/batches"
BatchIds = Annotated[list[str], typer.Argument(metavar="ID...", help="Which batches.")]


@app.command("list")
def list_batches(
    status: Annotated[
        str | None, typer.Option(help="processing, completed, partial, failed, cancelled.", show_default=False)
    ] = None,
    user: UserOption = None,
    search: SearchOption = None,
    archived: ArchivedOption = None,
    oldest_first: OldestFirstOption = False,
    limit: LimitOption = 50,
    url: UrlOption = DEFAULT_URL,
    ids: IdsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show batches, and how many of their jobs are how far."""
    query = {**list_query(user, search, archived, oldest_first=oldest_first), "status": status}
    found, total = asyncio.run(fetch_list(url, BATCHES_PATH, "batches", query, limit))
    print_list(found, total, _batch_rows, ids="batch_id" if ids else None, as_json=as_json)


@app.command("show")
def show_batch(
    batch_id: Annotated[str, typer.Argument(metavar="ID", help="Which batch.")],
    as_of: AsOfOption = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Tell how a batch stands. `jobledger jobs list --batch` shows its jobs."""
    batch = asyncio.run(fetch_one(url, BATCHES_PATH, "batch", _batch_id(batch_id), as_of))
    if as_json:
        print_json(batch)
    else:
        print_details(f"{batch['batch_id']}  ", _batch_status(batch), _batch_facts(batch))


@app.command("cancel")
def cancel(
    ids: BatchIds, reason: ReasonOption = None, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False
) -> None:
    """Cancel all jobs of batches that have not ended."""
    _act_on(url, ids, "cancel", without_none({"reason": reason}), as_json=as_json)


@app.command("restart")
def restart(
    ids: BatchIds,
    only: Annotated[
        Literal["failed", "cancelled", "completed", "all"], typer.Option(help="Which of their jobs.")
    ] = "failed",
    reason: ReasonOption = None,
    from_scratch: FromScratchOption = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Do the jobs of batches again that have failed, or others. What they had finished is not repeated."""
    body = {**restart_body(reason, from_scratch=from_scratch), "only": only}
    _act_on(url, ids, "restart", body, as_json=as_json)


@app.command("pause")
def pause(
    ids: BatchIds, reason: ReasonOption = None, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False
) -> None:
    """Start none of the batches' waiting jobs until they are resumed. Those that run go on."""
    _act_on(url, ids, "pause", without_none({"reason": reason}), as_json=as_json)


@app.command("resume")
def resume(
    ids: BatchIds, reason: ReasonOption = None, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False
) -> None:
    """Go on with batches that were paused."""
    _act_on(url, ids, "resume", without_none({"reason": reason}), as_json=as_json)


def _act_on(url: str, ids: Sequence[str], action: str, body: Document, *, as_json: bool) -> None:
    batch_ids = [_batch_id(batch_id) for batch_id in ids]

    def told(answer: Document) -> Text:
        if (jobs := answer.get("jobs")) is not None:
            return Text(f"{answer['batch_id']}: {jobs['changed']} of {jobs['total']} jobs changed")
        return Text.assemble(answer["batch_id"], " is ", _batch_status(answer["batch"]))

    run_action(url, BATCHES_PATH, batch_ids, action, body, ("batch_id", "batch"), told, as_json=as_json)


def _batch_id(text: str) -> str:
    if text.startswith("job-"):
        raise ConfigurationError(f"{text} is a job: `jobledger jobs …` knows it.")
    return parse_id(text, "batch")


def _batch_rows(batches: Sequence[Document]) -> Iterator[Sequence[str | Text]]:
    yield ("batch", "status", "submitted", "name", "jobs")
    for batch in batches:
        name = escape_line(batch["batch_name"] or "")
        yield (batch["batch_id"], _batch_status(batch), format_iso_timestamp(batch["created_at"]), name, _counts(batch))


def _batch_status(batch: Mapping[str, Any]) -> Text:
    text = Text(batch["status"], style=STATUS_STYLES.get(batch["status"], ""))
    return text.append(", paused", style="yellow") if batch["paused"] else text


def _counts(batch: Mapping[str, Any]) -> str:
    statuses = ("pending", "processing", "completed", "failed", "cancelled")
    counts = [f"{number} {status}" for status in statuses if (number := batch[f"{status}_jobs"])]
    return f"{batch['total_jobs']}: {', '.join(counts)}" if counts else str(batch["total_jobs"])


def _batch_facts(batch: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if batch["batch_name"]:
        yield "name", escape_line(batch["batch_name"])
    yield "of", escape_line(batch["user_id"])
    yield "submitted", format_iso_timestamp(batch["created_at"])
    if batch["completed_at"]:
        elapsed = format_elapsed(batch["created_at"], batch["completed_at"])
        yield "ended", f"{format_iso_timestamp(batch['completed_at'])}{elapsed}"
    yield "jobs", _counts(batch)
    if batch["archived"]:
        yield "archived", "yes"
