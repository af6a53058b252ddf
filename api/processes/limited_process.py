"""api: a process that calls one function, with limits on time and memory: `python -m
jobledger.api.processes.limited_process FUNCTION`.

It reads arguments from standard input and writes a result to standard output for each. Both are a length of 8 bytes
and JSON. The parent process (`limited_function.py`) ends it when a call takes too long.
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
_READING: Final = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: modules of other users
_libc: Final = ctypes.CDLL(None, use_errno=True)


def main(name: str) -> None:
    """Call a function, named as `module:function`, until standard input ends."""
    # A call that never ends must not outlive the process that would end it.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if not 0 <= resource.getrlimit(resource.RLIMIT_AS)[1] <= _MEMORY_BYTES:  # a lower one stays; -1 is none
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_RTPRIO, resource.RLIMIT_NICE):
        resource.setrlimit(kind, (0, 0))
    _drop_capabilities()
    function = resolve_name(name)
    with os.fdopen(os.dup(0), "rb") as arguments, os.fdopen(os.dup(1), "wb") as results:
        # What foreign code reads or prints must not get between arguments and results.
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        results.write(encode_frame(b"null"))  # ready
        results.flush()
        while (argument := read_frame(arguments)) is not None:
            results.write(encode_frame(to_json(function(from_json(argument)))))
            results.flush()


def _drop_capabilities() -> None:
    """Give up what root could use against the machine, such as real-time priority. Others have nothing to give up."""
    header, sets = struct.pack("=Ii", _CAPABILITY_VERSION, 0), ctypes.create_string_buffer(24)
    found = _libc.capget(header, sets)
    kept = struct.unpack("=6I", sets.raw)[1] & _READING  # of the permitted ones
    if found < 0 or _libc.capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0)) < 0:
        raise OSError(ctypes.get_errno(), "capabilities cannot be given up")


def encode_frame(content: bytes) -> bytes:
    """Return content as it is sent."""
    return len(content).to_bytes(8, "big") + content


def read_frame(source: BinaryIO) -> bytes | None:
    """Return the content that is sent next, None at the end."""
    head = source.read(8)
    return source.read(int.from_bytes(head, "big")) if len(head) == 8 else None


if __name__ == "__main__":
    main(sys.argv[1])
    sys.exit(0)
