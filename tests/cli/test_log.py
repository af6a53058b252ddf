"""`jobledger log …` and `jobledger views …` on a ledger with some history."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml
from bson import ObjectId
from pymongo import MongoClient

from jobledger.cli import main
from jobledger.ledger.domain.commands import CancelJob, CompleteJob, FailAttempt, RestartJob
from jobledger.ledger.domain.events import Failure
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store import export, export_file, import_
from jobledger.projections.engine import rebuild
from tests.projections.expected_views import assert_views_match_log, load_views, make_results, run_random_history
from tests.support.installation import CommandOutcome, Installation
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.role_runner import RunningRoles, run_roles_in_process

Work = Callable[[RunningRoles], Coroutine[Any, Any, Any]]


class Machine:
    """A ledger, and its commands run in the test's process: a traceback comes out as an exception."""

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
        self._monkeypatch.setattr(sys, "argv", ["jobledger", *arguments])
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main.run()
        said = self._capfd.readouterr()
        assert "Traceback" not in said.err
        return CommandOutcome(int(exited.value.code or 0), said.out, said.err)

    def json(self, *arguments: str, exit_code: int = 0, database: str | None = None) -> Any:
        ended = self.run(*arguments, "--json", database=database)
        assert ended.exit_code == exit_code, ended
        return json.loads(ended.out)

    def do(self, work: Work, *, database: str | None = None) -> Any:
        connection = Connection(self.connection.uri, database or self.connection.db_name)

        async def done() -> Any:
            async with run_roles_in_process(connection, self.directory / "results", projector=True) as here:
                found = await work(here)
                await here.wait_for_views()
                return found

        return asyncio.run(done())


