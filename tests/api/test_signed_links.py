"""Signed links: they open one file to whoever has them, until they expire, and nothing else."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import httpx
import pytest
from starlette.requests import HTTPConnection

from jobledger.api.auth.signed_links import SignedLinks
from jobledger.api.http.errors import ApiError
from jobledger.cli import server as serving
from jobledger.cli.composition import Role
from jobledger.ledger.domain.access import Principal
from jobledger.projections.slots import Views
from jobledger.projections.views import files as view
from tests.api.conftest import Api, run_api
from tests.api.test_files import CONTENT, FILES, add_file


class OnlyWithKey:
    """A sign-in for tests: the header X-User says who it is."""

    def __init__(self, *_: Any) -> None:
        pass

    async def __call__(self, connection: HTTPConnection) -> Principal:
        user_id = connection.headers.get("x-user")
        if user_id is None:
            raise ApiError(401, "authentication_required", "Say who you are.")
        return Principal(None if user_id == "nobody" else user_id, roles=frozenset({"monitor"}))


@pytest.fixture
async def guarded(
    mongodb_uri: str, db_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Api]:
    """An API that wants to know who asks. The client is `local`, whose files all are."""
    monkeypatch.setattr(serving, "SingleUserBackend", OnlyWithKey)
    async for running in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api", "projector"})):
        running.http.headers["x-user"] = "local"
        yield running


async def link_to(api: Api, path: str, **body: Any) -> str:
    response = await api.post(f"{FILES}{quote(path)}/link", body)
    assert response.status_code == 200, response.text
    return str(response.json()["url"])


async def opened(api: Api, url: str, method: str = "GET", **headers: str) -> httpx.Response:
    """What somebody gets who has nothing but the link."""
    async with httpx.AsyncClient(base_url=api.http.base_url, trust_env=False) as stranger:
        return await stranger.request(method, url, headers=headers)


@pytest.mark.parametrize("name", ["talk.md", "Umläute & 日本?.md", "a+b #1%2F.md", "link"])
async def test_signed_link_opens_file_without_authentication(guarded: Api, name: str) -> None:
    await add_file(guarded, f"c/{name}")
    url = await link_to(guarded, f"c/{name}")

    assert (await opened(guarded, f"{FILES}c/{quote(name)}")).status_code == 401
    assert (await opened(guarded, url)).content == CONTENT
    assert (await opened(guarded, url, "HEAD")).headers["content-length"] == str(len(CONTENT))
    part = await opened(guarded, f"{url}&download=1", Range="bytes=3-5")
    assert (part.status_code, part.content) == (206, CONTENT[3:6])
    assert part.headers["content-disposition"].startswith("attachment")
    assert part.headers["referrer-policy"] == "no-referrer"


async def test_signed_link_expires_after_an_hour_or_the_given_time(guarded: Api) -> None:
    await add_file(guarded, "a.bin")
    for body, seconds in ({}, 3600), ({"expires_in_s": 60}, 60), ({"expires_in_s": 30 * 86_400}, 30 * 86_400):
        response = (await guarded.post(f"{FILES}a.bin/link", body)).json()
        expires = datetime.fromtimestamp(int(parse_qs(urlsplit(response["url"]).query)["expires"][0]), UTC)
        assert datetime.fromisoformat(response["expires_at"]) == expires
        assert abs(expires - datetime.now(UTC) - timedelta(seconds=seconds)) < timedelta(seconds=10)
    assert (await guarded.post(f"{FILES}a.bin/link")).status_code == 200


@pytest.mark.parametrize("seconds", [0, -1, 30 * 86_400 + 1, "soon", 1e300, None])
async def test_signed_link_with_invalid_lifetime_is_rejected(guarded: Api, seconds: Any) -> None:
    await add_file(guarded, "a.bin")
    response = await guarded.post(f"{FILES}a.bin/link", {"expires_in_s": seconds})
    assert response.status_code == 422
    assert response.json()["details"]["errors"][0]["path"] == "expires_in_s"


async def test_expired_link_is_rejected(guarded: Api) -> None:
    await add_file(guarded, "a.bin")
    row = await view.get(Views(guarded.db), "a.bin")
    assert row is not None
    url = await SignedLinks(guarded.db, None).create(row, datetime.now(UTC) - timedelta(seconds=1))
    response = await opened(guarded, url)
    assert (response.status_code, response.json()["code"]) == (403, "link_expired")


async def test_altered_link_is_rejected(guarded: Api) -> None:
    await add_file(guarded, "a.bin")
    await add_file(guarded, "b.bin", b"another")
    url = await link_to(guarded, "a.bin")
    query = {name: value for name, [value] in parse_qs(urlsplit(url).query).items()}
    later, signature = str(int(query["expires"]) + 1), query["signature"]
    for path, expires, signed in [
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
        changed = httpx.URL(f"{FILES}{path}", params={"expires": expires, "signature": signed})
        response = await opened(guarded, str(changed))
        assert (response.status_code, response.json()["code"]) == (403, "link_invalid"), changed
    without = await opened(guarded, f"{FILES}a.bin?expires={query['expires']}")
    assert without.status_code == 401


async def test_signed_link_gives_no_access_to_other_routes(guarded: Api) -> None:
    await add_file(guarded, "a.bin")
    url = await link_to(guarded, "a.bin")
    query = urlsplit(url).query
    [row] = await guarded.db.files.find().to_list()
    for method, path in [
        ("GET", "/api/events/jobs"),
        ("GET", f"/api/events/jobs/{row['job_id']}"),
        ("GET", f"/api/events/jobs/{row['job_id']}/download-archive"),
        ("GET", "/api/ledger/stream"),
        ("POST", f"{FILES}a.bin/link"),
        ("DELETE", f"{FILES}a.bin"),
    ]:
        response = await opened(guarded, f"{path}?{query}", method)
        assert response.status_code == 401, path


async def test_signed_link_of_deleted_file_is_rejected(guarded: Api) -> None:
    await add_file(guarded, "a.bin")
    url = await link_to(guarded, "a.bin")
    [row] = await guarded.db.files.find().to_list()
    deleted = await guarded.http.delete(f"/api/events/jobs/{row['job_id']}")
    await guarded.get("/api/events/jobs", deleted.headers["ledger-position"])
    gone = await opened(guarded, url)
    assert (gone.status_code, gone.json()["code"]) == (403, "link_invalid")
    await add_file(guarded, "a.bin", b"a later job's file under the same path")
    assert (await opened(guarded, url)).status_code == 403


async def test_link_creation_requires_authentication_and_read_access(guarded: Api) -> None:
    await add_file(guarded, "a.bin")
    stranger = await guarded.post(f"{FILES}a.bin/link", {}, **{"x-user": "stranger"})
    unknown = await guarded.post(f"{FILES}b.bin/link", {})
    assert (stranger.status_code, unknown.status_code) == (404, 404)
    await guarded.db.jobs.update_one({}, {"$set": {"access_control.visibility": "public"}})
    assert (await guarded.get(f"{FILES}a.bin", **{"x-user": "nobody"})).status_code == 200
    nobody = await guarded.post(f"{FILES}a.bin/link", {}, **{"x-user": "nobody"})
    assert (nobody.status_code, nobody.json()["code"]) == (401, "authentication_required")


async def test_signing_key_is_shared_by_all_processes(
    guarded: Api, mongodb_uri: str, db_name: str, tmp_path: Path
) -> None:
    await add_file(guarded, "a.bin")
    url = await link_to(guarded, "a.bin")
    async for other in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api"})):
        assert (await opened(other, url)).content == CONTENT
        other.http.headers["x-user"] = "local"
        assert (await opened(guarded, await link_to(other, "a.bin"))).content == CONTENT
    assert await guarded.db.secrets.count_documents({}) == 1


async def test_deleted_signing_key_invalidates_every_link(
    guarded: Api, mongodb_uri: str, db_name: str, tmp_path: Path
) -> None:
    await add_file(guarded, "a.bin")
    url = await link_to(guarded, "a.bin")
    await guarded.db.secrets.delete_many({})
    async for other in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api"})):
        assert (await opened(other, url)).status_code == 403


async def test_signed_link_starts_with_the_public_url(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    address = f"http://localhost:{port}"
    roles = frozenset[Role]({"api", "projector"})
    async for api in run_api(mongodb_uri, db_name, tmp_path, roles, api={"port": port, "public_url": f"{address}/"}):
        await add_file(api, "c/a.bin")
        url = await link_to(api, "c/a.bin")
        assert url.startswith(f"{address}{FILES}c/a.bin?expires=")
        assert (await opened(api, url)).content == CONTENT
