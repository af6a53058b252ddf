"""Run short commands in processes forked from one with loaded modules, which saves a second per command.

Each is a process of its own, with its own directory, environment, input and output, and ends with its own exit code.
Commands that stay (`Installation.start`) and those whose start is itself under test are real.
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
from functools import cache
from pathlib import Path
from typing import Final

_PROGRAM: Final = """
import json, os, socket, sys, time
import jobledger.cli.main
# Modules that commands import when they run:
import jobledger.cli.api_key_admin, jobledger.cli.checks.database, jobledger.cli.checks.machine
import jobledger.cli.composition, jobledger.cli.mongo_roles, jobledger.cli.runtime, jobledger.cli.view_maintenance

server = socket.socket(fileno=int(sys.argv[1]))
while True:
    message, descriptors, _, _ = socket.recv_fds(server, 1 << 20, 3)
    if not message:
        break
    request = json.loads(message)
    pid = os.fork()
    if pid:
        for descriptor in descriptors:
            os.close(descriptor)
        server.sendall(json.dumps(pid).encode())
        _, status = os.waitpid(pid, 0)
        server.sendall(json.dumps(os.waitstatus_to_exitcode(status)).encode())
        continue
    server.close()
    os.setsid()
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    sys.argv = ["jobledger", *request["arguments"]]
    code = 1
    try:
        jobledger.cli.main.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
"""


@cache
def _server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = {name: value for name, value in os.environ.items() if not name.startswith("JOBLEDGER_")}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None,
            env={**env, "COLUMNS": "200", "NO_COLOR": "1"},
        )
    return ours, process


def run_command(
    arguments: Sequence[str], *, directory: Path, env: Mapping[str, str], stdin: bytes, seconds: float
) -> tuple[int, bytes, bytes]:
    """Run `jobledger` with these arguments. Return exit code, standard output and standard error.

    Raises:
        TimeoutError: it was still running, and was killed.
    """
    server, _ = _server()
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin)
        given.seek(0)
        request = {"arguments": list(arguments), "directory": str(directory), "env": dict(env)}
        server.settimeout(30)
        socket.send_fds(server, [json.dumps(request).encode()], [given.fileno(), out.fileno(), err.fileno()])
        pid = int(json.loads(server.recv(100)))
        server.settimeout(seconds)
        try:
            code = int(json.loads(server.recv(100)))
        except TimeoutError:
            os.killpg(pid, signal.SIGKILL)
            server.settimeout(30)
            server.recv(100)
            raise
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()
