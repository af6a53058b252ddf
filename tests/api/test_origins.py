"""Which pages may change something: the whole origin decides, for every way to be reached and every kind of request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from jobledger.api.http.origins import HostOriginMiddleware, parse_origin

NAMES: Final = ("localhost", "127.0.0.1", "[::1]", "ledger.example.org")
FRIEND: Final = "https://cms.example.org"
PUBLIC: Final = "https://ledger.example.org/tools/jobs"


async def status_of(
    headers: Mapping[str, str], *, public: str | None = None, method: str = "POST", path: str = "/api/events/jobs"
) -> int:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("hello")(scope, receive, send)

    hosts = HostOriginMiddleware(
        app, NAMES, public_origin=public, cors_origins=[FRIEND], session_cookie_name="jobledger"
    )
    transport = httpx.ASGITransport(hosts)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:5001") as client:
        return (await client.request(method, path, headers=dict(headers))).status_code


@pytest.mark.parametrize(
    ("origin", "host", "public", "expected"),
    [
        ("http://localhost:5001", "localhost:5001", None, 200),
        ("http://LOCALHOST:5001", "localhost:5001", None, 200),
        ("http://127.0.0.1:5001", "127.0.0.1:5001", None, 200),
        ("http://[::1]:5001", "[::1]:5001", None, 200),
        ("http://localhost", "localhost", None, 200),
        ("http://localhost", "localhost:80", None, 200),
        (FRIEND, "localhost:5001", None, 200),
        ("http://localhost:8000", "localhost:5001", None, 403),
        ("http://localhost", "localhost:5001", None, 403),
        ("https://localhost:5001", "localhost:5001", None, 403),
        ("http://127.0.0.1:5001", "localhost:5001", None, 403),
        ("http://ledger.example.org:5001", "localhost:5001", None, 403),
        ("http://localhost:5001@evil.example", "localhost:5001", None, 403),
        ("http://user@localhost:5001", "localhost:5001", None, 403),
        ("http://localhost:5001.evil.example", "localhost:5001", None, 403),
        ("ftp://localhost:5001", "localhost:5001", None, 403),
        ("file://", "localhost:5001", None, 403),
        ("null", "localhost:5001", None, 403),
        ("null", "localhost:99999", None, 403),
        ("", "localhost:5001", None, 403),
        ("x", "localhost:5001", None, 403),
        ("http://localhost:99999", "localhost:5001", None, 403),
        ("http://cms.example.org", "localhost:5001", None, 403),
        ("https://cms.example.org:8443", "localhost:5001", None, 403),
        ("https://ledger.example.org", "ledger.example.org", PUBLIC, 200),
        ("https://ledger.example.org:443", "127.0.0.1:5001", PUBLIC, 200),
        (FRIEND, "ledger.example.org", PUBLIC, 200),
        ("http://ledger.example.org", "ledger.example.org", PUBLIC, 403),
        ("https://ledger.example.org:8443", "ledger.example.org:8443", PUBLIC, 403),
        ("http://localhost:5001", "localhost:5001", PUBLIC, 403),
        ("https://other.example.org", "ledger.example.org", PUBLIC, 403),
    ],
)
async def test_change_from_a_page_needs_exactly_our_origin(
    origin: str, host: str, public: str | None, expected: int
) -> None:
    headers = {"Origin": origin, "Host": host}
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert await status_of(headers, public=public, method=method) == expected
    for method in ("GET", "HEAD"):
        assert await status_of(headers, public=public, method=method) == 200


@pytest.mark.parametrize(
    ("headers", "expected", "signing_in"),
    [
        ({}, 200, 403),
        ({"Cookie": "jobledger=x"}, 403, 403),
        ({"Cookie": "other=x"}, 200, 403),
        ({"Cookie": "jobledger=x", "Sec-Fetch-Site": "same-origin"}, 200, 200),
        ({"Cookie": "jobledger=x", "Sec-Fetch-Site": "none"}, 200, 200),
        ({"Cookie": "jobledger=x", "Sec-Fetch-Site": "same-site"}, 403, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403, 403),
        ({"Sec-Fetch-Site": "anything"}, 403, 403),
        ({"Origin": FRIEND}, 200, 403),
    ],
)
async def test_change_without_our_origin_needs_proof_where_a_browser_may_have_sent_it(
    headers: dict[str, str], expected: int, signing_in: int
) -> None:
    assert await status_of(headers) == expected
    for path in ("/monitoring/events/sign-in", "/monitoring/events/sign-out"):
        assert await status_of(headers, path=path) == signing_in


async def test_two_origins_are_refused() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("hello")(scope, receive, send)

    transport = httpx.ASGITransport(HostOriginMiddleware(app, NAMES))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:5001") as client:
        ours = ("Origin", "http://localhost:5001")
        answer = await client.post("/", headers=[ours, ("Origin", "http://evil.example")])
        assert answer.status_code == 403
        assert "api.public_url" in answer.json()["message"]


def test_origin_of_url_has_scheme_host_and_port() -> None:
    assert parse_origin("https://Ledger.example.org/tools") == "https://ledger.example.org:443"
    assert parse_origin("http://[::1]:5001") == "http://[::1]:5001"
    assert parse_origin("null") is None
