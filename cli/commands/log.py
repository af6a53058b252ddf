"""`jobledger log …`: verify, export, import and read the log, directly on the database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import orjson
import typer
from rich.text import Text

from jobledger.cli.command_classes import CommandApp
from jobledger.cli.commands import log_state
from jobledger.cli.commands.options import AS_OF_HELP, LARGEST_POSITION, ConfigOption, JsonOption, parse_as_of
from jobledger.cli.exit_codes import EXIT_FAILED
from jobledger.cli.output.errors import find_similar, with_hint
from jobledger.cli.output.formatting import format_count
from jobledger.cli.output.progress import show_progress_bar
from jobledger.cli.output.terminal_text import SafeConsole, echo, echo_json, print_json, print_result
from jobledger.cli.runtime import open_configured_connection, run_with_database
from jobledger.ledger.domain.errors import (
    ConfigurationError,
    JobledgerError,
    LedgerUnavailable,
    NotFound,
    UnreadableEvent,
)

if TYPE_CHECKING:
    from jobledger.cli.administration.view_maintenance import ViewComparison
    from jobledger.ledger.mongo.connection import Connection
    from jobledger.ledger.store.export_file import ExportSummary

app = CommandApp(help="Read, verify, export and import the log (needs access to the database)")
app.command("state")(log_state.show_state)
_INTERNAL_FIELDS: Final = frozenset({"list_keys", "search_keys", "needs_reopen"})
"""Fields of views that serve queries only."""
FromOption = Annotated[int, typer.Option("--from", min=1, max=LARGEST_POSITION, help="First position")]
ToOption = Annotated[
    int | None,
    typer.Option("--to", min=1, max=LARGEST_POSITION, help="Last position. Default: the end of the log"),
]


@app.command()
def verify(
    config: ConfigOption = None,
    first: FromOption = 1,
    last: ToOption = None,
    expected_digest: Annotated[
        str | None,
        typer.Option(
            metavar="POSITION:DIGEST",
            help="Digest printed by an earlier verification. Fail if the log up to POSITION has changed",
        ),
    ] = None,
    views: Annotated[
        bool, typer.Option("--views/--no-views", help="Also compare the views, if the whole log is verified")
    ] = True,
    files: Annotated[
        bool, typer.Option("--files", help="Also read all result files and compare their digests")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Verify the hash chain of the log, and compare the views with it

    Exits with 1 and names the first damaged event, or the documents and files that differ.

    Examples:
        jobledger log verify
        jobledger log verify --files --json
    """
    from jobledger.cli.administration import view_maintenance
    from jobledger.ledger.store.event_store import EventStore
    from jobledger.ledger.store.verification import verify_log

    digest = view_maintenance.parse_digest(expected_digest) if expected_digest is not None else None
    if digest is not None and (first > 1 or (last is not None and last < digest[0])):
        raise ConfigurationError(
            f"--expected-digest covers all events up to position {digest[0]}: remove --from, and use no smaller --to."
        )
    comparison = verified_files = None
    with open_configured_connection(config) as (settings, connection):
        with show_progress_bar("verifying") as on_progress:
            result = run_with_database(
                connection,
                lambda db: verify_log(
                    EventStore(db),
                    after=first - 1,
                    up_to=last,
                    expected_digest=digest,
                    on_progress=lambda position, end: on_progress(position - first + 1, end - first + 1),
                ),
            )
        is_whole_log = first == 1 and last is None
        if views and is_whole_log and result.problem is None and result.events:
            comparison = _compare_views_if_permitted(connection)
        if files:
            with show_progress_bar("reading files") as on_file_progress:
                verified_files = run_with_database(
                    connection,
                    lambda db: view_maintenance.verify_result_files(settings, db, on_progress=on_file_progress),
                )
    lines = view_maintenance.format_verification(result)
    if comparison is not None:
        lines += view_maintenance.format_comparison(comparison)
    if verified_files is not None:
        lines += view_maintenance.format_file_verification(verified_files)
    print_result(view_maintenance.build_verification_json(result, comparison, verified_files), *lines, as_json=as_json)
    is_ok = result.problem is None and (comparison is None or not comparison.difference_count)
    is_ok = is_ok and (verified_files is None or verified_files.is_ok)
    raise typer.Exit(0 if is_ok else EXIT_FAILED)


