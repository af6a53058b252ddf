"""Test that ETags and Last-Modified cover the whole response, so no conditional request gets an outdated 304."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from jobledger.api.auth.redaction import BATCH_FIELD_RULES, JOB_FIELD_RULES
from jobledger.api.routes.docs import Docs
from jobledger.projections.slots import Views
from tests.api.conftest import Api
from tests.api.result_files import add_file
from tests.support.header_auth import principal_header

PATHS_WITH_VALIDATOR = {
    "/api/events/jobs/{job_id}",
    "/api/events/batches/{batch_id}",
    "/api/events/files/{path}",
    "/api/openapi.json",
    "/api/docs",
}
FILE_FIELDS = ("sha256", "media_type", "modified_at")
"""The fields of a file's row that its response contains. The path is the URL itself."""
VIEWERS = {
    "owner": principal_header("owner"),
    "writer": principal_header("writer"),
    "reader": principal_header("reader"),
}
ACCESS = {"visibility": "public", "read_access": ["reader"], "write_access": ["writer"]}


async def test_only_known_representations_have_validators(shared_api: Api) -> None:
    paths = (await shared_api.get("/api/openapi.json")).json()["paths"]
    assert {
        path for path, item in paths.items() if "304" in item.get("get", {}).get("responses", {})
    } == PATHS_WITH_VALIDATOR
    batch = await shared_api.submit_batch({})
    for path in (
        "/",
        "/api/events/jobs",
        "/api/events/batches",
        f"/api/events/batches/{batch['batch_id']}/jobs",
        f"/api/events/jobs/{batch['job_ids'][0]}/history",
        "/api/ledger/events",
        "/api/ledger/head",
        "/api/monitoring/events/stats",
        "/api/monitoring/events/webhooks",
        "/api/monitoring/events/webhook-endpoints",
        "/metrics",
        "/healthz",
        "/readyz",
    ):
        response = await shared_api.get(path)
        assert response.status_code == 200, path
        assert not {"etag", "last-modified"} & response.headers.keys(), path


@pytest.mark.parametrize("kind", ["job", "batch"])
async def test_etag_changes_with_each_field_of_a_job_or_batch(api: Api, kind: str) -> None:
    batch = await api.submit_batch({"text": "a"})
    job_id, batch_id = batch["job_ids"][0], batch["batch_id"]
    await api.wait_until_finished(job_id)
    await api.wait_for_event(batch_id, "BatchFinished")
    path, view, key, rules = {
        "job": (f"/api/events/jobs/{job_id}", "jobs", job_id, JOB_FIELD_RULES),
        "batch": (f"/api/events/batches/{batch_id}", "batches", batch_id, BATCH_FIELD_RULES),
    }[kind]
    rows = Views(api.db)[view]
    webhook = {"url": "https://example.org/hook", "headers": {"a": "***"}, "include_markdown": False}
    original = await rows.find_one_and_update({"_id": key}, {"$set": {"webhook": webhook}}, return_document=True)
    assert original is not None
    first = await api.get(path)
    etag = first.headers["etag"]
    assert (await api.get(path, **{"If-None-Match": etag})).status_code == 304
    changed_fields = set()
    for field, document in iterate_changed_documents(original, rules):
        await rows.replace_one({"_id": key}, document)
        response = await api.get(path, **{"If-None-Match": etag})
        assert response.status_code == 200, field
        assert response.headers["etag"] != etag, field
        assert response.json()[kind] != first.json()[kind], field
        changed_fields.add(field.partition(".")[0])
        assert (await api.get(path, **{"If-Match": etag})).status_code == 412, field
    await rows.replace_one({"_id": key}, original)
    assert (await api.get(path, **{"If-None-Match": etag})).status_code == 304
    # `paused` of a job comes from its batch, and `waiting_for` is derived. The next test covers them.
    assert changed_fields | {"paused", "waiting_for"} >= first.json()[kind].keys()


async def test_etag_changes_with_the_batch_of_a_pending_job(shared_api: Api) -> None:
    batch = await shared_api.submit_batch({})
    path = f"/api/events/jobs/{batch['job_ids'][0]}"
    position = await shared_api.event_store.read_head_position()
    etag = (await shared_api.get(path, position)).headers["etag"]
    for action, is_paused in (("pause", True), ("resume", False)):
        response = await shared_api.post(f"/api/events/batches/{batch['batch_id']}/{action}")
        response = await shared_api.get(path, response.headers["ledger-position"], **{"If-None-Match": etag})
        assert response.status_code == 200
        job = response.json()["job"]
        assert (job["paused"], job["waiting_for"]) == (is_paused, "batch_paused" if is_paused else "worker")
        etag = response.headers["etag"]


async def test_validators_change_with_each_field_of_a_file(shared_api: Api) -> None:
    path = "/api/events/files/a.bin"
    sha256 = await add_file(shared_api, "a.bin", b"first")
    rows = Views(shared_api.db)["files"]
    original = await rows.find_one({"sha256": sha256})
    assert original is not None
    first = await shared_api.get(path)
    new_values = {
        "sha256": await add_file(shared_api, "b.bin", b"other"),
        "media_type": "text/html",
        "modified_at": original["modified_at"] + timedelta(hours=1),
    }
    assert tuple(new_values) == FILE_FIELDS
    for field, value in new_values.items():
        size = 5 if field == "sha256" else original["size"]
        await rows.replace_one({"_id": original["_id"]}, {**original, field: value, "size": size})
        validators = {"modified_at": {"If-Modified-Since": first.headers["last-modified"]}}
        conditions = validators.get(field, {"If-None-Match": first.headers["etag"]})
        response = await shared_api.get(path, **conditions)
        assert response.status_code == 200, field
        assert (response.headers["etag"] == first.headers["etag"]) == (field == "modified_at")
        # A range that continues the first response must not be combined with the changed file.
        validator = first.headers["last-modified" if field == "modified_at" else "etag"]
        part = await shared_api.get(path, **{"Range": "bytes=2-", "If-Range": validator})
        assert part.status_code == 200, field


