"""Control job processes from the worker's event loop: start them, exchange messages, and stop them.

No thread waits for a job process, and no read or write blocks, so a job process cannot delay other jobs, cancellation
or shutdown. `fork_server.py` forks a supervisor (`supervisor.py`), which forks the job process (`main.py`).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Final

import orjson
import structlog

from jobledger.workers.child.fork_server_client import fork_server_client
from jobledger.workers.child.messages import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    STOP_MESSAGE,
    AttemptFailed,
    InvalidMessage,
    MessageEnvelope,
    decode_message,
    encode_frame,
)
from jobledger.workers.child.supervisor import STOP_SECONDS

_log = structlog.get_logger()
STALL_SECONDS = 30.0
"""Timeout for a message that has begun and makes no progress, in either direction."""
END_SECONDS: Final = STOP_SECONDS + 4
"""Time in which a supervisor must end its job process and all descendants of it."""
_CHUNK_BYTES: Final = 256 * 1024
_MESSAGES_PER_SECOND: Final = 2000
"""A job process that sends more messages is delayed."""
_BYTES_PER_SECOND: Final = 64 * 1024 * 1024
_MAX_CONTROL_BYTES: Final = 1024 * 1024
"""Maximum size of a line from a supervisor."""


class ProcessFailed(Exception):
    """A job process ended or can no longer be used. `failure` is the failure of the attempt."""

    def __init__(self, failure: AttemptFailed) -> None:
        super().__init__(failure.message)
        self.failure = failure


class JobProcess:
    """A job process with its supervisor. Call `stop` after each successful `start`."""

    def __init__(
        self,
        connection: socket.socket,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        supervisor: int,
        on_output: Callable[[str], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._reader = reader
        self._writer = writer
        self._writing = asyncio.Lock()
        self._buffer = bytearray()
        self._supervisor = supervisor
        self._on_output = on_output
        self._state_changed = asyncio.Event()
        self._exit_failure: AttemptFailed | None = None
        """The failure that the end of the process means, unless it has sent its last message."""
        self.exit_task = asyncio.create_task(self._watch(), name="watch-job-process")
        """Done when the job process and all its descendants have ended."""

    @classmethod
    async def start(
        cls, job_type: str, memory_limit_mb: int, on_output: Callable[[str], None], environment: Sequence[str] = ()
    ) -> JobProcess:
        """Start a job process, which then waits for its assignment.

        Args:
            job_type: Type of the job.
            memory_limit_mb: Limit of its address space in MiB.
            on_output: Called with what it prints.
            environment: Names of variables that it gets besides the default ones.

        Raises:
            OSError: The process could not be started.
        """
        try:
            return await cls._start(job_type, memory_limit_mb, on_output, environment)
        except (TimeoutError, ConnectionError):  # the fork server has ended or hangs: retry with a new one
            try:
                return await cls._start(job_type, memory_limit_mb, on_output, environment)
            except (TimeoutError, ConnectionError) as error:
                raise OSError(f"No job process could be started: {type(error).__name__} {error}") from error

    @classmethod
    async def _start(
        cls, job_type: str, memory_limit_mb: int, on_output: Callable[[str], None], environment: Sequence[str]
    ) -> JobProcess:
        with ExitStack() as unneeded:
            connection, their_connection = map(unneeded.enter_context, socket.socketpair())
            control, their_control = map(unneeded.enter_context, socket.socketpair())
            connection.setblocking(False)  # noqa: FBT003 - a positional-only argument
            server = fork_server_client.request_supervisor(
                job_type, memory_limit_mb, their_control, their_connection, environment
            )
            their_connection.close()
            their_control.close()
            reader, writer = await asyncio.open_connection(sock=control, limit=_MAX_CONTROL_BYTES)
            unneeded.callback(writer.close)  # signals the supervisor that the job process is not needed
            try:
                async with asyncio.timeout(fork_server_client.request_timeout):
                    line = await reader.readline()
                if not line:
                    raise ConnectionError("the fork server ended")
            except (TimeoutError, ConnectionError):
                fork_server_client.replace(server)
                raise
            fork_server_client.on_started(server, job_type)
            report = json.loads(line)
            if "fork_errno" in report:
                raise OSError(report["fork_errno"], os.strerror(report["fork_errno"]))
            unneeded.pop_all()
        return cls(connection, reader, writer, report["supervisor"], on_output)

    # Receiving ----------------------------------------------------------------------------------------------------

    async def iterate_messages(self) -> AsyncGenerator[tuple[MessageEnvelope, int], None]:
        """Yield the messages of the job process with their sizes in bytes, until it has ended and everything is read.

        Raises:
            ProcessFailed: It ended, sent an invalid message, or stopped in the middle of one.
        """
        rate_limiter = _RateLimiter(self._loop)
        while (text := await self._read_frame()) is not None:
            try:
                message = decode_message(text)
            except InvalidMessage as error:
                text_of_error = f"The job process sent an invalid message: {error}"
                raise ProcessFailed(AttemptFailed("INVALID_MESSAGE", text_of_error)) from error
            yield message, len(text)
            await rate_limiter.keep(len(text))
        raise ProcessFailed(await self._find_exit_failure())

    async def _read_frame(self) -> bytes | None:
        if not await self._fill_buffer(FRAME_HEADER.size):
            return None
        size = FRAME_HEADER.unpack(self._buffer[: FRAME_HEADER.size])[0]
        if size > MAX_FRAME_BYTES:
            message = (
                f"The job process sent a message of {size // 2**20} MiB. The limit is {MAX_FRAME_BYTES // 2**20} MiB."
            )
            raise ProcessFailed(AttemptFailed("INVALID_MESSAGE", message))
        if not await self._fill_buffer(FRAME_HEADER.size + size):
            return None
        text = bytes(memoryview(self._buffer)[FRAME_HEADER.size : FRAME_HEADER.size + size])
        del self._buffer[: FRAME_HEADER.size + size]
        return text

    async def _fill_buffer(self, size: int) -> bool:
        """Read until `size` bytes are buffered. Return False if the process will not send them."""
        while len(self._buffer) < size:
            try:
                chunk = self._connection.recv(_CHUNK_BYTES)
            except BlockingIOError:
                if self._exit_failure is not None:  # all data of an ended process can be read without waiting
                    return False
                await self._wait_readable()
            except ConnectionError:
                return False
            else:
                if not chunk:
                    return False
                self._buffer += chunk
        return True

    async def _wait_readable(self) -> None:
        """Wait until data can be read or the process has ended.

        A job process may be silent for any time, but not in the middle of a message.
        """
        self._state_changed.clear()
        self._loop.add_reader(self._connection.fileno(), self._state_changed.set)
        try:
            async with asyncio.timeout(STALL_SECONDS if self._buffer else None):
                await self._state_changed.wait()
        except TimeoutError:
            message = f"The job process stopped in the middle of a message for {STALL_SECONDS:g} seconds."
            raise ProcessFailed(AttemptFailed("PROCESS_STALLED", message, transient=True)) from None
        finally:
            self._loop.remove_reader(self._connection.fileno())

    async def _watch(self) -> None:
        """Read the supervisor's reports until the job process and all its descendants have ended."""
        with suppress(ValueError, OSError):  # an overlong line or invalid JSON is not from our supervisor
            while line := await self._reader.readline():
                report = orjson.loads(line)
                if "output" in report:
                    self._on_output(report["output"])
                elif "exit" in report:
                    if report["omitted_bytes"]:
                        self._on_output(f"\n… {report['omitted_bytes']:,} more bytes of output were dropped.")
                    self._exit_failure = _build_exit_failure(report["exit"], report["tail"])
                    self._state_changed.set()
        if self._exit_failure is None:
            message = "The supervisor of the job process was killed, and the job process with it."
            self._exit_failure = AttemptFailed("PROCESS_KILLED", message, transient=True)
        self._state_changed.set()

    async def _find_exit_failure(self) -> AttemptFailed:
        """Return the failure that the end of the process means. The supervisor reports the end within moments."""
        deadline = self._loop.time() + STOP_SECONDS
        while self._exit_failure is None and (remaining := deadline - self._loop.time()) > 0:
            self._state_changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(remaining):
                    await self._state_changed.wait()
        message = "The job process closed its connection to the worker, so it cannot report a result."
        return self._exit_failure or AttemptFailed("PROCESS_DIED", message, transient=True)

    # Sending ------------------------------------------------------------------------------------------------------

    async def send(self, content: Any) -> None:
        """Send a response or the assignment. If the process has ended, do nothing: `iterate_messages` raises the error.

        Raises:
            ProcessFailed: The job process has stopped reading.
        """
        frame = memoryview(encode_frame(content))
        async with self._writing:
            try:
                for start in range(0, len(frame), _CHUNK_BYTES):
                    async with asyncio.timeout(STALL_SECONDS):
                        await self._loop.sock_sendall(self._connection, frame[start : start + _CHUNK_BYTES])
            except TimeoutError:
                message = f"The job process did not read from its connection for {STALL_SECONDS:g} seconds."
                raise ProcessFailed(AttemptFailed("PROCESS_STALLED", message, transient=True)) from None
            except OSError:
                return

    # Stopping -----------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Stop the job process and all its descendants, if they still run."""
        if self._exit_failure is None and not self._writing.locked():
            with suppress(OSError):  # the buffer is full: the process is killed without notice
                self._connection.send(encode_frame(STOP_MESSAGE))
        self._writer.write(b"end")
        ended, _ = await asyncio.wait({self.exit_task}, timeout=END_SECONDS)
        if not ended:
            # Its end of `control` is open, so the supervisor is alive and still has this PID. The kernel kills the job
            # process with it (PR_SET_PDEATHSIG), and the fork server kills the descendants.
            _log.warning("killing a supervisor that did not end in time", pid=self._supervisor)
            with suppress(ProcessLookupError):
                os.kill(self._supervisor, signal.SIGKILL)
            await asyncio.wait({self.exit_task}, timeout=STOP_SECONDS)
        self.exit_task.cancel()
        self._writer.close()
        self._connection.close()


class _RateLimiter:
    """Delays a job process that floods the worker, so that other jobs get their share of the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._since = loop.time()
        self._used = 0.0

    async def keep(self, size: int) -> None:
        """Count a message of `size` bytes. Wait if there were too many within the second."""
        self._used += 1 / _MESSAGES_PER_SECOND + size / _BYTES_PER_SECOND
        if self._used < 0.1:
            return
        passed = self._loop.time() - self._since
        await asyncio.sleep(max(0.0, self._used - passed))
        self._since, self._used = self._loop.time(), 0.0


def _build_exit_failure(code: int, output: str) -> AttemptFailed:
    """Return the failure of a job process that ended without a result.

    Args:
        code: Its exit code; the negative number of the signal that killed it.
        output: The end of its output.
    """
    details: dict[str, Any] = {"output": output} if output else {}
    if code < 0:
        name = _get_signal_name(-code)
        message = f"The process that ran the job was killed by {name}."
        return AttemptFailed("PROCESS_KILLED", message, transient=True, details={"signal": name, **details})
    message = f"The process that ran the job ended without a result (exit code {code})."
    return AttemptFailed("PROCESS_DIED", message, transient=True, details={"exit_code": code, **details})


def _get_signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
