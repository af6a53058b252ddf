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
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest

from jobledger.workers.child.containment import ContainedWork, Containment, new_event_loop, run_until_waiting

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


class Sequence:
    """Runs coroutines by `run_until_waiting`, and keeps how each of them ended."""

    def __init__(self) -> None:
        self.ended: dict[str, Any] = {}
        self.waiting: dict[str, asyncio.Task[Any]] = {}
        self.containments: list[Containment] = []

    def build_work(self, name: str, coroutine: Coroutine[Any, Any, Any]) -> ContainedWork:
        self.containments.append(containment := Containment())

        def on_end(result: Any, error: BaseException | None) -> None:
            self.ended[name] = error or result

        return ContainedWork(coroutine, containment, on_end, partial(self.waiting.__setitem__, name))

    async def run(self, **coroutines: Coroutine[Any, Any, Any]) -> dict[str, Any]:
        """Run coroutines to their ends, and return their results and exceptions."""
        await run_until_waiting(self.build_work(*item) for item in coroutines.items())
        if self.waiting:
            await asyncio.wait(self.waiting.values())
        results = {
            name: "cancelled" if task.cancelled() else task.exception() or task.result()
            for name, task in self.waiting.items()
        }
        return self.ended | results


async def start_in_task(job: Coroutine[Any, Any, None]) -> Containment:
    containment = Containment()
    await asyncio.wait({containment.start(job, "job")})
    return containment


async def start_in_sequence(job: Coroutine[Any, Any, None]) -> Containment:
    sequence = Sequence()
    await sequence.run(before=asyncio.sleep(0), job=job, after=asyncio.sleep(0))
    return sequence.containments[1]


@pytest.mark.parametrize("start", [start_in_task, start_in_sequence])
@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_event_loop_survives_harmful_code_of_a_processor(route: str, harm: str, start: Any) -> None:
    reached = []

    async def job() -> None:
        loop = asyncio.get_running_loop()

        def do_harm() -> None:
            reached.append(route)
            HARM[harm](loop)

        ROUTES[route](loop, do_harm)
        await asyncio.sleep(0.01)

    async def main() -> str:
        containment = await start(job())
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
from jobledger.workers.child.containment import ContainedWork, Containment, new_event_loop, run_until_waiting
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


# Sequences ------------------------------------------------------------------------------------------------------------


async def get_task() -> asyncio.Task[Any] | None:
    return asyncio.current_task()


async def wait_and_get_task() -> asyncio.Task[Any] | None:
    before = asyncio.current_task()
    await asyncio.sleep(0)
    assert asyncio.current_task() is before
    return before


async def test_coroutines_that_do_not_wait_share_a_task_and_others_have_their_own() -> None:
    tasks = await Sequence().run(
        first=get_task(), second=get_task(), waiting=wait_and_get_task(), third=get_task(), other=wait_and_get_task()
    )
    assert tasks["first"] is tasks["second"] is tasks["waiting"]
    assert tasks["third"] is tasks["other"] is not tasks["first"]


async def test_waiting_coroutine_delays_no_other() -> None:
    released = asyncio.Event()
    sequence = Sequence()
    works = [sequence.build_work("waiting", released.wait()), sequence.build_work("next", get_task())]
    await run_until_waiting(works)
    assert list(sequence.ended) == ["next"]
    released.set()
    await asyncio.wait({sequence.waiting["waiting"]})


async def test_context_variables_of_a_coroutine_are_its_own() -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("caller")

    async def set_variable(value: str, *, wait: bool) -> tuple[str, str]:
        before = variable.get()
        variable.set(value)
        if wait:
            await asyncio.sleep(0)
        return before, variable.get()

    values = await Sequence().run(
        a=set_variable("a", wait=False), b=set_variable("b", wait=True), c=set_variable("c", wait=False)
    )
    assert values == {name: ("caller", name) for name in "abc"}
    assert variable.get() == "caller"


async def test_timeout_and_task_group_belong_to_their_coroutine() -> None:
    async def wait_too_long() -> str:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        except TimeoutError:
            return "timeout"
        return "no timeout"

    async def fail_in_group() -> str:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(raise_later())
                await asyncio.sleep(60)
        except ExceptionGroup:
            return "group failed"
        return "group did not fail"

    async def raise_later() -> NoReturn:
        await asyncio.sleep(0)
        raise ValueError

    results = await Sequence().run(timeout=wait_too_long(), plain=get_task(), group=fail_in_group())
    assert (results["timeout"], results["group"]) == ("timeout", "group failed")


async def cancel_own_task(*, wait: bool) -> str:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    if wait:
        await asyncio.sleep(0)
    return "not cancelled"


async def test_coroutine_that_cancels_its_own_task_cancels_no_other() -> None:
    sequence = Sequence()
    results = await sequence.run(
        before=get_task(),
        now=cancel_own_task(wait=False),
        middle=wait_and_get_task(),
        later=cancel_own_task(wait=True),
        after=wait_and_get_task(),
    )
    assert (results["now"], results["later"]) == (None, "cancelled")
    assert all(isinstance(results[name], asyncio.Task) for name in ("before", "middle", "after"))


