"""The file format of an exported log: one line of JSON per event, between a header and a trailer.

The trailer holds the number of events and the digest that `log verify` computes for them. A file without a trailer was
cut off. A file whose events do not match its trailer was changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Final

import orjson
import zstandard

from jobledger.ledger.domain.errors import ConfigurationError, JobledgerError
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.hash_chain import GENESIS_HASH
from jobledger.ledger.store.storage_format import ENVELOPE_FIELDS

FORMAT: Final = 1
_OPTIONS: Final = orjson.OPT_PASSTHROUGH_DATETIME
_FIELDS: Final = ENVELOPE_FIELDS.keys() - {"_id"} | {"position"}
_COMPRESSION_LEVEL: Final = 3
TRAILER_PREFIX: Final = b'{"end":'
"""The beginning of the last line."""
ProgressCallback = Callable[[int, int], None]
"""Called with the current and the last position."""


class InvalidExportFile(JobledgerError):
    """A file is not what an export has written, or was changed. The message says where, and how to fix it."""


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """What a file contains: the events from `first` to `last`, and a digest of them.

    `log_digest` is the digest of all events up to `last`, if the files before this one hold the others.
    """

    first: int
    last: int
    digest: bytes
    log_digest: bytes = b""

    @property
    def events(self) -> int:
        return self.last - self.first + 1


def encode_event(document: Mapping[str, Any]) -> bytes:
    """Return the line for a stored event. Times in its payload are encoded as `{"$date": …}`.

    No field name in an event begins with `$`, so the encoding is unambiguous.
    """
    plain = {"position": document["_id"], **document, "time": format_timestamp(document["time"])}
    plain["prev"], plain["hash"] = document["prev"].hex(), document["hash"].hex()
    del plain["_id"]
    return orjson.dumps(plain, default=_encode_value, option=_OPTIONS)


def encode_event_or_stub(document: Mapping[str, Any]) -> bytes:
    """Return the line for an event. For an event that was damaged in the database, return what is known of it."""
    try:
        return encode_event(document)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        stub = {"position": document["_id"], "stream": document.get("stream"), "type": document.get("type")}
        why = f"This event was changed in the database: {error!r}. For details, run `jobledger log verify`."
        return orjson.dumps({**stub, "unreadable": why}, default=str)


def decode_event(line: bytes) -> Document:
    """Return the event of a line, as it is stored.

    Raises:
        ValueError: The line is not an event.
    """
    found = json.loads(line, object_hook=_decode_object) if b'{"$' in line else orjson.loads(line)
    if not isinstance(found, dict) or found.keys() != _FIELDS:
        raise ValueError("its fields are not those of an event")
    document: Document = {"_id": found.pop("position"), **found}
    document["time"] = datetime.fromisoformat(document["time"])
    document["prev"], document["hash"] = bytes.fromhex(document["prev"]), bytes.fromhex(document["hash"])
    return document


def format_timestamp(time: datetime) -> str:
    """Return a time in UTC as ISO 8601 with milliseconds."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds")[:23] + "Z"


def _encode_value(value: Any) -> Any:
    if isinstance(value, datetime):
        return {"$date": format_timestamp(value)}
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    raise TypeError(f"a {type(value).__name__} in an event")


def _decode_object(value: dict[str, Any]) -> Any:
    if value.keys() == {"$date"}:
        return datetime.fromisoformat(value["$date"])
    return bytes.fromhex(value["$bytes"]) if value.keys() == {"$bytes"} else value


@contextmanager
def open_for_append(part: Path, size: int) -> Iterator[Callable[[Iterable[bytes]], None]]:
    """Open a file for appending after its first `size` bytes. Yields a function that appends lines as one frame."""
    try:
        with part.open("ab") as file:
            file.truncate(size)
            compressor = zstandard.ZstdCompressor(level=_COMPRESSION_LEVEL) if is_compressed(part) else None

            def write(lines: Iterable[bytes]) -> None:
                text = b"".join(line + b"\n" for line in lines)
                file.write(compressor.compress(text) if compressor else text)

            yield write
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigurationError(f"{part} cannot be written: {error.strerror}") from error


def check_export_file(path: Path, *, before: bytes) -> ExportSummary:
    """Check that an export file is complete and unchanged, and return what it contains.

    Args:
        path: The file.
        before: The digest of all events before the first one in the file.

    Raises:
        InvalidExportFile: The file is not complete, or not what an export has written.
        ConfigurationError: The file cannot be read.
    """
    header: dict[str, Any] = {}
    position, digest, number = 0, GENESIS_HASH, 0
    has_trailer = False
    for lines, _ in read_frames(path, must_be_complete=True):
        for line in lines:
            number += 1
            if not header:
                header = read_header(path, line)
                position = header["from"] - 1
                continue
            try:
                found = orjson.loads(line)
                if has_trailer:
                    raise ValueError("there are lines after the trailer")
                if found.get("end") is True:
                    has_trailer = True
                    if (found["events"], found["digest"]) != (position - header["from"] + 1, digest.hex()):
                        raise ValueError("the trailer does not match the events")
                    continue
                if found["position"] != position + 1:
                    raise ValueError(f"expected position {position + 1}, got {found['position']}")
                hash_ = bytes.fromhex(found["hash"])
                position, digest = position + 1, hashlib.sha256(digest + hash_).digest()
                before = hashlib.sha256(before + hash_).digest()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise _build_line_error(path, number, error) from error
    if not has_trailer:
        raise InvalidExportFile(f"{path} is not complete: it was cut off after line {number}. Nothing was imported.")
    return ExportSummary(header["from"], position, digest, before)


