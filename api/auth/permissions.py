"""Authentication of requests, and authorization for jobs and batches.

A principal without read access gets 404, as for a resource that does not exist. A principal with read access that may
not perform the action gets 403.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from jobledger.api.auth.redaction import FieldRule, Viewer, find_hidden_filters
from jobledger.api.http.errors import ApiError
from jobledger.api.http.origins import SIGN_IN_PATHS
from jobledger.ledger.domain.access import AccessLevel, Principal, get_access_level, parse_user_name
from jobledger.ledger.domain.batch import Batch
from jobledger.ledger.domain.job import Job
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import StreamState

PUBLIC_PATHS = frozenset({"/healthz", "/readyz", "/api/openapi.json", "/api/docs", *SIGN_IN_PATHS})
"""Paths that need no authentication: they show nothing of any job."""
_PUBLIC_PREFIX = "/monitoring/events/static/"
_RECHECK_SECONDS: Final = 30.0
"""Interval after which the credential of an open request is checked again without a notification, for example because
the clock was changed."""


class AuthBackend(Protocol):
    """Authenticates requests."""

    async def __call__(self, connection: HTTPConnection) -> Principal:
        """Return the principal of a request.

        Raises:
            ApiError: 401, the credentials are missing or wrong; 503, they cannot be checked now.
        """


class SingleUserBackend:
    """Treats each client as one user with the role admin. For a single user on one machine."""

    def __init__(self, user_id: str) -> None:
        self._principal = Principal(user_id, roles=frozenset({"admin"}))

    async def __call__(self, connection: HTTPConnection) -> Principal:
        return self._principal


class RevocationNotifier:
    """Notifies open requests that credentials may have been revoked."""

    def __init__(self) -> None:
        self.next_event = asyncio.Event()
        """The event that the next call of notify() sets."""

    def notify(self) -> None:
        """Make all open requests check their credentials again."""
        self.next_event.set()
        self.next_event = asyncio.Event()


class AuthenticationMiddleware:
    """Authenticates each request before it reaches a route, except for public paths.

    If the authentication fails, `on_error` returns the response: an error, or a redirect to the sign-in page. Decision
    70 gives the reasons why this is not Starlette's class.
    """

    def __init__(
        self,
        app: ASGIApp,
        auth_backend: AuthBackend,
        revocation_notifier: RevocationNotifier,
        on_error: Callable[[Scope, ApiError], ASGIApp],
    ) -> None:
        self._app = app
        self._auth_backend = auth_backend
        self._revocation_notifier = revocation_notifier
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] not in PUBLIC_PATHS and not scope["path"].startswith(_PUBLIC_PREFIX):
                principal = scope["principal"] = await self._auth_backend(HTTPConnection(scope))
                scope["authentication"] = self
                if principal.user_id is not None and (on_accepted := scope.get("on_credentials_accepted")) is not None:
                    on_accepted()  # before the response, which may take a minute
        except ApiError as error:
            scope["are_credentials_rejected"] = error.status == 401  # the response may be a redirect
            await self._on_error(scope, error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def wait_until_invalid(self, scope: Scope, *, allow_renewal: bool) -> None:
        """Return when the credential of a request is revoked or has expired, as wait_until_signed_out().

        The loop takes the event of the next notification before it checks the credential, so that it misses no
        notification after the check.
        """
        principal: Principal = scope["principal"]
        while True:
            notification = self._revocation_notifier.next_event
            if not await self._is_valid(scope, principal):
                return
            seconds = _RECHECK_SECONDS
            if principal.valid_until is not None:
                remaining = (principal.valid_until - datetime.now(UTC)).total_seconds()
                if remaining > 0:
                    seconds = min(seconds, remaining)
                elif not allow_renewal:
                    return
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await notification.wait()

    async def _is_valid(self, scope: Scope, principal: Principal) -> bool:
        try:
            return await self._auth_backend(HTTPConnection(dict(scope))) == principal
        except ApiError as error:
            return error.status != 401  # a check that fails does not prove that the credential is invalid


def get_principal(request: Request) -> Principal:
    """Return the principal of a request."""
    principal: Principal = request.scope["principal"]
    return principal


def require_user_id(request: Request) -> str:
    """Return the user ID of the principal.

    Raises:
        ApiError: 401, the principal is anonymous.
    """
    user_id = get_principal(request).user_id
    if user_id is None:
        raise ApiError(401, "authentication_required", "Authentication required.")
    return user_id


def get_actor(request: Request) -> str:
    """Return the principal in the format of the events' `actor`.

    Raises:
        ApiError: 401, the principal is anonymous.
    """
    return f"user:{require_user_id(request)}"


def resolve_owner(request: Request, requested_user_id: str | None) -> str:
    """Return the owner of a new job or batch: the principal, or the user that an admin names in the body.

    Raises:
        ApiError: 401, the principal is anonymous; 403, the principal is no admin; 422, the user ID is invalid.
    """
    own_user_id = require_user_id(request)
    if requested_user_id is not None and requested_user_id != own_user_id and not get_principal(request).is_admin:
        raise ApiError(403, "forbidden", "Forbidden: only admins may submit for another `user_id`.")
    try:
        return parse_user_name(requested_user_id or own_user_id)
    except ValueError as error:
        raise ApiError(422, "invalid_content", f"user_id: {error}") from error


def resolve_teams(request: Request, user_id: str, get_groups: Callable[[str], Collection[str]]) -> Collection[str]:
    """Return the groups of the user that a job or batch is submitted for, as far as they are known.

    Teams may read a job. An admin who submits for another user therefore does not add their own groups.
    """
    principal = get_principal(request)
    return principal.groups if user_id == principal.user_id else get_groups(user_id)


def get_viewer(request: Request, document: Document) -> Viewer:
    """Return the principal with their access level to a job or batch.

    The document has the `user_id`, `access_control` and `teams` of the job or batch.
    """
    principal = get_principal(request)
    owner, access, teams = document["user_id"], document["access_control"], document["teams"]
    return Viewer(principal, get_access_level(principal, owner=owner, access=access, teams=teams))


def can_read(request: Request, document: Document) -> bool:
    """Return whether the principal may read a job or batch. The document is as for get_viewer()."""
    return get_viewer(request, document).access_level >= AccessLevel.READ


def require_access(request: Request, level: AccessLevel, *, not_found_error: ApiError) -> Callable[[StreamState], None]:
    """Return a check for a command: the job or batch exists, and the principal has this access level.

    The returned check raises `not_found_error` if the principal may not read it. If the principal may read it but lacks
    the access level, it raises ApiError 403, or 401 for an anonymous principal.
    """
    principal = get_principal(request)

    def check(stream_state: StreamState) -> None:
        aggregate = stream_state.aggregate
        if not isinstance(aggregate, Job | Batch) or aggregate.is_deleted:
            raise not_found_error
        spec = aggregate.spec
        access = spec.access_control.model_dump()
        granted = get_access_level(principal, owner=spec.user_id, access=access, teams=spec.teams)
        if granted < AccessLevel.READ:
            raise not_found_error
        if granted < level:
            require_user_id(request)
            raise ApiError(403, "forbidden", f"Forbidden: this action requires {level.name.lower()}_access.")

    return check


def check_filters(
    filters: Mapping[str, Any], rules: Mapping[str, FieldRule], *, has_full_access: bool, required: str
) -> None:
    """Check that no filter of a list compares a field that is hidden from the caller.

    Args:
        filters: The value of each filter; None is no filter.
        rules: The redaction rules of the listed documents, such as JOB_FIELD_RULES.
        has_full_access: Whether the caller sees all fields of all documents that the list may contain.
        required: What the caller lacks otherwise, for the message.

    Raises:
        ApiError: 403, a filter compares a hidden field.
    """
    hidden = find_hidden_filters((name for name, value in filters.items() if value is not None), rules)
    if hidden and not has_full_access:
        raise ApiError(403, "forbidden", f"Forbidden: the filter `{hidden[0]}` requires {required}.")


def has_monitor_role(request: Request) -> bool:
    """Return whether the principal may read statistics and metrics of the whole ledger."""
    return bool(get_principal(request).roles & {"admin", "monitor"})


def require_monitor_role(request: Request) -> None:
    """Check that the principal may read statistics and metrics of the whole ledger.

    Raises:
        ApiError: 401, the principal is anonymous; 403, the role is missing.
    """
    if not has_monitor_role(request):
        require_user_id(request)
        raise ApiError(403, "forbidden", "Forbidden: statistics require the role `monitor` or `admin`.")
