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

from jobledger.cli.composition import find_store_marker, spare_the_collector
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.gridfs import GridFSStore
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.change_stream import Changes
from jobledger.ledger.store.event_store import LARGEST_POSITION, EventLog
from jobledger.ledger.store.verification import Verdict, verify

if TYPE_CHECKING:
    from jobledger.cli.settings import Settings
    from jobledger.ledger.files.directory import FileStore
    from jobledger.projections.engine.comparison import Difference
    from jobledger.projections.engine.file_verification import FilesVerdict
    from jobledger.projections.engine.rebuild import Rebuild

Told = Callable[[int, int], None]
MOST_DIFFERENCES = 100
"""How many differences are kept to be shown; all are counted."""


def noted_of(text: str) -> tuple[int, bytes]:
    """Read `POSITION:DIGEST` as `log verify` prints it.

    Raises:
        ConfigurationError: it is something else.
    """
    position, _, digest = text.partition(":")
    try:
        noted = int(position), bytes.fromhex(digest)
    except ValueError:
        noted = 0, b""
    if not 1 <= noted[0] <= LARGEST_POSITION or len(noted[1]) != 32:
        raise ConfigurationError(
            f"{text!r} is no note of an earlier verification: expected POSITION:DIGEST as `log verify` prints it, "
            "a number and 64 hexadecimal digits."
        )
    return noted


async def verified(
    connection: Connection, *, after: int, upto: int | None, noted: tuple[int, bytes] | None, told: Told
) -> Verdict:
    """Check the log; `told` is told how many events were looked at, and of how many.

    Raises:
        LedgerUnavailable: the database failed, or does not answer.
    """
    spare_the_collector()
    async with connection.client() as client:
        log = EventLog(client[connection.db_name])
        return await verify(
            log,
            after=after,
            upto=upto,
            noted=noted,
            looked_at=lambda position, end: told(position - after, end - after),
        )


@dataclass(slots=True)
class Compared:
    """What came of holding the views against the log: at which position, and what differs, the first of it shown."""

    position: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    shown: list[Difference] = field(default_factory=list)

    @property
    def differences(self) -> int:
        return self.counts.total()

    def add(self, difference: Difference) -> None:
        self.counts[difference.view] += 1
        if len(self.shown) < MOST_DIFFERENCES:
            self.shown.append(difference)


async def compared(connection: Connection, names: Collection[str] | None = None, *, told: Told) -> Compared:
    """Fold the log anew and compare the views with that.

    Raises:
        NotComparable: they cannot be compared now; the message says why.
        LedgerUnavailable: the database failed.
    """
    found = Compared()
    async with _rebuilding(connection) as rebuild:
        found.position = await rebuild.compare(_views(names), told=told, found=found.add)
    return found


async def files_verified(settings: Settings, connection: Connection, *, told: Told) -> FilesVerdict:
    """Compare the files in `results.store` with the digests on record.

    Raises:
        ConfigurationError: the store cannot be opened.
        LedgerUnavailable: the database failed.
    """
    from jobledger.projections.engine.file_verification import verify_files
    from jobledger.projections.engine.rebuild import checkpoint
    from jobledger.projections.engine.slots import Views

    async with connection.client() as client:
        db = client[connection.db_name]
        store: FileStore = GridFSStore(db)
        if isinstance(root := settings.results.store, Path):
            store = DirectoryStore(root, marker=await find_store_marker(root, db))
        return await verify_files(Views(db, (await checkpoint(db)).get("sides")), store, told=told)


def _files(number: int) -> str:
    return "1 result file" if number == 1 else f"{number:,} result files"


def told_of_files(found: FilesVerdict) -> list[str]:
    """Return what came of comparing the files, in lines for people."""
    rest = f"{found.orphans} files in the store ({found.orphan_bytes:,} bytes) belong to no result."
    if found.is_right:
        lines = [f"{_files(found.files)} checked: the content is what was stored."]
    else:
        lines = [f"{_files(found.files)} checked: {found.missing} missing, {found.changed} changed."]
        lines += [f"  {problem.path}: {problem.what}" for problem in found.problems]
        if (more := found.missing + found.changed - len(found.problems)) > 0:
            lines.append(f"  … and {more} more")
    return [*lines, *([rest] if found.orphans else [])]


def files_as_json(found: FilesVerdict) -> dict[str, object]:
    """Return what came of comparing the files, for programs."""
    return {
        "files": found.files,
        "missing": found.missing,
        "changed": found.changed,
        "orphans": found.orphans,
        "orphan_bytes": found.orphan_bytes,
        "problems": [problem._asdict() for problem in found.problems],
    }


