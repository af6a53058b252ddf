"""Shared by `jobledger jobs …`, `batches …` and `webhooks …`: options, lists, details and actions over HTTP."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import httpx
import typer
from rich.text import Text

from jobledger.cli.command_classes import CommandApp, use_options
from jobledger.cli.commands.api_client import (
    RequestRejected,
    RetrySchedule,
    open_client,
    parse_response,
    remove_none,
)
from jobledger.cli.commands.options import (
    AS_OF_HELP,
    DEFAULT_URL,
    DryRunOption,
    JsonOption,
    TimeoutOption,
    UrlOption,
    YesOption,
    parse_as_of,
    parse_duration,
)
from jobledger.cli.exit_codes import EXIT_FAILED, EXIT_UNAVAILABLE
from jobledger.cli.output.documents import Document, Output, Rows, build_output
from jobledger.cli.output.errors import with_hint
from jobledger.cli.output.formatting import format_age, format_count, format_duration, format_timestamp
from jobledger.cli.output.terminal_text import SafeConsole, echo, escape_line, print_json
from jobledger.ledger.domain.errors import ConfigurationError, LedgerUnavailable

_PAGE_SIZE: Final = 500
_MIN_PREFIX_CHARACTERS: Final = 8
_MAX_WAIT_SECONDS: Final = 30
"""How long one request waits. Less than the timeout of the client."""
_OUTAGE_SECONDS: Final = 60.0
"""How long a command that waits continues while the API does not respond."""
_STATUS_STYLES: Final = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "processing": "cyan",
    "partial": "yellow",
    "delivered": "green",
    "abandoned": "red",
}
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="Maximum number of results")]
OldestFirstOption = Annotated[bool, typer.Option("--oldest-first", help="Sort oldest first (default: newest)")]
AsOfOption = Annotated[str | None, typer.Option("--as-of", help=f"Show the state at this point. {AS_OF_HELP}")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="ID, or its unique beginning")]
IdsArgument = Annotated[list[str], typer.Argument(metavar="ID", help="IDs, or their unique beginnings")]
OptionalIdsArgument = Annotated[list[str] | None, typer.Argument(metavar="ID", help="IDs, or their unique beginnings")]
ReasonOption = Annotated[str | None, typer.Option(help="Reason, recorded in the log")]
FromScratchOption = Annotated[bool, typer.Option("--from-scratch", help="Repeat all completed steps")]
FileOption = Annotated[
    Path | None, typer.Option("--to", help="File to write. Default: ID.zip. Use - for standard output")
]


@dataclass(frozen=True, slots=True)
class Resource:
    """Jobs or batches: where the API has them, and how the commands print them.

    Attributes:
        kind: `job` or `batch`, which is also the prefix of IDs.
        plural: The name in commands and URLs.
        format_name: Returns the name of a job or batch.
        build_rows: Returns the table of a list, and takes how it is printed.
        list_details: Yields the labels and values that `get` prints, and takes the URL of the API.
    """

    kind: str
    plural: str
    format_name: Callable[[Document], str]
    build_rows: Callable[[Sequence[Document], Output], Rows]
    list_details: Callable[[Document, str], Iterable[tuple[str, str]]]

    @property
    def path(self) -> str:
        return f"/api/events/{self.plural}"

    @property
    def id_field(self) -> str:
        return f"{self.kind}_id"

    def parse_id(self, text: str) -> str:
        """Return the ID, or the beginning of an ID, in `text`. The prefix `job-` or `batch-` may be missing.

        Raises:
            ConfigurationError: `text` cannot be the ID of such a resource.
        """
        if re.fullmatch(rf"{self.kind}-[A-Za-z0-9_-]{{1,180}}", text):
            return text
        if re.fullmatch(rf"[0-9a-f]{{{_MIN_PREFIX_CHARACTERS},24}}", text):
            return f"{self.kind}-{text}"
        for kind, plural in (("job", "jobs"), ("batch", "batches")):
            if text.startswith(f"{kind}-") and kind != self.kind:
                raise with_hint(ConfigurationError(f"{text} is a {kind} ID."), f"Use `jobledger {plural}`.")
        error = ConfigurationError(f"{text!r} is not a {self.kind} ID (they start with {self.kind}-).")
        raise with_hint(error, f"List {self.plural} with `jobledger {self.plural} ls`.")

    def resolve_id(self, client: httpx.Client, text: str) -> str:
        """Return the ID that begins with `text`.

        Raises:
            ConfigurationError: `text` cannot be an ID, or several IDs begin with it.
            RequestRejected: No ID begins with it.
        """
        prefix = self.parse_id(text)
        digits = len(prefix) - len(self.kind) - 1
        if not _MIN_PREFIX_CHARACTERS <= digits < 24 or re.search(r"-.*[^0-9a-f]", prefix):
            return prefix
        response = client.get(self.path, params={"id_prefix": prefix, "limit": 2})
        found = [document[self.id_field] for document in parse_response(response, self.plural)[self.plural]]
        if len(found) == 1:
            return str(found[0])
        if found:
            error = ConfigurationError(f"{prefix} is the beginning of several {self.kind} IDs.")
            raise with_hint(error, f"For example {found[0]} and {found[1]}. Use more characters.")
        raise build_not_found_error(self, prefix)

    def resolve_ids(self, client: httpx.Client, texts: Sequence[str]) -> list[str]:
        """Return the IDs that begin with the texts, each once. See `resolve_id`."""
        for text in texts:
            self.parse_id(text)  # all are checked before the first request
        return list(dict.fromkeys(self.resolve_id(client, text) for text in texts))

    def load(self, client: httpx.Client, resource_id: str, **query: Any) -> Document:
        """Return a job or batch.

        Raises:
            RequestRejected: It does not exist.
        """
        response = client.get(f"{self.path}/{resource_id}", params=remove_none(query))
        document: Document = parse_response(response, self.kind)[self.kind]
        return document

    def print_list(self, url: str, query: Document, limit: int, output: Output) -> None:
        """Fetch and print a list."""
        documents, total = fetch_list(url, self.path, self.plural, query, limit)
        print_list(
            documents,
            total,
            lambda found: self.build_rows(found, output),
            output,
            plural=self.plural,
            id_field=self.id_field,
        )

    def print_documents(self, documents: Sequence[Document], url: str, output: Output) -> None:
        """Print jobs or batches with their details, as a table, or as data."""
        if output.is_data:
            output.print_document(documents[0] if len(documents) == 1 else list(documents))
        elif output.format is not None:
            rows = self.build_rows
            output.print_list(documents, lambda found: rows(found, output), id_field=self.id_field, empty_text="")
        else:
            for document in documents:
                details = self.list_details(document, url)
                print_details(f"{document[self.id_field]}  ", format_status(document), details)

    def run_action(self, url: str, ids: Sequence[str], action: str, body: Document, *, as_json: bool) -> None:
        """Run an action on one resource after the other.

        A rejected request does not stop the others. It is printed and makes the command fail.

        Raises:
            typer.Exit: Always, with the exit code.
        """
        with open_client(url) as client:
            run_for_each(
                self.resolve_ids(client, ids),
                lambda resource_id: self.post_action(client, resource_id, action, body),
                self._print_result,
                as_json=as_json,
            )

    def delete(self, url: str, ids: Sequence[str], *, yes: bool, as_json: bool) -> None:
        """Delete one resource after the other, after a confirmation. As `run_action`.

        Raises:
            ConfigurationError, typer.Exit: As `confirm` and `run_action`.
        """
        with open_client(url) as client:
            found_ids = self.resolve_ids(client, ids)
            confirm(f"Delete {format_count(len(found_ids), self.kind, self.plural)} and all files?", yes=yes)

            def send_delete(resource_id: str) -> Document:
                parse_response(send(client, "DELETE", f"{self.path}/{resource_id}"))
                return {self.id_field: resource_id, "deleted": True}

            def print_deleted(result: Document) -> None:
                echo(f"{result[self.id_field]} is deleted")

            run_for_each(found_ids, send_delete, print_deleted, as_json=as_json)

    def post_action(
        self, client: httpx.Client, resource_id: str, action: str, body: Document, *, etag: str | None = None
    ) -> Document:
        """Send the request of an action, and return the response."""
        headers = {} if etag is None else {"If-Match": etag}
        response = send(client, "POST", f"{self.path}/{resource_id}/{action}", json=body, headers=headers)
        result = parse_response(response, self.id_field, self.kind)
        return {name: value for name, value in result.items() if name != "status"}

    def _print_result(self, result: Document) -> None:
        if (jobs := result.get("jobs")) is not None:
            echo(f"{result[self.id_field]}: {jobs['changed']} of {jobs['total']} jobs changed")
        else:
            line = Text.assemble(result[self.id_field], " is ", format_status(result[self.kind]))
            SafeConsole().print(line, soft_wrap=True)


def build_not_found_error(resource: Resource, resource_id: str) -> RequestRejected:
    """Return the error for an ID that does not exist."""
    error = RequestRejected(f"{resource.kind.capitalize()} {resource_id} not found.")
    return with_hint(error, f"List {resource.plural} with `jobledger {resource.plural} ls`.")


def send(
    client: httpx.Client, method: str, path: str, *, headers: Mapping[str, str] | None = None, **options: Any
) -> httpx.Response:
    """Send a request. Wait and retry while the API limits the rate, and after a lost response."""
    schedule = RetrySchedule(is_repeatable=method != "DELETE")  # a repeated deletion would find nothing
    sent_headers = {**(schedule.headers if method == "POST" else {}), **(headers or {})}
    while True:
        try:
            response = client.request(method, path, headers=sent_headers, **options)
        except httpx.HTTPError as error:
            if (delay := schedule.next_delay(error)) is None:
                raise
        else:
            if (delay := schedule.next_delay(response)) is None:
                return response
        time.sleep(delay)


def run_for_each(
    ids: list[str], run: Callable[[str], Document], print_result: Callable[[Document], None], *, as_json: bool
) -> None:
    """Run a function for each ID. A rejected request does not stop the others; it makes the command fail.

    Raises:
        typer.Exit: Always, with the exit code.
    """
    pending_ids, results, rejected = ids, list[Document](), 0
    try:
        while pending_ids:
            try:
                result = run(pending_ids[0])
            except RequestRejected as error:
                rejected += 1
                results.append({"id": pending_ids[0], "error": str(error)})
                echo(f"{pending_ids[0]}: {error}", err=True)
            else:
                rejected += result.get("jobs", {}).get("rejected", 0)
                results.append({"id": pending_ids[0], **result})
                if not as_json:
                    print_result(result)
                print_rejections(result)
            del pending_ids[0]
    finally:
        if as_json:
            print_json(results)
        if pending_ids:
            echo(f"not processed, or result unknown: {' '.join(pending_ids)}", err=True)
    raise typer.Exit(EXIT_FAILED if rejected else 0)


def print_rejections(result: Document) -> None:
    """Print the jobs that rejected an action on many jobs."""
    for job in result.get("rejections", ()):
        echo(f"{job['job_id']}: {job['message']}", err=True)


def confirm(question: str, *, yes: bool) -> None:
    """Ask whether to continue, unless the user has agreed by an option.

    Raises:
        ConfigurationError: The user cannot be asked, because standard input is not a terminal.
        typer.Exit: The answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        error = ConfigurationError(f"{escape_line(question)} Standard input is not a terminal, so nobody can answer.")
        raise with_hint(error, "Add --yes to continue, or --dry-run to see the jobs.")
    if not typer.confirm(escape_line(question), err=True):
        raise typer.Exit(EXIT_FAILED)


