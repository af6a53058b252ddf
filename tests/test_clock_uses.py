"""Modules that compare times with the current time read the clock of the database server (`EventStore.clock`)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCAL_CLOCK_CALL = re.compile(r"datetime\.now\(|\btime\.time\(|utcnow\(|date\.today\(|time\.localtime\(")
MODULES_WITH_DEADLINES = (
    "api/routes/files.py",
    "api/routes/monitoring.py",
    "ledger/webhooks/endpoint_secrets.py",
    "ledger/files/gridfs.py",
    "ledger/store/command_handler.py",
    "ledger/mongo/leader_election.py",
    "ledger/mongo/lease.py",
    "projections/views/files.py",
    "projections/engine/projector.py",
    "projections/views/queue.py",
    "projections/engine/rebuild.py",
    "projections/views/steps.py",
    "workers/claims/claim_queue.py",
    "workers/claims/claimer.py",
    "workers/cleanup.py",
    "workers/lease_reaper.py",
    "workers/attempts/shared_step_finder.py",
    "workers/webhooks/deliverer.py",
    "workers/webhooks/schedule.py",
)


@pytest.mark.parametrize("path", MODULES_WITH_DEADLINES)
def test_module_with_deadlines_does_not_read_the_local_clock(path: str) -> None:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    calls = [f"{path}:{number}" for number, line in enumerate(lines, 1) if LOCAL_CLOCK_CALL.search(line)]
    assert not calls, "use `EventStore.read_server_time()` or `EventStore.clock`"