async def compared_if_any(connection: Connection, *, told: Told) -> Compared | None:
    """Compare all views as `compared` does; None, and nothing is touched, where no projector has made any."""
    async with connection.client() as client:
        from jobledger.projections.engine.rebuild import checkpoint

        if not (await checkpoint(client[connection.db_name]))["position"]:
            return None
    return await compared(connection, told=told)


async def rebuilt(connection: Connection, names: Collection[str] | None = None, *, told: Told) -> int:
    """Make the views anew and put them in the place of the live ones; return at which position.

    Raises:
        DatabaseUnsuitable: only all of them can be replaced.
        LedgerUnavailable: the database failed.
    """
    async with _rebuilding(connection) as rebuild:
        return await rebuild.run(_views(names), told=told)


async def tidied(connection: Connection) -> None:
    """Empty what a rebuild has left behind, as a projector does some time later.

    Raises:
        LedgerUnavailable: the database failed.
    """
    async with _rebuilding(connection) as rebuild:
        await rebuild.tidy()


def _views(names: Collection[str] | None) -> Collection[str]:
    from jobledger.projections.engine.rebuild import NAMES

    for name in names or ():
        if name not in NAMES:
            raise ConfigurationError(f"--view {name}: there is no such view; there are {', '.join(NAMES)}")
    return names or NAMES


@asynccontextmanager
async def _rebuilding(connection: Connection) -> AsyncIterator[Rebuild]:
    from jobledger.projections.engine.checkpoint import Checkpoint
    from jobledger.projections.engine.projector import Projector
    from jobledger.projections.engine.rebuild import Rebuild

    spare_the_collector()
    async with connection.client() as client:
        db = client[connection.db_name]
        log, changes, holder = EventLog(db), Changes(db), f"{socket.gethostname()}-{os.getpid()}"
        rebuild = Rebuild(db, log, connection, holder=holder)
        await log.prepare()
        await Projector(db, log, connection, Checkpoint(db), holder=holder).prepare()
        changes.listen(log)
        changes.listen(rebuild.leadership)
        async with changes.running():
            try:
                yield rebuild
            finally:
                await log.aclose()


def told(verdict: Verdict) -> list[str]:
    """Return what came out, in lines for people."""
    if verdict.wrong is not None:
        wrong = f"The log is not what was written. First wrong: {verdict.wrong}."
        return [wrong, f"{verdict.events} events before it are."]
    if not verdict.events and not verdict.handed_out:
        return ["There are no events to verify."]
    lines = [
        f"{verdict.events} events up to position {verdict.position} are what was written "
        f"({verdict.voided} of them void positions)."
    ]
    if verdict.handed_out:
        lines.append(
            f"note: positions up to {verdict.handed_out} were handed out to writers, and the log ends at "
            f"{verdict.position}. Either these writers died, or events at the end were removed."
        )
    note = note_of(verdict)
    return lines if note is None else [*lines, f"To prove later that they still are, note: {note}"]


def note_of(verdict: Verdict) -> str | None:
    """Return what to keep elsewhere, for `--noted` of a later verification, if all was right from the beginning."""
    if verdict.digest is None or verdict.wrong is not None or not verdict.events:
        return None
    return f"{verdict.position}:{verdict.digest.hex()}"


def told_of_views(found: Compared) -> list[str]:
    """Return what came of comparing the views, in lines for people."""
    if not found.differences:
        return [f"The views say what the log says up to position {found.position}."]
    counts = ", ".join(f"{number} in {view}" for view, number in found.counts.items())
    lines = [f"The views do not say what the log says: {found.differences} documents differ ({counts})."]
    lines += [f"  {difference}" for difference in found.shown]
    if found.differences > len(found.shown):
        lines.append(f"  … and {found.differences - len(found.shown)} more")
    return [*lines, "`jobledger replay` makes the views anew from the log."]


def views_as_json(found: Compared) -> dict[str, object]:
    """Return what came of comparing the views, for programs: the first differences whole, all of them counted."""
    shown = [
        {"view": it.view, "key": it.key, "fields": it.fields, "live": it.live is not None, "log": it.fresh is not None}
        for it in found.shown
    ]
    return {"position": found.position, "differences": found.differences, "by_view": found.counts, "shown": shown}


def as_json(verdict: Verdict, views: Compared | None = None, files: FilesVerdict | None = None) -> dict[str, object]:
    """Return what came out, for programs."""
    wrong = verdict.wrong
    return {
        "events": verdict.events,
        "voided": verdict.voided,
        "position": verdict.position,
        "noted": note_of(verdict),
        "handed_out": verdict.handed_out or None,
        "wrong": wrong
        and {"position": wrong.position, "stream": wrong.stream, "version": wrong.version, "what": wrong.what},
        "views": None if views is None else views_as_json(views),
        "files": None if files is None else files_as_json(files),
    }