def add_get_command(app: CommandApp, resource: Resource, help_text: str) -> None:
    """Add the command `get`."""

    @use_options(output=build_output)
    def get(ids: IdsArgument, output: Any, as_of: AsOfOption = None, url: UrlOption = DEFAULT_URL) -> None:
        point = None if as_of is None else str(parse_as_of(as_of, "--as-of"))
        with open_client(url) as client:
            documents = [
                resource.load(client, resource_id, as_of=point) for resource_id in resource.resolve_ids(client, ids)
            ]
        resource.print_documents(documents, url, output)

    app.command("get", help=help_text)(get)


def add_action_command(app: CommandApp, resource: Resource, action: str, help_text: str) -> None:
    """Add a command that runs an action without options on several resources."""

    def run(
        ids: IdsArgument, reason: ReasonOption = None, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False
    ) -> None:
        resource.run_action(url, ids, action, remove_none({"reason": reason}), as_json=as_json)

    app.command(action, help=help_text)(run)


def add_bulk_command(
    app: CommandApp, resource: Resource, build_filters: Callable[..., Document], action: str, help_text: str
) -> None:
    """Add a command that runs an action on jobs by ID, or on all jobs that match filters."""

    @use_options(filters=build_filters)
    def run(
        filters: Any,
        ids: OptionalIdsArgument = None,
        reason: ReasonOption = None,
        dry_run: DryRunOption = False,
        yes: YesOption = False,
        url: UrlOption = DEFAULT_URL,
        as_json: JsonOption = False,
    ) -> None:
        body = remove_none({"reason": reason})
        if ids and not dry_run and not filters:
            resource.run_action(url, ids, action, body, as_json=as_json)
        else:
            run_bulk(resource, url, ids, filters, {"action": action, **body}, dry_run=dry_run, yes=yes, as_json=as_json)

    app.command(action, help=help_text)(run)


