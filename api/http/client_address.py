"""The address of the client of a request, also behind proxies."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from starlette.datastructures import Headers
from starlette.types import Scope

Network = IPv4Network | IPv6Network


@lru_cache(4096)
def _parse_address(address: str) -> IPv4Address | IPv6Address | None:
    try:
        parsed = ip_address(address.strip().strip("[]"))
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed  # IPv4 clients of an IPv6 listener


def is_in_networks(address: str, networks: Collection[Network]) -> bool:
    """Return whether an address belongs to one of the networks."""
    if not networks or (parsed := _parse_address(address)) is None:
        return False
    return any(parsed in network for network in networks)


def get_client_address(scope: Scope, trusted: Collection[Network]) -> str:
    """Return the address of the client. If a trusted proxy is connected, use its X-Forwarded-For.

    The header is read from the end. Each proxy appends the address of its own client, so the first entry from the end
    that is not a trusted proxy is one that the client cannot forge.
    """
    client = scope.get("client")
    address = str(client[0]) if client else ""
    if not is_in_networks(address, trusted):
        return address
    for entry in reversed(",".join(Headers(scope=scope).getlist("x-forwarded-for")).split(",")):
        if _parse_address(entry) is None:
            break
        address = entry.strip()
        if not is_in_networks(address, trusted):
            break
    return address


def get_rate_limit_key(address: str) -> str:
    """Return the key that rate limits count an address by: for IPv6 its /64 network.

    A client usually has a whole /64 network, and could otherwise evade limits with a new address for each request.
    """
    parsed = _parse_address(address.partition("%")[0])
    return str(IPv6Network((parsed, 64), strict=False)) if isinstance(parsed, IPv6Address) else str(parsed or address)
