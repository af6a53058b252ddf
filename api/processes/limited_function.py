"""api: call a function in a process of its own, with limits on time and memory.

For code whose cost depends on foreign input or that is foreign itself. It may run for ever (a regular expression holds
the interpreter lock meanwhile), use all memory or end the process. A thread would not help against any of these.
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from typing import Any, Final

import structlog
from pydantic_core import from_json

from jobledger.api.processes.limited_process import encode_frame

_log = structlog.get_logger()
_START_SECONDS: Final = 30.0
_EXIT_SECONDS: Final = 1.0
_LARGEST_RESULT_BYTES: Final = 4 * 1024 * 1024
_INHERITED: Final = ("PATH", "LANG", "LC_ALL", "TZ", "HOME")
"""Nothing else of the environment, which has secrets."""


class CallFailed(Exception):
    """The call has no result. The message says why."""


class ProcessPoolBusy(CallFailed):
    """Other calls occupied all processes for the time that a call waits, or no process could be started."""


class CallTimeout(CallFailed):
    """The call took too long, and its process was ended."""


class ProcessEnded(CallFailed):
    """The process of the call has ended, for want of memory or by what the function did."""


class LimitedFunction:
    """A function of one JSON value, called in at most `processes` processes. They are started when first needed."""

    def __init__(self, name: str, *, processes: int, queue_seconds: float) -> None:
        self._name = name
        self._queue_seconds = queue_seconds
        self._free = asyncio.Semaphore(processes)
        self._idle: list[Process] = []

    async def call(self, argument: bytes, seconds: float) -> Any:
        """Return what the function returns for an argument, given as JSON, within `seconds`.

        Raises:
            CallFailed: TooBusy, CallTimeout or ProcessEnded.
        """
        try:
            async with asyncio.timeout(self._queue_seconds):
                await self._free.acquire()
        except TimeoutError:
            raise ProcessPoolBusy(f"Other calls of {self._name} occupy all processes.") from None
        try:
            return await self._call(argument, seconds)
        finally:
            self._free.release()

    async def close(self) -> None:
        """End the processes."""
        while self._idle:
            await _end(self._idle.pop())

    async def _call(self, argument: bytes, seconds: float) -> Any:
        process = self._idle.pop() if self._idle else await self._start()
        try:
            async with asyncio.timeout(seconds):
                await _send(process, argument)
                result = await _receive(process)
        except TimeoutError:
            await _end(process)
            raise CallTimeout(f"took longer than {seconds:g} s") from None
        except (OSError, EOFError, ValueError):
            with suppress(TimeoutError):  # ending a process that is just ending loses its exit code
                async with asyncio.timeout(_EXIT_SECONDS):
                    await process.wait()
            await _end(process)
            _log.warning("child process exited", function=self._name, exit_code=process.returncode)
            raise ProcessEnded(f"ended its process (exit code {process.returncode})") from None
        except BaseException:  # the caller is gone, and the result would be taken for that of the next call
            await _end(process)
            raise
        self._idle.append(process)
        return result

    async def _start(self) -> Process:
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(it for it in sys.path if it)
        command = (sys.executable, "-m", "jobledger.api.processes.limited_process", self._name)
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment
        )
        try:
            async with asyncio.timeout(_START_SECONDS):
                await _receive(process)
        except BaseException as error:
            await _end(process)
            if isinstance(error, TimeoutError | OSError | EOFError | ValueError):
                raise ProcessPoolBusy(f"The process for {self._name} did not start.") from error
            raise
        return process


async def _send(process: Process, argument: bytes) -> None:
    assert process.stdin is not None  # noqa: S101 - narrows the type
    process.stdin.write(encode_frame(argument))
    await process.stdin.drain()


async def _receive(process: Process) -> Any:
    assert process.stdout is not None  # noqa: S101 - narrows the type
    length = int.from_bytes(await process.stdout.readexactly(8), "big")
    if length > _LARGEST_RESULT_BYTES:
        raise ValueError(f"the result has {length} bytes")
    return from_json(await process.stdout.readexactly(length))


async def _end(process: Process) -> None:
    """End a process, although it may write more than is read, or its children may have its pipes."""
    # kill() would leave the pipes open, and wait() waits until they are closed.
    process._transport.close()  # type: ignore[attr-defined]  # there is no public way to close the pipes
    await process.wait()
