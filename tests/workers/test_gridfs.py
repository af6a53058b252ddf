"""Tests of workers without a shared disk: a file is in the database before any event names it."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from jobledger.cli.composition import ALL_ROLES
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.files.gridfs import GridFSStore
from tests.api.conftest import Api, run_api
from tests.support.slow_site import SlowSite, serve_site

FILES = "/api/events/files/"


@pytest.fixture
async def api(mongodb_uri: str, db_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    """All roles, with the file store in the database and temporary files below `tmp_path`."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    sections: dict[str, Any] = {
        "results": {"store": "gridfs"},
        "processors": {"session": {"allowed_private_hosts": ["127.0.0.1"]}},
    }
    async for running in run_api(mongodb_uri, db_name, tmp_path, ALL_ROLES, **sections):
        yield running
    assert not (tmp_path / "results").exists()


@pytest.fixture
async def site() -> AsyncIterator[SlowSite]:
    async def respond_at_once(_path: str) -> None:
        """Respond without a pause."""

    async with serve_site(SlowSite(respond_at_once)) as site:
        yield site


def list_attempt_directories(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "tmp").glob("jobledger-job-*")]


async def test_files_of_job_process_and_inline_job_are_served_from_database(
    api: Api, site: SlowSite, tmp_path: Path
) -> None:
    for job_id in (await api.submit({"text": "ä"}), await api.submit(site.job_parameters(), job_type="session")):
        job = await api.wait_until_finished(job_id)
        assert job["status"] == "completed", job["error"]
        [file] = job["results"]["files"]
        whole = await api.get(FILES + file["path"])
        assert (whole.status_code, hashlib.sha256(whole.content).hexdigest()) == (200, file["sha256"])
        part = await api.get(FILES + file["path"], Range="bytes=5-9, -3")
        assert (part.status_code, whole.content[5:10] in part.content) == (206, True)
        archive = await api.get(f"/api/events/jobs/{job_id}/download-archive")
        assert (archive.status_code, archive.content[:2]) == (200, b"PK")
    assert await api.db.fs.files.count_documents({}) == 2
    assert list_attempt_directories(tmp_path) == []


async def test_event_names_a_file_only_after_it_is_in_the_database(
    api: Api, site: SlowSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest, waiting, release = GridFSStore.ingest, asyncio.Event(), asyncio.Event()

    async def ingest_late(self: GridFSStore, inbox: Path, sha256: str) -> int:
        waiting.set()
        await release.wait()
        return await ingest(self, inbox, sha256)

    monkeypatch.setattr(GridFSStore, "ingest", ingest_late)
    job_id = await api.submit(site.job_parameters(), job_type="session")
    async with asyncio.timeout(60):
        await waiting.wait()
    await asyncio.sleep(1)  # enough for a job process that does not wait to report its end
    for event in await api.event_store.read_stream(job_id):
        assert event.type != "JobCompleted"
        assert "sha256" not in str(event.data)
    release.set()
    assert (await api.wait_until_finished(job_id))["status"] == "completed"


async def test_file_waits_for_unavailable_database_without_losing_an_attempt(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest, failures = GridFSStore.ingest, [LedgerUnavailable("unavailable"), LedgerUnavailable("still unavailable")]

    async def fail_twice(self: GridFSStore, inbox: Path, sha256: str) -> int:
        if failures:
            raise failures.pop()
        return await ingest(self, inbox, sha256)

    monkeypatch.setattr(GridFSStore, "ingest", fail_twice)
    job = await api.wait_until_finished(await api.submit())
    assert (job["status"], job["attempt"], failures) == ("completed", 1, [])


async def test_file_missing_in_database_is_an_error_that_names_the_setting(api: Api) -> None:
    job = await api.wait_until_finished(await api.submit())
    await api.db.fs.files.delete_many({})
    response = await api.get(job["results"]["markdown_url"])
    assert (response.status_code, response.json()["code"]) == (500, "file_missing")
    assert "results.store" in response.json()["message"]
