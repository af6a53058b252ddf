"""The benchmarks run, on little material: what they then say of speed means nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def run(*arguments: str, mongodb_uri: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"JOBLEDGER_TEST_MONGODB_URI": mongodb_uri},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.timeout(240)
def test_every_question_is_measured_at_scale(mongodb_uri: str) -> None:
    """The other parts take a minute each, however little they have to do: `make soak` runs them."""
    measured = run("http-scale", "--events", "40", "--rounds", "1", mongodb_uri=mongodb_uri)
    assert measured.returncode == 0, measured.stderr
    ratios = re.findall(r"│\s+(\d+\.\d\d)\s+│ \d+\.\d\d – \d+\.\d\d\s+│ [≥≤] \d\.\d", measured.stdout)
    assert len(ratios) == 9, measured.stdout
    assert all(0 < float(ratio) < 100 for ratio in ratios)


def test_a_part_that_does_not_exist_is_refused(mongodb_uri: str) -> None:
    refused = run("apend", mongodb_uri=mongodb_uri)
    assert refused.returncode == 2
    assert "choose from append, subscribe, jobs, http, http-scale, maintenance" in refused.stderr
