"""Jobs that a program submits in its own transaction, in an installation with all roles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pymongo import AsyncMongoClient

from jobledger.cli.checks.database import check_database
from jobledger.ledger.mongo.connection import Connection, Document
from tests.api.conftest import Api, make_settings
from tests.support.outbox_programs import order_and_submit
from tests.support.polling import poll_until


async def submit(mongodb_uri: str, api: Api, parameters: dict[str, Any]) -> str:
    """Submit a job in a transaction, and wait until it is in the log."""
    async with AsyncMongoClient[Document](mongodb_uri) as client:
        job_id = await order_and_submit(client, api.db.name, parameters)

    async def is_submitted() -> bool:
        return await api.db.outbox.find_one() is None

    await poll_until(is_submitted)
    return job_id


async def check_outbox(mongodb_uri: str, api: Api, directory: Path) -> tuple[bool, str]:
    """Return what `jobledger doctor` says about the outbox."""
    settings = make_settings(mongodb_uri, api.db.name, directory)
    checks = check_database(settings, Connection(mongodb_uri, api.db.name))
    [result] = [result async for result in checks if result.name == "Outbox"]
    return result.is_ok, result.detail


async def test_job_with_wrong_parameters_fails_and_is_corrected(api: Api, mongodb_uri: str) -> None:
    job_id = await submit(mongodb_uri, api, {"seconds": "soon", "text": "a"})
    job = await api.wait_until_finished(job_id)
    assert (job["status"], job["user_id"]) == ("failed", "local")
    assert "seconds" in str(job["error"])
    response = await api.post(f"/api/events/jobs/{job_id}/restart", {"parameters": {"text": "a"}})
    assert response.status_code == 200, response.text
    await api.wait_for_event(job_id, "JobCompleted")


async def test_rejected_document_is_counted_and_explained(api: Api, mongodb_uri: str, tmp_path: Path) -> None:
    assert await check_outbox(mongodb_uri, api, tmp_path) == (True, "0 jobs waiting")
    await api.db.outbox.insert_one({"_id": "job-" + "0" * 24, "job": "{}"})
    await submit(mongodb_uri, api, {})
    is_ok, detail = await check_outbox(mongodb_uri, api, tmp_path)
    assert not is_ok
    assert detail.startswith("1 document rejected: job-000000000000000000000000: job: job_type")
    metrics = (await api.get("/metrics")).text
    assert "jobledger_outbox_rejected 1.0" in metrics
    assert "jobledger_outbox_jobs 0.0" in metrics
