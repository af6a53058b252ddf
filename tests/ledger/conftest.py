"""An event store for each test, on a separate database."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from jobledger.ledger.mongo.connection import Connection
from tests.support.event_stores import FAST_GAP_LIMITS
from tests.support.ledger_setup import Ledger, open_ledger


@pytest.fixture
async def ledger(connection: Connection) -> AsyncIterator[Ledger]:
    """An event store with a running change stream and a short gap timeout."""
    async with open_ledger(connection, FAST_GAP_LIMITS) as ledger:
        yield ledger


@pytest.fixture
async def unstreamed_ledger(connection: Connection) -> AsyncIterator[Ledger]:
    """An event store without a change stream. Readers read from the collection."""
    async with open_ledger(connection, FAST_GAP_LIMITS, with_change_stream=False) as ledger:
        yield ledger
