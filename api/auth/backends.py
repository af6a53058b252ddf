"""api: how somebody proves who they are: by an API key, a JSON Web Token, or the word of a proxy that we trust.

Wrong credentials are always 401, in the same words whatever is wrong with them; what it was is in the log.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import jwt
import structlog
from starlette.requests import HTTPConnection

from jobledger.api.auth.api_keys import ApiKey, ApiKeyCache, ApiKeyToken
from jobledger.api.auth.jwks import KeySource
from jobledger.api.http.errors import ApiError
from jobledger.ledger.domain.access import Principal, parse_group_name, parse_user_name

_log = structlog.get_logger()
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_ROLES: Final = frozenset({"admin", "monitor"})
_PROXY_TRUST: Final = timedelta(seconds=70)
"""How long a live stream may go on before the proxy has to say again who it is: it reports no sign-out. Longer than the
longest `Prefer: wait`, which would otherwise end as unauthorized."""


class _InvalidCredentials(Exception):
    """These credentials prove nothing; the message is for our log, and never holds them."""


@dataclass(frozen=True, slots=True)
class RoleGrants:
    """Users and groups (with their prefix) that have a role, whatever their credentials say of it."""

    admins: frozenset[str] = frozenset()
    monitors: frozenset[str] = frozenset()

    def build_principal(self, user_id: str, groups: Iterable[str], roles: Iterable[str]) -> Principal:
        """Return who that is. Blank groups and roles that mean nothing here are passed over.

        Raises:
            ValueError: a name that cannot be one.
        """
        known = Principal(
            parse_user_name(user_id), frozenset(parse_group_name(group) for group in groups if group.strip())
        )
        granted = {"admin": self.admins, "monitor": self.monitors}
        held = {role for role, names in granted.items() if not names.isdisjoint(known.identities)}
        return Principal(known.user_id, known.groups, frozenset(held | (_ROLES & set(roles))))


def _anonymous_or_401(connection: HTTPConnection, *, anonymous_read: bool, how: str) -> Principal:
    """Return who comes without credentials: somebody who may read what is public, if that is allowed.

    Raises:
        ApiError: 401.
    """
    if anonymous_read and connection.scope.get("method") in ("GET", "HEAD"):
        return Principal(None)
    raise ApiError(401, "authentication_required", f"Say who you are: {how}.")


def _refusal(why: object) -> ApiError:
    _log.info("authentication failed", reason=str(why))
    return ApiError(401, "invalid_credentials", "These credentials are not valid, or not any more.")


def _bearer(connection: HTTPConnection) -> str | None:
    """Return what is sent as `Authorization: Bearer`; None if there is no such header.

    Raises:
        _Wrong: it is something else.
    """
    sent = connection.headers.getlist("authorization")
    if not sent:
        return None
    scheme, _, token = sent[0].partition(" ")
    if len(sent) > 1 or scheme.lower() != "bearer":
        raise _InvalidCredentials("expected one header Authorization: Bearer")
    return token.strip()


class ApiKeyBackend:
    """By an API key that `jobledger keys create` has made. `now` is the time of day."""

    def __init__(self, keys: ApiKeyCache, *, now: Callable[[], datetime], anonymous_read: bool) -> None:
        self._ring = keys
        self._now = now
        self._anonymous_public = anonymous_read

    async def __call__(self, connection: HTTPConnection) -> Principal:
        try:
            sent = _bearer(connection)
            if sent is not None:
                return self._holder(sent)
        except _InvalidCredentials as wrong:
            raise _refusal(wrong) from None
        how = "send an API key in the header Authorization: Bearer"
        return _anonymous_or_401(connection, anonymous_read=self._anonymous_public, how=how)

    def _holder(self, sent: str) -> Principal:
        text = ApiKeyToken.parse(sent)
        if text is None:
            raise _InvalidCredentials("it does not look like an API key")
        key = self._ring.authenticate(text, self._now())
        if key is None:
            raise _InvalidCredentials(f"API key {text.key_id} is unknown, revoked, expired, or its secret is wrong")
        return _holder(key)

    def get_key_holder(self, key_id: str) -> Principal | None:
        """Return the holder of a key by the key's ID; None if it is revoked or has expired."""
        key = self._ring.get_valid(key_id, self._now())
        return None if key is None else _holder(key)

    def get_groups(self, user_id: str) -> frozenset[str]:
        """Return the groups that a user is in, by their keys."""
        return self._ring.get_groups(user_id, self._now())


def _holder(key: ApiKey) -> Principal:
    return Principal(key.user_id, frozenset(key.groups), frozenset(key.roles), key.expires_at)


