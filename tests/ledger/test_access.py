"""Access levels: each row of the table in `docs/reference/http-api.md`."""

from __future__ import annotations

from typing import Any

import pytest

from jobledger.ledger.domain.access import AccessLevel, Principal, get_access_level, list_readers

PRIVATE: dict[str, Any] = {"visibility": "private", "read_access": [], "write_access": [], "admin_access": []}
BOB = Principal("bob", frozenset({"team-b"}))
ANONYMOUS = Principal(None)


@pytest.mark.parametrize(
    ("principal", "access", "teams", "expected"),
    [
        (Principal("alice"), PRIVATE, (), AccessLevel.ADMIN),
        (Principal("ann", roles=frozenset({"admin"})), PRIVATE, (), AccessLevel.ADMIN),
        (Principal("mona", roles=frozenset({"monitor"})), PRIVATE, (), AccessLevel.NONE),
        (BOB, PRIVATE, (), AccessLevel.NONE),
        (BOB, PRIVATE, ("team-b",), AccessLevel.NONE),
        (BOB, PRIVATE | {"visibility": "public"}, (), AccessLevel.READ),
        (BOB, PRIVATE | {"visibility": "team"}, ("team-b", "team-c"), AccessLevel.READ),
        (BOB, PRIVATE | {"visibility": "team"}, ("team-c",), AccessLevel.NONE),
        (BOB, PRIVATE | {"visibility": "team"}, (), AccessLevel.NONE),
        (BOB, PRIVATE | {"read_access": ["bob"]}, (), AccessLevel.READ),
        (BOB, PRIVATE | {"read_access": ["team-b"]}, (), AccessLevel.READ),
        (BOB, PRIVATE | {"write_access": ["bob"]}, (), AccessLevel.WRITE),
        (BOB, PRIVATE | {"write_access": ["team-b"]}, (), AccessLevel.WRITE),
        (BOB, PRIVATE | {"admin_access": ["bob"]}, (), AccessLevel.ADMIN),
        (BOB, PRIVATE | {"admin_access": ["team-b"], "read_access": ["bob"]}, (), AccessLevel.ADMIN),
        (BOB, PRIVATE | {"read_access": ["carol", "team-c"]}, (), AccessLevel.NONE),
        (ANONYMOUS, PRIVATE, (), AccessLevel.NONE),
        (ANONYMOUS, PRIVATE | {"visibility": "team"}, ("team-b",), AccessLevel.NONE),
        (ANONYMOUS, PRIVATE | {"visibility": "public"}, (), AccessLevel.READ),
    ],
)
def test_access_level_follows_documented_table(
    principal: Principal, access: dict[str, Any], teams: tuple[str, ...], expected: AccessLevel
) -> None:
    assert get_access_level(principal, owner="alice", access=access, teams=teams) is expected


def test_list_readers_returns_everyone_with_access() -> None:
    access = PRIVATE | {
        "visibility": "team",
        "read_access": ["bob"],
        "write_access": ["carol"],
        "admin_access": ["bob"],
    }
    assert list_readers("alice", access, ["team-a"]) == ["alice", "bob", "carol", "team-a"]
    assert list_readers("alice", access | {"visibility": "private"}, ["team-a"]) == ["alice", "bob", "carol"]
