"""Result paths over HTTP: every path that `save` accepts leads to its file, and no job's file hides another's."""

from __future__ import annotations

import asyncio
import io
import unicodedata
from urllib.parse import quote
from zipfile import ZipFile

import pytest
from hypothesis import find, settings

from jobledger.ledger.domain.commands import Delete, SubmitJob
from jobledger.ledger.domain.events import EventMetadata, JobSubmitted
from jobledger.ledger.store.command_handler import handle_command, new_job_id
from jobledger.workers.processor import JobContext, Results
from tests.api.conftest import Api
from tests.api.result_files import FILES, add_file
from tests.workers.inline_processor import install_processor
from tests.workers.test_result_paths import PATHS, VALID, normalize_or_none

SAMPLES = 120


async def save_all(job: JobContext) -> Results:
    saved = [await job.save(path, path.encode(), "text/plain") for path in job.parameters.model_dump()["paths"]]
    return Results(assets=saved)


@pytest.fixture
def job_type(monkeypatch: pytest.MonkeyPatch) -> str:
    install_processor(monkeypatch, save_all)
    return "test"


def some_accepted_paths() -> list[str]:
    """Return varied paths, as hypothesis finds them, that `save` accepts."""
    seen: dict[str, None] = dict.fromkeys(VALID)

    def note(path: str) -> bool:
        if (normal := normalize_or_none(path)) is not None:
            seen[normal] = None
        return len(seen) >= SAMPLES

    find(PATHS, note, settings=settings(max_examples=20_000, database=None))
    return list(seen)


async def test_accepted_paths_are_fetched_under_their_urls_and_are_in_the_archive(job_type: str, api: Api) -> None:
    paths = await asyncio.to_thread(some_accepted_paths)
    job_id, job = new_job_id(), JobSubmitted(job_type=job_type, user_id="local", parameters={"paths": paths})
    await handle_command(api.event_store, job_id, SubmitJob(job), meta=EventMetadata("test"))
    results = (await api.wait_until_finished(job_id))["results"]
    assert [file["path"] for file in results["files"]] == paths

    fetched = await asyncio.gather(*(api.http.get(asset["url"]) for asset in results["assets"]))
    wrong = [path for path, answer in zip(paths, fetched, strict=True) if answer.content != path.encode()]
    assert wrong == []

    archive = await api.http.get(f"/api/events/jobs/{job_id}/download-archive")
    with ZipFile(io.BytesIO(archive.content)) as unpacked:
        names = unpacked.namelist()
        assert sorted(unpacked.read(name).decode() for name in names) == sorted(paths)
    assert len({unicodedata.normalize("NFC", name).casefold() for name in names}) == len(paths)
    assert not [name for name in names if name.startswith("/") or ".." in name.split("/")]

    for asset in results["assets"][:: len(paths) // 20]:
        link = await api.post(asset["url"] + "/link")
        assert link.status_code == 200, link.text
        assert (await api.http.get(link.json()["url"])).status_code == 200


async def test_jobs_of_an_older_log_with_one_path_keep_their_files(api_without_worker: Api) -> None:
    """Before paths had owners, several jobs could complete with the same path."""
    for content in (b"first", b"second", b"third"):
        await add_file(api_without_worker, "same/a.md", content, "text/markdown")
    rows = await api_without_worker.db.files.find({"path": "same/a.md"}, sort=[("modified_at", 1)]).to_list()
    for row, content in zip(rows, (b"first", b"second", b"third"), strict=True):
        assert (await api_without_worker.http.get(FILES + quote("same/a.md"))).content == content
        archive = await api_without_worker.http.get(f"/api/events/jobs/{row['job_id']}/download-archive")
        with ZipFile(io.BytesIO(archive.content)) as unpacked:
            assert [unpacked.read(name) for name in unpacked.namelist()] == [content]
        recorded = (
            await handle_command(
                api_without_worker.event_store, row["job_id"], Delete("local"), meta=EventMetadata("test")
            )
        ).events
        await api_without_worker.get("/api/monitoring/events/stats", recorded[-1].position)
    assert (await api_without_worker.http.get(FILES + "same/a.md")).status_code == 404
