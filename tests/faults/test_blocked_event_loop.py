"""A job that blocks the event loop of its worker for ever loses its lease, and its process ends with a reason.

The lease alone: `tests/ledger/test_lease.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from jobledger.ledger.mongo.embedded_lock import wait_until
from tests.support.installation import Installation, http_client
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.plugins import install_plugin
from tests.support.soak_only import soak_only

LEASE_SECONDS = 1.0
BLOCK = """
import time

async def run(self, job):
    while job.attempt == 1:
        time.sleep(0.01)
    return Results()

ValidProcessor.run = run
"""


@soak_only
@needs_local_mongod
@pytest.mark.timeout(120)
def test_worker_with_a_blocked_loop_loses_its_jobs_and_ends(
    mongodb_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, db_name: str
) -> None:
    install_plugin(tmp_path / "plugins", "blocks", BLOCK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "plugins"))
    mongodb = {"uri": mongodb_uri, "db_name": db_name}
    with Installation(tmp_path / "here", mongodb=mongodb, event_worker={"lease_seconds": LEASE_SECONDS}) as here:
        api, projector, first = here.start("api"), here.start("projector"), here.start("worker")
        for role in (api, projector, first):
            role.wait_until_ready()
        with http_client(api) as client:
            job = client.post("/api/events/jobs", json={"job_type": "blocks", "parameters": {}}).json()
            assert wait_until(lambda: "event loop blocked; run blocking jobs" in first.stdout + first.stderr, 20)
            second = here.start("worker").wait_until_ready()
            address = f"/api/events/jobs/{job['job_id']}"
            assert wait_until(lambda: client.get(address).json()["job"]["status"] == "completed", 30), second.stderr
        ended = first.wait_for_exit()
        assert ended.exit_code == 4
        assert f"run-{job['job_id']}" in ended.err, "the log names the job"
        assert "time.sleep(0.01)" in ended.err
