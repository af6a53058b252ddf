"""This machine's clock decides nothing: modules that judge moments read the server's clock (`EventLog.clock`)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = re.compile(r"datetime\.now\(|\btime\.time\(|utcnow\(|date\.today\(|time\.localtime\(")
JUDGING = (
    "api/files.py",
    "api/metrics.py",
    "api/monitoring.py",
    "ledger/endpoints.py",
    "ledger/gridfs.py",
    "ledger/handle.py",
    "ledger/leadership.py",
    "ledger/lease.py",
    "projections/files.py",
    "projections/projector.py",
    "projections/queue.py",
    "projections/rebuild.py",
    "projections/steps.py",
    "workers/claims.py",
    "workers/cleanup.py",
    "workers/leases.py",
    "workers/shared_steps.py",
    "workers/webhooks/deliverer.py",
    "workers/webhooks/waiting.py",
)


@pytest.mark.parametrize("path", JUDGING)
def test_module_that_judges_moments_does_not_read_this_machines_clock(path: str) -> None:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    found = [f"{path}:{number}" for number, line in enumerate(lines, 1) if USE.search(line)]
    assert not found, "use `EventLog.now()` or `EventLog.clock`"
