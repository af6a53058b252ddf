"""api: who asks, and whether they may. Every route that shows or changes a job or batch asks here.

Unknown and forbidden look alike to who may not read: 404. Who may read but not do that gets 403.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import ApiError, error_response
from ledger.access import Principal, Right, right_to, user_named
from ledger.batch import Batch
from ledger.handle import Known
from ledger.job import Job
from ledger.mongo import Document

OPEN_TO_ALL = frozenset({"/healthz", "/readyz", "/api/openapi.json", "/api/docs", "/monitoring/events/sign-in"})
"""Addresses that say nothing about anybody's jobs."""
_OPEN_FOLDER = "/monitoring/events/static/"


class SignIn(Protocol):
    """Finds out who asks."""

    async def __call__(self, connection: HTTPConnection) -> Principal:
        """Return who it is.

        Raises:
            ApiError: 401, when they do not say, or what they say is wrong.
        """


class OpenSignIn:
    """One person on one machine: whoever reaches us is that person, and may do everything."""

    def __init__(self, user_id: str) -> None:
        self._principal = Principal(user_id, roles=frozenset({"admin"}))

    async def __call__(self, connection: HTTPConnection) -> Principal:
        return self._principal


def _as_error(scope: Scope, error: ApiError) -> ASGIApp:
    return error_response(error)


class SignedIn:
    """Middleware: no request gets to a route before it is known who asks.

    `refused` makes the answer for who cannot be let in: for a program an error, for a person at a page the sign-in.
    """

    def __init__(
        self, app: ASGIApp, sign_in: SignIn, refused: Callable[[Scope, ApiError], ASGIApp] = _as_error
    ) -> None:
        self._app = app
        self._sign_in = sign_in
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] not in OPEN_TO_ALL and not scope["path"].startswith(_OPEN_FOLDER):
                scope["principal"] = await self._sign_in(HTTPConnection(scope))
        except ApiError as error:
            await self._refused(scope, error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def who_asks(request: Request) -> Principal:
    """Return who asks; perhaps somebody who has not said who they are, if that is allowed at all."""
    found: Principal = request.scope["principal"]
    return found


def signed_in(request: Request) -> str:
    """Return the id of the user who asks.

    Raises:
        ApiError: 401, when they have not said who they are.
    """
    user_id = who_asks(request).user_id
    if user_id is None:
        raise ApiError(401, "not_signed_in", "Say who you are: this needs more than what everybody may see.")
    return user_id


def actor(request: Request) -> str:
    """Return who asks, as events name it.

    Raises:
        ApiError: 401.
    """
    return f"user:{signed_in(request)}"


def for_user(request: Request, asked: str | None) -> str:
    """Return whose a new job or batch is: the caller's own, or, for an admin, that of whom the body names.

    Raises:
        ApiError: 401, 403, or 422 when nobody can be called that.
    """
    mine = signed_in(request)
    if asked is not None and asked != mine and not who_asks(request).sees_everything:
        raise ApiError(403, "forbidden", "`user_id` can only be your own: to submit for others is for admins.")
    try:
        return user_named(asked or mine)
    except ValueError as error:
        raise ApiError(422, "invalid_content", f"user_id: {error}") from error


def may_see(request: Request, document: Document) -> bool:
    """Return whether who asks may see what a view's document belongs to: `user_id`, `access_control`, `teams`."""
    return _right(who_asks(request), document) >= Right.READ


def _right(principal: Principal, document: Document) -> Right:
    return right_to(principal, owner=document["user_id"], access=document["access_control"], teams=document["teams"])


def right_to_state(principal: Principal, state: Job | Batch) -> Right:
    """Return what a principal may do with a job or batch, as the log has it."""
    asked = state.asked
    access = asked.access_control.model_dump()
    return right_to(principal, owner=asked.user_id, access=access, teams=asked.teams)


def requires(request: Request, right: Right, *, missing: ApiError) -> Callable[[Known], None]:
    """Return the check of a command: the job or batch is there, and who asks has this right to it.

    The check raises `missing` when they may not even see it, and 403 (401, if they have not said who they are) when
    they may.
    """
    principal = who_asks(request)

    def check(known: Known) -> None:
        state = known.state
        if not isinstance(state, Job | Batch) or state.deleted:
            raise missing
        has = right_to_state(principal, state)
        if has < Right.READ:
            raise missing
        if has < right:
            signed_in(request)
            raise ApiError(403, "forbidden", f"You may see this, but not do that: it needs the right {_NAMES[right]}.")

    return check


_NAMES = {Right.READ: "read_access", Right.WRITE: "write_access", Right.ADMIN: "admin_access"}
