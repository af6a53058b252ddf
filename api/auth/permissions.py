"""api: who asks, and whether they may. Every route that shows or changes a job or batch asks here.

Unknown and forbidden look alike to who may not read: 404. Who may read but not do that gets 403.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Final, Protocol

from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from jobledger.api.auth.redaction import Viewer
from jobledger.api.http.errors import ApiError, error_response
from jobledger.ledger.domain.access import AccessLevel, Principal, get_access_level, parse_user_name
from jobledger.ledger.domain.batch import Batch
from jobledger.ledger.domain.job import Job
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import StreamState

_SIGN_IN_PAGES = ("/monitoring/events/sign-in", "/monitoring/events/sign-out")
PUBLIC_PATHS = frozenset({"/healthz", "/readyz", "/api/openapi.json", "/api/docs", *_SIGN_IN_PAGES})
"""Addresses that say nothing about anybody's jobs."""
_PUBLIC_PREFIX = "/monitoring/events/static/"
_RECHECK_SECONDS: Final = 30.0
"""How often a credential in use is checked again although nothing was reported, such as a clock that was set."""


class AuthBackend(Protocol):
    """Finds out who asks."""

    async def __call__(self, connection: HTTPConnection) -> Principal:
        """Return who it is.

        Raises:
            ApiError: 401, when they do not say, or what they say is wrong.
        """


class SingleUserBackend:
    """One person on one machine: whoever reaches us is that person, and may do everything."""

    def __init__(self, user_id: str) -> None:
        self._principal = Principal(user_id, roles=frozenset({"admin"}))

    async def __call__(self, connection: HTTPConnection) -> Principal:
        return self._principal


class RevocationNotifier:
    """Announces that credentials were revoked, or may have been."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    @property
    def next_event(self) -> asyncio.Event:
        """The event that the next announcement sets."""
        return self._next

    def notify(self) -> None:
        """Have everything that is still open check its credential."""
        self._next.set()
        self._next = asyncio.Event()


def _as_error(scope: Scope, error: ApiError) -> ASGIApp:
    return error_response(error)


class AuthenticationMiddleware:
    """Middleware: no request gets to a route before it is known who asks.

    `refused` makes the answer for who cannot be let in: for a program an error, for a person at a page the sign-in.
    """

    def __init__(
        self,
        app: ASGIApp,
        auth_backend: AuthBackend,
        revocation_notifier: RevocationNotifier,
        on_error: Callable[[Scope, ApiError], ASGIApp] = _as_error,
    ) -> None:
        self._app = app
        self._sign_in = auth_backend
        self._revocations = revocation_notifier
        self._refused = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] not in PUBLIC_PATHS and not scope["path"].startswith(_PUBLIC_PREFIX):
                principal = scope["principal"] = await self._sign_in(HTTPConnection(scope))
                scope["authentication"] = self
                if principal.user_id is not None and (accepted := scope.get("on_credentials_accepted")) is not None:
                    accepted()  # now, and not with the answer: that may take a minute
        except ApiError as error:
            scope["are_credentials_rejected"] = error.status == 401  # the answer may be a redirect to the sign-in
            await self._refused(scope, error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def wait_until_invalid(self, scope: Scope, *, allow_renewal: bool) -> None:
        """Return once the credential of a request is revoked or has expired.

        Without `renewable`, also at `valid_until`: a proxy has to say again who asks, in another request.

        The next announcement is taken before the credential is checked: one that comes after the check ends the wait.
        """
        principal: Principal = scope["principal"]
        while True:
            revoked = self._revocations.next_event
            if not await self._is_valid(scope, principal):
                return
            seconds = _RECHECK_SECONDS
            if principal.valid_until is not None:
                left = (principal.valid_until - datetime.now(UTC)).total_seconds()
                if left > 0:
                    seconds = min(seconds, left)
                elif not allow_renewal:
                    return
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await revoked.wait()

    async def _is_valid(self, scope: Scope, principal: Principal) -> bool:
        try:
            return await self._sign_in(HTTPConnection(dict(scope))) == principal
        except ApiError as error:
            return error.status != 401  # a check that is not possible now proves nothing


async def wait_until_signed_out(scope: Scope, *, allow_renewal: bool = False) -> None:
    """Return once the caller's credential is revoked or has expired; never for what is open to all.

    `renewable`: what the caller has open cannot be continued by another request, so a proxy's word is good for all of
    it.
    """
    signed_in_: AuthenticationMiddleware | None = scope.get("authentication")
    if signed_in_ is None:
        await asyncio.Event().wait()
    else:
        await signed_in_.wait_until_invalid(scope, allow_renewal=allow_renewal)


@asynccontextmanager
async def timeout_while_authenticated(request: HTTPConnection, seconds: float) -> AsyncIterator[None]:
    """Give the block this many seconds, as asyncio.timeout does, and end it with the caller's credential.

    Raises:
        TimeoutError: the time is over.
        ApiError: 401, the credential is revoked or has expired.
    """
    invalid = False

    async def watch(limit: asyncio.Timeout) -> None:
        nonlocal invalid
        await wait_until_signed_out(request.scope)
        invalid = True  # in one step with what follows: the block cannot have ended in between
        limit.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(seconds) as limit:
            watching = asyncio.create_task(watch(limit), name="sign-in-watch")
            try:
                yield
            finally:
                watching.cancel()
    except TimeoutError:
        if invalid:
            raise ApiError(401, "invalid_credentials", "The credentials became invalid during the request.") from None
        raise


def get_principal(request: Request) -> Principal:
    """Return who asks; perhaps somebody who has not said who they are, if that is allowed at all."""
    found: Principal = request.scope["principal"]
    return found


def require_user_id(request: Request) -> str:
    """Return the id of the user who asks.

    Raises:
        ApiError: 401, when they have not said who they are.
    """
    user_id = get_principal(request).user_id
    if user_id is None:
        raise ApiError(401, "authentication_required", "Say who you are: this needs more than what everybody may see.")
    return user_id


def get_actor(request: Request) -> str:
    """Return who asks, as events name it.

    Raises:
        ApiError: 401.
    """
    return f"user:{require_user_id(request)}"


def resolve_owner(request: Request, requested_user_id: str | None) -> str:
    """Return whose a new job or batch is: the caller's own, or, for an admin, that of whom the body names.

    Raises:
        ApiError: 401, 403, or 422 when nobody can be called that.
    """
    mine = require_user_id(request)
    if requested_user_id is not None and requested_user_id != mine and not get_principal(request).is_admin:
        raise ApiError(403, "forbidden", "`user_id` can only be your own: to submit for others is for admins.")
    try:
        return parse_user_name(requested_user_id or mine)
    except ValueError as error:
        raise ApiError(422, "invalid_content", f"user_id: {error}") from error


def resolve_teams(request: Request, user_id: str, get_groups: Callable[[str], Collection[str]]) -> Collection[str]:
    """Return the groups of the user that something is submitted for, as far as they are known.

    An admin who submits for somebody else gives it none of their own: its team may read it.
    """
    principal = get_principal(request)
    return principal.groups if user_id == principal.user_id else get_groups(user_id)


def can_read(request: Request, document: Document) -> bool:
    """Return whether who asks may see what a view's document belongs to: `user_id`, `access_control`, `teams`."""
    return _right(get_principal(request), document) >= AccessLevel.READ


