"""Test signed links: each gives access to one file, without authentication, until it expires."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import httpx
import pytest
from starlette.requests import HTTPConnection

from jobledger.api.auth.signed_links import SignedLinks
from jobledger.api.http.errors import ApiError
from jobledger.cli.hosting.server import open_listener
from jobledger.ledger.domain.access import Principal
from jobledger.projections.slots import Views
from jobledger.projections.views import files as files_view
from tests.api.conftest import BACKEND_NAME, Api, ApiInThread, RunApi, RunApiInThread, create_client, run_api
from tests.api.result_files import CONTENT, FILES, add_file


class RequiredUserBackend:
    """Authenticates by the header `X-User`, which is required. The user `anonymous` has no ID."""

    def __init__(self, *_: Any) -> None:
        pass

    async def __call__(self, connection: HTTPConnection) -> Principal:
        user_id = connection.headers.get("x-user")
        if user_id is None:
            raise ApiError(401, "authentication_required", "Authentication required.")
        return Principal(None if user_id == "anonymous" else user_id, roles=frozenset({"monitor"}))


@pytest.fixture
async def api(monkeypatch: pytest.MonkeyPatch, run_without_worker: RunApi) -> AsyncIterator[Api]:
    """An API that requires authentication. Its client is the user `local`, who owns all files."""
    monkeypatch.setattr(BACKEND_NAME, RequiredUserBackend)
    async with run_without_worker() as api:
        api.http.headers["x-user"] = "local"
        yield api


@pytest.fixture(scope="module")
def signed_api_of_module(run_in_thread: RunApiInThread) -> Iterator[ApiInThread]:
    """Like `api_of_module`, but requires authentication. Tests use it by `shared_signed_api`."""
    with run_in_thread(RequiredUserBackend) as api:
        yield api


@pytest.fixture
async def shared_signed_api(signed_api_of_module: ApiInThread) -> AsyncIterator[Api]:
    """Like `api`, but one API for the module. Equal paths have equal content."""
    async with signed_api_of_module.open() as api:
        api.http.headers["x-user"] = "local"
        yield api


async def create_link(api: Api, path: str, **body: Any) -> str:
    response = await api.post(f"{FILES}{quote(path)}/link", body)
    assert response.status_code == 200, response.text
    return str(response.json()["url"])


async def request_anonymously(api: Api, url: str, method: str = "GET", **headers: str) -> httpx.Response:
    """Send a request without credentials."""
    async with create_client(api.url) as client:
        return await client.request(method, url, headers=headers)


@pytest.mark.parametrize("name", ["talk.md", "Umläute & 日本?.md", "a+b #1%2F.md", "link"])
async def test_signed_link_opens_file_without_authentication(shared_signed_api: Api, name: str) -> None:
    await add_file(shared_signed_api, f"c/{name}")
    url = await create_link(shared_signed_api, f"c/{name}")

    assert (await request_anonymously(shared_signed_api, f"{FILES}c/{quote(name)}")).status_code == 401
    assert (await request_anonymously(shared_signed_api, url)).content == CONTENT
    assert (await request_anonymously(shared_signed_api, url, "HEAD")).headers["content-length"] == str(len(CONTENT))
    part = await request_anonymously(shared_signed_api, f"{url}&download=1", Range="bytes=3-5")
    assert (part.status_code, part.content) == (206, CONTENT[3:6])
    assert part.headers["content-disposition"].startswith("attachment")
    assert part.headers["referrer-policy"] == "no-referrer"


async def test_signed_link_expires_after_an_hour_or_the_given_time(shared_signed_api: Api) -> None:
    await add_file(shared_signed_api, "a.bin")
    for body, seconds in ({}, 3600), ({"expires_in_s": 60}, 60), ({"expires_in_s": 30 * 86_400}, 30 * 86_400):
        start = datetime.now(UTC)
        response = (await shared_signed_api.post(f"{FILES}a.bin/link", body)).json()
        expires = datetime.fromtimestamp(int(parse_qs(urlsplit(response["url"]).query)["expires"][0]), UTC)
        assert datetime.fromisoformat(response["expires_at"]) == expires
        created = expires - timedelta(seconds=seconds)
        assert start - timedelta(seconds=1) < created <= datetime.now(UTC)  # expires in a whole second
    assert (await shared_signed_api.post(f"{FILES}a.bin/link")).status_code == 200


@pytest.mark.parametrize("seconds", [0, -1, 30 * 86_400 + 1, "soon", 1e300, None])
async def test_signed_link_with_invalid_lifetime_is_rejected(shared_signed_api: Api, seconds: Any) -> None:
    await add_file(shared_signed_api, "a.bin")
    response = await shared_signed_api.post(f"{FILES}a.bin/link", {"expires_in_s": seconds})
    assert response.status_code == 422
    assert response.json()["details"]["errors"][0]["path"] == "expires_in_s"


async def test_expired_link_is_rejected(shared_signed_api: Api) -> None:
    await add_file(shared_signed_api, "a.bin")
    row = await files_view.get(Views(shared_signed_api.db), "a.bin")
    assert row is not None
    url = await SignedLinks(shared_signed_api.db, None).create(row, datetime.now(UTC) - timedelta(seconds=1))
    response = await request_anonymously(shared_signed_api, url)
    assert (response.status_code, response.json()["code"]) == (403, "link_expired")


async def test_altered_link_is_rejected(shared_signed_api: Api) -> None:
    await add_file(shared_signed_api, "a.bin")
    await add_file(shared_signed_api, "b.bin", b"another")
    url = await create_link(shared_signed_api, "a.bin")
    query = {name: value for name, [value] in parse_qs(urlsplit(url).query).items()}
    later, signature = str(int(query["expires"]) + 1), query["signature"]
    for path, expires, given_signature in [
        ("b.bin", query["expires"], signature),
        ("c.bin", query["expires"], signature),
        ("a.bin", later, signature),
        ("a.bin", f"{query['expires']} ", signature),
        ("a.bin", "", signature),
        ("a.bin", "-1", signature),
        ("a.bin", "²", signature),
        ("a.bin", "9" * 4000, signature),
        ("a.bin", query["expires"], signature[:-1]),
        ("a.bin", query["expires"], signature.upper() + "x"),
        ("a.bin", query["expires"], ""),
        ("a.bin", query["expires"], "ä"),
        ("a.bin", query["expires"], "0" * 64),
    ]:
        changed = httpx.URL(f"{FILES}{path}", params={"expires": expires, "signature": given_signature})
        response = await request_anonymously(shared_signed_api, str(changed))
        assert (response.status_code, response.json()["code"]) == (403, "link_invalid"), changed
    unsigned = await request_anonymously(shared_signed_api, f"{FILES}a.bin?expires={query['expires']}")
    assert unsigned.status_code == 401


async def test_signed_link_gives_no_access_to_other_routes(api: Api) -> None:
    await add_file(api, "a.bin")
    url = await create_link(api, "a.bin")
    query = urlsplit(url).query
    [row] = await api.db.files.find().to_list()
    for method, path in [
        ("GET", "/api/events/jobs"),
        ("GET", f"/api/events/jobs/{row['job_id']}"),
        ("GET", f"/api/events/jobs/{row['job_id']}/download-archive"),
        ("GET", "/api/ledger/stream"),
        ("POST", f"{FILES}a.bin/link"),
        ("DELETE", f"{FILES}a.bin"),
    ]:
        response = await request_anonymously(api, f"{path}?{query}", method)
        assert response.status_code == 401, path


async def test_signed_link_of_deleted_file_is_rejected(api: Api) -> None:
    await add_file(api, "a.bin")
    url = await create_link(api, "a.bin")
    [row] = await api.db.files.find().to_list()
    deleted = await api.http.delete(f"/api/events/jobs/{row['job_id']}")
    await api.get("/api/events/jobs", deleted.headers["ledger-position"])
    response = await request_anonymously(api, url)
    assert (response.status_code, response.json()["code"]) == (403, "link_invalid")
    await add_file(api, "a.bin", b"file of a later job with the same path")
    assert (await request_anonymously(api, url)).status_code == 403


async def test_link_creation_requires_authentication_and_read_access(api: Api) -> None:
    await add_file(api, "a.bin")
    unreadable = await api.post(f"{FILES}a.bin/link", {}, **{"x-user": "stranger"})
    missing = await api.post(f"{FILES}b.bin/link", {})
    assert (unreadable.status_code, missing.status_code) == (404, 404)
    await api.db.jobs.update_one({}, {"$set": {"access_control.visibility": "public"}})
    assert (await api.get(f"{FILES}a.bin", **{"x-user": "anonymous"})).status_code == 200
    unauthenticated = await api.post(f"{FILES}a.bin/link", {}, **{"x-user": "anonymous"})
    assert (unauthenticated.status_code, unauthenticated.json()["code"]) == (401, "authentication_required")


async def test_signing_key_is_shared_by_all_processes(api: Api, mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    await add_file(api, "a.bin")
    url = await create_link(api, "a.bin")
    async for second_api in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api"})):
        assert (await request_anonymously(second_api, url)).content == CONTENT
        second_api.http.headers["x-user"] = "local"
        assert (await request_anonymously(api, await create_link(second_api, "a.bin"))).content == CONTENT
    assert await api.db.secrets.count_documents({}) == 1


async def test_deleted_signing_key_invalidates_every_link(
    api: Api, mongodb_uri: str, db_name: str, tmp_path: Path
) -> None:
    await add_file(api, "a.bin")
    url = await create_link(api, "a.bin")
    await api.db.secrets.delete_many({})
    async for second_api in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api"})):
        assert (await request_anonymously(second_api, url)).status_code == 403


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The listening socket of the API. The test needs its port before the API starts."""
    with open_listener("127.0.0.1", 0) as listener:
        monkeypatch.setattr("jobledger.cli.hosting.server.open_listener", lambda _host, _port: nullcontext(listener))
        yield listener


async def test_signed_link_starts_with_the_public_url(listener: socket.socket, run_without_worker: RunApi) -> None:
    public_url = f"http://localhost:{listener.getsockname()[1]}"
    async with run_without_worker(api={"public_url": f"{public_url}/"}) as api:
        await add_file(api, "c/a.bin")
        url = await create_link(api, "c/a.bin")
        assert url.startswith(f"{public_url}{FILES}c/a.bin?expires=")
        assert (await request_anonymously(api, url)).content == CONTENT
