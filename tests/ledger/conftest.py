"""tests: a ledger for each test, on a database of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.event_store import Limits
from tests.support.ledgers import Ledger, ledger_on

QUICK = Limits(void_after_seconds=0.2)


@pytest.fixture
def connection(mongodb_uri: str, db_name: str) -> Connection:
    return Connection(mongodb_uri, db_name)


@pytest.fixture
async def ledger(connection: Connection) -> AsyncIterator[Ledger]:
    """A log with a running change stream, and little patience with lost numbers."""
    async with ledger_on(connection, QUICK) as ledger:
        yield ledger


@pytest.fixture
async def quiet(connection: Connection) -> AsyncIterator[Ledger]:
    """A log without a change stream: whoever reads it does so from the collection."""
    async with ledger_on(connection, QUICK, live=False) as ledger:
        yield ledger
