"""A role that is told to stop ends within its grace and a few seconds, whatever the database does."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from jobledger.cli.shutdown import SHUTDOWN_MARGIN_SECONDS
from jobledger.ledger.mongo.embedded_lock import wait_until
from tests.support.installation import Installation, http_client
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.replica_set import ReplicaSet
from tests.support.soak_only import soak_only
from tests.support.tcp_proxy import TcpProxy

pytestmark = [needs_local_mongod, pytest.mark.timeout(240)]
GRACE_SECONDS = 1.0
SLACK_SECONDS = 3.0
ALL_ROLES = ("api", "worker", "projector", "webhook-sender")


@soak_only
@pytest.mark.parametrize("away", ["frozen", "killed"])
def test_stop_while_all_members_are_away_ends_every_role_in_time(tmp_path: Path, away: str) -> None:
    with ReplicaSet(tmp_path / "replica-set") as replica_set, stopped_roles(tmp_path, replica_set.uri, ALL_ROLES):
        for node in replica_set.nodes:
            replica_set.suspend(node) if away == "frozen" else replica_set.kill(node)


@pytest.mark.parametrize("roles", [("api", "worker", "projector"), pytest.param(ALL_ROLES, marks=soak_only)])
def test_stop_while_the_network_is_silent_ends_every_role_in_time(
    mongodb_uri: str, tmp_path: Path, roles: Sequence[str]
) -> None:
    with TcpProxy(mongodb_uri) as proxy, stopped_roles(tmp_path, proxy.uri, roles):
        proxy.suspend()


@contextmanager
def stopped_roles(tmp_path: Path, uri: str, names: Sequence[str]) -> Iterator[None]:
    """Start roles, the API first, with a busy worker; behind the block, stop them and check that they end in time."""
    with Installation(
        tmp_path / "here",
        mongodb={"uri": uri, "db_name": f"stopping-{secrets.token_hex(4)}"},
        event_worker={"shutdown_grace_seconds": GRACE_SECONDS},
    ) as here:
        roles = [here.start(role) for role in names]
        for role in roles:
            role.wait_until_ready()
        with http_client(roles[0]) as client:
            body = {"job_type": "echo", "parameters": {"seconds": 120}}
            job = client.post("/api/events/jobs", json=body).raise_for_status().json()
            assert wait_until(lambda: _is_processing(client, job["job_id"]), 60)
        yield
        time.sleep(1)
        begun = time.monotonic()
        for role in roles:
            role.process.send_signal(signal.SIGTERM)
        for role in roles:
            ended = role.wait_for_exit()
            assert ended.exit_code == 0, ended
            assert "Traceback" not in ended.err, ended.err
        assert time.monotonic() - begun < GRACE_SECONDS + SHUTDOWN_MARGIN_SECONDS + SLACK_SECONDS


def _is_processing(client: httpx.Client, job_id: str) -> bool:
    history = client.get(f"/api/events/jobs/{job_id}/history").json()[
        "events"
    ]  # from the log: it is ahead of the views
    return "JobClaimed" in [event["type"] for event in history]
