"""Access control of jobs and batches (konzept.md, "Benutzer-Autorisierung"). Pure.

The same rule applies to states from the log (`Job`, `Batch`) and to the documents of views.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import Any, Final

GROUP_PREFIX: Final = "team-"
"""Group names begin with this prefix and user names do not. Access lists contain both."""


MAX_PRINCIPAL_NAME_CHARACTERS: Final = 200


class AccessLevel(IntEnum):
    """What a principal may do. Each level includes the ones before it."""

    NONE = 0
    READ = 1
    """See it, its history, logs, files and live events."""
    WRITE = 2
    """Change, cancel, restart, pause and archive it."""
    ADMIN = 3
    """Delete it and change its access control."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller of a request. `user_id` is None for an anonymous caller.

    The user role `admin` may do everything, and `monitor` may see the statistics of everything. `valid_until` is when
    the credential expires; None means never.
    """

    user_id: str | None
    groups: frozenset[str] = frozenset()
    roles: frozenset[str] = frozenset()
    valid_until: datetime | None = field(default=None, compare=False)

    @property
    def is_admin(self) -> bool:
        return "admin" in self.roles

    @property
    def identities(self) -> frozenset[str]:
        """The names by which access lists may refer to this principal."""
        return self.groups if self.user_id is None else self.groups | {self.user_id}


def parse_user_name(text: str) -> str:
    """Return a valid user name.

    Raises:
        ValueError: The name is not valid. The message does not contain the name.
    """
    if text.startswith(GROUP_PREFIX):
        raise ValueError(f"a user name must not begin with `{GROUP_PREFIX}`: this prefix is for groups")
    return _check_name(text)


def parse_group_name(text: str) -> str:
    """Return a valid group name, with the prefix `team-` added if it is missing.

    Raises:
        ValueError: The name is not valid. The message does not contain the name.
    """
    _check_name(text.removeprefix(GROUP_PREFIX))
    return _check_name(text if text.startswith(GROUP_PREFIX) else GROUP_PREFIX + text)


def _check_name(text: str) -> str:
    if not text.strip() or text != text.strip():
        raise ValueError("a name must not be empty, or begin or end with a space")
    if len(text) > MAX_PRINCIPAL_NAME_CHARACTERS:
        raise ValueError(f"a name must not be longer than {MAX_PRINCIPAL_NAME_CHARACTERS} characters")
    if not text.isprintable():
        raise ValueError("a name must not contain unprintable characters")
    return text


def get_access_level(
    principal: Principal, *, owner: str, access: Mapping[str, Any], teams: Collection[str] = ()
) -> AccessLevel:
    """Return what the principal may do with a resource of `owner` that has this access control, as the views store
    it.

    `teams` are the groups of the owner at submission. With visibility `team` they may read the resource.
    """
    names = principal.identities
    if principal.is_admin or owner == principal.user_id or not names.isdisjoint(access["admin_access"]):
        return AccessLevel.ADMIN
    if not names.isdisjoint(access["write_access"]):
        return AccessLevel.WRITE
    if not names.isdisjoint(list_readers(owner, access, teams)) or access["visibility"] == "public":
        return AccessLevel.READ
    return AccessLevel.NONE


def list_readers(owner: str, access: Mapping[str, Any], teams: Iterable[str] = ()) -> list[str]:
    """Return the users and groups that may read a resource, in a fixed order. If it is public, everyone may."""
    named = [owner, *access["read_access"], *access["write_access"], *access["admin_access"]]
    if access["visibility"] == "team":
        named += teams
    return list(dict.fromkeys(named))