def test_etag_changes_with_each_part_of_the_openapi_document() -> None:
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "a", "version": "1", "description": "d", "license": {"name": "n", "identifier": "i"}},
        "servers": [{"url": "/"}],
        "tags": [],
        "paths": {},
        "components": {"schemas": {}},
    }
    etags = {build_response(Docs(lambda: document).json).headers["etag"]}
    changes = dict(iterate_changed_documents(document, document))
    for number, (field, changed) in enumerate(changes.items(), 2):
        docs = Docs(lambda changed=changed: changed)  # type: ignore[misc]  # binds the loop's value
        response = build_response(docs.json, **{"if-none-match": ", ".join(etags)})
        assert response.status_code == 200, field
        etags.add(response.headers["etag"])
        assert len(etags) == number, field


async def test_docs_with_matching_etag_are_not_modified(shared_api: Api) -> None:
    for path in ("/api/openapi.json", "/api/docs"):
        etag = (await shared_api.get(path)).headers["etag"]
        for tags, status in (
            (etag, 304),
            (f'"a", W/{etag}', 304),
            ("*", 304),
            (etag[1:-1], 200),
            (f'{etag}"', 304),
        ):
            response = await shared_api.get(path, **{"If-None-Match": tags})
            assert response.status_code == status, tags
        assert (await shared_api.get(path, **{"If-Match": '"other"'})).status_code == 412


async def test_static_files_have_versioned_url_and_no_validator(shared_api: Api) -> None:
    page = await shared_api.get("/monitoring/events")
    [path, *_] = [word for word in page.text.split('"') if "/static/" in word]
    response = await shared_api.http.get(str(httpx.URL("/monitoring/events").join(path)))
    assert response.status_code == 200
    assert "immutable" in response.headers["cache-control"]
    assert "etag" not in response.headers


async def test_etag_differs_between_different_bodies_of_one_url(header_auth_api: Api) -> None:
    owner = header_auth_api.as_user("owner")
    batch = await owner.submit_batch({}, {}, access_control=ACCESS)
    batch_id, job_id = batch["batch_id"], batch["job_ids"][0]
    job_url, batch_url = f"/api/events/jobs/{job_id}", f"/api/events/batches/{batch_id}"
    bodies: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    position = str(await header_auth_api.event_store.read_head_position())
    for method, path, content in (
        ("GET", job_url, None),
        ("POST", f"{batch_url}/pause", None),
        ("PUT", job_url, {"priority": 5}),
        ("POST", f"{batch_url}/resume", None),
        ("PUT", batch_url, {"access_control": {**ACCESS, "read_access": []}}),
        ("POST", f"{batch_url}/pause", None),
        ("POST", f"{job_url}/cancel", None),
        ("POST", f"{job_url}/archive", None),
        ("POST", f"{batch_url}/cancel", None),
    ):
        response = await header_auth_api.http.request(method, path, json=content, headers=VIEWERS["owner"])
        assert response.status_code == 200, response.text
        if method != "GET":
            position = response.headers["ledger-position"]
        for url in (job_url, f"{job_url}?as_of={position}", batch_url, f"{batch_url}?as_of={position}"):
            for headers in VIEWERS.values():
                response = await header_auth_api.get(url, position, **headers)
                assert response.status_code == 200, response.text
                etag, body = response.headers["etag"], response.json()
                assert bodies[url].setdefault(etag, body) == body, url
                for tag in {etag, next(iter(bodies[url]))}:
                    response = await header_auth_api.get(url, position, **headers, **{"If-None-Match": tag})
                    assert response.status_code == (304 if tag == etag else 200), url
    assert all(len(bodies[url]) > 5 for url in bodies if "?" not in url)


async def test_job_as_of_position_is_paused_if_its_batch_was(shared_api: Api) -> None:
    batch = await shared_api.submit_batch({})
    url = f"/api/events/jobs/{batch['job_ids'][0]}"
    states = [(await shared_api.event_store.read_head_position(), False)]
    for action, paused in (("pause", True), ("resume", False), ("pause", True)):
        response = await shared_api.post(f"/api/events/batches/{batch['batch_id']}/{action}")
        states.append((int(response.headers["ledger-position"]), paused))
    for position, paused in states:
        assert (await shared_api.get(f"{url}?as_of={position}")).json()["job"]["paused"] == paused, position


def build_response(content: Any, **headers: str) -> Any:
    """Return the response to a request for a document with these headers."""
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return content.build_response(Request({"type": "http", "method": "GET", "headers": raw}))


def iterate_changed_documents(
    document: Mapping[str, Any], names: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a field name and a copy of the document with another value of this field, for each field.

    An object is changed in each of its own fields.
    """
    for name in names:
        value = document.get(name)
        if isinstance(value, dict):
            for key in value:
                yield f"{name}.{key}", {**document, name: {**deepcopy(value), key: change_value(value[key])}}
            yield f"{name}.added", {**document, name: {**deepcopy(value), "added": 1}}
        else:
            yield name, {**document, name: change_value(value)}


def change_value(value: Any) -> Any:
    """Return a different value, of the same type where possible."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, datetime):
        return value + timedelta(seconds=1)
    if isinstance(value, list):
        return [*value, {"url": "/added"}]  # like an asset of results
    if isinstance(value, dict):
        return {**value, "added": 1}
    return {"added": 1}
