"""api: the address that a request comes from, also behind a proxy."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from starlette.datastructures import Headers
from starlette.types import Scope

Network = IPv4Network | IPv6Network


@lru_cache(4096)
def _read(address: str) -> IPv4Address | IPv6Address | None:
    try:
        found = ip_address(address.strip().strip("[]"))
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found  # how IPv4 looks to a listener on IPv6


def is_in_networks(address: str, networks: Collection[Network]) -> bool:
    """Return whether an address belongs to one of the networks."""
    if not networks or (found := _read(address)) is None:
        return False
    return any(found in network for network in networks)


def client_address(scope: Scope, trusted: Collection[Network]) -> str:
    """Return the address of the client: of a connection from a trusted proxy, what that says in X-Forwarded-For.

    The header is read from its end. Each proxy adds the address that it was called from, so the first entry from
    there that is no trusted proxy is the last one that a client cannot have made up.
    """
    client = scope.get("client")
    address = str(client[0]) if client else ""
    if not is_in_networks(address, trusted):
        return address
    for said in reversed(",".join(Headers(scope=scope).getlist("x-forwarded-for")).split(",")):
        if _read(said) is None:
            break
        address = said.strip()
        if not is_in_networks(address, trusted):
            break
    return address


def get_rate_limit_key(address: str) -> str:
    """Return what an address is counted by: an IPv6 address by its /64 network, which one client has whole.

    With a new address for each request, a client would otherwise never reach a limit.
    """
    found = _read(address.partition("%")[0])
    return str(IPv6Network((found, 64), strict=False)) if isinstance(found, IPv6Address) else str(found or address)