def run_bulk(
    resource: Resource,
    url: str,
    ids: Sequence[str] | None,
    filters: Document,
    body: Document,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    verb: str | None = None,
) -> None:
    """Run an action on all jobs that match filters, in one request. With IDs, only show the jobs.

    Args:
        body: The other fields of the request, with `action`.
        verb: What the command is called, if that is not the action.

    Raises:
        ConfigurationError: There are IDs and filters, or neither.
        typer.Exit: Always, with the exit code.
    """
    if ids and filters:
        raise ConfigurationError("IDs and filters cannot be combined: use one of them.")
    if not ids and not filters:
        error = ConfigurationError(f"Which {resource.plural}? Expected IDs, or filters such as --batch ID.")
        raise with_hint(error, "--dry-run shows the jobs that match filters.")
    with open_client(url) as client:
        if ids:
            documents = [resource.load(client, resource_id) for resource_id in resource.resolve_ids(client, ids)]
            output = Output("json" if as_json else None)
            rows = resource.build_rows
            output.print_list(documents, lambda found: rows(found, output), id_field=resource.id_field, empty_text="")
            raise typer.Exit
        path, request = f"{resource.path}/bulk", {**body, "filters": filters}
        if dry_run or not yes:
            preview = _post_until_done(client, path, {**request, "dry_run": True})
            count = preview["jobs"]["changed"]
            if dry_run:
                raise _print_bulk_result(preview, "would change", as_json=as_json)
            confirm(f"{(verb or body['action']).capitalize()} {format_count(count, 'job')}?", yes=yes or not count)
            request["position"] = preview["position"]
        result = _post_until_done(client, path, request)
    raise _print_bulk_result(result, "changed", as_json=as_json)


