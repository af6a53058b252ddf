"""A fault of a worker's machine costs no job an attempt. Other workers take its jobs, and it recovers without help.

`tests/workers/test_machine_health.py` tests the same in one process, and therefore faster.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from jobledger.ledger.mongo.connection import Connection
from tests.support.plugins import install_plugin
from tests.support.polling import poll_until
from tests.support.role_runner import RolesSubprocess, run_roles_in_process, run_roles_subprocess
from tests.support.soak_only import soak_only

pytestmark = pytest.mark.timeout(180)
JOBS = 60


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "results"


@contextmanager
def lost_scratch(_worker: RolesSubprocess, scratch: Path) -> Iterator[None]:
    """Replace the scratch directory with a file, as a failed mount does."""
    scratch.rename(scratch.with_suffix(".away"))
    scratch.write_text("")
    yield
    scratch.unlink()
    scratch.with_suffix(".away").rename(scratch)


@contextmanager
def exhausted_descriptors(worker: RolesSubprocess, _scratch: Path) -> Iterator[None]:
    before = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir(f"/proc/{worker.pid}/fd"))  # noqa: PTH208 - the names are needed
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (used + 3, before[1]))
    yield
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, before)


@soak_only
@pytest.mark.parametrize("fault", [lost_scratch, exhausted_descriptors])
async def test_worker_with_a_machine_fault_costs_no_attempt_and_recovers(
    connection: Connection,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[RolesSubprocess, Path], AbstractContextManager[None]],
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
        with run_roles_subprocess(connection, store, "worker") as faulty:
            monkeypatch.delenv("TMPDIR")
            for process in (first, second, faulty):
                await process.wait_until_started()
            async with run_roles_in_process(connection, store) as roles:
                await poll_until(
                    lambda: bool(list(scratch.glob("*/*"))), "the worker has created its scratch directory"
                )
                with fault(faulty, scratch):
                    _, job_ids = await roles.submit_batch(*({} for _ in range(JOBS)), job_type="apart")
                    await roles.wait_until_finished(*job_ids, seconds=90)
                    for job_id in job_ids:
                        history = await roles.read_event_types(job_id)
                        assert history[-1] == "JobCompleted", history
                        assert history.count("JobClaimed") == 1 + history.count("JobReleased"), history
                        assert (await roles.load_job(job_id))["retries"] == 0
                    workers = await roles.db.workers.find().to_list()
                    [problem] = [worker["problem"] for worker in workers if worker["problem"]]
                    assert problem

                async def have_recovered() -> bool:
                    return await roles.db.workers.count_documents({"problem": None}) == 3

                await poll_until(have_recovered, "all workers have recovered")
                job_ids = [await roles.submit(job_type="apart") for _ in range(12)]
                await roles.wait_until_finished(*job_ids)
