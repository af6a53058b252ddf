"""ledger: who may do what with a job or batch (konzept.md, "Benutzer-Autorisierung"). Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def may_read(reader: str, owner: str, access: Mapping[str, Any], groups: Collection[str] = ()) -> bool:
    """Return whether a user may read what belongs to `owner` under this access control (as the views hold it).

    `groups` are the names of the groups that the reader belongs to; `team` is for those who share one with the lists.
    """
    if reader == owner or access["visibility"] == "public":
        return True
    named = {*access["read_access"], *access["write_access"], *access["admin_access"]}
    return not named.isdisjoint({reader, *groups})
