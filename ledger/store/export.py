"""Export the event log to a file. The file format is in `export_file`."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.store.export_file import (
    FORMAT,
    TRAILER_PREFIX,
    ExportSummary,
    InvalidExportFile,
    ProgressCallback,
    encode_event,
    format_timestamp,
    is_compressed,
    open_for_append,
    read_frames,
    read_header,
)
from jobledger.ledger.store.hash_chain import GENESIS_HASH
from jobledger.ledger.store.storage_format import find_deviation, find_envelope_deviation

PAGE_EVENTS: Final = 2000
_ADVICE: Final = "For details, run `jobledger log verify`."


async def export_log(
    event_store: EventStore,
    path: Path,
    *,
    after: int = 0,
    up_to: int | None = None,
    on_progress: ProgressCallback = lambda position, up_to: None,
) -> ExportSummary:
    """Write the events after `after`, up to `up_to` or the current end, to a file. Return what the file contains.

    While incomplete, the file has the suffix `.part`. An interrupted export is continued. A name that ends in `.zst`
    selects compression.

    Raises:
        ConfigurationError: The file already exists or cannot be written, or there are no such events.
        InvalidExportFile: The partial file of an interrupted export is damaged, or the log has a gap or a damaged
            event.
        LedgerUnavailable: The database failed. The same call continues.
    """
    if path.exists():  # noqa: ASYNC240 - an export may block its event loop
        raise ConfigurationError(f"{path} already exists: choose another name, or remove it")
    head = await event_store.read_head_position()
    part = path.with_name(f"{path.name}.part")
    interrupted = _read_progress(part, after) if part.exists() else None
    end, position, digest, size = interrupted or _ExportProgress(min(up_to or head, head), after, GENESIS_HASH, 0)
    if interrupted is not None and up_to is not None and up_to != end:
        raise ConfigurationError(f"{part} was begun for the events up to {end}: continue with that, or remove it")
    if end <= after:
        raise ConfigurationError(f"there are no events after position {after}: the log ends at {head}")
    with open_for_append(part, size) as write:
        if not size:
            header = {"jobledger": "export", "format": FORMAT, "from": after + 1, "to": end}
            write([orjson.dumps({**header, "exported_at": format_timestamp(datetime.now(UTC))})])
        while position < end:
            page = await event_store.read_documents(after=position, limit=min(PAGE_EVENTS, end - position))
            for expected, (document, _) in enumerate(page, position + 1):
                if document["_id"] != expected:
                    raise InvalidExportFile(f"The log has a gap at position {expected}. {_ADVICE}")
                if (what := find_envelope_deviation(document)) is not None:
                    raise InvalidExportFile(f"The event at position {expected} is damaged: {what}. {_ADVICE}")
                digest = hashlib.sha256(digest + document["hash"]).digest()
            if not page:
                raise InvalidExportFile(f"The log ends at position {position}, but had reached {end} before. {_ADVICE}")
            write([_encode_checked(document, raw) for document, raw in page])
            position += len(page)
            on_progress(position, end)
        write([orjson.dumps({"end": True, "events": end - after, "digest": digest.hex()})])
    part.replace(path)
    return ExportSummary(after + 1, end, digest, digest if after == 0 else b"")


def _encode_checked(document: Document, raw: bytes) -> bytes:
    try:
        return encode_event(document)
    except (TypeError, ValueError) as error:
        what = find_deviation(document, raw, None) or f"cannot be written: {error}"
        raise InvalidExportFile(f"The event at position {document['_id']} is damaged: {what}. {_ADVICE}") from error


class _ExportProgress(NamedTuple):
    """How far an interrupted export has got. The first `size` bytes of the file are complete."""

    last: int
    position: int
    digest: bytes
    size: int


def _read_progress(part: Path, after: int) -> _ExportProgress | None:
    """Read a partial file. Return None if it has no complete header."""
    header: dict[str, Any] | None = None
    position, digest, complete_bytes = after, GENESIS_HASH, 0
    for lines, size in read_frames(part):
        for line in lines:
            if header is None:
                header = read_header(part, line)
                if header["from"] != after + 1:
                    raise ConfigurationError(
                        f"{part} was begun with position {header['from']}: continue with that, or remove it"
                    )
            elif line.startswith(TRAILER_PREFIX):  # only the new name is missing
                bytes_before = complete_bytes if is_compressed(part) else size - len(line) - 1
                return _ExportProgress(header["to"], position, digest, bytes_before)
            else:
                try:
                    event = orjson.loads(line)
                    digest = hashlib.sha256(digest + bytes.fromhex(event["hash"])).digest()
                    position = event["position"]
                except (ValueError, KeyError, TypeError) as error:
                    raise InvalidExportFile(f"{part} is damaged: remove it, and start the export again") from error
        complete_bytes = size
    return None if header is None else _ExportProgress(header["to"], position, digest, complete_bytes)
