"""ledger: the driver obeys when it is cancelled, under Python 3.11, too.

There, `asyncio.wait_for` swallows a cancellation that arrives when what it waits for has just ended
(https://github.com/python/cpython/issues/86296, mended in 3.12), and the driver uses it to connect and for every
message it sends: a role that was told to stop would now and then go on for ever, and a time limit be overlooked. So the
driver, and nobody else, gets the one of Python 3.12.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from types import ModuleType
from typing import Any, TypeVar

import pymongo.lock
import pymongo.network_layer
import pymongo.pool_shared

T = TypeVar("T")


async def wait_for(awaited: asyncio.Future[T] | Coroutine[Any, Any, T], timeout: float | None) -> T:  # noqa: ASYNC109 - as in asyncio
    """Wait for something, for so many seconds at most. Whoever is cancelled meanwhile is cancelled.

    Raises:
        TimeoutError: it took longer, and was cancelled.
    """
    async with asyncio.timeout(timeout):
        return await awaited


def patch_wait_for() -> None:
    """Have the driver wait with `wait_for` as it is above. `jobledger.ledger.mongo.connection` does it; again
    changes nothing."""
    if sys.version_info >= (3, 12):
        return
    own = ModuleType("asyncio")
    own.__dict__.update(asyncio.__dict__, wait_for=wait_for)
    for module in (pymongo.network_layer, pymongo.pool_shared):
        module.asyncio = own  # type: ignore[attr-defined]  # it is imported there, and not said to be exported
    pymongo.lock.wait_for = wait_for  # type: ignore[attr-defined, assignment]  # as above
