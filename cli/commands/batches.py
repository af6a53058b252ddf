"""cli: `jobledger batches …`: how batches stand, and what is done about them, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

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
)
from jobledger.cli.runtime import JsonOption
from jobledger.cli.terminal_text import visible
from jobledger.ledger.domain.errors import ConfigurationError

app = typer.Typer(help="Batches: how they stand, and what is done about them, over HTTP.", no_args_is_help=True)
PATH: Final = "/api/events/batches"
BatchIds = Annotated[list[str], typer.Argument(metavar="ID...", help="Which batches.")]


@app.command("list")
def listing(
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
    query = {**common(user, search, archived, oldest_first=oldest_first), "status": status}
    found, total = asyncio.run(listed(url, PATH, "batches", query, limit))
    show_list(found, total, _batch_rows, ids="batch_id" if ids else None, as_json=as_json)


@app.command("show")
def show(
    batch_id: Annotated[str, typer.Argument(metavar="ID", help="Which batch.")],
    as_of: AsOfOption = None,
    url: UrlOption = HERE,
    as_json: JsonOption = False,
) -> None:
    """Tell how a batch stands. `jobledger jobs list --batch` shows its jobs."""
    batch = asyncio.run(single(url, PATH, "batch", _batch_id(batch_id), as_of))
    if as_json:
        print_json(batch)
    else:
        print_facts(f"{batch['batch_id']}  ", _batch_status(batch), _batch_facts(batch))


@app.command("cancel")
def cancel(ids: BatchIds, reason: ReasonOption = None, url: UrlOption = HERE, as_json: JsonOption = False) -> None:
    """Cancel all jobs of batches that have not ended."""
    _act_on(url, ids, "cancel", given({"reason": reason}), as_json=as_json)


@app.command("restart")
def restart(
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
    body = {**restarting(reason, from_scratch=from_scratch), "only": only}
    _act_on(url, ids, "restart", body, as_json=as_json)


@app.command("pause")
def pause(ids: BatchIds, reason: ReasonOption = None, url: UrlOption = HERE, as_json: JsonOption = False) -> None:
    """Start none of the batches' waiting jobs until they are resumed. Those that run go on."""
    _act_on(url, ids, "pause", given({"reason": reason}), as_json=as_json)


@app.command("resume")
def resume(ids: BatchIds, reason: ReasonOption = None, url: UrlOption = HERE, as_json: JsonOption = False) -> None:
    """Go on with batches that were paused."""
    _act_on(url, ids, "resume", given({"reason": reason}), as_json=as_json)


def _act_on(url: str, ids: Sequence[str], action: str, body: Document, *, as_json: bool) -> None:
    batch_ids = [_batch_id(batch_id) for batch_id in ids]

    def told(answer: Document) -> Text:
        if (jobs := answer.get("jobs")) is not None:
            return Text(f"{answer['batch_id']}: {jobs['changed']} of {jobs['total']} jobs changed")
        return Text.assemble(answer["batch_id"], " is ", _batch_status(answer["batch"]))

    act(url, PATH, batch_ids, action, body, ("batch_id", "batch"), told, as_json=as_json)


def _batch_id(text: str) -> str:
    if text.startswith("job-"):
        raise ConfigurationError(f"{text} is a job: `jobledger jobs …` knows it.")
    return id_of(text, "batch")


def _batch_rows(batches: Sequence[Document]) -> Iterator[Sequence[str | Text]]:
    yield ("batch", "status", "submitted", "name", "jobs")
    for batch in batches:
        name = visible(batch["batch_name"] or "")
        yield (batch["batch_id"], _batch_status(batch), time_of(batch["created_at"]), name, _counts(batch))


def _batch_status(batch: Mapping[str, Any]) -> Text:
    text = Text(batch["status"], style=STYLES.get(batch["status"], ""))
    return text.append(", paused", style="yellow") if batch["paused"] else text


def _counts(batch: Mapping[str, Any]) -> str:
    statuses = ("pending", "processing", "completed", "failed", "cancelled")
    counts = [f"{number} {status}" for status in statuses if (number := batch[f"{status}_jobs"])]
    return f"{batch['total_jobs']}: {', '.join(counts)}" if counts else str(batch["total_jobs"])


def _batch_facts(batch: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if batch["batch_name"]:
        yield "name", visible(batch["batch_name"])
    yield "of", visible(batch["user_id"])
    yield "submitted", time_of(batch["created_at"])
    if batch["completed_at"]:
        yield "ended", f"{time_of(batch['completed_at'])}{lasting(batch['created_at'], batch['completed_at'])}"
    yield "jobs", _counts(batch)
    if batch["archived"]:
        yield "archived", "yes"
