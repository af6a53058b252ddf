"""Contain a processor's code: keep its exceptions, and tasks that it does not end, away from the event loop.

In asyncio, `SystemExit` and `KeyboardInterrupt` of any task or callback end the event loop, and a coroutine may ignore
its cancellation forever. A processor runs in a `Containment`: nothing that it raises reaches the event loop, and the
containment can always be ended. The processor cannot cancel other tasks or stop the event loop, and blocks only its own
threads. Containments are used for inline jobs in the worker, and in each job process.
"""

from __future__ import annotations

import asyncio
import asyncio.events
import asyncio.tasks
import ctypes
import os
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog

from jobledger.workers.results.conversion import get_type_name, to_text

T = TypeVar("T")
_log = structlog.get_logger()
_current: ContextVar[Containment | None] = ContextVar("containment", default=None)
_canceller: ContextVar[Containment | None] = ContextVar("canceller", default=None)
"""The containment for which Jobledger cancels tasks."""
_is_own: ContextVar[bool] = ContextVar("own", default=False)
"""Whether code outside of containments is known to be Jobledger's own. See `_is_third_party`."""
_unclosed_coroutines: deque[Coroutine[Any, Any, Any]] = deque(maxlen=100)
"""Coroutines that could not be closed. Python would retry when they are collected, and print a traceback."""
# The deque outlives the interpreter. At exit, the modules' globals are gone before its coroutines are closed: one that
# suppresses every error would then loop forever, and the process would not exit.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_unclosed_coroutines))
_MAX_TURN_SECONDS: Final = 0.005
"""Time after which coroutines that do not wait let other tasks run."""
_END_ITERATIONS: Final = 3
"""Number of iterations of the event loop in which an abandoned task ends."""
_MAX_THREADS: Final = min(32, (os.cpu_count() or 1) + 4)
"""The same number as in asyncio's default executor."""


class Containment:
    """Runs one coroutine of third-party code, and tracks the tasks that it creates."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self.is_abandoned = False
        self._threads: ThreadPoolExecutor | None = None

    def start(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run the coroutine as a task. Everything that it starts inherits its context, and so the containment."""
        install_containment(asyncio.get_running_loop())
        token = _current.set(self)
        try:
            return asyncio.create_task(coroutine, name=name)
        finally:
            _current.reset(token)

    @property
    def is_used(self) -> bool:
        """Whether its tasks are not done, or it has threads. If so, it must be stopped."""
        return bool(self._tasks) or self._threads is not None

    async def stop(self, seconds: float) -> None:
        """Cancel what still runs. What has not ended after `seconds` is never resumed."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        if not self._tasks:
            return
        self._cancel_all()
        await asyncio.wait(set(self._tasks), timeout=seconds)
        self.abandon()
        for _ in range(_END_ITERATIONS):
            await asyncio.sleep(0)
            self.abandon()

    def abandon(self) -> None:
        """Never resume what has not ended yet. Its tasks end in the next iterations of the event loop."""
        self.is_abandoned = True
        self._cancel_all()

    def cancel(self, task: asyncio.Future[Any]) -> None:
        """Cancel a task of this containment. What it waits for may be the task of another one, which continues."""
        token = _canceller.set(self)
        try:
            task.cancel()
        finally:
            _canceller.reset(token)

    def _cancel_all(self) -> None:
        for task in set(self._tasks):
            self.cancel(task)

    def add(self, task: asyncio.Task[Any]) -> None:
        """Track a task until it is done."""
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # prevents the asyncio report "exception was never retrieved"

    def submit(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
        """Call a function in a thread of this containment. It may block the thread for any time."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(
                _MAX_THREADS, thread_name_prefix="job", initializer=_current.set, initargs=(self,)
            )
        return self._threads.submit(function, *args, **kwargs)


