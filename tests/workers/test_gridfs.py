"""Workers without a shared disk: what their jobs' processes save is in the database before any event names it."""

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
    """All roles, with a store in the database, and temporary files in a place that can be looked at."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    own: dict[str, Any] = {
        "results": {"store": "gridfs"},
        "processors": {"session": {"allowed_private_hosts": ["127.0.0.1"]}},
    }
    async for running in run_api(mongodb_uri, db_name, tmp_path, ALL_ROLES, **own):
        yield running
    assert not (tmp_path / "results").exists()


@pytest.fixture
async def site() -> AsyncIterator[SlowSite]:
    async def at_once(_path: str) -> None:
        """No pause."""

    async with serve_site(SlowSite(at_once)) as site:
        yield site


def left_behind(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "tmp").glob("jobledger-job-*")]


async def test_what_a_childs_job_and_an_inline_job_have_saved_is_served_from_the_database(
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
    assert left_behind(tmp_path) == []


async def test_no_event_names_a_file_before_it_is_in_the_database(
    api: Api, site: SlowSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, at, release = GridFSStore.ingest, asyncio.Event(), asyncio.Event()

    async def held(self: GridFSStore, inbox: Path, sha256: str) -> int:
        at.set()
        await release.wait()
        return await real(self, inbox, sha256)

    monkeypatch.setattr(GridFSStore, "ingest", held)
    job_id = await api.submit(site.job_parameters(), job_type="session")
    async with asyncio.timeout(30):
        await at.wait()
    await asyncio.sleep(1)  # time enough for a child that does not wait to say that it is done
    for event in await api.event_store.read_stream(job_id):
        assert event.type != "JobCompleted"
        assert "sha256" not in str(event.data)
    release.set()
    assert (await api.wait_until_finished(job_id))["status"] == "completed"


async def test_while_the_database_is_away_a_file_waits_and_no_attempt_is_lost(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = GridFSStore.ingest, [LedgerUnavailable("away"), LedgerUnavailable("still away")]

    async def failing(self: GridFSStore, inbox: Path, sha256: str) -> int:
        if failures:
            raise failures.pop()
        return await real(self, inbox, sha256)

    monkeypatch.setattr(GridFSStore, "ingest", failing)
    job = await api.wait_until_finished(await api.submit())
    assert (job["status"], job["attempt"], failures) == ("completed", 1, [])


async def test_a_file_that_is_not_in_the_database_is_a_fault_that_says_what_to_look_at(api: Api) -> None:
    job = await api.wait_until_finished(await api.submit())
    await api.db.fs.files.delete_many({})
    answer = await api.get(job["results"]["markdown_url"])
    assert (answer.status_code, answer.json()["code"]) == (500, "file_missing")
    assert "results.store" in answer.json()["message"]
