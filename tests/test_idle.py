"""An idle process sends no commands to the database, except heartbeats and the `getMore` of its change stream.

The roles run in a separate program, because a command listener must be registered before any client exists.
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

MEASURED_SECONDS = 6
LEASE_SECONDS = 3.0

PROGRAM = """
import asyncio, json, sys, time
from pathlib import Path
from pymongo import monitoring

class CommandRecorder(monitoring.CommandListener):
    def __init__(self):
        self.commands = []
    def started(self, event):
        command = event.command
        target = command.get("collection") or command.get(event.command_name)
        self.commands.append((time.monotonic(), event.command_name, str(target)))
    def succeeded(self, event): ...
    def failed(self, event): ...

recorder = CommandRecorder()
monitoring.register(recorder)
from jobledger.cli.settings_file import read_settings
from jobledger.cli.composition import start_roles

async def main(seconds, roles):
    settings, _ = read_settings(Path("config.yaml"))
    connection = settings.mongodb.make_connection(settings.mongodb.uri.get_secret_value())
    failures = []
    async with start_roles(settings, connection, frozenset(roles), on_failure=failures.append) as running:
        if "projector" in roles:  # some work first: afterwards, the processes must become idle again
            import httpx
            async with httpx.AsyncClient(base_url=running.url or "", trust_env=False) as client:
                if running.url:
                    jobs = [{"job_type": "echo", "parameters": {"number": n}} for n in range(20)]
                    answer = await client.post("/api/events/batches", json={"jobs": jobs})
                    query = {"after": 0, "types": "BatchFinished"}
                    async with asyncio.timeout(60), client.stream("GET", "/api/ledger/stream", params=query) as stream:
                        async for line in stream.aiter_lines():
                            if line.startswith("data:"):
                                break
        idle_since = await wait_until_idle()
        await asyncio.sleep(seconds)
        commands = [entry[1:] for entry in list(recorder.commands) if entry[0] >= idle_since]
    print(json.dumps({"commands": commands, "failures": [repr(failure) for failure in failures]}))

async def wait_until_idle():
    # Idle: only getMore and heartbeats for 1.5 s. A process that never is idle fails by the timeout.
    async with asyncio.timeout(60):
        while True:
            started_at = time.monotonic()
            await asyncio.sleep(1.5)
            recent = [entry for entry in list(recorder.commands) if entry[0] >= started_at]
            if all(name == "getMore" or target in ("workers", "leaders") for _, name, target in recent):
                return time.monotonic()

asyncio.run(main(float(sys.argv[1]), sys.argv[2].split(",")))
"""


@pytest.mark.parametrize("roles", ["api,projector,worker", pytest.param("worker", marks=soak_only)])
def test_idle_process_sends_only_heartbeats(mongodb_uri: str, db_name: str, tmp_path: Path, roles: str) -> None:
    with Installation(
        tmp_path, mongodb={"uri": mongodb_uri, "db_name": db_name}, event_worker={"lease_seconds": LEASE_SECONDS}
    ) as installation:
        outcome = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(MEASURED_SECONDS), roles],
            cwd=installation.directory,
            env={**installation.env, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    report: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
    assert report["failures"] == []
    counts = Counter((command, target) for command, target in report["commands"])

    allowed = {("getMore", "$cmd.aggregate")}
    if "worker" in roles:
        allowed.add(("update", "workers"))
    if "projector" in roles:
        allowed.add(("update", "leaders"))
    assert counts.keys() <= allowed, f"an idle process sent: {dict(counts)}"

    # A getMore waits on the server for a second or more. There are three heartbeats per lease.
    assert 1 <= counts["getMore", "$cmd.aggregate"] <= 2 * MEASURED_SECONDS
    if "worker" in roles:
        assert 0.5 * 3 * MEASURED_SECONDS / LEASE_SECONDS <= counts["update", "workers"] <= 1.5 * MEASURED_SECONDS
