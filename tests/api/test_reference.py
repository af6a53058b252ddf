"""The reference describes the routes that there are, and no others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from api.app import ROUTES

REFERENCE = Path(__file__).parents[2] / "docs" / "reference.md"


def described() -> Iterator[tuple[str, str]]:
    """Method and path of each request in the table; `/restart` behind `POST …/cancel` is its sibling."""
    for cell in re.findall(
        r"^\| (`(?:GET|POST|PUT|DELETE) .*?) \|", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE
    ):
        method = path = ""
        for request in re.findall(r"`([^`]+)`", cell):
            if request.startswith("/"):
                path = path.rpartition("/")[0] + request
            else:
                method, _, path = request.partition(" ")
            yield method, path


def test_the_reference_describes_every_route_and_no_other() -> None:
    routes = {
        (method, route.path.replace(":path}", "}"))
        for route in ROUTES
        for method in (route.methods or ())
        if method != "HEAD" and route.path != "/"
    }
    assert set(described()) == routes
