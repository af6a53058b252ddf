"""workers: keep what a processor's code raises, and the tasks it leaves behind, away from the event loop.

asyncio lets `SystemExit` and `KeyboardInterrupt` of any task or callback end the event loop, and a coroutine may ignore
its cancellation for ever. A processor runs within a `Containment`: nothing it raises reaches the event loop, and the
containment can always be ended. It cannot cancel other tasks or stop the event loop, and the threads it blocks are its
own. Used for inline jobs in the worker, and in each job process.
"""

from __future__ import annotations

import asyncio
import asyncio.events
import asyncio.tasks
import os
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from typing import Any, Final, TypeVar

import structlog

from jobledger.workers.result_conversion import to_text, type_name

T = TypeVar("T")
_log = structlog.get_logger()
_current: ContextVar[Containment | None] = ContextVar("containment", default=None)
_is_own: ContextVar[bool] = ContextVar("own", default=False)
"""Whether code outside of containments is known to be the program's. See `_is_foreign`."""
_kept: deque[Coroutine[Any, Any, Any]] = deque(maxlen=100)
"""Coroutines that refused to be closed. Python would try again when they are collected, and print a traceback."""
_ROUNDS: Final = 3  # of the event loop, in which an abandoned task ends
_THREADS: Final = min(32, (os.cpu_count() or 1) + 4)  # as many as asyncio's default


class Containment:
    """Runs one coroutine of foreign code, and knows the tasks that it creates."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._abandoned = False
        self._threads: ThreadPoolExecutor | None = None

    def start(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run the coroutine as a task. Its context is its own, so what it starts is known to be of this containment."""
        install_containment(asyncio.get_running_loop())
        token = _current.set(self)
        try:
            return asyncio.create_task(coroutine, name=name)
        finally:
            _current.reset(token)

    async def stop(self, seconds: float) -> None:
        """Cancel what still runs. What has not ended after `seconds` is never resumed again."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        if not self._tasks:
            return
        for task in set(self._tasks):
            task.cancel()
        await asyncio.wait(set(self._tasks), timeout=seconds)
        self.abandon()
        for _ in range(_ROUNDS):
            await asyncio.sleep(0)
            self.abandon()

    def abandon(self) -> None:
        """Never resume what has not ended yet. Its tasks end in the next rounds of the event loop."""
        self._abandoned = True
        for task in set(self._tasks):
            task.cancel()

    def add(self, task: asyncio.Task[Any]) -> None:
        """Remember a task until it is done."""
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # else asyncio reports it as "never retrieved" when the task is collected

    def submit(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
        """Call a function in a thread of this containment, which it may block for as long as it likes."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="job")
        return self._threads.submit(function, *args, **kwargs)

    @property
    def is_abandoned(self) -> bool:
        return self._abandoned


