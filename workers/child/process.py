"""workers: job processes as the worker sees them: started, heard, answered and ended on the event loop.

No thread waits for a job process, and no read or write blocks: whatever a job process does or does not do, other jobs,
cancellation and shutdown go on. The processes are described in `fork_server.py`, `supervisor.py` and `child.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
"""How long a message that has begun may make no progress, in either direction."""
END_SECONDS: Final = STOP_SECONDS + 4  # for a supervisor to end its job process and all that this has started
_PIECE_BYTES: Final = 256 * 1024
_MESSAGES_PER_SECOND: Final = 2000  # of one job process; one that sends more waits
_BYTES_PER_SECOND: Final = 64 * 1024 * 1024
_MAX_CONTROL_BYTES: Final = 1024 * 1024  # of a line from a supervisor


class ProcessNotStarted(Exception):
    """No job process could be started. `errno` says why, if the system has said so."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class ProcessFailed(Exception):
    """A job process ended, or can no longer be understood. `failure` is what that means for the attempt."""

    def __init__(self, failure: AttemptFailed) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How a job process ended: its exit code (None if its supervisor was killed), and the end of what it printed."""

    code: int | None
    output: str = ""


class JobProcess:
    """One job process with its supervisor. Every `start` is followed by `end`."""

    def __init__(self, connection: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._reader = reader
        self._writer = writer
        self._writing = asyncio.Lock()
        self._received = bytearray()
        self._closed = False  # the job process has closed its end, or is dead
        self._supervisor = 0
        self._on_output: Callable[[str], None] = lambda text: None
        self._changed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._exit: ProcessExit | None = None

    @classmethod
    async def start(
        cls, memory_limit_mb: int, on_output: Callable[[str], None], environment: Sequence[str] = ()
    ) -> JobProcess:
        """Start a job process, which then waits for its assignment.

        Args:
            memory_limit_mb: Its limit of address space.
            on_output: Called with what it prints.
            environment: The names of variables that it gets besides the usual ones.

        Raises:
            NotStarted: the machine does not allow it.
            OSError: as NotStarted.
        """
        try:
            return await cls._start(memory_limit_mb, on_output, environment)
        except (TimeoutError, ConnectionError):  # the fork server has died, or hangs: once more with another one
            try:
                return await cls._start(memory_limit_mb, on_output, environment)
            except (TimeoutError, ConnectionError) as error:
                raise ProcessNotStarted(f"No job process could be started: {type(error).__name__} {error}") from error

    @classmethod
    async def _start(
        cls, memory_limit_mb: int, on_output: Callable[[str], None], environment: Sequence[str]
    ) -> JobProcess:
        with _SocketPairs() as sockets:
            ours, theirs, control, their_control = sockets.pair() + sockets.pair()
            asked = fork_server_client.request_supervisor(memory_limit_mb, their_control, theirs, environment)
            theirs.close()
            their_control.close()
            reader, writer = await asyncio.open_connection(sock=control, limit=_MAX_CONTROL_BYTES)
            sockets.keep(control)
            process = cls(ours, reader, writer)
            try:
                async with asyncio.timeout(fork_server_client.request_timeout):
                    line = await reader.readline()
                if not line:
                    raise ConnectionError("the fork server died")
            except (TimeoutError, ConnectionError):
                writer.close()
                fork_server_client.replace(asked)
                raise
            except BaseException:
                writer.close()  # by which the supervisor knows that nobody wants the job process
                raise
            said = json.loads(line)
            if "fork_errno" in said:
                writer.close()
                raise ProcessNotStarted(
                    f"No job process could be forked: {os.strerror(said['fork_errno'])}", said["fork_errno"]
                )
            sockets.keep(ours)
        process._supervisor = said["supervisor"]
        process._on_output = on_output
        process._watching = asyncio.create_task(process._watch(), name="watch-job-process")
        return process

    @property
    def exit_task(self) -> asyncio.Task[None]:
        """Done when nothing is left of the job process and what it has started."""
        assert self._watching is not None  # noqa: S101 - it is set by start
        return self._watching

    # Hearing ------------------------------------------------------------------------------------------------------

    async def iterate_messages(self) -> AsyncGenerator[tuple[MessageEnvelope, int], None]:
        """Yield what the job process sends, and how many bytes that had, until it is dead and everything has been read.

        Raises:
            ProcessFailed: it is dead, sent what is no message, or stopped in the middle of one.
        """
        pace = _RateLimiter(self._loop)
        while (text := await self._frame()) is not None:
            try:
                message = decode_message(text)
            except InvalidMessage as error:
                what = f"The job process sent a message that cannot be read: {error}"
                raise ProcessFailed(AttemptFailed("INVALID_MESSAGE", what)) from error
            yield message, len(text)
            await pace.keep(len(text))
        raise ProcessFailed(await self._find_exit_failure())

    async def _frame(self) -> bytes | None:
        if not await self._fill(FRAME_HEADER.size):
            return None
        size = FRAME_HEADER.unpack(self._received[: FRAME_HEADER.size])[0]
        if size > MAX_FRAME_BYTES:
            what = f"The job process sent {size // 2**20} MiB at once; at most {MAX_FRAME_BYTES // 2**20} are accepted."
            raise ProcessFailed(AttemptFailed("INVALID_MESSAGE", what))
        if not await self._fill(FRAME_HEADER.size + size):
            return None
        text = bytes(memoryview(self._received)[FRAME_HEADER.size : FRAME_HEADER.size + size])
        del self._received[: FRAME_HEADER.size + size]
        return text

    async def _fill(self, size: int) -> bool:
        """Read until so many bytes are there; return False if they will never be."""
        while len(self._received) < size:
            try:
                piece = self._connection.recv(_PIECE_BYTES)
            except BlockingIOError:
                if self._exit is not None:  # what a dead process has sent can all be read at once
                    return False
                await self._readable()
            except ConnectionError:
                return False
            else:
                if not piece:
                    return False
                self._received += piece
        return True

    async def _readable(self) -> None:
        """Wait until there is something to read, or the process is dead.

        A job process may be silent for as long as it likes, but not in the middle of a message.
        """
        self._changed.clear()
        self._loop.add_reader(self._connection.fileno(), self._changed.set)
        try:
            async with asyncio.timeout(STALL_SECONDS if self._received else None):
                await self._changed.wait()
        except TimeoutError:
            what = f"The job process stopped in the middle of a message for {STALL_SECONDS:g} seconds."
            raise ProcessFailed(AttemptFailed("PROCESS_STALLED", what, transient=True)) from None
        finally:
            self._loop.remove_reader(self._connection.fileno())

    async def _watch(self) -> None:
        """Hear the supervisor, until nothing is left of the job process and what it has started."""
        with suppress(ValueError, OSError):  # a line that is too long, or no JSON, is from no supervisor of ours
            while line := await self._reader.readline():
                said = orjson.loads(line)
                if "output" in said:
                    self._on_output(said["output"])
                elif "exit" in said:
                    if said["omitted_bytes"]:
                        self._on_output(f"… {said['omitted_bytes']:,} more bytes of output were left out.")
                    self._exit = ProcessExit(said["exit"], said["tail"])
                    self._changed.set()
        if self._exit is None:
            self._exit = ProcessExit(None)
        self._changed.set()

    async def _find_exit_failure(self) -> AttemptFailed:
        """Return what the end of the process means. Its supervisor reports that within moments."""
        deadline = self._loop.time() + STOP_SECONDS
        while self._exit is None and (left := deadline - self._loop.time()) > 0:
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        return _failure_from_exit(self._exit)

    # Answering ----------------------------------------------------------------------------------------------------

    async def send(self, content: Any) -> None:
        """Send an answer, or the assignment. A job process that is dead is found out by `messages`.

        Raises:
            ProcessFailed: the job process has stopped reading.
        """
        frame = memoryview(encode_frame(content))
        async with self._writing:
            try:
                for start in range(0, len(frame), _PIECE_BYTES):
                    async with asyncio.timeout(STALL_SECONDS):
                        await self._loop.sock_sendall(self._connection, frame[start : start + _PIECE_BYTES])
            except TimeoutError:
                what = f"The job process took nothing from its connection for {STALL_SECONDS:g} seconds."
                raise ProcessFailed(AttemptFailed("PROCESS_STALLED", what, transient=True)) from None
            except OSError:
                return

    # Ending -------------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """End the job process, if it still runs, with everything that it has started."""
        if self._exit is None and not self._writing.locked():
            with suppress(OSError):  # its buffer is full: it is killed without notice
                self._connection.send(encode_frame(STOP_MESSAGE))
        self._writer.write(b"end")
        ended, _ = await asyncio.wait({self.exit_task}, timeout=END_SECONDS)
        if not ended:
            # Its end of `control` is open, so the supervisor is alive, and the number is its own. The kernel kills the
            # job process with it (PR_SET_PDEATHSIG), and the fork server what that has started.
            _log.warning("a supervisor did not end in time and is killed", pid=self._supervisor)
            with suppress(ProcessLookupError):
                os.kill(self._supervisor, signal.SIGKILL)
            await asyncio.wait({self.exit_task}, timeout=STOP_SECONDS)
        self.exit_task.cancel()
        self._writer.close()
        self._connection.close()


class _SocketPairs:
    """Pairs of sockets that are closed behind the block, but for those that are kept."""

    def __init__(self) -> None:
        self._open: set[socket.socket] = set()

    def __enter__(self) -> _SocketPairs:
        return self

    def __exit__(self, *_: object) -> None:
        for it in self._open:
            it.close()

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Return a pair: ours, which does not block, and theirs."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)  # noqa: FBT003 - it takes no name
        self._open |= {ours, theirs}
        return ours, theirs

    def keep(self, one: socket.socket) -> None:
        self._open.discard(one)


class _RateLimiter:
    """Lets a job process that floods its worker wait, so that other jobs have their share of the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._since = loop.time()
        self._share = 0.0

    async def keep(self, size: int) -> None:
        """Count a message of so many bytes, and wait if there were too many within the second."""
        self._share += 1 / _MESSAGES_PER_SECOND + size / _BYTES_PER_SECOND
        if self._share < 0.1:
            return
        passed = self._loop.time() - self._since
        await asyncio.sleep(max(0.0, self._share - passed))
        self._since, self._share = self._loop.time(), 0.0


def _failure_from_exit(end: ProcessExit | None) -> AttemptFailed:
    """Return what the end of a job process without a result means."""
    if end is None:
        message = "The job process closed its connection to the worker, so it cannot report a result."
        return AttemptFailed("PROCESS_DIED", message, transient=True)
    details: dict[str, Any] = {"output": end.output} if end.output else {}
    if end.code is None:
        message = "The supervisor of the job process was killed, and the job process with it."
        return AttemptFailed("PROCESS_KILLED", message, transient=True, details=details)
    if end.code < 0:
        name = _signal_name(-end.code)
        message = f"The process that ran the job was killed by {name}."
        return AttemptFailed("PROCESS_KILLED", message, transient=True, details={"signal": name, **details})
    message = f"The process that ran the job ended without a result (exit code {end.code})."
    return AttemptFailed("PROCESS_DIED", message, transient=True, details={"exit_code": end.code, **details})


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
