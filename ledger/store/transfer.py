"""ledger: the log as a file, and back. A line of JSON for each event, between a first and a last line about the whole.

The last line holds the number of events and the digest that `log verify` makes of them: a file without it was cut off,
and one that does not add up to it was changed. An import writes into a collection beside the log, has it checked like
any log, and makes it the log by renaming it: before, there is nothing, and after, everything.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Final

import orjson
import zstandard

from jobledger.ledger.domain.errors import ConfigurationError, DatabaseUnsuitable, JobledgerError, LedgerUnavailable
from jobledger.ledger.mongo.connection import UNAUTHORIZED, Database, Document, server_error_code, translate_errors
from jobledger.ledger.mongo.lease import EXPIRED_LEASE_FILTER
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.store.hash_chain import GENESIS_HASH
from jobledger.ledger.store.storage_format import find_deviation, find_envelope_deviation
from jobledger.ledger.store.verification import verify_log

FORMAT: Final = 1
PAGE_EVENTS: Final = 2000
_OPTIONS: Final = orjson.OPT_PASSTHROUGH_DATETIME
_FIELDS: Final = frozenset(
    {"position", "event_id", "stream", "version", "type", "schema", "time", "data", "meta", "prev", "hash"}
)
_LEVEL: Final = 3
_LAST: Final = b'{"end":'
"""How the last line begins."""
STAGING_COLLECTION: Final = "events.import"
"""The collection that becomes the log when everything is in it and right."""
ProgressCallback = Callable[[int, int], None]
"""Is told at which position we are, and which is the last."""


class InvalidExportFile(JobledgerError):
    """A file is not, or not any more, what an export has written; the message says where, and what to do."""


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """What a file holds: the events from `first` to `last`, and a digest of them.

    `whole` is the digest of all events up to `last`, if the files before this one hold the others.
    """

    first: int
    last: int
    digest: bytes
    log_digest: bytes = b""

    @property
    def events(self) -> int:
        return self.last - self.first + 1


# Lines ----------------------------------------------------------------------------------------------------------------


def encode_event(document: Mapping[str, Any]) -> bytes:
    """Return the line for an event as it is stored. Times within its data are written as `{"$date": …}`.

    No name in an event begins with `$`, so nothing else can look like that.
    """
    plain = {"position": document["_id"], **document, "time": _moment(document["time"])}
    plain["prev"], plain["hash"] = document["prev"].hex(), document["hash"].hex()
    del plain["_id"]
    return orjson.dumps(plain, default=_marked, option=_OPTIONS)


def encode_event_or_stub(document: Mapping[str, Any]) -> bytes:
    """Return the line for an event, or, of one that was damaged in the database, what can be said of it."""
    try:
        return encode_event(document)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        stub = {"position": document["_id"], "stream": document.get("stream"), "type": document.get("type")}
        why = f"This event was changed in the database: {error!r}. `jobledger log verify` says more."
        return orjson.dumps({**stub, "unreadable": why}, default=str)


def decode_event(line: bytes) -> Document:
    """Return the event of a line as it is to be stored.

    Raises:
        ValueError: this is no event.
    """
    found = orjson.loads(line)
    if not isinstance(found, dict) or found.keys() != _FIELDS:
        raise ValueError("it is not an event with the fields that events have")
    document: Document = {"_id": found.pop("position"), **found}
    document["time"] = datetime.fromisoformat(document["time"])
    document["prev"], document["hash"] = bytes.fromhex(document["prev"]), bytes.fromhex(document["hash"])
    if b'{"$' in line:
        document["data"] = _unmarked(document["data"])
    return document


def _moment(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="milliseconds")[:23] + "Z"


def _marked(value: Any) -> Any:
    if isinstance(value, datetime):
        return {"$date": _moment(value)}
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    raise TypeError(f"a {type(value).__name__} in an event")


def _unmarked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unmarked(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$date"}:
        return datetime.fromisoformat(value["$date"])
    if value.keys() == {"$bytes"}:
        return bytes.fromhex(value["$bytes"])
    return {name: _unmarked(item) for name, item in value.items()}


# Export ---------------------------------------------------------------------------------------------------------------


async def export_log(
    log: EventStore,
    path: Path,
    *,
    after: int = 0,
    up_to: int | None = None,
    on_progress: ProgressCallback = lambda position, upto: None,
) -> ExportSummary:
    """Write the events behind `after` up to `upto`, or what is the end now, to a file; return what it holds.

    Until it is complete it is called `….part`; what was interrupted is continued. Names that end in `.zst` are
    compressed.

    Raises:
        ConfigurationError: the file is there already or cannot be written, or there are no such events.
        DamagedFile: what is there of an interrupted export is no such thing.
        LedgerUnavailable: the database failed; the same call continues.
    """
    if path.exists():  # noqa: ASYNC240 - files are written here all the time, and nothing else goes on
        raise ConfigurationError(f"{path} is there already: choose another name, or remove it")
    head = await log.head_position()
    part = path.with_name(f"{path.name}.part")
    begun = _begun(part, after) if part.exists() else None
    end = begun.last if begun is not None else min(up_to or head, head)
    if begun is not None and up_to is not None and up_to != end:
        raise ConfigurationError(f"{part} was begun for the events up to {end}: continue with that, or remove it")
    if end <= after:
        raise ConfigurationError(f"there are no events behind position {after}: the log ends at {head}")
    position, digest, size = (
        (begun.position, begun.digest, begun.size) if begun is not None else (after, GENESIS_HASH, 0)
    )
    with _writing(part, size) as write:
        if begun is None:
            about = {
                "jobledger": "export",
                "format": FORMAT,
                "from": after + 1,
                "to": end,
                "exported_at": _moment(_now()),
            }
            write([orjson.dumps(about)])
        while position < end:
            page = await log.read_documents(after=position, limit=min(PAGE_EVENTS, end - position))
            for expected, (document, _) in enumerate(page, position + 1):
                if document["_id"] != expected:
                    raise InvalidExportFile(
                        f"The log has a hole at position {expected}: `jobledger log verify` says more."
                    )
                if (what := find_envelope_deviation(document)) is not None:
                    raise InvalidExportFile(
                        f"The event at position {expected} {what}: `jobledger log verify` says more."
                    )
                digest = hashlib.sha256(digest + document["hash"]).digest()
            if not page:
                raise InvalidExportFile(f"The log ends at position {position}, and reached {end} before.")
            write([_exported(document, raw) for document, raw in page])
            position += len(page)
            on_progress(position, end)
        write([orjson.dumps({"end": True, "events": end - after, "digest": digest.hex()})])
    part.replace(path)
    return ExportSummary(after + 1, end, digest, digest if after == 0 else b"")


def _exported(document: Document, raw: bytes) -> bytes:
    try:
        return encode_event(document)
    except (TypeError, ValueError) as error:
        what = find_deviation(document, raw, None) or f"cannot be written: {error}"
        raise InvalidExportFile(
            f"The event at position {document['_id']} {what}: `jobledger log verify` says more."
        ) from error


@dataclass(frozen=True, slots=True)
class _Begun:
    """How far an interrupted export has got: `size` bytes of the file are good."""

    last: int
    position: int
    digest: bytes
    size: int


def _begun(part: Path, after: int) -> _Begun | None:
    """Look at what is there of an interrupted export; None if nothing of it is any use."""
    about: dict[str, Any] | None = None
    position, digest, good = after, GENESIS_HASH, 0
    for lines, size in _frames(part):
        for line in lines:
            if about is None:
                about = _about(part, line)
                if about["from"] != after + 1:
                    raise ConfigurationError(
                        f"{part} was begun with position {about['from']}: continue with that, or remove it"
                    )
            elif line.startswith(_LAST):  # only the new name is missing
                return _Begun(about["to"], position, digest, good if _compressed(part) else size - len(line) - 1)
            else:
                try:
                    found = orjson.loads(line)
                    digest = hashlib.sha256(digest + bytes.fromhex(found["hash"])).digest()
                    position = found["position"]
                except (ValueError, KeyError, TypeError) as error:
                    raise InvalidExportFile(f"{part} is damaged: remove it, and the export begins anew") from error
        good = size
    return None if about is None else _Begun(about["to"], position, digest, good)


@contextmanager
def _writing(part: Path, size: int) -> Iterator[Callable[[Iterable[bytes]], None]]:
    """Open a file to be continued behind `size` bytes; yields what appends lines. Each call is a frame of its own."""
    try:
        with part.open("ab") as file:
            file.truncate(size)
            compressor = zstandard.ZstdCompressor(level=_LEVEL) if _compressed(part) else None

            def write(lines: Iterable[bytes]) -> None:
                text = b"".join(line + b"\n" for line in lines)
                file.write(compressor.compress(text) if compressor else text)

            yield write
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigurationError(f"{part} cannot be written: {error.strerror}") from error


# Import ---------------------------------------------------------------------------------------------------------------


class StagedEventStore(EventStore):
    """What is to become the log, to be checked like one."""

    collection = STAGING_COLLECTION


async def import_log(
    db: Database, paths: Sequence[Path], *, told: ProgressCallback = lambda position, upto: None
) -> ExportSummary:
    """Make the events in these files, which follow each other, the log of a database that has none.

    `told` is told of each event twice: when it is written, and when it is checked. What was interrupted is continued.

    Raises:
        ConfigurationError: the database has a log, or is in use; or the files do not follow each other.
        DamagedFile: a file is not what was exported. There is no log then, as before.
        DatabaseUnsuitable: this user may not do it.
        LedgerUnavailable: the database failed; the same call continues.
    """
    files = _in_order(paths)
    last = files[-1][1]
    await _refuse_unless_empty(db)
    staged = StagedEventStore(db)
    with translate_errors("writing the imported events"):
        position = await staged.head_position()
        if position > last.last:
            await db.drop_collection(STAGING_COLLECTION)
            position = 0
        for path, summary in files:
            if position >= summary.last:
                continue
            for page in iterate_documents(path, after=position):
                await db[STAGING_COLLECTION].insert_many(page)  # in order: whoever goes on finds where by the last one
                position = page[-1]["_id"]
                told(position, 2 * last.last)
    try:
        with translate_errors("checking the imported events"):
            await staged.prepare()
        verdict = await verify_log(
            staged, expected_digest=(last.last, last.log_digest), on_progress=lambda at, end: told(end + at, end + end)
        )
        wrong = None if verdict.problem is None else str(verdict.problem)
    except DatabaseUnsuitable as error:
        wrong = str(error)
    if wrong is not None:
        await db.drop_collection(STAGING_COLLECTION)
        raise InvalidExportFile(f"What was exported is not in these files: {wrong}. Nothing was imported.")
    await _make_it_the_log(db, last.last)
    return ExportSummary(1, last.last, last.log_digest, last.log_digest)


def _in_order(paths: Sequence[Path]) -> list[tuple[Path, ExportSummary]]:
    """Look at all files; return them in the order of their events."""
    found: list[tuple[Path, ExportSummary]] = []
    for path in sorted(paths, key=lambda path: first_position(path)):
        expected = found[-1][1].last + 1 if found else 1
        summary = check_export_file(path, before=found[-1][1].log_digest if found else GENESIS_HASH)
        if summary.first != expected:
            raise ConfigurationError(
                f"{path} begins with position {summary.first}, and position {expected} is needed: an import takes all "
                "events from the first on, from one file or several that follow each other"
            )
        found.append((path, summary))
    return found


async def _refuse_unless_empty(db: Database) -> None:
    with translate_errors("looking whether the database is empty"):
        if await db.events.find_one({}, {"_id": 1}) is not None:
            raise ConfigurationError(
                f"the database {db.name} has a log already: an import needs one without (mongodb.db_name names it)"
            )
        views = await db.checkpoints.find_one({"_id": "views", "position": {"$gt": 0}})
        if views is not None:
            raise ConfigurationError(f"the database {db.name} has views of another log: an import needs an empty one")
        for collection in ("leaders", "workers"):
            alive = await db[collection].find_one({"released": False, "$nor": [EXPIRED_LEASE_FILTER]})
            if alive is not None:
                raise ConfigurationError(
                    f"a process is at work in the database {db.name} ({alive['_id']}): stop everything before an import"
                )


async def _make_it_the_log(db: Database, last: int) -> None:
    """Put what was imported in the place of the empty log, without losing what somebody may write at this moment."""
    aside = "events.before-import"
    try:
        with translate_errors("making the imported events the log"):
            await db.counters.update_one({"_id": "events"}, {"$max": {"next": last}}, upsert=True)
            if "events" in await db.list_collection_names():
                await db.events.rename(aside, dropTarget=True)
            await db[STAGING_COLLECTION].rename("events")
            if await db[aside].find_one({}) is None:
                await db.drop_collection(aside)
                return
            await db.events.rename(STAGING_COLLECTION)
            await db[aside].rename("events")
    except LedgerUnavailable as error:
        if server_error_code(error) == UNAUTHORIZED:
            raise DatabaseUnsuitable(
                "This user may not make the imported events the log: an import is for an administrator of the database "
                "(the role `dbOwner` is enough)."
            ) from error
        raise
    raise ConfigurationError(
        f"somebody has written to the database {db.name} meanwhile: stop everything before an import"
    )


# Reading a file -------------------------------------------------------------------------------------------------------


def check_export_file(
    path: Path, *, before: bytes = GENESIS_HASH, told: Callable[[int], None] = lambda size: None
) -> ExportSummary:
    """Read a whole file and make sure that it is complete; return what it holds. `told` is told the bytes read.

    `before` is the digest of all events before the first in the file.

    Raises:
        DamagedFile: it is not what an export has written.
        ConfigurationError: it cannot be read.
    """
    about: dict[str, Any] | None = None
    position, digest, number = 0, GENESIS_HASH, 0
    ended = False
    for lines, size in _frames(path, whole=True):
        for line in lines:
            number += 1
            if about is None:
                about = _about(path, line)
                position = about["from"] - 1
                continue
            try:
                found = orjson.loads(line)
                if ended:
                    raise ValueError("there is more behind what should be its last line")
                if found.get("end") is True:
                    ended = True
                    if (found["events"], found["digest"]) != (position - about["from"] + 1, digest.hex()):
                        raise ValueError("its last line says something else of the events than they do")
                    continue
                if found["position"] != position + 1:
                    raise ValueError(f"position {position + 1} should be there, and {found['position']} is")
                hash_ = bytes.fromhex(found["hash"])
                position, digest = position + 1, hashlib.sha256(digest + hash_).digest()
                before = hashlib.sha256(before + hash_).digest()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InvalidExportFile(f"{path}, line {number} is not what an export writes: {_why(error)}") from error
        told(size)
    if about is None or not ended:
        raise InvalidExportFile(f"{path} is not complete: it was cut off after line {number}. Nothing was imported.")
    return ExportSummary(about["from"], position, digest, before)


def first_position(path: Path) -> int:
    """Return the position of the first event in a file.

    Raises:
        DamagedFile: this is no export.
    """
    for lines, _ in _frames(path):
        for line in lines:
            return int(_about(path, line)["from"])
    raise InvalidExportFile(f"{path} is no export of a ledger: it has no first line.")


def iterate_documents(path: Path, *, after: int) -> Iterator[list[Document]]:
    """Yield the events of a file that was looked at, behind a position, some at a time.

    Raises:
        DamagedFile: a line is no event.
    """
    number = 0
    for lines, _ in _frames(path, whole=True):
        page: list[Document] = []
        for line in lines:
            number += 1
            if number == 1 or line.startswith(_LAST):
                continue
            try:
                document = decode_event(line)
            except (ValueError, TypeError) as error:
                raise InvalidExportFile(f"{path}, line {number} is not what an export writes: {_why(error)}") from error
            if document["_id"] > after:
                page.append(document)
        if page:
            yield page


def _about(path: Path, line: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(line)
        if found["jobledger"] == "export" and found["format"] == FORMAT and found["from"] <= found["to"]:
            return dict(found)
        if found["jobledger"] == "export" and found["format"] != FORMAT:
            raise InvalidExportFile(
                f"{path} was exported in format {found['format']}, and this program knows format {FORMAT}."
            )
    except (ValueError, KeyError, TypeError):
        pass
    raise InvalidExportFile(f"{path} is no export of a ledger: its first line does not say so.")


def _frames(path: Path, *, whole: bool = False) -> Iterator[tuple[list[bytes], int]]:
    """Yield complete lines, some at a time, and how many bytes of the file hold them and all before.

    What was cut off at the end is left out, or is an error if the file should be `whole`.
    """
    try:
        with path.open("rb") as file:
            yield from (
                _compressed_frames(path, file, whole=whole)
                if _compressed(path)
                else _plain_frames(path, file, whole=whole)
            )
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error


_BLOCK: Final = 4 * 1024 * 1024


def _plain_frames(path: Path, file: IO[bytes], *, whole: bool) -> Iterator[tuple[list[bytes], int]]:
    rest, size = b"", 0
    while block := file.read(_BLOCK):
        *lines, rest = (rest + block).split(b"\n")
        size += sum(map(len, lines)) + len(lines)
        yield lines, size
    if rest and whole:
        raise InvalidExportFile(f"{path} is not complete: it was cut off within a line. Nothing was imported.")


def _compressed_frames(path: Path, file: IO[bytes], *, whole: bool) -> Iterator[tuple[list[bytes], int]]:
    decompressor, rest, size, within = zstandard.ZstdDecompressor(), b"", 0, b""
    try:
        unpack, used = decompressor.decompressobj(), 0
        block = file.read(_BLOCK)
        while block:
            within += unpack.decompress(block)
            if not unpack.eof:
                used += len(block)
                block = file.read(_BLOCK)
                continue
            block, used = unpack.unused_data, used + len(block) - len(unpack.unused_data)
            size += used
            *lines, rest = (rest + within).split(b"\n")
            yield lines, size
            unpack, used, within = decompressor.decompressobj(), 0, b""
            block = block or file.read(_BLOCK)
        if used and whole:
            raise InvalidExportFile(f"{path} is not complete: it was cut off. Nothing was imported.")
    except zstandard.ZstdError as error:
        if whole or not size:
            raise InvalidExportFile(
                f"{path} cannot be decompressed: it is damaged, or not compressed at all."
            ) from error


def _compressed(path: Path) -> bool:
    return path.name.removesuffix(".part").endswith(".zst")


def _why(error: Exception) -> str:
    return f"the field {error} is missing" if isinstance(error, KeyError) else str(error)


def _now() -> datetime:
    return datetime.now(UTC)
