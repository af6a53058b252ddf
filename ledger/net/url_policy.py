"""Decide which network addresses may be called on behalf of a user. Pure.

The check applies to the address that is connected to, never to the host name alone, which may resolve differently the
next time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final, Literal
from urllib.parse import urlsplit

Address = IPv4Address | IPv6Address

_NAT64 = ip_network("64:ff9b::/96")  # RFC 6052
_NAT64_LOCAL = ip_network("64:ff9b:1::/48")  # RFC 8215
_IPV4_COMPATIBLE = ip_network("::/96")  # RFC 4291, deprecated


_LOWEST_FREE_PORT = 1024
PUBLIC_ONLY_MESSAGE = "only public addresses and those in `webhooks.allowed_private_hosts` are called"

RejectionCode = Literal["BAD_URL", "PORT_REJECTED", "ADDRESS_REJECTED"]


@dataclass(frozen=True, slots=True)
class RejectionReason:
    """Why a URL is not called. `message` is for people: it starts in lower case and has no full stop.

    The operator can allow a rejected address or port, but not a bad URL.
    """

    code: RejectionCode
    message: str


def validate_host_or_network(entry: str) -> str:
    """Return an entry for `AllowedHosts` unchanged.

    Raises:
        ValueError: It is not an IP address, a network or a host name.
    """
    try:
        ip_network(entry, strict=False)
    except ValueError:
        if not re.fullmatch(r"[^\s/:]+", entry):
            raise ValueError(
                f"{entry!r} is not an IP address, a network such as 10.0.0.0/8, or a host name without port"
            ) from None
    return entry


class AllowedHosts:
    """The non-public hosts and networks that the operator allows."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._networks: list[IPv4Network | IPv6Network] = []
        self._names: set[str] = set()
        for entry in entries:
            try:
                self._networks.append(ip_network(entry, strict=False))
            except ValueError:
                self._names.add(_normalize_host(entry))

    def find_address_rejection(self, host: str, address: str) -> str | None:
        """Return why `host` must not be called at `address`; None if it may."""
        real = _unwrap(ip_address(address.partition("%")[0]))
        if _normalize_host(host) in self._names or any(real in network for network in self._networks):
            return None
        return _describe_non_public(real)

    def contains_host(self, host: str) -> bool:
        """Return whether the operator allows this host, or the network of this address."""
        if _normalize_host(host) in self._names:
            return True
        with suppress(ValueError):
            real = _unwrap(ip_address(host.partition("%")[0]))
            return any(real in network for network in self._networks)
        return False


