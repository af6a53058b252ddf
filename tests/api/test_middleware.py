"""What is done to every request and every answer: ids, headers, limits, other sites' pages, the access log."""

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
from jobledger.api.http.options import HttpOptions
from jobledger.api.http.request_context import RequestContextMiddleware
from tests.api.conftest import Api, run_api
from tests.support.header_auth import principal_header

JOBS, STREAM, STATS = "/api/events/jobs", "/api/ledger/stream", "/api/monitoring/events/stats"
FRIEND = "https://conference.example.org"
EVERYWHERE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


@pytest.fixture
def run(mongodb_uri: str, db_name: str, tmp_path: Path) -> Any:
    """Run an API without a worker, with these settings."""

    @asynccontextmanager
    async def running(**sections: dict[str, Any]) -> AsyncIterator[Api]:
        wanted = frozenset({"api", "projector"})
        async for api in run_api(mongodb_uri, db_name, tmp_path, wanted, **sections):  # type: ignore[arg-type]  # a literal set is a set of str
            yield api

    return running


# Headers of every answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/healthz", JOBS, "/nothing/here", f"{JOBS}/job-none", f"{JOBS}?limit=x"])
async def test_every_answer_has_the_security_headers_and_an_id(api_without_worker: Api, path: str) -> None:
    answer = await api_without_worker.get(path)

    assert EVERYWHERE.items() <= dict(answer.headers).items()
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert "strict-transport-security" not in answer.headers
    assert len(answer.headers["x-request-id"]) == 32


async def test_refusals_of_the_outermost_doors_have_them_too(api_without_worker: Api) -> None:
    for answer in (
        await api_without_worker.get(JOBS, Host="elsewhere.example.org"),
        await api_without_worker.post(JOBS, {}, Origin="https://elsewhere.example.org"),
    ):
        assert answer.json()["status"] == "error"
        assert EVERYWHERE.items() <= dict(answer.headers).items()
        assert "x-request-id" in answer.headers


