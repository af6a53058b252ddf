"""cli: `jobledger log …`. What auditors do with the log itself, directly on the database."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ledger.errors import ConfigurationError
from ledger.log import LARGEST_POSITION, EventLog
from ledger.mongo import Connection
from ledger.verification import Verdict, verify


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
    connection: Connection, console: Console, *, after: int, upto: int | None, noted: tuple[int, bytes] | None
) -> Verdict:
    """Check the log, with a progress bar on a terminal.

    Raises:
        LedgerUnavailable: the database failed, or does not answer.
    """
    columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    async with connection.client() as client:
        log = EventLog(client[connection.db_name])
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=None)
            return await verify(
                log,
                after=after,
                upto=upto,
                noted=noted,
                looked_at=lambda position, end: progress.update(task, completed=position - after, total=end - after),
            )


def told(verdict: Verdict) -> str:
    """Return what came out, for people."""
    if verdict.wrong is not None:
        return f"The log is not what was written. First wrong: {verdict.wrong}.\n{verdict.events} events before it are."
    if not verdict.events:
        return "There are no events to verify."
    right = (
        f"{verdict.events} events up to position {verdict.position} are what was written "
        f"({verdict.voided} of them void positions)."
    )
    note = note_of(verdict)
    return right if note is None else f"{right}\nTo prove later that they still are, note: {note}"


def note_of(verdict: Verdict) -> str | None:
    """Return what to keep elsewhere, for `--noted` of a later verification, if all was right from the beginning."""
    if verdict.digest is None or verdict.wrong is not None or not verdict.events:
        return None
    return f"{verdict.position}:{verdict.digest.hex()}"


def as_json(verdict: Verdict) -> dict[str, object]:
    """Return what came out, for programs."""
    wrong = verdict.wrong
    return {
        "events": verdict.events,
        "voided": verdict.voided,
        "position": verdict.position,
        "noted": note_of(verdict),
        "wrong": wrong
        and {"position": wrong.position, "stream": wrong.stream, "version": wrong.version, "what": wrong.what},
    }
