"""Run the other processes of a benchmark."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from jobledger.cli.composition import Role, start_roles
from jobledger.cli.settings_file import read_settings
from jobledger.ledger.mongo.connection import Connection, Database

Pipe = multiprocessing.connection.Connection
"""One end of a pipe between two processes."""
_spawn = multiprocessing.get_context("spawn")


class Child(NamedTuple):
    """A child process.

    Attributes:
        process: The process.
        pipe: Our end of the pipe between the processes.
        ready: The first message of the process.
    """

    process: BaseProcess
    pipe: Pipe
    ready: Any

    async def receive(self) -> Any:
        """Wait for the next message of the process."""
        return await asyncio.to_thread(self.pipe.recv)


@asynccontextmanager
async def run_processes(number: int, target: Callable[..., None], *args: Any) -> AsyncIterator[Sequence[Child]]:
    """Run a function in several concurrent processes, and yield them when all are ready.

    The last argument of the function is its end of a pipe. It sends a message there when it is ready.
    """
    started: list[tuple[BaseProcess, Pipe]] = []
    for _ in range(number):
        own_end, child_end = _spawn.Pipe()
        process: BaseProcess = _spawn.Process(target=target, args=(*args, child_end))
        process.start()
        child_end.close()
        started.append((process, own_end))
    try:
        yield [Child(process, pipe, await asyncio.to_thread(pipe.recv)) for process, pipe in started]
    finally:
        for process, _ in started:
            process.terminate()
        for process, _ in started:
            await asyncio.to_thread(process.join)


def run_role(connection: Connection, store: Path, role: Role, slots: int, pipe: Pipe) -> None:
    """Run a role until SIGTERM. The first message is the URL of its API, or None.

    Args:
        connection: Connection to the database.
        store: Directory of the file store.
        role: The role.
        slots: Number of worker slots.
        pipe: Our end of the pipe.
    """
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    options = {
        "mongodb": {"uri": connection.uri, "db_name": connection.db_name},
        "api": {"port": 0},
        "results": {"store": str(store)},
        "event_worker": {"max_concurrent": slots},
    }
    settings, _ = read_settings(None, options, defaults_only=True)

    async def run() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        roles = frozenset({role})
        async with start_roles(settings, connection, roles, on_failure=lambda error: stop.set()) as running:
            pipe.send(running.url)
            await stop.wait()

    asyncio.run(run())


def read_cpu_seconds(process: BaseProcess) -> float:
    """Return the CPU time of a process since it started."""
    times = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()  # man 5 proc
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


async def read_server_cpu_seconds(db: Database) -> float:
    """Return the CPU time of the database server since it started."""
    usage = (await db.command("serverStatus"))["extra_info"]
    return float(usage["user_time_us"] + usage["system_time_us"]) / 1e6
