"""Shutdown has a time limit, whatever its cause."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from jobledger.cli import runtime
from jobledger.cli.hosting import embedded_restarts, shutdown
from jobledger.cli.hosting.shutdown import Shutdown
from jobledger.cli.settings import Settings
from jobledger.ledger.domain.errors import ConfigurationError, DatabaseUnsuitable
from tests.support.polling import DEADLINE_SECONDS


@pytest.mark.parametrize("phase", ["start", "run", "stop"])
async def test_shutdown_of_hanging_roles_is_limited_at_any_phase(monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    time_limit_reached = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def start(stack: AsyncExitStack, *_: Any) -> Any:
        stack.push_async_callback(asyncio.wait_for, time_limit_reached.wait(), 60)  # as if the database did not answer
        if phase == "start":
            raise ConfigurationError("cannot start")
        return SimpleNamespace(url=None)

    async def run(_server: object, stop: Shutdown) -> None:
        if phase == "run":
            raise DatabaseUnsuitable("cannot run again")
        stop._handle_signal()

    monkeypatch.setattr(runtime, "_start_with_retries", start)
    monkeypatch.setattr(embedded_restarts, "restart_until_shutdown", run)
    monkeypatch.setattr(shutdown, "compute_shutdown_timeout", lambda *_: 0.05)
    monkeypatch.setattr(Shutdown, "_exit_after_timeout", lambda *_: loop.call_soon_threadsafe(time_limit_reached.set))
    run_task = runtime._run(Settings(), "", None, frozenset({"worker"}))
    if phase == "stop":
        await run_task
    else:
        with pytest.raises((ConfigurationError, DatabaseUnsuitable)):
            await run_task
    assert time_limit_reached.is_set()


@pytest.mark.parametrize(
    "request_stop",
    [Shutdown._handle_signal, lambda stop: stop.request_after_failure(RuntimeError()), Shutdown.request],
    ids=["signal", "failure", "request"],
)
async def test_shutdown_without_new_threads_is_requested(monkeypatch: pytest.MonkeyPatch, request_stop: Any) -> None:
    def raise_no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", raise_no_thread)
    stop = Shutdown(60)
    request_stop(stop)
    await asyncio.wait_for(stop.wait(), DEADLINE_SECONDS)
