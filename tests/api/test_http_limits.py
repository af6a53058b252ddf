"""Test limits per client: live streams, wrong credentials, client addresses, and throttling of live streams."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_network
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message

from jobledger.api.http.client_address import get_client_address, get_rate_limit_key
from jobledger.api.http.limits import SIGN_IN_PATH, AuthFailureLimitMiddleware
from jobledger.api.http.sse import Throttle
from jobledger.api.routes.log import EventFilter, _generate_blocks
from jobledger.api.settings import ApiSettings
from jobledger.ledger.domain.errors import LedgerUnavailable
from tests.api.conftest import RunApi
from tests.support.header_auth import principal_header

JOBS, STREAM = "/api/events/jobs", "/api/ledger/stream"


async def test_live_streams_of_all_users_are_limited_together(header_auth: None, run_without_worker: RunApi) -> None:
    async with run_without_worker(api={"max_streams": 2}) as api, AsyncExitStack() as stack:
        for user in ("alice", "bob"):
            stream = api.http.stream("GET", STREAM, headers=principal_header(user))
            assert (await stack.enter_async_context(stream)).status_code == 200
        rejected = await api.get(STREAM, **principal_header("carol"))
    assert (rejected.status_code, rejected.json()["code"]) == (503, "stream_capacity_exceeded")


async def test_wrong_credentials_are_limited_per_address(run_without_worker: RunApi) -> None:
    """Right credentials that were accepted from the address before are not limited."""
    secret = "s" * 32
    jwt = pytest.importorskip("jwt", reason="install PyJWT: pip install pyjwt")
    alices_token = jwt.encode({"sub": "alice", "exp": time.time() + 600}, secret, "HS256")
    bobs_token = jwt.encode({"sub": "bob", "exp": time.time() + 600}, secret, "HS256")
    settings = {"trusted_proxies": ["127.0.0.0/8"], "auth_failures_per_minute": 5}
    async with run_without_worker(api=settings, auth={"mode": "jwt", "jwt": {"secret": secret}}) as api:

        async def request_status(credential: str, address: str) -> int:
            headers = {"Authorization": f"Bearer {credential}", "X-Forwarded-For": f"1.2.3.4, {address}"}
            return int((await api.get(JOBS, **headers)).status_code)

        assert await request_status(alices_token, "203.0.113.7") == 200
        statuses = [await request_status(f"wrong-{number}", "203.0.113.7") for number in range(8)]
        assert statuses == [401] * 5 + [429] * 3
        assert await request_status(alices_token, "203.0.113.7") == 200  # was accepted from this address before
        assert await request_status(bobs_token, "203.0.113.7") == 429
        assert await request_status(bobs_token, "203.0.113.8") == 200
        assert await request_status("wrong", "203.0.113.9") == 401
        response = await api.post(
            "/monitoring/events/sign-in",
            **{"X-Forwarded-For": "203.0.113.7", "Origin": str(api.http.base_url).rstrip("/")},
        )
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 0
        assert (await api.get("/healthz", **{"X-Forwarded-For": "203.0.113.7"})).status_code == 200
        assert [await request_status(f"other-{number}", f"2001:db8::{number}") for number in range(6)] == [401] * 5 + [
            429
        ]
        assert await request_status("other", "2001:db8:0:1::1") == 401


PAGES = ("/monitoring/events", "/monitoring/events/jobs/job-1")


async def test_wrong_credentials_are_limited_in_api_pages_and_sign_in(run_without_worker: RunApi) -> None:
    """Each guess counts, although a page redirects to the sign-in and the form has its credential in the body."""
    settings = {"trusted_proxies": ["127.0.0.0/8"], "auth_failures_per_minute": 5}
    async with run_without_worker(api=settings, auth={"mode": "keys"}) as api:
        own_origin = {"Origin": str(api.http.base_url).rstrip("/")}

        async def guess(path: str, kind: str, address: str, number: int) -> int:
            headers = {"X-Forwarded-For": address}
            if path == SIGN_IN_PATH:
                cookie = {"Cookie": "jobledger=the-same"} if kind == "cookie" else {}
                form = {"credential": f"wrong-{number}"}
                return int((await api.http.post(path, data=form, headers=headers | own_origin | cookie)).status_code)
            bearer, cookie = {"Authorization": f"Bearer {number}"}, {"Cookie": f"jobledger={number}"}
            credential = bearer if kind == "bearer" else cookie
            return int((await api.get(path, **headers, **credential)).status_code)

        cases = product((JOBS, *PAGES, SIGN_IN_PATH), ("bearer", "cookie"), (True, False))
        for host, (path, kind, is_parallel) in enumerate(cases, 1):
            guesses = [guess(path, kind, f"203.0.113.{host}", number) for number in range(8)]
            statuses = await asyncio.gather(*guesses) if is_parallel else [await request for request in guesses]
            rejected = 303 if path in PAGES else 401
            assert Counter(statuses) == {rejected: 5, 429: 3}, (path, kind, is_parallel)


async def _receive() -> Message:
    return {"type": "http.disconnect"}


async def _send(_message: Message) -> None:
    """Send nothing."""


@pytest.mark.parametrize(
    ("path", "requests"),
    [(JOBS, 10), (SIGN_IN_PATH, 10), (JOBS, 30), (SIGN_IN_PATH, 30)],
    ids=["API, up to the limit", "form, up to the limit", "API, above the limit", "form, above the limit"],
)
async def test_credentials_checked_in_parallel_are_limited(path: str, requests: int) -> None:
    """No more credentials are checked than may be wrong, however many arrive before the first is rejected."""
    checked = 0
    rejected = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal checked
        checked += 1
        await rejected.wait()
        await send({"type": "http.response.start", "status": 401, "headers": []})

    limited = AuthFailureLimitMiddleware(app, ApiSettings(auth_failures_per_minute=10), ())
    tasks = [asyncio.create_task(limited(make_scope(path, f"wrong-{n}"), _receive, _send)) for n in range(requests)]
    await asyncio.sleep(0.01)  # all tasks run until they wait or end
    rejected.set()
    await asyncio.gather(*tasks)
    assert checked == 10


@pytest.mark.parametrize("end", ["accepted", "answered", "failed"])
async def test_credentials_that_are_not_rejected_use_no_token(end: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if end == "failed":
            raise ConnectionError
        if end == "accepted":
            scope["on_credentials_accepted"]()
            await asyncio.sleep(0.05)  # like `Prefer: wait`
        else:
            await send({"type": "http.response.start", "status": 503, "headers": []})

    limited = AuthFailureLimitMiddleware(app, ApiSettings(auth_failures_per_minute=1), ())
    for number in range(5):
        task = asyncio.create_task(limited(make_scope(JOBS, str(number)), _receive, _send))
        await asyncio.sleep(0)
        assert limited._buckets is not None
        assert limited._buckets.take("127.0.0.1") == 0
        limited._buckets.refund("127.0.0.1")
        await asyncio.gather(task, return_exceptions=True)


async def test_same_credentials_in_parallel_need_one_token() -> None:
    passed = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal passed
        await asyncio.sleep(0.01)
        passed += 1
        scope["on_credentials_accepted"]()

    limited = AuthFailureLimitMiddleware(app, ApiSettings(auth_failures_per_minute=1), ())
    await asyncio.gather(*(limited(make_scope(JOBS, "right"), _receive, _send) for _ in range(50)))
    assert passed == 50
    assert not limited._being_checked


def make_scope(path: str, credential: str) -> dict[str, Any]:
    """Return the scope of a request with a credential. A form has it in the body instead."""
    headers = [] if path == SIGN_IN_PATH else [(b"authorization", f"Bearer {credential}".encode())]
    method = "POST" if path == SIGN_IN_PATH else "GET"
    return {"type": "http", "method": method, "path": path, "headers": headers, "client": ("127.0.0.1", 1)}


def test_rate_limit_key_is_ipv4_address_or_ipv6_network() -> None:
    assert get_rate_limit_key("203.0.113.7") == get_rate_limit_key("::ffff:203.0.113.7") == "203.0.113.7"
    assert (
        get_rate_limit_key("2001:db8::1")
        == get_rate_limit_key("2001:db8::ffff:1")
        != get_rate_limit_key("2001:db8:0:1::1")
    )
    assert get_rate_limit_key("fe80::1%eth0") == "fe80::/64"
    assert (get_rate_limit_key(""), get_rate_limit_key("testclient")) == ("", "testclient")


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", ["6.6.6.6, 203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", ["6.6.6.6", "203.0.113.7, 10.0.0.2"], "203.0.113.7"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["nonsense, 10.0.0.2"], "10.0.0.2"),
        ("::ffff:10.0.0.1", ["2001:db8::1"], "2001:db8::1"),
        ("198.51.100.1", ["203.0.113.7"], "198.51.100.1"),  # the peer is no trusted proxy
    ],
)
def test_client_address_is_the_last_untrusted_address(peer: str, forwarded: list[str], expected: str) -> None:
    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    scope = {"type": "http", "client": (peer, 1), "headers": headers}
    assert get_client_address(scope, [ip_network("10.0.0.0/8")]) == expected


async def test_log_stream_throttles_only_hidden_events_of_the_past() -> None:
    """The stream is live, then falls behind, is live again, and falls behind again."""
    throttled: list[int] = []
    chunks = [(False, 600), (True, 10), (True, 490), (True, 499), (False, 600), (True, 499)]

    class Events:
        position, is_catching_up = 0, False

        async def read_chunk(self, _limit: int) -> list[Any]:
            if not chunks:
                raise LedgerUnavailable("the stream ends")
            self.is_catching_up, number = chunks.pop(0)
            return [SimpleNamespace(type="JobSubmitted")] * number

    @asynccontextmanager
    async def subscription(**_: Any) -> AsyncIterator[Events]:
        yield Events()

    async def wait(amount: int) -> None:
        throttled.append(amount)

    ctx: Any = SimpleNamespace(
        stream_access=None,
        event_store=SimpleNamespace(subscribe=subscription),
        live_streams=SimpleNamespace(history_throttle=SimpleNamespace(wait=wait)),
    )
    admin: Any = SimpleNamespace(is_admin=True)
    async for _ in _generate_blocks(ctx, admin, EventFilter(frozenset({"JobDeleted"})), 0):
        pass
    assert throttled == [500]


async def test_throttle_rate_is_shared_by_all_streams() -> None:
    throttle, loop = Throttle(1000), asyncio.get_running_loop()
    start = loop.time()
    await asyncio.gather(*(throttle.wait(50) for _ in range(8)))
    assert 0.3 < loop.time() - start < 3
