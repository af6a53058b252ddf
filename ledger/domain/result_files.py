"""Find the result files that the output of a step names. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from pydantic import ValidationError

from jobledger.ledger.domain.events import ResultFile

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def is_sha256(text: str) -> bool:
    """Return whether a text is a SHA-256 digest in lower-case hex, as files are named."""
    return _DIGEST.fullmatch(text) is not None


def find_result_files(output: Any) -> Iterator[ResultFile]:
    """Yield the result files that a step's output names: each object that has all fields of a `ResultFile`.

    Other digests, such as those in a lock file, are data.
    """
    pending = [output]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if "sha256" in value and value.keys() >= ResultFile.model_fields.keys():
                with suppress(ValidationError):  # another object that looks like one
                    yield ResultFile.model_validate(value)
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
