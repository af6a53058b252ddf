"""Run short commands in processes forked from one with loaded modules, which saves a second per command.

Each command has its own process, directory, environment, input, output and exit code. `run_command` runs one, and
`create_command` returns a program for shell scripts. Commands that keep running (`Installation.start`), and those whose
start is under test, are started normally.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final
from uuid import uuid4

_PROGRAM: Final = """
import json, os, select, signal, socket, sys, time

listener, parent = socket.socket(fileno=int(sys.argv[1])), socket.socket(fileno=int(sys.argv[2]))
# Open the streams on a socket: a stream that was opened on a file seeks, which fails when a command gets a pipe.
for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
    saved = os.dup(descriptor)
    os.dup2(parent.fileno(), descriptor)
    mode, buffering = "w" if descriptor else "r", 1 if name == "stderr" else -1  # `stderr` is flushed after each line
    setattr(sys, name, open(descriptor, mode, buffering, errors=getattr(sys, name).errors))
    os.dup2(saved, descriptor)
    os.close(saved)

import jobledger.cli.main
# Modules that commands import when they run:
import jobledger.cli.administration.api_key_admin, jobledger.cli.administration.mongo_roles
import jobledger.cli.administration.view_maintenance, jobledger.cli.checks.database, jobledger.cli.checks.machine
import jobledger.cli.composition, jobledger.cli.runtime

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies of the processes that wait for commands
while True:
    readable, _, _ = select.select([listener, parent], [], [])
    if parent in readable:
        break  # the test process has ended
    client, _ = listener.accept()
    if os.fork():
        client.close()
        continue
    listener.close()
    parent.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, descriptors, _, _ = socket.recv_fds(client, 1 << 20, 3)
    request = json.loads(message)
    pid = os.fork()
    if pid:
        for descriptor in (0, 1, 2, *descriptors):
            os.close(descriptor)
        client.sendall(json.dumps(pid).encode())
        _, status = os.waitpid(pid, 0)
        client.sendall(json.dumps(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    client.close()
    os.setsid()
    for standard_descriptor, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard_descriptor)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    sys.argv = ["jobledger", *request["arguments"]]
    code = 1
    try:
        jobledger.cli.main.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
"""

_CLIENT_PROGRAM: Final = """#!{python} -IS
import json, os, socket, sys

client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
client.connect({address!r})
request = {{"arguments": sys.argv[1:], "directory": os.getcwd(), "env": dict(os.environ)}}
socket.send_fds(client, [json.dumps(request).encode()], [0, 1, 2])
client.recv(100)
code = json.loads(client.recv(100))
sys.exit(code if code >= 0 else 128 - code)
"""


@dataclass(frozen=True)
class _Server:
    address: str
    process: subprocess.Popen[bytes]
    lifetime: socket.socket
    """The server exits when this socket is closed, at the latest at the end of this process."""
    folder: tempfile.TemporaryDirectory[str]

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.connect(self.address)
        return client


@cache
def _start_server() -> _Server:
    address = f"\0jobledger-tests-{uuid4().hex}"
    lifetime, parent = socket.socketpair()
    env = {name: value for name, value in os.environ.items() if not name.startswith("JOBLEDGER_")}
    with parent, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(listener.fileno()), str(parent.fileno())],
            pass_fds=[listener.fileno(), parent.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None,
            env={**env, "COLUMNS": "200", "NO_COLOR": "1"},
        )
    return _Server(address, process, lifetime, tempfile.TemporaryDirectory(prefix="jobledger-tests-"))


@cache
def create_command() -> Path:
    """Return a program named `jobledger` for shell scripts. A signal to it does not reach the command."""
    server = _start_server()
    path = Path(server.folder.name) / "jobledger"
    path.write_text(_CLIENT_PROGRAM.format(python=sys.executable, address=server.address), encoding="utf-8")
    path.chmod(0o755)
    return path


def run_command(
    arguments: Sequence[str], *, directory: Path, env: Mapping[str, str], stdin: bytes, seconds: float
) -> tuple[int, bytes, bytes]:
    """Run `jobledger` with these arguments. Return exit code, standard output and standard error.

    Raises:
        TimeoutError: The command did not finish within `seconds` and was killed.
    """
    with (
        _start_server().connect() as client,
        tempfile.TemporaryFile() as stdin_file,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        stdin_file.write(stdin)
        stdin_file.seek(0)
        request = {"arguments": list(arguments), "directory": str(directory), "env": dict(env)}
        client.settimeout(60)
        socket.send_fds(client, [json.dumps(request).encode()], [stdin_file.fileno(), out.fileno(), err.fileno()])
        pid = int(json.loads(client.recv(100)))
        client.settimeout(seconds)
        try:
            code = int(json.loads(client.recv(100)))
        except TimeoutError:
            os.killpg(pid, signal.SIGKILL)
            client.settimeout(60)
            client.recv(100)
            raise
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()
