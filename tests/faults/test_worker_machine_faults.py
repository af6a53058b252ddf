"""A worker whose machine has trouble costs no job an attempt: others take its jobs, and it recovers by itself.

In one process and therefore fast: `tests/workers/test_machine_health.py`.
"""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from jobledger.ledger.mongo.connection import Connection
from tests.support.plugins import install_plugin
from tests.support.role_runner import RolesSubprocess, poll_until, run_roles_in_process, run_roles_subprocess
from tests.support.soak_only import soak_only

pytestmark = pytest.mark.timeout(180)
JOBS = 60


@pytest.fixture
def connection(mongodb_uri: str, db_name: str) -> Connection:
    return Connection(mongodb_uri, db_name)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "results"


@contextmanager
def scratch_lost(_worker: RolesSubprocess, scratch: Path) -> Iterator[None]:
    """Put a file where the scratch directory was, as a mount that went wrong does."""
    scratch.rename(scratch.with_suffix(".away"))
    scratch.write_text("")
    yield
    scratch.unlink()
    scratch.with_suffix(".away").rename(scratch)


@contextmanager
def descriptors_exhausted(worker: RolesSubprocess, _scratch: Path) -> Iterator[None]:
    before = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir(f"/proc/{worker.pid}/fd"))  # noqa: PTH208 - names are wanted
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (used + 3, before[1]))
    yield
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, before)


@soak_only
@pytest.mark.parametrize("sickness", [scratch_lost, descriptors_exhausted])
async def test_sick_worker_costs_no_job_an_attempt_and_recovers(
    connection: Connection,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sickness: Callable[[RolesSubprocess, Path], AbstractContextManager[None]],
) -> None:
    install_plugin(tmp_path / "plugins", "apart", "ValidProcessor.isolation = 'process'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "plugins"), str(Path.cwd())]))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with (
        run_roles_subprocess(connection, store, "worker", "projector") as first,
        run_roles_subprocess(connection, store, "worker") as second,
    ):
        monkeypatch.setenv("TMPDIR", str(scratch))
        with run_roles_subprocess(connection, store, "worker") as sick:
            monkeypatch.delenv("TMPDIR")
            for real in (first, second, sick):
                await real.wait_until_started()
            async with run_roles_in_process(connection, store) as here:
                await poll_until(lambda: bool(list(scratch.glob("*/*"))), "its scratch directory is there")
                with sickness(sick, scratch):
                    _, job_ids = await here.submit_batch(*({} for _ in range(JOBS)), job_type="apart")
                    await here.wait_until_finished(*job_ids, seconds=40)
                    for job_id in job_ids:
                        history = await here.read_event_types(job_id)
                        assert history[-1] == "JobCompleted", history
                        assert history.count("JobClaimed") == 1 + history.count("JobReleased"), history
                        assert (await here.load_job(job_id))["retries"] == 0
                    workers = await here.db.workers.find().to_list()
                    [problem] = [it["problem"] for it in workers if it["problem"]]
                    assert problem
                async with asyncio.timeout(20):
                    while await here.db.workers.count_documents({"problem": None}) < 3:  # noqa: ASYNC110 - rare
                        await asyncio.sleep(0.1)
                job_ids = [await here.submit(job_type="apart") for _ in range(12)]
                await here.wait_until_finished(*job_ids)