def _compare_views_if_permitted(connection: Connection) -> ViewComparison | None:
    """Compare all views; return None if there are none yet, or if this MongoDB user must not write to shadow views."""
    from jobledger.cli.administration import view_maintenance
    from jobledger.ledger.mongo.connection import UNAUTHORIZED, get_server_error_code
    from jobledger.projections.engine.checkpoint import load_checkpoint

    try:
        if not run_with_database(connection, load_checkpoint)["position"]:
            return None
        with show_progress_bar("comparing views") as on_progress:
            return asyncio.run(view_maintenance.compare_views(connection, on_progress=on_progress))
    except JobledgerError as error:
        if UNAUTHORIZED not in (get_server_error_code(error), get_server_error_code(error.__cause__ or error)):
            raise
        echo("note: views were not compared, because this MongoDB user has no write access to views", err=True)
        return None


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write. A name that ends in .zst is compressed")],
    config: ConfigOption = None,
    first: FromOption = 1,
    last: ToOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export the log to a file, one JSON object per line

    Run an interrupted export again to continue it. The file contains no secrets and no result files:
    docs/how-to/backup.md.

    Examples:
        jobledger log export log.jsonl.zst
        jobledger log export part.jsonl --from 1 --to 2
    """
    from jobledger.ledger.store.event_store import EventStore
    from jobledger.ledger.store.export import export_log

    with open_configured_connection(config) as (_, connection), show_progress_bar("exporting") as on_progress:
        summary = run_with_database(
            connection,
            lambda db: export_log(EventStore(db), file, after=first - 1, up_to=last, on_progress=on_progress),
        )
    text = f"{file}: {format_count(summary.events, 'event')}, positions {summary.first} to {summary.last}."
    _print_summary(text, summary, as_json=as_json)


@app.command("import")
def import_(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Files written by `log export`, in the order of positions")
    ],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Import an exported log into an empty database, and build its views

    Each event is verified. The import is all or nothing. Run an interrupted import again to continue it.

    Examples:
        jobledger log import log.jsonl.zst --config restored.yaml
    """
    from jobledger.cli.administration.view_maintenance import rebuild_views
    from jobledger.ledger.store.import_ import import_log

    with open_configured_connection(config) as (_, connection):
        with show_progress_bar("importing") as on_progress:
            summary = run_with_database(connection, lambda db: import_log(db, files, on_progress=on_progress))
        with show_progress_bar("building views") as on_progress:
            asyncio.run(rebuild_views(connection, on_progress=on_progress))
    text = (
        f"Imported and verified {format_count(summary.events, 'event')} into {connection.db_name}, and built its views."
    )
    _print_summary(text, summary, as_json=as_json)


def _print_summary(text: str, summary: ExportSummary, *, as_json: bool) -> None:
    digest = f"{summary.last}:{summary.log_digest.hex()}" if summary.log_digest else None
    lines = [text] if digest is None else [text, f"Digest, for `log verify --expected-digest`: {digest}"]
    content = {"events": summary.events, "from": summary.first, "to": summary.last, "digest": digest}
    print_result(content, *lines, as_json=as_json)


StreamOption = Annotated[
    list[str] | None,
    typer.Option(help="Only events of this job, batch or delivery, and those it caused. Repeatable"),
]
EventTypeOption = Annotated[
    list[str] | None, typer.Option("--type", help="Only events of this type, e.g. JobFailed. Repeatable")
]
LinesOption = Annotated[
    int, typer.Option("--lines", "-n", min=0, max=100_000, help="Number of the newest matching events")
]
AfterOption = Annotated[
    int | None, typer.Option(min=0, max=LARGEST_POSITION, help="All matching events after this position")
]
JsonLinesOption = Annotated[bool, typer.Option("--json", help="Print one JSON object per event")]