@dataclass(frozen=True, slots=True)
class JwtOptions:
    """What a token must say, and where it says who somebody is. A claim within others: `realm_access.roles`."""

    issuer: str | None
    audience: str | None
    leeway_seconds: float
    user_claim: str
    groups_claim: str
    roles_claim: str


class JwtBackend:
    """By a JSON Web Token (RFC 7519) that somebody else has issued."""

    def __init__(self, keys: KeySource, options: JwtOptions, grants: RoleGrants, *, anonymous_read: bool) -> None:
        self._keys = keys
        self._rules = options
        self._grants = grants
        self._anonymous_public = anonymous_read

    async def __call__(self, connection: HTTPConnection) -> Principal:
        try:
            sent = _bearer(connection)
            if sent is not None:
                return self._subject(await self._claims(sent))
        except (_InvalidCredentials, jwt.PyJWTError, ValueError) as wrong:
            raise _refusal(wrong) from None
        how = "send a token in the header Authorization: Bearer"
        return _anonymous_or_401(connection, anonymous_read=self._anonymous_public, how=how)

    async def _claims(self, token: str) -> Mapping[str, Any]:
        key = await self._keys.get_key(jwt.get_unverified_header(token).get("kid"))
        if key is None:
            raise _InvalidCredentials("nobody knows the key that the token was signed with")
        claims: dict[str, Any] = jwt.decode(
            token,
            key.key,
            algorithms=[key.algorithm],
            audience=self._rules.audience,
            issuer=self._rules.issuer,
            leeway=self._rules.leeway_seconds,
            options={"require": ["exp"]},
        )
        return claims

    def _subject(self, claims: Mapping[str, Any]) -> Principal:
        rules = self._rules
        user_id = _claim(claims, rules.user_claim)
        if not isinstance(user_id, str):
            raise _InvalidCredentials(f"the claim {rules.user_claim} is missing, or no text")
        known = self._grants.build_principal(
            user_id, _names(claims, rules.groups_claim), _names(claims, rules.roles_claim)
        )
        try:
            until = datetime.fromtimestamp(float(claims["exp"]) + rules.leeway_seconds, UTC)
        except (OverflowError, ValueError, OSError):
            until = None  # beyond the calendar
        return replace(known, valid_until=until)


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    if name in claims:  # names of claims are often addresses, with dots in them
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _names(claims: Mapping[str, Any], name: str) -> list[str]:
    """Return a list of names; one alone may also be written as text."""
    found = _claim(claims, name)
    if found is None:
        return []
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not all(isinstance(it, str) for it in names):
        raise _InvalidCredentials(f"the claim {name} is no list of names")
    return names


@dataclass(frozen=True, slots=True)
class ProxyHeaders:
    """Where a proxy says who it is; groups and roles are separated by commas. None: it does not say that."""

    user: str
    groups: str | None
    roles: str | None


class ProxyBackend:
    """By the word of a proxy that has signed somebody in. Only what comes from a trusted address is believed."""

    def __init__(
        self, trusted: Collection[Network], headers: ProxyHeaders, grants: RoleGrants, *, anonymous_read: bool
    ) -> None:
        self._trusted = tuple(trusted)
        self._headers = headers
        self._grants = grants
        self._anonymous_public = anonymous_read

    async def __call__(self, connection: HTTPConnection) -> Principal:
        try:
            if not self._trusts(connection):
                raise _InvalidCredentials("the connection comes from no address in auth.proxy.trusted")
            user_id = _header(connection, self._headers.user)
            groups = _header(connection, self._headers.groups) or ""
            roles = _header(connection, self._headers.roles) or ""
            if user_id is not None:
                known = self._grants.build_principal(
                    user_id, map(str.strip, groups.split(",")), map(str.strip, roles.split(","))
                )
                return replace(known, valid_until=datetime.now(UTC) + _PROXY_TRUST)
        except (_InvalidCredentials, ValueError) as wrong:
            raise _refusal(wrong) from None
        return _anonymous_or_401(
            connection, anonymous_read=self._anonymous_public, how="sign in where you came through"
        )

    def _trusts(self, connection: HTTPConnection) -> bool:
        if connection.client is None:
            return False
        address = ipaddress.ip_address(connection.client.host)
        mapped = getattr(address, "ipv4_mapped", None)  # how IPv4 looks to who listens on IPv6
        return any((mapped or address) in network for network in self._trusted)


def _header(connection: HTTPConnection, name: str | None) -> str | None:
    """Return a header's value. One that is there twice was perhaps sent by the client, and only added to by the proxy.

    Raises:
        _Wrong: it is there twice.
        ValueError: it is not UTF-8.
    """
    sent = [] if name is None else connection.headers.getlist(name)
    if len(sent) > 1:
        raise _InvalidCredentials(f"the header {name} is there more than once")
    return sent[0].encode("latin-1").decode() if sent else None
