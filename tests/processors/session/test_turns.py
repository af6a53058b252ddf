"""Turns: one host is fetched from by so many at a time, whoever they are, and whoever dies gives its turn back."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections import Counter
from pathlib import Path

from tests.processors.session.support import Site, html, settings
from workers.processors.session.fetch import Fetcher
from workers.processors.session.turns import turn

DEADLINE_SECONDS = 10.0
HOLDER = """
import asyncio, sys
from pathlib import Path
from workers.processors.session.turns import turn

async def main():
    async with turn("a.example", 1, Path(sys.argv[1])):
        print("holding", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_so_many_have_a_turn_at_a_host_and_all_get_one(tmp_path: Path) -> None:
    now: Counter[str] = Counter()
    most: Counter[str] = Counter()

    async def visit(host: str) -> None:
        async with turn(host, 2, tmp_path / "turns"):
            now[host] += 1
            most[host] = max(most[host], now[host])
            await asyncio.sleep(0.01)
            now[host] -= 1

    async with asyncio.timeout(DEADLINE_SECONDS):
        await asyncio.gather(*(visit(f"{name}.example") for name in "ab" for _ in range(8)))
    assert most == {"a.example": 2, "b.example": 2}


async def test_a_process_that_is_killed_gives_its_turn_back(tmp_path: Path) -> None:
    holder = await asyncio.create_subprocess_exec(sys.executable, "-c", HOLDER, str(tmp_path), stdout=PIPE)
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"holding\n"

    async def wait() -> None:
        async with turn("a.example", 1, tmp_path):
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
    fetcher = Fetcher(settings(max_fetches_per_host=1), turns=tmp_path)
    async with turn(f"127.0.0.1:{site.port}", 1, tmp_path):
        fetching = asyncio.create_task(fetcher.fetch(url, max_bytes=1000, total_seconds=0.5))
        impatient = asyncio.create_task(fetcher.fetch(url, max_bytes=1000, total_seconds=0.5))
        await asyncio.sleep(1)
        assert site.asked == []
        impatient.cancel()
        await asyncio.wait({impatient})
        assert impatient.cancelled()
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert b"hello" in (await fetching).body
    assert site.asked == ["/page"]
