"""workers: start a program inside its sandbox. `sandbox.py` runs this in a bare interpreter; see there.

It moves to namespaces of its own where the system allows that, gives up all rights the program does not need, starts
the program, and ends with everything the program has started.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from jobledger.workers.sandbox import restrictions

EXIT_NOT_STARTED: Final = 125
"""Exit code if the sandbox could not be set up. The reason is on standard error."""
PROXY_PORT: Final = 3128
_OTHER_FAMILIES: Final = [family for family in range(64) if family not in (socket.AF_INET, socket.AF_INET6)]
"""Network namespaces do not cover all of them: AF_VSOCK reaches the host of a virtual machine."""
_READ_ONLY_DEVICES: Final = ("/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def main() -> None:
    """Run what the JSON document in the first argument describes, and exit with the program's exit code."""
    plan = json.loads(sys.argv[1])
    restrictions.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != plan["parent"]:  # it ended before the line above
        os._exit(EXIT_NOT_STARTED)
    try:
        separate = plan["namespaces"] and restrictions.unshare_namespaces()
        if plan["proxy"] is not None:
            if not separate:
                raise OSError("this system does not let a program have a network of its own")
            _send_proxy_socket(plan["proxy"])
        restrictions.become_subreaper()
        program = os.fork()
        if program == 0:
            _start(plan, separate=separate)
    except OSError as error:
        print(f"sandbox: {error}", file=sys.stderr)
        os._exit(EXIT_NOT_STARTED)
    code = _wait_for(program)
    _kill_descendants()
    os._exit(code)


def _start(plan: dict[str, Any], *, separate: bool) -> None:
    """In the new process: become the first of its PID namespace if there is one, and the program."""
    restrictions.set_parent_death_signal(signal.SIGKILL)
    if separate:
        # As the first process the program would not end by signals such as that of `abort`. When this one ends, the
        # kernel ends the whole namespace.
        program = os.fork()
        if program:
            os._exit(_wait_for(program))
        restrictions.set_parent_death_signal(signal.SIGKILL)
    try:
        os.setsid()
        _limit(plan["limits"], separate=separate)
        if plan["landlock"]:
            restrictions.apply_landlock(
                [(path, restrictions.READ_RIGHTS) for path in plan["readable"]]
                + [(path, restrictions.WRITE_RIGHTS & ~restrictions.EXECUTE) for path in plan["writable"]]
                + [
                    ("/dev/null", restrictions.WRITE_DEVICE_RIGHTS),
                    *((path, restrictions.READ_RIGHTS) for path in _READ_ONLY_DEVICES),
                ]
            )
        restrictions.set_no_new_privileges()
        restrictions.drop_capabilities()
        if plan["seccomp"]:
            refused = restrictions.OUTSIDE_ACCESS_CALLS
            if plan["proxy"] is not None:
                refused = refused - {"socket", "connect", "sendto"}
            only_itself = {"tgkill", *restrictions.LIMIT_AND_PRIORITY_CALLS}
            restrictions.apply_seccomp_filter(refused, socket_families=_OTHER_FAMILIES, self_only_calls=only_itself)
        os.chdir(plan["directory"])
        os.execve(plan["command"][0], plan["command"], plan["environment"])  # noqa: S606 - as planned
    except OSError as error:
        print(f"sandbox: {error}", file=sys.stderr)
    os._exit(EXIT_NOT_STARTED)


def _limit(limits: dict[str, int], *, separate: bool) -> None:
    processes = limits["processes"]
    if not separate:  # then the limit counts everything this user runs
        processes += _tasks_of_user()
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, processes),
    ):
        _, most = resource.getrlimit(kind)
        lower = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (lower, lower))


def _tasks_of_user() -> int:
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.stat().st_uid == os.getuid():
                count += len(list((process / "task").iterdir()))
    return count


def _send_proxy_socket(channel: int) -> None:
    """Open the only address this network has, and hand it to the process outside that answers there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        up = struct.pack("16sH14x", b"lo", 1)  # IFF_UP
        fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS
    with socket.create_server(("127.0.0.1", PROXY_PORT)) as listening, socket.socket(fileno=channel) as outside:
        socket.send_fds(outside, [b"1"], [listening.fileno()])


def _wait_for(program: int) -> int:
    """Wait for the program, and take leave of what else ends meanwhile."""
    while True:
        ended, status = os.wait()
        if ended == program:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _kill_descendants() -> None:
    """Without a PID namespace, what the program has started is ours by now: kill it until none is left."""
    while True:
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(int(child), signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return
