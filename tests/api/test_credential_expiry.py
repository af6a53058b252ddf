"""Streams, live pages, long waits and downloads end when their credential ends, in every authentication mode."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from starlette.requests import HTTPConnection
from starlette.types import Message

from jobledger.api.auth import api_keys, backends
from jobledger.api.auth.api_keys import ApiKey, ApiKeyToken
from jobledger.api.auth.permissions import AuthenticationMiddleware, RevocationNotifier
from jobledger.api.dashboard.errors import build_auth_error_response
from jobledger.api.http.errors import ApiError
from jobledger.api.http.streaming import CloseableStreamingResponse
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.mongo.connection import Database
from tests.api.conftest import WITHOUT_WORKER, Api, run_api
from tests.support.jwt_issuer import SECRET, make_token
from tests.support.polling import DEADLINE_SECONDS

STREAM, VIEW_UPDATES, JOBS = "/api/ledger/stream", "/monitoring/events/view-updates", "/api/events/jobs"
SIGN_IN, SIGN_OUT = "/monitoring/events/sign-in", "/monitoring/events/sign-out"
LIFETIME_SECONDS: Final = 6
"""Long enough to open all streams on a busy machine."""
EndCredential = Callable[[], Awaitable[None]]


@pytest.fixture
def run(mongodb_uri: str, db_name: str, tmp_path: Path) -> Any:
    """Return a context manager that runs an API without a worker in an authentication mode."""

    @asynccontextmanager
    async def running(mode: str) -> AsyncIterator[Api]:
        (tmp_path / "secret").write_text(SECRET)
        jwt = {"secret_file": str(tmp_path / "secret"), "leeway_seconds": 0}
        auth: dict[str, Any] = {"mode": mode, **({"jwt": jwt} if mode == "jwt" else {})}
        if mode == "proxy":
            auth["proxy"] = {"trusted": ["127.0.0.1"], "user_header": "X-User", "groups_header": None}
        async for api in run_api(mongodb_uri, db_name, tmp_path, WITHOUT_WORKER, auth=auth):
            yield api

    return running


async def create_key(db: Database, lifetime: timedelta | None = None) -> ApiKeyToken:
    token, now = ApiKeyToken.generate(), datetime.now(UTC)
    expires_at = None if lifetime is None else now + lifetime
    key = ApiKey(key_id=token.key_id, sha256=token.digest, user_id="alice", created_at=now, expires_at=expires_at)
    await api_keys.store_key(db, key)
    return token


async def wait_for_expiry() -> None:
    """Do nothing: the credential expires."""


async def obtain_credential(
    api: Api, case: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, str], EndCredential]:
    """Return the headers of an authenticated request, and a function that ends the credential."""
    if case == "proxy header that expires":
        monkeypatch.setattr(backends, "_PROXY_TRUST", timedelta(seconds=2))
        return {"X-User": "alice"}, wait_for_expiry
    if case == "token that expires":
        return {"Authorization": f"Bearer {make_token(exp=int(time.time()) + LIFETIME_SECONDS)}"}, wait_for_expiry
    if case == "session of a token that expires":
        response = await api.http.post(
            SIGN_IN, data={"credential": make_token(exp=int(time.time()) + LIFETIME_SECONDS)}, headers=api.origin_header
        )
        api.http.cookies.clear()
        return {"Cookie": f"jobledger={response.cookies['jobledger']}"}, wait_for_expiry
    token = await create_key(api.db, timedelta(seconds=LIFETIME_SECONDS) if case == "key that expires" else None)
    bearer = {"Authorization": f"Bearer {token}"}
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (await api.http.get(JOBS, headers=bearer)).status_code == 401:  # noqa: ASYNC110 - no event signals it
            await asyncio.sleep(0.02)

    async def revoke() -> None:
        await api_keys.revoke_key(api.db, token.key_id)

    if not case.startswith("session"):
        return bearer, wait_for_expiry if case == "key that expires" else revoke
    response = await api.http.post(SIGN_IN, data={"credential": str(token)}, headers=api.origin_header)
    api.http.cookies.clear()
    cookie = {"Cookie": f"jobledger={response.cookies['jobledger']}"}

    async def sign_out() -> None:
        await api.http.post(SIGN_OUT, headers={**cookie, **api.origin_header})

    return cookie, revoke if case == "session of a key that is revoked" else sign_out


CASES: Final = [
    ("keys", "key that is revoked"),
    ("keys", "key that expires"),
    ("keys", "session that is ended"),
    ("keys", "session of a key that is revoked"),
    ("jwt", "token that expires"),
    ("jwt", "session of a token that expires"),
    ("proxy", "proxy header that expires"),
]


@pytest.mark.parametrize(("mode", "case"), CASES)
async def test_streams_and_waits_end_with_their_credential_only(
    run: Any, mode: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run(mode) as api, httpx.AsyncClient(base_url=api.http.base_url, timeout=60, trust_env=False) as client:
        headers, end_credential = await obtain_credential(api, case, monkeypatch)
        other_token = await create_key(api.db)
        submitted = await client.post(
            JOBS,
            json={"job_type": "echo", "parameters": {}},
            headers={**headers, **api.origin_header},
        )
        job_id = submitted.json()["job_id"]
        opened = asyncio.Queue[str]()

        async def follow(path: str, headers: dict[str, str]) -> str:
            async with client.stream("GET", path, headers=headers) as response:
                assert response.status_code == 200
                opened.put_nowait(path)
                async for _ in response.aiter_bytes():
                    pass
            return path

        async def wait() -> int:
            opened.put_nowait(JOBS)
            return (await client.get(f"{JOBS}/{job_id}", headers={**headers, "Prefer": "wait=50"})).status_code

        streams = [
            asyncio.create_task(follow(path, headers)) for path in (STREAM, f"{STREAM}?job_id={job_id}", VIEW_UPDATES)
        ]
        waiting = asyncio.create_task(wait())
        stream_of_other_key = None
        if mode == "keys":
            stream_of_other_key = asyncio.create_task(follow(STREAM, {"Authorization": f"Bearer {other_token}"}))
        for _ in range(5 if stream_of_other_key else 4):
            await opened.get()
        await end_credential()
        async with asyncio.timeout(DEADLINE_SECONDS):
            await asyncio.gather(*streams)
            status = await waiting if mode != "proxy" else None
        if mode == "proxy":
            waiting.cancel()
        else:
            assert status == 401
        if stream_of_other_key is not None:
            assert not stream_of_other_key.done()
            stream_of_other_key.cancel()


@pytest.mark.parametrize(
    ("case", "is_cut"),
    [
        ("revoked", True),
        ("expired", True),
        ("another credential revoked", False),
        ("cannot be checked", False),
        ("proxy header that expires", False),
    ],
)
async def test_download_ends_when_its_credential_ends(case: str, is_cut: bool) -> None:
    """A download cannot be resumed by another request, so a proxy header stays valid until its end."""
    expires_at = datetime.now(UTC) + timedelta(seconds=0.2)
    is_expiring = case in ("expired", "proxy header that expires")
    principal = Principal("alice", valid_until=expires_at if is_expiring else None)
    revocations, first_checked, checked_at_end = RevocationNotifier(), asyncio.Event(), asyncio.Event()
    is_notified = False

    async def check(connection: HTTPConnection) -> Principal:
        first_checked.set()
        has_ended = is_notified and (not is_expiring or datetime.now(UTC) >= expires_at)
        if has_ended:
            checked_at_end.set()
        if case == "cannot be checked":
            raise ApiError(503, "jwks_unavailable", "")
        if has_ended and is_cut:
            raise ApiError(401, "invalid_credentials", "")
        return principal

    has_client_read = asyncio.Event()

    async def content() -> AsyncGenerator[bytes, None]:
        yield b"first"
        await has_client_read.wait()

    aborted = asyncio.Event()
    response = CloseableStreamingResponse(content(), 200, {})
    scope = {
        "type": "http",
        "path": "/file",
        "headers": [],
        "asgi": {"spec_version": "2.3"},
        "principal": principal,
        "authentication": AuthenticationMiddleware(response, check, revocations, build_auth_error_response),
        "state": {"abort": aborted.set},
    }

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    sent: list[Message] = []
    closed = asyncio.Event()

    async def close() -> None:
        closed.set()

    download = asyncio.create_task(CloseableStreamingResponse(content(), 200, {}, on_close=close)(scope, receive, send))
    async with asyncio.timeout(DEADLINE_SECONDS):
        await first_checked.wait()
        is_notified = True
        revocations.notify()
        await checked_at_end.wait()
        if is_cut:
            await aborted.wait()
            await asyncio.wait({download})
        for _ in range(100):  # a wrong abort follows the check within a few iterations of the event loop
            await asyncio.sleep(0)
    assert aborted.is_set() is is_cut
    assert download.done() is is_cut
    has_client_read.set()
    await asyncio.wait_for(download, DEADLINE_SECONDS)
    assert closed.is_set()
    assert (sent[-1].get("more_body") is False) is not is_cut
