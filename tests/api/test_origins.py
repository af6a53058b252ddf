"""Only the own origin and those in `api.cors_origins` may change data. Scheme, host and port must be the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from jobledger.api.http.origins import HostOriginMiddleware, parse_origin

ALLOWED_HOSTS: Final = ("localhost", "127.0.0.1", "[::1]", "ledger.example.org")
CORS_ORIGIN: Final = "https://cms.example.org"
PUBLIC_URL: Final = "https://ledger.example.org/tools/jobs"


async def respond(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("hello")(scope, receive, send)


async def request_status(
    headers: Mapping[str, str], *, public_url: str | None = None, method: str = "POST", path: str = "/api/events/jobs"
) -> int:
    middleware = HostOriginMiddleware(
        respond, ALLOWED_HOSTS, public_origin=public_url, cors_origins=[CORS_ORIGIN], session_cookie_name="jobledger"
    )
    transport = httpx.ASGITransport(middleware)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:5001") as client:
        return (await client.request(method, path, headers=dict(headers))).status_code


@pytest.mark.parametrize(
    ("origin", "host", "public_url", "expected"),
    [
        ("http://localhost:5001", "localhost:5001", None, 200),
        ("http://LOCALHOST:5001", "localhost:5001", None, 200),
        ("http://127.0.0.1:5001", "127.0.0.1:5001", None, 200),
        ("http://[::1]:5001", "[::1]:5001", None, 200),
        ("http://localhost", "localhost", None, 200),
        ("http://localhost", "localhost:80", None, 200),
        (CORS_ORIGIN, "localhost:5001", None, 200),
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
        ("https://ledger.example.org", "ledger.example.org", PUBLIC_URL, 200),
        ("https://ledger.example.org:443", "127.0.0.1:5001", PUBLIC_URL, 200),
        (CORS_ORIGIN, "ledger.example.org", PUBLIC_URL, 200),
        ("http://ledger.example.org", "ledger.example.org", PUBLIC_URL, 403),
        ("https://ledger.example.org:8443", "ledger.example.org:8443", PUBLIC_URL, 403),
        ("http://localhost:5001", "localhost:5001", PUBLIC_URL, 403),
        ("https://other.example.org", "ledger.example.org", PUBLIC_URL, 403),
    ],
)
async def test_change_with_origin_header_requires_exact_own_origin(
    origin: str, host: str, public_url: str | None, expected: int
) -> None:
    headers = {"Origin": origin, "Host": host}
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert await request_status(headers, public_url=public_url, method=method) == expected
    for method in ("GET", "HEAD"):
        assert await request_status(headers, public_url=public_url, method=method) == 200


@pytest.mark.parametrize(
    ("headers", "expected", "expected_sign_in"),
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
        ({"Origin": CORS_ORIGIN}, 200, 403),
    ],
)
async def test_change_without_own_origin_is_rejected_from_other_sites_or_with_cookie_only(
    headers: dict[str, str], expected: int, expected_sign_in: int
) -> None:
    assert await request_status(headers) == expected
    for path in ("/monitoring/events/sign-in", "/monitoring/events/sign-out"):
        assert await request_status(headers, path=path) == expected_sign_in


async def test_two_origin_headers_are_rejected() -> None:
    transport = httpx.ASGITransport(HostOriginMiddleware(respond, ALLOWED_HOSTS))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:5001") as client:
        own_origin = ("Origin", "http://localhost:5001")
        response = await client.post("/", headers=[own_origin, ("Origin", "http://evil.example")])
        assert response.status_code == 403
        assert "api.public_url" in response.json()["message"]


def test_parse_origin_returns_scheme_host_and_port() -> None:
    assert parse_origin("https://Ledger.example.org/tools") == "https://ledger.example.org:443"
    assert parse_origin("http://[::1]:5001") == "http://[::1]:5001"
    assert parse_origin("null") is None
