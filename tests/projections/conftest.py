"""Fixtures of the tests of projections."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from jobledger.ledger.mongo.connection import Connection
from tests.support.role_runner import RunningRoles, run_roles_in_process


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
async def roles(connection: Connection, store: Path) -> AsyncIterator[RunningRoles]:
    """A running projector in this process."""
    async with run_roles_in_process(connection, store, projector=True) as running:
        yield running
