"""A real ledger for one test: the API, the projector, a worker and the webhook sender in a process of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self
from uuid import uuid4

import orjson
from pymongo import MongoClient

from jobledger.client.synchronous.client import Client
from jobledger.testing.submissions import Submitted
from jobledger.workers.retry import Duration, parse_duration

_START_SECONDS: Final = 60.0
_LOG_TAIL_CHARACTERS: Final = 4000


class LedgerError(RuntimeError):
    """The ledger of a test cannot do what the test requests. The text says why, and ends with the process's log."""


class LedgerProcess:
    """A process that runs ledgers, one after the other. It has the job types of one application.

    Args:
        directory: Directory of the log file.
        app_dir: Working directory, from which the application is imported.
    """

    def __init__(self, directory: Path, app_dir: Path) -> None:
        self.log_path = directory / "ledger.log"
        self._socket, theirs = socket.socketpair()
        with theirs, self.log_path.open("wb") as log:
            # No settings of this machine: the test must not write to the database of a real installation.
            env = {name: value for name, value in os.environ.items() if not name.startswith("JOBLEDGER_")}
            self._process = subprocess.Popen(  # noqa: S603 - our own command line
                [sys.executable, "-m", "jobledger.testing.ledger_process", str(theirs.fileno())],
                cwd=app_dir,
                env={**env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
            )
        self._responses = self._socket.makefile("rb")

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def request(self, command: str, *, timeout: float = _START_SECONDS, **arguments: Any) -> dict[str, Any]:
        """Send a request and return the response.

        Args:
            command: The name of the request.
            timeout: Seconds until the response must have arrived.
            arguments: More fields of the request.

        Raises:
            LedgerError: The process responded with an error, not in time, or has ended.
        """
        self._socket.settimeout(timeout)
        try:
            self._socket.sendall(orjson.dumps({"command": command, **arguments}, default=str) + b"\n")
            line = self._responses.readline()
        except OSError as error:
            self.kill()  # a late response would count as that of the next request
            raise LedgerError(f"the ledger did not respond to {command!r} ({error}).{self._read_log_tail()}") from error
        if not line:
            raise LedgerError(f"the process of the ledger has ended.{self._read_log_tail()}")
        response: dict[str, Any] = orjson.loads(line)
        if "error" in response:
            raise LedgerError(f"{response['error']}{self._read_log_tail()}")
        return response

    def close(self) -> None:
        """End the process."""
        self._responses.close()
        self._socket.close()
        try:
            self._process.wait(_START_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process at once. Its job processes end with it."""
        self._process.kill()
        self._process.wait()

    def _read_log_tail(self) -> str:
        text = self.log_path.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL_CHARACTERS:].strip()
        return f"\nEnd of its log:\n{text}" if text else ""


class Ledger:
    """A ledger with a database of its own. The fixture `ledger` creates it.

    Attributes:
        url: The URL of its API.
        client: A client of the API.
        mongodb_uri: The URI of the MongoDB server.
        db_name: The name of its database.
    """

    def __init__(self, process: LedgerProcess, mongodb_uri: str, db_name: str, url: str) -> None:
        self._process = process
        self.mongodb_uri = mongodb_uri
        self.db_name = db_name
        self.url = url
        self.client = Client(url)

    @classmethod
    def start(
        cls,
        process: LedgerProcess,
        mongodb_uri: str,
        directory: Path,
        *,
        settings: Mapping[str, Mapping[str, Any]],
        worker: bool,
    ) -> Self:
        """Start a ledger in a process.

        Args:
            process: The process.
            mongodb_uri: The URI of a replica set.
            directory: Directory of the result files.
            settings: Sections of config.yaml.
            worker: Whether a worker runs the jobs.
        """
        db_name = f"test_{uuid4().hex[:16]}"
        own: dict[str, dict[str, Any]] = {
            "api": {"host": "127.0.0.1", "port": 0},
            "mongodb": {"db_name": db_name},
            "results": {"store": str(directory / "results")},
            "event_worker": {"shutdown_grace_seconds": 0, "lease_seconds": 30},
            "webhooks": {"allowed_private_hosts": ["127.0.0.1", "localhost"]},
        }
        merged = {name: {**own.get(name, {}), **settings.get(name, {})} for name in own.keys() | settings.keys()}
        response = process.request("start", uri=mongodb_uri, settings=merged, worker=worker)
        return cls(process, mongodb_uri, db_name, response["url"])

    def __repr__(self) -> str:
        return f"<Ledger {self.url}>"

    def run_until_idle(self, timeout: Duration = 30) -> None:
        """Wait until nothing can continue now: no job is running or due, and the views show this.

        Jobs that are due later wait: see `advance`.

        Raises:
            TimeoutError: Something is still open. The message lists it.
        """
        seconds = parse_duration(timeout, "timeout")
        response = self._process.request("wait_until_idle", seconds=seconds, timeout=seconds + _START_SECONDS)
        if response["open"]:
            listed = "\n".join(f"- {line}" for line in response["open"][:20])
            raise TimeoutError(f"the ledger is not idle after {seconds:g} seconds:\n{listed}")

    def advance(self, duration: Duration) -> None:
        """Move the clock of the ledger forward, so that delayed jobs, retries and webhooks become due.

        Later events have later times. The clock that jobs and this test read, timeouts and leases do not change.

        Args:
            duration: For example `timedelta(hours=1)` or "1h". It is added to earlier ones.

        Raises:
            TypeError: It is not a duration.
            ValueError: It is negative.
        """
        self._process.request("advance", seconds=parse_duration(duration, "duration"))

    def list_submitted(self) -> Sequence[Submitted]:
        """Return all jobs that were submitted, in order, whether or not they have run."""
        return [Submitted(**fields) for fields in self._process.request("submitted")["submitted"]]

    def stop(self) -> None:
        """Stop the ledger and drop its database."""
        self.client.close()
        try:
            if self._process.is_running:
                self._process.request("stop")
        finally:
            with MongoClient[dict[str, Any]](self.mongodb_uri) as client:
                client.drop_database(self.db_name)
