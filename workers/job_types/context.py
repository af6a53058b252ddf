"""The context of a job function: what its first parameter, `ctx`, offers.

`Context` belongs to asynchronous functions. `SyncContext` has the same members for synchronous functions, which run in
a thread: its methods return results instead of awaitables. Both use only `JobContext`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import mimetypes
import os
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Generic, ParamSpec, overload

from typing_extensions import TypeVar

from jobledger.workers.processor import JobContext, LogLevel, SavedFile

S = TypeVar("S", default=None)
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
_MEDIA_TYPES: Final = mimetypes.MimeTypes()
_MEDIA_TYPES.add_type("text/markdown", ".md")
_CONTEXT_MEMBERS: Final = ("job_id", "attempt", "step", "save", "scratch_dir")


def is_context(value: object) -> bool:
    """Return whether a value is the context of a job. It is no input of a step."""
    return isinstance(value, _ContextBase) or all(hasattr(type(value), name) for name in _CONTEXT_MEMBERS)


def is_asynchronous(function: Callable[..., Any]) -> bool:
    """Return whether calling a function returns a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004 - an object with this method


async def run_in_thread(function: Callable[[], T]) -> T:
    """Call a function in a thread. Unlike `asyncio.to_thread`, it returns if the function raises `StopIteration`."""

    def call() -> T:
        try:
            return function()
        except StopIteration as error:  # a future cannot hold it, and its waiter would wait forever
            raise RuntimeError("the function raised StopIteration") from error

    return await asyncio.to_thread(call)


class JobLogHandler(logging.Handler):
    """Writes log records to the log of a job.

    Args:
        log: Adds an entry: `JobContext.log`.
        keeps_name: Whether entries have the name of their logger.
    """

    def __init__(self, log: Callable[..., object], *, keeps_name: bool) -> None:
        super().__init__()
        self._log = log
        self._keeps_name = keeps_name

    def emit(self, record: logging.LogRecord) -> None:
        """Add a record to the job's log. Records after the end of the attempt are dropped."""
        try:
            text = self.format(record).rstrip()  # a warning ends with an empty line
        except Exception:  # noqa: BLE001 - the arguments of a record are third-party objects
            self.handleError(record)
            return
        try:
            self._log(get_log_level(record.levelno), text, logger=record.name if self._keeps_name else "")
        except RuntimeError:  # the attempt has ended
            return


def get_log_level(number: int) -> LogLevel:
    """Return the level of the job's log for a level of `logging`."""
    if number >= logging.ERROR:
        return "error"
    if number >= logging.WARNING:
        return "warning"
    return "info" if number >= logging.INFO else "debug"


class _ContextBase(Generic[S]):
    def __init__(self, job: JobContext, settings: S) -> None:
        """Initialize the context of one attempt. See `FunctionProcessor`."""
        self._job = job
        self.settings = settings
        """The section `processors.<job type>` of config.yaml, as the model in `Context[…]`; None without a model."""

    @functools.cached_property
    def log(self) -> logging.Logger:
        """A logger of the standard library whose entries go to the job's log, at all levels."""
        logger = logging.Logger("job")  # not registered: it belongs to this attempt
        logger.addHandler(JobLogHandler(self._job.log, keeps_name=False))
        return logger

    @property
    def job_id(self) -> str:
        """The ID of the job."""
        return self._job.job_id

    @property
    def attempt(self) -> int:
        """The number of the attempt. The first attempt is 1."""
        return self._job.attempt

    @property
    def scratch_dir(self) -> Path:
        """A directory for temporary files of this attempt. Empty at first, and removed after the attempt."""
        return self._job.scratch_dir

    @property
    def cancelled(self) -> bool:
        """Whether the job was cancelled, has exceeded its timeout, or must stop for another reason.

        A job process ends one second later. An asynchronous inline function also gets `asyncio.CancelledError`.
        """
        return self._job.is_cancelled

    def progress(self, percent: float, message: str = "") -> Awaitable[None]:
        """Report the progress of the whole job. Awaiting the result is optional, and does not wait.

        Args:
            percent: Progress from 0 to 100. A value below an earlier one of the attempt counts as the earlier one.
            message: Short description of the current activity, for people.
        """
        return self._job.report_progress(percent, message)

    def warn(self, message: str, *, repeat_on_restart: bool = False) -> None:
        """Record that the results are incomplete. See `JobContext.warn`."""
        self._job.warn(message, repeat_on_restart=repeat_on_restart)

    def add_tokens(self, tokens: int) -> None:
        """Add to the number of language model tokens used. See `JobContext.add_tokens`."""
        self._job.add_tokens(tokens)


