"""Run an attempt in a job process: start it, exchange messages with it, and stop it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Any, Final, TypeVar

from jobledger.workers.attempts.attempt_timeout import AttemptTimeout
from jobledger.workers.attempts.message_handler import MessageHandler, SavedFileLost
from jobledger.workers.child.attempt import Assignment
from jobledger.workers.child.messages import AttemptCompleted, AttemptFailed, MessageEnvelope
from jobledger.workers.child.process import JobProcess, ProcessFailed
from jobledger.workers.machine.health import MachineFailure, build_disk_timeout_failure, find_machine_failure
from jobledger.workers.processor import ProcessorError
from jobledger.workers.results.conversion import to_text

_T = TypeVar("_T")
DISK_TIMEOUT_SECONDS = 30.0
"""A blocking call that takes longer means that the disk does not respond."""
_MAX_REQUESTS: Final = 100
"""Maximum number of concurrent requests of one job process."""
_MAX_REQUEST_BYTES: Final = 4 * 1024 * 1024
"""Maximum total size of the concurrent requests of one job process.

In memory, they may take 25 times as much. A request that is larger is handled alone.
"""
# Do not use the event loop's default executor: inline jobs may occupy all of its threads.
_executor = ThreadPoolExecutor(4, thread_name_prefix="executor")


class ProcessRunner:
    """Runs one attempt in a job process.

    Args:
        memory_limit_mb: Limit of its address space in MiB.
        environment_variables: Names of variables that it gets besides the default ones.
        create_directories: Creates the attempt's directories. Blocks.
    """

    def __init__(
        self,
        assignment: Assignment,
        message_handler: MessageHandler,
        timeout: AttemptTimeout,
        *,
        memory_limit_mb: int,
        environment_variables: Sequence[str],
        create_directories: Callable[[], None],
    ) -> None:
        self._assignment = assignment
        self._message_handler = message_handler
        self._timeout = timeout
        self._memory_limit_mb = memory_limit_mb
        self._environment_variables = environment_variables
        self._create_directories = create_directories
        self._requests: dict[asyncio.Task[None], int] = {}  # sizes in bytes

    async def run(self) -> AttemptCompleted | AttemptFailed:
        """Run the attempt and return its last message, or the failure that the end of the process means.

        Raises:
            AttemptFenced: Another worker has the job.
            MachineFailure: The process could not be started.
        """
        starting = asyncio.create_task(self._start_process())
        try:
            process = await asyncio.shield(starting)
        except (OSError, MachineFailure) as error:
            raise find_machine_failure(error) or MachineFailure(to_text(error, 500)) from error
        except asyncio.CancelledError:
            await _stop_after_start(starting)
            raise
        self._timeout.start()
        try:
            return await self._exchange_messages(process)
        except ProcessFailed as error:
            return error.failure
        finally:
            self._timeout.stop()
            # The process must end even if this task is cancelled again. stop() takes a few seconds at most.
            await _wait_uncancelled(asyncio.create_task(process.stop()))
            self._message_handler.finish_output()

    async def _start_process(self) -> JobProcess:
        await run_blocking(self._create_directories)
        return await JobProcess.start(
            self._assignment.job_type,
            self._memory_limit_mb,
            self._message_handler.add_output,
            self._environment_variables,
        )

    async def _exchange_messages(self, process: JobProcess) -> AttemptCompleted | AttemptFailed:
        """Send the assignment, handle messages until the last one, and cancel the requests that are pending then."""
        try:
            async with asyncio.TaskGroup() as tasks:
                outcome = await self._receive_messages(process, tasks)
                for request in self._requests:
                    request.cancel()
        except BaseExceptionGroup as errors:  # of a request or of the process; the first one has ended the others
            raise errors.exceptions[0] from None
        return outcome

    async def _receive_messages(
        self, process: JobProcess, tasks: asyncio.TaskGroup
    ) -> AttemptCompleted | AttemptFailed:
        await process.send(self._assignment.model_dump(mode="json"))
        async with aclosing(process.iterate_messages()) as messages:
            async for envelope, size in messages:
                message = envelope.message
                if isinstance(message, AttemptCompleted | AttemptFailed):
                    return message
                if not envelope.request_id:
                    await self._message_handler.handle(message)
                    continue
                while not _has_capacity(self._requests, size) and not process.exit_task.done():
                    await asyncio.wait({*self._requests, process.exit_task}, return_when=asyncio.FIRST_COMPLETED)
                request = tasks.create_task(self._handle_request(process, envelope))
                self._requests[request] = size
                request.add_done_callback(self._requests.pop)
        raise AssertionError("iterate_messages() ends with an exception")

    async def _handle_request(self, process: JobProcess, envelope: MessageEnvelope) -> None:
        response: dict[str, Any] = {"id": envelope.request_id}
        try:
            response["value"] = await self._message_handler.handle(envelope.message)
        except SavedFileLost as error:  # the timeout is paused for each retry, so the job could retry forever
            raise ProcessFailed(AttemptFailed(error.code, error.message, details=error.details)) from error
        except ProcessorError as error:
            response["error"] = {
                "code": error.code,
                "message": error.message,
                "transient": error.transient,
                "details": error.details,
            }
        await process.send(response)


def _has_capacity(requests: Mapping[asyncio.Task[None], int], size: int) -> bool:
    """Return whether a request of `size` bytes may run concurrently with the others of the same job process."""
    if not requests:
        return True
    return len(requests) < _MAX_REQUESTS and sum(requests.values()) + size <= _MAX_REQUEST_BYTES


async def run_blocking(function: Callable[[], _T]) -> _T:
    """Call a function in a thread and return its result.

    Raises:
        MachineFailure: The call did not return in time, because a disk does not respond.
    """
    try:
        async with asyncio.timeout(DISK_TIMEOUT_SECONDS):
            return await asyncio.get_running_loop().run_in_executor(_executor, function)
    except TimeoutError as error:
        raise build_disk_timeout_failure(DISK_TIMEOUT_SECONDS) from error


async def _wait_uncancelled(task: asyncio.Task[Any]) -> None:
    """Wait for a task even if the caller is cancelled."""
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})


async def _stop_after_start(starting: asyncio.Task[JobProcess]) -> None:
    """Stop a job process that is being started and is no longer needed."""
    starting.cancel()
    await _wait_uncancelled(starting)
    if not starting.cancelled() and starting.exception() is None:
        await _wait_uncancelled(asyncio.create_task(starting.result().stop()))
