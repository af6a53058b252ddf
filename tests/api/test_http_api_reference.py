"""`docs/reference/http-api.md` lists exactly the routes of the API, and its examples work."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobledger.api.app import ROUTES
from tests.api.conftest import Api

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "http-api.md"


def parse_requests() -> Iterator[tuple[str, str]]:
    """Yield method and path of each request in the table. A second path in a cell replaces the last segment."""
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


def test_reference_lists_exactly_the_routes_of_the_api() -> None:
    routes = {
        (method, route.path.replace(":path}", "}"))
        for route in ROUTES
        for method in (route.methods or ())
        if method != "HEAD" and route.path != "/"
    }
    assert set(parse_requests()) == routes


REPLACED_ENDPOINTS = ("/process-events-async", "/process-many-events", "/test-webhook-callback", "/test-webhook-logs")


@pytest.mark.parametrize("endpoint", REPLACED_ENDPOINTS)
async def test_example_for_replaced_endpoint_works(shared_api: Api, endpoint: str) -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    assert f"| `{endpoint}` | " in text
    example = re.search(rf"^Instead of `{endpoint}`.*?^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert example, f"no example instead of {endpoint}"
    command, url, *arguments = shlex.split(example[1])
    assert command == "curl"
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    path = url.removeprefix("http://127.0.0.1:5001")
    if "-d" in options:
        name, _, value = options["-H"].partition(": ")
        response = await shared_api.http.post(path, content=options["-d"], headers={name: value})
    else:
        response = await shared_api.get(path)
    assert response.status_code == (202 if "-d" in options else 200), response.text
