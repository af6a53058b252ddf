"""Python code that calls the system by number."""

from __future__ import annotations

import os

from jobledger.workers.sandbox import restrictions

DEFINE_CALL = """
import ctypes, os, resource, signal, struct
libc = ctypes.CDLL(None, use_errno=True)
nice = os.getpriority(os.PRIO_PROCESS, 0)
def call(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""
SYSTEM_CALL_NUMBERS = restrictions._SYSCALL_NUMBERS.get(os.uname().machine, {}) | restrictions._COMMON_SYSCALL_NUMBERS
