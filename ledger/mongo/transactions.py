"""ledger: transactions that nobody leaves open who is told to stop.

A statement that was sent, and whose sender was cancelled then, may reach the server after the `abortTransaction` that
was sent behind it, for that takes another connection. Then it begins the transaction again, which holds what it has
written until the server's `transactionLifetimeLimitSeconds`: for so long nobody could take over. So who is cancelled
within a transaction comes to its end first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.mongo.connection import DURABLE, Database

T = TypeVar("T")
CANCEL_TIMEOUT_SECONDS: Final = 5.0
"""For so long, and once more for its undoing, who is cancelled waits for the end. It takes milliseconds, unless the
server does not answer."""


async def run_transaction(db: Database, write: Callable[[AsyncClientSession], Awaitable[T]]) -> T:
    """Do what `write` does with its session all together or not at all, durably; again after a conflict.

    Who is cancelled meanwhile learns of it when the transaction has ended, one way or the other.

    Raises:
        PyMongoError: the database failed. What `write` raises, nothing being written then.
    """
    writing = asyncio.ensure_future(_transaction(db, write))
    try:
        return await asyncio.shield(writing)
    except asyncio.CancelledError:
        writing.add_done_callback(_heard)
        try:
            await asyncio.wait({writing}, timeout=CANCEL_TIMEOUT_SECONDS)
        finally:
            if not writing.done():
                writing.cancel()
                await asyncio.wait(
                    {writing}, timeout=CANCEL_TIMEOUT_SECONDS
                )  # to abort it, the server has to answer, too
        raise


def _heard(writing: asyncio.Future[T]) -> None:
    """Nobody else asks what became of it."""
    if not writing.cancelled():
        writing.exception()


async def _transaction(db: Database, write: Callable[[AsyncClientSession], Awaitable[T]]) -> T:
    async with db.client.start_session() as session:
        return await session.with_transaction(write, write_concern=DURABLE)
