"""This machine's clock decides nothing: each use of it is listed here, with what it is for."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("ledger", "projections", "workers", "api", "cli")
USE = re.compile(r"datetime\.now\(|\btime\.time\(|utcnow\(|date\.today\(|time\.localtime\(")
LABELS = {
    "ledger/server_clock.py": "before the first answer of a server there is no other clock",
    "ledger/log.py": "decides how soon a gap is filled; filling it early is safe",
    "ledger/envelope.py": "only measures the size of an event",
    "ledger/transfer.py": "names the time of an export",
    "ledger/endpoints.py": "how long a replaced secret still signs: a wrong clock changes that by its error",
    "ledger/files.py": "age of a leftover file, by the clock that wrote it",
    "ledger/gridfs.py": "age of leftovers in days, from ids that clients made",
    "projections/health.py": "time of a report",
    "workers/attempt.py": "time of a log line",
    "workers/execution.py": "`processed_at` of the results",
    "workers/worker.py": "`started_at` of a worker",
    "workers/health.py": "`unhealthy_since` of a worker",
    "api/sink.py": "time of a test message",
    "api/sign_in.py": "until when a proxy's word counts, compared on the same machine",
    "api/access.py": "compares the above",
    "api/sessions.py": "a session's twelve hours; a wrong clock makes them longer or shorter by its error",
    "api/dashboard/pages.py": "how long ago something was",
    "cli/doctor.py": "compares this machine's clock with the server's, and reports the difference",
    "cli/webhooks.py": "signature of a test message, for a receiver on this machine",
    "cli/keys.py": "when a key was created",
}


def uses() -> dict[str, int]:
    found: dict[str, int] = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if count := len(USE.findall(path.read_text(encoding="utf-8"))):
                found[str(path.relative_to(ROOT))] = count
    return found


def test_no_module_decides_by_this_machines_clock() -> None:
    unknown = uses().keys() - LABELS.keys()
    assert not unknown, f"use `EventLog.now()` or `EventLog.clock`, or list them above: {sorted(unknown)}"