@dataclass(frozen=True, slots=True)
class ContainedWork:
    """A coroutine to run in a containment by `run_until_waiting`.

    Attributes:
        on_end: Called with the result or the exception if the coroutine has ended without waiting. Both are None if it
            has cancelled its own task.
        on_wait: Called when it waits, with the task that continues it.
    """

    coroutine: Coroutine[Any, Any, Any]
    containment: Containment
    on_end: Callable[[Any, BaseException | None], None]
    on_wait: Callable[[asyncio.Task[Any]], None]


async def run_until_waiting(works: Iterable[ContainedWork]) -> None:
    """Run each coroutine until it ends or waits for the first time, one after the other.

    This takes a fraction of the time of a task for each coroutine if most of them end without waiting.
    """
    loop = asyncio.get_running_loop()
    install_containment(loop)
    all_started = loop.create_future()
    _Sequence(iter(works), copy_context(), all_started).start()
    await all_started


class _Sequence(Coroutine[Any, Any, None]):
    """Runs coroutines in one task. When one of them waits, the task becomes its own, and another one runs the rest.

    So a coroutine has one task from its beginning on, as `asyncio.timeout` and `asyncio.current_task` require.

    Args:
        context: The context of the caller. The coroutines run in copies of it.
        all_started: Done when all coroutines have ended or wait. If it is cancelled, no more are started.
    """

    def __init__(self, works: Iterator[ContainedWork], context: Context, all_started: asyncio.Future[None]) -> None:
        self._works = works
        self._context = context
        self._all_started = all_started
        self._loop = asyncio.get_running_loop()
        self._owner: _Contained | None = None
        """The coroutine to which the task belongs."""

    def start(self) -> None:
        context = Context()
        context.run(_current.set, Containment())  # marks the task as one of third-party code
        context.run(_SequenceTask, self, loop=self._loop)

    def send(self, value: Any) -> Any:
        if self._owner is not None:
            return self._owner.send(value)
        try:
            return self._run_works()
        except StopIteration:
            raise
        except BaseException as error:  # noqa: BLE001 - the caller waits for it, and gets the error
            if not self._all_started.done():
                self._all_started.set_exception(error)
            raise StopIteration from None

    def throw(self, *error: Any) -> Any:
        if self._owner is not None:
            return self._owner.throw(*error)
        return self.send(None)  # a coroutine has cancelled all tasks that it could find

    def close(self) -> None:
        if self._owner is not None:
            self._owner.close()

    def __await__(self) -> Generator[Any, Any, None]:
        raise NotImplementedError("a task runs it")

    def _run_works(self) -> Any:
        task = asyncio.current_task()
        assert isinstance(task, _SequenceTask)  # noqa: S101 - see `start`
        pause_at = self._loop.time() + _MAX_TURN_SECONDS
        while (
            not self._all_started.done()
            and (
                work := self._context.run(
                    self._get_next,
                )
            )
            is not None
        ):
            cancellations = task.cancelling()
            coroutine = _Contained(work.coroutine, work.containment, self._context.copy())
            result = error = None
            task.begin(work.containment)
            try:
                awaited = coroutine.send(None)
            except StopIteration as end:
                result = end.value
            except BaseException as raised:  # noqa: BLE001 - third-party code may raise anything
                error = raised
            else:
                self._owner = coroutine
                task.keep()
                work.containment.add(task)
                self._start_rest()
                self._context.run(work.on_wait, task)
                return awaited
            task.end()
            if task.cancelling() > cancellations or task._must_cancel:  # type: ignore[attr-defined]  # private
                # As in every task, a coroutine that has cancelled its own task has no result. This task ends, too.
                self._start_rest()
                self._context.run(work.on_end, None, None)
                raise StopIteration
            self._context.run(work.on_end, result, error)
            if self._loop.time() > pause_at:
                return None  # other tasks run, and then this one continues
        if not self._all_started.done():
            self._all_started.set_result(None)
        raise StopIteration

    def _get_next(self) -> ContainedWork | None:
        return next(self._works, None)

    def _start_rest(self) -> None:
        _Sequence(self._works, self._context, self._all_started).start()


