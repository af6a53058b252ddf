"""`jobledger log …` and `jobledger views …` on a ledger with a history of events."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml
from bson import ObjectId
from pymongo import MongoClient

from jobledger.ledger.domain.commands import CancelJob, CompleteJob, FailAttempt, RestartJob
from jobledger.ledger.domain.events import Failure
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.embedded_lock import wait_until
from jobledger.ledger.store import export, export_file, import_
from jobledger.ledger.store.hash_chain import hash_input
from jobledger.projections.engine import rebuild
from tests.projections.expected_views import assert_views_match_log, load_views, make_results, run_random_history
from tests.support.in_process_command import run_command_in_process
from tests.support.installation import DEADLINE_SECONDS, CommandOutcome, Installation
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.role_runner import RunningRoles, run_roles_in_process

Work = Callable[[RunningRoles], Coroutine[Any, Any, Any]]


class LedgerCommands:
    """A ledger and the commands for it, run in the process of the test."""

    def __init__(
        self,
        uri: str,
        db_name: str,
        directory: Path,
        capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.connection = Connection(uri, db_name)
        self.directory = directory
        self._capfd = capfd
        self._monkeypatch = monkeypatch

    def run(self, *arguments: str, database: str | None = None) -> CommandOutcome:
        self._monkeypatch.setenv("JOBLEDGER_MONGODB__DB_NAME", database or self.connection.db_name)
        self._monkeypatch.setenv("COLUMNS", "250")
        return run_command_in_process(*arguments, capfd=self._capfd, monkeypatch=self._monkeypatch)

    def json(self, *arguments: str, exit_code: int = 0, database: str | None = None) -> Any:
        outcome = self.run(*arguments, "--json", database=database)
        assert outcome.exit_code == exit_code, outcome
        return json.loads(outcome.out)

    def run_with_roles(self, work: Work, *, database: str | None = None) -> Any:
        connection = Connection(self.connection.uri, database or self.connection.db_name)

        async def start_and_run() -> Any:
            async with run_roles_in_process(connection, self.directory / "results", projector=True) as roles:
                result = await work(roles)
                await roles.wait_for_views()
                return result

        return asyncio.run(start_and_run())


@pytest.fixture
def ledger(
    mongodb_uri: str, db_name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[LedgerCommands]:
    configured = {"mongodb": {"uri": mongodb_uri, "db_name": db_name}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configured), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield LedgerCommands(mongodb_uri, db_name, tmp_path, capfd, monkeypatch)
    structlog.reset_defaults()  # the command configured it for a stderr that is closed after the test


@pytest.fixture
def other_database(mongodb_uri: str, db_name: str) -> Iterator[str]:
    name = f"{db_name}_b"
    yield name
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client.drop_database(name)


async def write_job_history(roles: RunningRoles) -> str:
    """Write a job that fails, is restarted and completes, and a pending one. Return the ID of the first."""
    job_id = await roles.submit({"text": "Grüße"}, job_name="Die Rede")
    attempt = await roles.claim(job_id, "worker-7")
    retry_at = datetime.now(UTC) + timedelta(minutes=5)
    await roles.handle_commands(
        job_id, FailAttempt("worker-7", attempt, Failure(code="BROKEN", message="it broke"), retry_at)
    )
    await roles.handle_commands(job_id, CancelJob("ada", "no longer wanted"), RestartJob("ada"))
    attempt = await roles.claim(job_id, "worker-8")
    await roles.handle_commands(job_id, CompleteJob("worker-8", attempt, make_results(job_id)))
    await roles.submit()
    return job_id


# log history ----------------------------------------------------------------------------------------------------------


def test_log_history_shows_actors_changes_and_results(ledger: LedgerCommands) -> None:
    job_id = ledger.run_with_roles(write_job_history)
    lines = ledger.run("log", "history", job_id).out.splitlines()
    assert "JobSubmitted echo 'Die Rede' by user-1" in lines[0]
    assert "status pending" in lines[1]
    assert any("JobClaimed attempt 1 on worker-7" in line for line in lines)
    assert any("status pending → processing" in line for line in lines)
    assert any("JobAttemptFailed BROKEN: it broke; retry at " in line for line in lines)
    assert any("JobCancelled" in line and "no longer wanted" in line for line in lines)
    assert any("status processing → completed" in line for line in lines)
    assert all("(test)" in line for line in lines if "Job" in line.split("(")[0])


def test_log_history_as_of_position_or_time_shows_earlier_events(ledger: LedgerCommands) -> None:
    job_id = ledger.run_with_roles(write_job_history)
    history = [json.loads(line) for line in ledger.run("log", "history", job_id, "--json").out.splitlines()]
    assert [entry["event"]["type"] for entry in history] == [
        "JobSubmitted",
        "JobClaimed",
        "JobAttemptFailed",
        "JobCancelled",
        "JobRestarted",
        "JobClaimed",
        "JobCompleted",
    ]
    assert history[-1]["state"]["status"] == "completed"
    third = history[2]["event"]
    for as_of in (str(third["position"]), third["time"]):
        outcome = ledger.run("log", "history", job_id, "--as-of", as_of, "--json")
        earlier = [json.loads(line) for line in outcome.out.splitlines()]
        assert [entry["event"]["position"] for entry in earlier][:3] == [
            entry["event"]["position"] for entry in history[:3]
        ]
        assert len(earlier) < len(history) or as_of == third["time"]
    before = ledger.run("log", "history", job_id, "--as-of", "2001-01-01T00:00:00Z")
    assert (before.exit_code, before.out) == (0, "")
    assert "did not exist at that time" in before.err


def test_log_history_unknown_stream_is_one_line_error(ledger: LedgerCommands) -> None:
    ledger.run_with_roles(write_job_history)
    outcome = ledger.run("log", "history", "job-unknown")
    assert (outcome.exit_code, outcome.err.count("\n")) == (1, 1)
    assert "job-unknown is not in the log" in outcome.err
    outcome = ledger.run("log", "history", "job-unknown", "--as-of", "yesterday")
    assert outcome.exit_code == 2
    assert "expected a position in the log or a time" in outcome.err


# log tail -------------------------------------------------------------------------------------------------------------


def test_log_tail_filters_by_type_and_stream(ledger: LedgerCommands) -> None:
    job_id = ledger.run_with_roles(write_job_history)
    last = ledger.run("log", "tail", "--no-follow", "-n", "3").out.splitlines()
    assert [line.split()[0] for line in last] == ["6", "7", "8"]
    failed = ledger.run("log", "tail", "--no-follow", "--after", "0", "--type", "JobAttemptFailed").out
    assert failed.count("\n") == 1
    assert "it broke" in failed
    of_stream = ledger.run("log", "tail", "--no-follow", "--after", "0", "--stream", job_id, "--json").out.splitlines()
    assert {json.loads(line)["stream"] for line in of_stream} == {job_id}
    assert len(of_stream) == 7
    outcome = ledger.run("log", "tail", "--type", "JobExploded")
    assert outcome.exit_code == 2
    assert "unknown event type. Event types: BatchAccessChanged, " in outcome.err


@needs_local_mongod
def test_log_tail_follows_over_restart_without_gaps(tmp_path: Path) -> None:
    installation = Installation(tmp_path)
    job = json.dumps([{"job_type": "echo", "parameters": {"text": "hello"}}])
    up = installation.start_up_command().wait_until_ready()
    following = installation.start("log", "tail", "--after", "0", "--json")
    try:
        for completed in (1, 2):
            assert installation.run("submit", "-", "--wait", "--url", up.url, stdin=job).exit_code == 0
            assert wait_until(
                lambda count=completed: following.stdout.count('"JobCompleted"') >= count,  # type: ignore[misc]  # bound in this iteration
                DEADLINE_SECONDS,
            ), following.stderr
            assert up.stop().exit_code == 0
            if completed == 1:
                up = installation.start_up_command().wait_until_ready()
    finally:
        following.kill_group()
        installation.kill_all_processes()
    positions = [json.loads(line)["position"] for line in following.stdout.splitlines()]
    assert positions == list(range(1, len(positions) + 1))


# Export and import ----------------------------------------------------------------------------------------------------


async def write_long_history(roles: RunningRoles) -> None:
    await run_random_history(roles, random.Random(40), steps=60)
    await write_job_history(roles)
    await assert_views_match_log(roles)


async def load_all_views(roles: RunningRoles) -> Any:
    await roles.wait_for_views()
    return await load_views(roles.db)


async def load_all_events(roles: RunningRoles) -> Any:
    return [document async for document in roles.db.events.find().sort("_id", 1)]


@pytest.mark.parametrize("name", ["log.ndjson", "log.ndjson.zst"])
def test_import_of_export_restores_events_and_views(
    ledger: LedgerCommands, other_database: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PAGE_EVENTS", 50)
    ledger.run_with_roles(write_long_history)
    views, events = ledger.run_with_roles(load_all_views), ledger.run_with_roles(load_all_events)
    outcome = ledger.run("log", "export", name)
    assert outcome.exit_code == 0
    assert f"{name}: {len(events)} events, positions 1 to {len(events)}." in outcome.out
    digest = outcome.out.strip().rpartition(" ")[2]
    outcome = ledger.run("log", "import", name, database=other_database)
    assert outcome.exit_code == 0, outcome
    assert digest in outcome.out
    assert ledger.run_with_roles(load_all_events, database=other_database) == events
    assert ledger.run_with_roles(load_all_views, database=other_database) == views
    verified = ledger.json("log", "verify", "--expected-digest", digest, database=other_database)
    assert (verified["first_error"], verified["views"]["differences"]) == (None, 0)
    ledger.run_with_roles(write_job_history, database=other_database)  # new events follow the imported ones
    assert ledger.json("log", "verify", database=other_database)["events"] == len(events) + 8


def test_import_of_several_files_restores_one_log(ledger: LedgerCommands, other_database: str) -> None:
    ledger.run_with_roles(write_long_history)
    events = ledger.run_with_roles(load_all_events)
    assert ledger.run("log", "export", "a.ndjson", "--to", "100").exit_code == 0
    assert ledger.run("log", "export", "b.zst", "--from", "101", "--to", "150").exit_code == 0
    assert ledger.run("log", "export", "c.ndjson", "--from", "151").exit_code == 0
    outcome = ledger.run("log", "import", "c.ndjson", "a.ndjson", database=other_database)
    assert outcome.exit_code == 2
    assert "c.ndjson begins with position 151 instead of 101" in outcome.err
    assert ledger.run("log", "import", "c.ndjson", "a.ndjson", "b.zst", database=other_database).exit_code == 0
    assert ledger.run_with_roles(load_all_events, database=other_database) == events


@pytest.mark.parametrize("name", ["log.ndjson", "log.ndjson.zst"])
def test_export_after_interruption_continues(
    ledger: LedgerCommands, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PAGE_EVENTS", 20)
    ledger.run_with_roles(write_long_history)
    assert ledger.run("log", "export", f"whole-{name}").exit_code == 0
    complete_file = Path(f"whole-{name}").read_bytes()
    written: list[int] = []
    encode_event = export_file.encode_event

    class Interrupted(Exception):
        pass

    def encode_until_interrupted(document: Any) -> bytes:
        written.append(document["_id"])
        if len(written) == 70:
            raise Interrupted
        return encode_event(document)

    with monkeypatch.context() as patched:
        patched.setattr(export, "encode_event", encode_until_interrupted)
        with pytest.raises(Interrupted):
            ledger.run("log", "export", name)
    assert not Path(name).exists()
    with Path(f"{name}.part").open("ab") as part:
        part.write(complete_file[-15:-1])  # a partial write, as after a full disk or a power failure

    def encode_and_record(document: Any) -> bytes:
        written.append(document["_id"])
        return encode_event(document)

    with monkeypatch.context() as patched:
        patched.setattr(export, "encode_event", encode_and_record)
        assert ledger.run("log", "export", name).exit_code == 0
    assert 41 <= written[70] <= 71
    lines = [line for page, _ in export_file.read_frames(Path(name)) for line in page]
    assert lines[1:] == [line for page, _ in export_file.read_frames(Path(f"whole-{name}")) for line in page][1:]
    assert not Path(f"{name}.part").exists()
    outcome = ledger.run("log", "export", name)
    assert outcome.exit_code == 2
    assert "exists already" in outcome.err


@pytest.mark.parametrize("damaged", [{"data.x": ObjectId()}, {"hash": "none"}, {"time": "noon"}, {"prev": None}])
def test_export_of_damaged_event_is_one_line_error(ledger: LedgerCommands, damaged: dict[str, Any]) -> None:
    ledger.run_with_roles(write_job_history)
    with MongoClient[dict[str, Any]](ledger.connection.uri) as client:
        client[ledger.connection.db_name].events.update_one({"_id": 3}, {"$set": damaged})
    outcome = ledger.run("log", "export", "log.ndjson")
    assert (outcome.exit_code, outcome.err.count("\n")) == (1, 1), outcome
    assert "run `jobledger log verify`" in outcome.err
    assert not Path("log.ndjson").exists()


_EXPORTED: list[bytes] = []


def export_long_log(ledger: LedgerCommands) -> bytes:
    """Return an export of a long log, written once for all tests."""
    if not _EXPORTED:
        ledger.run_with_roles(write_long_history)
        ledger.run("log", "export", "exported.ndjson")
        _EXPORTED.append(Path("exported.ndjson").read_bytes())
    return _EXPORTED[0]


def damage(path: Path, kind: str) -> None:
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    match kind:
        case "truncated":
            text = text[: len(text) // 2]
        case "last line missing":
            text = b"".join(lines[:-1])
        case "event missing":
            text = b"".join(lines[:10] + lines[11:])
        case "events swapped":
            text = b"".join([*lines[:10], lines[11], lines[10], *lines[12:]])
        case "text changed":
            text = text.replace(b"Die Rede", b"Die Rehe")
        case "text changed and event hashed again":
            document = export_file.decode_event(lines[10])
            document["meta"]["actor"] = "nobody"
            document["hash"] = sha256(hash_input(document)).digest()
            lines[10] = export_file.encode_event(document) + b"\n"
            text = b"".join(lines)
        case "line after the trailer":
            text += lines[10]
        case "invalid JSON":
            text = b"".join([*lines[:10], b"{hm\n", *lines[11:]])
        case "field missing":
            text = text.replace(b'"event_id"', b'"event_ix"')
        case "other file format":
            text = b"name,number\n"
        case "empty file":
            text = b""
        case "later format version":
            text = text.replace(b'"format":1', b'"format":2')
    path.write_bytes(text)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "was cut off"),
        ("last line missing", "was cut off"),
        ("event missing", "line 11 is not a valid line of an export: expected position 10, got 11"),
        ("events swapped", "line 11 is not a valid line of an export: expected position 10"),
        ("text changed", "its hash does not match its content"),
        ("text changed and event hashed again", "the trailer does not match the events"),
        ("line after the trailer", "there are lines after the trailer"),
        ("invalid JSON", "line 11 is not a valid line of an export"),
        ("field missing", "its fields are not those of an event"),
        ("other file format", "is not an export of a log"),
        ("empty file", "is not an export of a log"),
        ("later format version", "was exported in format 2, but this version reads format 1"),
    ],
)
def test_import_of_damaged_file_imports_nothing(
    ledger: LedgerCommands, other_database: str, kind: str, message: str
) -> None:
    Path("log.ndjson").write_bytes(export_long_log(ledger))
    damage(Path("log.ndjson"), kind)
    outcome = ledger.run("log", "import", "log.ndjson", database=other_database)
    assert (outcome.exit_code, outcome.err.count("\n")) == (1, 1), outcome
    assert message in outcome.err
    with MongoClient[dict[str, Any]](ledger.connection.uri) as client:
        assert client[other_database].events.find_one() is None
        assert "jobs" not in client[other_database].list_collection_names()
    if kind == "text changed":  # this is detected last, after everything was written to the staging collection
        Path("log.ndjson").write_bytes(export_long_log(ledger))
        assert ledger.run("log", "import", "log.ndjson", database=other_database).exit_code == 0


def test_import_of_damaged_compressed_file_is_refused(ledger: LedgerCommands, other_database: str) -> None:
    ledger.run_with_roles(write_long_history)
    ledger.run("log", "export", "log.zst")
    complete_file = Path("log.zst").read_bytes()
    for content, message in (
        (complete_file[:-30], "cut off"),
        (b"hm" + complete_file, "damaged, or not compressed"),
        (b"", "is not an export"),
    ):
        Path("log.zst").write_bytes(content)
        outcome = ledger.run("log", "import", "log.zst", database=other_database)
        assert (outcome.exit_code, outcome.err.count("\n")) == (1, 1), outcome
        assert message in outcome.err


def test_import_after_interruption_continues(
    ledger: LedgerCommands, other_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PAGE_EVENTS", 50)
    ledger.run_with_roles(write_long_history)
    events = ledger.run_with_roles(load_all_events)
    ledger.run("log", "export", "log.zst")

    class Interrupted(Exception):
        pass

    decoded: list[int] = []
    decode_event = export_file.decode_event

    def decode_until_interrupted(line: bytes) -> Any:
        document = decode_event(line)
        decoded.append(document["_id"])
        if document["_id"] == 120 and len(decoded) == 120:
            raise Interrupted
        return document

    with monkeypatch.context() as patched:
        patched.setattr(export_file, "decode_event", decode_until_interrupted)
        with pytest.raises(Interrupted):
            ledger.run("log", "import", "log.zst", database=other_database)
        with MongoClient[dict[str, Any]](ledger.connection.uri) as client:
            assert client[other_database].events.find_one() is None
            assert client[other_database][import_.STAGING_COLLECTION].count_documents({}) == 100
        assert ledger.run("log", "import", "log.zst", database=other_database).exit_code == 0
    assert ledger.run_with_roles(load_all_events, database=other_database) == events


def test_import_into_used_or_running_database_is_refused(ledger: LedgerCommands, other_database: str) -> None:
    ledger.run_with_roles(write_long_history)
    ledger.run("log", "export", "log.ndjson")
    outcome = ledger.run("log", "import", "log.ndjson")
    assert outcome.exit_code == 2
    assert "already has a log" in outcome.err

    async def import_during_projector(roles: RunningRoles) -> CommandOutcome:
        assert roles.projector is not None
        while await roles.db.leaders.find_one({"_id": "projector", "released": False}) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return await asyncio.to_thread(ledger.run, "log", "import", "log.ndjson", database=other_database)

    outcome = ledger.run_with_roles(import_during_projector, database=other_database)
    assert outcome.exit_code == 2
    assert "a process uses the database" in outcome.err
    outcome = ledger.run("log", "import", "no-such-file", database=other_database)
    assert (outcome.exit_code, "cannot be read: No such file" in outcome.err) == (2, True)


def test_export_of_empty_log_is_usage_error(ledger: LedgerCommands) -> None:
    outcome = ledger.run("log", "export", "log.ndjson")
    assert outcome.exit_code == 2
    assert "the log ends at 0" in outcome.err
    outcome = ledger.run("log", "export", "/no/such/place.ndjson")
    assert outcome.exit_code == 2


# Views and states -----------------------------------------------------------------------------------------------------


def test_views_check_reports_edited_documents_and_rebuild_repairs(ledger: LedgerCommands) -> None:
    job_id = ledger.run_with_roles(write_job_history)
    assert "The views match the log" in ledger.run("log", "verify").out
    with MongoClient[dict[str, Any]](ledger.connection.uri) as client:
        db = client[ledger.connection.db_name]
        db.jobs.update_one({"_id": job_id}, {"$set": {"status": "failed"}})
        db.statistics.update_one({"_id": "jobs"}, {"$inc": {"completed": 1}})
    for command in (("log", "verify"), ("views", "check")):
        outcome = ledger.run(*command)
        assert outcome.exit_code == 1
        assert f"jobs: {job_id}: status is 'failed' and should be 'completed'" in outcome.out
        assert "statistics: jobs: completed is 2 and should be 1" in outcome.out
        assert "2 documents differ (1 in jobs, 1 in statistics)" in outcome.out
    comparison = ledger.json("views", "check", "--view", "jobs", exit_code=1)
    assert (comparison["differences"], comparison["by_view"]) == (1, {"jobs": 1})
    assert comparison["first_differences"] == [
        {"view": "jobs", "key": job_id, "fields": ["status"], "in_view": True, "in_log": True}
    ]
    assert ledger.run("log", "verify", "--no-views").exit_code == 0
    outcome = ledger.run("views", "rebuild")
    assert (outcome.exit_code, outcome.out) == (0, "Rebuilt all views up to position 8.\n")
    assert ledger.run("log", "verify").exit_code == 0
    outcome = ledger.run("views", "rebuild", "--view", "jops")
    assert outcome.exit_code == 2
    assert "unknown view. Views: jobs, batches, " in outcome.err


def test_log_state_as_of_and_until_shows_states_and_changes(ledger: LedgerCommands) -> None:
    async def write_jobs_of_a_day(roles: RunningRoles) -> tuple[str, str, str]:
        cancelled = await roles.submit(job_name="first")
        batch_id, [completed, running] = await roles.submit_batch({}, {})
        await roles.claim(completed, "worker-7")
        head = await roles.event_store.head_position()
        assert head == 5
        await roles.handle_commands(completed, CompleteJob("worker-7", 1, make_results(completed)))
        await roles.handle_commands(cancelled, CancelJob("ada"))
        await roles.claim(running, "worker-8")
        return cancelled, completed, batch_id

    cancelled, completed, batch_id = ledger.run_with_roles(write_jobs_of_a_day)
    state = ledger.json("log", "state", "--as-of", "5")["as_of"]
    assert state["position"] == 5
    assert state["jobs"] == {"pending": 2, "processing": 1, "completed": 0, "failed": 0, "cancelled": 0}
    assert [(job["job_id"], job["worker_id"], job["attempt"]) for job in state["running"]] == [
        (completed, "worker-7", 1)
    ]
    assert state["batches"][0]["batch_id"] == batch_id
    assert state["batches"][0]["jobs"] == {"pending": 1, "processing": 1}
    output = ledger.run("log", "state", "--as-of", "5").out
    assert "2 pending, 1 processing" in output
    assert "worker-7" in output

    both = ledger.json("log", "state", "--as-of", "5", "--until", "8")
    assert both["until"]["jobs"] == {"pending": 0, "processing": 1, "completed": 1, "failed": 0, "cancelled": 1}
    assert both["changes"][cancelled] == ["pending", "cancelled"]
    assert both["changes"][completed] == ["processing", "completed"]
    assert len(both["changes"]) == 3
    assert "completed 0 → 1" in ledger.run("log", "state", "--as-of", "5", "--until", "8").out
    now = ledger.json("log", "state", "--as-of", datetime.now(UTC).isoformat())["as_of"]
    assert now["jobs"] == both["until"]["jobs"]
    assert "The log was empty." in ledger.run("log", "state", "--as-of", "2001-01-01T00:00:00Z").out
    for arguments in (("--until", "5"), (), ("--as-of", "8", "--until", "5")):
        assert ledger.run("log", "state", *arguments).exit_code == 2


def test_log_state_of_random_history_matches_views(ledger: LedgerCommands) -> None:
    async def write_and_load_statuses(roles: RunningRoles) -> dict[str, Any]:
        await write_long_history(roles)
        jobs = {job["_id"]: job["status"] async for job in roles.db.jobs.find()}
        batches = {batch["_id"]: (batch["status"], batch["paused"]) async for batch in roles.db.batches.find()}
        return {"jobs": jobs, "batches": batches}

    statuses = ledger.run_with_roles(write_and_load_statuses)
    state = ledger.json("log", "state", "--as-of", str(10**9))["as_of"]
    counts = {name: list(statuses["jobs"].values()).count(name) for name in state["jobs"]}
    assert state["jobs"] == counts
    assert {batch["batch_id"]: (batch["status"], batch["paused"]) for batch in state["batches"]} == statuses["batches"]
    running = {job_id for job_id, status in statuses["jobs"].items() if status == "processing"}
    assert {job["job_id"] for job in state["running"]} == running


def test_views_check_of_other_version_is_one_line_error(
    ledger: LedgerCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.run_with_roles(write_job_history)

    async def raise_not_comparable(*_: Any, **__: Any) -> int:
        raise rebuild.NotComparable("The views were made by another version of this program: they differ.")

    monkeypatch.setattr(rebuild.Rebuild, "compare", raise_not_comparable)
    outcome = ledger.run("views", "check")
    assert (outcome.exit_code, outcome.err.count("\n")) == (1, 1)