def test_coroutine_that_cancels_all_tasks_stops_no_sequence() -> None:
    async def cancel_all() -> None:
        time.sleep(0.01)  # noqa: ASYNC251 - the sequence lets other tasks run after this
        asyncio.get_running_loop().call_soon(lambda: [task.cancel() for task in asyncio.all_tasks()])

    async def main() -> dict[str, Any]:
        return await Sequence().run(harmful=cancel_all(), after=get_task(), last=wait_and_get_task())

    assert set(run(main)) == {"harmful", "after", "last"}


@pytest.mark.parametrize("error", [ValueError(), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
async def test_exception_of_a_coroutine_is_its_outcome(error: BaseException) -> None:
    async def fail() -> None:
        raise_error(error)

    results = await Sequence().run(before=get_task(), failing=fail(), after=get_task())
    assert results["failing"] is error
    assert isinstance(results["after"], asyncio.Task)


async def test_long_sequence_lets_other_tasks_run() -> None:
    async def block() -> None:
        time.sleep(0.01)  # noqa: ASYNC251 - a processor that blocks

    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    await Sequence().run(**{f"job{number}": block() for number in range(10)})
    counting.cancel()
    assert turns >= 10


async def test_error_of_the_program_itself_reaches_the_caller() -> None:
    def iterate_works() -> Iterator[ContainedWork]:
        yield Sequence().build_work("first", get_task())
        raise LookupError("a bug")

    with pytest.raises(LookupError, match="a bug"):
        await run_until_waiting(iterate_works())


async def test_cancelled_caller_starts_no_more_coroutines() -> None:
    started = []

    async def block(number: int) -> None:
        started.append(number)
        time.sleep(0.01)  # noqa: ASYNC251 - so that the caller can be cancelled between two of them

    sequence = Sequence()
    running = asyncio.create_task(run_until_waiting(sequence.build_work(str(n), block(n)) for n in range(100)))
    await asyncio.sleep(0.02)
    running.cancel()
    await asyncio.wait({running})
    count = len(started)
    await asyncio.sleep(0.03)
    assert 0 < len(started) == count < 100


async def test_task_that_a_coroutine_has_kept_cancels_no_later_coroutine() -> None:
    async def cancel_later() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(0.01, task.cancel)

    async def wait() -> str:
        await asyncio.sleep(0.05)
        return "not cancelled"

    results = await Sequence().run(first=cancel_later(), waiting=wait())
    assert results["waiting"] == "not cancelled"


def test_thread_of_a_coroutine_cancels_no_later_coroutine() -> None:
    async def cancel_in_thread() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        run_in_thread(loop.call_soon_threadsafe, task.cancel)

    async def main() -> dict[str, Any]:
        return await Sequence().run(first=cancel_in_thread(), waiting=wait_and_get_task())

    assert run(main)["waiting"] != "cancelled"


async def test_done_callback_is_called_at_the_end_of_its_coroutine() -> None:
    called: list[str] = []

    async def add_callback(name: str, *, wait: bool) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: called.append(name))
        if wait:
            await asyncio.sleep(0.02)

    running = asyncio.create_task(
        Sequence().run(first=add_callback("first", wait=False), second=add_callback("second", wait=True))
    )
    await asyncio.sleep(0.01)
    assert called == ["first"]
    await running
    await asyncio.sleep(0)
    assert called == ["first", "second"]


async def test_waiting_coroutine_can_be_cancelled_from_outside() -> None:
    sequence = Sequence()
    await run_until_waiting([sequence.build_work("a", get_task()), sequence.build_work("b", asyncio.sleep(60))])
    sequence.waiting["b"].cancel()
    await asyncio.wait(sequence.waiting.values())
    assert sequence.waiting["b"].cancelled()


@pytest.mark.parametrize("way", ["await", "gather", "wait_for"])
async def test_stop_of_a_containment_whose_tasks_wait_for_a_shared_task_cancels_no_later_coroutine(way: str) -> None:
    async def leave_child() -> None:
        parent = asyncio.current_task()
        assert parent is not None

        async def wait_for_parent() -> None:
            if way == "await":
                await parent
            elif way == "gather":
                await asyncio.gather(parent)
            else:
                await asyncio.wait_for(parent, 60)

        asyncio.get_running_loop().create_task(wait_for_parent())

    async def wait() -> str:
        await asyncio.sleep(0.1)
        return "not cancelled"

    sequence = Sequence()
    running = asyncio.create_task(sequence.run(first=leave_child(), waiting=wait()))
    await asyncio.sleep(0.02)
    await sequence.containments[0].stop(0.01)
    assert (await running)["waiting"] == "not cancelled"


def test_executor_thread_of_a_coroutine_cancels_its_own_coroutine_only() -> None:
    async def cancel_in_executor(task: asyncio.Task[Any] | None) -> str:
        loop, own = asyncio.get_running_loop(), asyncio.current_task()
        target = task or own
        assert target is not None
        await loop.run_in_executor(None, partial(loop.call_soon_threadsafe, target.cancel))
        await asyncio.sleep(0.05)
        return "not cancelled"

    async def main() -> dict[str, Any]:
        sequence = Sequence()
        own = sequence.build_work("own", cancel_in_executor(None))
        await run_until_waiting([sequence.build_work("first", get_task()), own])
        await run_until_waiting([sequence.build_work("other", cancel_in_executor(sequence.waiting["own"]))])
        await asyncio.wait(sequence.waiting.values())
        return {name: task.cancelled() for name, task in sequence.waiting.items()}

    assert run(main) == {"own": True, "other": False}
