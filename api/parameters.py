"""api: validate the parameters of jobs. Models of plug-ins are applied in a process of their own.

A validator of a plug-in may raise anything, run for ever (a regular expression holds the interpreter lock meanwhile),
or end the process. In a process of its own it affects only the request that needs it. The models of the job types that
come with Jobledger are applied here, because a process costs about half a millisecond for each request.
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import structlog
from pydantic import BaseModel
from pydantic_core import from_json, to_json

from api.errors import ApiError, path
from api.validation_process import failed, frame

_log = structlog.get_logger()
_OWN_MODELS: Final = "workers."
_PROCESSES: Final = 2
_START_SECONDS: Final = 30.0
_SECONDS: Final = 3.0
_SECONDS_PER_JOB: Final = 0.01
_QUEUE_SECONDS: Final = 10.0
_INHERITED: Final = ("PATH", "LANG", "LC_ALL", "TZ", "HOME")
"""Nothing else of the environment, which has secrets."""


@dataclass(frozen=True, slots=True)
class Check:
    """Parameters to validate, and where they stand in the body."""

    job_type: str
    model: type[BaseModel]
    parameters: Mapping[str, Any]
    within: tuple[str | int, ...]

    @property
    def is_trusted(self) -> bool:
        """Whether the model comes with Jobledger."""
        return self.model.__module__.startswith(_OWN_MODELS)


class ParametersValidator:
    """The processes that apply the models of plug-ins. They are started when they are first needed."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._free = asyncio.Semaphore(_PROCESSES)
        self._idle: list[Process] = []

    async def check(self, checks: Iterable[Check]) -> None:
        """Apply models of plug-ins.

        Raises:
            ApiError: 422, naming the first hundred wrong fields, or why there is no verdict; 503, when it takes too
                long.
        """
        wanted = list(checks)
        if not wanted:
            return
        try:
            async with asyncio.timeout(_QUEUE_SECONDS):
                await self._free.acquire()
        except TimeoutError:
            raise _too_slow("Other requests are being validated.") from None
        try:
            answer = await self._answer(wanted)
        finally:
            self._free.release()
        if answer is not None:
            raise ApiError(answer["status"], answer["code"], answer["message"], details=answer["details"])

    async def close(self) -> None:
        """End the processes."""
        while self._idle:
            await _end(self._idle.pop())

    async def _answer(self, checks: list[Check]) -> Any:
        request = to_json(
            [
                {
                    "job_type": it.job_type,
                    "model": f"{it.model.__module__}:{it.model.__qualname__}",
                    "parameters": it.parameters,
                    "within": it.within,
                }
                for it in checks
            ]
        )
        process = self._idle.pop() if self._idle else await self._started()
        seconds = self._seconds + _SECONDS_PER_JOB * len(checks)
        try:
            async with asyncio.timeout(seconds):
                answer = await _exchange(process, request)
        except TimeoutError:
            await _end(process)
            names = ", ".join(sorted({it.job_type for it in checks}))
            raise _too_slow(f"Validating parameters of job type {names} took longer than {seconds:g} s.") from None
        except (OSError, EOFError):  # it has ended, for want of memory or by what the validator did
            await _end(process)
            _log.warning("a validation process has ended", exit_code=process.returncode)
            why = f"ended its process (exit code {process.returncode})"
            return failed(path(checks[0].within), checks[0].job_type, why)
        except BaseException:  # the client is gone, and the answer would be taken for that to the next request
            await _end(process)
            raise
        self._idle.append(process)
        return answer

    async def _started(self) -> Process:
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(it for it in sys.path if it)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "api.validation_process", stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment
        )
        try:
            async with asyncio.timeout(_START_SECONDS):
                await _exchange(process, b"[]")
        except BaseException as error:
            await _end(process)
            if isinstance(error, TimeoutError | OSError | EOFError):
                raise _too_slow("The process that validates parameters did not start.") from error
            raise
        return process


def _too_slow(why: str) -> ApiError:
    return ApiError(503, "validation_timeout", why, retry_after_seconds=5)


async def _exchange(process: Process, request: bytes) -> Any:
    assert process.stdin is not None  # noqa: S101 - narrows the type
    assert process.stdout is not None  # noqa: S101 - narrows the type
    process.stdin.write(frame(request))
    await process.stdin.drain()
    length = int.from_bytes(await process.stdout.readexactly(8), "big")
    return from_json(await process.stdout.readexactly(length))


async def _end(process: Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.kill()
    await process.wait()
