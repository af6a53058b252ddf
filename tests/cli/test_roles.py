"""The roles in separate processes and `jobledger up`: start, cooperation, and stop."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import pytest

from jobledger.cli.composition import ALL_ROLES, start_roles
from jobledger.ledger.domain.errors import ResourceUnavailable
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.embedded_files import wait_until
from tests.api.conftest import make_settings
from tests.support.installation import (
    Installation,
    assert_one_line_error,
    assert_outcome,
    has_exited,
    http_client,
    list_descendants,
)
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS

pytestmark = needs_local_mongod

ECHO = {"job_type": "echo", "parameters": {"text": "hello"}}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_up_after_signal_stops_cleanly_and_keeps_data(
    stopped_installation: Installation, number: signal.Signals
) -> None:
    up = stopped_installation.start_up_command()
    submitted = stopped_installation.run("submit", "-", "--wait", "--url", up.url, stdin=json.dumps([ECHO]))
    assert_outcome(submitted, 0)
    with http_client(up) as client:
        before = client.get("/api/events/jobs").json()
    processes = list_descendants(up.process.pid)
    mongod = stopped_installation.read_server_info().pid
    assert mongod in processes

    assert_outcome(up.stop(number), 0, "Stopping")
    assert wait_until(lambda: all(has_exited(pid) for pid in processes), DEADLINE_SECONDS), "a process is still running"
    assert not (stopped_installation.directory / "data" / "server.json").exists()

    with http_client(stopped_installation.start_up_command()) as client:
        assert client.get("/api/events/jobs").json() == before


def test_up_with_open_stream_and_running_job_stops_in_time(stopped_installation: Installation) -> None:
    stopped_installation.write_config(event_worker={"shutdown_grace_seconds": 1})
    up = stopped_installation.start_up_command()
    with http_client(up) as client, client.stream("GET", "/api/ledger/stream?after=0") as stream:
        client.post("/api/events/jobs", json={"job_type": "echo", "parameters": {"seconds": 3600}})
        assert any(line == "event: JobClaimed" for line in stream.iter_lines())
        started_at = time.monotonic()
        assert_outcome(up.stop(), 0)
        assert time.monotonic() - started_at < 30

    with http_client(stopped_installation.start_up_command()) as client:
        [job] = client.get("/api/events/jobs").json()["jobs"]
        history = client.get(f"/api/events/jobs/{job['job_id']}/history").json()["events"]
    assert "JobReleased" in [event["type"] for event in history]


def test_second_up_on_same_directory_exits_4(running_installation: Installation) -> None:
    second = running_installation.run("up")

    assert second.exit_code == 4
    assert second.err.splitlines()[-1].startswith("error: ")
    assert f"is used by another Jobledger process (ID {running_installation.commands[0].process.pid})" in second.err
    with http_client(running_installation.commands[0]) as client:
        assert client.get("/readyz").status_code == 200


def test_up_port_in_use_exits_4_and_names_setting(stopped_installation: Installation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        refused = stopped_installation.run("up", JOBLEDGER_API__PORT=str(port))
    assert refused.exit_code == 4
    assert f"cannot listen on 127.0.0.1:{port}" in refused.err
    assert "JOBLEDGER_API__PORT" in refused.err


async def test_start_roles_port_in_use_fails_before_database_access(
    mongodb_uri: str, db_name: str, tmp_path: Path
) -> None:
    """No worker may claim a job in a process that cannot serve."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = make_settings(mongodb_uri, db_name, tmp_path, api={"port": listener.getsockname()[1]})
        connection = Connection(mongodb_uri, db_name)
        with pytest.raises(ResourceUnavailable, match="cannot listen"):
            async with start_roles(settings, connection, ALL_ROLES, on_failure=lambda _: None):
                pass
    async with connection.create_client() as client:
        assert await client[db_name].list_collection_names() == []


@pytest.mark.parametrize("command", ["worker", "api", "projector"])
def test_role_without_embedded_server_exits_3(stopped_installation: Installation, command: str) -> None:
    assert_one_line_error(
        stopped_installation.run(command), 3, "jobledger up", str(stopped_installation.directory / "data")
    )


def test_role_unreachable_database_exits_3(stopped_installation: Installation) -> None:
    stopped_installation.write_config(
        mongodb={"uri": "mongodb://user:s3cret@127.0.0.1:1/?replicaSet=rs0", "connect_timeout_ms": 300}
    )
    outcome = stopped_installation.run("worker")
    assert_one_line_error(outcome, 3, "Check that it is running")
    assert "s3cret" not in outcome.err


def test_roles_in_separate_processes_process_jobs(tmp_path: Path, mongodb_uri: str, db_name: str) -> None:
    with Installation(tmp_path, mongodb={"uri": mongodb_uri, "db_name": db_name}) as installation:
        # Each role starts before the roles that it depends on.
        roles = [installation.start(name) for name in ("worker", "worker", "projector", "projector", "api")]
        api = [role.wait_until_ready() for role in roles][-1]
        outcome = installation.run("submit", "-", "--wait", "--url", api.url, stdin=json.dumps([ECHO] * 20))
        assert_outcome(outcome, 0)
        assert outcome.out.count("completed") == 20
        with http_client(api) as client:
            stats = client.get("/api/monitoring/events/stats").json()["stats"]
        assert stats["jobs"]["completed"] == 20
        assert len(stats["workers"]) == 2
        assert_outcome(roles[2].stop(), 0)  # if it is the leader, the other one takes over
        assert_outcome(installation.run("submit", "-", "--wait", "--url", api.url, stdin=json.dumps([ECHO])), 0)
        for role in roles[:2] + roles[3:]:
            assert_outcome(role.stop(), 0)
            assert wait_until(lambda role=role: not list_descendants(role.process.pid), DEADLINE_SECONDS)  # type: ignore[misc]  # bound in this iteration


def test_worker_next_to_up_uses_embedded_server(stopped_installation: Installation) -> None:
    up = stopped_installation.start_up_command()
    worker = stopped_installation.start("worker").wait_until_ready()
    with http_client(up) as client:
        assert wait_until(
            lambda: len(client.get("/api/monitoring/events/stats").json()["stats"]["workers"]) == 2, DEADLINE_SECONDS
        )
    assert_outcome(worker.stop(), 0)
    assert_outcome(up.stop(), 0)
