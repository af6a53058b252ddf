"""Who may do what: the table of `docs/reference.md`, row by row."""

from __future__ import annotations

from typing import Any

import pytest

from jobledger.ledger.domain.access import Principal, Right, readers, right_to

PRIVATE: dict[str, Any] = {"visibility": "private", "read_access": [], "write_access": [], "admin_access": []}
BOB = Principal("bob", frozenset({"team-b"}))
NOBODY = Principal(None)


@pytest.mark.parametrize(
    ("principal", "access", "teams", "right"),
    [
        (Principal("alice"), PRIVATE, (), Right.ADMIN),
        (Principal("ann", roles=frozenset({"admin"})), PRIVATE, (), Right.ADMIN),
        (Principal("mona", roles=frozenset({"monitor"})), PRIVATE, (), Right.NONE),
        (BOB, PRIVATE, (), Right.NONE),
        (BOB, PRIVATE, ("team-b",), Right.NONE),
        (BOB, PRIVATE | {"visibility": "public"}, (), Right.READ),
        (BOB, PRIVATE | {"visibility": "team"}, ("team-b", "team-c"), Right.READ),
        (BOB, PRIVATE | {"visibility": "team"}, ("team-c",), Right.NONE),
        (BOB, PRIVATE | {"visibility": "team"}, (), Right.NONE),
        (BOB, PRIVATE | {"read_access": ["bob"]}, (), Right.READ),
        (BOB, PRIVATE | {"read_access": ["team-b"]}, (), Right.READ),
        (BOB, PRIVATE | {"write_access": ["bob"]}, (), Right.WRITE),
        (BOB, PRIVATE | {"write_access": ["team-b"]}, (), Right.WRITE),
        (BOB, PRIVATE | {"admin_access": ["bob"]}, (), Right.ADMIN),
        (BOB, PRIVATE | {"admin_access": ["team-b"], "read_access": ["bob"]}, (), Right.ADMIN),
        (BOB, PRIVATE | {"read_access": ["carol", "team-c"]}, (), Right.NONE),
        (NOBODY, PRIVATE, (), Right.NONE),
        (NOBODY, PRIVATE | {"visibility": "team"}, ("team-b",), Right.NONE),
        (NOBODY, PRIVATE | {"visibility": "public"}, (), Right.READ),
    ],
)
def test_what_one_may_do_with_what_belongs_to_alice(
    principal: Principal, access: dict[str, Any], teams: tuple[str, ...], right: Right
) -> None:
    assert right_to(principal, owner="alice", access=access, teams=teams) is right


def test_who_can_read_is_who_has_a_right_and_no_one_else() -> None:
    access = PRIVATE | {
        "visibility": "team",
        "read_access": ["bob"],
        "write_access": ["carol"],
        "admin_access": ["bob"],
    }
    assert readers("alice", access, ["team-a"]) == ["alice", "bob", "carol", "team-a"]
    assert readers("alice", access | {"visibility": "private"}, ["team-a"]) == ["alice", "bob", "carol"]
