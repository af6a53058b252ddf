"""The commands, programs and settings that the documentation shows, and how to run them."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest

from jobledger.ledger.domain.commands import ClaimJob
from jobledger.ledger.store.command_handler import handle_command
from tests.support.event_examples import NOON, RESULTS
from tests.support.forked_commands import create_command
from tests.support.installation import Installation
from tests.support.ledger_setup import EVENT_METADATA, Ledger
from tests.support.polling import DEADLINE_SECONDS
from tests.support.worker_reports import report_results

DOCS = Path(__file__).parents[2] / "docs"


def read_code_blocks(document: Path, language: str) -> list[str]:
    """Return the code blocks of one language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@contextmanager
def run_program(text: str, path: Path, *arguments: str) -> Iterator[Queue[str]]:
    """Run a program from the documentation and yield a queue of its output lines. Kill it at the end with SIGKILL."""
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


async def read_line(lines: Queue[str]) -> str:
    return await asyncio.to_thread(lines.get, timeout=DEADLINE_SECONDS)


async def complete_job(ledger: Ledger) -> str:
    submitted = await ledger.submit_job()
    stream = submitted.events[0].stream
    claimed = await handle_command(
        ledger.event_store, stream, ClaimJob("worker-1", NOON), meta=EVENT_METADATA, stream_state=submitted.stream_state
    )
    completed = report_results("worker-1", 1, RESULTS)
    await handle_command(ledger.event_store, stream, completed, meta=EVENT_METADATA, stream_state=claimed.stream_state)
    return stream


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="install curl: apt-get install curl")


@contextmanager
def create_installation(
    mongodb_uri: str, db_name: str, directory: Path, settings: dict[str, Any]
) -> Iterator[Installation]:
    """Create an installation with the settings that a document shows."""
    with Installation(directory, mongodb={"uri": mongodb_uri, "db_name": db_name}, **settings) as installation:
        yield installation


def run_shell(installation: Installation, *texts: str) -> str:
    """Run shell commands of a document. Port 5001 is replaced by the port of this installation. Return the output."""
    url = installation.commands[-1].url if installation.commands else "http://127.0.0.1:1"
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(texts).replace("http://127.0.0.1:5001", url)],
        cwd=installation.directory,
        env={**installation.env, "PATH": f"{create_command().parent}:{os.environ['PATH']}", "JOBLEDGER_URL": url},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
