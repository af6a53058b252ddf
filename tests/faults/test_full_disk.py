"""A disk that is full, read-only or missing: `up` logs it once, still answers, and recovers without help."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from jobledger.ledger.mongo.embedded_files import read_server_info, wait_until
from jobledger.ledger.system.disk_space import DiskSpaceMonitor, find_space_problem, find_write_problem
from tests.support.installation import Installation, http_client
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.soak_only import soak_only

DISK_MIB = 640
JOB = {"job_type": "echo", "parameters": {}}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "jobledger-test", str(directory)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("optional lane: only root may mount a file system: sudo make test")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill_disk(directory: Path, leave_mib: int = 0) -> Path:
    """Use the space of a disk except `leave_mib`. Return the file."""
    path = directory / "filler"
    with path.open("ab", buffering=0) as file, suppress(OSError):
        while find_space_problem(directory, (leave_mib + 1) * 2**20) is None:
            file.write(bytes(2**20))
        while leave_mib == 0:
            file.write(bytes(4096))
    return path


def test_full_disk_is_logged_once_and_the_server_restarts_with_space(tmp_path: Path, disk: Path) -> None:
    mongodb = {"data_dir": str(disk / "data"), "embedded_oplog_mb": 50}
    with Installation(tmp_path / "installation", mongodb=mongodb, results={"min_free_mb": 60}) as installation:
        role = installation.start_up_command()
        with http_client(role) as client:
            job_id = client.post("/api/events/jobs", json=JOB).raise_for_status().json()["job_id"]

            filler = fill_disk(disk, leave_mib=40)
            rejected = wait_for_status(client, "POST", 507)
            assert rejected.json()["code"] == "insufficient_storage"
            assert str(disk) not in rejected.text
            assert client.get(f"/api/events/jobs/{job_id}").status_code == 200  # reads still work
            assert "nearly full" in client.get("/readyz").json()["warning"]

            fill_disk(disk)
            server_info = read_server_info(disk / "data")
            assert server_info is not None
            os.kill(server_info.pid, signal.SIGKILL)  # mongod also aborts if it cannot write
            assert wait_until(lambda: "waiting for its disk" in role.stderr, 60)
            assert "no space is left" in role.stderr
            assert client.get("/healthz").status_code == 200
            unready = wait_for_status(client, "GET", 503, "/readyz")
            assert "nearly full" in unready.json()["message"]

            filler.unlink()
            assert wait_until(lambda: "server restarted" in role.stderr, 60)
            wait_for_status(client, "POST", 202)
            assert client.get(f"/api/events/jobs/{job_id}").status_code == 200
        assert role.stderr.count("waiting for its disk") == 1
        assert "Traceback" not in role.stderr
        assert role.stop().exit_code == 0


def wait_for_status(client: httpx.Client, method: str, status: int, path: str = "/api/events/jobs") -> httpx.Response:
    """Repeat a request until the response has this status. Return the response."""
    responses: list[httpx.Response] = []

    def has_status() -> bool:
        responses[:] = [client.request(method, path, json=JOB if method == "POST" else None)]
        return responses[0].status_code == status

    assert wait_until(has_status, 60), responses[0].text
    return responses[0]


def test_up_on_a_full_disk_waits_until_ctrl_c_or_space(tmp_path: Path, disk: Path) -> None:
    filler = fill_disk(disk)
    with Installation(tmp_path / "installation", mongodb={"data_dir": str(disk / "data")}) as installation:
        role = installation.start("up")
        assert wait_until(lambda: "waiting for disk space" in role.stderr, 60)
        role.process.send_signal(signal.SIGINT)
        assert role.process.wait(60) == 130
        waiting = installation.start("up")
        assert wait_until(lambda: "waiting for disk space" in waiting.stderr, 60)
        filler.unlink()
        waiting.wait_until_ready().stop()


@needs_local_mongod
@pytest.mark.timeout(240)
@soak_only  # mongod takes half a minute to notice that it has filled the disk
def test_mongod_that_filled_the_disk_restarts_with_space(tmp_path: Path, disk: Path) -> None:
    mongodb = {"data_dir": str(disk / "data"), "embedded_oplog_mb": 50}
    with Installation(tmp_path / "installation", mongodb=mongodb, results={"min_free_mb": 0}) as installation:
        role = installation.start_up_command()
        with http_client(role) as client:
            filler = fill_disk(disk, leave_mib=30)
            status = 202
            for _ in range(100):
                payload = {"job_type": "echo", "parameters": {"text": os.urandom(1_000_000).hex()}}  # compresses badly
                status = client.post("/api/events/jobs", json=payload, timeout=60).status_code
                if status != 202:
                    break
            assert status == 503
            assert wait_until(lambda: "waiting for its disk" in role.stderr, 60)
            filler.unlink()
            assert wait_until(lambda: "server restarted" in role.stderr, 60)
            wait_for_status(client, "POST", 202)
        assert role.stop().exit_code == 0


def test_find_write_problem_on_a_read_only_disk_names_it(disk: Path) -> None:
    assert find_write_problem(disk, 0) is None
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    problem = find_write_problem(disk, 0)
    assert problem is not None
    assert not problem.is_out_of_space
    assert "read-only" in str(problem)


def test_find_write_problem_of_a_missing_directory_names_it(tmp_path: Path) -> None:
    problem = find_write_problem(tmp_path / "missing", 0)
    assert problem is not None
    assert "does not exist" in str(problem)


async def test_disk_space_monitor_accepts_work_again_above_the_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = DiskSpaceMonitor({"results": tmp_path}, 100)
    has_problem = []
    for free in (101, 99, 110, 126, 110):
        monkeypatch.setattr("jobledger.ledger.system.disk_space.read_free_bytes", lambda _directory, free=free: free)
        await monitor.check()
        has_problem.append(monitor.problem is not None)
    assert has_problem == [False, True, True, False, False]
