"""Landlock rules, seccomp filters and namespaces: system calls for which Python has no function.

This module needs only the standard library, because the sandbox loads it in a bare interpreter. Landlock and seccomp
apply to the calling thread and to what it starts afterwards, so call these functions before the process has other
threads.
"""

from __future__ import annotations

import ctypes
import os
import platform
import stat
import struct
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from errno import EACCES, ENOSYS, EPERM
from pathlib import Path
from typing import Final

from jobledger.ledger.system.process_attributes import check_system_call, libc

# linux/landlock.h. The rights of each version are added to those before it.
EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_VERSION_1_RIGHTS: Final = (1 << 13) - 1
_FILE_RIGHTS: Final = EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
READ_RIGHTS: Final = EXECUTE | _READ_FILE | _READ_DIR
LIST_RIGHTS: Final = _READ_DIR
WRITE_RIGHTS: Final = _VERSION_1_RIGHTS | _REFER | _TRUNCATE
DEVICE_RULES: Final = (
    ("/dev/null", _READ_FILE | _WRITE_FILE),
    *((device, READ_RIGHTS) for device in ("/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")),
)
"""Rules for the devices that every program may use."""
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1 << 0, 1 << 1
LANDLOCK_SIGNALS_VERSION: Final = 6
"""Since this version of Landlock, a confined process cannot signal processes outside."""
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38


def get_landlock_version() -> int:
    """Return the kernel's version of Landlock; 0 if it has none."""
    return max(0, int(libc.syscall(_CREATE_RULESET, None, 0, 1)))


def apply_landlock(rules: Iterable[tuple[str | Path, int]]) -> None:
    """Allow this process and its descendants only the given rights below the given paths. Irreversible.

    The process can no longer mount, or trace or read the memory and environment of processes outside. Paths that do not
    exist are skipped. Sets `no_new_privs`.

    Raises:
        OSError: The kernel does not support Landlock.
    """
    version = get_landlock_version()
    if version < 1:
        raise OSError(ENOSYS, "the kernel does not support Landlock")
    handled = _VERSION_1_RIGHTS | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    attributes = struct.pack("=Q", handled)
    if version >= LANDLOCK_SIGNALS_VERSION:
        attributes = struct.pack("=QQQ", handled, 0, _SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS)
    ruleset = check_system_call(libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0))
    try:
        for path, rights in rules:
            _add_rule(ruleset, path, rights & handled)
        set_no_new_privileges()
        check_system_call(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _add_rule(ruleset: int, path: str | Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # missing or inaccessible: a rule could not make it readable
        return
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _FILE_RIGHTS
        if rights:
            check_system_call(libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, descriptor), 0))
    finally:
        os.close(descriptor)


