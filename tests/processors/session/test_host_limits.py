"""Slots of hosts: their number is limited across processes, and a killed process releases its slots."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from jobledger.workers.processors.session import host_limits
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.host_limits import acquire_host_slot, get_host_lock_directory
from tests.processors.session.fixtures import Site, html, make_settings
from tests.support.event_loop_clock import advance_clock
from tests.support.polling import DEADLINE_SECONDS, poll_until

HOLDER = """
import asyncio, sys
from pathlib import Path
from jobledger.workers.processors.session.host_limits import acquire_host_slot

async def main():
    async with acquire_host_slot("a.example", 1, Path(sys.argv[1])):
        print("holding", flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""


async def test_slots_of_a_host_are_limited_and_all_waiters_get_one(tmp_path: Path) -> None:
    active: Counter[str] = Counter()
    peak: Counter[str] = Counter()

    async def hold_slot(host: str) -> None:
        async with acquire_host_slot(host, 2, tmp_path / "locks"):
            active[host] += 1
            peak[host] = max(peak[host], active[host])
            await asyncio.sleep(0.01)
            active[host] -= 1

    async with asyncio.timeout(DEADLINE_SECONDS):
        await asyncio.gather(*(hold_slot(f"{name}.example") for name in "ab" for _ in range(8)))
    assert peak == {"a.example": 2, "b.example": 2}


def list_names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


async def test_all_hosts_share_one_lock_file(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_SECONDS):
        for number in range(200):
            await stack.enter_async_context(acquire_host_slot(f"{number}.example", 1, tmp_path))
    assert list_names(tmp_path) == ["host-slots.lock"]


def create_nothing(_path: Path) -> None:
    """Create nothing."""


def create_foreign_directory(path: Path) -> None:
    path.mkdir()
    os.chown(path, 65534, -1)
    path.chmod(0o777)


def create_foreign_private_directory(path: Path) -> None:
    create_foreign_directory(path)
    path.chmod(0o700)


def create_link_to_directory(path: Path) -> None:
    path.symlink_to(path.parent / "foreign-directory")


def create_file(path: Path) -> None:
    path.write_text("not a directory")


@pytest.mark.parametrize(
    "create",
    [create_nothing, create_foreign_directory, create_foreign_private_directory, create_link_to_directory, create_file],
    ids=lambda create: create.__name__,
)
def test_get_host_lock_directory_belongs_to_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, create: Callable[[Path], None]
) -> None:
    """Any user of the machine can create files in the system's temporary directory."""
    if os.getuid() != 0 and "foreign" in create.__name__:
        pytest.skip("needs root to change the owner of a directory: sudo make test")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "foreign-directory").mkdir(mode=0o777)
    create(tmp_path / f"jobledger-host-locks-{os.getuid()}")
    directories = {get_host_lock_directory.__wrapped__() for _ in range(2)}
    assert len(directories) == 1, "all workers of the machine must use the same directory"
    [lock_directory] = directories
    assert (lock_directory.parent, lock_directory.is_symlink()) == (tmp_path, False)
    assert (lock_directory.stat().st_uid, lock_directory.stat().st_mode & 0o777) == (os.getuid(), 0o700)
    assert list((tmp_path / "foreign-directory").iterdir()) == []


def create_link_to_foreign_file(path: Path) -> None:
    path.symlink_to(path.parent / "foreign")


def create_directory(path: Path) -> None:
    path.mkdir()


def create_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    "create", [create_link_to_foreign_file, create_directory, create_fifo], ids=lambda create: create.__name__
)
async def test_slot_is_acquired_if_lock_file_was_replaced(tmp_path: Path, create: Callable[[Path], None]) -> None:
    create(tmp_path / host_limits._FILE_NAME)
    async with asyncio.timeout(DEADLINE_SECONDS), acquire_host_slot("a.example", 1, tmp_path):
        assert not (tmp_path / "foreign").exists()


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of the lock file that could not be locked, in the order of the attempts."""
    refused: list[int] = []

    def try_lock(descriptor: int, byte: int) -> bool:
        is_locked = real_try_lock(descriptor, byte)
        if not is_locked:
            refused.append(byte)
        return is_locked

    real_try_lock = host_limits._try_lock
    monkeypatch.setattr(host_limits, "_try_lock", try_lock)
    return refused


async def wait_for_polls(refusals: list[int], count: int) -> None:
    await poll_until(lambda: len(refusals) >= count)


async def test_killed_process_releases_its_slot(tmp_path: Path, refusals: list[int]) -> None:
    holder = await asyncio.create_subprocess_exec(sys.executable, "-c", HOLDER, str(tmp_path), stdout=PIPE)
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"holding\n"

    async def acquire() -> None:
        async with acquire_host_slot("a.example", 1, tmp_path):
            pass

    acquiring = asyncio.create_task(acquire())
    try:
        await wait_for_polls(refusals, 3)
        assert not acquiring.done()
    finally:
        holder.kill()
    async with asyncio.timeout(DEADLINE_SECONDS):
        await acquiring
        await holder.wait()


async def test_fetch_timeout_is_paused_while_waiting_for_a_slot(
    site: Site, tmp_path: Path, refusals: list[int]
) -> None:
    url = site.put("/page", html("<p>hello</p>"))
    fetcher = Fetcher(make_settings(max_fetches_per_host=1), lock_directory=tmp_path)
    async with acquire_host_slot(f"127.0.0.1:{site.port}", 1, tmp_path):
        fetching = asyncio.create_task(fetcher.fetch(url, max_bytes=1000, timeout_seconds=60))
        cancelled = asyncio.create_task(fetcher.fetch(url, max_bytes=1000, timeout_seconds=60))
        await wait_for_polls(refusals, 2)
        advance_clock(1000)
        await wait_for_polls(refusals, len(refusals) + 4)
        assert site.requested_paths == []
        assert not fetching.done()
        cancelled.cancel()
        await asyncio.wait({cancelled})
        assert cancelled.cancelled()
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert b"hello" in (await fetching).body
    assert site.requested_paths == ["/page"]
