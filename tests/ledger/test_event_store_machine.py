"""The event store under faults in any order: acknowledged events stay, and all readers see the same order."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from pymongo import MongoClient

from jobledger.ledger.mongo.connection import Document
from tests.ledger.event_store_machine import EventStoreMachine

EXAMPLES = int(os.environ.get("JOBLEDGER_EXAMPLES", "12"))
STEPS = 30


@pytest.fixture
def uri(mongodb_uri: str) -> Iterator[str]:
    """A server that aborts open transactions after one second."""
    with MongoClient[Document](mongodb_uri) as client:
        before = client.admin.command({"getParameter": 1, "transactionLifetimeLimitSeconds": 1})
        client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": 1})
        yield mongodb_uri
        seconds = before["transactionLifetimeLimitSeconds"]
        client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": seconds})


@pytest.mark.timeout(max(400, 10 * EXAMPLES))  # Hypothesis repeats and shrinks a failing sequence
def test_event_store_keeps_guarantees_in_any_sequence_of_faults(uri: str) -> None:
    class BoundEventStoreMachine(EventStoreMachine):
        def __init__(self) -> None:
            super().__init__(uri)

    run_state_machine_as_test(
        BoundEventStoreMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
