"""Run transactions that no cancelled task leaves open.

If a task is cancelled after it has sent a statement, the statement may reach the server after the `abortTransaction`
that follows it, which uses another connection. The statement then starts the transaction again. It holds its locks
until the server's `transactionLifetimeLimitSeconds`, and no other process could take over until then. So a cancelled
task first completes its transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.mongo.connection import DURABLE, Database

T = TypeVar("T")
CANCEL_TIMEOUT_SECONDS: Final = 5.0
"""How long a cancelled task waits for the end of its transaction, and then again for its abort. It takes
milliseconds, unless the server does not respond.
"""


async def run_transaction(db: Database, write: Callable[[AsyncClientSession], Awaitable[T]]) -> T:
    """Run the writes of `write` in one durable transaction, and repeat it after a conflict.

    A cancelled caller gets the cancellation when the transaction has ended, by commit or abort.

    Raises:
        PyMongoError: The database failed. An error of `write` is raised after the abort.
    """
    writing = asyncio.ensure_future(_run_in_session(db, write))
    try:
        return await asyncio.shield(writing)
    except asyncio.CancelledError:
        writing.add_done_callback(lambda task: task.cancelled() or task.exception())  # no other code retrieves it
        try:
            await asyncio.wait({writing}, timeout=CANCEL_TIMEOUT_SECONDS)
        finally:
            if not writing.done():
                writing.cancel()
                await asyncio.wait({writing}, timeout=CANCEL_TIMEOUT_SECONDS)  # the abort also needs a response
        raise


async def _run_in_session(db: Database, write: Callable[[AsyncClientSession], Awaitable[T]]) -> T:
    async with db.client.start_session() as session:
        return await session.with_transaction(write, write_concern=DURABLE)
