"""Call a function in separate processes with limits on time and memory.

For plug-in code, and for code whose cost depends on user input. Such code may never return (a regular expression holds
the interpreter lock), use all memory, or exit the process. A thread does not protect against these.
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
_START_TIMEOUT_SECONDS: Final = 30.0
_EXIT_TIMEOUT_SECONDS: Final = 1.0
_MAX_RESULT_BYTES: Final = 4 * 1024 * 1024
_INHERITED_VARIABLES: Final = ("PATH", "LANG", "LC_ALL", "TZ", "HOME")
"""No other variables are passed: they may hold secrets."""


class CallFailed(Exception):
    """The call has no result. The message has the reason."""


class ProcessPoolBusy(CallFailed):
    """All processes were in use for the whole queue time, or no process could be started."""


class CallTimeout(CallFailed):
    """The call exceeded its timeout, and its process was killed."""


class ProcessEnded(CallFailed):
    """The process of the call exited, for example because it ran out of memory."""


class FunctionProcessPool:
    """Processes that call one function with a JSON value.

    Args:
        name: The function, as `module:function`.
        processes: Maximum number of processes. They are started when they are first needed.
        queue_seconds: How long a call waits for a free process.
    """

    def __init__(self, name: str, *, processes: int, queue_seconds: float) -> None:
        self._name = name
        self._queue_seconds = queue_seconds
        self._free = asyncio.Semaphore(processes)
        self._idle: list[Process] = []

    async def call(self, argument: bytes, seconds: float) -> Any:
        """Call the function and return its result.

        Args:
            argument: The argument as JSON.
            seconds: Timeout of the call.

        Raises:
            CallFailed: ProcessPoolBusy, CallTimeout or ProcessEnded.
        """
        try:
            async with asyncio.timeout(self._queue_seconds):
                await self._free.acquire()
        except TimeoutError:
            raise ProcessPoolBusy(f"All processes for {self._name} are in use.") from None
        try:
            return await self._call(argument, seconds)
        finally:
            self._free.release()

    async def close(self) -> None:
        """Kill the processes."""
        while self._idle:
            await _kill(self._idle.pop())

    async def _call(self, argument: bytes, seconds: float) -> Any:
        process = self._idle.pop() if self._idle else await self._start()
        try:
            async with asyncio.timeout(seconds):
                await _send(process, argument)
                result = await _receive(process)
        except TimeoutError:
            await _kill(process)
            raise CallTimeout(f"took longer than {seconds:g} s") from None
        except (OSError, EOFError, ValueError):
            with suppress(TimeoutError):  # killing a process that is exiting loses its exit code
                async with asyncio.timeout(_EXIT_TIMEOUT_SECONDS):
                    await process.wait()
            await _kill(process)
            _log.warning("child process exited", function=self._name, exit_code=process.returncode)
            raise ProcessEnded(f"ended its process (exit code {process.returncode})") from None
        except BaseException:  # the next call would receive the result of this one
            await _kill(process)
            raise
        self._idle.append(process)
        return result

    async def _start(self) -> Process:
        environment = {name: os.environ[name] for name in _INHERITED_VARIABLES if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        command = (sys.executable, "-m", "jobledger.api.processes.limited_process", self._name)
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment
        )
        try:
            async with asyncio.timeout(_START_TIMEOUT_SECONDS):
                await _receive(process)
        except BaseException as error:
            await _kill(process)
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
    if length > _MAX_RESULT_BYTES:
        raise ValueError(f"the result has {length} bytes")
    return from_json(await process.stdout.readexactly(length))


async def _kill(process: Process) -> None:
    """Kill a process, even if it has unread output or its children hold its pipes."""
    # kill() would leave the pipes open, and wait() waits until they are closed.
    process._transport.close()  # type: ignore[attr-defined]  # there is no public way to close the pipes
    await process.wait()
