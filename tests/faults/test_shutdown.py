"""A role exits within its grace period and a few seconds after SIGTERM, whatever the database does."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from jobledger.cli.hosting.shutdown import SHUTDOWN_MARGIN_SECONDS
from jobledger.ledger.mongo.embedded_files import wait_until
from tests.support.installation import Installation, http_client
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.replica_set import ReplicaSet
from tests.support.soak_only import soak_only
from tests.support.tcp_proxy import TcpProxy

pytestmark = [needs_local_mongod, pytest.mark.timeout(240)]
GRACE_SECONDS = 1.0
SLACK_SECONDS = 5.0  # for a loaded machine
OUTAGE_SECONDS = 1.0  # so that commands are in flight at the signal
ALL_ROLES = ("api", "worker", "projector", "webhook-sender")


@soak_only
@pytest.mark.parametrize("fault", ["suspended", "killed"])
def test_roles_stopped_during_a_database_outage_exit_in_time(tmp_path: Path, fault: str) -> None:
    with ReplicaSet(tmp_path / "replica-set") as replica_set, check_shutdown_of(tmp_path, replica_set.uri, ALL_ROLES):
        for node in replica_set.nodes:
            replica_set.suspend(node) if fault == "suspended" else replica_set.kill(node)


@pytest.mark.parametrize("roles", [("api", "worker", "projector"), pytest.param(ALL_ROLES, marks=soak_only)])
def test_roles_stopped_while_the_network_hangs_exit_in_time(
    mongodb_uri: str, tmp_path: Path, roles: Sequence[str]
) -> None:
    with TcpProxy(mongodb_uri) as proxy, check_shutdown_of(tmp_path, proxy.uri, roles):
        proxy.suspend()


@contextmanager
def check_shutdown_of(tmp_path: Path, uri: str, names: Sequence[str]) -> Iterator[None]:
    """Start roles, the API first, and a job. After the block, stop the roles and check that they exit in time."""
    with Installation(
        tmp_path / "installation",
        mongodb={"uri": uri, "db_name": f"stopping-{secrets.token_hex(4)}"},
        event_worker={"shutdown_grace_seconds": GRACE_SECONDS},
    ) as installation:
        roles = [installation.start(role) for role in names]
        for role in roles:
            role.wait_until_ready()
        with http_client(roles[0]) as client:
            body = {"job_type": "echo", "parameters": {"seconds": 120}}
            job = client.post("/api/events/jobs", json=body).raise_for_status().json()
            assert wait_until(lambda: _is_processing(client, job["job_id"]), 60)
        yield
        time.sleep(OUTAGE_SECONDS)
        stopped_at = time.monotonic()
        for role in roles:
            role.process.send_signal(signal.SIGTERM)
        for role in roles:
            outcome = role.wait_for_exit()
            assert outcome.exit_code == 0, outcome
            assert "Traceback" not in outcome.err, outcome.err
        assert time.monotonic() - stopped_at < GRACE_SECONDS + SHUTDOWN_MARGIN_SECONDS + SLACK_SECONDS


def _is_processing(client: httpx.Client, job_id: str) -> bool:
    """Return whether the log, which is ahead of the views, contains a claim."""
    history = client.get(f"/api/events/jobs/{job_id}/history").json()["events"]
    return "JobClaimed" in [event["type"] for event in history]
