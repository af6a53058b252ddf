"""Compare and rebuild views, verify result files, and format the results (`jobledger log verify`, `views …`)."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jobledger.cli.hosting.database import find_store_marker
from jobledger.cli.hosting.process_tuning import tune_garbage_collector
from jobledger.cli.output.formatting import format_count
from jobledger.cli.output.progress import ProgressCallback
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.gridfs import GridFSStore
from jobledger.ledger.mongo.connection import Connection, Database
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import MAX_POSITION, EventStore
from jobledger.ledger.store.verification import VerificationResult

if TYPE_CHECKING:
    from jobledger.cli.settings import Settings
    from jobledger.ledger.files.file_store import FileStore
    from jobledger.projections.engine.comparison import Difference
    from jobledger.projections.engine.file_verification import FileVerificationResult
    from jobledger.projections.engine.rebuild import Rebuild

MAX_SHOWN_DIFFERENCES: Final = 100
"""Number of differences that are kept for output. All are counted."""


def parse_digest(text: str) -> tuple[int, bytes]:
    """Parse `POSITION:DIGEST` as `log verify` prints it.

    Raises:
        ConfigurationError: `text` has another form.
    """
    position_text, _, digest_text = text.partition(":")
    try:
        position, digest = int(position_text), bytes.fromhex(digest_text)
    except ValueError:
        position, digest = 0, b""
    if not 1 <= position <= MAX_POSITION or len(digest) != 32:
        raise ConfigurationError(
            f"--expected-digest {text!r}: expected POSITION:DIGEST as `log verify` prints it, "
            "a number and 64 hexadecimal digits."
        )
    return position, digest


@dataclass(slots=True)
class ViewComparison:
    """Result of comparing views with the log.

    Attributes:
        position: Position in the log at which they were compared.
        counts: Number of documents that differ, by view.
        first_differences: The first `MAX_SHOWN_DIFFERENCES` differences.
    """

    position: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first_differences: list[Difference] = field(default_factory=list)

    @property
    def difference_count(self) -> int:
        return self.counts.total()

    def add(self, difference: Difference) -> None:
        """Count a difference, and keep it if it is one of the first."""
        self.counts[difference.view] += 1
        if len(self.first_differences) < MAX_SHOWN_DIFFERENCES:
            self.first_differences.append(difference)


async def compare_views(
    connection: Connection, names: Collection[str] | None = None, *, on_progress: ProgressCallback
) -> ViewComparison:
    """Build views from the log in their shadow slots, and compare the active views with them.

    Args:
        connection: Connection to the database.
        names: Views to compare. None: all.
        on_progress: Called with the number of applied events and the total.

    Raises:
        ConfigurationError: A name is not that of a view.
        NotComparable: They cannot be compared now. The message says why.
        LedgerUnavailable: The database failed.
    """
    comparison = ViewComparison()
    async with open_rebuild(connection) as rebuild:
        comparison.position = await rebuild.compare(
            _check_view_names(names), on_progress=on_progress, on_difference=comparison.add
        )
    return comparison


async def rebuild_views(
    connection: Connection, names: Collection[str] | None = None, *, on_progress: ProgressCallback
) -> int:
    """Rebuild views in their shadow slots, then switch over. Return the position at which it switched.

    Args:
        connection: Connection to the database.
        names: Views to rebuild. None: all.
        on_progress: Called with the number of applied events and the total.

    Raises:
        ConfigurationError: A name is not that of a view.
        DatabaseUnsuitable: Only all views together can be rebuilt.
        LedgerUnavailable: The database failed.
    """
    async with open_rebuild(connection) as rebuild:
        return await rebuild.run(_check_view_names(names), on_progress=on_progress)


def _check_view_names(names: Collection[str] | None) -> Collection[str]:
    from jobledger.projections.engine.view_registry import VIEW_NAMES

    for name in names or ():
        if name not in VIEW_NAMES:
            raise ConfigurationError(f"--view {name}: unknown view. Views: {', '.join(VIEW_NAMES)}.")
    return names or VIEW_NAMES


@asynccontextmanager
async def open_rebuild(connection: Connection) -> AsyncIterator[Rebuild]:
    """Yield a rebuild whose event store and change stream run inside the block."""
    from jobledger.projections.engine.checkpoint import CheckpointFollower
    from jobledger.projections.engine.projector import Projector
    from jobledger.projections.engine.rebuild import Rebuild

    tune_garbage_collector()
    async with connection.create_client() as client:
        db = client[connection.db_name]
        event_store, change_stream, holder = EventStore(db), ChangeStream(db), f"{socket.gethostname()}-{os.getpid()}"
        rebuild = Rebuild(db, event_store, connection, holder=holder)
        await event_store.prepare()
        await Projector(db, event_store, connection, CheckpointFollower(db), holder=holder).prepare()
        change_stream.add_listener(event_store)
        change_stream.add_listener(rebuild.leader_election)
        async with change_stream.keep_open():
            try:
                yield rebuild
            finally:
                await event_store.aclose()


async def verify_result_files(
    settings: Settings, db: Database, *, on_progress: ProgressCallback
) -> FileVerificationResult:
    """Compare the files in `results.store` with the recorded digests.

    Raises:
        ConfigurationError: The store cannot be opened.
        LedgerUnavailable: The database failed.
    """
    from jobledger.projections.engine.checkpoint import load_checkpoint
    from jobledger.projections.engine.file_verification import verify_files
    from jobledger.projections.slots import Views

    store: FileStore = GridFSStore(db)
    if isinstance(root := settings.results.store, Path):
        store = DirectoryStore(root, marker=await find_store_marker(root, db))
    return await verify_files(Views(db, (await load_checkpoint(db)).get("slots")), store, on_progress=on_progress)


def format_verification(result: VerificationResult) -> list[str]:
    """Return the result of a verification as lines of text."""
    if result.problem is not None:
        return [f"The log is damaged. First error: {result.problem}.", f"{_format_intact(result.events, 'before it')}."]
    if not result.events and not result.last_reserved_position:
        return ["There are no events to verify."]
    lines = [
        f"{_format_intact(result.events, f'up to position {result.position}')} "
        f"({result.voided} of them voided positions)."
    ]
    if result.last_reserved_position:
        lines.append(
            f"note: positions up to {result.last_reserved_position} were reserved by appenders, but the log ends at "
            f"{result.position}. Either these appenders crashed, or events at the end were removed."
        )
    digest = format_digest(result)
    return lines if digest is None else [*lines, f"Digest, for `log verify --expected-digest`: {digest}"]


def _format_intact(events: int, where: str) -> str:
    return f"{format_count(events, 'event')} {where} {'is' if events == 1 else 'are'} intact"


def format_digest(result: VerificationResult) -> str | None:
    """Return the value for `--expected-digest` of a later verification, if the log is intact from its beginning."""
    if result.digest is None or result.problem is not None or not result.events:
        return None
    return f"{result.position}:{result.digest.hex()}"


def format_comparison(comparison: ViewComparison) -> list[str]:
    """Return the result of a comparison as lines of text."""
    if not comparison.difference_count:
        return [f"The views match the log up to position {comparison.position}."]
    counts = ", ".join(f"{count} in {view}" for view, count in comparison.counts.items())
    differing = format_count(comparison.difference_count, "document differs", "documents differ")
    lines = [f"The views do not match the log: {differing} ({counts})."]
    lines += [f"  {difference}" for difference in comparison.first_differences]
    if comparison.difference_count > len(comparison.first_differences):
        lines.append(f"  … and {comparison.difference_count - len(comparison.first_differences)} more")
    return [*lines, "Run `jobledger views rebuild` to rebuild the views from the log."]


def format_file_verification(result: FileVerificationResult) -> list[str]:
    """Return the result of comparing result files as lines of text."""
    count = format_count(result.files, "result file")
    if result.is_ok:
        lines = [f"{count} checked: all are intact."]
    else:
        lines = [f"{count} checked: {result.missing} missing, {result.changed} changed."]
        lines += [f"  {problem.path}: {problem.message}" for problem in result.problems]
        if (more := result.missing + result.changed - len(result.problems)) > 0:
            lines.append(f"  … and {more} more")
    if result.orphans:
        lines.append(
            f"Files in the store that belong to no result: {result.orphans:,} ({result.orphan_bytes:,} bytes)."
        )
    return lines


def build_comparison_json(comparison: ViewComparison) -> dict[str, object]:
    """Return the result of a comparison for JSON output."""
    return {
        "position": comparison.position,
        "differences": comparison.difference_count,
        "by_view": comparison.counts,
        "first_differences": [
            {
                "view": difference.view,
                "key": difference.key,
                "fields": difference.fields,
                "in_view": difference.actual is not None,
                "in_log": difference.expected is not None,
            }
            for difference in comparison.first_differences
        ],
    }


def build_file_verification_json(result: FileVerificationResult) -> dict[str, object]:
    """Return the result of comparing result files for JSON output."""
    return {
        "files": result.files,
        "missing": result.missing,
        "changed": result.changed,
        "orphaned": result.orphans,
        "orphaned_bytes": result.orphan_bytes,
        "problems": [problem._asdict() for problem in result.problems],
    }


def build_verification_json(
    result: VerificationResult, views: ViewComparison | None = None, files: FileVerificationResult | None = None
) -> dict[str, object]:
    """Return the result of a verification for JSON output."""
    problem = result.problem
    return {
        "events": result.events,
        "voided_positions": result.voided,
        "position": result.position,
        "digest": format_digest(result),
        "last_reserved_position": result.last_reserved_position or None,
        "first_error": problem
        and {
            "position": problem.position,
            "stream": problem.stream,
            "version": problem.version,
            "message": problem.description,
        },
        "views": None if views is None else build_comparison_json(views),
        "files": None if files is None else build_file_verification_json(files),
    }