class _SequenceTask(asyncio.Task[Any]):
    """The task of a sequence. To each coroutine of the sequence, it appears as a task of its own.

    A coroutine may keep the task and use it later, when it belongs to another coroutine.
    """

    _owner: Containment | None = None
    """The containment of the coroutine that runs or to which the task belongs."""
    _owner_count = 0
    _own_callbacks: list[tuple[Callable[[Any], object], Context]] | None = None
    """What the coroutine that runs wants to be called at its end. None: the task belongs to one coroutine."""

    def begin(self, owner: Containment) -> None:
        """Run the next coroutine."""
        self._owner, self._own_callbacks = owner, []
        self._owner_count += 1

    def keep(self) -> None:
        """Belong to the coroutine that runs."""
        callbacks, self._own_callbacks = self._own_callbacks or [], None
        for callback, context in callbacks:
            super().add_done_callback(callback, context=context)

    def end(self) -> None:
        """End the coroutine that runs."""
        callbacks, self._own_callbacks, self._owner = self._own_callbacks or [], None, None
        for callback, context in callbacks:
            self.get_loop().call_soon(callback, self, context=context)

    def add_done_callback(self, callback: Callable[[Any], object], /, *, context: Context | None = None) -> None:
        """Call a function at the end of the coroutine that runs."""
        if self._own_callbacks is None:
            super().add_done_callback(callback, context=context)
        else:
            self._own_callbacks.append((callback, copy_context() if context is None else context))

    def remove_done_callback(self, callback: Callable[[Any], object], /) -> int:
        """Remove a callback, and return how often it was added."""
        own = self._own_callbacks or []
        kept = [item for item in own if item[0] != callback]
        if self._own_callbacks is not None:
            self._own_callbacks = kept
        return super().remove_done_callback(callback) + len(own) - len(kept)

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancel the task, unless the caller is another coroutine of the sequence.

        A thread that a coroutine has started itself can be any coroutine's, so it can only cancel the first one.
        """
        caller = _current.get() or _canceller.get()
        if caller is not None:
            is_allowed = caller is self._owner
        else:
            is_allowed = self._owner_count < 2 or not _is_third_party(self.get_loop())
        return super().cancel(msg) if is_allowed else False


class _Contained(Coroutine[Any, Any, Any]):
    """Wraps a coroutine, and closes it when its containment is abandoned.

    Otherwise, the task of a coroutine that suppresses `CancelledError` could not be ended.

    Args:
        context: The context in which the coroutine runs. None: that of its task, which has the containment already.
    """

    def __init__(
        self, coroutine: Coroutine[Any, Any, Any], containment: Containment, context: Context | None = None
    ) -> None:
        self._coroutine = coroutine
        self._containment = containment
        self._context = context
        if context is not None:
            context.run(_current.set, containment)

    def send(self, value: Any) -> Any:
        self._raise_if_abandoned()
        return self._coroutine.send(value) if self._context is None else self._context.run(self._coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        self._raise_if_abandoned()
        throw: Callable[..., Any] = self._coroutine.throw
        return throw(*error) if self._context is None else self._context.run(throw, *error)

    def close(self) -> None:
        _close(self._coroutine)

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()

    def _raise_if_abandoned(self) -> None:
        if self._containment.is_abandoned:
            self.close()
            raise asyncio.CancelledError


def _close(coroutine: Coroutine[Any, Any, Any]) -> None:
    chain: list[Any] = [coroutine]
    while (inner := getattr(chain[-1], "cr_await", None)) is not None:
        chain.append(inner)
    try:
        coroutine.close()
    except BaseException as error:  # noqa: BLE001 - third-party code may raise anything; it is never resumed
        _log.warning("processor coroutine failed on close", error=get_type_name(error))
    _unclosed_coroutines.extend(inner for inner in chain if getattr(inner, "cr_frame", None) is not None)


class _OwnTask(asyncio.Task[Any]):
    """A task of Jobledger. Code in a containment cannot cancel it (`for task in asyncio.all_tasks(): …`)."""

    def cancel(self, msg: Any | None = None) -> bool:
        return super().cancel(msg) if _current.get() is None else False


class _ContainedExecutor(ThreadPoolExecutor):
    """The default executor of an event loop. Code in a containment gets threads of its containment."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        containment = _current.get()
        return super().submit(fn, *args, **kwargs) if containment is None else containment.submit(fn, *args, **kwargs)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that supports containments from its first task on.

    The calling context, and everything started in it, is known to be Jobledger's own.
    """
    _is_own.set(True)
    loop = asyncio.new_event_loop()
    install_containment(loop)
    loop._marks_own_code = True  # type: ignore[attr-defined]  # see _is_third_party
    finalize = loop._asyncgen_finalizer_hook  # type: ignore[attr-defined]  # private

    def finalize_as_third_party(generator: Any) -> None:
        """Close an asynchronous generator that was garbage collected, as third-party code."""
        if _current.get() is None:
            Context().run(finalize, generator)
        else:
            finalize(generator)

    loop._asyncgen_finalizer_hook = finalize_as_third_party  # type: ignore[attr-defined]  # private
    return loop


def _is_third_party(loop: asyncio.AbstractEventLoop, context: Context | None = None) -> bool:
    """Return whether the code in a context belongs to a processor or may belong to one.

    Threads started by a processor, and callbacks that they pass to the event loop, have an empty context.

    Args:
        context: Default: the current one.
    """
    get = (copy_context() if context is None else context).get
    if get(_current) is not None:
        return True
    return getattr(loop, "_marks_own_code", False) and not get(_is_own)


def install_containment(loop: asyncio.AbstractEventLoop) -> None:
    """Prepare an event loop for containments. Idempotent."""
    if asyncio.events.Handle._run is not _run:
        asyncio.events.Handle._run = _run  # type: ignore[method-assign]  # see _run
    factory = loop.get_task_factory()
    if factory is not None and getattr(factory, "contains", False):
        return
    loop.set_default_executor(_ContainedExecutor(_MAX_THREADS, thread_name_prefix="asyncio"))
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

    create.contains = True  # type: ignore[attr-defined]  # marks this factory
    loop.set_task_factory(create)


def _handle_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an exception of a callback. For third-party code, log one line without a traceback."""
    handle, error = context.get("handle"), context.get("exception")
    is_third_party = isinstance(handle, asyncio.Handle) and handle._context.get(_current) is not None  # type: ignore[attr-defined]  # private
    if is_third_party or isinstance(error, _StopRejected):
        _log.warning("processor callback failed", error=f"{get_type_name(error)}: {to_text(error, 200)}")
    else:
        loop.default_exception_handler(context)


