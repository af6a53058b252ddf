"""Start a program in its sandbox. `runner.py` runs this module in a bare interpreter.

It moves to its own namespaces where the system supports that, and drops all privileges that the program does not need.
It starts the program, waits for its end, and kills all processes that the program started.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from jobledger.ledger.system import process_attributes
from jobledger.workers.sandbox import restrictions
from jobledger.workers.sandbox.process_tree import kill_children

EXIT_NOT_STARTED: Final = 125
"""Exit code if the sandbox could not be set up. Standard error contains the reason."""
PROXY_PORT: Final = 3128
_OTHER_FAMILIES: Final = [family for family in range(64) if family not in (socket.AF_INET, socket.AF_INET6)]
"""Network namespaces do not cover all address families: AF_VSOCK reaches the host of a virtual machine."""


def main() -> None:
    """Run the program described by the JSON document in the first argument, and exit with its exit code."""
    plan = json.loads(sys.argv[1])
    process_attributes.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != plan["parent"]:  # the parent ended before the call above
        os._exit(EXIT_NOT_STARTED)
    try:
        has_namespaces = plan["landlock"] and restrictions.unshare_namespaces()
        if plan["proxy"] is not None:
            if not has_namespaces:
                raise OSError("this system does not support network namespaces for programs")
            _send_proxy_socket(plan["proxy"])
        process_attributes.become_subreaper()
        program = os.fork()
        if program == 0:
            _start_program(plan, has_namespaces=has_namespaces)
    except OSError as error:
        print(f"sandbox: {error}", file=sys.stderr)
        os._exit(EXIT_NOT_STARTED)
    code = _wait_for(program)
    kill_children(math.inf)  # without a PID namespace, the descendants of the program are children of this process
    os._exit(code)


def _start_program(plan: dict[str, Any], *, has_namespaces: bool) -> None:
    """In the new process, become the first process of the PID namespace if there is one, and start the program."""
    process_attributes.set_parent_death_signal(signal.SIGKILL)
    if has_namespaces:
        # The first process of a namespace would not be killed by signals such as that of `abort`, so it is not the
        # program itself. When it ends, the kernel kills the whole namespace.
        program = os.fork()
        if program:
            os._exit(_wait_for(program))
        process_attributes.set_parent_death_signal(signal.SIGKILL)
    try:
        os.setsid()
        _set_limits(plan["limits"], has_namespaces=has_namespaces)
        if plan["landlock"]:
            restrictions.apply_landlock(
                [
                    *((path, restrictions.READ_RIGHTS) for path in plan["readable"]),
                    (plan["directory"], restrictions.WRITE_RIGHTS & ~restrictions.EXECUTE),
                    *restrictions.DEVICE_RULES,
                ]
            )
        restrictions.set_no_new_privileges()
        process_attributes.drop_capabilities()
        if restrictions.is_seccomp_supported():
            denied_calls = restrictions.OUTSIDE_ACCESS_CALLS
            if plan["proxy"] is not None:
                denied_calls = denied_calls - {"socket", "connect", "sendto"}
            self_only_calls = {"tgkill", *restrictions.LIMIT_AND_PRIORITY_CALLS}
            restrictions.apply_seccomp_filter(
                denied_calls, socket_families=_OTHER_FAMILIES, self_only_calls=self_only_calls
            )
        if plan["messages"] is not None:
            _set_message_descriptors(plan["messages"])
        os.chdir(plan["directory"])
        os.execve(plan["command"][0], plan["command"], plan["environment"])  # noqa: S606 - the command of the plan
    except OSError as error:
        print(f"sandbox: {error}", file=sys.stderr)
    os._exit(EXIT_NOT_STARTED)


def _set_limits(limits: dict[str, Any], *, has_namespaces: bool) -> None:
    processes = limits["processes"]
    if not has_namespaces:  # the limit counts all processes of the user
        processes += _count_user_tasks()
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        *_list_memory_limits(limits),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, processes),
    ):
        process_attributes.limit_resource(kind, value)


def _list_memory_limits(limits: dict[str, Any]) -> list[tuple[int, int]]:
    if limits["data_bytes"] is None:
        return [(resource.RLIMIT_AS, limits["memory_bytes"])]
    highest = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (highest, highest))  # the limit of a job process is below that
    return [(resource.RLIMIT_DATA, limits["data_bytes"])]


def _set_message_descriptors(channel: int) -> None:
    """Make the channel the descriptors 3 and 4 of the program."""
    for descriptor in (3, 4):
        os.dup2(channel, descriptor)
    if channel > 4:
        os.close(channel)


def _count_user_tasks() -> int:
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.stat().st_uid == os.getuid():
                count += len(list((process / "task").iterdir()))
    return count


def _send_proxy_socket(channel: int) -> None:
    """Open the only address of this network, and send its socket to the process outside that serves it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        up = struct.pack("16sH14x", b"lo", 1)  # IFF_UP
        fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS
    with socket.create_server(("127.0.0.1", PROXY_PORT)) as listening, socket.socket(fileno=channel) as outside:
        socket.send_fds(outside, [b"1"], [listening.fileno()])


def _wait_for(program: int) -> int:
    """Wait for the program, and reap other children. Return its exit code."""
    while True:
        ended, status = os.wait()
        if ended == program:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
