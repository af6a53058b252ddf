"""Exported, imported into an empty database: every route answers as before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from jobledger.api.app import ROUTES
from jobledger.cli.view_maintenance import rebuild_views
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.export import export_log
from jobledger.ledger.store.import_ import import_log
from tests.api.conftest import Api, run_api
from tests.support.webhook_endpoint import run_webhook_endpoint

NOT_FROM_THE_LOG = {
    "/metrics",
    "/api/monitoring/events/stats",
    "/api/monitoring/events/webhook-endpoints",
    "/api/events/test-webhook-callback",
}
"""Routes that also show the state of processes, signing secrets of endpoints, and messages received for trial."""
LIVE = "/api/ledger/stream"


@pytest.fixture
def restored(mongodb_uri: str, db_name: str) -> Iterator[Connection]:
    name = f"{db_name}_r"
    yield Connection(mongodb_uri, name)
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client.drop_database(name)


async def answers(api: Api, known: dict[str, str]) -> dict[str, tuple[int, bytes]]:
    """What is answered to a GET of every route, with these ids in the places that it has for some."""
    found = {}
    for route in ROUTES:
        path: str = route.path
        if "GET" not in (route.methods or ()) or path in NOT_FROM_THE_LOG or path == LIVE:
            continue
        for name, value in known.items():
            path = path.replace(f"{{{name}}}", value)
        if "{" in path:
            continue
        answer = await api.http.get(path)
        content = b"a ZIP, with the time of its making" if path.endswith("archive") else answer.content
        found[path] = (answer.status_code, content)
    return found


async def test_every_route_answers_as_before(
    mongodb_uri: str, db_name: str, tmp_path: Path, restored: Connection
) -> None:
    known: dict[str, str] = {}
    before, after = dict[str, tuple[int, bytes]](), dict[str, tuple[int, bytes]]()
    counted: list[dict[str, Any]] = []
    async with run_webhook_endpoint() as cms:
        async for api in run_api(mongodb_uri, db_name, tmp_path, webhooks={"allowed_private_hosts": ["127.0.0.1"]}):
            batch = await api.submit_batch({"text": "one", "track": "A"}, {"fail": "always"})
            single = await api.submit({"text": "Grüße"}, webhook={"url": cms.url()})
            await api.wait_for_event(batch["batch_id"], "BatchFinished")
            [told] = await cms.wait_for_requests(1)
            last = await api.wait_for_event(told.webhook_id, "DeliverySucceeded")
            job = (await api.get(f"/api/events/jobs/{single}", last["position"])).json()["job"]
            known = {
                "job_id": single,
                "batch_id": batch["batch_id"],
                "delivery_id": told.webhook_id,
                "path:path": job["results"]["files"][0]["path"],
            }
            before = await answers(api, known)
            counted.append((await api.get("/api/monitoring/events/stats")).json()["stats"])
            await export_log(api.event_store, tmp_path / "log.ndjson.zst")
    async with restored.client() as client:
        await import_log(client[restored.db_name], [tmp_path / "log.ndjson.zst"])
    await rebuild_views(restored, on_progress=lambda position, upto: None)
    async for api in run_api(mongodb_uri, restored.db_name, tmp_path, frozenset({"api", "projector"})):
        after = await answers(api, known)
        counted.append((await api.get("/api/monitoring/events/stats")).json()["stats"])
    assert len(before) > 15
    assert {path: status for path, (status, _) in before.items() if status != 200} == {}
    for path, answer in before.items():
        assert after[path] == answer, path
    for name in ("jobs", "batches", "tracks", "webhooks", "durations"):
        assert counted[1][name] == counted[0][name]