def _post_until_done(client: httpx.Client, path: str, request: Document) -> Document:
    """Send a request for many jobs, and continue it until no job is left. Return the sums of the responses."""
    result: Document = {
        "dry_run": request.get("dry_run", False),
        "jobs": Counter[str](),
        "rejections": [],
        "job_ids": [],
    }
    while True:
        part = parse_response(send(client, "POST", path, json=request), "jobs", "position")
        result["jobs"].update(part["jobs"])
        for name in ("rejections", "job_ids"):
            result[name] += part[name]
        result["position"] = part["position"]
        if (cursor := part.get("next_cursor")) is None:
            return result
        request = {**request, "cursor": cursor, "position": part["position"]}


def _print_bulk_result(result: Document, verb: str, *, as_json: bool) -> typer.Exit:
    """Print what an action on many jobs changed, or would change. Return the exit of the command."""
    counts = result["jobs"]
    if as_json:
        print_json(result)
    else:
        if result["dry_run"]:
            for job_id in result["job_ids"]:
                echo(job_id)
        echo(f"{counts['changed']} of {format_count(counts['total'], 'matching job')} {verb}")
    print_rejections(result)
    return typer.Exit(EXIT_FAILED if counts["rejected"] and not result["dry_run"] else 0)


def add_wait_command(app: CommandApp, resource: Resource, help_text: str) -> None:
    """Add the command `wait`."""

    def wait(
        ids: IdsArgument, timeout: TimeoutOption = None, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False
    ) -> None:
        limit = None if timeout is None else parse_duration(timeout, "--timeout").total_seconds()
        deadline = None if limit is None else time.monotonic() + limit
        documents: list[Document] = []
        pending: list[str] = []
        with open_client(url) as client:
            for resource_id in resource.resolve_ids(client, ids):
                document = _wait_until_finished(client, resource, resource_id, deadline)
                if is_finished(document):
                    documents.append(document)
                else:
                    pending.append(resource_id)
                if not as_json:
                    _print_finished(resource, document)
        if as_json:
            print_json(documents)
        if pending:
            echo(f"error: not finished after {timeout}: {' '.join(pending)}", err=True)
            raise typer.Exit(EXIT_UNAVAILABLE)
        raise typer.Exit(0 if all(document["status"] == "completed" for document in documents) else EXIT_FAILED)

    app.command("wait", help=help_text)(wait)


def is_finished(document: Document) -> bool:
    """Return whether a job or batch has ended."""
    return document["status"] not in ("pending", "processing")


