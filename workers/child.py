"""workers: the child process in which a processor runs, so that a crash, a leak or a hang is contained.

Forked from a small server process that has the processors loaded, so it starts in milliseconds. It talks with its
worker over one pipe, in JSON (never pickle: a child that hostile input has taken over must not be able to run code in
the worker), and dies when the pipe closes, that is, when the worker dies.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import threading
from multiprocessing.connection import Connection

import orjson

from workers.attempt import Assignment, Message, run
from workers.registry import find_processor


def main(pipe: Connection, memory_limit_mb: int) -> None:
    """Do the one assignment that comes through the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the worker, which will tell us
    limit = memory_limit_mb * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    assignment = Assignment.model_validate_json(pipe.recv_bytes())
    threading.Thread(target=_die_with, args=(pipe,), daemon=True).start()

    async def send(message: Message) -> None:
        await asyncio.to_thread(pipe.send_bytes, orjson.dumps(message))

    asyncio.run(run(assignment, find_processor(assignment.job_type), send))


def _die_with(pipe: Connection) -> None:
    """Nothing more is ever sent to us: when reading ends, the worker is gone."""
    try:
        pipe.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
