"""Turns: one host is fetched from by so many at a time, whoever they are, and whoever dies gives its turn back."""

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

from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.host_limits import acquire_host_slot, host_lock_directory
from tests.processors.session.fixtures import Site, html, make_settings

DEADLINE_SECONDS = 10.0
HOLDER = """
import asyncio, sys
from pathlib import Path
from jobledger.workers.processors.session.host_limits import acquire_host_slot

async def main():
    async with acquire_host_slot("a.example", 1, Path(sys.argv[1])):
        print("holding", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_so_many_have_a_turn_at_a_host_and_all_get_one(tmp_path: Path) -> None:
    now: Counter[str] = Counter()
    most: Counter[str] = Counter()

    async def visit(host: str) -> None:
        async with acquire_host_slot(host, 2, tmp_path / "locks"):
            now[host] += 1
            most[host] = max(most[host], now[host])
            await asyncio.sleep(0.01)
            now[host] -= 1

    async with asyncio.timeout(DEADLINE_SECONDS):
        await asyncio.gather(*(visit(f"{name}.example") for name in "ab" for _ in range(8)))
    assert most == {"a.example": 2, "b.example": 2}


def names_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


async def test_any_number_of_hosts_shares_one_file(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_SECONDS):
        for number in range(200):
            await stack.enter_async_context(acquire_host_slot(f"{number}.example", 1, tmp_path))
    assert names_in(tmp_path) == ["host-slots.lock"]


def nothing(_place: Path) -> None:
    """Leave it out."""


def foreign_directory(place: Path) -> None:
    place.mkdir()
    os.chown(place, 65534, -1)
    place.chmod(0o777)


def foreign_private_directory(place: Path) -> None:
    foreign_directory(place)
    place.chmod(0o700)


def link_to_directory(place: Path) -> None:
    place.symlink_to(place.parent / "strangers")


def file(place: Path) -> None:
    place.write_text("in the way")


@pytest.mark.parametrize(
    "planted",
    [nothing, foreign_directory, foreign_private_directory, link_to_directory, file],
    ids=lambda it: it.__name__,
)
def test_turns_are_kept_in_a_directory_of_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: Callable[[Path], None]
) -> None:
    """Any user of the machine may create what they like in the system's temporary directory."""
    if os.getuid() != 0 and "foreign" in planted.__name__:
        pytest.skip("only root can give a directory to another user")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "strangers").mkdir(mode=0o777)
    planted(tmp_path / f"jobledger-host-locks-{os.getuid()}")
    found = {host_lock_directory.__wrapped__() for _ in range(2)}
    assert len(found) == 1, "all workers of the machine find the same"
    [directory] = found
    assert (directory.parent, directory.is_symlink()) == (tmp_path, False)
    assert (directory.stat().st_uid, directory.stat().st_mode & 0o777) == (os.getuid(), 0o700)
    assert list((tmp_path / "strangers").iterdir()) == []


def link_to_foreign_file(place: Path) -> None:
    place.symlink_to(place.parent / "foreign")


def directory(place: Path) -> None:
    place.mkdir()


def fifo(place: Path) -> None:
    os.mkfifo(place)


@pytest.mark.parametrize("planted", [link_to_foreign_file, directory, fifo])
async def test_turn_is_had_whatever_another_job_has_put_in_the_place_of_the_file(
    tmp_path: Path, planted: Callable[[Path], None]
) -> None:
    planted(tmp_path / "locks")
    async with asyncio.timeout(DEADLINE_SECONDS), acquire_host_slot("a.example", 1, tmp_path):
        assert not (tmp_path / "foreign").exists()


async def test_a_process_that_is_killed_gives_its_turn_back(tmp_path: Path) -> None:
    holder = await asyncio.create_subprocess_exec(sys.executable, "-c", HOLDER, str(tmp_path), stdout=PIPE)
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"holding\n"

    async def wait() -> None:
        async with acquire_host_slot("a.example", 1, tmp_path):
            pass

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0.3)
    assert not waiting.done()
    holder.kill()
    async with asyncio.timeout(DEADLINE_SECONDS):
        await waiting
        await holder.wait()


async def test_who_waits_for_a_turn_loses_no_time_and_gives_up_when_cancelled(site: Site, tmp_path: Path) -> None:
    url = site.put("/page", html("<p>hello</p>"))
    fetcher = Fetcher(make_settings(max_fetches_per_host=1), lock_directory=tmp_path)
    async with acquire_host_slot(f"127.0.0.1:{site.port}", 1, tmp_path):
        fetching = asyncio.create_task(fetcher.fetch(url, max_bytes=1000, timeout_seconds=0.5))
        impatient = asyncio.create_task(fetcher.fetch(url, max_bytes=1000, timeout_seconds=0.5))
        await asyncio.sleep(1)
        assert site.requested_paths == []
        impatient.cancel()
        await asyncio.wait({impatient})
        assert impatient.cancelled()
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert b"hello" in (await fetching).body
    assert site.requested_paths == ["/page"]
