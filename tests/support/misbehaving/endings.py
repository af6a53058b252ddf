"""Actions that raise errors, exit, cancel tasks or stop the event loop."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections.abc import Callable
from typing import Any

from jobledger.workers.processor import JobContext, ProcessorError, Results
from tests.support.misbehaving.processor import ACTIONS, action


class CustomBaseException(BaseException):
    pass


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)

    __repr__ = __str__


class UninitializedError(ProcessorError):
    def __init__(self) -> None:
        pass


def add_raising_action(name: str, error: Callable[[], BaseException]) -> None:
    async def run(job: JobContext) -> Results:
        raise error()

    ACTIONS[name] = run


def make_odd_error(**attributes: Any) -> ProcessorError:
    error = ProcessorError("ODD", "an odd error")
    vars(error).update(attributes)
    return error


add_raising_action("raise SystemExit", lambda: SystemExit(3))

add_raising_action("raise KeyboardInterrupt", KeyboardInterrupt)

add_raising_action("raise GeneratorExit", GeneratorExit)

add_raising_action("raise CancelledError", asyncio.CancelledError)

add_raising_action("raise BaseException", lambda: CustomBaseException("own"))

add_raising_action("raise StopIteration", StopIteration)

add_raising_action("raise StopAsyncIteration", StopAsyncIteration)

add_raising_action("raise MemoryError", MemoryError)

add_raising_action("raise unprintable", UnprintableError)

add_raising_action("raise surrogate", lambda: ValueError("half \ud800 of a pair"))

add_raising_action("raise long", lambda: ValueError("x" * 20_000_000))

add_raising_action("raise without attributes", UninitializedError)

add_raising_action("raise odd code", lambda: make_odd_error(code=None, message=b"bytes"))

add_raising_action(
    "raise odd details", lambda: make_odd_error(details={"when": {1}, "fine": 1, 2: 3, "nan": float("nan")})
)

add_raising_action("raise large details", lambda: make_odd_error(details={"large": "x" * 20_000_000, "fine": 1}))

add_raising_action("raise no details", lambda: make_odd_error(details=7))

add_raising_action(
    "raise group",
    lambda: ExceptionGroup("several", [ProcessorError("LATER", "later", transient=True), ProcessorError("NO", "no")]),
)

add_raising_action(
    "raise group of one", lambda: ExceptionGroup("one", [ExceptionGroup("inner", [ProcessorError("NO", "no")])])
)

add_raising_action(
    "raise mixed group", lambda: BaseExceptionGroup("mixed", [ProcessorError("NO", "no"), SystemExit(1)])
)


@action
async def cancel_itself(job: JobContext) -> Results:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(1)
    return Results()


@action
async def await_cancelled(job: JobContext) -> Results:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future
    return Results()


@action
async def exit_in_step(job: JobContext) -> Results:
    async def step() -> None:
        sys.exit(2)

    await job.step("page", step)
    return Results()


@action
async def exit_in_task(job: JobContext) -> Results:
    async def task() -> None:
        sys.exit(2)

    failing = asyncio.create_task(task())
    await asyncio.sleep(0.1)
    assert isinstance(failing.exception(), SystemExit)
    return Results()


@action
async def exit_in_task_group(job: JobContext) -> Results:
    async def task() -> None:
        sys.exit(2)

    async with asyncio.TaskGroup() as group:
        group.create_task(task())
    return Results()


@action
async def exit_in_callback(job: JobContext) -> Results:
    loop = asyncio.get_running_loop()
    loop.call_soon(sys.exit, 2)
    loop.call_later(0.01, sys.exit, 2)
    asyncio.create_task(asyncio.sleep(0)).add_done_callback(lambda task: sys.exit(2))
    await asyncio.to_thread(loop.call_soon_threadsafe, sys.exit, 2)
    await asyncio.sleep(0.1)
    return Results()


@action
async def exit_in_thread(job: JobContext) -> Results:
    thread = threading.Thread(target=sys.exit)
    thread.start()
    thread.join()
    return Results()


@action
async def leave_tasks(job: JobContext) -> Results:
    async def ignore_cancellations() -> None:
        while True:
            try:
                await asyncio.sleep(3600)
            except BaseException:  # noqa: BLE001 - cancellation and SystemExit too
                continue

    async def exit_when_cancelled() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            sys.exit(2)

    async def log_later() -> None:
        await asyncio.sleep(0.2)
        await job.log("error", "logged after the job ended")

    job.tasks = [asyncio.create_task(task()) for task in (ignore_cancellations, exit_when_cancelled, log_later)]  # type: ignore[attr-defined]
    await asyncio.sleep(0.01)
    return Results()


@action
async def ignore_cancellation(job: JobContext) -> Results:
    await job.log("info", "started")
    while True:
        try:
            await asyncio.sleep(3600)
        except BaseException:  # noqa: BLE001 - cancellation and SystemExit too
            continue


def call_outside_containment(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function in a context that is not attributed to the processor."""
    contextvars.Context().run(function, *arguments)


def add_event_loop_action(name: str, function: Callable[[], Any]) -> None:
    async def run(job: JobContext) -> Results:
        function()
        await asyncio.sleep(3600)
        return Results()

    ACTIONS[name] = run


def cancel_all() -> None:
    for task in asyncio.all_tasks():
        task.cancel()


add_event_loop_action("cancel all tasks", cancel_all)

add_event_loop_action("cancel all tasks past containment", lambda: call_outside_containment(cancel_all))

add_event_loop_action("stop the loop", lambda: asyncio.get_running_loop().stop())

add_event_loop_action(
    "stop the loop past containment", lambda: call_outside_containment(asyncio.get_running_loop().stop)
)
