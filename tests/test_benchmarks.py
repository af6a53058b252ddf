"""The benchmarks run with little data. The measured times mean nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.soak_only import soak_only

REPOSITORY = Path(__file__).parents[1]


def run_benchmarks(*arguments: str, mongodb_uri: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"JOBLEDGER_TEST_MONGODB_URI": mongodb_uri},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@soak_only
@pytest.mark.timeout(240)
def test_http_scale_benchmark_measures_each_ratio(mongodb_uri: str) -> None:
    """The other parts take a minute each, even with little data."""
    outcome = run_benchmarks("http-scale", "--events", "40", "--rounds", "1", mongodb_uri=mongodb_uri)
    assert outcome.returncode == 0, outcome.stderr
    ratios = re.findall(r"│\s+(\d+\.\d\d)\s+│ \d+\.\d\d – \d+\.\d\d\s+│ [≥≤] \d\.\d", outcome.stdout)
    assert len(ratios) == 10, outcome.stdout
    assert all(0 < float(ratio) < 100 for ratio in ratios)


@soak_only
@pytest.mark.timeout(240)
def test_jobs_benchmark_measures_the_cpu_time_of_each_process(mongodb_uri: str) -> None:
    outcome = run_benchmarks("jobs", "--events", "80", "--rounds", "1", mongodb_uri=mongodb_uri)
    assert outcome.returncode == 0, outcome.stderr
    rows = re.findall(r"CPU per job: (\w+).*?│\s*│ ([\d,]+) µs", outcome.stdout)
    assert [name for name, _ in rows] == ["database", "workers", "projector", "total"], outcome.stdout
    database, workers, projector, total = (int(microseconds.replace(",", "")) for _, microseconds in rows)
    assert min(database, workers, projector) > 0
    assert abs(database + workers + projector - total) <= 2


def test_unknown_benchmark_is_rejected(mongodb_uri: str) -> None:
    outcome = run_benchmarks("apend", mongodb_uri=mongodb_uri)
    assert outcome.returncode == 2
    names = "append, subscribe, pickup, jobs, submit, client, http, http-scale, maintenance"
    assert f"choose from {names}" in outcome.stderr
