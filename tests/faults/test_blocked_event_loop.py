"""A worker whose event loop is blocked forever loses its lease and exits with a reason.

`tests/ledger/test_lease.py` tests the lease alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from jobledger.ledger.mongo.embedded_files import wait_until
from tests.support.installation import Installation, http_client
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.plugins import install_plugin
from tests.support.soak_only import soak_only

LEASE_SECONDS = 1.0
BLOCKING_PROCESSOR = """
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
def test_worker_with_blocked_event_loop_loses_its_jobs_and_exits(
    mongodb_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, db_name: str
) -> None:
    install_plugin(tmp_path / "plugins", "blocks", BLOCKING_PROCESSOR)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "plugins"))
    mongodb = {"uri": mongodb_uri, "db_name": db_name}
    with Installation(
        tmp_path / "installation", mongodb=mongodb, event_worker={"lease_seconds": LEASE_SECONDS}
    ) as installation:
        api, projector, blocked = [installation.start(role) for role in ("api", "projector", "worker")]
        for role in (api, projector, blocked):
            role.wait_until_ready()
        with http_client(api) as client:
            job = client.post("/api/events/jobs", json={"job_type": "blocks", "parameters": {}}).json()
            assert wait_until(lambda: "event loop blocked; run blocking jobs" in blocked.stdout + blocked.stderr, 60)
            other = installation.start("worker").wait_until_ready()
            url = f"/api/events/jobs/{job['job_id']}"
            assert wait_until(lambda: client.get(url).json()["job"]["status"] == "completed", 60), other.stderr
        outcome = blocked.wait_for_exit()
        assert outcome.exit_code == 4
        assert f"run-{job['job_id']}" in outcome.err, "the log names the job"
        assert "time.sleep(0.01)" in outcome.err
