"""The child process that calls one function with limited memory.

Usage: `python -m jobledger.api.processes.limited_process MODULE:FUNCTION`. It reads arguments from standard input and
writes a result for each to standard output, both as frames: the length in 8 bytes, then JSON. The parent process
(`function_process_pool.py`) enforces the timeout and kills it.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pkgutil import resolve_name
from typing import BinaryIO, Final

from pydantic_core import from_json, to_json

from jobledger.ledger.system.process_attributes import (
    READ_CAPABILITIES,
    drop_capabilities,
    limit_resource,
    set_parent_death_signal,
)

_MEMORY_BYTES: Final = 1024 * 1024 * 1024


def main(name: str) -> None:
    """Serve calls of a function, named as `module:function`, until standard input ends."""
    # A call that never returns must not outlive the parent, which enforces the timeout.
    set_parent_death_signal(signal.SIGKILL)
    limit_resource(resource.RLIMIT_AS, _MEMORY_BYTES)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_RTPRIO, resource.RLIMIT_NICE):
        limit_resource(kind, 0)
    drop_capabilities(keep=READ_CAPABILITIES)  # to import modules of other users
    function = resolve_name(name)
    with os.fdopen(os.dup(0), "rb") as arguments, os.fdopen(os.dup(1), "wb") as results:
        # The function must not read the arguments of other calls, and its output must not mix with the results.
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        results.write(encode_frame(b"null"))  # ready
        results.flush()
        while (argument := read_frame(arguments)) is not None:
            results.write(encode_frame(to_json(function(from_json(argument)))))
            results.flush()


def encode_frame(content: bytes) -> bytes:
    """Return content with its length in front."""
    return len(content).to_bytes(8, "big") + content


def read_frame(source: BinaryIO) -> bytes | None:
    """Read the next frame; return None at the end of the input."""
    head = source.read(8)
    return source.read(int.from_bytes(head, "big")) if len(head) == 8 else None


if __name__ == "__main__":
    main(sys.argv[1])
    sys.exit(0)
