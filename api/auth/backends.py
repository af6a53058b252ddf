"""Authentication backends: API keys, JSON Web Tokens, and headers of a trusted proxy.

Wrong credentials always get the same 401 response. The log has the reason.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import Any, ClassVar, Final

import jwt
import structlog
from starlette.requests import HTTPConnection

from jobledger.api.auth.api_keys import ApiKeyCache, ApiKeyToken
from jobledger.api.auth.jwks import KeySource
from jobledger.api.http.client_address import is_in_networks
from jobledger.api.http.errors import ApiError
from jobledger.api.settings import AuthSettings
from jobledger.ledger.domain.access import Principal, parse_group_name, parse_user_name

_log = structlog.get_logger()
_ROLES: Final = frozenset({"admin", "monitor"})
_PROXY_TRUST: Final = timedelta(seconds=70)
"""How long a live stream continues before the client must authenticate at the proxy again, because the proxy reports no
sign-out. Longer than the maximum of `Prefer: wait`, which would otherwise end with status 401."""


class _InvalidCredentials(Exception):
    """The credentials are not valid. The message is for the log and never holds them."""


class CredentialBackend(ABC):
    """Authenticates requests by credentials in their headers."""

    _instruction: ClassVar[str]
    """How to authenticate, for the error message."""

    def __init__(self, settings: AuthSettings) -> None:
        self._settings = settings

    async def __call__(self, connection: HTTPConnection) -> Principal:
        try:
            principal = await self._authenticate(connection)
        except (_InvalidCredentials, jwt.PyJWTError, ValueError) as error:
            _log.info("authentication failed", reason=str(error))
            raise ApiError(401, "invalid_credentials", "The credentials are invalid, expired or revoked.") from None
        if principal is not None:
            return principal
        if self._settings.anonymous_read and connection.scope.get("method") in ("GET", "HEAD"):
            return Principal(None)
        raise ApiError(401, "authentication_required", f"Authentication required: {self._instruction}.")

    @abstractmethod
    async def _authenticate(self, connection: HTTPConnection) -> Principal | None:
        """Return the principal; None without credentials.

        Raises:
            _InvalidCredentials, PyJWTError, ValueError: The credentials are not valid.
            ApiError: 503, they cannot be checked now.
        """

    def _build_principal(
        self, user_id: str, groups: Iterable[str], roles: Iterable[str], valid_until: datetime | None
    ) -> Principal:
        """Return the principal, with the roles that the settings grant. Blank groups and unknown roles are ignored.

        Raises:
            ValueError: A name is invalid.
        """
        group_names = frozenset(parse_group_name(group) for group in groups if group.strip())
        principal = Principal(parse_user_name(user_id), group_names, valid_until=valid_until)
        names_by_role = {"admin": self._settings.admins, "monitor": self._settings.monitors}
        granted_roles = {role for role, names in names_by_role.items() if not principal.identities.isdisjoint(names)}
        return replace(principal, roles=frozenset(granted_roles | (_ROLES & set(roles))))


def _read_bearer_token(connection: HTTPConnection) -> str | None:
    """Return the token of `Authorization: Bearer`; None without the header.

    Raises:
        _InvalidCredentials: The header has another form.
    """
    values = connection.headers.getlist("authorization")
    if not values:
        return None
    scheme, _, token = values[0].partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer":
        raise _InvalidCredentials("expected one header Authorization: Bearer")
    return token.strip()


class ApiKeyBackend(CredentialBackend):
    """Authenticates by API keys, which `jobledger keys create` creates."""

    _instruction = "send an API key in the header Authorization: Bearer"

    def __init__(self, settings: AuthSettings, keys: ApiKeyCache) -> None:
        super().__init__(settings)
        self.keys = keys

    async def _authenticate(self, connection: HTTPConnection) -> Principal | None:
        token = _read_bearer_token(connection)
        if token is None:
            return None
        key_token = ApiKeyToken.parse(token)
        if key_token is None:
            raise _InvalidCredentials("the token is not an API key")
        key = self.keys.authenticate(key_token)
        if key is None:
            raise _InvalidCredentials(
                f"API key {key_token.key_id} is unknown, revoked, expired, or its secret is wrong"
            )
        return Principal(key.user_id, frozenset(key.groups), frozenset(key.roles), key.expires_at)


class JwtBackend(CredentialBackend):
    """Authenticates by JSON Web Tokens (RFC 7519) of an external issuer."""

    _instruction = "send a token in the header Authorization: Bearer"

    def __init__(self, settings: AuthSettings, keys: KeySource) -> None:
        super().__init__(settings)
        self._keys = keys

    async def _authenticate(self, connection: HTTPConnection) -> Principal | None:
        token = _read_bearer_token(connection)
        return None if token is None else self._read_principal(await self._decode_claims(token))

    async def _decode_claims(self, token: str) -> Mapping[str, Any]:
        key = await self._keys.get_key(jwt.get_unverified_header(token).get("kid"))
        if key is None:
            raise _InvalidCredentials("the signing key of the token is unknown")
        claims: dict[str, Any] = jwt.decode(
            token,
            key.key,
            algorithms=[key.algorithm],
            audience=self._settings.jwt.audience,
            issuer=self._settings.jwt.issuer,
            leeway=self._settings.jwt.leeway_seconds,
            options={"require": ["exp"]},
        )
        return claims

    def _read_principal(self, claims: Mapping[str, Any]) -> Principal:
        settings = self._settings.jwt
        user_id = _read_claim(claims, settings.user_claim)
        if not isinstance(user_id, str):
            raise _InvalidCredentials(f"the claim {settings.user_claim} is missing or not a string")
        try:
            valid_until = datetime.fromtimestamp(float(claims["exp"]) + settings.leeway_seconds, UTC)
        except (OverflowError, ValueError, OSError):
            valid_until = None  # beyond the range of datetime
        return self._build_principal(
            user_id, _read_names(claims, settings.groups_claim), _read_names(claims, settings.roles_claim), valid_until
        )


def _read_claim(claims: Mapping[str, Any], name: str) -> Any:
    if name in claims:  # claim names are often URLs, which contain dots
        return claims[name]
    value: Any = claims
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _read_names(claims: Mapping[str, Any], name: str) -> list[str]:
    """Return a claim as a list of names. A single name may be a string."""
    value = _read_claim(claims, name)
    if value is None:
        return []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
        raise _InvalidCredentials(f"the claim {name} is not a list of strings")
    return names


class ProxyBackend(CredentialBackend):
    """Authenticates by headers of a proxy that has authenticated the user. Only trusted addresses may send them."""

    _instruction = "sign in at the proxy"

    def __init__(self, settings: AuthSettings) -> None:
        super().__init__(settings)
        self._trusted = [ip_network(network) for network in settings.proxy.trusted]

    async def _authenticate(self, connection: HTTPConnection) -> Principal | None:
        if connection.client is None or not is_in_networks(connection.client.host, self._trusted):
            raise _InvalidCredentials("the connection does not come from an address in auth.proxy.trusted")
        user_id = _read_header(connection, self._settings.proxy.user_header)
        if user_id is None:
            return None
        groups, roles = (
            map(str.strip, (_read_header(connection, name) or "").split(","))
            for name in (self._settings.proxy.groups_header, self._settings.proxy.roles_header)
        )
        return self._build_principal(user_id, groups, roles, datetime.now(UTC) + _PROXY_TRUST)


def _read_header(connection: HTTPConnection, name: str | None) -> str | None:
    """Return a header's value. If there are two, the client may have sent one and the proxy may have added the other.

    Raises:
        _InvalidCredentials: The header was sent several times.
        ValueError: The value is not UTF-8.
    """
    values = [] if name is None else connection.headers.getlist(name)
    if len(values) > 1:
        raise _InvalidCredentials(f"the header {name} was sent {len(values)} times")
    return values[0].encode("latin-1").decode() if values else None
