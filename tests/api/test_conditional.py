"""Validators cover everything that a representation shows: no conditional request gets a stale 304."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from jobledger.api.auth.redaction import BATCH_RULES, JOB_RULES
from jobledger.api.routes.docs import Docs
from jobledger.projections.slots import Views
from tests.api.conftest import Api
from tests.api.test_files import add_file

WITH_VALIDATOR = {
    "/api/events/jobs/{job_id}",
    "/api/events/batches/{batch_id}",
    "/api/events/files/{path}",
    "/api/openapi.json",
    "/api/docs",
}
FILE_FIELDS = ("sha256", "media_type", "modified_at")
"""The fields of a file's row that its response shows. The path is the URL itself."""


async def test_only_known_representations_have_validators(api_without_worker: Api) -> None:
    paths = (await api_without_worker.get("/api/openapi.json")).json()["paths"]
    assert {path for path, item in paths.items() if "304" in item.get("get", {}).get("responses", {})} == WITH_VALIDATOR
    batch = await api_without_worker.submit_batch({})
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
        response = await api_without_worker.get(path)
        assert response.status_code == 200, path
        assert not {"etag", "last-modified"} & response.headers.keys(), path


@pytest.mark.parametrize("kind", ["job", "batch"])
async def test_etag_changes_with_each_field_of_a_job_or_batch(api: Api, kind: str) -> None:
    batch = await api.submit_batch({"text": "a"})
    job_id, batch_id = batch["job_ids"][0], batch["batch_id"]
    await api.wait_until_finished(job_id)
    await api.wait_for_event(batch_id, "BatchFinished")
    path, view, key, rules = {
        "job": (f"/api/events/jobs/{job_id}", "jobs", job_id, JOB_RULES),
        "batch": (f"/api/events/batches/{batch_id}", "batches", batch_id, BATCH_RULES),
    }[kind]
    rows = Views(api.db)[view]
    webhook = {"url": "https://example.org/hook", "headers": {"a": "***"}, "include_markdown": False}
    original = await rows.find_one_and_update({"_id": key}, {"$set": {"webhook": webhook}}, return_document=True)
    assert original is not None
    first = await api.get(path)
    known = first.headers["etag"]
    assert (await api.get(path, **{"If-None-Match": known})).status_code == 304
    changed_fields = set()
    for field, document in changed_documents(original, rules):
        await rows.replace_one({"_id": key}, document)
        response = await api.get(path, **{"If-None-Match": known})
        assert response.status_code == 200, field
        assert response.headers["etag"] != known, field
        assert response.json()[kind] != first.json()[kind], field
        changed_fields.add(field.partition(".")[0])
        assert (await api.get(path, **{"If-Match": known})).status_code == 412, field
    await rows.replace_one({"_id": key}, original)
    assert (await api.get(path, **{"If-None-Match": known})).status_code == 304
    # `paused` of a job comes from its batch, and is tested below.
    assert changed_fields | {"paused"} >= first.json()[kind].keys()


async def test_etag_changes_with_the_batch_of_a_pending_job(api_without_worker: Api) -> None:
    batch = await api_without_worker.submit_batch({})
    path = f"/api/events/jobs/{batch['job_ids'][0]}"
    position = await api_without_worker.event_store.head_position()
    known = (await api_without_worker.get(path, position)).headers["etag"]
    for action, is_paused in (("pause", True), ("resume", False)):
        response = await api_without_worker.post(f"/api/events/batches/{batch['batch_id']}/{action}")
        response = await api_without_worker.get(path, response.headers["ledger-position"], **{"If-None-Match": known})
        assert response.status_code == 200
        assert response.json()["job"]["paused"] is is_paused
        known = response.headers["etag"]


async def test_validators_change_with_each_field_of_a_file(api_without_worker: Api) -> None:
    path = "/api/events/files/a.bin"
    sha256 = await add_file(api_without_worker, "a.bin", b"first")
    rows = Views(api_without_worker.db)["files"]
    original = await rows.find_one({"sha256": sha256})
    assert original is not None
    first = await api_without_worker.get(path)
    shown = {
        "sha256": await add_file(api_without_worker, "b.bin", b"other"),
        "media_type": "text/html",
        "modified_at": original["modified_at"] + timedelta(hours=1),
    }
    assert tuple(shown) == FILE_FIELDS
    for field, value in shown.items():
        size = 5 if field == "sha256" else original["size"]
        await rows.replace_one({"_id": original["_id"]}, {**original, field: value, "size": size})
        validators = {"modified_at": {"If-Modified-Since": first.headers["last-modified"]}}
        conditions = validators.get(field, {"If-None-Match": first.headers["etag"]})
        response = await api_without_worker.get(path, **conditions)
        assert response.status_code == 200, field
        assert (response.headers["etag"] == first.headers["etag"]) == (field == "modified_at")
        # A range that continues the first response must not be combined with the changed file.
        validator = first.headers["last-modified" if field == "modified_at" else "etag"]
        part = await api_without_worker.get(path, **{"Range": "bytes=2-", "If-Range": validator})
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
    etags = {respond(Docs(lambda: document).json).headers["etag"]}
    changes = dict(changed_documents(document, document))
    for number, (field, changed) in enumerate(changes.items(), 2):
        docs = Docs(lambda changed=changed: changed)  # type: ignore[misc]  # binds the loop's value
        response = respond(docs.json, **{"if-none-match": ", ".join(etags)})
        assert response.status_code == 200, field
        etags.add(response.headers["etag"])
        assert len(etags) == number, field


async def test_docs_with_matching_etag_are_not_modified(api_without_worker: Api) -> None:
    for path in ("/api/openapi.json", "/api/docs"):
        known = (await api_without_worker.get(path)).headers["etag"]
        for tags, status in (
            (known, 304),
            (f'"a", W/{known}', 304),
            ("*", 304),
            (known[1:-1], 200),
            (f'{known}"', 304),
        ):
            response = await api_without_worker.get(path, **{"If-None-Match": tags})
            assert response.status_code == status, tags
        assert (await api_without_worker.get(path, **{"If-Match": '"other"'})).status_code == 412


async def test_static_files_have_versioned_url_and_no_validator(api_without_worker: Api) -> None:
    page = await api_without_worker.get("/monitoring/events")
    [path, *_] = [word for word in page.text.split('"') if "/static/" in word]
    response = await api_without_worker.http.get(str(httpx.URL("/monitoring/events").join(path)))
    assert response.status_code == 200
    assert "immutable" in response.headers["cache-control"]
    assert "etag" not in response.headers


def respond(content: Any, **headers: str) -> Any:
    """Return the response of a document to a request with these headers."""
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return content.build_response(Request({"type": "http", "method": "GET", "headers": raw}))


def changed_documents(document: Mapping[str, Any], names: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield copies of a document, each with another value of one field, or of one field of an object in it."""
    for name in names:
        value = document.get(name)
        if isinstance(value, dict):
            for key in value:
                yield f"{name}.{key}", {**document, name: {**deepcopy(value), key: changed_value(value[key])}}
            yield f"{name}.added", {**document, name: {**deepcopy(value), "added": 1}}
        else:
            yield name, {**document, name: changed_value(value)}


def changed_value(value: Any) -> Any:
    """Return another value, of the same type where possible."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, datetime):
        return value + timedelta(seconds=1)
    if isinstance(value, list):
        return [*value, {"url": "/added"}]  # as an asset of results
    if isinstance(value, dict):
        return {**value, "added": 1}
    return {"added": 1}