@pytest.fixture
def machine(
    mongodb_uri: str, db_name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    configured = {"mongodb": {"uri": mongodb_uri, "db_name": db_name}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configured), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield Machine(mongodb_uri, db_name, tmp_path, capfd, monkeypatch)
    structlog.reset_defaults()  # the command has directed it to a stderr that ends with the test


@pytest.fixture
def other_database(mongodb_uri: str, db_name: str) -> Iterator[str]:
    name = f"{db_name}_b"
    yield name
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client.drop_database(name)


async def a_story(here: RunningRoles) -> str:
    """A job that fails, is restarted and completed; another that waits. Returns the id of the first."""
    job_id = await here.submit({"text": "Grüße"}, job_name="Die Rede")
    attempt = await here.claim(job_id, "worker-7")
    again = datetime.now(UTC) + timedelta(minutes=5)
    await here.handle_commands(
        job_id, FailAttempt("worker-7", attempt, Failure(code="BROKEN", message="it broke"), again)
    )
    await here.handle_commands(job_id, CancelJob("ada", "no longer wanted"), RestartJob("ada"))
    attempt = await here.claim(job_id, "worker-8")
    await here.handle_commands(job_id, CompleteJob("worker-8", attempt, make_results(job_id)))
    await here.submit()
    return job_id


# One story ------------------------------------------------------------------------------------------------------------


def test_a_story_tells_who_did_what_and_what_came_of_it(machine: Machine) -> None:
    job_id = machine.do(a_story)
    told = machine.run("log", "history", job_id).out
    lines = told.splitlines()
    assert "JobSubmitted echo 'Die Rede' by user-1" in lines[0]
    assert "status pending" in lines[1]
    assert any("JobClaimed attempt 1 on worker-7" in line for line in lines)
    assert any("status pending → processing" in line for line in lines)
    assert any("JobAttemptFailed BROKEN: it broke; retry at " in line for line in lines)
    assert any("JobCancelled" in line and "no longer wanted" in line for line in lines)
    assert any("status processing → completed" in line for line in lines)
    assert all("(test)" in line for line in lines if "Job" in line.split("(")[0])


def test_a_story_up_to_an_earlier_position_or_time(machine: Machine) -> None:
    job_id = machine.do(a_story)
    whole = [json.loads(line) for line in machine.run("log", "history", job_id, "--json").out.splitlines()]
    assert [it["event"]["type"] for it in whole] == [
        "JobSubmitted",
        "JobClaimed",
        "JobAttemptFailed",
        "JobCancelled",
        "JobRestarted",
        "JobClaimed",
        "JobCompleted",
    ]
    assert whole[-1]["state"]["status"] == "completed"
    third = whole[2]["event"]
    for then in (str(third["position"]), third["time"]):
        ended = machine.run("log", "history", job_id, "--as-of", then, "--json")
        some = [json.loads(line) for line in ended.out.splitlines()]
        assert [it["event"]["position"] for it in some][:3] == [it["event"]["position"] for it in whole[:3]]
        assert len(some) < len(whole) or then == third["time"]
    before = machine.run("log", "history", job_id, "--as-of", "2001-01-01T00:00:00Z")
    assert (before.exit_code, before.out) == (0, "")
    assert "did not exist at that time" in before.err


def test_what_is_in_no_log_is_said_in_one_line(machine: Machine) -> None:
    machine.do(a_story)
    ended = machine.run("log", "history", "job-of-nobody")
    assert (ended.exit_code, ended.err.count("\n")) == (1, 1)
    assert "job-of-nobody is not in the log" in ended.err
    ended = machine.run("log", "history", "job-of-nobody", "--as-of", "yesterday")
    assert ended.exit_code == 2
    assert "expected a position in the log or a time" in ended.err


# The end of the log ---------------------------------------------------------------------------------------------------


def test_the_end_of_the_log_is_told_filtered(machine: Machine) -> None:
    job_id = machine.do(a_story)
    last = machine.run("log", "tail", "--no-follow", "-n", "3").out.splitlines()
    assert [line.split()[0] for line in last] == ["6", "7", "8"]
    failed = machine.run("log", "tail", "--no-follow", "--after", "0", "--type", "JobAttemptFailed").out
    assert failed.count("\n") == 1
    assert "it broke" in failed
    one = machine.run("log", "tail", "--no-follow", "--after", "0", "--stream", job_id, "--json").out.splitlines()
    assert {json.loads(line)["stream"] for line in one} == {job_id}
    assert len(one) == 7
    ended = machine.run("log", "tail", "--type", "JobExploded")
    assert ended.exit_code == 2
    assert "unknown event type. Event types: BatchAccessChanged, " in ended.err


@needs_local_mongod
def test_whoever_follows_the_log_hears_of_everything_over_a_restart_of_everything(tmp_path: Path) -> None:
    installation = Installation(tmp_path)
    job = json.dumps([{"job_type": "echo", "parameters": {"text": "hello"}}])
    up = installation.start_up_command().wait_until_ready()
    following = installation.start("log", "tail", "--after", "0", "--json")
    try:
        for completed in (1, 2):
            assert installation.run("submit", "-", "--wait", "--url", up.url, stdin=job).exit_code == 0
            deadline = time.monotonic() + 20
            while following.stdout.count('"JobCompleted"') < completed:
                assert time.monotonic() < deadline, following.stderr
                time.sleep(0.05)
            assert up.stop().exit_code == 0
            if completed == 1:
                up = installation.start_up_command().wait_until_ready()
    finally:
        following.kill_group()
        installation.kill_all_processes()
    positions = [json.loads(line)["position"] for line in following.stdout.splitlines()]
    assert positions == list(range(1, len(positions) + 1))


# Export and import ----------------------------------------------------------------------------------------------------


async def much(here: RunningRoles) -> None:
    await run_random_history(here, random.Random(40), steps=60)
    await a_story(here)
    await assert_views_match_log(here)


async def views(here: RunningRoles) -> Any:
    await here.wait_for_views()
    return await load_views(here.db)


async def events(here: RunningRoles) -> Any:
    return [document async for document in here.db.events.find().sort("_id", 1)]


@pytest.mark.parametrize("name", ["log.ndjson", "log.ndjson.zst"])
def test_what_was_exported_is_the_same_ledger_in_an_empty_database(
    machine: Machine, other_database: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PAGE_EVENTS", 50)
    machine.do(much)
    before, log = machine.do(views), machine.do(events)
    ended = machine.run("log", "export", name)
    assert ended.exit_code == 0
    assert f"{name}: {len(log)} events, positions 1 to {len(log)}." in ended.out
    note = ended.out.strip().rpartition(" ")[2]
    ended = machine.run("log", "import", name, database=other_database)
    assert ended.exit_code == 0, ended
    assert note in ended.out
    assert machine.do(events, database=other_database) == log
    assert machine.do(views, database=other_database) == before
    verified = machine.json("log", "verify", "--expected-digest", note, database=other_database)
    assert (verified["first_error"], verified["views"]["differences"]) == (None, 0)
    machine.do(a_story, database=other_database)  # life goes on, behind what was imported
    assert machine.json("log", "verify", database=other_database)["events"] == len(log) + 8


def test_several_files_in_a_row_are_one_log(machine: Machine, other_database: str) -> None:
    machine.do(much)
    log = machine.do(events)
    assert machine.run("log", "export", "a.ndjson", "--to", "100").exit_code == 0
    assert machine.run("log", "export", "b.zst", "--from", "101", "--to", "150").exit_code == 0
    assert machine.run("log", "export", "c.ndjson", "--from", "151").exit_code == 0
    ended = machine.run("log", "import", "c.ndjson", "a.ndjson", database=other_database)
    assert ended.exit_code == 2
    assert "c.ndjson begins with position 151, and position 101 is needed" in ended.err
    assert machine.run("log", "import", "c.ndjson", "a.ndjson", "b.zst", database=other_database).exit_code == 0
    assert machine.do(events, database=other_database) == log


@pytest.mark.parametrize("name", ["log.ndjson", "log.ndjson.zst"])
def test_an_interrupted_export_is_continued(machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "PAGE_EVENTS", 20)
    machine.do(much)
    assert machine.run("log", "export", f"whole-{name}").exit_code == 0
    whole = Path(f"whole-{name}").read_bytes()
    written: list[int] = []
    line_of = export_file.encode_event

    class Cut(Exception):
        pass

    def cut(document: Any) -> bytes:
        written.append(document["_id"])
        if len(written) == 70:
            raise Cut
        return line_of(document)

    with monkeypatch.context() as patched:
        patched.setattr(export, "encode_event", cut)
        with pytest.raises(Cut):
            machine.run("log", "export", name)
    assert not Path(name).exists()
    with Path(f"{name}.part").open("ab") as part:
        part.write(whole[-15:-1])  # half a write, as a full disk or a killed machine leaves it

    def counted(document: Any) -> bytes:
        written.append(document["_id"])
        return line_of(document)

    with monkeypatch.context() as patched:
        patched.setattr(export, "encode_event", counted)
        assert machine.run("log", "export", name).exit_code == 0
    assert 41 <= written[70] <= 71
    lines = [line for page, _ in export_file.read_frames(Path(name)) for line in page]
    assert lines[1:] == [line for page, _ in export_file.read_frames(Path(f"whole-{name}")) for line in page][1:]
    assert not Path(f"{name}.part").exists()
    ended = machine.run("log", "export", name)
    assert ended.exit_code == 2
    assert "is there already" in ended.err


@pytest.mark.parametrize("damaged", [{"data.x": ObjectId()}, {"hash": "none"}, {"time": "noon"}, {"prev": None}])
def test_what_is_no_event_is_not_exported_and_said_in_one_line(machine: Machine, damaged: dict[str, Any]) -> None:
    machine.do(a_story)
    with MongoClient[dict[str, Any]](machine.connection.uri) as client:
        client[machine.connection.db_name].events.update_one({"_id": 3}, {"$set": damaged})
    ended = machine.run("log", "export", "log.ndjson")
    assert (ended.exit_code, ended.err.count("\n")) == (1, 1), ended
    assert "`jobledger log verify` says" in ended.err
    assert not Path("log.ndjson").exists()


_EXPORTED: list[bytes] = []


def exported(machine: Machine) -> bytes:
    """A long log as a file, made once for all tests."""
    if not _EXPORTED:
        machine.do(much)
        machine.run("log", "export", "exported.ndjson")
        _EXPORTED.append(Path("exported.ndjson").read_bytes())
    return _EXPORTED[0]


def damage(path: Path, kind: str) -> None:
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    match kind:
        case "cut off":
            text = text[: len(text) // 2]
        case "last line missing":
            text = b"".join(lines[:-1])
        case "an event missing":
            text = b"".join(lines[:10] + lines[11:])
        case "events exchanged":
            text = b"".join([*lines[:10], lines[11], lines[10], *lines[12:]])
        case "a word changed":
            text = text.replace(b"Die Rede", b"Die Rehe")
        case "its hash made anew":
            found = export_file.decode_event(lines[10])
            found["meta"]["actor"] = "nobody"
            import hashlib

            from jobledger.ledger.store.hash_chain import hash_input

            found["hash"] = hashlib.sha256(hash_input(found)).digest()
            lines[10] = export_file.encode_event(found) + b"\n"
            text = b"".join(lines)
        case "something behind":
            text += lines[10]
        case "no line of JSON":
            text = b"".join([*lines[:10], b"{hm\n", *lines[11:]])
        case "a field missing":
            text = text.replace(b'"event_id"', b'"event_ix"')
        case "another file":
            text = b"name,number\n"
        case "nothing":
            text = b""
        case "a later format":
            text = text.replace(b'"format":1', b'"format":2')
    path.write_bytes(text)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cut off", "was cut off"),
        ("last line missing", "was cut off"),
        ("an event missing", "line 11 is not what an export writes: position 10 should be there, and 11 is"),
        ("events exchanged", "line 11 is not what an export writes: position 10"),
        ("a word changed", "its hash is not that of its content"),
        ("its hash made anew", "its last line says something else of the events than they do"),
        ("something behind", "there is more behind what should be its last line"),
        ("no line of JSON", "line 11 is not what an export writes"),
        ("a field missing", "it is not an event with the fields that events have"),
        ("another file", "is no export of a ledger"),
        ("nothing", "is no export of a ledger"),
        ("a later format", "was exported in format 2, and this program knows format 1"),
    ],
)
def test_of_a_damaged_file_nothing_is_imported(machine: Machine, other_database: str, kind: str, said: str) -> None:
    Path("log.ndjson").write_bytes(exported(machine))
    damage(Path("log.ndjson"), kind)
    ended = machine.run("log", "import", "log.ndjson", database=other_database)
    assert (ended.exit_code, ended.err.count("\n")) == (1, 1), ended
    assert said in ended.err
    with MongoClient[dict[str, Any]](machine.connection.uri) as client:
        assert client[other_database].events.find_one() is None
        assert "jobs" not in client[other_database].list_collection_names()
    if kind == "a word changed":  # what was found out last, when everything had been written already
        Path("log.ndjson").write_bytes(exported(machine))
        assert machine.run("log", "import", "log.ndjson", database=other_database).exit_code == 0


def test_a_compressed_file_that_is_none_or_was_cut_off_is_refused(machine: Machine, other_database: str) -> None:
    machine.do(much)
    machine.run("log", "export", "log.zst")
    whole = Path("log.zst").read_bytes()
    for content, said in ((whole[:-30], "cut off"), (b"hm" + whole, "damaged, or not compressed"), (b"", "no export")):
        Path("log.zst").write_bytes(content)
        ended = machine.run("log", "import", "log.zst", database=other_database)
        assert (ended.exit_code, ended.err.count("\n")) == (1, 1), ended
        assert said in ended.err


def test_an_import_that_was_interrupted_is_continued(
    machine: Machine, other_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PAGE_EVENTS", 50)
    machine.do(much)
    log = machine.do(events)
    machine.run("log", "export", "log.zst")

    class Cut(Exception):
        pass

    taken: list[int] = []
    document_of = export_file.decode_event

    def cut(line: bytes) -> Any:
        found = document_of(line)
        taken.append(found["_id"])
        if found["_id"] == 120 and len(taken) == 120:
            raise Cut
        return found

    with monkeypatch.context() as patched:
        patched.setattr(export_file, "decode_event", cut)
        with pytest.raises(Cut):
            machine.run("log", "import", "log.zst", database=other_database)
        with MongoClient[dict[str, Any]](machine.connection.uri) as client:
            assert client[other_database].events.find_one() is None
            assert client[other_database][import_.STAGING_COLLECTION].count_documents({}) == 100
        assert machine.run("log", "import", "log.zst", database=other_database).exit_code == 0
    assert machine.do(events, database=other_database) == log


def test_an_import_needs_a_database_that_is_empty_and_at_rest(machine: Machine, other_database: str) -> None:
    machine.do(much)
    machine.run("log", "export", "log.ndjson")
    ended = machine.run("log", "import", "log.ndjson")
    assert ended.exit_code == 2
    assert "has a log already" in ended.err

    async def try_it(here: RunningRoles) -> CommandOutcome:
        assert here.projector is not None
        while await here.db.leaders.find_one({"_id": "projector", "released": False}) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return await asyncio.to_thread(machine.run, "log", "import", "log.ndjson", database=other_database)

    ended = machine.do(try_it, database=other_database)
    assert ended.exit_code == 2
    assert "a process is at work in the database" in ended.err
    ended = machine.run("log", "import", "no-such-file", database=other_database)
    assert (ended.exit_code, "cannot be read: No such file" in ended.err) == (2, True)


def test_there_is_nothing_to_export_of_an_empty_log(machine: Machine) -> None:
    ended = machine.run("log", "export", "log.ndjson")
    assert ended.exit_code == 2
    assert "the log ends at 0" in ended.err
    ended = machine.run("log", "export", "/no/such/place.ndjson")
    assert ended.exit_code == 2


# Views ----------------------------------------------------------------------------------------------------------------


def test_views_that_somebody_has_edited_are_found_and_made_anew(machine: Machine) -> None:
    job_id = machine.do(a_story)
    assert "The views match the log" in machine.run("log", "verify").out
    with MongoClient[dict[str, Any]](machine.connection.uri) as client:
        db = client[machine.connection.db_name]
        db.jobs.update_one({"_id": job_id}, {"$set": {"status": "failed"}})
        db.statistics.update_one({"_id": "jobs"}, {"$inc": {"completed": 1}})
    for command in (("log", "verify"), ("views", "check")):
        ended = machine.run(*command)
        assert ended.exit_code == 1
        assert f"jobs: {job_id}: status is 'failed' and should be 'completed'" in ended.out
        assert "statistics: jobs: completed is 2 and should be 1" in ended.out
        assert "2 documents differ (1 in jobs, 1 in statistics)" in ended.out
    found = machine.json("views", "check", "--view", "jobs", exit_code=1)
    assert (found["differences"], found["by_view"]) == (1, {"jobs": 1})
    assert found["first_differences"] == [
        {"view": "jobs", "key": job_id, "fields": ["status"], "in_view": True, "in_log": True}
    ]
    assert machine.run("log", "verify", "--no-views").exit_code == 0
    ended = machine.run("views", "rebuild")
    assert (ended.exit_code, ended.out) == (0, "Rebuilt all views up to position 8.\n")
    assert machine.run("log", "verify").exit_code == 0
    ended = machine.run("views", "rebuild", "--view", "jops")
    assert ended.exit_code == 2
    assert "unknown view. Views: jobs, batches, " in ended.err


def test_how_everything_stood_at_an_earlier_time(machine: Machine) -> None:
    async def a_day(here: RunningRoles) -> tuple[str, str, str]:
        one = await here.submit(job_name="first")
        batch_id, [two, three] = await here.submit_batch({}, {})
        await here.claim(two, "worker-7")
        head = await here.event_store.head_position()
        assert head == 5
        await here.handle_commands(two, CompleteJob("worker-7", 1, make_results(two)))
        await here.handle_commands(one, CancelJob("ada"))
        await here.claim(three, "worker-8")
        return one, two, batch_id

    one, two, batch_id = machine.do(a_day)
    stood = machine.json("log", "state", "--as-of", "5")["as_of"]
    assert stood["position"] == 5
    assert stood["jobs"] == {"pending": 2, "processing": 1, "completed": 0, "failed": 0, "cancelled": 0}
    assert [(it["job_id"], it["worker_id"], it["attempt"]) for it in stood["running"]] == [(two, "worker-7", 1)]
    assert stood["batches"][0]["batch_id"] == batch_id
    assert stood["batches"][0]["jobs"] == {"pending": 1, "processing": 1}
    told = machine.run("log", "state", "--as-of", "5").out
    assert "2 pending, 1 processing" in told
    assert "worker-7" in told

    both = machine.json("log", "state", "--as-of", "5", "--until", "8")
    assert both["until"]["jobs"] == {"pending": 0, "processing": 1, "completed": 1, "failed": 0, "cancelled": 1}
    assert both["changes"][one] == ["pending", "cancelled"]
    assert both["changes"][two] == ["processing", "completed"]
    assert len(both["changes"]) == 3
    assert "completed 0 → 1" in machine.run("log", "state", "--as-of", "5", "--until", "8").out
    now = machine.json("log", "state", "--as-of", datetime.now(UTC).isoformat())["as_of"]
    assert now["jobs"] == both["until"]["jobs"]
    assert "The log was empty." in machine.run("log", "state", "--as-of", "2001-01-01T00:00:00Z").out
    for arguments in (("--until", "5"), (), ("--as-of", "8", "--until", "5")):
        assert machine.run("log", "state", *arguments).exit_code == 2


def test_looking_back_finds_what_the_views_say_whatever_has_happened(machine: Machine) -> None:
    async def much_and_counted(here: RunningRoles) -> dict[str, Any]:
        await much(here)
        jobs = {it["_id"]: it["status"] async for it in here.db.jobs.find()}
        batches = {it["_id"]: (it["status"], it["paused"]) async for it in here.db.batches.find()}
        return {"jobs": jobs, "batches": batches}

    found = machine.do(much_and_counted)
    stood = machine.json("log", "state", "--as-of", str(10**9))["as_of"]
    counts = {name: list(found["jobs"].values()).count(name) for name in stood["jobs"]}
    assert stood["jobs"] == counts
    assert {it["batch_id"]: (it["status"], it["paused"]) for it in stood["batches"]} == found["batches"]
    running = {job_id for job_id, status in found["jobs"].items() if status == "processing"}
    assert {it["job_id"] for it in stood["running"]} == running


def test_a_rebuild_without_rights_is_told_in_one_line(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.do(a_story)

    async def refused(*_: Any, **__: Any) -> int:
        raise rebuild.NotComparable("The views were made by another version of this program: they differ.")

    monkeypatch.setattr(rebuild.Rebuild, "compare", refused)
    ended = machine.run("views", "check")
    assert (ended.exit_code, ended.err.count("\n")) == (1, 1)
