"""cli: what `jobledger jobs …` and `jobledger batches …` have in common: lists, cards, and doing something to many."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Annotated, Any, Final

import httpx
import orjson
import typer
from rich.text import Text

from jobledger.cli.api_client import RequestRejected, open_client, parse_response, retry_delay, without_none
from jobledger.cli.commands.log import AS_OF_HELP, parse_as_of
from jobledger.cli.formatting import format_duration, format_timestamp
from jobledger.cli.terminal_text import SafeConsole, echo, echo_json, escape_line
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.domain.timestamps import parse_timestamp

EXIT_FAILED: Final = 1
_PAGE: Final = 500
_TOO_FAST: Final = 429
STATUS_STYLES: Final = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "processing": "cyan",
    "partial": "yellow",
}
_LONGEST_CELL: Final = 50
Document = dict[str, Any]
RowFormatter = Callable[[Sequence[Document]], Iterable[Sequence[str | Text]]]
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="At most so many.")]
OldestFirstOption = Annotated[bool, typer.Option("--oldest-first", help="Else the newest first.")]
SearchOption = Annotated[str | None, typer.Option("--search", help="Words, all of which must be found.")]
UserOption = Annotated[str | None, typer.Option("--user", help="Those of this user.")]
ArchivedOption = Annotated[
    bool | None, typer.Option("--archived/--not-archived", help="Only those put away, or only the others.")
]
AsOfOption = Annotated[str | None, typer.Option("--as-of", help=f"As it was then. {AS_OF_HELP}")]
IdsOption = Annotated[bool, typer.Option("--ids", help="Print nothing but the ids, for `xargs` and its like.")]
ReasonOption = Annotated[str | None, typer.Option(help="Why, for the record.")]
FromScratchOption = Annotated[bool, typer.Option("--from-scratch", help="Do finished steps once more, too.")]


def parse_id(text: str, kind: str) -> str:
    """Return the id of a job or batch (`kind`) as it was typed.

    Raises:
        ConfigurationError: it can be none.
    """
    if not re.fullmatch(rf"{kind}-[A-Za-z0-9_-]+", text):
        raise ConfigurationError(f"{text!r} is no id of a {kind}: expected one that begins with {kind}-.")
    return text


def list_query(user: str | None, search: str | None, archived: bool | None, *, oldest_first: bool) -> Document:
    """Return the query parameters that lists of jobs and of batches both have."""
    put_away = None if archived is None else str(archived).lower()
    sort = "created_at" if oldest_first else "-created_at"
    return {"user_id": user, "q": search or None, "archived": put_away, "sort": sort}


def parse_time_option(text: str | None, option: str) -> str | None:
    """Return a time as the API wants it: with its offset from UTC."""
    if text is None:
        return None
    try:
        return parse_timestamp(text).isoformat()
    except ValueError as error:
        raise ConfigurationError(f"{option} {text}: {error}") from None


def restart_body(reason: str | None, *, from_scratch: bool) -> Document:
    """Return the body of a restart."""
    return {**without_none({"reason": reason}), "reuse_steps": not from_scratch}


async def fetch_list(url: str, path: str, field: str, query: Document, limit: int) -> tuple[list[Document], str]:
    """Return the first of what fits, page by page, and how many there are in words.

    Raises:
        Refused, ConfigurationError, LedgerUnavailable: as `content_of` and `api_at`.
    """
    found: list[Document] = []
    cursor: str | None = None
    async with open_client(url) as client:
        while True:
            asked = without_none({**query, "cursor": cursor, "limit": min(_PAGE, limit - len(found))})
            content = parse_response(await client.get(path, params=asked), field, "total")
            found += content[field]
            cursor = content.get("next_cursor")
            if cursor is None or len(found) >= limit:
                more = "more than " if content.get("total_is_lower_bound") else ""
                return found, f"{more}{content['total']}"


async def fetch_one(url: str, path: str, kind: str, name: str, as_of: str | None) -> Document:
    """Return the job or batch (`kind`) of this name.

    Raises:
        Refused, ConfigurationError, LedgerUnavailable: as `content_of` and `api_at`.
    """
    then = None if as_of is None else str(parse_as_of(as_of, "--as-of"))
    async with open_client(url) as client:
        found: Document = parse_response(
            await client.get(f"{path}/{name}", params=without_none({"as_of": then})), kind
        )[kind]
    return found


def run_action(
    url: str,
    path: str,
    ids: Sequence[str],
    action: str,
    body: Document,
    required_fields: Sequence[str],
    format_result: Callable[[Document], Text],
    *,
    as_json: bool,
) -> None:
    """Do something to one after the other; what is refused does not keep the rest back, but is told, and in the end."""
    console = SafeConsole()
    todo = list(dict.fromkeys(ids))
    answers: list[Document] = []
    refusals = 0

    async def ask(client: httpx.AsyncClient, name: str) -> Document:
        """Ask, as slowly as the API wants it."""
        while True:
            answer = await client.post(f"{path}/{name}/{action}", json=body)
            if answer.status_code != _TOO_FAST:
                return parse_response(answer, *required_fields)
            await asyncio.sleep(retry_delay(answer))

    async def ask_all() -> None:
        nonlocal refusals
        async with open_client(url) as client:
            while todo:
                try:
                    answer = await ask(client, todo[0])
                except RequestRejected as refused:
                    refusals += 1
                    answers.append({"id": todo[0], "error": str(refused)})
                    echo(f"{todo[0]}: {refused}", err=True)
                else:
                    answers.append({"id": todo[0], **{key: it for key, it in answer.items() if key != "status"}})
                    refusals += answer.get("jobs", {}).get("rejected", 0)
                    if not as_json:
                        console.print(format_result(answer), highlight=False, soft_wrap=True)
                    for job in answer.get("rejections", ()):
                        echo(f"{job['job_id']}: {job['message']}", err=True)
                del todo[0]

    try:
        asyncio.run(ask_all())
    finally:
        if as_json:
            print_json(answers)
        if todo:
            echo(f"not done, or not known to be done: {' '.join(todo)}", err=True)
    raise typer.Exit(EXIT_FAILED if refusals else 0)


def print_list(found: Sequence[Document], total: str, rows: RowFormatter, *, ids: str | None, as_json: bool) -> None:
    """Print a page as a table, as JSON, or the values of `ids` alone; with a note beside it if there is more."""
    if (as_json or ids is not None) and total != str(len(found)):
        echo(f"note: these are {len(found)} of {total}; --limit tells how many to show", err=True)
    if as_json:
        print_json(found)
    elif ids is not None:
        for it in found:
            echo(it[ids])
    elif found:
        _print_table(list(rows(found)))
        echo(f"{len(found)} of {total}")
    else:
        echo("There are none.")


def _print_table(rows: Sequence[Sequence[str | Text]]) -> None:
    """Ids are never cut, for they are what one copies; on a terminal other texts are, and longer lines are wrapped."""
    console = SafeConsole()
    cells = [[Text(escape_line(cell)) if isinstance(cell, str) else cell for cell in row] for row in rows]
    for row in cells:
        for cell in row if console.is_terminal else ():
            cell.truncate(_LONGEST_CELL, overflow="ellipsis")
    widths = [max(cell.cell_len for cell in column) for column in zip(*cells, strict=True)]
    cells[0] = [Text(cell.plain, style="bold") for cell in cells[0]]
    for row in cells:
        for cell, width in zip(row[:-1], widths, strict=False):
            cell.pad_right(width - cell.cell_len)
        console.print(Text("  ").join(row), highlight=False, soft_wrap=True)


def print_details(title: str, status: Text, facts: Iterator[tuple[str, str]]) -> None:
    """Print a card: what it is, how it stands, and a line for each fact."""
    console = SafeConsole()
    console.print(Text.assemble((escape_line(title), "bold"), status), highlight=False, soft_wrap=True)
    last = ""
    for name, fact in facts:
        line = Text.assemble((f"  {name if name != last else '':<11}", "dim"), escape_line(fact))
        console.print(line, highlight=False, soft_wrap=True)
        last = name


def print_json(content: Any) -> None:
    """Print for programs."""
    echo_json(orjson.dumps(content))


def format_iso_timestamp(text: str) -> str:
    """Return a time of the API as it is on the clocks here, with its offset; other text as it is."""
    try:
        return format_timestamp(datetime.fromisoformat(text), "seconds")
    except ValueError:
        return text


def format_elapsed(begin: str | None, end: str) -> str:
    """Return `, after 3 min 5 s`, or nothing if it has not begun."""
    if begin is None:
        return ""
    return f", after {format_duration((datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds())}"
