"""A file that a download has written in part, and the requests that continue it (RFC 9110, sections 13.1.5 and 14)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

import httpx

_STRONG_ETAG: Final = re.compile(r'"[!#-~\x80-\xff]*"')
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-\d{1,18}/(?:(\d{1,18})|\*)", re.IGNORECASE)


@dataclass(slots=True)
class PartialFile:
    """The file of one download. Pass it to each try of the download.

    Attributes:
        path: The file.
        content_type: The content type of the response that began it.
        total: The size of the complete file in bytes, if the server has sent it.
        validator: The version of the file, as its server names it. None if the download cannot be continued.
    """

    path: Path
    content_type: str = ""
    total: int | None = None
    validator: str | None = None

    @property
    def size(self) -> int:
        """The number of bytes that the next try keeps."""
        return self.path.stat().st_size if self.validator is not None and self.path.exists() else 0

    def build_headers(self) -> Mapping[str, str]:
        """Return the headers that request the missing part. The server sends the whole file if it has changed."""
        if self.validator is None or not (size := self.size):
            return {}
        return {"Range": f"bytes={size}-", "If-Range": self.validator, "Accept-Encoding": "identity"}

    def begin(self, response: httpx.Response) -> int | None:
        """Return how many bytes of the file the body of a response continues. 0: the body is the whole file.

        None: the body is another part of the file than requested, so it is useless.
        """
        if response.status_code == httpx.codes.PARTIAL_CONTENT:
            size = self.size
            name = "etag" if (self.validator or "").startswith('"') else "last-modified"
            is_same_version = response.headers.get(name, self.validator) == self.validator
            match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", "").strip())
            if not size or match is None or int(match[1]) != size or "content-encoding" in response.headers:
                self.discard()
                return None
            total = int(match[2]) if match[2] else self.total
            if not is_same_version or (self.total is not None and total != self.total):
                self.discard()
                return None
            self.total = total
            return size
        self.path.unlink(missing_ok=True)  # the bytes of another version must not be continued
        is_whole = response.status_code == httpx.codes.OK and "content-encoding" not in response.headers
        length = response.headers.get("content-length", "")
        self.content_type = response.headers.get("content-type", "")
        self.total = int(length) if is_whole and re.fullmatch(r"\d{1,18}", length) else None
        self.validator = _find_strong_validator(response.headers) if is_whole else None
        return 0

    def discard(self) -> None:
        """Let the next try begin at the start of the file."""
        self.validator = self.total = None


def _find_strong_validator(headers: httpx.Headers) -> str | None:
    """Return the entity tag or the time of change, if it is strong: it differs if a single byte of the file differs."""
    if etag := headers.get("etag", "").strip():
        return etag if _STRONG_ETAG.fullmatch(etag) else None
    try:
        age = parsedate_to_datetime(headers["date"]) - parsedate_to_datetime(headers["last-modified"])
    except (KeyError, ValueError, TypeError):
        return None
    return headers["last-modified"] if age.total_seconds() >= 1 else None
