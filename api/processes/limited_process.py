"""The child process that calls one function with limited memory.

Usage: `python -m jobledger.api.processes.limited_process MODULE:FUNCTION`. It reads arguments from standard input and
writes a result for each to standard output, both as frames: the length in 8 bytes, then JSON. The parent process
(`limited_function.py`) enforces the timeout and kills it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from pkgutil import resolve_name
from typing import BinaryIO, Final

from pydantic_core import from_json, to_json

_MEMORY_BYTES: Final = 1024 * 1024 * 1024
_PR_SET_PDEATHSIG: Final = 1
_CAPABILITY_VERSION: Final = 0x20080522
_READ_CAPABILITIES: Final = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: to import modules of other users
_libc: Final = ctypes.CDLL(None, use_errno=True)


def main(name: str) -> None:
    """Serve calls of a function, named as `module:function`, until standard input ends."""
    # A call that never returns must not outlive the parent, which enforces the timeout.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if not 0 <= resource.getrlimit(resource.RLIMIT_AS)[1] <= _MEMORY_BYTES:  # keep a lower limit; -1 means no limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_RTPRIO, resource.RLIMIT_NICE):
        resource.setrlimit(kind, (0, 0))
    _drop_capabilities()
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


def _drop_capabilities() -> None:
    """Drop capabilities with which root could harm the machine, such as real-time priority. Other users have none."""
    header, sets = struct.pack("=Ii", _CAPABILITY_VERSION, 0), ctypes.create_string_buffer(24)
    status = _libc.capget(header, sets)
    kept = struct.unpack("=6I", sets.raw)[1] & _READ_CAPABILITIES  # of the permitted set
    if status < 0 or _libc.capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0)) < 0:
        raise OSError(ctypes.get_errno(), "cannot drop capabilities")


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
