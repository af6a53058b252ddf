"""cli: the settings of how one signs in, checked."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

from jobledger.api.auth.jwks import MIN_SECRET_BYTES


class SettingsSection(BaseModel):
    """A section of config.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _keys_address(url: str) -> str:
    parts = urlsplit(url)
    safe = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
    if not safe or not parts.hostname:
        raise ValueError(
            "expected an address that begins with https:// (http:// on this machine only): who can change the keys on "
            "their way here is whoever they like"
        )
    return url


def validate_network(text: str) -> str:
    """Return the text of an address or a network.

    Raises:
        ValueError: it is neither, or everybody.
    """
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"expected an address or a network like 10.1.0.0/16: {error}") from None
    if network.prefixlen == 0:
        raise ValueError("this trusts everybody; name the addresses of your proxy")
    return text


def _header_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,100}", text):
        raise ValueError("expected the name of a header, such as X-Forwarded-User")
    return text


def validate_secret_length(secret: SecretStr) -> SecretStr:
    """Return a secret for tokens, if it cannot be guessed.

    Raises:
        ValueError: it is too short.
    """
    if len(secret.get_secret_value().encode()) < MIN_SECRET_BYTES:
        raise ValueError(
            f"a secret for tokens has at least {MIN_SECRET_BYTES} bytes, such as `openssl rand -base64 48` makes"
        )
    return secret


class JwtSettings(SettingsSection):
    secret: Annotated[SecretStr, AfterValidator(validate_secret_length)] | None = None
    secret_file: Path | None = None
    public_key_file: Path | None = None
    jwks_url: Annotated[str, AfterValidator(_keys_address)] | None = None
    issuer: str | None = Field(None, min_length=1)
    audience: str | None = Field(None, min_length=1)
    leeway_seconds: float = Field(30, ge=0, le=600)
    user_claim: str = Field("sub", min_length=1)
    groups_claim: str = Field("groups", min_length=1)
    roles_claim: str = Field("roles", min_length=1)


class ProxySettings(SettingsSection):
    trusted: list[Annotated[str, AfterValidator(validate_network)]] = []
    user_header: Annotated[str, AfterValidator(_header_name)] = "X-Forwarded-User"
    groups_header: Annotated[str, AfterValidator(_header_name)] | None = None
    roles_header: Annotated[str, AfterValidator(_header_name)] | None = None


class AuthSettings(SettingsSection):
    mode: Literal["open", "keys", "jwt", "proxy"] = "open"
    anonymous_read: bool = False
    admins: list[str] = []
    monitors: list[str] = []
    jwt: JwtSettings = JwtSettings()
    proxy: ProxySettings = ProxySettings()

    @model_validator(mode="after")
    def _fits_together(self) -> AuthSettings:
        """Whoever has set something that is not in force may believe that it is."""
        applies = {
            "jwt": self.mode == "jwt",
            "proxy": self.mode == "proxy",
            "admins": self.mode in ("jwt", "proxy"),
            "monitors": self.mode in ("jwt", "proxy"),
            "anonymous_read": self.mode != "open",
        }
        for key, applied in applies.items():
            if not applied and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"`{key}` is set, which means nothing with mode `{self.mode}`; {_INSTEAD[key]}")
        ways = ("secret", "secret_file", "public_key_file", "jwks_url")
        given = [f"jwt.{name}" for name in ways if getattr(self.jwt, name) is not None]
        if self.mode == "jwt" and len(given) != 1:
            raise ValueError(
                f"mode `jwt` needs one of jwt.secret_file, jwt.public_key_file and jwt.jwks_url to verify tokens with; "
                f"given are: {', '.join(given) or 'none'}"
            )
        if self.mode == "proxy" and not self.proxy.trusted:
            raise ValueError("mode `proxy` needs the addresses of the proxy in proxy.trusted: nobody else is believed")
        return self


_INSTEAD = {
    "jwt": "set mode to `jwt`, or leave it out",
    "proxy": "set mode to `proxy`, or leave it out",
    "admins": "keys have roles of their own (`jobledger keys create --role admin`), and with `open` everybody is admin",
    "monitors": "keys have roles of their own (`jobledger keys create --role monitor`)",
    "anonymous_read": "with `open` nobody is anonymous",
}
