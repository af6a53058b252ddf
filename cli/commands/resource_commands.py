"""What `jobledger jobs …`, `batches …` and `webhooks …` share: lists, details, and actions on several resources."""

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
from jobledger.cli.exit_codes import EXIT_FAILED
from jobledger.cli.formatting import format_duration, format_timestamp
from jobledger.cli.options import AS_OF_HELP, parse_as_of
from jobledger.cli.terminal_text import SafeConsole, echo, echo_json, escape_line
from jobledger.ledger.domain.errors import ConfigurationError

_PAGE_SIZE: Final = 500
_TOO_MANY_REQUESTS: Final = 429
STATUS_STYLES: Final = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "processing": "cyan",
    "partial": "yellow",
    "delivered": "green",
    "abandoned": "red",
}
_MAX_CELL_CHARACTERS: Final = 50
Document = dict[str, Any]
RowFormatter = Callable[[Sequence[Document]], Iterable[Sequence[str | Text]]]
"""Returns the header and the rows of a table."""
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="Maximum number of results")]
OldestFirstOption = Annotated[bool, typer.Option("--oldest-first", help="Sort oldest first (default: newest)")]
SearchOption = Annotated[str | None, typer.Option("--search", help="Only results that contain all of these words")]
UserOption = Annotated[str | None, typer.Option("--user", help="Only of this user")]
ArchivedOption = Annotated[
    bool | None, typer.Option("--archived/--not-archived", help="Only archived (or only non-archived)")
]
AsOfOption = Annotated[str | None, typer.Option("--as-of", help=f"Show the state at this point. {AS_OF_HELP}")]
IdsOption = Annotated[bool, typer.Option("--ids", help="Print IDs only, one per line")]
ReasonOption = Annotated[str | None, typer.Option(help="Reason, recorded in the log")]
FromScratchOption = Annotated[bool, typer.Option("--from-scratch", help="Repeat completed steps too")]


def parse_id(text: str, kind: str) -> str:
    """Return the ID of a job or batch.

    Args:
        text: The argument.
        kind: "job" or "batch".

    Raises:
        ConfigurationError: `text` cannot be such an ID.
    """
    if not re.fullmatch(rf"{kind}-[A-Za-z0-9_-]+", text):
        raise ConfigurationError(f"{text!r} is not a {kind} ID (they start with {kind}-).")
    return text


def list_query(user: str | None, search: str | None, archived: bool | None, *, oldest_first: bool) -> Document:
    """Return the query parameters that the lists of jobs and batches share."""
    return {
        "user_id": user,
        "q": search or None,
        "archived": None if archived is None else str(archived).lower(),
        "sort": "created_at" if oldest_first else "-created_at",
    }


def restart_body(reason: str | None, *, from_scratch: bool) -> Document:
    """Return the request body of a restart."""
    return {**without_none({"reason": reason}), "reuse_steps": not from_scratch}


async def fetch_list(url: str, path: str, field: str, query: Document, limit: int) -> tuple[list[Document], str]:
    """Fetch the first `limit` results, page by page. Return them and the total as text.

    Raises:
        RequestRejected, ConfigurationError, LedgerUnavailable: see `parse_response` and `open_client`.
    """
    results: list[Document] = []
    cursor: str | None = None
    async with open_client(url) as client:
        while True:
            page_query = without_none({**query, "cursor": cursor, "limit": min(_PAGE_SIZE, limit - len(results))})
            page = parse_response(await client.get(path, params=page_query), field, "total")
            results += page[field]
            cursor = page.get("next_cursor")
            if cursor is None or len(results) >= limit:
                prefix = "more than " if page.get("total_is_lower_bound") else ""
                return results, f"{prefix}{page['total']}"


