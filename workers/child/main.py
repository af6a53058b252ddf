"""The job process. It runs one processor, so that a crash, leak or hang affects no other job.

It is forked from its supervisor (`supervisor.py`), which has the processors loaded, so it starts in milliseconds. It
reads its assignment from a socket and sends messages (`messages.py`). One thread writes to the socket and one reads
from it, so a processor that blocks the event loop does not interrupt a message.
"""

from __future__ import annotations

import asyncio
import faulthandler
import itertools
import os
import resource
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NoReturn

import orjson

from jobledger.ledger.domain.limits import MAX_FILE_BYTES
from jobledger.ledger.system.process_attributes import limit_memory, limit_resource
from jobledger.workers.child import log_capture
from jobledger.workers.child.attempt import Assignment, run_attempt
from jobledger.workers.child.containment import Containment, new_event_loop
from jobledger.workers.child.failures import convert_exception_to_failure
from jobledger.workers.child.messages import (
    FRAME_HEADER,
    AttemptCompleted,
    AttemptFailed,
    LogEntries,
    Message,
    MessageEnvelope,
    Progress,
    encode_frame,
)
from jobledger.workers.processor import LogLevel, Processor, ProcessorError
from jobledger.workers.registry import get_processor, get_retry, get_shared_directories
from jobledger.workers.results.conversion import to_text
from jobledger.workers.sandbox.confinement import confine, find_paths

_MAX_ENTRIES_PER_MESSAGE: Final = 500
_MAX_QUEUED_MESSAGES: Final = 100
"""The job waits while more messages are queued. Each may have many log entries."""


def run_job_process(connection: socket.socket, memory_limit_mb: int) -> None:
    """Run the one assignment from the connection. Does not return, unless the worker has ended."""
    limit_memory(memory_limit_mb * 1024 * 1024)
    limit_resource(resource.RLIMIT_FSIZE, MAX_FILE_BYTES)  # sparse files cost nothing until they are read
    limit_resource(resource.RLIMIT_CORE, 0)  # thousands of crashes must not fill the disk
    faulthandler.enable()  # reports where native code crashed; the supervisor keeps the end of the output
    # Programs forked by the processor must not use the connection.
    os.register_at_fork(after_in_child=connection.close)
    text = _receive(connection)
    if text is None:  # the worker ended before it could send the assignment
        return
    worker = _WorkerConnection(connection)
    worker.finish(_run_attempt(worker, text))
    exit_process()


def _run_attempt(worker: _WorkerConnection, text: bytes) -> AttemptCompleted | AttemptFailed:
    """Run the attempt and return its last message. Never raises."""
    try:
        assignment = Assignment.model_validate_json(text)
        processor = get_processor(assignment.job_type)
        readable = [*find_paths(processor.Settings.model_validate(assignment.settings))]
        shared = get_shared_directories(processor)
        for directory in shared:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except BaseException as error:  # noqa: BLE001 - the settings class and the method are third-party code
        return convert_exception_to_failure(error)
    try:  # before any other code of the processor runs, and before there are threads
        confine(
            assignment.confinement,
            scratch_dir=assignment.scratch_dir,
            inbox_dir=assignment.inbox_dir,
            readable_paths=readable,
            shared_dirs=shared,
        )
    except Exception as error:  # noqa: BLE001 - any error: the job must not run
        text_of_error = f"The job process could not be confined: {to_text(error, 500)}"
        return AttemptFailed("WORKER_FAULT", text_of_error, transient=True, errno=getattr(error, "errno", None))
    try:
        asyncio.set_event_loop(loop := new_event_loop())
        return loop.run_until_complete(_run_processor(worker, assignment, processor))
    except BaseException as error:  # noqa: BLE001 - the processor stopped the event loop or cancelled this task
        scratch_dir = assignment.attempt_dir.parent
        return convert_exception_to_failure(error, scratch_dir=scratch_dir, retry=get_retry(processor))


async def _run_processor(
    worker: _WorkerConnection, assignment: Assignment, processor: type[Processor]
) -> AttemptCompleted | AttemptFailed:
    worker.start()
    log_capture.capture_process(worker.add_log_entry)
    attempt = run_attempt(assignment, processor, worker.send, worker.stopping.is_set, post=worker.post)
    working = Containment().start(attempt, f"run-{assignment.job_id}")
    await asyncio.wait({working})
    return working.result()


