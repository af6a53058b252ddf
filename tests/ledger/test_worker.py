"""The rules of a worker's stream: one start, and one end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.ledger.domain.commands import ReportLostWorker, StartWorker, StopWorker, WorkerStreamCommand
from jobledger.ledger.domain.errors import AlreadyExists, NotFound
from jobledger.ledger.domain.events import WorkerStarted, WorkerStopped
from jobledger.ledger.domain.worker import Worker, decide, evolve

STARTED = WorkerStarted(host="h", slots=2, job_types=["echo"], software_version="1", settings_digest="d")
ENDS: list[WorkerStreamCommand] = [StopWorker("stopped"), StopWorker("failed"), ReportLostWorker("other")]


def test_worker_starts_once() -> None:
    assert decide(StartWorker(STARTED), None) == [STARTED]
    with pytest.raises(AlreadyExists):
        decide(StartWorker(STARTED), Worker(STARTED))


def test_end_of_a_worker_that_has_not_started_is_ignored() -> None:
    assert [decide(command, None) for command in ENDS] == [[], [], []]
    with pytest.raises(NotFound, match="WorkerStopped"):
        evolve(None, WorkerStopped(reason="stopped"))


@given(st.lists(st.sampled_from(ENDS), min_size=1))
def test_only_the_first_end_is_recorded(commands: list[WorkerStreamCommand]) -> None:
    worker, ends = evolve(None, STARTED), []
    for command in commands:
        for event in decide(command, worker):
            worker = evolve(worker, event)
            ends.append(event)
    assert len(ends) == 1
    assert worker.status == ("stopped" if isinstance(commands[0], StopWorker) else "lost")