class Context(_ContextBase[S]):
    """The context of an asynchronous job function. `Context[MySettings]` declares the model of its settings."""

    async def save(self, path: str, content: bytes | str | Path, media_type: str | None = None) -> SavedFile:
        """Save a result file. It belongs to the results of the job.

        Args:
            path: Relative path below the location where results are served. See `JobContext.save`.
            content: The content, or the path of a regular file, which is moved. Text is stored as UTF-8.
            media_type: Media type of the content. Default: chosen by the extension of `path`.

        Returns:
            The saved file. Its path may differ from `path`. Use it in links.

        Raises:
            ProcessorError: See `JobContext.save`.
        """
        return await self._job.save(path, _encode(content), media_type or _guess_media_type(path))

    @overload
    async def step(
        self, name: str, function: Callable[..., Awaitable[R]], /, *args: Any, share: timedelta | None, **kwargs: Any
    ) -> R: ...

    @overload
    async def step(
        self, name: str, function: Callable[..., R], /, *args: Any, share: timedelta | None, **kwargs: Any
    ) -> R: ...

    @overload
    async def step(self, name: str, function: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    async def step(self, name: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    async def step(  # type: ignore[misc]  # a parameter `share` of a step needs another name
        self, name: str, function: Callable[..., Any], /, *args: Any, share: timedelta | None = None, **kwargs: Any
    ) -> Any:
        """Run a part of the work and store its result, so that a later attempt does not repeat it.

        See `JobContext.step`.
        """
        return await self._job.step(name, function, *args, share=share, **kwargs)


class SyncContext(_ContextBase[S]):
    """The context of a synchronous job function, which runs in a thread of its job process."""

    def __init__(self, job: JobContext, settings: S) -> None:
        super().__init__(job, settings)
        self._loop = asyncio.get_running_loop()

    def save(self, path: str, content: bytes | str | Path, media_type: str | None = None) -> SavedFile:
        """Save a result file. See `Context.save`."""
        return self._wait(self._job.save(path, _encode(content), media_type or _guess_media_type(path)))

    @overload
    def step(
        self, name: str, function: Callable[..., Awaitable[R]], /, *args: Any, share: timedelta | None, **kwargs: Any
    ) -> R: ...

    @overload
    def step(
        self, name: str, function: Callable[..., R], /, *args: Any, share: timedelta | None, **kwargs: Any
    ) -> R: ...

    @overload
    def step(self, name: str, function: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    def step(self, name: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def step(  # type: ignore[misc]  # a parameter `share` of a step needs another name
        self, name: str, function: Callable[..., Any], /, *args: Any, share: timedelta | None = None, **kwargs: Any
    ) -> Any:
        """Run a part of the work and store its result. See `JobContext.step`."""
        return self._wait(self._job.step(name, function, *args, share=share, **kwargs))

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the event loop of the job, and wait for its result.

        Raises:
            RuntimeError: The caller runs on this event loop, which would wait for itself.
        """
        if asyncio._get_running_loop() is self._loop:
            coroutine.close()
            raise RuntimeError("do not use the context of a synchronous job function in asynchronous code")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def _encode(content: bytes | str | Path) -> bytes | Path:
    return content.encode() if isinstance(content, str) else content


def _guess_media_type(path: str) -> str:
    """Return the media type of an extension. The files of the system, which differ between machines, do not count."""
    _, extension = os.path.splitext(path)  # noqa: PTH122 - it is a path of results, with slashes on any system
    return _MEDIA_TYPES.types_map[1].get(extension.lower(), "application/octet-stream")