def _wait_until_finished(
    client: httpx.Client, resource: Resource, resource_id: str, deadline: float | None
) -> Document:
    """Return a job or batch when it has ended, or when the time is over. Continue after short outages of the API."""
    lost_at: float | None = None
    while True:
        left = _MAX_WAIT_SECONDS if deadline is None else max(0, min(_MAX_WAIT_SECONDS, deadline - time.monotonic()))
        asked_at = time.monotonic()
        try:
            headers = {"Prefer": f"wait={round(left)}"} if round(left) else {}
            response = send(client, "GET", f"{resource.path}/{resource_id}", headers=headers)
            document: Document = parse_response(response, resource.kind)[resource.kind]
            lost_at = None
            if is_finished(document) or (deadline is not None and time.monotonic() >= deadline):
                return document
        except (LedgerUnavailable, httpx.HTTPError):
            lost_at = lost_at or asked_at
            if time.monotonic() - lost_at > _OUTAGE_SECONDS or (deadline is not None and asked_at >= deadline):
                raise
        pause = 1 - (time.monotonic() - asked_at)  # the API may not have waited, because too many requests wait
        if deadline is not None:
            pause = min(pause, deadline - time.monotonic())
        time.sleep(max(0.0, pause))


def _print_finished(resource: Resource, document: Document) -> None:
    error = document.get("error")
    detail = f": {error['code']}: {error['message']}" if error and document["status"] == "failed" else ""
    line = Text.assemble(document[resource.id_field], " is ", format_status(document), escape_line(detail))
    SafeConsole().print(line, soft_wrap=True)


def add_export_command(app: CommandApp, resource: Resource, help_text: str) -> None:
    """Add the command `export`."""

    def export(resource_id: IdArgument, to: FileOption = None, url: UrlOption = DEFAULT_URL) -> None:
        with open_client(url) as client:
            found_id = resource.resolve_id(client, resource_id)
            path = to or Path(f"{found_id}.zip")
            with client.stream("GET", f"{resource.path}/{found_id}/download-archive") as response:
                if response.is_error:
                    response.read()
                    parse_response(response)
                size = _save(response, path)
        if str(path) != "-":
            echo(f"{path}: {size:,} bytes")

    app.command("export", help=help_text)(export)


def _save(response: httpx.Response, path: Path) -> int:
    """Write the content of a response to a file, or to standard output. A failed download leaves no file."""
    size = 0
    if str(path) == "-":
        for chunk in response.iter_bytes():
            size += sys.stdout.buffer.write(chunk)
        return size
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            for chunk in response.iter_bytes():
                size += file.write(chunk)
        part.replace(path)
    except OSError as error:
        raise RequestRejected(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return size


def build_list_query(user: str | None, search: str | None, archived: bool | None) -> Document:
    """Return the query parameters that the lists of jobs and batches share."""
    return remove_none(
        {
            "user_id": user,
            "q": search or None,
            "archived": archived,
        }
    )


def build_sort(*, oldest_first: bool) -> Document:
    """Return the query parameter of the order."""
    return {"sort": "created_at" if oldest_first else "-created_at"}


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
            page = parse_response(send(client, "GET", path, params=page_query), field, "total")
            results += page[field]
            cursor = page.get("next_cursor")
            if cursor is None or len(results) >= limit:
                prefix = "more than " if page.get("total_is_lower_bound") else ""
                return results, f"{prefix}{page['total']}"


def print_list(
    results: Sequence[Document],
    total: str,
    build_rows: Callable[[Sequence[Document]], Rows],
    output: Output,
    *,
    plural: str,
    id_field: str,
) -> None:
    """Print a list of the API, and on standard error a note if it is not complete.

    Args:
        results: Documents of the API.
        total: Number of all matches, as text.
        build_rows: Returns header and rows.
        output: How to print it.
        plural: What the list contains, for the message about an empty one.
        id_field: The field that `-o name` prints.
    """
    output.print_list(results, build_rows, id_field=id_field, empty_text=f"No {plural} match these filters.")
    if total != str(len(results)) and results:
        echo(f"note: showing {len(results)} of {total}; use --limit to get more", err=True)


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
    status = escape_line(document["status"])
    text = Text(status, style=_STATUS_STYLES.get(status, ""))
    if document.get("cancel_requested") and status == "processing":
        return text.append(",cancelling", style="yellow")
    return text.append(",paused", style="yellow") if document.get("paused") else text


def format_iso_timestamp(text: str) -> str:
    """Return a timestamp of the API in local time with its UTC offset. Other text is returned unchanged."""
    try:
        return format_timestamp(datetime.fromisoformat(text), "seconds")
    except ValueError:
        return text


def format_iso_age(text: str) -> str:
    """Return how long ago a timestamp of the API was."""
    return format_age((datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds())


def format_finish(document: Document, start_field: str) -> str:
    """Return when a job or batch has finished, and how long after `start_field` (unless that is null)."""
    elapsed = ""
    if document[start_field] is not None:
        start, end = (datetime.fromisoformat(document[name]) for name in (start_field, "completed_at"))
        elapsed = f", after {format_duration((end - start).total_seconds())}"
    return f"{format_iso_timestamp(document['completed_at'])}{elapsed}"