async def fetch_one(url: str, path: str, kind: str, resource_id: str, as_of: str | None) -> Document:
    """Fetch a job or batch.

    Raises:
        RequestRejected, ConfigurationError, LedgerUnavailable: see `parse_response` and `open_client`.
    """
    query = without_none({"as_of": None if as_of is None else str(parse_as_of(as_of, "--as-of"))})
    async with open_client(url) as client:
        response = await client.get(f"{path}/{resource_id}", params=query)
        resource: Document = parse_response(response, kind)[kind]
    return resource


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
    """Run an action on one resource after the other.

    A rejected request does not stop the others. It is printed and makes the command fail.

    Raises:
        typer.Exit: always, with the exit code.
    """
    console = SafeConsole()
    pending_ids = list(dict.fromkeys(ids))
    results: list[Document] = []
    rejected = 0

    async def post(client: httpx.AsyncClient, resource_id: str) -> Document:
        """Send the request; wait and retry while the API limits the rate."""
        while True:
            response = await client.post(f"{path}/{resource_id}/{action}", json=body)
            if response.status_code != _TOO_MANY_REQUESTS:
                return parse_response(response, *required_fields)
            await asyncio.sleep(retry_delay(response))

    async def post_all() -> None:
        nonlocal rejected
        async with open_client(url) as client:
            while pending_ids:
                resource_id = pending_ids[0]
                try:
                    result = await post(client, resource_id)
                except RequestRejected as error:
                    rejected += 1
                    results.append({"id": resource_id, "error": str(error)})
                    echo(f"{resource_id}: {error}", err=True)
                else:
                    fields = {name: value for name, value in result.items() if name != "status"}
                    results.append({"id": resource_id, **fields})
                    rejected += result.get("jobs", {}).get("rejected", 0)
                    if not as_json:
                        console.print(format_result(result), highlight=False, soft_wrap=True)
                    for job in result.get("rejections", ()):
                        echo(f"{job['job_id']}: {job['message']}", err=True)
                del pending_ids[0]

    try:
        asyncio.run(post_all())
    finally:
        if as_json:
            print_json(results)
        if pending_ids:
            echo(f"not processed, or result unknown: {' '.join(pending_ids)}", err=True)
    raise typer.Exit(EXIT_FAILED if rejected else 0)


def print_list(
    results: Sequence[Document],
    total: str,
    format_rows: RowFormatter,
    *,
    plural: str,
    id_field: str | None = None,
    as_json: bool,
) -> None:
    """Print a list as a table, as JSON, or only its IDs.

    Args:
        results: Documents of the API.
        total: Number of all matches, as text.
        format_rows: Returns header and rows.
        plural: What the list contains, for the message about an empty one.
        id_field: Print only this field of each result.
        as_json: Print JSON.
    """
    if (as_json or id_field is not None) and total != str(len(results)):
        echo(f"note: showing {len(results)} of {total}; use --limit to get more", err=True)
    if as_json:
        print_json(results)
    elif id_field is not None:
        for result in results:
            echo(result[id_field])
    elif results:
        _print_table(list(format_rows(results)))
        echo(f"{len(results)} of {total}")
    else:
        echo(f"No {plural} match these filters.")


def _print_table(rows: Sequence[Sequence[str | Text]]) -> None:
    """Print rows. On a terminal, long cells are truncated; IDs, which users copy, are shorter than the limit."""
    console = SafeConsole()
    cells = [[Text(escape_line(cell)) if isinstance(cell, str) else cell for cell in row] for row in rows]
    for row in cells:
        for cell in row if console.is_terminal else ():
            cell.truncate(_MAX_CELL_CHARACTERS, overflow="ellipsis")
    widths = [max(cell.cell_len for cell in column) for column in zip(*cells, strict=True)]
    cells[0] = [Text(cell.plain, style="bold") for cell in cells[0]]
    for row in cells:
        for cell, width in zip(row[:-1], widths, strict=False):
            cell.pad_right(width - cell.cell_len)
        console.print(Text("  ").join(row), highlight=False, soft_wrap=True)


def print_details(title: str, status: Text, details: Iterator[tuple[str, str]]) -> None:
    """Print a title with a status, then one line per detail. A label that repeats is printed once."""
    console = SafeConsole()
    console.print(Text.assemble((escape_line(title), "bold"), status), highlight=False, soft_wrap=True)
    previous = ""
    for label, value in details:
        line = Text.assemble((f"  {label if label != previous else '':<11}", "dim"), escape_line(value))
        console.print(line, highlight=False, soft_wrap=True)
        previous = label


def print_json(content: Any) -> None:
    """Print JSON."""
    echo_json(orjson.dumps(content))


def format_iso_timestamp(text: str) -> str:
    """Return a timestamp of the API in local time with its UTC offset. Other text is returned unchanged."""
    try:
        return format_timestamp(datetime.fromisoformat(text), "seconds")
    except ValueError:
        return text


def format_elapsed(begin: str | None, end: str) -> str:
    """Return the time between two timestamps of the API as `, after 3 min 5 s`. Empty if there is no begin."""
    if begin is None:
        return ""
    return f", after {format_duration((datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds())}"