def set_no_new_privileges() -> None:
    """Disable set-user-ID bits and file capabilities of programs that this process starts after the call."""
    check_system_call(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def hide_from_same_user() -> None:
    """Prevent other processes of the same user, except root, from reading this one's memory, environment and files."""
    check_system_call(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


# seccomp ----------------------------------------------------------------------------------------------------------

_SYSCALL_NUMBERS: Final[dict[str, dict[str, int]]] = {
    "x86_64": {
        **{"socket": 41, "connect": 42, "sendto": 44, "kill": 62, "truncate": 76, "chmod": 90, "chown": 92},
        **{"lchown": 94, "ptrace": 101, "mount": 165, "umount2": 166, "tkill": 200, "setxattr": 188, "lsetxattr": 189},
        **{"utime": 132, "utimes": 235, "futimesat": 261, "fchownat": 260, "fchmodat": 268, "utimensat": 280},
        **{"tgkill": 234, "keyctl": 250, "add_key": 248, "request_key": 249, "unshare": 272, "setns": 308},
        **{"perf_event_open": 298, "process_vm_readv": 310, "process_vm_writev": 311, "bpf": 321, "userfaultfd": 323},
        **{"removexattr": 197, "lremovexattr": 198, "open_by_handle_at": 304, "pivot_root": 155, "prlimit64": 302},
        **{"setpriority": 141, "ioprio_set": 251, "sched_setparam": 142, "sched_setscheduler": 144},
        **{"sched_setaffinity": 203, "sched_setattr": 314, "socketpair": 53},
    },
    "aarch64": {
        **{"socket": 198, "connect": 203, "sendto": 206, "kill": 129, "truncate": 45, "ptrace": 117, "mount": 40},
        **{"umount2": 39, "tkill": 130, "setxattr": 5, "lsetxattr": 6, "fchownat": 54, "fchmodat": 53},
        **{"utimensat": 88, "tgkill": 131, "keyctl": 219, "add_key": 217, "request_key": 218, "unshare": 97},
        **{"setns": 268, "perf_event_open": 241, "process_vm_readv": 270, "process_vm_writev": 271, "bpf": 280},
        **{"userfaultfd": 282, "removexattr": 14, "lremovexattr": 15, "open_by_handle_at": 265, "pivot_root": 41},
        **{"prlimit64": 261, "setpriority": 140, "ioprio_set": 30, "sched_setparam": 118, "sched_setscheduler": 119},
        **{"sched_setaffinity": 122, "sched_setattr": 274, "socketpair": 199},
    },
}
_COMMON_SYSCALL_NUMBERS: Final = {
    **{"pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
    **{"pidfd_getfd": 438, "fchmodat2": 452, "setxattrat": 463, "removexattrat": 466, "open_tree": 428},
    **{"move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442},
    **{"open_tree_attr": 467},
}
"""System calls with the same number on all machines."""
_ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _AND, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_SOCKET_TYPE_MASK, _DATAGRAM, _RAW = 0xF, 2, 3  # linux/net.h
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_X32: Final = 0x40000000
_URING: Final = {"io_uring_setup", "io_uring_enter", "io_uring_register"}
"""With io_uring, a process opens and connects sockets without the filter seeing it."""

_MOUNTS: Final = {
    *("mount", "umount2", "pivot_root", "open_tree", "open_tree_attr", "move_mount", "mount_setattr"),
    *("fsopen", "fsconfig", "fsmount", "fspick"),
}
_KERNEL: Final = {"keyctl", "add_key", "request_key", "bpf", "perf_event_open", "userfaultfd"}
"""Keys are shared by all processes of the user. The other calls are for tools that inspect the kernel."""

PRIVILEGED_CALLS: Final = _URING | _MOUNTS | _KERNEL
"""Calls that no job process needs. They include io_uring, which bypasses the filter for socket families."""
LIMIT_AND_PRIORITY_CALLS: Final = {
    *("prlimit64", "setpriority", "ioprio_set", "sched_setparam", "sched_setscheduler", "sched_setaffinity"),
    "sched_setattr",
}
"""Calls that change limits and priorities of any process of the user. See `self_only_calls`."""
OUTSIDE_ACCESS_CALLS: Final = PRIVILEGED_CALLS | {
    *("socket", "connect", "sendto", "kill", "tkill", "pidfd_send_signal", "pidfd_getfd", "ptrace"),
    *("truncate", "chmod", "fchmodat", "fchmodat2", "chown", "lchown", "fchownat"),
    *("setxattr", "lsetxattr", "setxattrat", "removexattr", "lremovexattr", "removexattrat"),
    *("utime", "utimes", "futimesat", "utimensat", "open_by_handle_at"),
    *("unshare", "setns", "process_vm_readv", "process_vm_writev"),
}
"""Calls that Landlock does not cover: sockets, signals, and changes to named files, such as their modes."""


def is_seccomp_supported() -> bool:
    """Return whether `apply_seccomp_filter` supports this machine."""
    return platform.machine() in _SYSCALL_NUMBERS


def apply_seccomp_filter(
    denied_calls: Iterable[str], *, socket_families: Iterable[int] = (), self_only_calls: Iterable[str] = ()
) -> None:
    """Let system calls fail with EPERM in this process and its descendants. Irreversible.

    Args:
        denied_calls: Names of system calls. Those that the machine does not have are skipped.
        socket_families: Address families for which `socket` fails with EACCES. If there are any, `socketpair` fails for
            datagrams.
        self_only_calls: Calls that a process may use only for itself: by its ID, or by the ID 0 in descendants.
            Supported are `tgkill` and `LIMIT_AND_PRIORITY_CALLS`. The latter are also denied for single threads.

    Raises:
        OSError: seccomp is not available, or the machine is not supported.
    """
    machine = platform.machine()
    if machine not in _SYSCALL_NUMBERS:
        raise OSError(ENOSYS, f"system calls of {machine} are not known")
    numbers = _SYSCALL_NUMBERS[machine] | _COMMON_SYSCALL_NUMBERS
    program = [
        *_return_unless(_ARCHITECTURE, _ARCHITECTURES[machine], _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":  # x32 has other numbers for the same calls
        program += [(_JUMP_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _ERROR | ENOSYS)]
    for name in sorted(denied_calls):
        if name in numbers:
            error = ENOSYS if name in _URING else EPERM
            program += [(_JUMP_EQUAL, 0, 1, numbers[name]), (_RETURN, 0, 0, _ERROR | error)]
    for name in sorted(self_only_calls):
        program += _deny_unless_arguments(numbers[name], _list_own_argument_values(name, os.getpid()))
    if families := sorted(socket_families):
        program += [(_JUMP_EQUAL, 0, 2 * len(families) + 1, numbers["socket"]), (_LOAD, 0, 0, _ARGUMENTS)]
        for family in families:
            program += [(_JUMP_EQUAL, 0, 1, family), (_RETURN, 0, 0, _ERROR | EACCES)]
        # With `sendmsg`, one of a pair of datagram sockets reaches local sockets of others.
        program += [(_LOAD, 0, 0, _NUMBER), (_JUMP_EQUAL, 0, 6, numbers["socketpair"])]
        program += [(_LOAD, 0, 0, _ARGUMENTS + 8), (_AND, 0, 0, _SOCKET_TYPE_MASK)]
        for kind in (_DATAGRAM, _RAW):  # Linux makes a pair of raw sockets a pair of datagram sockets
            program += [(_JUMP_EQUAL, 0, 1, kind), (_RETURN, 0, 0, _ERROR | EACCES)]
    program.append((_RETURN, 0, 0, _ALLOW))
    set_no_new_privileges()
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    check_system_call(libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0))


def _list_own_argument_values(name: str, pid: int) -> list[tuple[int, ...]]:
    """Return the values of each of a call's first arguments that mean the process itself."""
    match name:
        case "tgkill":
            return [(pid,)]
        case "setpriority":
            return [(0,), (0, pid)]  # PRIO_PROCESS
        case "ioprio_set":
            return [(1,), (0, pid)]  # IOPRIO_WHO_PROCESS
        case _:
            return [(0, pid)]


def _deny_unless_arguments(number: int, allowed: list[tuple[int, ...]]) -> list[tuple[int, int, int, int]]:
    """Deny a call unless each of its first arguments, of 32 bits, has one of the given values."""
    body = []
    for position, values in enumerate(allowed):
        body.append((_LOAD, 0, 0, _ARGUMENTS + 8 * position))
        body += [(_JUMP_EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
        body.append((_RETURN, 0, 0, _ERROR | EPERM))
    return [(_JUMP_EQUAL, 0, len(body) + 1, number), *body, (_RETURN, 0, 0, _ALLOW)]


def _return_unless(place: int, value: int, result: int) -> list[tuple[int, int, int, int]]:
    return [(_LOAD, 0, 0, place), (_JUMP_EQUAL, 1, 0, value), (_RETURN, 0, 0, result)]


# Namespaces -------------------------------------------------------------------------------------------------------

_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_RECURSIVE, _SLAVE = 1 << 14, 1 << 19  # linux/mount.h
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_CLONE, _FROM_DESCRIPTOR, _READ_ONLY = 1, 4, 1
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000


def make_read_only(writable: Iterable[str | Path]) -> bool:
    """Make all file systems read-only for this process and its descendants, except below `writable`.

    The process also cannot change modes, owners, times and attributes of files outside, which Landlock does not cover.
    This requires root, or a system that allows user namespaces. Paths that do not exist are skipped.

    Returns:
        Whether the process got its own mounts. If not, nothing has changed.

    Raises:
        OSError: The system does not allow changing mounts, or is older than Linux 5.12.
    """
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_MOUNTS) != 0:
        if libc.unshare(_NEW_MOUNTS | _NEW_USER) != 0:
            return False
        _keep_user(user, group)
    check_system_call(libc.mount(None, b"/", None, _RECURSIVE | _SLAVE, None))
    places = sorted(os.fsencode(os.path.realpath(path)) for path in {*writable} if Path(path).exists())
    flags = _CLONE | _AT_RECURSIVE | os.O_CLOEXEC
    trees = [check_system_call(libc.syscall(_OPEN_TREE, _AT_FDCWD, place, flags)) for place in places]
    attributes = struct.pack("=QQQQ", _READ_ONLY, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    check_system_call(libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, size))
    for place, tree in zip(places, trees, strict=True):  # parents first; each mount keeps its own flags
        check_system_call(libc.syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, place, _FROM_DESCRIPTOR))
        os.close(tree)
    return True


def can_make_read_only() -> bool:
    """Return whether `make_read_only` works on this system. Tries it in a forked process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with suppress(BaseException):
            code = 0 if make_read_only([tempfile.gettempdir()]) else 1
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _keep_user(user: int, group: int) -> None:
    """In a new user namespace, stay the same user as outside."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def unshare_namespaces() -> bool:
    """Move to new user, network and IPC namespaces. The next child starts a new PID namespace.

    Returns:
        Whether the system allows that.
    """
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_USER | _NEW_NET | _NEW_IPC | _NEW_PID) != 0:
        return False
    with suppress(OSError):  # without it, the process is user `nobody`, with the same access to files
        _keep_user(user, group)
    return True
