"""api: a process that calls one function, with limits on time and memory: `python -m api.limited_process FUNCTION`.

It reads arguments from standard input and writes a result to standard output for each. Both are a length of 8 bytes
and JSON. The parent process (`limited_function.py`) ends it when a call takes too long.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from pkgutil import resolve_name
from typing import BinaryIO, Final

from pydantic_core import from_json, to_json

_MEMORY_BYTES: Final = 1024 * 1024 * 1024
_PR_SET_PDEATHSIG: Final = 1


def main(name: str) -> None:
    """Call a function, named as `module:function`, until standard input ends."""
    # A call that never ends must not outlive the process that would end it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    function = resolve_name(name)
    with os.fdopen(os.dup(0), "rb") as arguments, os.fdopen(os.dup(1), "wb") as results:
        # What foreign code reads or prints must not get between arguments and results.
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        results.write(frame(b"null"))  # ready
        results.flush()
        while (argument := read_frame(arguments)) is not None:
            results.write(frame(to_json(function(from_json(argument)))))
            results.flush()


def frame(content: bytes) -> bytes:
    """Return content as it is sent."""
    return len(content).to_bytes(8, "big") + content


def read_frame(source: BinaryIO) -> bytes | None:
    """Return the content that is sent next, None at the end."""
    head = source.read(8)
    return source.read(int.from_bytes(head, "big")) if len(head) == 8 else None


if __name__ == "__main__":
    main(sys.argv[1])
    sys.exit(0)
