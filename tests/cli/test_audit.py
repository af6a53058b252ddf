"""`jobledger log verify` as auditors run it: its exit codes, what it says to people and to programs."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml
from bson import ObjectId

from jobledger.cli import main
from jobledger.cli.commands import log
from jobledger.ledger.domain.commands import ClaimJob
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.store.hash_chain import GENESIS_HASH
from jobledger.projections.engine.registry import PROJECTION_VERSION
from tests.support.event_examples import NOON
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

NOTHING = bytes(32).hex()
EVENTS = 5
Work = Callable[[Ledger], Coroutine[Any, Any, Any]]


async def write(ledger: Ledger) -> None:
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


class Audited:
    """A log, and the command that verifies it, run in the test's process: a traceback comes out as an exception."""

    def __init__(
        self, connection: Connection, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._connection = connection
        self._capfd = capfd
        self._monkeypatch = monkeypatch

    def verify(self, *arguments: str) -> CommandOutcome:
        return self.run("log", "verify", *arguments)

    def run(self, *arguments: str) -> CommandOutcome:
        self._monkeypatch.setattr(sys, "argv", ["jobledger", *arguments])
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main.run()
        said = self._capfd.readouterr()
        return CommandOutcome(int(exited.value.code or 0), said.out, said.err)

    def json(self, exit_code: int, *arguments: str) -> Any:
        ended = self.verify("--json", *arguments)
        assert (ended.exit_code, ended.err) == (exit_code, ""), ended
        return json.loads(ended.out)

    def do(self, work: Work) -> None:
        async def with_a_ledger() -> None:
            async with open_ledger(
                self._connection, EventStoreLimits(gap_timeout_seconds=0.02), with_change_stream=False
            ) as ledger:
                await work(ledger)

        asyncio.run(with_a_ledger())

    def change(self, position: int, **fields: Any) -> None:
        async def changed(ledger: Ledger) -> None:
            done = await ledger.db.events.update_one({"_id": position}, {"$set": fields})
            assert done.modified_count == 1

        self.do(changed)

    def documents(self) -> list[Document]:
        found: list[Document] = []

        async def look(ledger: Ledger) -> None:
            found.extend(await load_event_documents(ledger.db))

        self.do(look)
        return found


@pytest.fixture
def empty(
    mongodb_uri: str,
    db_name: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Audited]:
    """A database in which nothing is yet."""
    configured = {"mongodb": {"uri": mongodb_uri, "db_name": db_name}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configured), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield Audited(Connection(mongodb_uri, db_name), capfd, monkeypatch)
    structlog.reset_defaults()  # the command has directed it to a stderr that ends with the test


@pytest.fixture
def audited(empty: Audited) -> Audited:
    empty.do(write)
    return empty


def note_in(ended: CommandOutcome) -> str:
    """The digest that `log verify` prints."""
    found = re.search(r"\b\d+:[0-9a-f]{64}$", ended.out, re.MULTILINE)
    assert found, ended
    return found[0]


# A right log ------------------------------------------------------------------------------------------------------


def test_a_right_log_is_said_to_be_right_and_what_to_note_of_it(audited: Audited) -> None:
    digest = GENESIS_HASH
    for document in audited.documents():
        digest = sha256(digest + document["hash"]).digest()
    assert audited.verify() == CommandOutcome(
        0,
        "5 events up to position 5 are intact (1 of them voided positions).\n"
        f"Digest, for `log verify --expected-digest`: 5:{digest.hex()}\n",
        "",
    )


def test_programs_are_told_the_same_as_json(audited: Audited) -> None:
    told = audited.json(0)
    assert told == {
        "events": 5,
        "voided_positions": 1,
        "position": 5,
        "digest": note_in(audited.verify()),
        "last_allocated_position": None,
        "first_error": None,
        "views": None,
        "files": None,
    }


def test_progress_on_a_terminal_is_kept_apart_from_the_result(
    audited: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich that is a terminal
    ended = audited.verify("--json")
    assert json.loads(ended.out)["events"] == EVENTS
    assert "verifying" in ended.err


def test_a_range_is_verified_alone(audited: Audited) -> None:
    audited.change(1, time=NOON)
    for arguments, events, end in [
        (("--from", "2"), 4, 5),
        (("--from", "2", "--to", "4"), 3, 4),
        (("--from", "5"), 1, 5),
        (("--from", "3", "--to", "3"), 1, 3),
        (("--from", "2", "--to", "1000"), 4, 5),
    ]:
        told = audited.json(0, *arguments)
        assert (told["events"], told["position"]) == (events, end)
        assert told["digest"] is None, "that would stand for events that were not looked at"
        assert "Digest" not in audited.verify(*arguments).out
    assert audited.verify("--to", "1").exit_code == 1


@pytest.mark.parametrize(
    "arguments", [("--from", "6"), ("--from", "4", "--to", "3"), ("--from", str(2**63 - 1))], ids=str
)
def test_where_nothing_is_nothing_is_wrong(audited: Audited, arguments: tuple[str, ...]) -> None:
    assert audited.verify(*arguments) == CommandOutcome(0, "There are no events to verify.\n", "")
    told = audited.json(0, *arguments)
    assert (told["events"], told["digest"], told["first_error"]) == (0, None, None)


def test_an_empty_log_is_right(empty: Audited) -> None:
    async def nothing(_ledger: Ledger) -> None:
        """To open it makes the index."""

    empty.do(nothing)
    assert empty.verify() == CommandOutcome(0, "There are no events to verify.\n", "")
    nothing_else = {"digest": None, "last_allocated_position": None, "first_error": None, "views": None, "files": None}
    assert empty.json(0) == {"events": 0, "voided_positions": 0, "position": 0, **nothing_else}


def test_a_log_that_nobody_has_opened_yet_is_right(empty: Audited) -> None:
    assert empty.verify() == CommandOutcome(0, "There are no events to verify.\n", "")


# A wrong one ------------------------------------------------------------------------------------------------------


def test_the_first_wrong_event_is_named_and_the_exit_code_is_1(audited: Audited) -> None:
    stream = audited.documents()[1]["stream"]
    audited.change(2, **{"data.worker_id": "mallory [/red]"})
    audited.change(4, time=NOON)
    assert audited.verify() == CommandOutcome(
        1,
        f"The log is damaged. First error: position 2 ({stream}, version 2): "
        "its hash is not that of its content: one of the two was changed.\n1 events before it are intact.\n",
        "",
    )
    assert audited.json(1) == {
        "events": 1,
        "voided_positions": 0,
        "position": 1,
        "digest": None,
        "first_error": {
            "position": 2,
            "stream": stream,
            "version": 2,
            "message": "its hash is not that of its content: one of the two was changed",
        },
        "last_allocated_position": None,
        "views": None,
        "files": None,
    }


def test_an_event_that_is_gone_is_named_by_its_position(audited: Audited) -> None:
    async def remove(ledger: Ledger) -> None:
        await ledger.db.events.delete_one({"_id": 4})

    audited.do(remove)
    told = audited.json(1)
    assert told["events"] == 3
    assert told["first_error"].items() >= {"position": 4, "stream": None, "version": None}.items()
    assert told["first_error"]["message"].startswith("missing.")


@pytest.mark.parametrize("version", [ObjectId("679f3d0c8f1b2a0001000000"), b"\1"], ids=["an id", "bytes"])
def test_programs_are_told_of_a_version_that_is_none(audited: Audited, version: Any) -> None:
    audited.change(4, version=version)
    assert audited.json(1)["first_error"]["position"] == 4


# Noted earlier ----------------------------------------------------------------------------------------------------


def test_what_was_noted_proves_later_that_nothing_was_taken_away(audited: Audited) -> None:
    note = note_in(audited.verify())
    audited.do(Ledger.submit_job)
    assert audited.verify("--expected-digest", note).exit_code == 0
    assert audited.verify("--expected-digest", note.upper()).exit_code == 0

    async def take_away(ledger: Ledger) -> None:
        await ledger.db.events.delete_many({"_id": {"$gte": 5}})

    audited.do(take_away)
    assert audited.verify().exit_code == 0
    ended = audited.verify("--expected-digest", note)
    assert ended.exit_code == 1
    assert "First error: position 5: missing: the log ends at position 4, and was noted to have reached 5." in ended.out
    assert audited.json(1, "--expected-digest", note)["first_error"]["position"] == 5


# A log whose end is missing -----------------------------------------------------------------------------------------

VIEWS_AT_9: Document = {"position": 9, "fencing_token": 1, "version": PROJECTION_VERSION, "slots": {}}


async def views_ahead(ledger: Ledger) -> None:
    await ledger.db.checkpoints.replace_one({"_id": "views"}, VIEWS_AT_9, upsert=True)


async def subscription_ahead(ledger: Ledger) -> None:
    await ledger.db.subscriptions.insert_one({"_id": "mine", "position": 9, "holder": "x"})


async def everything_gone(ledger: Ledger) -> None:
    await views_ahead(ledger)
    await ledger.db.events.delete_many({})


async def views_replaced(ledger: Ledger) -> None:
    read = {"position": 5, "hash": b"x" * 32, "fencing_token": 1, "version": PROJECTION_VERSION, "slots": {}}
    await ledger.db.checkpoints.replace_one({"_id": "views"}, read, upsert=True)


async def subscription_replaced(ledger: Ledger) -> None:
    await ledger.db.subscriptions.insert_one({"_id": "mine", "position": 4, "hash": b"x" * 32, "holder": "x"})
    await ledger.db.subscriptions.insert_one({"_id": "ahead", "position": 5, "holder": "x"})


@pytest.mark.parametrize(
    ("damage", "position", "reader"),
    [(views_replaced, 5, "The views"), (subscription_replaced, 4, "The subscription 'mine'")],
)
def test_events_appended_after_the_end_was_removed_do_not_hide_that(
    damage: Work, position: int, reader: str, audited: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.ledger.store.event_store._HEAD_READ_ATTEMPTS", 2)
    assert audited.verify("--no-views").exit_code == 0
    audited.do(damage)
    ended = audited.verify("--no-views")
    assert ended.exit_code == 1
    assert f"First error: position {position}: replaced. {reader} had reached position {position}" in ended.out
    if damage is views_replaced:
        assert "another event there" in audited.run("doctor").out
        assert audited.run("views", "rebuild").exit_code == 0
        assert audited.verify().exit_code == 0


@pytest.mark.parametrize(
    ("damage", "first", "reader"),
    [(views_ahead, 6, "the views"), (subscription_ahead, 6, "the subscription 'mine'"), (everything_gone, 1, "views")],
)
def test_a_log_without_its_end_is_found_by_what_was_read_of_it(
    damage: Work, first: int, reader: str, audited: Audited
) -> None:
    audited.do(damage)
    begun = time.monotonic()
    ended = audited.verify()
    assert time.monotonic() - begun < 10
    assert ended.exit_code == 1
    assert f"First error: position {first}: missing." in ended.out
    assert f"{reader} had reached position 9" in ended.out
    assert audited.json(1)["first_error"]["position"] == first
    assert audited.verify("--to", "9").exit_code == 1  # it was asked for more than there is
    if first > 1:
        assert audited.verify("--to", str(first - 1)).exit_code == 0


def test_positions_that_were_handed_out_and_never_written_are_noted(audited: Audited) -> None:
    audited.do(lambda ledger: create_position_gap(ledger.db))
    ended = audited.verify()
    assert ended.exit_code == 0
    assert "note: positions up to 6 were allocated to writers, but the log ends at 5." in ended.out
    assert audited.json(0)["last_allocated_position"] == 6


def test_no_command_waits_for_events_that_are_gone_and_replay_makes_the_views_of_the_rest(
    audited: Audited, tmp_path: Path
) -> None:
    audited.do(views_ahead)
    checked = audited.run("views", "check")
    assert checked.exit_code == 1
    assert "The log ends at position 5, but the views had reached position 9" in checked.err
    assert audited.run("views", "rebuild", "--view", "statistics").exit_code == 2
    assert audited.run("log", "tail", "--no-follow").exit_code == 0
    assert audited.run("log", "export", str(tmp_path / "log.ndjson")).exit_code == 0
    assert audited.run("log", "state", "--as-of", "99").exit_code == 0
    doctor = audited.run("doctor")
    assert doctor.exit_code == 1
    assert "5 events, but the views are at position 9" in doctor.out
    assert audited.run("views", "rebuild").exit_code == 0
    assert audited.verify().exit_code == 0
    assert audited.run("views", "check").exit_code == 0


def test_another_hash_than_the_noted_one_is_wrong(audited: Audited) -> None:
    ended = audited.verify("--expected-digest", f"5:{NOTHING}")
    assert ended.exit_code == 1
    assert (
        "First error: position 5: what stands up to here is not what was noted; each event fits the others."
        in ended.out
    )


def test_a_note_stands_for_all_events_and_so_does_not_go_with_a_range_that_leaves_some_out(audited: Audited) -> None:
    note = note_in(audited.verify("--to", "3"))
    assert audited.verify("--expected-digest", note, "--to", "3").exit_code == 0
    for arguments in (("--from", "2"), ("--to", "2")):
        assert_one_line_error(
            audited.verify("--expected-digest", note, *arguments),
            2,
            "--expected-digest covers all events up to position 3",
        )


NO_NOTES = [
    "",
    ":",
    "5",
    "5:",
    f":{NOTHING}",
    f"0:{NOTHING}",
    f"-1:{NOTHING}",
    f"x:{NOTHING}",
    f"1.5:{NOTHING}",
    f"5:{NOTHING[:-1]}",
    f"5:{NOTHING[:-2]}",
    f"5:{NOTHING}00",
    f"5:{NOTHING[:-1]}g",
    f"5 {NOTHING}",
    f"5:5:{NOTHING}",
    f"{'9' * 5000}:{NOTHING}",
    f"{10**30}:{NOTHING}",
]


@pytest.mark.parametrize("text", NO_NOTES, ids=lambda text: repr(text[:12]))
def test_a_text_that_is_no_note_is_one_line_and_exit_code_2(audited: Audited, text: str) -> None:
    assert_one_line_error(audited.verify("--expected-digest", text), 2, "expected POSITION:DIGEST")


@pytest.mark.parametrize("option", ["--from", "--to"])
@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5", "", str(2**63)])
def test_a_range_of_no_positions_is_wrong_usage(audited: Audited, option: str, number: str) -> None:
    ended = audited.verify(option, number)
    assert (ended.exit_code, ended.out) == (2, "")
    assert option in ended.err


# The database -----------------------------------------------------------------------------------------------------


def away(directory: Path) -> None:
    mongodb = {"uri": "mongodb://user:s3cret@127.0.0.1:1/?replicaSet=rs0", "connect_timeout_ms": 200}
    (directory / "config.yaml").write_text(yaml.safe_dump({"mongodb": mongodb}), encoding="utf-8")


def test_a_database_that_does_not_answer_is_one_line_and_exit_code_3(empty: Audited, tmp_path: Path) -> None:
    away(tmp_path)
    for arguments in ((), ("--json",), ("--expected-digest", f"5:{NOTHING}")):
        ended = empty.verify(*arguments)
        assert_one_line_error(ended, 3, "127.0.0.1:1")
        assert "s3cret" not in ended.err


def test_what_is_wrong_usage_is_said_before_the_database_is_asked(empty: Audited, tmp_path: Path) -> None:
    away(tmp_path)
    assert_one_line_error(empty.verify("--expected-digest", "5"), 2, "expected POSITION:DIGEST")


def test_a_mistake_in_the_settings_is_one_line_and_exit_code_2(empty: Audited, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mongodb:\n  url: x\n", encoding="utf-8")
    assert_one_line_error(empty.verify(), 2, "config.yaml: mongodb.url")
    assert_one_line_error(empty.verify("--config", "nowhere.yaml"), 2, "nowhere.yaml: file not found")


@soak_only
@needs_local_mongod
def test_an_embedded_server_that_does_not_run_is_started_meanwhile(tmp_path: Path) -> None:
    with Installation(tmp_path) as installation:
        up = installation.start_up_command()
        job = json.dumps([{"job_type": "echo", "parameters": {"text": "hello"}}])
        assert installation.run("submit", "-", "--wait", "--url", up.url, stdin=job).exit_code == 0
        running = installation.run("log", "verify")
        assert running.exit_code == 0, running
        assert not has_exited(installation.read_embedded_lock().pid), "it was stopped by who did not start it"
        assert up.stop().exit_code == 0

        alone = installation.run("log", "verify", "--expected-digest", note_in(running))
        assert (alone.exit_code, alone.err) == (0, ""), alone
        assert "are intact" in alone.out
        assert not (tmp_path / "data" / "server.json").exists(), "the server was left running"
        assert_one_line_error(
            installation.run("log", "verify", "--expected-digest", "5"), 2, "expected POSITION:DIGEST"
        )
        assert installation.run("log", "verify", "--expected-digest", f"1:{NOTHING}").exit_code == 1


def test_every_command_and_option_that_looks_into_the_log_is_explained(empty: Audited) -> None:
    ended = empty.verify("--help")
    assert ended.exit_code == 0
    for option in ("--from", "--to", "--expected-digest", "--json", "--config"):
        assert option in ended.out
    for command in log.app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__
