"""Middleware: security headers, request IDs, access log, CORS, and limits of rate, streams and sizes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.responses import PlainTextResponse
from structlog.testing import capture_logs

from jobledger.api.http.limits import TokenBuckets
from jobledger.api.http.request_context import RequestContextMiddleware
from tests.api.conftest import WITHOUT_WORKER, Api, run_api
from tests.support.header_auth import principal_header
from tests.support.polling import DEADLINE_SECONDS

JOBS, STREAM, STATS = "/api/events/jobs", "/api/ledger/stream", "/api/monitoring/events/stats"
ALLOWED_ORIGIN = "https://conference.example.org"
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


@pytest.fixture
def run(mongodb_uri: str, db_name: str, tmp_path: Path) -> Any:
    """Return a context manager that runs an API without a worker with given settings."""

    @asynccontextmanager
    async def running(**sections: dict[str, Any]) -> AsyncIterator[Api]:
        async for api in run_api(mongodb_uri, db_name, tmp_path, WITHOUT_WORKER, **sections):
            yield api

    return running


# Headers of every response ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/healthz", JOBS, "/nothing/here", f"{JOBS}/job-none", f"{JOBS}?limit=x"])
async def test_every_response_has_security_headers_and_request_id(shared_api: Api, path: str) -> None:
    response = await shared_api.get(path)

    assert SECURITY_HEADERS.items() <= dict(response.headers).items()
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    assert "strict-transport-security" not in response.headers
    assert len(response.headers["x-request-id"]) == 32


async def test_rejections_of_outer_middleware_have_security_headers(shared_api: Api) -> None:
    for response in (
        await shared_api.get(JOBS, Host="elsewhere.example.org"),
        await shared_api.post(JOBS, {}, Origin="https://elsewhere.example.org"),
    ):
        assert response.json()["status"] == "error"
        assert SECURITY_HEADERS.items() <= dict(response.headers).items()
        assert "x-request-id" in response.headers


async def test_internal_error_response_has_security_headers_and_request_id(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def raise_error(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("an internal detail")

    monkeypatch.setattr("jobledger.projections.views.statistics.load_statistics", raise_error)
    response = await api_without_worker.get(STATS, **{"X-Request-ID": "mine-1"})

    assert response.status_code == 500
    assert SECURITY_HEADERS.items() <= dict(response.headers).items()
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["details"] == {"request_id": "mine-1"}
    assert "internal detail" not in response.text


async def test_hsts_header_is_sent_only_behind_https() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("hello")(scope, receive, send)

    for https, header in ((True, "max-age=31536000"), (False, None)):
        transport = httpx.ASGITransport(RequestContextMiddleware(app, is_https=https, has_access_log=False))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            assert (await client.get("/")).headers.get("strict-transport-security") == header


async def test_request_id_is_kept_if_valid_and_replaced_otherwise(shared_api: Api) -> None:
    for request_id, is_kept in (
        ("abc-DEF_1.2:3", True),
        ("a" * 100, True),
        ("a" * 101, False),
        ("a b", False),
        ("", False),
    ):
        response = await shared_api.get("/healthz", **{"X-Request-ID": request_id})
        assert (response.headers["x-request-id"] == request_id) is is_kept


# Access log ---------------------------------------------------------------------------------------------------------


async def test_access_log_has_user_and_request_but_no_secrets(run: Any) -> None:
    async with run(logging={"access_log": True}) as api:
        with capture_logs() as log:
            headers = {
                "Authorization": "Bearer hidden-a",
                "Idempotency-Key": "hidden-b",
                "X-Request-ID": "mine-1",
                "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            }
            response = await api.get(f"{JOBS}/job-n%0aone?signature=hidden-c", **headers)
    [entry] = [entry for entry in log if entry["event"] == "request"]

    assert entry.pop("duration_ms") > 0
    assert entry == {
        "event": "request",
        "log_level": "info",
        "method": "GET",
        "path": f"{JOBS}/job-n%0aone",
        "user_id": "local",
        "status": 422,
        "response_bytes": len(response.content),
        "request_id": "mine-1",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
    }


async def test_access_log_is_off_by_default(api_without_worker: Api) -> None:
    with capture_logs() as log:
        await api_without_worker.get(JOBS)
    assert [entry for entry in log if entry["event"] == "request"] == []


# CORS ---------------------------------------------------------------------------------------------------------------


async def test_cors_allows_configured_origins_only(run: Any) -> None:
    preflight_headers = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,idempotency-key",
    }
    async with run(api={"cors_origins": [ALLOWED_ORIGIN]}) as api:
        preflight = await api.http.options(JOBS, headers={"Origin": ALLOWED_ORIGIN, **preflight_headers})
        posted = await api.post(JOBS, {"job_type": "echo", "parameters": {}}, Origin=ALLOWED_ORIGIN)
        read = await api.get(f"{JOBS}/job-none", Origin=ALLOWED_ORIGIN)
        foreign_preflight = await api.http.options(
            JOBS, headers={"Origin": f"{ALLOWED_ORIGIN}.evil.org", **preflight_headers}
        )
        foreign_read = await api.get(JOBS, Origin="https://evil.org")
        foreign_post = await api.post(JOBS, {"job_type": "echo", "parameters": {}}, Origin="https://evil.org")

    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ALLOWED_ORIGIN
    assert posted.status_code == 202
    assert "Ledger-Position" in posted.headers["access-control-expose-headers"]
    assert read.headers["access-control-allow-origin"] == ALLOWED_ORIGIN
    assert "access-control-allow-credentials" not in read.headers
    assert (foreign_preflight.status_code, foreign_preflight.json()["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in foreign_read.headers
    assert foreign_post.json()["code"] == "origin_not_allowed"


async def test_cors_without_configured_origins_allows_own_origin_only(shared_api: Api) -> None:
    response = await shared_api.get(JOBS, Origin=ALLOWED_ORIGIN)
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert (await shared_api.post(JOBS, {}, Origin=ALLOWED_ORIGIN)).json()["code"] == "origin_not_allowed"


# Limits -------------------------------------------------------------------------------------------------------------


async def test_request_rate_over_limit_returns_429_for_that_user_only(header_auth: None, run: Any) -> None:
    async with run(api={"requests_per_second": 0.1, "burst": 3}) as api:
        alice = [await api.get(JOBS, **principal_header("alice")) for _ in range(4)]
        bob = await api.get(JOBS, **principal_header("bob"))
        health = [await api.get("/healthz", **principal_header("alice")) for _ in range(5)]

    assert [response.status_code for response in alice] == [200, 200, 200, 429]
    assert alice[3].json()["code"] == "too_many_requests"
    assert 1 <= int(alice[3].headers["retry-after"]) <= 10
    assert bob.status_code == 200
    assert {response.status_code for response in health} == {200}


def test_token_bucket_refills_over_time_up_to_its_size() -> None:
    now = 0.0
    buckets = TokenBuckets(2, 3, clock=lambda: now)
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    now = 0.5
    assert [buckets.take("a") for _ in range(2)] == [0, 0.5]
    now = 1000
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]


def test_token_buckets_that_are_full_again_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobledger.api.http.limits._MAX_BUCKETS", 10)
    now = 0.0
    buckets = TokenBuckets(1, 1, clock=lambda: now)
    for number in range(10):
        buckets.take(f"a{number}")
    now = 10
    buckets.take("b")
    assert len(buckets) == 1


async def test_streams_per_user_are_limited_until_one_is_closed(header_auth: None, run: Any) -> None:
    async with run(api={"max_streams_per_user": 2}) as api:
        streams = [api.http.stream("GET", STREAM, headers=principal_header("alice")) for _ in range(2)]
        for stream in streams:
            assert (await stream.__aenter__()).status_code == 200
        rejected = await api.get(STREAM, **principal_header("alice"))
        async with api.http.stream("GET", STREAM, headers=principal_header("bob")) as stream_of_bob:
            assert stream_of_bob.status_code == 200
        assert (await api.get(JOBS, **principal_header("alice"))).status_code == 200
        await streams.pop().__aexit__(None, None, None)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:  # the server counts a closed stream down a moment later
                async with api.http.stream("GET", STREAM, headers=principal_header("alice")) as reopened:
                    if reopened.status_code == 200:
                        break
        await streams.pop().__aexit__(None, None, None)

    assert (rejected.status_code, rejected.json()["code"]) == (429, "too_many_streams")
    assert rejected.headers["retry-after"] == "5"


async def test_too_long_uri_or_headers_return_error_document(shared_api: Api) -> None:
    long_uri = await shared_api.get(f"{JOBS}?q={'x' * 17_000}")
    many_headers = await shared_api.get(JOBS, **{f"X-{number}": "y" for number in range(150)})
    large_header = await shared_api.get(JOBS, **{"X-Large": "y" * 40_000})

    assert (long_uri.status_code, long_uri.json()["code"]) == (414, "uri_too_long")
    assert (many_headers.status_code, many_headers.json()["code"]) == (431, "headers_too_large")
    assert (large_header.status_code, large_header.json()["code"]) == (431, "headers_too_large")


async def test_endless_request_head_returns_400(shared_api: Api) -> None:
    url = urlsplit(str(shared_api.http.base_url))
    response = await asyncio.to_thread(send_endless_head, url.hostname or "", url.port or 0)
    assert response.startswith(b"HTTP/1.1 400 ")


def send_endless_head(host: str, port: int) -> bytes:
    with socket.create_connection((host, port), timeout=DEADLINE_SECONDS) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"y" * 200_000)
        return connection.recv(1000)


async def test_json_nested_too_deep_is_rejected_with_the_limit(shared_api: Api) -> None:
    for depth, status in ((90, 202), (110, 422), (300, 400), (100_000, 400)):
        content = f'{{"job_type": "echo", "parameters": {{"a": {"[" * depth}{"]" * depth}}}}}'
        response = await shared_api.http.post(JOBS, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == status
        assert status == 202 or "100 levels deep" in response.json()["message"]