@app.command("ls")
def list_events(
    config: ConfigOption = None,
    stream: StreamOption = None,
    event_type: EventTypeOption = None,
    lines: LinesOption = 20,
    after: AfterOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """List the newest events, the oldest of them first

    With filters, -n counts the events that match.

    Examples:
        jobledger log ls
        jobledger log ls --type JobFailed --type JobLeaseExpired -n 5
        jobledger log ls --stream batch-6b0c8f1ab6b8bd45b167cb41 --json
    """
    _print_events(config, EventFilter.from_options(event_type, stream), lines, after, follow=False, as_json=as_json)


@app.command("follow")
def follow_events(
    config: ConfigOption = None,
    stream: StreamOption = None,
    event_type: EventTypeOption = None,
    lines: LinesOption = 10,
    after: AfterOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """Print the newest events, and new ones until Ctrl-C

    Reconnects after a restart of the database or Jobledger.

    Examples:
        jobledger log follow
        jobledger log follow --type JobFailed -n 0 --json
    """
    _print_events(config, EventFilter.from_options(event_type, stream), lines, after, follow=True, as_json=as_json)


@dataclass(frozen=True, slots=True)
class EventFilter:
    """The events to print. Empty sets match all."""

    types: frozenset[str]
    streams: frozenset[str]

    @classmethod
    def from_options(cls, types: Sequence[str] | None, streams: Sequence[str] | None) -> EventFilter:
        """Return the filter of command options.

        Raises:
            ConfigurationError: A type does not exist.
        """
        _check_event_types(types or ())
        return cls(frozenset(types or ()), frozenset(streams or ()))

    def matches(self, event: Any) -> bool:
        """Return whether an event is to be printed."""
        if self.streams and self.streams.isdisjoint((event.stream, event.meta.correlation_id)):
            return False
        return not self.types or event.type in self.types


def _print_events(
    config: Path | None, event_filter: EventFilter, lines: int, after: int | None, *, follow: bool, as_json: bool
) -> None:
    with open_configured_connection(config) as (_, connection):
        asyncio.run(_read_events(connection, event_filter, lines, after, follow=follow, as_json=as_json))


def _check_event_types(names: Sequence[str]) -> None:
    from jobledger.ledger.domain.events import BATCH_EVENTS, DELIVERY_EVENTS, JOB_EVENTS

    event_types = sorted({event.__name__ for event in (*JOB_EVENTS, *BATCH_EVENTS, *DELIVERY_EVENTS)})
    for name in names:
        if name not in event_types:
            error = ConfigurationError(f"--type {name}: unknown event type.")
            similar = find_similar(name, event_types)
            hints = [f"Did you mean {similar}?"] if similar else []
            raise with_hint(error, *hints, f"Event types: {', '.join(event_types)}.")


def _create_event_printer(*, as_json: bool) -> Callable[[Any], None]:
    """Return a function that prints an event."""
    from jobledger.cli.output.formatting import format_event
    from jobledger.ledger.store.export_file import encode_event_or_stub

    console = SafeConsole(soft_wrap=True)

    def print_event(event: Any) -> None:
        if as_json:
            echo_json(encode_event_or_stub(event.document))
        else:
            console.print(format_event(event))

    return print_event


async def _read_events(
    connection: Connection,
    event_filter: EventFilter,
    lines: int,
    after: int | None,
    *,
    follow: bool,
    as_json: bool,
) -> None:
    """Print the newest events that match, or those after a position. Then perhaps follow the log."""
    from jobledger.ledger.store.event_store import EventStore
    from jobledger.ledger.subscriber import LedgerClient

    print_event = _create_event_printer(as_json=as_json)
    async with connection.create_client() as client:
        event_store = EventStore(client[connection.db_name])
        head = await event_store.read_head_position()
        position = head if after is None else after
        if after is None and lines:
            types, streams = event_filter.types, event_filter.streams
            for event in await event_store.read_newest(lines, up_to=head, types=types, streams=streams):
                print_event(event)
        while position < head and not follow and (page := await event_store.read(after=position)):
            for event in page:
                if event.position <= head and event_filter.matches(event):
                    print_event(event)
            position = page[-1].position
    subscriber = LedgerClient(connection)
    while follow:
        try:
            async with subscriber.subscribe(after=position) as events:
                async for event in events:
                    if event_filter.matches(event):
                        print_event(event)
                    position = event.position
        except LedgerUnavailable as error:
            echo(f"waiting for the database: {error}", err=True)
            await asyncio.sleep(1)


@app.command("history")
def show_history(
    stream: Annotated[str, typer.Argument(metavar="ID", help="ID of a job, batch or delivery")],
    config: ConfigOption = None,
    as_of: Annotated[str | None, typer.Option(help=f"Stop at this point. {AS_OF_HELP}")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show all events of a job, batch or delivery, with actor and state changes

    Examples:
        jobledger log history job-6b0c8f1ab6b8bd45b167cb42
        jobledger log history job-6b0c8f1ab6b8bd45b167cb42 --as-of 2026-02-01T09:30Z --json
    """
    from jobledger.cli.output.formatting import format_changes, format_event
    from jobledger.ledger.store.event_store import EventStore
    from jobledger.ledger.store.export_file import encode_event_or_stub
    from jobledger.projections.engine.as_of import build_as_of_filter
    from jobledger.projections.views import batches, deliveries, jobs

    limit = None if as_of is None else parse_as_of(as_of, "--as-of")
    with open_configured_connection(config) as (_, connection):
        events = run_with_database(connection, lambda db: EventStore(db).read_stream(stream))
    if not events:
        raise NotFound(f"{stream} is not in the log: expected the ID of a job, batch or delivery.")
    if limit is not None:
        events = list(filter(build_as_of_filter(limit), events))
    fold: Any = {"job": jobs.fold, "batch": batches.fold, "delivery": deliveries.fold}.get(stream.partition("-")[0])
    console = SafeConsole(soft_wrap=True)
    before: Any = None
    for event in events:
        after = _fold_or_keep(fold, before, event) if fold is not None else None
        if as_json:
            encoded = orjson.Fragment(encode_event_or_stub(event.document))
            state = after and {name: value for name, value in after.items() if name not in _INTERNAL_FIELDS}
            print_json({"event": encoded, "state": state})
        else:
            console.print(format_event(event, with_stream=False))
            if changes := format_changes(before, after):
                console.print(Text(f"{'':>9}{changes}", style="dim"), no_wrap=True, overflow="ellipsis")
        before = after
    if not events:
        echo(f"{stream} did not exist at that time.", err=True)


def _fold_or_keep(fold: Any, document: Any, event: Any) -> Any:
    """Return the document after an event. A damaged event leaves it unchanged."""
    try:
        return fold(document, event)
    except UnreadableEvent as error:
        echo(f"note: {error}", err=True)
        return document
