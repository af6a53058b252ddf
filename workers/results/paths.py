"""Validate and derive the paths of result files. Pure functions.

The job process and the worker apply the same rules, because the worker does not trust job processes. Every valid path
can be fetched under its URL, and two valid paths never mean the same file.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from hashlib import sha256
from typing import Final

from jobledger.workers.processor import ProcessorError

MAX_PATH_BYTES: Final = 1000
MAX_PART_BYTES: Final = 200
_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of control, format (such as text direction), surrogate and line separator characters."""
_JOINERS: Final = "\u200c\u200d"  # format characters that Persian, Indic scripts and emoji need
_PERCENT_CODE: Final = re.compile(r"%[0-9A-Fa-f]{2}")
_RESERVED: Final = "link"
"""Not allowed as the last part, because `POST …/files/{path}/link` creates a signed link for `{path}`."""
_SUFFIX_LENGTHS: Final = (8, 64)


def normalize_path(path: str) -> str:
    """Return the path in Unicode normal form C.

    Raises:
        ProcessorError: INVALID_PATH, with the path and the broken rule.
    """
    normal = unicodedata.normalize("NFC", path)
    if rule := _find_broken_rule(normal):
        escaped = ascii(path[:300])
        raise ProcessorError(
            "INVALID_PATH",
            f"The result path {escaped} is invalid: {rule}. Use a relative path such as 'reports/2025/summary.md'.",
            details={"path": escaped, "rule": rule},
        )
    return normal


def _find_broken_rule(path: str) -> str | None:
    hidden = next((c for c in path if unicodedata.category(c) in _HIDDEN and c not in _JOINERS), None)
    if hidden is not None:
        return f"it contains the control or format character U+{ord(hidden):04X}"
    if "\\" in path:
        return "it contains a backslash; parts are separated by '/'"
    if _PERCENT_CODE.search(path):
        return "it contains a percent-encoded character; write the character itself"
    if len(path.encode()) > MAX_PATH_BYTES:
        return f"it is longer than {MAX_PATH_BYTES} bytes of UTF-8"
    if path.startswith("/"):
        return "it is absolute"
    parts = path.split("/")
    if "" in parts:
        return "it has an empty part"
    for part in parts:
        if part in (".", ".."):
            return f"it has the part '{part}'"
        if part != part.strip() or part.endswith("."):
            return "a part begins with a space, or ends with a space or dot"
        if len(part.encode()) > MAX_PART_BYTES:
            return f"a part is longer than {MAX_PART_BYTES} bytes of UTF-8"
    if parts[-1] == _RESERVED:
        return f"its last part is '{_RESERVED}', which the API uses for signed links"
    return None


def generate_candidates(path: str, job_id: str) -> Iterator[str]:
    """Yield a valid path, then derived paths with a suffix before the extension."""
    yield path
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    if not stem or len(extension.encode()) > MAX_PART_BYTES // 4:
        stem, dot, extension = name, "", ""
    digest = sha256(f"{job_id}/{path}".encode()).hexdigest()  # includes the path, because the stem may be truncated
    for length in _SUFFIX_LENGTHS:
        suffix = f"-{digest[:length]}{dot}{extension}"
        max_stem_bytes = min(MAX_PART_BYTES, MAX_PATH_BYTES - len((folder + slash).encode())) - len(suffix.encode())
        if max_stem_bytes > 0:
            yield f"{folder}{slash}{_truncate(stem, max_stem_bytes)}{suffix}"


def _truncate(text: str, size: int) -> str:
    """Return the beginning of a text, at most `size` bytes of UTF-8."""
    return text.encode()[:size].decode(errors="ignore")
