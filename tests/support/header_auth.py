"""Authentication by a test header, for tests of permissions."""

from __future__ import annotations

from collections.abc import Collection

from starlette.requests import HTTPConnection

from jobledger.ledger.domain.access import Principal

HEADER = "X-Test-Principal"


class HeaderAuthBackend:
    """Authenticates by the header `X-Test-Principal: user;group,group;role,role`.

    An empty header is an anonymous request. Without the header the principal is the admin `local`, as in open mode.
    """

    async def __call__(self, connection: HTTPConnection) -> Principal:
        value = connection.headers.get(HEADER)
        if value is None:
            return Principal("local", roles=frozenset({"admin"}))
        user_id, groups, roles = [*value.split(";"), "", ""][:3]
        return Principal(user_id or None, _names(groups), _names(roles))


def _names(listed: str) -> frozenset[str]:
    return frozenset(name for name in listed.split(",") if name)


def principal_header(user_id: str = "", groups: Collection[str] = (), roles: Collection[str] = ()) -> dict[str, str]:
    """Return the header for a principal."""
    return {HEADER: f"{user_id};{','.join(sorted(groups))};{','.join(sorted(roles))}" if user_id or groups else ""}
