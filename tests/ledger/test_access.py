"""Who may do what: the table of `docs/reference/http-api.md`, row by row."""

from __future__ import annotations

from typing import Any

import pytest

from jobledger.ledger.domain.access import AccessLevel, Principal, get_access_level, list_readers

PRIVATE: dict[str, Any] = {"visibility": "private", "read_access": [], "write_access": [], "admin_access": []}
BOB = Principal("bob", frozenset({"team-b"}))
NOBODY = Principal(None)


@pytest.mark.parametrize(
    ("principal", "access", "teams", "right"),
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
        (NOBODY, PRIVATE, (), AccessLevel.NONE),
        (NOBODY, PRIVATE | {"visibility": "team"}, ("team-b",), AccessLevel.NONE),
        (NOBODY, PRIVATE | {"visibility": "public"}, (), AccessLevel.READ),
    ],
)
def test_what_one_may_do_with_what_belongs_to_alice(
    principal: Principal, access: dict[str, Any], teams: tuple[str, ...], right: AccessLevel
) -> None:
    assert get_access_level(principal, owner="alice", access=access, teams=teams) is right


def test_who_can_read_is_who_has_a_right_and_no_one_else() -> None:
    access = PRIVATE | {
        "visibility": "team",
        "read_access": ["bob"],
        "write_access": ["carol"],
        "admin_access": ["bob"],
    }
    assert list_readers("alice", access, ["team-a"]) == ["alice", "bob", "carol", "team-a"]
    assert list_readers("alice", access | {"visibility": "private"}, ["team-a"]) == ["alice", "bob", "carol"]
