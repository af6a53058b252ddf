"""Who may read what."""

from __future__ import annotations

import pytest

from ledger.access import may_read

PRIVATE = {"visibility": "private", "read_access": [], "write_access": [], "admin_access": []}


@pytest.mark.parametrize(
    ("reader", "access", "groups", "allowed"),
    [
        ("alice", PRIVATE, (), True),
        ("bob", PRIVATE, (), False),
        ("bob", PRIVATE | {"visibility": "public"}, (), True),
        ("bob", PRIVATE | {"visibility": "team"}, (), False),
        ("bob", PRIVATE | {"read_access": ["bob"]}, (), True),
        ("bob", PRIVATE | {"write_access": ["bob"]}, (), True),
        ("bob", PRIVATE | {"admin_access": ["bob"]}, (), True),
        ("bob", PRIVATE | {"read_access": ["carol"]}, (), False),
        ("bob", PRIVATE | {"visibility": "team", "read_access": ["team-a"]}, ("team-a", "team-b"), True),
        ("bob", PRIVATE | {"visibility": "team", "read_access": ["team-c"]}, ("team-a", "team-b"), False),
    ],
)
def test_the_owner_everybody_if_it_is_public_and_whoever_is_named_may_read(
    reader: str, access: dict[str, object], groups: tuple[str, ...], allowed: bool
) -> None:
    assert may_read(reader, "alice", access, groups) is allowed