def viewer_for(request: Request, document: Document) -> Viewer:
    """Return who asks, with their right to what a view's document belongs to."""
    principal = get_principal(request)
    return Viewer(principal, _right(principal, document))


def _right(principal: Principal, document: Document) -> AccessLevel:
    return get_access_level(
        principal, owner=document["user_id"], access=document["access_control"], teams=document["teams"]
    )


def get_state_right(principal: Principal, state: Job | Batch) -> AccessLevel:
    """Return what a principal may do with a job or batch, as the log has it."""
    asked = state.spec
    access = asked.access_control.model_dump()
    return get_access_level(principal, owner=asked.user_id, access=access, teams=asked.teams)


def require_right(request: Request, right: AccessLevel, *, not_found_error: ApiError) -> Callable[[StreamState], None]:
    """Return the check of a command: the job or batch is there, and who asks has this right to it.

    The check raises `missing` when they may not even see it, and 403 (401, if they have not said who they are) when
    they may.
    """
    principal = get_principal(request)

    def check(stream_state: StreamState) -> None:
        state = stream_state.state
        if not isinstance(state, Job | Batch) or state.deleted:
            raise not_found_error
        has = get_state_right(principal, state)
        if has < AccessLevel.READ:
            raise not_found_error
        if has < right:
            require_user_id(request)
            raise ApiError(403, "forbidden", f"You may see this, but not do that: it needs the right {_NAMES[right]}.")

    return check


_NAMES = {AccessLevel.READ: "read_access", AccessLevel.WRITE: "write_access", AccessLevel.ADMIN: "admin_access"}


def require_monitor_role(request: Request) -> None:
    """Check that the caller may read statistics and metrics of the whole ledger.

    Raises:
        ApiError: 401, 403.
    """
    if not get_principal(request).roles & {"admin", "monitor"}:
        require_user_id(request)
        raise ApiError(403, "forbidden", "Forbidden: statistics require the role `monitor` or `admin`.")