def read_first_position(path: Path) -> int:
    """Return the position of the first event in a file.

    Raises:
        InvalidExportFile: The file is not an export.
    """
    for lines, _ in read_frames(path):
        for line in lines:
            return int(read_header(path, line)["from"])
    raise InvalidExportFile(f"{path} is not an export of a log: it has no header.")


def iterate_documents(path: Path, *, after: int) -> Iterator[list[Document]]:
    """Yield the events after a position from a file that was checked, some at a time.

    Raises:
        InvalidExportFile: A line is not an event.
    """
    number = 0
    for lines, _ in read_frames(path, must_be_complete=True):
        page: list[Document] = []
        for line in lines:
            number += 1
            if number == 1 or line.startswith(TRAILER_PREFIX):
                continue
            try:
                document = decode_event(line)
            except (ValueError, TypeError) as error:
                raise _build_line_error(path, number, error) from error
            if document["_id"] > after:
                page.append(document)
        if page:
            yield page


def read_header(path: Path, line: bytes) -> dict[str, Any]:
    """Return the header in the first line of a file.

    Raises:
        InvalidExportFile: It is not the header of an export, or has another format version.
    """
    try:
        found = orjson.loads(line)
        if found["jobledger"] == "export" and found["format"] == FORMAT and found["from"] <= found["to"]:
            return dict(found)
        if found["jobledger"] == "export" and found["format"] != FORMAT:
            raise InvalidExportFile(
                f"{path} was exported in format {found['format']}, but this version reads format {FORMAT}."
            )
    except (ValueError, KeyError, TypeError):
        pass
    raise InvalidExportFile(f"{path} is not an export of a log: its first line is not an export header.")


def read_frames(path: Path, *, must_be_complete: bool = False) -> Iterator[tuple[list[bytes], int]]:
    """Yield complete lines, some at a time, and the size in bytes of the file up to their end.

    An incomplete frame at the end is ignored, unless `must_be_complete`.
    """
    read = _read_compressed_frames if is_compressed(path) else _read_plain_frames
    try:
        with path.open("rb") as file:
            yield from read(path, file, must_be_complete)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error


_BLOCK_BYTES: Final = 4 * 1024 * 1024


def _read_plain_frames(path: Path, file: IO[bytes], must_be_complete: bool) -> Iterator[tuple[list[bytes], int]]:
    rest, size = b"", 0
    while block := file.read(_BLOCK_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        size += sum(map(len, lines)) + len(lines)
        yield lines, size
    if rest and must_be_complete:
        raise InvalidExportFile(f"{path} is not complete: it was cut off within a line. Nothing was imported.")


def _read_compressed_frames(path: Path, file: IO[bytes], must_be_complete: bool) -> Iterator[tuple[list[bytes], int]]:
    decompressor, rest, size, within = zstandard.ZstdDecompressor(), b"", 0, b""
    try:
        unpack, used = decompressor.decompressobj(), 0
        block = file.read(_BLOCK_BYTES)
        while block:
            within += unpack.decompress(block)
            if not unpack.eof:
                used += len(block)
                block = file.read(_BLOCK_BYTES)
                continue
            block, used = unpack.unused_data, used + len(block) - len(unpack.unused_data)
            size += used
            *lines, rest = (rest + within).split(b"\n")
            yield lines, size
            unpack, used, within = decompressor.decompressobj(), 0, b""
            block = block or file.read(_BLOCK_BYTES)
        if used and must_be_complete:
            raise InvalidExportFile(f"{path} is not complete: it was cut off. Nothing was imported.")
    except zstandard.ZstdError as error:
        if must_be_complete or not size:
            raise InvalidExportFile(
                f"{path} cannot be decompressed: it is damaged, or not compressed at all."
            ) from error


def is_compressed(path: Path) -> bool:
    """Return whether the name of a file, complete or partial, selects compression."""
    return path.name.removesuffix(".part").endswith(".zst")


def _build_line_error(path: Path, number: int, error: Exception) -> InvalidExportFile:
    problem = f"the field {error} is missing" if isinstance(error, KeyError) else error
    return InvalidExportFile(f"{path}, line {number} is not a valid line of an export: {problem}")
