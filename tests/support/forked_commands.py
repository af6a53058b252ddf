"""Run short commands in processes forked from one with loaded modules, which saves a second per command.

Each command has its own process, directory, environment, input, output and exit code. Commands that keep running
(`Installation.start`), and those whose start is under test, are started normally.
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
import jobledger.cli.administration.api_key_admin, jobledger.cli.administration.mongo_roles
import jobledger.cli.administration.view_maintenance, jobledger.cli.checks.database, jobledger.cli.checks.machine
import jobledger.cli.composition, jobledger.cli.runtime

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


@cache
def _start_server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    client, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = {name: value for name, value in os.environ.items() if not name.startswith("JOBLEDGER_")}
    with server:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(server.fileno())],
            pass_fds=[server.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None,
            env={**env, "COLUMNS": "200", "NO_COLOR": "1"},
        )
    return client, process


def run_command(
    arguments: Sequence[str], *, directory: Path, env: Mapping[str, str], stdin: bytes, seconds: float
) -> tuple[int, bytes, bytes]:
    """Run `jobledger` with these arguments. Return exit code, standard output and standard error.

    Raises:
        TimeoutError: The command did not finish within `seconds` and was killed.
    """
    server, _ = _start_server()
    with tempfile.TemporaryFile() as stdin_file, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        stdin_file.write(stdin)
        stdin_file.seek(0)
        request = {"arguments": list(arguments), "directory": str(directory), "env": dict(env)}
        server.settimeout(60)
        socket.send_fds(server, [json.dumps(request).encode()], [stdin_file.fileno(), out.fileno(), err.fileno()])
        pid = int(json.loads(server.recv(100)))
        server.settimeout(seconds)
        try:
            code = int(json.loads(server.recv(100)))
        except TimeoutError:
            os.killpg(pid, signal.SIGKILL)
            server.settimeout(60)
            server.recv(100)
            raise
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()
