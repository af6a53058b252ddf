"""Code of a processor ends neither the event loop nor the process, whichever way it gets to run there."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import pytest

from jobledger.workers.child.containment import Containment, new_event_loop

HARM: dict[str, Callable[[asyncio.AbstractEventLoop], Any]] = {
    "SystemExit": lambda loop: exit_(SystemExit(3)),
    "KeyboardInterrupt": lambda loop: exit_(KeyboardInterrupt()),
    "stop": lambda loop: loop.stop(),
}


def exit_(error: BaseException) -> NoReturn:
    raise error


async def awaited(harm: Callable[[], Any]) -> None:
    await asyncio.sleep(0)
    harm()


def in_thread(function: Callable[..., Any], *arguments: Any) -> None:
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    thread.join()


def in_executor(function: Callable[..., Any], *arguments: Any) -> None:
    with ThreadPoolExecutor(1) as threads:
        threads.submit(function, *arguments).result()


def in_empty_context(function: Callable[..., Any], *arguments: Any) -> None:
    contextvars.Context().run(function, *arguments)


async def generator(harm: Callable[[], Any]) -> AsyncIterator[int]:
    try:
        yield 1
        yield 2
    finally:
        harm()


async def leave_generator(harm: Callable[[], Any]) -> None:
    async for _ in generator(harm):
        break


async def leave_generator_in_a_cycle(harm: Callable[[], Any]) -> None:
    left = generator(harm)
    await anext(left)
    cycle: list[Any] = [left]
    cycle.append(cycle)


Way = Callable[[asyncio.AbstractEventLoop, Callable[[], Any]], Any]
WAYS: dict[str, Way] = {
    "itself": lambda loop, harm: harm(),
    "callback": lambda loop, harm: loop.call_soon(harm),
    "task": lambda loop, harm: loop.create_task(awaited(harm)),
    "coroutine of a thread": lambda loop, harm: in_thread(asyncio.run_coroutine_threadsafe, awaited(harm), loop),
    "callback of a thread": lambda loop, harm: in_thread(loop.call_soon_threadsafe, harm),
    "callback of an executor": lambda loop, harm: in_executor(loop.call_soon_threadsafe, harm),
    "timer in an empty context": lambda loop, harm: loop.call_later(0, harm, context=contextvars.Context()),
    "callback in an empty context": lambda loop, harm: loop.call_soon(harm, context=contextvars.Context()),
    "task in an empty context": lambda loop, harm: loop.create_task(awaited(harm), context=contextvars.Context()),
    "task made in an empty context": lambda loop, harm: in_empty_context(loop.create_task, awaited(harm)),
    "generator": lambda loop, harm: loop.create_task(leave_generator(harm)),
    "generator in a cycle": lambda loop, harm: loop.create_task(leave_generator_in_a_cycle(harm)),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_event_loop_goes_on_whatever_a_processor_hands_to_it(way: str, harm: str) -> None:
    reached = []

    async def job() -> None:
        loop = asyncio.get_running_loop()

        def do_harm() -> None:
            reached.append(way)
            HARM[harm](loop)

        WAYS[way](loop, do_harm)
        await asyncio.sleep(0.01)

    async def main() -> str:
        containment = Containment()
        await asyncio.wait({containment.start(job(), "job")})
        gc.collect()
        await asyncio.sleep(0.01)
        await containment.stop(1)
        await asyncio.sleep(0.01)
        return "goes on"

    try:
        assert run(main) == "goes on"
    except (SystemExit, KeyboardInterrupt) as error:
        pytest.fail(f"{error!r} has ended the event loop")
    assert reached == [way]


def run(main: Callable[[], Any]) -> Any:
    """Run a coroutine as the worker's process does."""

    def in_context() -> Any:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(main())

    return contextvars.copy_context().run(in_context)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["main", "task"])
def test_program_itself_can_end_the_event_loop(error: type[BaseException], place: str) -> None:
    async def main() -> None:
        await Containment().start(asyncio.sleep(0), "job")
        if place == "task":
            task = asyncio.create_task(awaited(lambda: exit_(error())))
            await task
        raise error

    with pytest.raises(error):
        run(main)


def test_signal_of_a_terminal_ends_the_event_loop() -> None:
    async def main() -> None:
        await Containment().start(asyncio.sleep(0), "job")
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        run(main)


async def test_job_that_is_inline_is_contained_in_another_event_loop_too() -> None:
    """As in tests and in programs that embed a worker: there, only what is known to be a processor's is foreign."""

    async def job() -> None:
        asyncio.get_running_loop().call_soon(exit_, SystemExit(3))
        await asyncio.sleep(0)

    await Containment().start(job(), "job")
