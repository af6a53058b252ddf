"""Tests of the cleanup: it removes what a deleted job leaves behind, unless another job needs it.

A cleanup that was killed is finished by the next one.
"""

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
from jobledger.ledger.domain.commands import ClaimJob, Delete, FailAttempt, RestartJob
from jobledger.ledger.domain.events import ErrorInfo, JobResults, ResultFile, ResultMetadata, Webhook
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.files.gridfs import GridFSStore
from jobledger.ledger.mongo.connection import Connection
from jobledger.projections.views import files, job_budgets, jobs, step_files
from jobledger.workers.cleanup import CURSOR, FILE_REMOVALS, Cleanup
from tests.support.polling import DEADLINE_SECONDS
from tests.support.role_runner import RunningRoles, run_roles_in_process
from tests.support.worker_reports import report_results, report_step

pytestmark = pytest.mark.usefixtures("connection")


@asynccontextmanager
async def run_cleanup(roles: RunningRoles, store: FileStore | None = None) -> AsyncIterator[None]:
    """Run the cleanup without a grace period inside the block."""
    cleanup = Cleanup(
        roles.db, roles.event_store, store or roles.store, roles.checkpoint, holder="test", grace_seconds=0
    )
    task = asyncio.create_task(cleanup.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def complete_job(roles: RunningRoles, sha256: str, **fields: Any) -> str:
    """Submit and complete a job with one file. Return its ID."""
    job_id = await roles.submit(**fields)
    await roles.claim(job_id)
    file = ResultFile(path=f"{job_id}/a.md", sha256=sha256, size=3, media_type="text/markdown")
    metadata = ResultMetadata(processed_at=datetime.now(UTC), duration=1.0)
    await roles.handle_commands(job_id, report_results("worker-1", 1, JobResults(files=[file], metadata=metadata)))
    return job_id


async def wait_for_cleanup(roles: RunningRoles) -> None:
    """Wait until the cleanup has processed all deletions and restarts."""
    types = {"$in": ["JobDeleted", "JobRestarted"]}
    deleted = await roles.db.events.find_one({"type": types}, sort=[("_id", -1)])
    assert deleted is not None
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            cursor = await roles.db.checkpoints.find_one({"_id": CURSOR})
            due = {"due_at": {"$lte": datetime.now(UTC)}}
            reached = cursor is not None and cursor.get("position", 0) >= deleted["_id"]
            if reached and not await roles.db[FILE_REMOVALS].count_documents(due):
                return
            await asyncio.sleep(0.05)


async def test_cleanup_removes_files_secrets_and_deliveries_of_deleted_job(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        stored = roles.store.put_bytes(b"one")
        await roles.db.webhook_secrets.insert_one({"_id": "secrets-1", "headers": {"A": "b"}, "secrets": []})
        webhook = Webhook(url="http://127.0.0.1:1/", header_names=["A"], secrets_ref="secrets-1")
        job_id = await complete_job(roles, stored.sha256, webhook=webhook)
        async with run_cleanup(roles):
            await roles.handle_commands(job_id, Delete("user:a"))
            await wait_for_cleanup(roles)
        assert not roles.store.get_path(stored.sha256).exists()
        assert await roles.db.webhook_secrets.count_documents({}) == 0
        assert await roles.db[FILE_REMOVALS].count_documents({}) == 0
        assert await roles.read_event_types(f"delivery-{job_id}-3") == ["DeliveryQueued", "DeliveryAbandoned"]


async def test_cleanup_keeps_file_of_another_job(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        stored = roles.store.put_bytes(b"shared content")
        first, second = await complete_job(roles, stored.sha256), await complete_job(roles, stored.sha256)
        in_step = roles.store.put_bytes(b"content of a step")
        failed = await roles.submit()
        await roles.claim(failed)
        output = {"image": {"path": "a.png", "sha256": in_step.sha256, "size": 3, "media_type": "image/png"}}
        await roles.handle_commands(failed, report_step("worker-1", 1, "draw", "key", output, 0.1))
        await roles.handle_commands(failed, FailAttempt("worker-1", 1, ErrorInfo(code="X", message="x"), None))
        third = await complete_job(roles, in_step.sha256)
        async with run_cleanup(roles):
            for job_id in (first, third):
                await roles.handle_commands(job_id, Delete("user:a"))
            await wait_for_cleanup(roles)
            assert roles.store.get_path(stored.sha256).read_bytes() == b"shared content"
            assert roles.store.get_path(in_step.sha256).is_file()
            await roles.handle_commands(failed, RestartJob("user:a", reuse_steps=False))
            await roles.handle_commands(second, Delete("user:a"))
            await wait_for_cleanup(roles)
            assert not roles.store.get_path(stored.sha256).exists()


async def test_cleanup_removes_files_of_earlier_results_after_restart(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        old, in_step, unchanged = (roles.store.put_bytes(content) for content in (b"old", b"step", b"unchanged"))
        await roles.db.webhook_secrets.insert_one({"_id": "secrets-1", "headers": {"A": "b"}, "secrets": []})
        webhook = Webhook(url="http://127.0.0.1:1/", header_names=["A"], secrets_ref="secrets-1")
        with_step = await roles.submit(webhook=webhook)
        await roles.claim(with_step)
        output = {"image": {"path": "a.png", "sha256": in_step.sha256, "size": 3, "media_type": "image/png"}}
        await roles.handle_commands(with_step, report_step("worker-1", 1, "draw", "key", output, 0.1))
        files_of_results = [
            ResultFile(path=f"{with_step}/{number}.md", sha256=stored.sha256, size=3, media_type="text/markdown")
            for number, stored in enumerate((old, in_step, unchanged))
        ]
        metadata = ResultMetadata(processed_at=datetime.now(UTC), duration=1.0)
        results = JobResults(files=files_of_results, metadata=metadata)
        await roles.handle_commands(with_step, report_results("worker-1", 1, results))
        other = await complete_job(roles, unchanged.sha256)
        async with run_cleanup(roles):
            await roles.handle_commands(with_step, RestartJob("user:a"))
            await wait_for_cleanup(roles)
            assert not roles.store.get_path(old.sha256).exists()
            assert roles.store.get_path(in_step.sha256).is_file(), "the restarted job reuses the step"
            assert roles.store.get_path(unchanged.sha256).is_file(), "another job has the same content"
            assert await roles.db.webhook_secrets.count_documents({}) == 1, "the webhook is sent again"
            await roles.handle_commands(other, Delete("user:a"))
            await wait_for_cleanup(roles)
            assert not roles.store.get_path(unchanged.sha256).exists()


async def test_cleanup_keeps_file_that_a_running_job_may_have_saved(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        running = await roles.submit()
        await roles.handle_commands(running, ClaimJob("worker-1", datetime.now(UTC)))
        stored = roles.store.put_bytes(b"content of both jobs")
        job_id = await complete_job(roles, stored.sha256)
        async with run_cleanup(roles):
            await roles.handle_commands(job_id, Delete("user:a"))
            await wait_for_cleanup(roles)
            assert roles.store.get_path(stored.sha256).is_file()
            assert await roles.db[FILE_REMOVALS].count_documents({}) == 1
            metadata = ResultMetadata(processed_at=datetime.now(UTC), duration=1.0)
            await roles.handle_commands(running, report_results("worker-1", 1, JobResults(metadata=metadata)))
        await roles.db[FILE_REMOVALS].update_many({}, {"$set": {"due_at": datetime.now(UTC)}})
        async with run_cleanup(roles):
            await wait_for_cleanup(roles)
        assert not roles.store.get_path(stored.sha256).exists()


async def test_cleanup_finishes_an_interrupted_cleanup(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        stored, needed = roles.store.put_bytes(b"one"), roles.store.put_bytes(b"two")
        job_id = await complete_job(roles, stored.sha256)
        second_id = await complete_job(roles, needed.sha256)
        await complete_job(roles, needed.sha256)
        for deleted in (job_id, second_id):
            await roles.handle_commands(deleted, Delete("user:a"))
        for digest in (stored.sha256, needed.sha256):  # as a cleanup that was killed between two steps
            assert await roles.store.begin_removal(digest, "killed") is not None
            await roles.db[FILE_REMOVALS].insert_one({"_id": digest, "due_at": datetime.now(UTC)})
        async with run_cleanup(roles):
            await wait_for_cleanup(roles)
        names = await asyncio.to_thread(lambda: [path.name for path in store.glob("??/*")])
        assert names == [needed.sha256]


# Isolation of jobs ----------------------------------------------------------------------------------------------------


async def test_cleanup_ignores_other_digests_in_step_output(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        failed = await roles.submit()
        await roles.claim(failed)
        locked = [{"name": f"p{n}", "sha256": f"{n:064x}"} for n in range(step_files.MAX_STEP_FILES + 1)]
        await roles.handle_commands(failed, report_step("worker-1", 1, "lock", "key", locked, 0.1))
        await roles.handle_commands(failed, FailAttempt("worker-1", 1, ErrorInfo(code="X", message="x"), None))
        stored = roles.store.put_bytes(b"one")
        job_id = await complete_job(roles, stored.sha256)
        async with run_cleanup(roles):
            await roles.handle_commands(job_id, Delete("user:a"))
            await wait_for_cleanup(roles)
        assert not roles.store.get_path(stored.sha256).exists()
        assert (await _check_cleanup(roles.db)).is_ok


async def test_cleanup_waits_while_files_are_unknown_and_doctor_names_the_job(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_files, "MAX_STEP_FILES", 10)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        failed = await roles.submit()
        await roles.claim(failed)
        outputs = [{"path": "a", "sha256": f"{n:064x}", "size": 1, "media_type": "a/b"} for n in range(11)]
        await roles.handle_commands(failed, report_step("worker-1", 1, "save", "key", outputs, 0.1))
        await roles.handle_commands(failed, FailAttempt("worker-1", 1, ErrorInfo(code="X", message="x"), None))
        stored = roles.store.put_bytes(b"one")
        job_id = await complete_job(roles, stored.sha256)
        async with run_cleanup(roles):
            await roles.handle_commands(job_id, Delete("user:a"))
            await wait_for_cleanup(roles)
        assert roles.store.get_path(stored.sha256).exists()
        assert await roles.db[FILE_REMOVALS].count_documents({}) == 1
        finding = await _check_cleanup(roles.db)
        assert not finding.is_ok
        assert failed in finding.detail
        await roles.handle_commands(failed, Delete("user:a"))
        await roles.wait_for_views()
        await roles.db[FILE_REMOVALS].update_many({}, {"$set": {"due_at": datetime.now(UTC)}})
        async with run_cleanup(roles):
            await wait_for_cleanup(roles)
        assert not roles.store.get_path(stored.sha256).exists()


def fail_to_fold(*arguments: Any) -> Any:
    raise ValueError("damaged")


@pytest.mark.parametrize("kind", ["isolated", "truncated", "missing rows"])
async def test_cleanup_keeps_files_of_jobs_that_views_contain_in_part(
    connection: Connection, store: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        stored = roles.store.put_bytes(b"shared content")
        with monkeypatch.context() as patched:
            if kind == "isolated":
                patched.setattr(jobs, "_build_changes", fail_to_fold)
            elif kind == "truncated":
                patched.setitem(job_budgets.BUDGETS, "results", 10)
                patched.setattr(job_budgets, "LARGE_BYTES", 10)
            else:
                patched.setattr(files, "build_rows", fail_to_fold)
            damaged = await complete_job(roles, stored.sha256)
            await roles.wait_for_views()
        assert not await roles.db.files.count_documents({"job_id": damaged})
        intact = await complete_job(roles, stored.sha256)
        async with run_cleanup(roles):
            await roles.handle_commands(intact, Delete("user:a"))
            await wait_for_cleanup(roles)
        assert roles.store.get_path(stored.sha256).exists()


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
async def test_cleanup_continues_after_a_damaged_stream(
    connection: Connection, store: Path, version: int, damage: dict[str, Any]
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        first, second = roles.store.put_bytes(b"one"), roles.store.put_bytes(b"two")
        damaged, intact = await complete_job(roles, first.sha256), await complete_job(roles, second.sha256)
        for job_id in (damaged, intact):
            await roles.handle_commands(job_id, Delete("user:a"))
        await roles.wait_for_views()
        await roles.db.events.update_one({"stream": damaged, "version": version}, damage)
        async with run_cleanup(roles):
            await wait_for_cleanup(roles)
        assert not roles.store.get_path(second.sha256).exists()


async def test_cleanup_continues_after_an_invalid_digest(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        stored = roles.store.put_bytes(b"one")
        job_id = await complete_job(roles, stored.sha256)
        await roles.db[FILE_REMOVALS].insert_one({"_id": "../x", "due_at": datetime.fromtimestamp(0, UTC)})
        async with run_cleanup(roles):
            await roles.handle_commands(job_id, Delete("user:a"))
            await wait_for_cleanup(roles)
        assert not roles.store.get_path(stored.sha256).exists()


# The stores -----------------------------------------------------------------------------------------------------------


async def test_directory_store_save_renews_time_and_survives_a_removal(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    store.prepare()
    stored = store.put_bytes(b"content")
    path = store.get_path(stored.sha256)
    long_ago = datetime.now(UTC) - timedelta(days=9)
    os.utime(path, (long_ago.timestamp(),) * 2)
    store.put_bytes(b"content")
    saved_at = await store.begin_removal(stored.sha256, "a")
    assert saved_at is not None
    assert saved_at > datetime.now(UTC) - timedelta(minutes=1)
    assert not path.exists()
    assert store.put_bytes(b"content") == stored, "the file is written again"
    await store.finish_removal(stored.sha256, "a")
    assert path.read_bytes() == b"content"
    assert await store.begin_removal(stored.sha256, "b") is not None
    assert await store.begin_removal(stored.sha256, "c") is not None, "the removal of a killed process is taken over"
    await store.finish_removal(stored.sha256, "b")
    await store.cancel_removal(stored.sha256, "b")
    await store.cancel_removal(stored.sha256, "c")
    assert path.read_bytes() == b"content"
    old = tmp_path / "downloaded"
    old.write_bytes(b"old")
    os.utime(old, (long_ago.timestamp(),) * 2)
    stored = store.put_file(old)
    assert (await store.begin_removal(stored.sha256, "d") or long_ago) > datetime.now(UTC) - timedelta(minutes=1)
    assert await store.begin_removal("0" * 64, "e") is None


async def test_gridfs_store_save_renews_time_and_survives_a_removal(connection: Connection, tmp_path: Path) -> None:
    async with connection.create_client() as client:
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
