"""Every end of a process is limited in time, whatever made it end."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from jobledger.cli import embedded_supervisor as supervision
from jobledger.cli import runtime as running
from jobledger.cli import shutdown
from jobledger.cli.settings import Settings
from jobledger.cli.shutdown import Shutdown
from jobledger.ledger.domain.errors import ConfigurationError, DatabaseUnsuitable


@pytest.mark.parametrize("where", ["start", "run", "stop"])
async def test_roles_that_do_not_end_are_limited_whatever_made_them_end(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    limited = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def start(stack: AsyncExitStack, *_: Any) -> Any:
        stack.push_async_callback(asyncio.wait_for, limited.wait(), 5)  # as long as the database does not answer
        if where == "start":
            raise ConfigurationError("cannot start")
        return SimpleNamespace(url=None)

    async def run(_server: object, stop: Shutdown) -> None:
        if where == "run":
            raise DatabaseUnsuitable("cannot run again")
        stop._handle_signal()

    monkeypatch.setattr(running, "_start_with_retries", start)
    monkeypatch.setattr(supervision, "supervise_until_shutdown", run)
    monkeypatch.setattr(shutdown, "shutdown_timeout", lambda *_: 0.05)
    monkeypatch.setattr(Shutdown, "_exit_after_timeout", lambda *_: loop.call_soon_threadsafe(limited.set))
    serving = running._run(Settings(), "", None, frozenset({"worker"}))
    if where == "stop":
        await serving
    else:
        with pytest.raises((ConfigurationError, DatabaseUnsuitable)):
            await serving
    assert limited.is_set()


@pytest.mark.parametrize(
    "end", [Shutdown._handle_signal, lambda stop: stop.request_after_failure(RuntimeError()), Shutdown.request]
)
async def test_stop_needs_no_thread(monkeypatch: pytest.MonkeyPatch, end: Any) -> None:
    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    stop = Shutdown(60)
    end(stop)
    assert stop.is_requested
