"""Shared by `jobledger jobs …`, `batches …` and `webhooks …`: options, lists, details and actions over HTTP."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final

import httpx
import typer
from rich.text import Text

from jobledger.cli.commands.api_client import (
    RequestRejected,
    compute_retry_delay,
    open_client,
    parse_response,
    remove_none,
)
from jobledger.cli.commands.options import AS_OF_HELP, DEFAULT_URL, JsonOption, UrlOption, parse_as_of
from jobledger.cli.exit_codes import EXIT_FAILED
from jobledger.cli.output.formatting import format_duration, format_timestamp
from jobledger.cli.output.terminal_text import SafeConsole, echo, escape_line, print_json, print_table
from jobledger.ledger.domain.errors import ConfigurationError

_PAGE_SIZE: Final = 500
_TOO_MANY_REQUESTS: Final = 429
_STATUS_STYLES: Final = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "processing": "cyan",
    "partial": "yellow",
    "delivered": "green",
    "abandoned": "red",
}
_MAX_CELL_CHARACTERS: Final = 50
"""Longer than the IDs, which users copy."""
Document = dict[str, Any]
Rows = Iterable[Sequence[str | Text]]
"""The header and the rows of a table."""
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="Maximum number of results")]
OldestFirstOption = Annotated[bool, typer.Option("--oldest-first", help="Sort oldest first (default: newest)")]
AsOfOption = Annotated[str | None, typer.Option("--as-of", help=f"Show the state at this point. {AS_OF_HELP}")]
IdsOption = Annotated[bool, typer.Option("--ids", help="Print IDs only, one per line")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="ID as printed by `list`")]
IdsArgument = Annotated[list[str], typer.Argument(metavar="ID", help="IDs as printed by `list --ids`")]
ReasonOption = Annotated[str | None, typer.Option(help="Reason, recorded in the log")]
FromScratchOption = Annotated[bool, typer.Option("--from-scratch", help="Repeat completed steps too")]


@dataclass(frozen=True, slots=True)
class Resource:
    """Jobs or batches: where the API has them, and how the commands print them.

    Attributes:
        kind: `job` or `batch`, which is also the prefix of IDs.
        plural: The name in commands and URLs.
        detail_header: Header of the last column of lists.
        format_name: Returns the name of a job or batch.
        format_detail: Returns the last column of lists.
        list_details: Yields the labels and values that `show` prints, and takes the URL of the API.
    """

    kind: str
    plural: str
    detail_header: str
    format_name: Callable[[Document], str]
    format_detail: Callable[[Document], str]
    list_details: Callable[[Document, str], Iterable[tuple[str, str]]]

    @property
    def path(self) -> str:
        return f"/api/events/{self.plural}"

    @property
    def id_field(self) -> str:
        return f"{self.kind}_id"

    def parse_id(self, text: str) -> str:
        """Return the ID in `text`.

        Raises:
            ConfigurationError: `text` cannot be the ID of such a resource.
        """
        if re.fullmatch(rf"{self.kind}-[A-Za-z0-9_-]+", text):
            return text
        for kind, plural in (("job", "jobs"), ("batch", "batches")):
            if text.startswith(f"{kind}-") and kind != self.kind:
                raise ConfigurationError(f"{text} is a {kind} ID: use `jobledger {plural}`.")
        raise ConfigurationError(f"{text!r} is not a {self.kind} ID (they start with {self.kind}-).")

    def format_rows(self, documents: Sequence[Document]) -> Rows:
        """Yield the header and the rows of a list."""
        yield (self.kind.upper(), "STATUS", "SUBMITTED", "NAME", self.detail_header)
        for document in documents:
            yield (
                document[self.id_field],
                format_status(document),
                format_iso_timestamp(document["created_at"]),
                self.format_name(document),
                self.format_detail(document),
            )

    def print_list(self, url: str, query: Document, limit: int, *, ids: bool, as_json: bool) -> None:
        """Fetch and print a list."""
        documents, total = fetch_list(url, self.path, self.plural, query, limit)
        id_field = self.id_field if ids else None
        print_list(documents, total, self.format_rows, plural=self.plural, id_field=id_field, as_json=as_json)

    def run_action(self, url: str, ids: Sequence[str], action: str, body: Document, *, as_json: bool) -> None:
        """Run an action on one resource after the other.

        A rejected request does not stop the others. It is printed and makes the command fail.

        Raises:
            typer.Exit: Always, with the exit code.
        """
        pending_ids = list(dict.fromkeys(map(self.parse_id, ids)))
        results: list[Document] = []
        rejected = 0
        try:
            with open_client(url) as client:
                while pending_ids:
                    try:
                        result = self._post_action(client, pending_ids[0], action, body)
                    except RequestRejected as error:
                        rejected += 1
                        results.append({"id": pending_ids[0], "error": str(error)})
                        echo(f"{pending_ids[0]}: {error}", err=True)
                    else:
                        rejected += result.get("jobs", {}).get("rejected", 0)
                        results.append({"id": pending_ids[0], **result})
                        if not as_json:
                            self._print_result(result)
                        for job in result.get("rejections", ()):
                            echo(f"{job['job_id']}: {job['message']}", err=True)
                    del pending_ids[0]
        finally:
            if as_json:
                print_json(results)
            if pending_ids:
                echo(f"not processed, or result unknown: {' '.join(pending_ids)}", err=True)
        raise typer.Exit(EXIT_FAILED if rejected else 0)

    def _post_action(self, client: httpx.Client, resource_id: str, action: str, body: Document) -> Document:
        """Send the request. Wait and retry while the API limits the rate, or others change the resource."""
        while True:
            response = client.post(f"{self.path}/{resource_id}/{action}", json=body)
            if response.status_code != _TOO_MANY_REQUESTS:
                result = parse_response(response, self.id_field, self.kind)
                return {name: value for name, value in result.items() if name != "status"}
            time.sleep(compute_retry_delay(response))

    def _print_result(self, result: Document) -> None:
        if (jobs := result.get("jobs")) is not None:
            echo(f"{result[self.id_field]}: {jobs['changed']} of {jobs['total']} jobs changed")
        else:
            line = Text.assemble(result[self.id_field], " is ", format_status(result[self.kind]))
            SafeConsole().print(line, soft_wrap=True)


def add_show_command(app: typer.Typer, resource: Resource, help_text: str) -> None:
    """Add the command `show`."""

    def show(
        resource_id: IdArgument, as_of: AsOfOption = None, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False
    ) -> None:
        query = remove_none({"as_of": None if as_of is None else str(parse_as_of(as_of, "--as-of"))})
        path = f"{resource.path}/{resource.parse_id(resource_id)}"
        with open_client(url) as client:
            document = parse_response(client.get(path, params=query), resource.kind)[resource.kind]
        if as_json:
            print_json(document)
        else:
            details = resource.list_details(document, url)
            print_details(f"{document[resource.id_field]}  ", format_status(document), details)

    app.command("show", help=help_text)(show)


def add_action_command(app: typer.Typer, resource: Resource, action: str, help_text: str) -> None:
    """Add a command that runs an action without options on several resources."""

    def run(
        ids: IdsArgument, reason: ReasonOption = None, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False
    ) -> None:
        resource.run_action(url, ids, action, remove_none({"reason": reason}), as_json=as_json)

    app.command(action, help=help_text)(run)


def build_list_query(user: str | None, search: str | None, archived: bool | None, *, oldest_first: bool) -> Document:
    """Return the query parameters that the lists of jobs and batches share."""
    return {
        "user_id": user,
        "q": search or None,
        "archived": None if archived is None else str(archived).lower(),
        "sort": "created_at" if oldest_first else "-created_at",
    }


def build_restart_body(reason: str | None, *, from_scratch: bool) -> Document:
    """Return the request body of a restart."""
    return {**remove_none({"reason": reason}), "reuse_steps": not from_scratch}


def fetch_list(url: str, path: str, field: str, query: Document, limit: int) -> tuple[list[Document], str]:
    """Fetch the first `limit` results, page by page. Return them and the total as text.

    Raises:
        RequestRejected, ConfigurationError, LedgerUnavailable: See `parse_response` and `open_client`.
    """
    results: list[Document] = []
    cursor: str | None = None
    with open_client(url) as client:
        while True:
            page_query = remove_none({**query, "cursor": cursor, "limit": min(_PAGE_SIZE, limit - len(results))})
            page = parse_response(client.get(path, params=page_query), field, "total")
            results += page[field]
            cursor = page.get("next_cursor")
            if cursor is None or len(results) >= limit:
                prefix = "more than " if page.get("total_is_lower_bound") else ""
                return results, f"{prefix}{page['total']}"


def print_list(
    results: Sequence[Document],
    total: str,
    format_rows: Callable[[Sequence[Document]], Rows],
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
        print_table(format_rows(results), max_cell_length=_MAX_CELL_CHARACTERS)
        echo(f"{len(results)} of {total}")
    else:
        echo(f"No {plural} match these filters.")


def print_details(title: str, status: Text, details: Iterable[tuple[str, str]]) -> None:
    """Print a title with a status, then one line per detail. A label that repeats is printed once."""
    console = SafeConsole()
    console.print(Text.assemble((escape_line(title), "bold"), status), soft_wrap=True)
    previous = ""
    for label, value in details:
        line = Text.assemble((f"  {label if label != previous else '':<11}", "dim"), escape_line(value))
        console.print(line, soft_wrap=True)
        previous = label


def format_status(document: Document) -> Text:
    """Return the status of a job, batch or delivery in its color, and whether it is being cancelled or paused."""
    status = document["status"]
    text = Text(status, style=_STATUS_STYLES.get(status, ""))
    if document.get("cancel_requested") and status == "processing":
        return text.append(", cancelling", style="yellow")
    return text.append(", paused", style="yellow") if document.get("paused") else text


def format_iso_timestamp(text: str) -> str:
    """Return a timestamp of the API in local time with its UTC offset. Other text is returned unchanged."""
    try:
        return format_timestamp(datetime.fromisoformat(text), "seconds")
    except ValueError:
        return text


def format_finish(document: Document, start_field: str) -> str:
    """Return when a job or batch has finished, and how long after `start_field` (unless that is null)."""
    elapsed = ""
    if document[start_field] is not None:
        start, end = (datetime.fromisoformat(document[name]) for name in (start_field, "completed_at"))
        elapsed = f", after {format_duration((end - start).total_seconds())}"
    return f"{format_iso_timestamp(document['completed_at'])}{elapsed}"
