"""api: conditional requests and parts of files, as RFC 9110 has them (sections 13 and 14)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from hashlib import blake2b
from typing import Final

import orjson
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.http.errors import ApiError, encode_json, json_response
from jobledger.ledger.mongo.connection import Document

MAX_RANGES: Final = 50
_TAG: Final = re.compile(r'(W/)?("[^"]*")')
_RANGE: Final = re.compile(r"(\d{0,18})-(\d{0,18})", re.ASCII)

Range = tuple[int, int]
"""From the first byte up to and without the last."""


@dataclass(frozen=True, slots=True)
class Validators:
    """What is there now: `etag` a strong one, in its quotes; `modified` a moment in UTC."""

    etag: str
    modified_at: datetime

    @property
    def last_modified(self) -> str:
        """As the header has it: whole seconds."""
        return format_datetime(self.modified_at.astimezone(UTC), usegmt=True)

    @property
    def headers(self) -> dict[str, str]:
        """What tells a client which version it has got."""
        return {"ETag": self.etag, "Last-Modified": self.last_modified}


def compute_etag(document: Document, text: bytes) -> str:
    """Return the tag of a job or batch as it is shown: its version, which If-Match compares, and a digest of all."""
    return f'"{document["version"]}-{blake2b(text, digest_size=8).hexdigest()}"'


def build_conditional_response(request: Request, name: str, document: Document) -> Response:
    """Return a job or batch as it is shown, or 304 if the client says that it has exactly this."""
    text = encode_json(document)
    etag = compute_etag(document, text)
    headers = {"ETag": etag, "Cache-Control": "private, no-cache", "Vary": "Authorization, Cookie"}
    if _names(request.headers.get("if-none-match", ""), etag, weakly=True):
        return Response(status_code=304, headers=headers)
    return json_response({"status": "success", name: orjson.Fragment(text)}, headers=headers)


def is_not_modified(headers: Headers, version: Validators) -> bool:
    """Return whether the client says that it has this version: then 304 is the answer.

    Raises:
        ApiError: 412, when the client wants a certain version and this is another.
    """
    second = version.modified_at.replace(microsecond=0)
    if (wanted := headers.get("if-match")) is not None:
        if not _names(wanted, version.etag, weakly=False):
            raise _failed("If-Match", version)
    elif (since := _moment(headers.get("if-unmodified-since"))) is not None and second > since:
        raise _failed("If-Unmodified-Since", version)
    if (had := headers.get("if-none-match")) is not None:
        return _names(had, version.etag, weakly=True)
    since = _moment(headers.get("if-modified-since"))
    return since is not None and second <= since


def _failed(header: str, version: Validators) -> ApiError:
    message = f"What is there now is not what {header} asks for."
    return ApiError(412, "precondition_failed", message, details={"etag": version.etag})


def _names(listed: str, etag: str, *, weakly: bool) -> bool:
    if listed.strip() == "*":
        return True
    return any(tag == etag and (weakly or not weak) for weak, tag in _TAG.findall(listed))


def _moment(text: str | None) -> datetime | None:
    """Read a date; what is none is passed over, as the RFC wants it."""
    try:
        moment = parsedate_to_datetime(text) if text else None
    except ValueError:
        return None
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment


def parse_ranges(headers: Headers, version: Validators, size: int) -> Sequence[Range]:
    """Return which parts of a file of `size` bytes are asked for, in order and not overlapping; none means the whole.

    Raises:
        ApiError: 416, when they cannot be read, or the file has none of them.
    """
    unit, _, listed = headers.get("range", "").partition("=")
    if "range" not in headers or not _still_the_same(headers.get("if-range"), version):
        return []
    if unit.strip().lower() != "bytes":
        if re.fullmatch(r"\s*[\w!#$%&'*+.^`|~-]+\s*", unit, re.ASCII) and listed:
            return []  # in other units than we know: the whole is always right
        raise _refused("A range looks like bytes=0-499, or bytes=-500 for the end", size)
    specs = [spec.strip() for spec in listed.split(",") if spec.strip()]
    if len(specs) > MAX_RANGES:
        raise _refused(f"At most {MAX_RANGES} ranges can be asked for at once", size)
    found = sorted(part for spec in specs if (part := _range(spec, size)) is not None)
    if not found:
        raise _refused("The file has no such range", size)
    merged = found[:1]
    for start, end in found[1:]:
        if start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _still_the_same(wanted: str | None, version: Validators) -> bool:
    return wanted is None or wanted.strip() in (version.etag, version.last_modified)


def _range(spec: str, size: int) -> Range | None:
    """Read one range; None if the file ends before it begins."""
    read = _RANGE.fullmatch(spec)
    if read is None or spec == "-" or (read[1] and read[2] and int(read[1]) > int(read[2])):
        raise _refused(f"{spec[:40]!r} is no range, which looks like bytes=0-499, or bytes=-500 for the end", size)
    if not read[1]:
        start, end = max(0, size - int(read[2])), size
    else:
        start, end = int(read[1]), min(size, int(read[2]) + 1) if read[2] else size
    return (start, end) if start < end else None


def _refused(why: str, size: int) -> ApiError:
    return ApiError(416, "range_not_satisfiable", f"{why}; it has {size} bytes.", details={"size": size})
