"""Attributes of the current process: capabilities, limits, and its parent. Needs only the standard library.

The sandbox loads this module in a bare interpreter.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from typing import Final

libc: Final = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

_CAPABILITY_VERSION: Final = 0x20080522
CAP_SETFCAP: Final = 1 << 31
"""Without this capability, root cannot create a user namespace that contains itself, as bubblewrap does."""
FILE_CAPABILITIES: Final = sum(1 << number for number in (0, 1, 3, 4, 6, 7)) | CAP_SETFCAP
"""CAP_CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID and SETFCAP: for files and other users."""
READ_CAPABILITIES: Final = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: to read files of other users."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def check_system_call(result: int) -> int:
    """Return the result of a system call.

    Raises:
        OSError: The result is negative, so the call failed.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)


def drop_capabilities(*, keep: int = 0) -> None:
    """Drop capabilities, also for programs started later with `no_new_privs`.

    A process with CAP_PERFMON can read the environment of others even where Landlock denies it. CAP_SYS_NICE allows
    real-time priority.

    Args:
        keep: Bit set of the capabilities to keep if the process has them.
    """
    header, sets = struct.pack("=Ii", _CAPABILITY_VERSION, 0), ctypes.create_string_buffer(24)
    check_system_call(libc.capget(header, sets))
    # Effective, permitted and inheritable sets, 32 bits each. The ambient set is a subset of the inheritable set.
    kept = struct.unpack("=6I", sets.raw)[1] & keep
    check_system_call(libc.capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0)))


def set_parent_death_signal(signal_number: int) -> None:
    """Let the kernel send this process a signal when the thread that started it ends."""
    check_system_call(libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0))


def become_subreaper() -> None:
    """Become the parent of descendants whose own parent ends."""
    check_system_call(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def limit_memory(limit: int) -> None:
    """Limit the memory of this process in bytes.

    The limit of the address space can be raised again, because some programs in the sandbox (Chromium) reserve far more
    than they use. The limit of the writable private memory cannot.
    """
    highest = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = limit if highest == resource.RLIM_INFINITY else min(limit, highest)
    resource.setrlimit(resource.RLIMIT_AS, (soft, highest))
    limit_resource(resource.RLIMIT_DATA, limit)


def limit_resource(kind: int, limit: int) -> None:
    """Set a resource limit of this process (`resource.RLIMIT_…`), or keep the lower one that it already has."""
    highest = resource.getrlimit(kind)[1]
    limit = limit if highest == resource.RLIM_INFINITY else min(limit, highest)
    resource.setrlimit(kind, (limit, limit))
