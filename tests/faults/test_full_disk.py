"""A disk that is full, read-only or away: `up` says so once, keeps answering, and goes on by itself when it can."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from jobledger.ledger.mongo.embedded_lock import read_server_info, wait_until
from jobledger.ledger.system.disk_space import DiskSpaceMonitor, find_space_problem, find_write_problem
from tests.support.installation import Installation, http_client
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.soak_only import soak_only

DISK_MIB = 640
JOB = {"job_type": "echo", "parameters": {}}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "jobledger-test", str(directory)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("optional lane: this user may not mount a file system")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(directory: Path, leave_mib: int = 0) -> Path:
    """Take the space of a disk, but for so much."""
    path = directory / "filler"
    with path.open("ab", buffering=0) as file, suppress(OSError):
        while find_space_problem(directory, (leave_mib + 1) * 2**20) is None:
            file.write(bytes(2**20))
        while leave_mib == 0:
            file.write(bytes(4096))
    return path


def test_a_full_disk_is_reported_and_waited_for(tmp_path: Path, disk: Path) -> None:
    mongodb = {"data_dir": str(disk / "data"), "embedded_oplog_mb": 50}
    with Installation(tmp_path / "here", mongodb=mongodb, results={"min_free_mb": 60}) as installation:
        role = installation.start_up_command()
        with http_client(role) as client:
            done = client.post("/api/events/jobs", json=JOB).raise_for_status().json()["job_id"]

            filler = fill(disk, leave_mib=40)
            refused = until_status(client, "POST", 507)
            assert refused.json()["code"] == "insufficient_storage"
            assert str(disk) not in refused.text
            assert client.get(f"/api/events/jobs/{done}").status_code == 200  # reads go on
            assert "nearly full" in client.get("/readyz").json()["warning"]

            fill(disk)
            note = read_server_info(disk / "data")
            assert note is not None
            os.kill(note.pid, signal.SIGKILL)  # what mongod does itself when it cannot write
            assert wait_until(lambda: "waiting for its disk" in role.stderr, 20)
            assert "no space is left" in role.stderr
            assert client.get("/healthz").status_code == 200
            unready = until_status(client, "GET", 503, "/readyz")
            assert "nearly full" in unready.json()["message"]

            filler.unlink()
            assert wait_until(lambda: "server restarted" in role.stderr, 30)
            until_status(client, "POST", 202)
            assert client.get(f"/api/events/jobs/{done}").status_code == 200
        assert role.stderr.count("waiting for its disk") == 1
        assert "Traceback" not in role.stderr
        assert role.stop().exit_code == 0


def until_status(client: httpx.Client, method: str, status: int, path: str = "/api/events/jobs") -> httpx.Response:
    found: list[httpx.Response] = []

    def answered() -> bool:
        found[:] = [client.request(method, path, json=JOB if method == "POST" else None)]
        return found[0].status_code == status

    assert wait_until(answered, 20), found[0].text
    return found[0]


def test_up_on_a_full_disk_waits_and_ctrl_c_ends_it_at_once(tmp_path: Path, disk: Path) -> None:
    filler = fill(disk)
    with Installation(tmp_path / "here", mongodb={"data_dir": str(disk / "data")}) as installation:
        role = installation.start("up")
        assert wait_until(lambda: "waiting for disk space" in role.stderr, 60)
        role.process.send_signal(signal.SIGINT)
        assert role.process.wait(20) == 130
        waiting = installation.start("up")
        assert wait_until(lambda: "waiting for disk space" in waiting.stderr, 60)
        filler.unlink()
        waiting.wait_until_ready().stop()


@needs_local_mongod
@pytest.mark.timeout(240)
@soak_only  # mongod takes half a minute to notice that it has filled the disk
def test_mongod_that_fills_the_disk_itself_comes_back(tmp_path: Path, disk: Path) -> None:
    mongodb = {"data_dir": str(disk / "data"), "embedded_oplog_mb": 50}
    with Installation(tmp_path / "here", mongodb=mongodb, results={"min_free_mb": 0}) as installation:
        role = installation.start_up_command()
        with http_client(role) as client:
            filler = fill(disk, leave_mib=30)
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
            until_status(client, "POST", 202)
        assert role.stop().exit_code == 0


def test_a_disk_that_is_read_only_is_named(disk: Path) -> None:
    assert find_write_problem(disk, 0) is None
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    found = find_write_problem(disk, 0)
    assert found is not None
    assert not found.is_out_of_space
    assert "read-only" in str(found)


def test_a_directory_that_is_away_is_named(tmp_path: Path) -> None:
    found = find_write_problem(tmp_path / "gone", 0)
    assert found is not None
    assert "does not exist" in str(found)


async def test_work_is_accepted_again_only_with_more_than_the_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = DiskSpaceMonitor({"results": tmp_path}, 100)
    refused = []
    for free in (101, 99, 110, 126, 110):
        monkeypatch.setattr("jobledger.ledger.system.disk_space.free_bytes", lambda _directory, free=free: free)
        await watch.check()
        refused.append(watch.problem is not None)
    assert refused == [False, True, True, False, False]
