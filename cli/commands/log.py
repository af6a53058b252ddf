"""cli: `jobledger log …`: what auditors and the curious do with the log itself, directly on the database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from jobledger.cli.runtime import ConfigOption, JsonOption, load_settings, open_any_database_server
from jobledger.cli.terminal_text import SafeConsole, echo, echo_json
from jobledger.ledger.domain.errors import (
    ConfigurationError,
    JobledgerError,
    LedgerUnavailable,
    NotFound,
    UnreadableEvent,
)
from jobledger.ledger.domain.timestamps import EXAMPLE_TIMESTAMP, parse_timestamp

if TYPE_CHECKING:
    from jobledger.ledger.mongo.connection import Connection
    from jobledger.ledger.store import transfer

app = typer.Typer(help="Look into the log itself, directly on the database.", no_args_is_help=True)
EXIT_FAILED = 1
LARGEST_POSITION = 2**63 - 1  # `jobledger.ledger.store.event_store.LARGEST_POSITION`, without loading the driver
_LINE_EVERY_SECONDS = 5.0
FromOption = Annotated[int, typer.Option("--from", min=1, max=LARGEST_POSITION, help="Begin at this position.")]
ToOption = Annotated[
    int | None,
    typer.Option("--to", min=1, max=LARGEST_POSITION, help="End at this position. Without it: at the end."),
]
AS_OF_HELP = "A position of the log, or a time, such as 2026-02-01T09:30:00Z."


def parse_as_of(text: str, option: str) -> int | datetime:
    """Read a position of the log, or a time with its offset from UTC.

    Raises:
        ConfigurationError: it is neither.
    """
    if text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= LARGEST_POSITION:
        return int(text)
    if "-" not in text:
        raise ConfigurationError(
            f"{option} {text}: expected a position of the log, or a time such as {EXAMPLE_TIMESTAMP}"
        )
    try:
        return parse_timestamp(text)
    except ValueError as error:
        raise ConfigurationError(f"{option} {text}: {error}") from None


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal, and a line now and then where there is none; yields what is told how far it has got."""
    console = SafeConsole(stderr=True)
    if not console.is_terminal:
        last = time.monotonic()

        def tell(done: int, whole: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_EVERY_SECONDS:
                last = time.monotonic()
                echo(f"{title}: {done} of {whole}", err=True)

        yield tell
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("", total=None)
        yield lambda done, whole: shown.update(task, completed=done, total=whole)


@app.command()
def verify(
    config: ConfigOption = None,
    after: FromOption = 1,
    upto: ToOption = None,
    expected_digest: Annotated[
        str | None, typer.Option(help="POSITION:DIGEST, as an earlier verification printed it: it must still be so.")
    ] = None,
    views: Annotated[
        bool, typer.Option("--views/--no-views", help="Hold the views against the log, too, if all of it is checked.")
    ] = True,
    files: Annotated[
        bool, typer.Option("--files", help="Also read all result files and compare them with the digests on record.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check that the log still is what was written, and that the views say what it says.

    Exits with 1 and names the first event that is wrong, or the documents or files that are.
    """
    from jobledger.cli import view_maintenance
    from jobledger.ledger.mongo.connection import UNAUTHORIZED, server_error_code

    settings = load_settings(config)
    earlier = view_maintenance.parse_digest(expected_digest) if expected_digest is not None else None
    if earlier is not None and (after > 1 or (upto is not None and upto < earlier[0])):
        raise ConfigurationError(
            f"--expected-digest stands for all events up to position {earlier[0]}: leave out --from, "
            "and a --to before it."
        )
    with open_any_database_server(settings) as uri:
        connection = settings.mongodb.make_connection(uri)
        with progress_bar("verifying") as told:
            verdict = asyncio.run(
                view_maintenance.verify_database_log(
                    connection, after=after - 1, up_to=upto, expected_digest=earlier, on_progress=told
                )
            )
        compared = None
        if views and verdict.problem is None and after == 1 and upto is None and verdict.events:
            try:
                with progress_bar("folding") as told:
                    compared = asyncio.run(view_maintenance.compare_views_if_built(connection, on_progress=told))
            except JobledgerError as error:
                if (
                    server_error_code(error) != UNAUTHORIZED
                    and server_error_code(error.__cause__ or error) != UNAUTHORIZED
                ):
                    raise
                echo("note: the views are not compared: for that, this user would have to write some", err=True)
        found = None
        if files:
            with progress_bar("reading files") as told:
                found = asyncio.run(view_maintenance.verify_result_files(settings, connection, on_progress=told))
    if as_json:
        echo_json(
            orjson.dumps(view_maintenance.verification_to_json(verdict, compared, found), option=orjson.OPT_UTC_Z)
        )
    else:
        echo(*view_maintenance.format_verification(verdict))
        if compared is not None:
            echo(*view_maintenance.format_comparison(compared))
        if found is not None:
            echo(*view_maintenance.format_file_verification(found))
    right = verdict.problem is None and (compared is None or not compared.difference_count)
    right = right and (found is None or found.is_ok)
    raise typer.Exit(0 if right else EXIT_FAILED)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="Where to. A name that ends in .zst: compressed.")],
    config: ConfigOption = None,
    after: FromOption = 1,
    upto: ToOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the log to a file, a line of JSON for each event. What was interrupted is continued by the same command.

    Secrets are not in the log and so not in the file; result files are not, either: docs/how-to/backup.md.
    """
    from jobledger.ledger.store import transfer
    from jobledger.ledger.store.event_store import EventStore

    settings = load_settings(config)

    async def run(connection: Connection, told: Callable[[int, int], None]) -> transfer.ExportSummary:
        async with connection.client() as client:
            log = EventStore(client[connection.db_name])
            return await transfer.export_log(log, file, after=after - 1, up_to=upto, on_progress=told)

    with open_any_database_server(settings) as uri, progress_bar("exporting") as told:
        made = asyncio.run(run(settings.mongodb.make_connection(uri), told))
    _tell_summary(f"{file}: {made.events} events, positions {made.first} to {made.last}.", made, as_json=as_json)


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="What `log export` has written: one file, or several in a row.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an exported log the log of an empty database: checked from event to event, and then its views are made.

    Either all of it is there afterwards or nothing. What was interrupted is continued by the same command.
    """
    from jobledger.cli import view_maintenance
    from jobledger.ledger.store import transfer

    settings = load_settings(config)

    async def run(connection: Connection, told: Callable[[int, int], None]) -> transfer.ExportSummary:
        async with connection.client() as client:
            return await transfer.import_log(client[connection.db_name], files, told=told)

    with open_any_database_server(settings) as uri:
        connection = settings.mongodb.make_connection(uri)
        with progress_bar("importing") as told:
            made = asyncio.run(run(connection, told))
        with progress_bar("making the views") as told:
            asyncio.run(view_maintenance.rebuild_views(connection, on_progress=told))
    text = f"The log of {settings.mongodb.db_name} has {made.events} events now, checked, and its views are made."
    _tell_summary(text, made, as_json=as_json)


def _tell_summary(text: str, made: Any, *, as_json: bool) -> None:
    note = f"{made.last}:{made.whole.hex()}" if made.whole else None
    if as_json:
        echo_json(orjson.dumps({"events": made.events, "from": made.first, "to": made.last, "digest": note}))
    else:
        echo(text)
        if note is not None:
            echo(f"To prove later that it is the same, note: {note}")


@app.command()
def tail(
    config: ConfigOption = None,
    stream: Annotated[
        list[str] | None,
        typer.Option("--stream", help="Only a job, batch or delivery, and what it caused. Repeatable."),
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option("--type", help="Only events of this type, such as JobFailed. Repeatable.")
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=100_000, help="Begin so many events back.")] = 10,
    after: Annotated[
        int | None, typer.Option("--after", min=0, max=LARGEST_POSITION, help="Begin behind this position.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Go on for ever, until Ctrl-C.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each event.")] = False,
) -> None:
    """Follow the log as it grows. Goes on by itself when the database, or everything, was restarted."""
    settings = load_settings(config)
    _known_types(kind or ())
    with open_any_database_server(settings) as uri:
        connection = settings.mongodb.make_connection(uri)
        asyncio.run(_tail(connection, set(stream or ()), set(kind or ()), lines, after, follow=follow, as_json=as_json))


def _known_types(names: Any) -> None:
    from jobledger.ledger.domain.events import BATCH_EVENTS, DELIVERY_EVENTS, JOB_EVENTS

    known = sorted({event.__name__ for event in (*JOB_EVENTS, *BATCH_EVENTS, *DELIVERY_EVENTS)})
    for name in names:
        if name not in known:
            raise ConfigurationError(f"--type {name}: there is no such type of event; there are {', '.join(known)}")


async def _tail(
    connection: Connection,
    streams: set[str],
    types: set[str],
    lines: int,
    after: int | None,
    *,
    follow: bool,
    as_json: bool,
) -> None:
    from jobledger.cli.formatting import format_event
    from jobledger.ledger.store.event_store import EventStore
    from jobledger.ledger.store.transfer import encode_event_or_stub as json_of
    from jobledger.ledger.subscriber import LedgerClient

    console = SafeConsole(soft_wrap=True)
    async with connection.client() as client:
        log = EventStore(client[connection.db_name])
        head = await log.head_position()
        begin = max(0, head - lines) if after is None else after

        def tell(event: Any) -> None:
            wanted = not streams or event.stream in streams or event.meta.correlation_id in streams
            if wanted and (not types or event.type in types):
                if as_json:
                    echo_json(json_of(event.document))
                else:
                    console.print(format_event(event))

        if not follow:
            while begin < head and (page := await log.read(after=begin)):
                for event in page:
                    if event.position <= head:
                        tell(event)
                begin = page[-1].position
            return
    following = LedgerClient(connection)
    while True:
        try:
            async with following.subscribe(after=begin) as events:
                async for event in events:
                    tell(event)
                    begin = event.position
        except LedgerUnavailable as error:
            echo(f"waiting for the database: {error}", err=True)
            await asyncio.sleep(1)


@app.command()
def history(
    stream: Annotated[str, typer.Argument(help="The id of a job, batch or delivery.")],
    config: ConfigOption = None,
    as_of: Annotated[str | None, typer.Option("--as-of", help=f"As far as it had come then. {AS_OF_HELP}")] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell one story: what happened to a job, batch or delivery, who did it, and what each event made of it."""
    settings = load_settings(config)
    then = None if as_of is None else parse_as_of(as_of, "--as-of")
    with open_any_database_server(settings) as uri:
        asyncio.run(_show(settings.mongodb.make_connection(uri), stream, then, as_json=as_json))


async def _show(connection: Connection, stream: str, then: int | datetime | None, *, as_json: bool) -> None:
    from jobledger.cli.formatting import format_changes, format_event
    from jobledger.ledger.store.event_store import EventStore
    from jobledger.ledger.store.transfer import encode_event_or_stub as json_of
    from jobledger.projections.views import batches, deliveries, jobs

    async with connection.client() as client:
        log = EventStore(client[connection.db_name])
        events = await log.read_stream(stream)
    if not events:
        raise NotFound(f"There is no {stream} in the log: expected the id of a job, a batch or a delivery.")
    if then is not None:
        events = list(filter(_happened_by(then), events))
    fold: Any = {"job": jobs.fold, "batch": batches.fold, "delivery": deliveries.fold}.get(stream.partition("-")[0])
    console = SafeConsole(soft_wrap=True)
    document: Any = None
    for event in events:
        after = _folded(fold, document, event) if fold is not None else None
        if as_json:
            state = (
                None
                if after is None
                else {name: value for name, value in after.items() if name not in _INTERNAL_FIELDS}
            )
            echo_json(orjson.dumps({"event": orjson.Fragment(json_of(event.document)), "after": state}, default=str))
        else:
            console.print(format_event(event, with_stream=False))
            if changes := format_changes(document, after):
                console.print(Text(f"{'':>9}{changes}", style="dim"), no_wrap=True, overflow="ellipsis")
        document = after
    if not events:
        echo(f"{stream} was not there yet.", err=True)


def _happened_by(then: int | datetime) -> Callable[[Any], bool]:
    if isinstance(then, int):
        return lambda event: bool(event.position <= then)
    return lambda event: isinstance(event.document.get("time"), datetime) and event.time <= then


def _folded(fold: Any, document: Any, event: Any) -> Any:
    """Return the document after an event; as it was, if the event is damaged."""
    try:
        return fold(document, event)
    except UnreadableEvent as error:
        echo(f"note: {error}", err=True)
        return document


_INTERNAL_FIELDS = frozenset({"list_keys", "search_keys", "needs_reopen"})