def find_rejection_reason(url: str, allowed: AllowedHosts) -> RejectionReason | None:
    """Return why a webhook to a URL can never be delivered, judged by the URL alone; None if it may be.

    Allowed ports are those of the web and those above the system ports, so that no mail server, for example, is called.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        return RejectionReason("BAD_URL", f"this is not a URL: {error}")
    if parts.scheme not in ("http", "https") or not host:
        return RejectionReason("BAD_URL", "expected a URL that begins with http:// or https:// and has a host")
    if parts.username is not None or parts.password is not None:
        return RejectionReason(
            "BAD_URL",
            "the URL must not contain a user or password, which others can see: send an Authorization header instead",
        )
    if allowed.contains_host(host):
        return None
    if port is not None and port not in (80, 443) and port < _LOWEST_FREE_PORT:
        return RejectionReason(
            "PORT_REJECTED", f"port {port} is not allowed: only 80, 443 and ports from {_LOWEST_FREE_PORT} are"
        )
    with suppress(ValueError):
        if (kind := allowed.find_address_rejection(host, str(ip_address(host.partition("%")[0])))) is not None:
            return RejectionReason("ADDRESS_REJECTED", f"{host} is {kind}; {PUBLIC_ONLY_MESSAGE}")
    return None


_BEGIN: Final = re.compile(r"(?i)(?P<web>https?|ftps?|wss?):(?P<slashes>[/\\]*)|[a-z][a-z0-9+.-]*://")
_HOST_AT_FIRST: Final = re.compile(r"[\w-]+(\.[\w.-]*)?(?P<port>:\d+)?[.,;:!)]*")
_REMOVED_BY_BROWSERS: Final = re.compile(r"[\t\r\n]")
_STRIPPED_BY_BROWSERS: Final = "".join(map(chr, range(0x21)))
USERINFO_MESSAGE: Final = (
    "the URL must not contain a user or password, because it is published: use a URL that needs neither, or one "
    "that expires"
)


def has_userinfo(text: str) -> bool:
    """Return whether a text is a URL with a user name (web or FTP), or with a password (any scheme).

    It reads the text as browsers do (WHATWG URL): slashes may be missing or backslashes, and tabs and line breaks are
    ignored. It also reads it as HTTP clients do: only a slash, `?` or `#` ends the authority, which may contain spaces.
    A URL without a path that is followed by an e-mail address has no user name: `https://a.example, mail b@c.d`.
    """
    return "@" in text and _cut_at_userinfo(text) is not None


def strip_userinfo(url: str) -> str:
    """Return a URL without user name and password. Other texts stay unchanged."""
    cut = _cut_at_userinfo(url) if "@" in url else None
    return url if cut is None else "".join(cut)


def _cut_at_userinfo(text: str) -> tuple[str, str] | None:
    """Return the text before and after the user name and password; None if there are none."""
    plain = _REMOVED_BY_BROWSERS.sub("", text.lstrip(_STRIPPED_BY_BROWSERS))
    begin = _BEGIN.match(plain)
    if begin is None:
        return None
    ends = [end for mark in "/?#" if (end := plain.find(mark, begin.end())) >= 0]
    at = plain.rfind("@", begin.end(), min(ends, default=len(plain)))
    if at < 0:
        return None
    userinfo = plain[begin.end() : at]
    if begin["web"] is None:
        found = ":" in userinfo.partition("@")[0]
    elif not begin["slashes"]:
        found = not any(character.isspace() or character == "\\" for character in userinfo)
    else:
        found = True
    return (begin[0], plain[at + 1 :]) if found and not _is_prose(userinfo) else None


def _is_prose(userinfo: str) -> bool:
    """Return whether the text between `//` and `@` is a host followed by prose, not a user name and password."""
    first, space, _ = userinfo.partition(" ")
    if not space:
        return False
    host = _HOST_AT_FIRST.fullmatch(first)
    if host is not None and (host["port"] or "." in first):
        return True
    return re.search(r":\S", userinfo) is None


def _normalize_host(host: str) -> str:
    return host.rstrip(".").lower()


def _unwrap(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address embeds, else the address."""
    if isinstance(address, IPv6Address):
        if embedded := address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]:
            return embedded
        if address in _NAT64 or (address in _IPV4_COMPATIBLE and int(address) > 1):
            return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _describe_non_public(address: Address) -> str | None:
    checks = {
        "an unspecified address": address.is_unspecified,
        "a loopback address": address.is_loopback,
        "a link-local address": address.is_link_local,
        "a multicast address": address.is_multicast,
        "a private address": address.is_private or getattr(address, "is_site_local", False) or address in _NAT64_LOCAL,
        "a reserved address": address.is_reserved or not address.is_global,
    }
    return next((name for name, holds in checks.items() if holds), None)


Location = tuple[str | int, ...]
"""Where a value is in JSON."""
_CONTAINERS_AND_TEXT: Final = (str, dict, list)


def find_userinfo(root: Any, root_location: Location) -> Iterator[Location]:
    """Yield the locations of texts in JSON that are URLs with a user name or password."""
    pending: list[tuple[Any, Location]] = [(root, root_location)]
    while pending:
        value, location = pending.pop()
        if isinstance(value, str):
            if has_userinfo(value):
                yield location
            continue
        entries: Iterator[tuple[str | int, Any]] = iter(())
        if isinstance(value, Mapping):
            entries = ((str(name), entry) for name, entry in value.items())
        elif isinstance(value, list):
            entries = enumerate(value)
        pending += [(entry, (*location, key)) for key, entry in entries if isinstance(entry, _CONTAINERS_AND_TEXT)]
