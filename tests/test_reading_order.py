"""The reading order of the README: the files exist, and their imports lead along the path of a submitted job."""

from __future__ import annotations

import re
from pathlib import Path

import grimp
import pytest

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
READING_ORDER = re.findall(r"^\d+\. \[([\w/.]+\.py)\]\(\1\)", README, re.MULTILINE)

PATH_OF_A_JOB = (
    "api.routes.jobs",
    "api.submission.builder",
    "ledger.store.command_handler",
    "ledger.domain.job",
    "ledger.store.event_store",
    "ledger.store.appender",
    "ledger.store.hash_chain",
    "ledger.store.change_stream",
    "projections.engine.writer",
    "projections.views.jobs",
    "projections.views.queue",
    "workers.claims.claimer",
    "workers.claims.claim_queue",
    "workers.attempts.executor",
    "workers.child.process",
    "workers.processor",
    "workers.attempts.attempt_writer",
    "workers.attempts.outcome_recorder",
)
"""From the request to the completed job: the modules that a submitted job passes, in this order."""


def module_name(path: str) -> str:
    return "jobledger." + path.removesuffix(".py").replace("/", ".")


def test_reading_order_names_at_most_nine_files_that_exist() -> None:
    assert 1 <= len(READING_ORDER) <= 9
    for path in READING_ORDER:
        assert (REPOSITORY / path).is_file(), path


def test_reading_order_reaches_the_whole_path_of_a_job_by_imports() -> None:
    graph = grimp.build_graph("jobledger")
    first = {module_name(path) for path in READING_ORDER}
    reached = first.union(*(graph.find_upstream_modules(module) for module in first))
    assert {f"jobledger.{module}" for module in PATH_OF_A_JOB} <= reached


@pytest.mark.parametrize("path", READING_ORDER)
def test_file_of_the_reading_order_can_be_read_in_some_minutes(path: str) -> None:
    """A long file would hide the path of a job. The catalogue of events is read in part."""
    lines = (REPOSITORY / path).read_text(encoding="utf-8").count("\n")
    assert lines <= (750 if path.endswith("events.py") else 450), lines