class _WorkerConnection:
    """The connection to the worker, for the job's event loop."""

    def __init__(self, connection: socket.socket) -> None:
        self.stopping = threading.Event()
        self._connection = connection
        self._loop: asyncio.AbstractEventLoop | None = None
        self._responses: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count(1)
        self._queue: deque[MessageEnvelope] = deque()
        self._queue_changed = threading.Condition()
        self._has_capacity = asyncio.Event()
        self._has_capacity.set()
        self._is_finished = False
        self._writer = threading.Thread(target=self._write, name="send-messages", daemon=True)

    def start(self) -> None:
        """Start to exchange messages. Call on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._writer.start()
        threading.Thread(target=self._read, name="receive-responses", daemon=True).start()

    def add_log_entry(self, level: LogLevel, text: str, *, logger: str) -> None:
        """Add an entry to the job's log, from any thread."""
        self.post(LogEntries([(time.time(), level, to_text(text), to_text(logger, 200))]))

    def post(self, message: LogEntries | Progress) -> None:
        """Send a message without a response, from any thread. Wait while too many messages are queued."""
        with self._queue_changed:
            # The thread that sends messages must not wait for itself: a finalizer that runs in it may log.
            if len(self._queue) > _MAX_QUEUED_MESSAGES and threading.current_thread() is not self._writer:
                self._queue_changed.wait_for(lambda: len(self._queue) <= _MAX_QUEUED_MESSAGES or self._is_finished)
            self._enqueue(MessageEnvelope(0, message))

    async def send(self, message: Message) -> Any:
        """Send a request and return the response."""
        await self._has_capacity.wait()
        request_id, response = next(self._ids), asyncio.get_running_loop().create_future()
        self._responses[request_id] = response
        try:
            self._enqueue(MessageEnvelope(request_id, message))
            return await response
        finally:
            self._responses.pop(request_id, None)

    def finish(self, message: Message) -> None:
        """Send the last message, and return when all are sent. The event loop may have ended."""
        self._enqueue(MessageEnvelope(0, message))
        with self._queue_changed:
            self._is_finished = True
            self._queue_changed.notify_all()
        if self._loop is None:  # start() was not called
            self._write()
        else:
            self._writer.join()

    def _enqueue(self, envelope: MessageEnvelope) -> None:
        """Queue a message. Merge log entries with those of the last one, and replace older progress."""
        with self._queue_changed:
            message, last = envelope.message, self._queue[-1].message if self._queue else None
            if (
                isinstance(message, LogEntries)
                and isinstance(last, LogEntries)
                and len(last.entries) < _MAX_ENTRIES_PER_MESSAGE
            ):
                last.entries.extend(message.entries)
            elif isinstance(message, Progress) and isinstance(last, Progress):
                self._queue[-1] = envelope
            else:
                self._queue.append(envelope)
            if len(self._queue) > _MAX_QUEUED_MESSAGES:
                self._has_capacity.clear()
            self._queue_changed.notify_all()

    def _write(self) -> None:
        """Send queued messages. Only this thread writes, so messages are not interleaved."""
        try:
            while (envelope := self._take_message()) is not None:
                self._connection.sendall(encode_frame(envelope))
        except OSError:
            os._exit(1)  # the worker has ended, and the supervisor kills what is left
        except BaseException as error:  # noqa: BLE001 - see _die
            _die(error)

    def _take_message(self) -> MessageEnvelope | None:
        with self._queue_changed:
            while not self._queue:
                if self._is_finished:
                    return None
                self._queue_changed.wait()
            envelope = self._queue.popleft()
            self._queue_changed.notify_all()
            if not self._has_capacity.is_set() and len(self._queue) <= _MAX_QUEUED_MESSAGES // 2:
                self._call_soon(self._has_capacity.set)
            return envelope

    def _read(self) -> None:
        """Read the worker's responses and its stop message."""
        try:
            while (text := _receive(self._connection)) is not None:
                content = orjson.loads(text)
                if "stop" in content:
                    self.stopping.set()
                else:
                    self._call_soon(self._handle_response, content)
        except BaseException as error:  # noqa: BLE001 - see _die
            _die(error)
        os._exit(1)  # the worker has ended

    def _call_soon(self, function: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the processor closed the event loop, so nothing waits
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function, *arguments)

    def _handle_response(self, content: dict[str, Any]) -> None:
        response = self._responses.get(content["id"])
        if response is None or response.done():  # the waiting task was cancelled
            return
        if "error" in content:
            response.set_exception(ProcessorError(**content["error"]))
        else:
            response.set_result(content["value"])


def _die(error: BaseException) -> NoReturn:
    """End the process. A thread of the connection has failed, perhaps out of memory, so the job would hang."""
    with suppress(BaseException):
        os.write(2, f"The connection to the worker failed: {type(error).__name__}: {error}\n".encode(errors="replace"))
    os._exit(1)


def _receive(connection: socket.socket) -> bytes | None:
    """Return the content of the next frame; None if the worker has ended. Blocks."""
    header = _receive_exactly(connection, FRAME_HEADER.size)
    return _receive_exactly(connection, FRAME_HEADER.unpack(header)[0]) if header is not None else None


def _receive_exactly(connection: socket.socket, size: int) -> bytes | None:
    received = bytearray(size)
    view, filled = memoryview(received), 0
    while filled < size:
        try:
            count = connection.recv_into(view[filled:])
        except OSError:
            return None
        if not count:
            return None
        filled += count
    return bytes(received)


def exit_process() -> None:
    """End the process without waiting for threads or finalizers that the processor started and did not end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001, S112 - a processor may have replaced or closed the stream
            continue
    os._exit(0)
