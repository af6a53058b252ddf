"""`jobledger doctor` with and without a running installation."""

from __future__ import annotations

from tests.support.installation import Installation, assert_outcome, has_exited
from tests.support.mongodb_provider import needs_local_mongod

pytestmark = needs_local_mongod


def test_doctor_running_installation_finds_no_problem(running_installation: Installation) -> None:
    text = assert_outcome(
        running_installation.run("doctor"), 0, "MongoDB", "replica set rs0 with 1 member", "Clocks", "Oplog", "Log"
    )
    assert not any(" problem " in line for line in text.splitlines())
    assert not has_exited(running_installation.read_server_info().pid), (
        "the doctor stopped a server that it did not start"
    )


def test_doctor_without_server_starts_and_stops_its_own(stopped_installation: Installation) -> None:
    assert_outcome(stopped_installation.run("doctor"), 0, "replica set rs0", "0 events")
    assert not (stopped_installation.directory / "data" / "server.json").exists()
    assert_outcome(stopped_installation.run("doctor"), 0)


def test_doctor_unreachable_database_prints_advice(stopped_installation: Installation) -> None:
    stopped_installation.write_config(mongodb={"uri": "mongodb://user:s3cret@127.0.0.1:1/", "connect_timeout_ms": 200})
    text = assert_outcome(stopped_installation.run("doctor"), 1, "problem", "Check that it is running")
    assert "s3cret" not in text


def test_doctor_prints_brackets_unchanged(stopped_installation: Installation, mongodb_uri: str, db_name: str) -> None:
    stopped_installation.write_config(
        mongodb={"uri": mongodb_uri, "db_name": db_name}, results={"store": "odd[red]dir[/x]"}
    )
    assert_outcome(stopped_installation.run("doctor"), 0, "odd[red]dir[/x]")
