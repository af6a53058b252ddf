"""api: the process in which parameters are validated with models of plug-ins: `python -m api.validation_process`.

It reads requests from standard input and writes an answer to each to standard output. Both are a length of 8 bytes
and JSON. A request is a list of checks; the answer is the first error, or null.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pkgutil import resolve_name
from typing import Any, BinaryIO, Final

from pydantic import BaseModel
from pydantic_core import from_json, to_json

from api.errors import ApiError, path
from api.validation import validated

_MEMORY_BYTES: Final = 1024 * 1024 * 1024
_PR_SET_PDEATHSIG: Final = 1
_RAISED: Final = (Exception, SystemExit, KeyboardInterrupt, GeneratorExit)
"""What a validator may raise. Anything else ends the process, which is an answer, too."""


def main() -> None:
    """Answer requests until standard input ends."""
    # A validator that never ends must not outlive the process that would end it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with os.fdopen(os.dup(0), "rb") as requests, os.fdopen(os.dup(1), "wb") as answers:
        # What a plug-in reads or prints must not get between requests and answers.
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        while (request := read_frame(requests)) is not None:
            answers.write(frame(to_json(answer_to(from_json(request)))))
            answers.flush()


def frame(content: bytes) -> bytes:
    """Return content as it is sent."""
    return len(content).to_bytes(8, "big") + content


def read_frame(source: BinaryIO) -> bytes | None:
    """Return the content that is sent next, None at the end."""
    head = source.read(8)
    return source.read(int.from_bytes(head, "big")) if len(head) == 8 else None


def answer_to(checks: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the first error, as the arguments of `ApiError`, or None."""
    for check in checks:
        where = tuple(check["within"])
        try:
            validated(_model(check["model"]), check["parameters"], within=where)
        except ApiError as error:
            return {"status": error.status, "code": error.code, "message": error.message, "details": error.details}
        except _RAISED as error:
            return failed(path(where), check["job_type"], f"raised {type(error).__name__}: {_text_of(error)}")
    return None


def failed(where: str, job_type: str, why: str) -> dict[str, Any]:
    """Return the error for a validator that gives no verdict."""
    message = f"could not be validated: the validator of job type {job_type!r} {why}"
    return {
        "status": 422,
        "code": "invalid_content",
        "message": f"{where}: {message}",
        "details": {"errors": [{"path": where, "message": message}]},
    }


def _text_of(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except _RAISED:  # also __str__ is code of the plug-in
        return "(without a text)"


@cache
def _model(name: str) -> type[BaseModel]:
    model: type[BaseModel] = resolve_name(name)
    return model


if __name__ == "__main__":
    main()
    sys.exit(0)
