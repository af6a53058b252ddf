"""`jobledger log verify`: exit codes, text output and JSON output."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Coroutine, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml
from bson import ObjectId

from jobledger.cli.commands import log
from jobledger.cli.output.terminal_text import SafeConsole
from jobledger.ledger.domain.commands import ClaimJob
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.store.hash_chain import GENESIS_HASH
from jobledger.projections.engine.view_registry import PROJECTION_VERSION
from tests.support.event_examples import NOON
from tests.support.in_process_command import run_command_in_process
from tests.support.installation import CommandOutcome, Installation, assert_one_line_error, has_exited
from tests.support.ledger_setup import (
    EVENT_METADATA,
    Ledger,
    create_position_gap,
    load_event_documents,
    open_ledger,
    read_all_events,
)
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.soak_only import soak_only

ZERO_DIGEST = bytes(32).hex()
EVENTS = 5
Work = Callable[[Ledger], Coroutine[Any, Any, Any]]


async def write_events(ledger: Ledger) -> None:
    """Two jobs, the first of them claimed (2, 5), and between them a position whose writer has died (3)."""
    submitted = await ledger.submit_job()
    await handle_command(
        ledger.event_store,
        submitted.events[0].stream,
        ClaimJob("w1", NOON),
        meta=EVENT_METADATA,
        stream_state=submitted.stream_state,
    )
    await create_position_gap(ledger.db)
    await ledger.submit_job()
    await ledger.submit_job()
    assert len(await read_all_events(ledger.event_store)) == EVENTS


class VerifiedLog:
    """A log and `log verify` for it, run in the process of the test."""

    def __init__(
        self, connection: Connection, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._connection = connection
        self._capfd = capfd
        self._monkeypatch = monkeypatch

    def verify(self, *arguments: str) -> CommandOutcome:
        return self.run("log", "verify", *arguments)

    def run(self, *arguments: str) -> CommandOutcome:
        return run_command_in_process(*arguments, capfd=self._capfd, monkeypatch=self._monkeypatch)

    def json(self, exit_code: int, *arguments: str) -> Any:
        outcome = self.verify("--json", *arguments)
        assert (outcome.exit_code, outcome.err) == (exit_code, ""), outcome
        return json.loads(outcome.out)

    def run_with_ledger(self, work: Work) -> None:
        async def open_and_run() -> None:
            async with open_ledger(
                self._connection, EventStoreLimits(gap_timeout_seconds=0.02), with_change_stream=False
            ) as ledger:
                await work(ledger)

        asyncio.run(open_and_run())

    def change_event(self, position: int, **fields: Any) -> None:
        async def update(ledger: Ledger) -> None:
            result = await ledger.db.events.update_one({"_id": position}, {"$set": fields})
            assert result.modified_count == 1

        self.run_with_ledger(update)

    def load_documents(self) -> list[Document]:
        documents: list[Document] = []

        async def load(ledger: Ledger) -> None:
            documents.extend(await load_event_documents(ledger.db))

        self.run_with_ledger(load)
        return documents


@pytest.fixture
def empty_log(
    mongodb_uri: str,
    db_name: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[VerifiedLog]:
    """An empty database."""
    configured = {"mongodb": {"uri": mongodb_uri, "db_name": db_name}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configured), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield VerifiedLog(Connection(mongodb_uri, db_name), capfd, monkeypatch)
    structlog.reset_defaults()  # the command configured it for a stderr that is closed after the test


@pytest.fixture
def verified_log(empty_log: VerifiedLog) -> VerifiedLog:
    empty_log.run_with_ledger(write_events)
    return empty_log


def read_digest(outcome: CommandOutcome) -> str:
    """The digest that `log verify` prints."""
    match = re.search(r"\b\d+:[0-9a-f]{64}$", outcome.out, re.MULTILINE)
    assert match, outcome
    return match[0]


# Intact logs ----------------------------------------------------------------------------------------------------------


def test_log_verify_intact_log_prints_count_and_digest(verified_log: VerifiedLog) -> None:
    digest = GENESIS_HASH
    for document in verified_log.load_documents():
        digest = sha256(digest + document["hash"]).digest()
    assert verified_log.verify() == CommandOutcome(
        0,
        "5 events up to position 5 are intact (1 of them voided positions).\n"
        f"Digest, for `log verify --expected-digest`: 5:{digest.hex()}\n",
        "",
    )


def test_log_verify_json_has_same_result(verified_log: VerifiedLog) -> None:
    result = verified_log.json(0)
    assert result == {
        "events": 5,
        "voided_positions": 1,
        "position": 5,
        "digest": read_digest(verified_log.verify()),
        "last_reserved_position": None,
        "first_error": None,
        "views": None,
        "files": None,
    }


def test_log_verify_on_terminal_prints_progress_to_stderr(
    verified_log: VerifiedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich that is a terminal
    monkeypatch.setattr(SafeConsole, "has_terminal", True)
    outcome = verified_log.verify("--json")
    assert json.loads(outcome.out)["events"] == EVENTS
    assert "verifying" in outcome.err


def test_log_verify_range_checks_only_its_events(verified_log: VerifiedLog) -> None:
    verified_log.change_event(1, time=NOON)
    for arguments, events, end in [
        (("--from", "2"), 4, 5),
        (("--from", "2", "--to", "4"), 3, 4),
        (("--from", "5"), 1, 5),
        (("--from", "3", "--to", "3"), 1, 3),
        (("--from", "2", "--to", "1000"), 4, 5),
    ]:
        result = verified_log.json(0, *arguments)
        assert (result["events"], result["position"]) == (events, end)
        assert result["digest"] is None, "it would cover events that were not verified"
        assert "Digest" not in verified_log.verify(*arguments).out
    assert verified_log.verify("--to", "1").exit_code == 1


@pytest.mark.parametrize(
    "arguments", [("--from", "6"), ("--from", "4", "--to", "3"), ("--from", str(2**63 - 1))], ids=str
)
def test_log_verify_range_without_events_succeeds(verified_log: VerifiedLog, arguments: tuple[str, ...]) -> None:
    assert verified_log.verify(*arguments) == CommandOutcome(0, "There are no events to verify.\n", "")
    result = verified_log.json(0, *arguments)
    assert (result["events"], result["digest"], result["first_error"]) == (0, None, None)


def test_log_verify_empty_log_succeeds(empty_log: VerifiedLog) -> None:
    async def do_nothing(_ledger: Ledger) -> None:
        """Opening the ledger creates the index."""

    empty_log.run_with_ledger(do_nothing)
    assert empty_log.verify() == CommandOutcome(0, "There are no events to verify.\n", "")
    empty_fields = {"digest": None, "last_reserved_position": None, "first_error": None, "views": None, "files": None}
    assert empty_log.json(0) == {"events": 0, "voided_positions": 0, "position": 0, **empty_fields}


def test_log_verify_new_database_succeeds(empty_log: VerifiedLog) -> None:
    assert empty_log.verify() == CommandOutcome(0, "There are no events to verify.\n", "")


# Damaged logs ---------------------------------------------------------------------------------------------------------


def test_log_verify_changed_event_names_first_error_and_exits_1(verified_log: VerifiedLog) -> None:
    stream = verified_log.load_documents()[1]["stream"]
    verified_log.change_event(2, **{"data.worker_id": "mallory [/red]"})
    verified_log.change_event(4, time=NOON)
    assert verified_log.verify() == CommandOutcome(
        1,
        f"The log is damaged. First error: position 2 ({stream}, version 2): "
        "its hash does not match its content: one of the two was changed.\n1 event before it is intact.\n",
        "",
    )
    assert verified_log.json(1) == {
        "events": 1,
        "voided_positions": 0,
        "position": 1,
        "digest": None,
        "first_error": {
            "position": 2,
            "stream": stream,
            "version": 2,
            "message": "its hash does not match its content: one of the two was changed",
        },
        "last_reserved_position": None,
        "views": None,
        "files": None,
    }


def test_log_verify_missing_event_names_its_position(verified_log: VerifiedLog) -> None:
    async def remove(ledger: Ledger) -> None:
        await ledger.db.events.delete_one({"_id": 4})

    verified_log.run_with_ledger(remove)
    result = verified_log.json(1)
    assert result["events"] == 3
    assert result["first_error"].items() >= {"position": 4, "stream": None, "version": None}.items()
    assert result["first_error"]["message"].startswith("missing.")


@pytest.mark.parametrize("version", [ObjectId("679f3d0c8f1b2a0001000000"), b"\1"], ids=["ObjectId", "bytes"])
def test_log_verify_json_reports_version_of_wrong_type(verified_log: VerifiedLog, version: Any) -> None:
    verified_log.change_event(4, version=version)
    assert verified_log.json(1)["first_error"]["position"] == 4


# Expected digests -----------------------------------------------------------------------------------------------------


def test_log_verify_expected_digest_detects_removed_end(verified_log: VerifiedLog) -> None:
    digest = read_digest(verified_log.verify())
    verified_log.run_with_ledger(Ledger.submit_job)
    assert verified_log.verify("--expected-digest", digest).exit_code == 0
    assert verified_log.verify("--expected-digest", digest.upper()).exit_code == 0

    async def remove_end(ledger: Ledger) -> None:
        await ledger.db.events.delete_many({"_id": {"$gte": 5}})

    verified_log.run_with_ledger(remove_end)
    assert verified_log.verify().exit_code == 0
    outcome = verified_log.verify("--expected-digest", digest)
    assert outcome.exit_code == 1
    assert (
        "First error: position 5: missing: the log ends at position 4, but the expected digest covers position 5."
        in outcome.out
    )
    assert verified_log.json(1, "--expected-digest", digest)["first_error"]["position"] == 5


# Logs without their end -----------------------------------------------------------------------------------------------

VIEWS_AT_9: Document = {"position": 9, "fencing_token": 1, "version": PROJECTION_VERSION, "slots": {}}


async def move_views_ahead(ledger: Ledger) -> None:
    await ledger.db.checkpoints.replace_one({"_id": "views"}, VIEWS_AT_9, upsert=True)


async def move_subscription_ahead(ledger: Ledger) -> None:
    await ledger.db.subscriptions.insert_one({"_id": "mine", "position": 9, "holder": "x"})


async def remove_all_events(ledger: Ledger) -> None:
    await move_views_ahead(ledger)
    await ledger.db.events.delete_many({})


async def store_wrong_view_hash(ledger: Ledger) -> None:
    checkpoint = {"position": 5, "hash": b"x" * 32, "fencing_token": 1, "version": PROJECTION_VERSION, "slots": {}}
    await ledger.db.checkpoints.replace_one({"_id": "views"}, checkpoint, upsert=True)


async def store_wrong_subscription_hash(ledger: Ledger) -> None:
    await ledger.db.subscriptions.insert_one({"_id": "mine", "position": 4, "hash": b"x" * 32, "holder": "x"})
    await ledger.db.subscriptions.insert_one({"_id": "ahead", "position": 5, "holder": "x"})


@pytest.mark.parametrize(
    ("damage", "position", "reader"),
    [(store_wrong_view_hash, 5, "The views"), (store_wrong_subscription_hash, 4, "The subscription 'mine'")],
)
def test_log_verify_replaced_end_is_reported(
    damage: Work, position: int, reader: str, verified_log: VerifiedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.ledger.store.event_store._HEAD_READ_TRIES", 2)
    assert verified_log.verify("--no-views").exit_code == 0
    verified_log.run_with_ledger(damage)
    outcome = verified_log.verify("--no-views")
    assert outcome.exit_code == 1
    assert f"First error: position {position}: replaced. {reader} had reached position {position}" in outcome.out
    if damage is store_wrong_view_hash:
        assert "another event there" in verified_log.run("doctor").out
        assert verified_log.run("views", "rebuild").exit_code == 0
        assert verified_log.verify().exit_code == 0


@pytest.mark.parametrize(
    ("damage", "first_error", "reader"),
    [
        (move_views_ahead, 6, "the views"),
        (move_subscription_ahead, 6, "the subscription 'mine'"),
        (remove_all_events, 1, "views"),
    ],
)
def test_log_verify_missing_end_is_detected_by_readers(
    damage: Work, first_error: int, reader: str, verified_log: VerifiedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified_log.run_with_ledger(damage)
    started_at = time.monotonic()
    outcome = verified_log.verify()
    assert time.monotonic() - started_at < 30
    monkeypatch.setattr("jobledger.ledger.store.event_store._HEAD_READ_TRIES", 2)
    assert outcome.exit_code == 1
    assert f"First error: position {first_error}: missing." in outcome.out
    assert f"{reader} had reached position 9" in outcome.out
    assert verified_log.json(1)["first_error"]["position"] == first_error
    assert verified_log.verify("--to", "9").exit_code == 1  # the range ends behind the log
    if first_error > 1:
        assert verified_log.verify("--to", str(first_error - 1)).exit_code == 0


def test_log_verify_allocated_unwritten_positions_are_noted(verified_log: VerifiedLog) -> None:
    verified_log.run_with_ledger(lambda ledger: create_position_gap(ledger.db))
    outcome = verified_log.verify()
    assert outcome.exit_code == 0
    assert "note: positions up to 6 were reserved by appenders, but the log ends at 5." in outcome.out
    assert verified_log.json(0)["last_reserved_position"] == 6


def test_commands_with_missing_end_do_not_wait_and_views_rebuild_repairs(
    verified_log: VerifiedLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.ledger.store.event_store._HEAD_READ_TRIES", 2)
    verified_log.run_with_ledger(move_views_ahead)
    check = verified_log.run("views", "check")
    assert check.exit_code == 1
    assert "The log ends at position 5, but the views had reached position 9" in check.err
    assert verified_log.run("views", "rebuild", "--view", "statistics").exit_code == 2
    assert verified_log.run("log", "ls").exit_code == 0
    assert verified_log.run("log", "export", str(tmp_path / "log.ndjson")).exit_code == 0
    assert verified_log.run("log", "state", "--as-of", "99").exit_code == 0
    doctor = verified_log.run("doctor")
    assert doctor.exit_code == 1
    assert "5 events, but the views are at position 9" in doctor.out
    assert verified_log.run("views", "rebuild").exit_code == 0
    assert verified_log.verify().exit_code == 0
    assert verified_log.run("views", "check").exit_code == 0


def test_log_verify_wrong_expected_digest_exits_1(verified_log: VerifiedLog) -> None:
    outcome = verified_log.verify("--expected-digest", f"5:{ZERO_DIGEST}")
    assert outcome.exit_code == 1
    problem = "the log up to here does not match the expected digest, although its hashes are correct."
    assert f"First error: position 5: {problem}" in outcome.out


def test_log_verify_expected_digest_needs_range_that_covers_it(verified_log: VerifiedLog) -> None:
    digest = read_digest(verified_log.verify("--to", "3"))
    assert verified_log.verify("--expected-digest", digest, "--to", "3").exit_code == 0
    for arguments in (("--from", "2"), ("--to", "2")):
        assert_one_line_error(
            verified_log.verify("--expected-digest", digest, *arguments),
            2,
            "--expected-digest covers all events up to position 3",
        )


INVALID_DIGESTS = [
    "",
    ":",
    "5",
    "5:",
    f":{ZERO_DIGEST}",
    f"0:{ZERO_DIGEST}",
    f"-1:{ZERO_DIGEST}",
    f"x:{ZERO_DIGEST}",
    f"1.5:{ZERO_DIGEST}",
    f"5:{ZERO_DIGEST[:-1]}",
    f"5:{ZERO_DIGEST[:-2]}",
    f"5:{ZERO_DIGEST}00",
    f"5:{ZERO_DIGEST[:-1]}g",
    f"5 {ZERO_DIGEST}",
    f"5:5:{ZERO_DIGEST}",
    f"{'9' * 5000}:{ZERO_DIGEST}",
    f"{10**30}:{ZERO_DIGEST}",
]


@pytest.mark.parametrize("text", INVALID_DIGESTS, ids=lambda text: repr(text[:12]))
def test_log_verify_invalid_expected_digest_is_usage_error(empty_log: VerifiedLog, text: str) -> None:
    assert_one_line_error(empty_log.verify("--expected-digest", text), 2, "expected POSITION:DIGEST")


@pytest.mark.parametrize("option", ["--from", "--to"])
@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5", "", str(2**63)])
def test_log_verify_invalid_range_is_usage_error(empty_log: VerifiedLog, option: str, number: str) -> None:
    outcome = empty_log.verify(option, number)
    assert (outcome.exit_code, outcome.out) == (2, "")
    assert option in outcome.err


# Database and settings ------------------------------------------------------------------------------------------------


def configure_unreachable_database(directory: Path) -> None:
    mongodb = {"uri": "mongodb://user:s3cret@127.0.0.1:1/?replicaSet=rs0", "connect_timeout_ms": 200}
    (directory / "config.yaml").write_text(yaml.safe_dump({"mongodb": mongodb}), encoding="utf-8")


def test_log_verify_unreachable_database_exits_3(empty_log: VerifiedLog, tmp_path: Path) -> None:
    configure_unreachable_database(tmp_path)
    for arguments in ((), ("--json",), ("--expected-digest", f"5:{ZERO_DIGEST}")):
        outcome = empty_log.verify(*arguments)
        assert_one_line_error(outcome, 3, "127.0.0.1:1")
        assert "s3cret" not in outcome.err


def test_log_verify_usage_error_precedes_database_error(empty_log: VerifiedLog, tmp_path: Path) -> None:
    configure_unreachable_database(tmp_path)
    assert_one_line_error(empty_log.verify("--expected-digest", "5"), 2, "expected POSITION:DIGEST")


def test_log_verify_wrong_setting_exits_2(empty_log: VerifiedLog, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mongodb:\n  url: x\n", encoding="utf-8")
    assert_one_line_error(empty_log.verify(), 2, "config.yaml: mongodb.url")
    assert_one_line_error(empty_log.verify("--config", "nowhere.yaml"), 2, "nowhere.yaml: file not found")


@soak_only
@needs_local_mongod
def test_log_verify_starts_and_stops_embedded_server(tmp_path: Path) -> None:
    with Installation(tmp_path) as installation:
        up = installation.start_up_command()
        job = json.dumps([{"job_type": "echo", "parameters": {"text": "hello"}}])
        assert installation.run("submit", "-", "--wait", "--url", up.url, stdin=job).exit_code == 0
        running = installation.run("log", "verify")
        assert running.exit_code == 0, running
        assert not has_exited(installation.read_server_info().pid), "the command stopped a server that it did not start"
        assert up.stop().exit_code == 0

        alone = installation.run("log", "verify", "--expected-digest", read_digest(running))
        assert (alone.exit_code, alone.err) == (0, ""), alone
        assert "are intact" in alone.out
        assert not (tmp_path / "data" / "server.json").exists(), "the command left its server running"
        assert_one_line_error(
            installation.run("log", "verify", "--expected-digest", "5"), 2, "expected POSITION:DIGEST"
        )
        assert installation.run("log", "verify", "--expected-digest", f"1:{ZERO_DIGEST}").exit_code == 1


def test_log_commands_and_verify_options_have_help(empty_log: VerifiedLog) -> None:
    outcome = empty_log.verify("--help")
    assert outcome.exit_code == 0
    for option in ("--from", "--to", "--expected-digest", "--json", "--config"):
        assert option in outcome.out
    for command in log.app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__
