"""The result store of a running installation: creation, a missing store, and `doctor --accept-result-store`."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import pytest

from jobledger.ledger.files.store_marker import MARKER_FILE_NAME
from jobledger.ledger.mongo.embedded_files import wait_until
from tests.support.installation import Installation, http_client
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS

pytestmark = [needs_local_mongod, pytest.mark.timeout(300)]
ECHO = {"job_type": "echo", "parameters": {"text": "hello"}}


def submit(client: httpx.Client) -> str:
    return str(client.post("/api/events/jobs", json=ECHO).raise_for_status().json()["job_id"])


def read_status(client: httpx.Client, job_id: str) -> str:
    return str(client.get(f"/api/events/jobs/{job_id}").json()["job"]["status"])


def test_missing_result_store_is_reported_and_not_recreated(tmp_path: Path) -> None:
    with Installation(tmp_path / "installation", event_worker={"shutdown_grace_seconds": 1}) as installation:
        store = installation.directory / "data" / "results"
        before = installation.run("doctor")
        assert before.exit_code == 0, before
        assert not store.exists()

        role = installation.start_up_command()
        with http_client(role) as client:
            first = submit(client)
            assert wait_until(lambda: read_status(client, first) == "completed", DEADLINE_SECONDS)
            store.rename(store.with_suffix(".x"))
            doctor = installation.run("doctor")
            assert doctor.exit_code == 1
            assert "result store" in doctor.out
            assert "is missing" in doctor.out
            waiting = [submit(client) for _ in range(7)]
            assert wait_until(lambda: "claims no jobs" in role.stderr, DEADLINE_SECONDS)
            assert wait_until(lambda: "1 not claiming jobs" in installation.run("doctor").out, DEADLINE_SECONDS)
            assert not store.exists()
            assert "completed" not in {read_status(client, job_id) for job_id in waiting}
        role.stop()

        role = installation.start_up_command()
        with http_client(role) as client:
            assert not store.exists()
            assert "is missing" in role.stderr
            store.with_suffix(".x").rename(store)
            assert wait_until(
                lambda: {read_status(client, job_id) for job_id in waiting} == {"completed"}, DEADLINE_SECONDS
            ), role.stderr

            shutil.rmtree(store)
            accepted = installation.run("doctor", "--accept-result-store")
            assert accepted.exit_code == 0, accepted
            assert (store / MARKER_FILE_NAME).exists()
            later = submit(client)
            assert wait_until(lambda: read_status(client, later) == "completed", DEADLINE_SECONDS), role.stderr
        assert installation.run("doctor").exit_code == 0
        assert role.stop().exit_code == 0

    copy = Installation(tmp_path / "copy")
    shutil.copytree(installation.directory / "data", copy.directory / "data")
    with copy:
        role = copy.start_up_command()
        with http_client(role) as client:
            again = submit(client)
            assert wait_until(lambda: read_status(client, again) == "completed", DEADLINE_SECONDS), role.stderr
