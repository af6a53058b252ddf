"""Tests of containment: code of a processor ends neither the event loop nor the process, however it is scheduled."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest

from jobledger.workers.child.containment import Containment, new_event_loop

HARM: dict[str, Callable[[asyncio.AbstractEventLoop], Any]] = {
    "SystemExit": lambda loop: raise_error(SystemExit(3)),
    "KeyboardInterrupt": lambda loop: raise_error(KeyboardInterrupt()),
    "stop": lambda loop: loop.stop(),
}


def raise_error(error: BaseException) -> NoReturn:
    raise error


async def run_later(harm: Callable[[], Any]) -> None:
    await asyncio.sleep(0)
    harm()


def run_in_thread(function: Callable[..., Any], *arguments: Any) -> None:
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    thread.join()


def run_in_executor(function: Callable[..., Any], *arguments: Any) -> None:
    with ThreadPoolExecutor(1) as threads:
        threads.submit(function, *arguments).result()


def run_in_empty_context(function: Callable[..., Any], *arguments: Any) -> None:
    contextvars.Context().run(function, *arguments)


async def iterate(harm: Callable[[], Any]) -> AsyncIterator[int]:
    try:
        yield 1
        yield 2
    finally:
        harm()


async def leave_generator(harm: Callable[[], Any]) -> None:
    async for _ in iterate(harm):
        break


async def leave_generator_in_a_cycle(harm: Callable[[], Any]) -> None:
    iterator = iterate(harm)
    await anext(iterator)
    cycle: list[Any] = [iterator]
    cycle.append(cycle)


Route = Callable[[asyncio.AbstractEventLoop, Callable[[], Any]], Any]
ROUTES: dict[str, Route] = {
    "job itself": lambda loop, harm: harm(),
    "callback": lambda loop, harm: loop.call_soon(harm),
    "task": lambda loop, harm: loop.create_task(run_later(harm)),
    "coroutine of a thread": lambda loop, harm: run_in_thread(asyncio.run_coroutine_threadsafe, run_later(harm), loop),
    "callback of a thread": lambda loop, harm: run_in_thread(loop.call_soon_threadsafe, harm),
    "callback of an executor": lambda loop, harm: run_in_executor(loop.call_soon_threadsafe, harm),
    "timer in an empty context": lambda loop, harm: loop.call_later(0, harm, context=contextvars.Context()),
    "callback in an empty context": lambda loop, harm: loop.call_soon(harm, context=contextvars.Context()),
    "task in an empty context": lambda loop, harm: loop.create_task(run_later(harm), context=contextvars.Context()),
    "task made in an empty context": lambda loop, harm: run_in_empty_context(loop.create_task, run_later(harm)),
    "generator": lambda loop, harm: loop.create_task(leave_generator(harm)),
    "generator in a cycle": lambda loop, harm: loop.create_task(leave_generator_in_a_cycle(harm)),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_event_loop_survives_harmful_code_of_a_processor(route: str, harm: str) -> None:
    reached = []

    async def job() -> None:
        loop = asyncio.get_running_loop()

        def do_harm() -> None:
            reached.append(route)
            HARM[harm](loop)

        ROUTES[route](loop, do_harm)
        await asyncio.sleep(0.01)

    async def main() -> str:
        containment = Containment()
        await asyncio.wait({containment.start(job(), "job")})
        gc.collect()
        await asyncio.sleep(0.01)
        await containment.stop(1)
        await asyncio.sleep(0.01)
        return "survived"

    try:
        assert run(main) == "survived"
    except (SystemExit, KeyboardInterrupt) as error:
        pytest.fail(f"{error!r} has ended the event loop")
    assert reached == [route]


def run(main: Callable[[], Any]) -> Any:
    """Run a coroutine as a worker process does."""

    def in_context() -> Any:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(main())

    return contextvars.copy_context().run(in_context)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["main", "task"])
def test_own_code_of_the_program_can_end_the_event_loop(error: type[BaseException], place: str) -> None:
    async def main() -> None:
        await Containment().start(asyncio.sleep(0), "job")
        if place == "task":
            task = asyncio.create_task(run_later(lambda: raise_error(error())))
            await task
        raise error

    with pytest.raises(error):
        run(main)


def test_sigint_ends_the_event_loop() -> None:
    async def main() -> None:
        await Containment().start(asyncio.sleep(0), "job")
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(10)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            run(main)
    finally:
        signal.signal(signal.SIGINT, previous)


UNCLOSABLE = """
import asyncio

async def ignore_everything():
    while True:
        try:
            await asyncio.sleep(3600)
        except BaseException:
            continue
"""
ABANDON = """
import asyncio, ctypes
from jobledger.workers.child import containment as own
from jobledger.workers.child.containment import Containment, new_event_loop
import unclosable

for module in (own, unclosable):  # as if an extension module kept them until the end of the interpreter
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))

async def main():
    containment = Containment()
    containment.start(unclosable.ignore_everything(), "job")
    await asyncio.sleep(0)
    await containment.stop(0)

with asyncio.Runner(loop_factory=new_event_loop) as runner:
    runner.run(main())
print("done", flush=True)
"""


def test_process_exits_after_it_abandoned_an_unclosable_coroutine(tmp_path: Path) -> None:
    """At exit, the globals of the coroutine's module are gone. If Python closed it then, it would loop forever."""
    (tmp_path / "unclosable.py").write_text(UNCLOSABLE)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", ABANDON], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, "done"), ended.stderr


async def test_inline_job_is_contained_in_third_party_event_loop() -> None:
    """In tests and in programs that embed a worker, only code that is known to be a processor's is contained."""

    async def job() -> None:
        asyncio.get_running_loop().call_soon(raise_error, SystemExit(3))
        await asyncio.sleep(0)

    await Containment().start(job(), "job")
