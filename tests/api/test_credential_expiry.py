"""What is open when a credential ends is ended with it: streams, live pages and long waits, in every mode."""

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

from jobledger.api.auth import api_keys
from jobledger.api.auth import backends as sign_in
from jobledger.api.auth.api_keys import ApiKey, ApiKeyToken
from jobledger.api.auth.permissions import AuthenticationMiddleware, RevocationNotifier
from jobledger.api.http.errors import ApiError
from jobledger.api.http.streaming import CloseableStreamingResponse
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.mongo.connection import Database
from tests.api.conftest import Api, run_api
from tests.support.jwt_issuer import SECRET, make_token

STREAM, VIEW_UPDATES, JOBS = "/api/ledger/stream", "/monitoring/events/view-updates", "/api/events/jobs"
SIGN_IN, SIGN_OUT = "/monitoring/events/sign-in", "/monitoring/events/sign-out"
SOON_SECONDS: Final = 3.0
"""Within a second or so, on a machine that is busy with other tests."""
Ends = Callable[[], Awaitable[None]]


@pytest.fixture
def run(mongodb_uri: str, db_name: str, tmp_path: Path) -> Any:
    @asynccontextmanager
    async def running(mode: str) -> AsyncIterator[Api]:
        (tmp_path / "secret").write_text(SECRET)
        jwt = {"secret_file": str(tmp_path / "secret"), "leeway_seconds": 0}
        auth: dict[str, Any] = {"mode": mode, **({"jwt": jwt} if mode == "jwt" else {})}
        if mode == "proxy":
            auth["proxy"] = {"trusted": ["127.0.0.1"], "user_header": "X-User", "groups_header": None}
        async for api in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api", "projector"}), auth=auth):
            yield api

    return running


async def key_for(db: Database, lifetime: timedelta | None = None) -> ApiKeyToken:
    text, now = ApiKeyToken.generate(), datetime.now(UTC)
    until = None if lifetime is None else now + lifetime
    key = ApiKey(key_id=text.key_id, sha256=text.digest, user_id="alice", created_at=now, expires_at=until)
    await api_keys.store_key(db, key)
    return text


async def nothing() -> None:
    """The credential ends by itself."""


async def credential(api: Api, case: str, patch: pytest.MonkeyPatch) -> tuple[dict[str, str], Ends]:
    """Return the headers of somebody who is signed in, and what ends that."""
    ours = {"Origin": str(api.http.base_url).rstrip("/")}
    if case == "proxy that has to say it again":
        patch.setattr(sign_in, "_PROXY_TRUST", timedelta(seconds=2))
        return {"X-User": "alice"}, nothing
    if case == "token that expires":
        return {"Authorization": f"Bearer {make_token(exp=int(time.time()) + 3)}"}, nothing
    if case == "session of a token that expires":
        answer = await api.http.post(SIGN_IN, data={"credential": make_token(exp=int(time.time()) + 3)}, headers=ours)
        api.http.cookies.clear()
        return {"Cookie": f"jobledger={answer.cookies['jobledger']}"}, nothing
    text = await key_for(api.db, timedelta(seconds=3) if case == "key that expires" else None)
    bearer = {"Authorization": f"Bearer {text}"}
    async with asyncio.timeout(SOON_SECONDS):
        while (await api.http.get(JOBS, headers=bearer)).status_code == 401:  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    async def revoked() -> None:
        await api_keys.revoke_key(api.db, text.key_id)

    if not case.startswith("session"):
        return bearer, nothing if case == "key that expires" else revoked
    answer = await api.http.post(SIGN_IN, data={"credential": str(text)}, headers=ours)
    api.http.cookies.clear()
    cookie = {"Cookie": f"jobledger={answer.cookies['jobledger']}"}

    async def signed_out() -> None:
        await api.http.post(SIGN_OUT, headers={**cookie, **ours})

    return cookie, revoked if case == "session of a key that is revoked" else signed_out


