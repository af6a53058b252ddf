"""The embedded server is restarted after each crash. The restarts end only if no start can succeed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from jobledger.cli.hosting import embedded_restarts
from jobledger.cli.hosting.embedded_restarts import restart_until_shutdown
from jobledger.cli.hosting.shutdown import Shutdown
from jobledger.ledger.domain.errors import DatabaseUnsuitable
from jobledger.ledger.mongo.embedded import EmbeddedServer
from jobledger.ledger.system import disk_space
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS, poll_until

pytestmark = needs_local_mongod


@pytest.fixture
async def shutdown() -> AsyncIterator[Shutdown]:
    shutdown = Shutdown(3600)
    yield shutdown
    shutdown.cancel_timeout()


def count_entries(entries: Sequence[Mapping[str, Any]], text: str) -> int:
    """Count the log entries that contain a text."""
    return sum(text in entry["event"] for entry in entries)


async def test_crashed_server_is_restarted_without_blocking_the_event_loop(tmp_path: Path, shutdown: Shutdown) -> None:
    with EmbeddedServer.start(tmp_path) as server, capture_logs() as log_entries:
        first = server.pid
        running = asyncio.create_task(restart_until_shutdown(server, shutdown))
        os.kill(first, signal.SIGKILL)
        killed_at = asyncio.get_running_loop().time()
        longest_pause, last = 0.0, killed_at

        def is_restarted() -> bool:
            nonlocal longest_pause, last
            now = asyncio.get_running_loop().time()
            longest_pause, last = max(longest_pause, now - last), now
            return count_entries(log_entries, "server restarted") > 0

        await poll_until(is_restarted, "the server is restarted")
        assert longest_pause < max(1, (last - killed_at) / 2)
        assert server.pid != first
        shutdown._handle_signal()
        await running


async def test_full_disk_is_logged_once_and_waited_for_until_shutdown(
    tmp_path: Path, shutdown: Shutdown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_restarts, "DISK_CHECK_SECONDS", 0.1)
    free_bytes, checks = disk_space.read_free_bytes, 0

    def report_full_disk(_directory: Path) -> int:
        nonlocal checks
        checks += 1
        return 1000

    with EmbeddedServer.start(tmp_path) as server, capture_logs() as log_entries:
        running = asyncio.create_task(restart_until_shutdown(server, shutdown))
        monkeypatch.setattr(disk_space, "read_free_bytes", report_full_disk)
        os.kill(server.pid, signal.SIGKILL)
        await poll_until(lambda: count_entries(log_entries, "waiting for its disk") == 1, "it is logged")
        checks = 0
        await poll_until(lambda: checks >= 5, "the disk is checked repeatedly")
        assert [entry["event"] for entry in log_entries if entry["log_level"] == "error"] == [
            "embedded MongoDB server exited, waiting for its disk"
        ]
        assert "0 MiB are free, 128 MiB are needed" in log_entries[0]["reason"]
        monkeypatch.setattr(disk_space, "read_free_bytes", free_bytes)
        await poll_until(lambda: count_entries(log_entries, "server restarted") == 1, "the server runs")
        monkeypatch.setattr(disk_space, "read_free_bytes", report_full_disk)
        monkeypatch.setattr(embedded_restarts, "DISK_CHECK_SECONDS", 3600)
        os.kill(server.pid, signal.SIGKILL)
        await poll_until(lambda: count_entries(log_entries, "waiting for its disk") == 2, "it is logged")
        shutdown._handle_signal()
        await asyncio.wait_for(running, DEADLINE_SECONDS)


async def test_damaged_data_files_end_the_restarts_with_the_reason(tmp_path: Path, shutdown: Shutdown) -> None:
    with EmbeddedServer.start(tmp_path) as server:
        running = asyncio.create_task(restart_until_shutdown(server, shutdown))
        os.kill(server.pid, signal.SIGKILL)
        (tmp_path / "mongodb" / "WiredTiger.turtle").write_text("garbage")
        with pytest.raises(DatabaseUnsuitable, match="data files are damaged"):
            await asyncio.wait_for(running, DEADLINE_SECONDS)


async def test_failed_restarts_are_repeated_with_delays(
    tmp_path: Path, shutdown: Shutdown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_restarts, "_MAX_RESTART_DELAY_SECONDS", 0.1)
    with EmbeddedServer.start(tmp_path) as server, capture_logs() as log_entries:
        running = asyncio.create_task(restart_until_shutdown(server, shutdown))
        with monkeypatch.context() as patch:
            (tmp_path / "bin").mkdir()
            crashing_mongod = tmp_path / "bin" / "mongod"
            crashing_mongod.write_text("#!/bin/sh\nexit 14\n")
            crashing_mongod.chmod(0o755)
            patch.setenv("PATH", f"{crashing_mongod.parent}:{os.environ['PATH']}")
            os.kill(server.pid, signal.SIGKILL)
            await poll_until(lambda: count_entries(log_entries, "failed to start") >= 4, "4 attempts")
        await poll_until(lambda: count_entries(log_entries, "server restarted") == 1, "the server runs")
        shutdown._handle_signal()
        await running
