"""A log exported and imported into an empty database gives the same response on every route."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from jobledger.api.app import ROUTES
from jobledger.cli.administration.view_maintenance import rebuild_views
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.export import export_log
from jobledger.ledger.store.import_ import import_log
from tests.api.conftest import WITHOUT_WORKER, Api, run_api
from tests.support.webhook_endpoint import run_webhook_endpoint

ROUTES_WITH_OTHER_STATE = {
    "/metrics",
    "/api/monitoring/events/stats",
    "/api/monitoring/events/webhook-endpoints",
    "/api/events/test-webhook-callback",
}
"""Routes that also show the state of processes, signing secrets of endpoints, or messages received by webhook echo."""
STREAM = "/api/ledger/stream"


@pytest.fixture
def import_target(mongodb_uri: str, db_name: str) -> Iterator[Connection]:
    name = f"{db_name}_r"
    yield Connection(mongodb_uri, name)
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client.drop_database(name)


async def load_responses(api: Api, ids: dict[str, str]) -> dict[str, tuple[int, bytes]]:
    """Return status and content of a GET request to every route, with `ids` as path parameters."""
    responses = {}
    for route in ROUTES:
        path: str = route.path
        if "GET" not in (route.methods or ()) or path in ROUTES_WITH_OTHER_STATE or path == STREAM:
            continue
        for name, value in ids.items():
            path = path.replace(f"{{{name}}}", value)
        if "{" in path:
            continue
        response = await api.http.get(path)
        content = b"a ZIP file, which contains its creation time" if path.endswith("archive") else response.content
        responses[path] = (response.status_code, content)
    return responses


async def test_imported_log_gives_same_response_on_every_route(
    mongodb_uri: str, db_name: str, tmp_path: Path, import_target: Connection
) -> None:
    ids: dict[str, str] = {}
    before, after = dict[str, tuple[int, bytes]](), dict[str, tuple[int, bytes]]()
    statistics: list[dict[str, Any]] = []
    async with run_webhook_endpoint() as cms:
        async for api in run_api(mongodb_uri, db_name, tmp_path, webhooks={"allowed_private_hosts": ["127.0.0.1"]}):
            batch = await api.submit_batch({"text": "one", "track": "A"}, {"fail": "always"})
            single = await api.submit({"text": "Grüße"}, webhook={"url": cms.url()})
            await api.wait_for_event(batch["batch_id"], "BatchFinished")
            [message] = await cms.wait_for_requests(1)
            last = await api.wait_for_event(message.webhook_id, "DeliverySucceeded")
            job = (await api.get(f"/api/events/jobs/{single}", last["position"])).json()["job"]
            ids = {
                "job_id": single,
                "batch_id": batch["batch_id"],
                "delivery_id": message.webhook_id,
                "path:path": job["results"]["files"][0]["path"],
            }
            before = await load_responses(api, ids)
            statistics.append((await api.get("/api/monitoring/events/stats")).json()["stats"])
            await export_log(api.event_store, tmp_path / "log.ndjson.zst")
    async with import_target.create_client() as client:
        await import_log(client[import_target.db_name], [tmp_path / "log.ndjson.zst"])
    await rebuild_views(import_target, on_progress=lambda position, head: None)
    async for api in run_api(mongodb_uri, import_target.db_name, tmp_path, WITHOUT_WORKER):
        after = await load_responses(api, ids)
        statistics.append((await api.get("/api/monitoring/events/stats")).json()["stats"])
    assert len(before) > 15
    assert {path: status for path, (status, _) in before.items() if status != 200} == {}
    for path, response in before.items():
        assert after[path] == response, path
    for name in ("jobs", "batches", "tracks", "webhooks", "durations"):
        assert statistics[1][name] == statistics[0][name]
