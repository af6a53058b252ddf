"""cli: what `jobledger log` and `jobledger replay` do: verify the log, hold the views against it, make them anew."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jobledger.cli.composition import find_store_marker, tune_garbage_collector
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.gridfs import GridFSStore
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import MAX_POSITION, EventStore
from jobledger.ledger.store.verification import VerificationResult, verify_log

if TYPE_CHECKING:
    from jobledger.cli.settings import Settings
    from jobledger.ledger.files.directory import FileStore
    from jobledger.projections.engine.comparison import Difference
    from jobledger.projections.engine.file_verification import FileVerificationResult
    from jobledger.projections.engine.rebuild import Rebuild

ProgressCallback = Callable[[int, int], None]
MAX_SHOWN_DIFFERENCES = 100
"""How many differences are kept to be shown; all are counted."""


def parse_digest(text: str) -> tuple[int, bytes]:
    """Read `POSITION:DIGEST` as `log verify` prints it.

    Raises:
        ConfigurationError: it is something else.
    """
    position, _, digest = text.partition(":")
    try:
        noted = int(position), bytes.fromhex(digest)
    except ValueError:
        noted = 0, b""
    if not 1 <= noted[0] <= MAX_POSITION or len(noted[1]) != 32:
        raise ConfigurationError(
            f"{text!r} is no note of an earlier verification: expected POSITION:DIGEST as `log verify` prints it, "
            "a number and 64 hexadecimal digits."
        )
    return noted


async def verify_database_log(
    connection: Connection,
    *,
    after: int,
    up_to: int | None,
    expected_digest: tuple[int, bytes] | None,
    on_progress: ProgressCallback,
) -> VerificationResult:
    """Check the log; `told` is told how many events were looked at, and of how many.

    Raises:
        LedgerUnavailable: the database failed, or does not answer.
    """
    tune_garbage_collector()
    async with connection.client() as client:
        log = EventStore(client[connection.db_name])
        return await verify_log(
            log,
            after=after,
            up_to=up_to,
            expected_digest=expected_digest,
            on_progress=lambda position, end: on_progress(position - after, end - after),
        )


@dataclass(slots=True)
class ViewComparison:
    """What came of holding the views against the log: at which position, and what differs, the first of it shown."""

    position: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first_differences: list[Difference] = field(default_factory=list)

    @property
    def difference_count(self) -> int:
        return self.counts.total()

    def add(self, difference: Difference) -> None:
        self.counts[difference.view] += 1
        if len(self.first_differences) < MAX_SHOWN_DIFFERENCES:
            self.first_differences.append(difference)


async def compare_views(
    connection: Connection, names: Collection[str] | None = None, *, on_progress: ProgressCallback
) -> ViewComparison:
    """Fold the log anew and compare the views with that.

    Raises:
        NotComparable: they cannot be compared now; the message says why.
        LedgerUnavailable: the database failed.
    """
    found = ViewComparison()
    async with _rebuilding(connection) as rebuild:
        found.position = await rebuild.compare(_views(names), on_progress=on_progress, on_difference=found.add)
    return found


async def verify_result_files(
    settings: Settings, connection: Connection, *, on_progress: ProgressCallback
) -> FileVerificationResult:
    """Compare the files in `results.store` with the digests on record.

    Raises:
        ConfigurationError: the store cannot be opened.
        LedgerUnavailable: the database failed.
    """
    from jobledger.projections.engine.file_verification import verify_files
    from jobledger.projections.engine.rebuild import load_checkpoint
    from jobledger.projections.slots import Views

    async with connection.client() as client:
        db = client[connection.db_name]
        store: FileStore = GridFSStore(db)
        if isinstance(root := settings.results.store, Path):
            store = DirectoryStore(root, marker=await find_store_marker(root, db))
        return await verify_files(Views(db, (await load_checkpoint(db)).get("slots")), store, on_progress=on_progress)


def _files(number: int) -> str:
    return "1 result file" if number == 1 else f"{number:,} result files"


def format_file_verification(found: FileVerificationResult) -> list[str]:
    """Return what came of comparing the files, in lines for people."""
    rest = f"{found.orphans} files in the store ({found.orphan_bytes:,} bytes) belong to no result."
    if found.is_ok:
        lines = [f"{_files(found.files)} checked: the content is what was stored."]
    else:
        lines = [f"{_files(found.files)} checked: {found.missing} missing, {found.changed} changed."]
        lines += [f"  {problem.path}: {problem.message}" for problem in found.problems]
        if (more := found.missing + found.changed - len(found.problems)) > 0:
            lines.append(f"  … and {more} more")
    return [*lines, *([rest] if found.orphans else [])]


def file_verification_to_json(found: FileVerificationResult) -> dict[str, object]:
    """Return what came of comparing the files, for programs."""
    return {
        "files": found.files,
        "missing": found.missing,
        "changed": found.changed,
        "orphans": found.orphans,
        "orphan_bytes": found.orphan_bytes,
        "problems": [problem._asdict() for problem in found.problems],
    }


async def compare_views_if_built(connection: Connection, *, on_progress: ProgressCallback) -> ViewComparison | None:
    """Compare all views as `compared` does; None, and nothing is touched, where no projector has made any."""
    async with connection.client() as client:
        from jobledger.projections.engine.rebuild import load_checkpoint

        if not (await load_checkpoint(client[connection.db_name]))["position"]:
            return None
    return await compare_views(connection, on_progress=on_progress)


async def rebuild_views(
    connection: Connection, names: Collection[str] | None = None, *, on_progress: ProgressCallback
) -> int:
    """Make the views anew and put them in the place of the live ones; return at which position.

    Raises:
        DatabaseUnsuitable: only all of them can be replaced.
        LedgerUnavailable: the database failed.
    """
    async with _rebuilding(connection) as rebuild:
        return await rebuild.run(_views(names), on_progress=on_progress)


async def clear_shadow_views(connection: Connection) -> None:
    """Empty what a rebuild has left behind, as a projector does some time later.

    Raises:
        LedgerUnavailable: the database failed.
    """
    async with _rebuilding(connection) as rebuild:
        await rebuild.clear_shadow()


def _views(names: Collection[str] | None) -> Collection[str]:
    from jobledger.projections.engine.rebuild import VIEW_NAMES

    for name in names or ():
        if name not in VIEW_NAMES:
            raise ConfigurationError(f"--view {name}: there is no such view; there are {', '.join(VIEW_NAMES)}")
    return names or VIEW_NAMES


@asynccontextmanager
async def _rebuilding(connection: Connection) -> AsyncIterator[Rebuild]:
    from jobledger.projections.engine.checkpoint import Checkpoint
    from jobledger.projections.engine.projector import Projector
    from jobledger.projections.engine.rebuild import Rebuild

    tune_garbage_collector()
    async with connection.client() as client:
        db = client[connection.db_name]
        log, changes, holder = EventStore(db), ChangeStream(db), f"{socket.gethostname()}-{os.getpid()}"
        rebuild = Rebuild(db, log, connection, holder=holder)
        await log.prepare()
        await Projector(db, log, connection, Checkpoint(db), holder=holder).prepare()
        changes.add_listener(log)
        changes.add_listener(rebuild.leader_election)
        async with changes.running():
            try:
                yield rebuild
            finally:
                await log.aclose()


def format_verification(verdict: VerificationResult) -> list[str]:
    """Return what came out, in lines for people."""
    if verdict.problem is not None:
        wrong = f"The log is not what was written. First wrong: {verdict.problem}."
        return [wrong, f"{verdict.events} events before it are."]
    if not verdict.events and not verdict.last_reserved_position:
        return ["There are no events to verify."]
    lines = [
        f"{verdict.events} events up to position {verdict.position} are what was written "
        f"({verdict.voided} of them void positions)."
    ]
    if verdict.last_reserved_position:
        lines.append(
            f"note: positions up to {verdict.last_reserved_position} were handed out to writers, and the log ends at "
            f"{verdict.position}. Either these writers died, or events at the end were removed."
        )
    note = format_digest(verdict)
    return lines if note is None else [*lines, f"To prove later that they still are, note: {note}"]


def format_digest(verdict: VerificationResult) -> str | None:
    """Return the digest to keep for a later `--expected-digest`; None unless all events were checked and are right."""
    if verdict.digest is None or verdict.problem is not None or not verdict.events:
        return None
    return f"{verdict.position}:{verdict.digest.hex()}"


def format_comparison(found: ViewComparison) -> list[str]:
    """Return what came of comparing the views, in lines for people."""
    if not found.difference_count:
        return [f"The views say what the log says up to position {found.position}."]
    counts = ", ".join(f"{number} in {view}" for view, number in found.counts.items())
    lines = [f"The views do not say what the log says: {found.difference_count} documents differ ({counts})."]
    lines += [f"  {difference}" for difference in found.first_differences]
    if found.difference_count > len(found.first_differences):
        lines.append(f"  … and {found.difference_count - len(found.first_differences)} more")
    return [*lines, "`jobledger replay` makes the views anew from the log."]


def comparison_to_json(found: ViewComparison) -> dict[str, object]:
    """Return what came of comparing the views, for programs: the first differences whole, all of them counted."""
    shown = [
        {
            "view": it.view,
            "key": it.key,
            "fields": it.fields,
            "live": it.actual is not None,
            "log": it.expected is not None,
        }
        for it in found.first_differences
    ]
    return {"position": found.position, "differences": found.difference_count, "by_view": found.counts, "shown": shown}


def verification_to_json(
    verdict: VerificationResult, views: ViewComparison | None = None, files: FileVerificationResult | None = None
) -> dict[str, object]:
    """Return what came out, for programs."""
    wrong = verdict.problem
    return {
        "events": verdict.events,
        "voided": verdict.voided,
        "position": verdict.position,
        "digest": format_digest(verdict),
        "handed_out": verdict.last_reserved_position or None,
        "wrong": wrong
        and {"position": wrong.position, "stream": wrong.stream, "version": wrong.version, "what": wrong.description},
        "views": None if views is None else comparison_to_json(views),
        "files": None if files is None else file_verification_to_json(files),
    }
