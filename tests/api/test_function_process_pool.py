"""Test that a limited function has bounded cost for its caller, and that the next call gets a working process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from jobledger.api.processes.function_process_pool import (
    CallFailed,
    CallTimeout,
    FunctionProcessPool,
    ProcessEnded,
    ProcessPoolBusy,
)

FUNCTION = """
import os, re

def act(action):
    return {
        "echo": lambda: action,
        "print": lambda: print("noise"),
        "loop": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
        "memory": lambda: bytearray(1 << 32),
        "raise": lambda: 1 / 0,
        "real-time priority": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
        "exit": lambda: os._exit(7),
        "large": lambda: "x" * 100_000_000,
        "not JSON": lambda: os.write(results(), (4).to_bytes(8, "big") + b"nope"),
        "endless": lambda: os.write(results(), (1 << 62).to_bytes(8, "big")),
    }[action]()

def results():
    "Return the descriptor to which results are written. Foreign code can find it."
    descriptors = [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]
    return next(fd for fd in descriptors if os.path.exists(f"/proc/self/fd/{fd}") and is_writable_pipe(fd))

def is_writable_pipe(descriptor):
    is_pipe = os.readlink(f"/proc/self/fd/{descriptor}").startswith(("pipe:", "socket:"))
    with open(f"/proc/self/fdinfo/{descriptor}") as info:
        return is_pipe and "flags:\\t01" in info.read()
"""


@pytest.fixture
async def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FunctionProcessPool]:
    (tmp_path / "misbehaving_function.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(str(tmp_path))
    function = FunctionProcessPool("misbehaving_function:act", processes=1, queue_seconds=30)
    yield function
    await function.close()


async def call(function: FunctionProcessPool, action: str, seconds: float = 60) -> Any:
    return await function.call(json.dumps(action).encode(), seconds)


@pytest.mark.parametrize(
    ("action", "seconds", "error"),
    [
        ("loop", 0.2, CallTimeout),
        ("memory", 60, ProcessEnded),
        ("raise", 60, ProcessEnded),
        ("real-time priority", 60, ProcessEnded),  # PermissionError
        ("exit", 60, ProcessEnded),
        ("large", 60, ProcessEnded),
        ("not JSON", 60, ProcessEnded),
        ("endless", 60, ProcessEnded),
    ],
)
async def test_call_that_fails_raises_and_leaves_the_next_call_unaffected(
    function: FunctionProcessPool, action: str, seconds: float, error: type[CallFailed]
) -> None:
    with pytest.raises(error) as failure:
        await call(function, action, seconds)
    assert action != "exit" or "exit code 7" in str(failure.value)
    assert await call(function, "print") is None
    assert await call(function, "echo") == "echo"


async def test_cancelled_call_leaves_the_next_call_unaffected(function: FunctionProcessPool) -> None:
    assert await call(function, "echo") == "echo"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await call(function, "loop")
    assert await call(function, "print") is None


async def test_call_without_a_free_process_raises() -> None:
    function = FunctionProcessPool("json:dumps", processes=1, queue_seconds=0)
    outcomes = await asyncio.gather(*(call(function, "echo") for _ in range(3)), return_exceptions=True)
    assert outcomes[0] == '"echo"'
    assert [type(outcome) for outcome in outcomes[1:]] == [ProcessPoolBusy, ProcessPoolBusy]
    await function.close()


async def test_function_that_cannot_be_imported_raises() -> None:
    function = FunctionProcessPool("no_such_module:function", processes=1, queue_seconds=1)
    with pytest.raises(ProcessPoolBusy, match="did not start"):
        await call(function, "echo")