CASES: Final = [
    ("keys", "key that is revoked"),
    ("keys", "key that expires"),
    ("keys", "session that is ended"),
    ("keys", "session of a key that is revoked"),
    ("jwt", "token that expires"),
    ("jwt", "session of a token that expires"),
    ("proxy", "proxy that has to say it again"),
]


@pytest.mark.parametrize(("mode", "case"), CASES)
async def test_streams_and_waits_end_with_their_credential_and_others_go_on(
    run: Any, mode: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run(mode) as api, httpx.AsyncClient(base_url=api.http.base_url, timeout=60, trust_env=False) as client:
        headers, end = await credential(api, case, monkeypatch)
        other = await key_for(api.db)
        submitted = await client.post(
            JOBS,
            json={"job_type": "echo", "parameters": {}},
            headers={**headers, "Origin": str(api.http.base_url).rstrip("/")},
        )
        job_id = submitted.json()["job_id"]
        opened = asyncio.Queue[str]()

        async def follow(path: str, sent: dict[str, str]) -> str:
            async with client.stream("GET", path, headers=sent) as answer:
                assert answer.status_code == 200
                opened.put_nowait(path)
                async for _ in answer.aiter_bytes():
                    pass
            return path

        async def wait() -> int:
            opened.put_nowait(JOBS)
            return (await client.get(f"{JOBS}/{job_id}", headers={**headers, "Prefer": "wait=50"})).status_code

        streams = [
            asyncio.create_task(follow(path, headers)) for path in (STREAM, f"{STREAM}?job_id={job_id}", VIEW_UPDATES)
        ]
        waits = asyncio.create_task(wait())
        unconcerned = None
        if mode == "keys":
            unconcerned = asyncio.create_task(follow(STREAM, {"Authorization": f"Bearer {other}"}))
        for _ in range(5 if unconcerned else 4):
            await opened.get()
        await asyncio.sleep(0.2)
        await end()
        async with asyncio.timeout(SOON_SECONDS + 3):
            await asyncio.gather(*streams)
            status = await waits if mode != "proxy" else None
        if mode == "proxy":
            waits.cancel()
        else:
            assert status == 401
        if unconcerned is not None:
            assert not unconcerned.done()
            unconcerned.cancel()


@pytest.mark.parametrize(
    ("case", "is_cut"),
    [
        ("revoked", True),
        ("expired", True),
        ("another one", False),
        ("cannot be checked", False),
        ("proxy that has to say it again", False),
    ],
)
async def test_downloads_end_with_their_credential_and_no_others(case: str, is_cut: bool) -> None:
    """A download cannot be continued by another request, so a proxy's word is good for all of it."""
    now = datetime.now(UTC)
    ends_soon = case in ("expired", "proxy that has to say it again")
    principal = Principal("alice", valid_until=now + timedelta(seconds=0.2) if ends_soon else None)
    revocations, is_closed, ended = RevocationNotifier(), asyncio.Event(), False

    async def check(connection: HTTPConnection) -> Principal:
        if case == "cannot be checked":
            raise ApiError(503, "jwks_unavailable", "")
        if ended or (case == "expired" and datetime.now(UTC) >= now + timedelta(seconds=0.2)):
            raise ApiError(401, "invalid_credentials", "")
        return principal

    async def content() -> AsyncGenerator[bytes, None]:
        yield b"first"
        await is_closed.wait()  # as long as the client reads slowly

    aborted = asyncio.Event()
    scope = {
        "type": "http",
        "path": "/file",
        "headers": [],
        "asgi": {"spec_version": "2.3"},
        "principal": principal,
        "authentication": AuthenticationMiddleware(CloseableStreamingResponse(content(), 200, {}), check, revocations),
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
    await asyncio.sleep(0.05)
    ended = case == "revoked"
    revocations.notify()
    await asyncio.sleep(0.3)
    assert aborted.is_set() is is_cut
    assert download.done() is is_cut
    is_closed.set()
    await asyncio.wait_for(download, 5)
    assert closed.is_set()
    assert (sent[-1].get("more_body") is False) is not is_cut
