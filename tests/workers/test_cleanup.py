"""What a deleted job leaves behind is removed, unless somebody else needs it, whoever dies when."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobledger.cli.checks.database import _check_cleanup
from jobledger.ledger.domain.commands import ClaimJob, CompleteJob, CompleteStep, Delete, FailAttempt, RestartJob
from jobledger.ledger.domain.events import Failure, JobResults, ResultFile, ResultMetadata, Webhook
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.files.gridfs import GridFSStore
from jobledger.ledger.mongo.connection import Connection
from jobledger.projections.views import files, job_budgets, jobs, step_files
from jobledger.workers.cleanup import CURSOR, FILE_REMOVALS, WEBHOOK_SECRETS, Cleanup
from tests.support.role_runner import WAIT_TIMEOUT_SECONDS, RunningRoles, run_roles_in_process

pytestmark = pytest.mark.usefixtures("connection")


@asynccontextmanager
async def cleaning(here: RunningRoles, store: FileStore | None = None) -> AsyncIterator[None]:
    """Run the cleanup inside the block, impatiently."""
    cleanup = Cleanup(here.db, here.event_store, store or here.store, here.checkpoint, holder="test", grace_seconds=0)
    task = asyncio.create_task(cleanup.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def completed(here: RunningRoles, sha256: str, **fields: Any) -> str:
    """A job that has ended with one file."""
    job_id = await here.submit(**fields)
    await here.claim(job_id)
    file = ResultFile(path=f"{job_id}/a.md", sha256=sha256, size=3, media_type="text/markdown")
    metadata = ResultMetadata(processed_at=datetime.now(UTC), duration=1.0)
    await here.handle_commands(job_id, CompleteJob("worker-1", 1, JobResults(files=[file], metadata=metadata)))
    return job_id


async def all_done(here: RunningRoles) -> None:
    """Wait until the cleanup has looked at everything that was deleted."""
    deleted = await here.db.events.find_one({"type": "JobDeleted"}, sort=[("_id", -1)])
    assert deleted is not None
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while True:
            cursor = await here.db.checkpoints.find_one({"_id": CURSOR})
            due = {"due_at": {"$lte": datetime.now(UTC)}}
            reached = cursor is not None and cursor.get("position", 0) >= deleted["_id"]
            if reached and not await here.db[FILE_REMOVALS].count_documents(due):
                return
            await asyncio.sleep(0.05)


async def test_files_secrets_and_deliveries_of_a_deleted_job_go(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        kept = here.store.put_bytes(b"one")
        await here.db[WEBHOOK_SECRETS].insert_one({"_id": "secrets-1", "headers": {"A": "b"}, "secrets": []})
        webhook = Webhook(url="http://127.0.0.1:1/", header_names=["A"], secrets_ref="secrets-1")
        job_id = await completed(here, kept.sha256, webhook=webhook)
        async with cleaning(here):
            await here.handle_commands(job_id, Delete("user:a"))
            await all_done(here)
        assert not here.store.path(kept.sha256).exists()
        assert await here.db[WEBHOOK_SECRETS].count_documents({}) == 0
        assert await here.db[FILE_REMOVALS].count_documents({}) == 0
        assert await here.read_event_types(f"delivery-{job_id}-3") == ["DeliveryQueued", "DeliveryAbandoned"]


async def test_a_file_that_another_job_needs_stays(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        kept = here.store.put_bytes(b"the same in both")
        one, other = await completed(here, kept.sha256), await completed(here, kept.sha256)
        in_step = here.store.put_bytes(b"named by a step only")
        failed = await here.submit()
        await here.claim(failed)
        output = {"image": {"path": "a.png", "sha256": in_step.sha256, "size": 3, "media_type": "image/png"}}
        await here.handle_commands(failed, CompleteStep("worker-1", 1, "draw", "key", output, 0.1))
        await here.handle_commands(failed, FailAttempt("worker-1", 1, Failure(code="X", message="x"), None))
        third = await completed(here, in_step.sha256)
        async with cleaning(here):
            for job_id in (one, third):
                await here.handle_commands(job_id, Delete("user:a"))
            await all_done(here)
            assert here.store.path(kept.sha256).read_bytes() == b"the same in both"
            assert here.store.path(in_step.sha256).is_file()
            await here.handle_commands(failed, RestartJob("user:a", reuse_steps=False))
            await here.handle_commands(other, Delete("user:a"))
            await all_done(here)
            assert not here.store.path(kept.sha256).exists()


async def test_a_file_that_a_running_job_may_have_saved_stays(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        running = await here.submit()
        await here.handle_commands(running, ClaimJob("worker-1", datetime.now(UTC)))
        kept = here.store.put_bytes(b"saved by the running job, too")
        job_id = await completed(here, kept.sha256)
        async with cleaning(here):
            await here.handle_commands(job_id, Delete("user:a"))
            await all_done(here)
            assert here.store.path(kept.sha256).is_file()
            assert await here.db[FILE_REMOVALS].count_documents({}) == 1
            metadata = ResultMetadata(processed_at=datetime.now(UTC), duration=1.0)
            await here.handle_commands(running, CompleteJob("worker-1", 1, JobResults(metadata=metadata)))
        await here.db[FILE_REMOVALS].update_many({}, {"$set": {"due_at": datetime.now(UTC)}})
        async with cleaning(here):
            await all_done(here)
        assert not here.store.path(kept.sha256).exists()


async def test_what_was_interrupted_is_finished_by_the_next(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        kept, needed = here.store.put_bytes(b"one"), here.store.put_bytes(b"two")
        job_id = await completed(here, kept.sha256)
        also = await completed(here, needed.sha256)
        await completed(here, needed.sha256)
        for deleted in (job_id, also):
            await here.handle_commands(deleted, Delete("user:a"))
        for digest in (kept.sha256, needed.sha256):  # as one that was killed between two steps leaves it
            assert await here.store.begin_removal(digest, "killed") is not None
            await here.db[FILE_REMOVALS].insert_one({"_id": digest, "due_at": datetime.now(UTC)})
        async with cleaning(here):
            await all_done(here)
        left = await asyncio.to_thread(lambda: [path.name for path in store.glob("??/*")])
        assert left == [needed.sha256]


# What one job must not do to others --------------------------------------------------------------------------------


async def test_cleanup_digests_in_step_output_are_not_files(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        other = await here.submit()
        await here.claim(other)
        locked = [{"name": f"p{n}", "sha256": f"{n:064x}"} for n in range(step_files.MAX_STEP_FILES + 1)]
        await here.handle_commands(other, CompleteStep("worker-1", 1, "lock", "key", locked, 0.1))
        await here.handle_commands(other, FailAttempt("worker-1", 1, Failure(code="X", message="x"), None))
        kept = here.store.put_bytes(b"one")
        job_id = await completed(here, kept.sha256)
        async with cleaning(here):
            await here.handle_commands(job_id, Delete("user:a"))
            await all_done(here)
        assert not here.store.path(kept.sha256).exists()
        assert (await _check_cleanup(here.db)).is_ok


async def test_cleanup_waits_while_files_are_unknown_and_doctor_names_the_job(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_files, "MAX_STEP_FILES", 10)
    async with run_roles_in_process(connection, store, projector=True) as here:
        other = await here.submit()
        await here.claim(other)
        many = [{"path": "a", "sha256": f"{n:064x}", "size": 1, "media_type": "a/b"} for n in range(11)]
        await here.handle_commands(other, CompleteStep("worker-1", 1, "save", "key", many, 0.1))
        await here.handle_commands(other, FailAttempt("worker-1", 1, Failure(code="X", message="x"), None))
        kept = here.store.put_bytes(b"one")
        job_id = await completed(here, kept.sha256)
        async with cleaning(here):
            await here.handle_commands(job_id, Delete("user:a"))
            await all_done(here)
        assert here.store.path(kept.sha256).exists()
        assert await here.db[FILE_REMOVALS].count_documents({}) == 1
        finding = await _check_cleanup(here.db)
        assert not finding.is_ok
        assert other in finding.detail
        await here.handle_commands(other, Delete("user:a"))
        await here.wait_for_views()
        await here.db[FILE_REMOVALS].update_many({}, {"$set": {"due_at": datetime.now(UTC)}})
        async with cleaning(here):
            await all_done(here)
        assert not here.store.path(kept.sha256).exists()


def cannot_be_folded(*given: Any) -> Any:
    raise ValueError("damaged")


@pytest.mark.parametrize("kind", ["isolated", "truncated", "rows left out"])
async def test_cleanup_keeps_files_of_jobs_that_the_views_show_in_part(
    connection: Connection, store: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        kept = here.store.put_bytes(b"the same in both")
        with monkeypatch.context() as patched:
            if kind == "isolated":
                patched.setattr(jobs, "_build_changes", cannot_be_folded)
            elif kind == "truncated":
                patched.setitem(job_budgets.BUDGETS, "results", 10)
                patched.setattr(job_budgets, "LARGE_BYTES", 10)
            else:
                patched.setattr(files, "rows", cannot_be_folded)
            damaged = await completed(here, kept.sha256)
            await here.wait_for_views()
        assert not await here.db.files.count_documents({"job_id": damaged})
        other = await completed(here, kept.sha256)
        async with cleaning(here):
            await here.handle_commands(other, Delete("user:a"))
            await all_done(here)
        assert here.store.path(kept.sha256).exists()


@pytest.mark.parametrize(
    ("version", "damage"),
    [
        (1, {"$unset": {"data": 1}}),
        (1, {"$set": {"data": 7}}),
        (1, {"$set": {"data.webhook": "x"}}),
        (1, {"$set": {"data.webhook": {"secrets_ref": {"x": 1}}}}),
        (2, {"$unset": {"hash": 1, "type": 1, "data": 1}}),
        (3, {"$set": {"data.results": [{"path": 1, "sha256": "../x", "size": "x", "media_type": 0}]}}),
        (3, {"$set": {"data.results.files": [{"path": "a", "sha256": "../../x", "size": 1, "media_type": "a"}]}}),
    ],
    ids=str,
)
async def test_cleanup_goes_on_after_a_damaged_deleted_stream(
    connection: Connection, store: Path, version: int, damage: dict[str, Any]
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        first, second = here.store.put_bytes(b"one"), here.store.put_bytes(b"two")
        damaged, whole = await completed(here, first.sha256), await completed(here, second.sha256)
        for job_id in (damaged, whole):
            await here.handle_commands(job_id, Delete("user:a"))
        await here.wait_for_views()
        await here.db.events.update_one({"stream": damaged, "version": version}, damage)
        async with cleaning(here):
            await all_done(here)
        assert not here.store.path(second.sha256).exists()


async def test_cleanup_goes_on_after_a_note_that_is_no_digest(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        kept = here.store.put_bytes(b"one")
        job_id = await completed(here, kept.sha256)
        await here.db[FILE_REMOVALS].insert_one({"_id": "../x", "due_at": datetime.fromtimestamp(0, UTC)})
        async with cleaning(here):
            await here.handle_commands(job_id, Delete("user:a"))
            await all_done(here)
        assert not here.store.path(kept.sha256).exists()


# The stores -----------------------------------------------------------------------------------------------------------


async def test_directory_saving_renews_the_time_and_survives_being_set_aside(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    store.prepare()
    kept = store.put_bytes(b"content")
    path = store.path(kept.sha256)
    long_ago = datetime.now(UTC) - timedelta(days=9)
    os.utime(path, (long_ago.timestamp(),) * 2)
    store.put_bytes(b"content")
    saved_at = await store.begin_removal(kept.sha256, "a")
    assert saved_at is not None
    assert saved_at > datetime.now(UTC) - timedelta(minutes=1)
    assert not path.exists()
    assert store.put_bytes(b"content") == kept, "written anew"
    await store.finish_removal(kept.sha256, "a")
    assert path.read_bytes() == b"content"
    assert await store.begin_removal(kept.sha256, "b") is not None
    assert await store.begin_removal(kept.sha256, "c") is not None, "taken over from a process that was killed"
    await store.finish_removal(kept.sha256, "b")
    await store.cancel_removal(kept.sha256, "b")
    await store.cancel_removal(kept.sha256, "c")
    assert path.read_bytes() == b"content"
    old = tmp_path / "downloaded"
    old.write_bytes(b"old")
    os.utime(old, (long_ago.timestamp(),) * 2)
    stored = store.put_file(old)
    assert (await store.begin_removal(stored.sha256, "d") or long_ago) > datetime.now(UTC) - timedelta(minutes=1)
    assert await store.begin_removal("0" * 64, "e") is None


async def test_gridfs_saving_renews_the_time_and_survives_being_set_aside(
    connection: Connection, tmp_path: Path
) -> None:
    async with connection.client() as client:
        db = client[connection.db_name]
        store = GridFSStore(db)
        await store.prepare()

        async def save(number: int) -> str:
            inbox = DirectoryStore(tmp_path / f"inbox-{number}")
            inbox.prepare()
            sha256 = inbox.put_bytes(b"content").sha256
            await store.ingest(inbox.root, sha256)
            return sha256

        sha256 = await save(1)
        first = await store.begin_removal(sha256, "a")
        await store.cancel_removal(sha256, "a")
        await save(2)
        second = await store.begin_removal(sha256, "b")
        assert first is not None
        assert second is not None
        assert second > first
        await save(3)
        await store.cancel_removal(sha256, "b")
        assert await db.fs.files.count_documents({}) == 1
        assert await store.begin_removal(sha256, "c") is not None
        assert await store.begin_removal(sha256, "d") is not None
        await store.finish_removal(sha256, "c")
        assert await db.fs.files.count_documents({}) == 1
        await store.finish_removal(sha256, "d")
        assert await db.fs.files.count_documents({}) == await db.fs.chunks.count_documents({}) == 0
