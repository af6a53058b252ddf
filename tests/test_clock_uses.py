"""This machine's clock decides nothing: modules that judge moments read the server's clock (`EventLog.clock`)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = re.compile(r"datetime\.now\(|\btime\.time\(|utcnow\(|date\.today\(|time\.localtime\(")
JUDGING = (
    "api/routes/files.py",
    "api/routes/metrics.py",
    "api/routes/monitoring.py",
    "ledger/store/endpoint_secrets.py",
    "ledger/files/gridfs.py",
    "ledger/store/command_handler.py",
    "ledger/mongo/leader_election.py",
    "ledger/mongo/lease.py",
    "projections/views/files.py",
    "projections/engine/projector.py",
    "projections/views/queue.py",
    "projections/engine/rebuild.py",
    "projections/views/steps.py",
    "workers/claim_queue.py",
    "workers/claimer.py",
    "workers/cleanup.py",
    "workers/lease_reaper.py",
    "workers/step_cache.py",
    "workers/webhooks/deliverer.py",
    "workers/webhooks/schedule.py",
)


@pytest.mark.parametrize("path", JUDGING)
def test_module_that_judges_moments_does_not_read_this_machines_clock(path: str) -> None:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    found = [f"{path}:{number}" for number, line in enumerate(lines, 1) if USE.search(line)]
    assert not found, "use `EventLog.now()` or `EventLog.clock`"
