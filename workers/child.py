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
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Final

import orjson

from workers.attempt import Assignment, Message, run
from workers.confinement import confine, paths_in
from workers.registry import find_processor

STOP: Final = b"stop"
"""What the worker says, not in JSON, when the job is to end."""


def main(pipe: Connection, memory_limit_mb: int) -> None:
    """Do the one assignment that comes through the pipe."""
    os.setpgid(0, 0)  # programs that the processor starts are of our group, and end with us
    for number in (signal.SIGINT, signal.SIGTERM):
        # Who stops a service tells all its processes, but that is for the worker, which lets us finish or kills us.
        # A handler rather than SIG_IGN, which programs that a processor starts would inherit.
        signal.signal(number, lambda *_: None)
    limit = memory_limit_mb * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        assignment = Assignment.model_validate_json(pipe.recv_bytes())
    except EOFError:  # the worker has died before it could tell
        return
    _confine(assignment)
    asyncio.run(_work(pipe, assignment))


def _confine(assignment: Assignment) -> None:
    """Before any code of the processor runs, and before there are other threads."""
    processor = find_processor(assignment.job_type)
    confine(
        assignment.confinement,
        scratch=assignment.scratch,
        inbox=assignment.inbox,
        readable=[*paths_in(processor.Settings.model_validate(assignment.settings))],
        shared=getattr(processor, "shared_directories", tuple)(),
    )


async def _work(pipe: Connection, assignment: Assignment) -> None:
    stopping = threading.Event()
    answers: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def answered(answer: Any) -> None:
        loop.call_soon_threadsafe(answers.put_nowait, answer)

    threading.Thread(target=_obey, args=(pipe, stopping, answered), daemon=True).start()

    async def send(message: Message) -> Any:
        await asyncio.to_thread(pipe.send_bytes, orjson.dumps(message))
        return await answers.get() if message["is"] in ("seek", "saved") else None

    await run(assignment, find_processor(assignment.job_type), send, stopping)


def _obey(pipe: Connection, stopping: threading.Event, answered: Callable[[Any], None]) -> None:
    """The worker says that we are to stop, or answers what we have asked. When reading ends, the worker is gone."""
    try:
        while True:
            if (said := pipe.recv_bytes()) == STOP:
                stopping.set()
            else:
                answered(orjson.loads(said))
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)