class _Contained(Coroutine[Any, Any, Any]):
    """A coroutine that is closed, whatever it wants, once its containment is abandoned.

    The task of a coroutine that swallows `CancelledError` could not be ended otherwise.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], containment: Containment) -> None:
        self._coroutine = coroutine
        self._containment = containment

    def send(self, value: Any) -> Any:
        self._end_if_abandoned()
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        self._end_if_abandoned()
        return self._coroutine.throw(*error)

    def close(self) -> None:
        _close(self._coroutine)

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()

    def _end_if_abandoned(self) -> None:
        if self._containment.is_abandoned:
            self.close()
            raise asyncio.CancelledError


def _close(coroutine: Coroutine[Any, Any, Any]) -> None:
    chain: list[Any] = [coroutine]
    while (inner := getattr(chain[-1], "cr_await", None)) is not None:
        chain.append(inner)
    try:
        coroutine.close()
    except BaseException as error:  # noqa: BLE001 - foreign code; it is never resumed again
        _log.warning("a processor's coroutine failed when it was closed", error=type_name(error))
    _kept.extend(it for it in chain if getattr(it, "cr_frame", None) is not None)


class _OwnTask(asyncio.Task[Any]):
    """A task of our own, which code within a containment cannot cancel (`for task in asyncio.all_tasks(): …`)."""

    def cancel(self, msg: Any | None = None) -> bool:
        return super().cancel(msg) if _current.get() is None else False


class _Threads(ThreadPoolExecutor):
    """An event loop's default executor. Code within a containment gets threads of its containment."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        containment = _current.get()
        return super().submit(fn, *args, **kwargs) if containment is None else containment.submit(fn, *args, **kwargs)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that is prepared for containments from its first task on.

    The calling context, and what is started in it, is known to be the program's own.
    """
    _is_own.set(True)
    loop = asyncio.new_event_loop()
    install_containment(loop)
    loop._knows_its_own = True  # type: ignore[attr-defined]  # see _is_foreign
    finalize = loop._asyncgen_finalizer_hook  # type: ignore[attr-defined]  # private

    def finalize_as_foreign(generator: Any) -> None:
        """Close an asynchronous generator that was left to the garbage collector, wherever that has run."""
        if _current.get() is None:
            Context().run(finalize, generator)
        else:
            finalize(generator)

    loop._asyncgen_finalizer_hook = finalize_as_foreign  # type: ignore[attr-defined]  # private
    return loop


def _is_foreign(loop: asyncio.AbstractEventLoop, context: Context | None = None) -> bool:
    """Return whether the code that runs in a context, by default this one, belongs to a processor or may do so.

    Threads that a processor has started, and what they hand to the event loop, have an empty context.
    """
    get = (copy_context() if context is None else context).get
    if get(_current) is not None:
        return True
    return getattr(loop, "_knows_its_own", False) and not get(_is_own)


def install_containment(loop: asyncio.AbstractEventLoop) -> None:
    """Prepare an event loop for containments. Installing again changes nothing."""
    if asyncio.events.Handle._run is not _run:
        asyncio.events.Handle._run = _run  # type: ignore[method-assign]  # see _run
    factory = loop.get_task_factory()
    if factory is not None and getattr(factory, "contains", False):
        return
    loop.set_default_executor(_Threads(_THREADS, thread_name_prefix="asyncio"))
    loop.set_exception_handler(_handle_exception)
    _guard_stop(loop)

    def create(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        containment = _current.get()
        if containment is None:
            if factory is not None:
                return factory(loop, coroutine, **options)
            return _OwnTask(coroutine, loop=loop, **options)
        task = asyncio.Task(_Contained(coroutine, containment), loop=loop, **options)
        containment.add(task)
        return task

    create.contains = True  # type: ignore[attr-defined]  # marks our factory
    loop.set_task_factory(create)


def _handle_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what a callback has raised: of foreign code one line, because it is no fault of this program."""
    handle, error = context.get("handle"), context.get("exception")
    of_a_job = isinstance(handle, asyncio.Handle) and handle._context.get(_current) is not None  # type: ignore[attr-defined]  # private
    if of_a_job or isinstance(error, _StopRefused):
        _log.warning("a processor's callback failed", error=f"{type_name(error)}: {to_text(error, 200)}")
    else:
        loop.default_exception_handler(context)


class _StopRefused(RuntimeError):
    """Foreign code has tried to stop the event loop."""


def _guard_stop(loop: asyncio.AbstractEventLoop) -> None:
    stop = loop.stop

    def guarded() -> None:
        if _is_foreign(loop):
            raise _StopRefused("a processor must not stop the event loop")
        stop()

    loop.stop = guarded  # type: ignore[method-assign]  # of this loop alone


_run_in_event_loop = asyncio.events.Handle._run


def _run(self: asyncio.Handle) -> None:
    """Run a callback. Of code that is not known to be the program's own, no exception leaves it.

    The original passes on `SystemExit` and `KeyboardInterrupt`, which ends the event loop and with it the process.
    There is no official way to decide otherwise: the event loop's exception handler is not asked about these two.
    """
    try:
        _run_in_event_loop(self)
    except (SystemExit, KeyboardInterrupt) as error:
        if not _is_foreign(self._loop, self._context):  # type: ignore[attr-defined]  # private
            raise
        cause = f"{type_name(error)}: {to_text(error, 200)}"
        _log.warning("a processor's task or callback tried to end the process", error=cause)


@contextmanager
def outside_containment() -> Iterator[None]:
    """Within the block, tasks that are created belong to no containment: the worker's own code runs here."""
    current, own = _current.set(None), _is_own.set(True)
    try:
        yield
    finally:
        _current.reset(current)
        _is_own.reset(own)