async def test_a_fault_is_answered_with_all_headers_and_the_id_under_which_it_is_logged(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("what nobody should be told")

    monkeypatch.setattr("jobledger.projections.views.statistics.load_statistics", broken)
    answer = await api_without_worker.get(STATS, **{"X-Request-ID": "mine-1"})

    assert answer.status_code == 500
    assert EVERYWHERE.items() <= dict(answer.headers).items()
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["details"] == {"request_id": "mine-1"}
    assert "nobody" not in answer.text


async def test_browsers_are_told_to_stay_with_https_where_others_reach_us_by_it() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("hello")(scope, receive, send)

    for https, told in ((True, "max-age=31536000"), (False, None)):
        transport = httpx.ASGITransport(RequestContextMiddleware(app, HttpOptions(is_https=https)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            assert (await client.get("/")).headers.get("strict-transport-security") == told


async def test_a_sane_request_id_is_kept_and_any_other_is_replaced(api_without_worker: Api) -> None:
    for given, kept in (("abc-DEF_1.2:3", True), ("a" * 100, True), ("a" * 101, False), ("a b", False), ("", False)):
        answer = await api_without_worker.get("/healthz", **{"X-Request-ID": given})
        assert (answer.headers["x-request-id"] == given) is kept


# The access log -----------------------------------------------------------------------------------------------------


async def test_the_access_log_says_who_asked_for_what_and_no_secrets(run: Any) -> None:
    async with run(logging={"access_log": True}) as api:
        with capture_logs() as lines:
            headers = {
                "Authorization": "Bearer hidden-a",
                "Idempotency-Key": "hidden-b",
                "X-Request-ID": "mine-1",
                "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            }
            answer = await api.get(f"{JOBS}/job-n%0aone?signature=hidden-c", **headers)
    [line] = [line for line in lines if line["event"] == "request"]

    assert line.pop("duration_ms") > 0
    assert line == {
        "event": "request",
        "log_level": "info",
        "method": "GET",
        "path": f"{JOBS}/job-n%0aone",
        "user_id": "local",
        "status": 422,
        "response_bytes": len(answer.content),
        "request_id": "mine-1",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
    }


async def test_without_being_asked_there_is_no_access_log(api_without_worker: Api) -> None:
    with capture_logs() as lines:
        await api_without_worker.get(JOBS)
    assert [line for line in lines if line["event"] == "request"] == []


# Other sites' pages -------------------------------------------------------------------------------------------------


async def test_pages_of_configured_origins_may_use_the_api_and_others_may_not(run: Any) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,idempotency-key"}
    async with run(api={"cors_origins": [FRIEND]}) as api:
        preflight = await api.http.options(JOBS, headers={"Origin": FRIEND, **asks})
        posted = await api.post(JOBS, {"job_type": "echo", "parameters": {}}, Origin=FRIEND)
        read = await api.get(f"{JOBS}/job-none", Origin=FRIEND)
        stranger = await api.http.options(JOBS, headers={"Origin": f"{FRIEND}.evil.org", **asks})
        strangers_read = await api.get(JOBS, Origin="https://evil.org")
        strangers_post = await api.post(JOBS, {"job_type": "echo", "parameters": {}}, Origin="https://evil.org")

    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == FRIEND
    assert posted.status_code == 202
    assert "Ledger-Position" in posted.headers["access-control-expose-headers"]
    assert read.headers["access-control-allow-origin"] == FRIEND
    assert "access-control-allow-credentials" not in read.headers
    assert (stranger.status_code, stranger.json()["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in strangers_read.headers
    assert strangers_post.json()["code"] == "origin_not_allowed"


async def test_without_configured_origins_no_page_but_ours_may_read_or_write(api_without_worker: Api) -> None:
    answer = await api_without_worker.get(JOBS, Origin=FRIEND)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert (await api_without_worker.post(JOBS, {}, Origin=FRIEND)).json()["code"] == "origin_not_allowed"


# Limits -------------------------------------------------------------------------------------------------------------


async def test_who_asks_too_often_is_told_when_to_come_back_and_others_are_not_kept(
    header_auth: None, run: Any
) -> None:
    async with run(api={"requests_per_second": 0.1, "burst": 3}) as api:
        mine = [await api.get(JOBS, **principal_header("alice")) for _ in range(4)]
        others = await api.get(JOBS, **principal_header("bob"))
        health = [await api.get("/healthz", **principal_header("alice")) for _ in range(5)]

    assert [answer.status_code for answer in mine] == [200, 200, 200, 429]
    assert mine[3].json()["code"] == "too_many_requests"
    assert 1 <= int(mine[3].headers["retry-after"]) <= 10
    assert others.status_code == 200
    assert {answer.status_code for answer in health} == {200}


def test_a_bucket_is_filled_again_as_time_passes_but_never_beyond_its_size() -> None:
    now = 0.0
    buckets = TokenBuckets(2, 3, clock=lambda: now)
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    now = 0.5
    assert [buckets.take("a") for _ in range(2)] == [0, 0.5]
    now = 1000
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]


def test_buckets_that_are_full_again_take_up_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobledger.api.http.limits._MAX_BUCKETS", 10)
    now = 0.0
    buckets = TokenBuckets(1, 1, clock=lambda: now)
    for number in range(10):
        buckets.take(f"a{number}")
    now = 10
    buckets.take("b")
    assert len(buckets) == 1


async def test_so_many_live_streams_of_one_user_and_no_more_until_one_is_closed(header_auth: None, run: Any) -> None:
    async with run(api={"max_streams_per_user": 2}) as api:
        opened = [api.http.stream("GET", STREAM, headers=principal_header("alice")) for _ in range(2)]
        for stream in opened:
            assert (await stream.__aenter__()).status_code == 200
        refused = await api.get(STREAM, **principal_header("alice"))
        async with api.http.stream("GET", STREAM, headers=principal_header("bob")) as others:
            assert others.status_code == 200
        assert (await api.get(JOBS, **principal_header("alice"))).status_code == 200
        await opened.pop().__aexit__(None, None, None)
        async with asyncio.timeout(10):
            while True:  # the server notices a moment later
                async with api.http.stream("GET", STREAM, headers=principal_header("alice")) as again:
                    if again.status_code == 200:
                        break
        await opened.pop().__aexit__(None, None, None)

    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
    assert refused.headers["retry-after"] == "5"


async def test_what_is_too_long_is_refused_in_the_envelope(api_without_worker: Api) -> None:
    address = await api_without_worker.get(f"{JOBS}?q={'x' * 17_000}")
    many = await api_without_worker.get(JOBS, **{f"X-{number}": "y" for number in range(150)})
    large = await api_without_worker.get(JOBS, **{"X-Large": "y" * 40_000})

    assert (address.status_code, address.json()["code"]) == (414, "uri_too_long")
    assert (many.status_code, many.json()["code"]) == (431, "headers_too_large")
    assert (large.status_code, large.json()["code"]) == (431, "headers_too_large")


async def test_a_request_whose_head_has_no_end_is_cut(api_without_worker: Api) -> None:
    where = urlsplit(str(api_without_worker.http.base_url))
    answer = await asyncio.to_thread(_endless_head, where.hostname or "", where.port or 0)
    assert answer.startswith(b"HTTP/1.1 400 ")


def _endless_head(host: str, port: int) -> bytes:
    with socket.create_connection((host, port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"y" * 200_000)
        return connection.recv(1000)


async def test_json_that_is_nested_too_deep_is_said_to_be(api_without_worker: Api) -> None:
    for depth, status in ((90, 202), (110, 422), (300, 400), (100_000, 400)):
        content = f'{{"job_type": "echo", "parameters": {{"a": {"[" * depth}{"]" * depth}}}}}'
        answer = await api_without_worker.http.post(JOBS, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == status
        assert status == 202 or "100 levels deep" in answer.json()["message"]
