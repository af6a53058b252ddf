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
    for number in (signal.SIGINT, signal.SIGTERM):
        # Who stops a service tells all its processes, but that is for the worker, which lets us finish or kills us.
        # A handler rather than SIG_IGN, which programs that a processor starts would inherit.
        signal.signal(number, lambda *_: None)
    limit = memory_limit_mb * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    assignment = Assignment.model_validate_json(pipe.recv_bytes())
    stopping = threading.Event()
    threading.Thread(target=_obey, args=(pipe, stopping), daemon=True).start()

    async def send(message: Message) -> None:
        await asyncio.to_thread(pipe.send_bytes, orjson.dumps(message))

    asyncio.run(run(assignment, find_processor(assignment.job_type), send, stopping))


def _obey(pipe: Connection, stopping: threading.Event) -> None:
    """The worker sends one more message at most: that we are to stop. When reading ends, the worker is gone."""
    try:
        while True:
            pipe.recv_bytes()
            stopping.set()
    except (EOFError, OSError):
        os._exit(1)
