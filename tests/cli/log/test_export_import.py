"""`jobledger log export` and `jobledger log import`."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pymongo import MongoClient

from jobledger.ledger.store import export, export_file, import_
from jobledger.ledger.store.hash_chain import build_hash_input
from tests.cli.log.conftest import LedgerCommands, write_job_history, write_long_history
from tests.projections.expected_views import load_views
from tests.support.installation import CommandOutcome
from tests.support.role_runner import RunningRoles


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
    assert "already exists" in outcome.err


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
            document["hash"] = sha256(build_hash_input(document)).digest()
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
