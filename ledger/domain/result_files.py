"""Find the result files of a step. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from pydantic import ValidationError

from jobledger.ledger.domain.events import ResultFile, StepCompleted

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def is_sha256(text: str) -> bool:
    """Return whether a text is a SHA-256 digest in lower-case hex, as files are named."""
    return _DIGEST.fullmatch(text) is not None


def find_step_files(step: StepCompleted) -> Iterator[ResultFile]:
    """Yield the files that were saved in a step: those that its output names, and the others."""
    yield from find_result_files(step.output)
    yield from step.files


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
