"""Idle means silent: with nothing to do, no process asks the database anything. There are only heartbeats.

The command monitor has to be there before any client is made, so the roles run in a program of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.installation import Installation
from tests.support.soak_only import soak_only

WATCHED_SECONDS = 6
LEASE_SECONDS = 3.0

PROGRAM = """
import asyncio, json, sys, time
from pathlib import Path
from pymongo import monitoring

class Watch(monitoring.CommandListener):
    def __init__(self):
        self.seen = []
    def started(self, event):
        command = event.command
        target = command.get("collection") or command.get(event.command_name)
        self.seen.append((time.monotonic(), event.command_name, str(target)))
    def succeeded(self, event): ...
    def failed(self, event): ...

watch = Watch()
monitoring.register(watch)
from jobledger.cli.settings_file import read_settings
from jobledger.cli.composition import start_roles

async def main(seconds, wanted):
    settings, _ = read_settings(Path("config.yaml"))
    connection = settings.mongodb.make_connection(settings.mongodb.uri.get_secret_value())
    failures = []
    async with start_roles(settings, connection, frozenset(wanted), on_failure=failures.append) as running:
        if "projector" in wanted:  # some work first: what it has warmed up must fall silent again
            import httpx
            async with httpx.AsyncClient(base_url=running.url or "", trust_env=False) as client:
                if running.url:
                    jobs = [{"job_type": "echo", "parameters": {"number": n}} for n in range(20)]
                    answer = await client.post("/api/events/batches", json={"jobs": jobs})
                    asked = {"after": 0, "types": "BatchFinished"}
                    async with asyncio.timeout(30), client.stream("GET", "/api/ledger/stream", params=asked) as stream:
                        async for line in stream.aiter_lines():
                            if line.startswith("data:"):
                                break
        begun = await quiet()
        await asyncio.sleep(seconds)
        seen = [entry[1:] for entry in list(watch.seen) if entry[0] >= begun]
    print(json.dumps({"seen": seen, "failures": [repr(failure) for failure in failures]}))

async def quiet():
    # Idle is reached when for a second nothing but getMore was sent; a process that never is fails by its deadline.
    async with asyncio.timeout(30):
        while True:
            begun = time.monotonic()
            await asyncio.sleep(1.5)
            recent = [entry for entry in list(watch.seen) if entry[0] >= begun]
            if all(name == "getMore" or target in ("workers", "leaders") for _, name, target in recent):
                return time.monotonic()

asyncio.run(main(float(sys.argv[1]), sys.argv[2].split(",")))
"""


@pytest.mark.parametrize("roles", ["api,projector,worker", pytest.param("worker", marks=soak_only)])
def test_an_idle_process_sends_nothing_but_heartbeats(
    mongodb_uri: str, db_name: str, tmp_path: Path, roles: str
) -> None:
    with Installation(
        tmp_path, mongodb={"uri": mongodb_uri, "db_name": db_name}, event_worker={"lease_seconds": LEASE_SECONDS}
    ) as installation:
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(WATCHED_SECONDS), roles],
            cwd=installation.directory,
            env={**installation.env, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert found["failures"] == []
    seen = Counter((command, target) for command, target in found["seen"])

    allowed = {("getMore", "$cmd.aggregate")}
    if "worker" in roles:
        allowed.add(("update", "workers"))
    if "projector" in roles:
        allowed.add(("update", "leaders"))
    assert seen.keys() <= allowed, f"an idle process asked: {dict(seen)}"

    # The streams wait on the server's side, a second or more at a time, and heartbeats come three to a lease.
    assert 1 <= seen["getMore", "$cmd.aggregate"] <= 2 * WATCHED_SECONDS
    if "worker" in roles:
        assert 0.5 * 3 * WATCHED_SECONDS / LEASE_SECONDS <= seen["update", "workers"] <= 1.5 * WATCHED_SECONDS