class _StopRejected(RuntimeError):
    """Third-party code tried to stop the event loop."""


def _guard_stop(loop: asyncio.AbstractEventLoop) -> None:
    stop = loop.stop

    def guarded() -> None:
        if _is_third_party(loop):
            raise _StopRejected("a processor must not stop the event loop")
        stop()

    loop.stop = guarded  # type: ignore[method-assign]  # only for this loop


_run_in_event_loop = asyncio.events.Handle._run


def _run(self: asyncio.Handle) -> None:
    """Run a callback. Suppress exceptions unless the code is known to be Jobledger's own.

    The original method passes on `SystemExit` and `KeyboardInterrupt`, which ends the event loop and the process.
    asyncio has no official hook for these two: it does not call the event loop's exception handler for them.
    """
    try:
        _run_in_event_loop(self)
    except (SystemExit, KeyboardInterrupt) as error:
        if not _is_third_party(self._loop, self._context):  # type: ignore[attr-defined]  # private
            raise
        cause = f"{get_type_name(error)}: {to_text(error, 200)}"
        _log.warning("processor tried to exit the process", error=cause)


@contextmanager
def outside_containment() -> Iterator[None]:
    """In the block, new tasks belong to no containment. The worker's own code runs here."""
    current, own = _current.set(None), _is_own.set(True)
    try:
        yield
    finally:
        _current.reset(current)
        _is_own.reset(own)
