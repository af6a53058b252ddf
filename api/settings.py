"""Settings of the API and of authentication: the sections `api` and `auth` of config.yaml."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, model_validator

from jobledger.ledger.system.settings_section import SettingsSection

_MIN_SECRET_BYTES: Final = 32
"""RFC 7518, 3.2: a secret for HS256 must be at least as long as the output of SHA-256."""


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_jwks_url(url: str) -> str:
    parts = urlsplit(url)
    is_secure = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
    if not is_secure or not parts.hostname:
        raise ValueError(
            "expected a URL that starts with https:// (http:// only on this machine), because anyone who can modify "
            "the keys in transit can impersonate any user"
        )
    return url


def _validate_network(text: str) -> str:
    """Return an IP address or network unchanged.

    Raises:
        ValueError: It is neither, or contains all addresses.
    """
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"expected an IP address or a network such as 10.1.0.0/16: {error}") from None
    if network.prefixlen == 0:
        raise ValueError("this network contains all addresses: use the address of your proxy")
    return text


def _check_header_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,100}", text):
        raise ValueError("expected a header name such as X-Forwarded-User")
    return text


def validate_secret_length(secret: SecretStr) -> SecretStr:
    """Return a JWT secret unchanged.

    Raises:
        ValueError: It is so short that it could be guessed.
    """
    if len(secret.get_secret_value().encode()) < _MIN_SECRET_BYTES:
        raise ValueError(
            f"a JWT secret must have at least {_MIN_SECRET_BYTES} bytes: generate one with `openssl rand -base64 48`"
        )
    return secret


class JwtSettings(SettingsSection):
    secret: Annotated[SecretStr, AfterValidator(validate_secret_length)] | None = None
    secret_file: Path | None = None
    public_key_file: Path | None = None
    jwks_url: Annotated[str, AfterValidator(_check_jwks_url)] | None = None
    issuer: str | None = Field(None, min_length=1)
    audience: str | None = Field(None, min_length=1)
    leeway_seconds: float = Field(30, ge=0, le=600)
    user_claim: str = Field("sub", min_length=1)
    groups_claim: str = Field("groups", min_length=1)
    roles_claim: str = Field("roles", min_length=1)


class ProxySettings(SettingsSection):
    trusted: list[Annotated[str, AfterValidator(_validate_network)]] = Field([])
    user_header: Annotated[str, AfterValidator(_check_header_name)] = "X-Forwarded-User"
    groups_header: Annotated[str, AfterValidator(_check_header_name)] | None = None
    roles_header: Annotated[str, AfterValidator(_check_header_name)] | None = None


_RESTRICTED_KEYS: Final = {
    "jwt": ({"jwt"}, "set mode to `jwt`, or remove it"),
    "proxy": ({"proxy"}, "set mode to `proxy`, or remove it"),
    "admins": (
        {"jwt", "proxy"},
        "API keys have roles (`jobledger keys create --role admin`), and with `open` every user is admin",
    ),
    "monitors": ({"jwt", "proxy"}, "API keys have roles (`jobledger keys create --role monitor`)"),
    "anonymous_read": ({"keys", "jwt", "proxy"}, "with `open` every client has full access"),
}
"""Keys that have no effect in some modes: the modes that use them, and what to do instead in others."""


class AuthSettings(SettingsSection):
    mode: Literal["open", "keys", "jwt", "proxy"] = "open"
    anonymous_read: bool = False
    admins: list[str] = Field([])
    monitors: list[str] = Field([])
    jwt: JwtSettings = JwtSettings()
    proxy: ProxySettings = ProxySettings()

    @model_validator(mode="after")
    def _check_consistency(self) -> AuthSettings:
        """Reject settings that have no effect: an operator may rely on them."""
        for key, (modes, remedy) in _RESTRICTED_KEYS.items():
            if self.mode not in modes and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"`{key}` has no effect with mode `{self.mode}`: {remedy}")
        sources = ("secret", "secret_file", "public_key_file", "jwks_url")
        configured = [f"jwt.{name}" for name in sources if getattr(self.jwt, name) is not None]
        if self.mode == "jwt" and len(configured) != 1:
            raise ValueError(
                "mode `jwt` requires exactly one of jwt.secret_file, jwt.public_key_file and jwt.jwks_url to verify "
                f"tokens, got: {', '.join(configured) or 'none'}"
            )
        if self.mode == "proxy" and not self.proxy.trusted:
            raise ValueError("mode `proxy` requires the IP addresses of the proxy in proxy.trusted")
        return self


_ROUTE_PREFIXES: Final = frozenset({"api", "monitoring", "metrics", "healthz", "readyz"})


def _check_path_prefix(url: str | None) -> str | None:
    """Reject a path that begins like a route: behind a proxy that strips it, the two could not be distinguished."""
    first = urlsplit(url or "").path.strip("/").partition("/")[0]
    if first in _ROUTE_PREFIXES:
        raise ValueError(f"the path must not begin with /{first}, because routes of the API do: use e.g. /jobs/{first}")
    return url


class ApiSettings(SettingsSection):
    """The section `api`. A limit of 0 means no limit."""

    host: str = "127.0.0.1"
    port: int = Field(5001, ge=0, le=65_535)
    public_url: Annotated[str | None, AfterValidator(_check_path_prefix)] = Field(
        None, pattern=r"^https?://[^/@?#\s]+(/[^?#]*)?$"
    )
    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1024)
    request_memory_mb: int = Field(1024, ge=64, le=1_000_000)
    requests_per_second: float = Field(0, ge=0, le=1_000_000)
    burst: int = Field(50, ge=1, le=1_000_000)
    max_streams_per_user: int = Field(100, ge=0, le=1_000_000)
    max_streams: int = Field(2000, ge=0, le=1_000_000)
    max_connections: int = Field(5000, ge=1, le=1_000_000)
    max_connections_per_address: int = Field(2000, ge=1, le=1_000_000)
    auth_failures_per_minute: int = Field(30, ge=0, le=1_000_000)
    trusted_proxies: list[Annotated[str, AfterValidator(_validate_network)]] = Field([])
    cors_origins: list[Annotated[str, Field(pattern=r"^https?://[^/?#*@\s]+$")]] = Field([])

    @property
    def base_url(self) -> str:
        """`public_url` without a slash at the end; empty without it."""
        return (self.public_url or "").rstrip("/")

    @property
    def is_https(self) -> bool:
        """Whether clients reach the API over HTTPS."""
        return self.base_url.startswith("https://")

    @property
    def session_cookie_name(self) -> str:
        """The name of the session cookie. The prefix `__Host-` protects it, but needs https."""
        return "__Host-jobledger" if self.is_https else "jobledger"
