"""The reference describes the routes that there are, and no others."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobledger.api.app import ROUTES
from tests.api.conftest import Api

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "http-api.md"


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


REPLACED = ("/process-events-async", "/process-many-events", "/test-webhook-callback", "/test-webhook-logs")


@pytest.mark.parametrize("old", REPLACED)
async def test_the_example_in_the_place_of_an_old_endpoint_works_as_it_stands(
    api_without_worker: Api, old: str
) -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    assert f"| `{old}` | " in text
    found = re.search(rf"^In the place of `{old}`.*?^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, f"no example in the place of {old}"
    command, address, *options = shlex.split(found[1])
    assert command == "curl"
    given = dict(zip(options[::2], options[1::2], strict=True))
    path = address.removeprefix("http://127.0.0.1:5001")
    if "-d" in given:
        name, _, value = given["-H"].partition(": ")
        answer = await api_without_worker.http.post(path, content=given["-d"], headers={name: value})
    else:
        answer = await api_without_worker.get(path)
    assert answer.status_code == (202 if "-d" in given else 200), answer.text
