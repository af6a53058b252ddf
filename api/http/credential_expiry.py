"""End open responses and waiting requests when their credential is revoked or has expired."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from starlette.requests import HTTPConnection
from starlette.types import Scope

from jobledger.api.http.errors import ApiError


class Authentication(Protocol):
    """Checks the credential of an open request. The authentication middleware adds itself to the scope as such."""

    async def wait_until_invalid(self, scope: Scope, *, allow_renewal: bool) -> None:
        """Return when the credential of a request is revoked or has expired, as wait_until_signed_out()."""


async def wait_until_signed_out(scope: Scope, *, allow_renewal: bool = False) -> None:
    """Return when the credential of a request is revoked or has expired; never return for public paths.

    `allow_renewal` is for responses that clients cannot resume with another request. They may continue after
    `valid_until` while the credential is accepted.
    """
    authentication: Authentication | None = scope.get("authentication")
    if authentication is None:
        await asyncio.Event().wait()
    else:
        await authentication.wait_until_invalid(scope, allow_renewal=allow_renewal)


@asynccontextmanager
async def limit_while_authenticated(request: HTTPConnection, seconds: float) -> AsyncIterator[None]:
    """Limit the duration of the block like asyncio.timeout(), and end it when the request's credential becomes invalid.

    Raises:
        TimeoutError: The time has elapsed.
        ApiError: 401, the credential was revoked or has expired.
    """
    is_invalid = False

    async def watch(limit: asyncio.Timeout) -> None:
        nonlocal is_invalid
        await wait_until_signed_out(request.scope)
        is_invalid = True  # no await before the next line, so the block cannot end in between
        limit.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(seconds) as limit:
            watching = asyncio.create_task(watch(limit), name="credential-watch")
            try:
                yield
            finally:
                watching.cancel()
    except TimeoutError:
        if is_invalid:
            message = "The credentials were revoked or expired during the request."
            raise ApiError(401, "invalid_credentials", message) from None
        raise
