"""The embedded server is started again after every crash, and given up only when no start can work."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from jobledger.cli import embedded_supervisor as supervision
from jobledger.cli.embedded_supervisor import supervise_until_shutdown
from jobledger.cli.shutdown import Shutdown
from jobledger.ledger.domain.errors import DatabaseUnsuitable
from jobledger.ledger.mongo.embedded import EmbeddedServer
from jobledger.ledger.system import disk_space as disk
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.role_runner import poll_until

pytestmark = needs_local_mongod


@pytest.fixture
async def stop() -> AsyncIterator[Shutdown]:
    stop = Shutdown(3600)
    yield stop
    stop.cancel_timeout()


async def test_a_crash_is_answered_by_a_start_while_the_event_loop_goes_on(tmp_path: Path, stop: Shutdown) -> None:
    with EmbeddedServer.start(tmp_path) as server, capture_logs() as logged:
        first = server.pid
        running = asyncio.create_task(supervise_until_shutdown(server, stop))
        os.kill(first, signal.SIGKILL)
        longest, last = 0.0, asyncio.get_running_loop().time()

        def is_back() -> bool:
            nonlocal longest, last
            now = asyncio.get_running_loop().time()
            longest, last = max(longest, now - last), now
            return any("server restarted" in entry["event"] for entry in logged)

        await poll_until(is_back, "the server is back", seconds=30)
        assert longest < 1
        assert server.pid != first
        stop._handle_signal()
        await running


async def test_a_disk_without_space_is_waited_for_and_stop_is_quick(
    tmp_path: Path, stop: Shutdown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "DISK_CHECK_SECONDS", 0.1)
    real = disk.free_bytes
    with EmbeddedServer.start(tmp_path) as server, capture_logs() as logged:
        running = asyncio.create_task(supervise_until_shutdown(server, stop))
        monkeypatch.setattr(disk, "free_bytes", lambda _directory: 1000)
        os.kill(server.pid, signal.SIGKILL)
        await poll_until(
            lambda: any("waiting for its disk" in entry["event"] for entry in logged), "it says so", seconds=30
        )
        await asyncio.sleep(0.5)
        assert [entry["event"] for entry in logged if entry["log_level"] == "error"] == [
            "embedded MongoDB server exited, waiting for its disk"
        ]
        assert "0 MiB are free, 128 MiB are needed" in logged[0]["reason"]
        monkeypatch.setattr(disk, "free_bytes", real)
        await poll_until(
            lambda: any("server restarted" in entry["event"] for entry in logged), "it says so", seconds=30
        )
        monkeypatch.setattr(disk, "free_bytes", lambda _directory: 1000)
        os.kill(server.pid, signal.SIGKILL)
        await asyncio.sleep(0.5)
        stop._handle_signal()
        await asyncio.wait_for(running, 2)


async def test_damaged_data_files_are_given_up_with_the_reason(tmp_path: Path, stop: Shutdown) -> None:
    with EmbeddedServer.start(tmp_path) as server:
        running = asyncio.create_task(supervise_until_shutdown(server, stop))
        os.kill(server.pid, signal.SIGKILL)
        (tmp_path / "mongodb" / "WiredTiger.turtle").write_text("garbage")
        with pytest.raises(DatabaseUnsuitable, match="data files are damaged"):
            await asyncio.wait_for(running, 60)


async def test_other_crashes_are_repeated_with_pauses(
    tmp_path: Path, stop: Shutdown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "_MAX_RESTART_DELAY_SECONDS", 0.1)
    with EmbeddedServer.start(tmp_path) as server, capture_logs() as logged:
        running = asyncio.create_task(supervise_until_shutdown(server, stop))
        with monkeypatch.context() as patch:
            (tmp_path / "bin").mkdir()
            crashing = tmp_path / "bin" / "mongod"
            crashing.write_text("#!/bin/sh\nexit 14\n")
            crashing.chmod(0o755)
            patch.setenv("PATH", f"{crashing.parent}:{os.environ['PATH']}")
            os.kill(server.pid, signal.SIGKILL)
            await poll_until(
                lambda: sum("failed to start" in entry["event"] for entry in logged) >= 4, "it says so", seconds=30
            )
        await poll_until(
            lambda: any("server restarted" in entry["event"] for entry in logged), "it says so", seconds=30
        )
        stop._handle_signal()
        await running
