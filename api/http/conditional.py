"""Conditional requests and byte ranges (RFC 9110, sections 8.8, 13 and 14).

The ETag of a representation is derived from everything that a response shows, never from a version alone: a response
may also show things that other streams change, such as whether a job's batch is paused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from hashlib import blake2b
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import Response

from jobledger.api.http.errors import ApiError

MAX_RANGES: Final = 50
_ETAG: Final = re.compile(r'(W/)?("[^"]*")')
_RANGE: Final = re.compile(r"(\d{0,18})-(\d{0,18})", re.ASCII)
_RANGE_UNIT: Final = re.compile(r"\s*[\w!#$%&'*+.^`|~-]+\s*", re.ASCII)
_RANGE_HINT: Final = "expected a range such as bytes=0-499, or bytes=-500 for the last bytes"

Range = tuple[int, int]
"""First byte, and the byte after the last."""


def compute_etag(content: bytes, *metadata: str, version: int | None = None) -> str:
    """Return a strong ETag.

    Args:
        content: The content of the representation, without what is equal in every response.
        metadata: Headers that belong to the representation, such as its Content-Type.
        version: Stream version of a job or batch. The tag begins with it, so that If-Match can name it.
    """
    digest = blake2b(content, digest_size=16)
    for value in metadata:
        digest.update(b"\0" + value.encode())
    prefix = "" if version is None else f"{version}-"
    return f'"{prefix}{digest.hexdigest()}"'


@dataclass(frozen=True, slots=True)
class ConditionalRequest:
    """Compares the conditions in the headers of a request with the validators of the current representation.

    Attributes:
        etag: Strong ETag, in quotes. It must cover everything that the response shows.
        modified_at: Time of the last change in UTC. None: conditions on the time are ignored.
    """

    request_headers: Headers
    etag: str
    modified_at: datetime | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The validators as response headers."""
        last_modified = self._last_modified
        return {"ETag": self.etag} | ({} if last_modified is None else {"Last-Modified": last_modified})

    @property
    def _last_modified(self) -> str | None:
        """The value of Last-Modified: whole seconds, in GMT."""
        return None if self.modified_at is None else format_datetime(self.modified_at.astimezone(UTC), usegmt=True)

    def is_not_modified(self) -> bool:
        """Return whether the client has the current representation, so that the response is 304.

        The order of the conditions is that of RFC 9110, 13.2.2.

        Raises:
            ApiError: 412, If-Match or If-Unmodified-Since does not hold.
        """
        headers = self.request_headers
        if "if-match" in headers:
            if not self._is_listed("if-match", weak_comparison=False):
                raise self._build_precondition_error("If-Match")
        elif self._is_modified_since(headers.get("if-unmodified-since")) is True:
            raise self._build_precondition_error("If-Unmodified-Since")
        if "if-none-match" in headers:
            return self._is_listed("if-none-match", weak_comparison=True)
        return self._is_modified_since(headers.get("if-modified-since")) is False

    def parse_ranges(self, size: int) -> Sequence[Range]:
        """Return the requested byte ranges of a file, sorted and merged. Empty: the response is the whole file.

        Args:
            size: Size of the file in bytes.

        Raises:
            ApiError: 416, the header is malformed, or the file has none of the ranges.
        """
        if "range" not in self.request_headers or not self._is_if_range_current():
            return []
        unit, _, specs_text = self.request_headers["range"].partition("=")
        if unit.strip().lower() != "bytes":
            if _RANGE_UNIT.fullmatch(unit) and specs_text:
                return []  # RFC 9110, 14.2: unknown units are ignored
            raise _build_range_error(f"Malformed Range: {_RANGE_HINT}", size)
        specs = [spec.strip() for spec in specs_text.split(",") if spec.strip()]
        if len(specs) > MAX_RANGES:
            raise _build_range_error(f"Range has {len(specs)} parts, the maximum is {MAX_RANGES}", size)
        ranges = sorted(part for spec in specs if (part := _parse_range(spec, size)) is not None)
        if not ranges:
            raise _build_range_error("The file has none of the requested ranges", size)
        merged = ranges[:1]
        for start, end in ranges[1:]:
            if start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        return merged

    def respond(self, content: bytes, media_type: str, headers: Mapping[str, str]) -> Response:
        """Return the content, or 304 if the client has it.

        Raises:
            ApiError: 412.
        """
        if self.is_not_modified():
            return Response(status_code=304, headers={**headers, **self.headers})
        return Response(content, headers={**headers, **self.headers}, media_type=media_type)

    def _is_listed(self, header: str, *, weak_comparison: bool) -> bool:
        """Return whether a header lists this ETag (RFC 9110, 8.8.3.2). Repeated headers form one list."""
        value = ",".join(self.request_headers.getlist(header))
        if value.strip() == "*":
            return True
        return any(tag == self.etag and (weak_comparison or not weak) for weak, tag in _ETAG.findall(value))

    def _is_modified_since(self, header: str | None) -> bool | None:
        """Compare the representation with the date in a header. None: the header or the time of change is missing.

        Invalid dates are ignored, as RFC 9110, 13.1.3 requires.
        """
        if header is None or self.modified_at is None:
            return None
        try:
            since = parsedate_to_datetime(header)
        except ValueError:
            return None
        return self.modified_at.replace(microsecond=0) > (since if since.tzinfo else since.replace(tzinfo=UTC))

    def _is_if_range_current(self) -> bool:
        value = self.request_headers.get("if-range")
        return value is None or value.strip() in (self.etag, self._last_modified)

    def _build_precondition_error(self, header: str) -> ApiError:
        message = f"Precondition failed: the resource has changed ({header}). Read it again."
        return ApiError(412, "precondition_failed", message, details={"etag": self.etag})


def _parse_range(spec: str, size: int) -> Range | None:
    """Parse one range; None if it begins after the end of the file."""
    match = _RANGE.fullmatch(spec)
    if match is None or spec == "-" or (match[1] and match[2] and int(match[1]) > int(match[2])):
        raise _build_range_error(f"Malformed Range {spec[:40]!r}: {_RANGE_HINT}", size)
    if not match[1]:
        start, end = max(0, size - int(match[2])), size
    else:
        start, end = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
    return (start, end) if start < end else None


def _build_range_error(message: str, size: int) -> ApiError:
    text = f"{message}. The file has {size} bytes."
    return ApiError(416, "range_not_satisfiable", text, details={"size": size})
