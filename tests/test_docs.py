"""What the documentation shows, run as it stands there."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Thread

from ledger.commands import ClaimJob, CompleteJob
from ledger.handle import handle
from ledger.mongo import Connection
from tests.support.examples import NOON, RESULTS
from tests.support.ledgers import META, Ledger, ledger_on

DOCS = Path(__file__).parents[1] / "docs"


def blocks(document: Path, language: str) -> list[str]:
    """The code blocks of one language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@contextmanager
def program(text: str, path: Path, *arguments: str) -> Iterator[Queue[str]]:
    """Run a program from the documentation; its lines come in the queue. Killed at the end, as by a power cut."""
    path.write_text(text, encoding="utf-8")
    process = subprocess.Popen([sys.executable, path, *arguments], stdout=subprocess.PIPE, text=True, env=os.environ)
    lines: Queue[str] = Queue()

    def read() -> None:
        assert process.stdout
        for line in process.stdout:
            lines.put(line)

    reader = Thread(target=read, daemon=True)
    reader.start()
    try:
        yield lines
    finally:
        process.kill()
        process.wait()
        reader.join()


async def next_of(lines: Queue[str]) -> str:
    return await asyncio.to_thread(lines.get, timeout=20)


async def finish_a_job(ledger: Ledger) -> str:
    submitted = await ledger.submit()
    stream = submitted.events[0].stream
    claimed = await handle(ledger.log, stream, ClaimJob("worker-1", NOON), meta=META, known=submitted.known)
    completed = CompleteJob("worker-1", 1, RESULTS)
    await handle(ledger.log, stream, completed, meta=META, known=claimed.known)
    return stream


async def test_the_program_that_follows_the_log_does_so_and_goes_on_where_it_was(
    mongodb_uri: str, db_name: str, tmp_path: Path
) -> None:
    connection = Connection(mongodb_uri, db_name)
    [text] = blocks(DOCS / "how-to" / "follow-the-log.md", "python")
    text = text.replace("ledger_client(uri)", f"ledger_client(uri, db_name={connection.db_name!r})")
    async with ledger_on(connection, live=False) as ledger:
        first = await finish_a_job(ledger)
        with program(text, tmp_path / "follow.py", connection.uri) as lines:
            assert first in await next_of(lines)
            second = await finish_a_job(ledger)
            assert second in await next_of(lines)
        third = await finish_a_job(ledger)
        with program(text, tmp_path / "follow.py", connection.uri) as lines:
            while third not in (line := await next_of(lines)):
                assert first in line or second in line  # of the last second before it was killed
