"""ledger: who may do what with a job or batch (konzept.md, "Benutzer-Autorisierung"). Pure.

The one rule. Every door asks it: with a state from the log (`Job`, `Batch`) or with a view's document.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import Any, Final

GROUP_PREFIX: Final = "team-"
"""How the names of groups begin, and those of users do not: both stand in the same lists."""


MAX_PRINCIPAL_NAME_CHARACTERS: Final = 200


class AccessLevel(IntEnum):
    """What somebody may do; each includes the ones before it."""

    NONE = 0
    READ = 1
    """See it, its history, logs, files and live events."""
    WRITE = 2
    """Change, cancel, restart, pause, archive it."""
    ADMIN = 3
    """Delete it and say who else may do what."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. `user_id` is None for somebody who has not said who they are.

    `roles`: `admin` may do everything, `monitor` may see the statistics of everything. `valid_until` is when the
    credential expires; None for never.
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
        """Under which names it may stand in a list."""
        return self.groups if self.user_id is None else self.groups | {self.user_id}


def parse_user_name(text: str) -> str:
    """Return the name of a user, if it can be one.

    Raises:
        ValueError: it says what is wrong, without the name.
    """
    if text.startswith(GROUP_PREFIX):
        raise ValueError(f"a user's name must not begin with `{GROUP_PREFIX}`: that is how groups are known")
    return _nameable(text)


def parse_group_name(text: str) -> str:
    """Return the name of a group, which begins with `team-` if it did not before.

    Raises:
        ValueError: it cannot be one; says what is wrong, without the name.
    """
    _nameable(text.removeprefix(GROUP_PREFIX))
    return _nameable(text if text.startswith(GROUP_PREFIX) else GROUP_PREFIX + text)


def _nameable(text: str) -> str:
    if not text.strip() or text != text.strip():
        raise ValueError("a name must not be empty, nor begin or end with a blank")
    if len(text) > MAX_PRINCIPAL_NAME_CHARACTERS:
        raise ValueError(f"a name must not be longer than {MAX_PRINCIPAL_NAME_CHARACTERS} characters")
    if not text.isprintable():
        raise ValueError("a name must not have characters that cannot be printed")
    return text


def get_access_level(
    principal: Principal, *, owner: str, access: Mapping[str, Any], teams: Collection[str] = ()
) -> AccessLevel:
    """Return what the principal may do with what belongs to `owner` under this access control (as the views hold it).

    `teams` are the groups that the owner was in when it was submitted: with visibility `team` they may see it.
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
    """Return the names of the users and groups that may see it, in a fixed order; beside them all, if it is public."""
    named = [owner, *access["read_access"], *access["write_access"], *access["admin_access"]]
    if access["visibility"] == "team":
        named += teams
    return list(dict.fromkeys(named))
