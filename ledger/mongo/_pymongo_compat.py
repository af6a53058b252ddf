"""Correct two faults of the driver.

The driver ignores cancellation on Python 3.11 (`patch_wait_for`). There, `asyncio.wait_for` swallows a cancellation
that arrives when its awaitable has just finished (https://github.com/python/cpython/issues/86296, fixed in 3.12). The
driver uses it to connect and for every message it sends. So a role would occasionally ignore a request to stop, or a
time limit. This module gives the driver, and no other code, the `wait_for` of Python 3.12.

The driver decides only once, when it opens a connection, whether sessions may be used on it (`patch_session_support`).
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
from pymongo.asynchronous.pool import AsyncConnection
from pymongo.synchronous.pool import Connection

T = TypeVar("T")


async def wait_for(awaited: asyncio.Future[T] | Coroutine[Any, Any, T], timeout: float | None) -> T:  # noqa: ASYNC109 - as in asyncio
    """Wait for an awaitable with a timeout in seconds. Cancellation always propagates.

    Raises:
        TimeoutError: It took longer, and was cancelled.
    """
    async with asyncio.timeout(timeout):
        return await awaited


def patch_wait_for() -> None:
    """Make the driver use `wait_for` of this module. `mongo.connection` calls this. Further calls have no effect."""
    if sys.version_info >= (3, 12):
        return
    own = ModuleType("asyncio")
    own.__dict__.update(asyncio.__dict__, wait_for=wait_for)
    for module in (pymongo.network_layer, pymongo.pool_shared):
        module.asyncio = own  # type: ignore[attr-defined]  # it is imported there, and not said to be exported
    pymongo.lock.wait_for = wait_for  # type: ignore[attr-defined, assignment]  # as above


def patch_session_support() -> None:
    """Make the driver use sessions on all connections to a server that supports them.

    It refuses them on connections that it opened while the server was recovering, neither primary nor secondary. Such a
    connection stays in the pool when the server has become primary, so transactions and change streams fail forever.
    A direct connection to a server that restarts is in this state for a moment. With this patch it sends the session,
    and a server that is still recovering reports that as a transient error.
    """
    for connection in (AsyncConnection, Connection):
        supports_sessions = property(_supports_sessions, lambda *_: None)
        connection.supports_sessions = supports_sessions  # type: ignore[assignment]  # a property of the class


def _supports_sessions(connection: Any) -> bool:
    """Return whether the server reported `logicalSessionTimeoutMinutes`, as the sessions specification requires."""
    return getattr(connection, "logical_session_timeout_minutes", None) is not None
