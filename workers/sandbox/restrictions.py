"""workers: Landlock rules, seccomp filters and process attributes: system calls that Python has no function for.

It imports the standard library only, because the sandbox loads it in a bare interpreter. Landlock and seccomp apply to
the calling thread and to what it starts afterwards, so call these functions before the process has other threads.
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

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# linux/landlock.h. The rights of each version are added to those before it.
EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_FIRST_VERSION: Final = (1 << 13) - 1
_FOR_FILES: Final = EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
READ_RIGHTS: Final = EXECUTE | _READ_FILE | _READ_DIR
LIST_RIGHTS: Final = _READ_DIR
WRITE_DEVICE_RIGHTS: Final = _READ_FILE | _WRITE_FILE
WRITE_RIGHTS: Final = _FIRST_VERSION | _REFER | _TRUNCATE
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1 << 0, 1 << 1
LANDLOCK_SIGNALS_VERSION: Final = 6
"""From this version of Landlock on, a confined process cannot signal processes outside."""
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446

_CAPABILITY_VERSION: Final = 0x20080522
CAP_SETFCAP: Final = 1 << 31
"""The capability without which root cannot have a user namespace with itself in it, as bubblewrap makes one."""
FILE_CAPABILITIES: Final = sum(1 << number for number in (0, 1, 3, 4, 6, 7)) | CAP_SETFCAP
"""CAP_CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID and SETFCAP: what root does with files and other users."""
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP = 1, 4, 22
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38


def landlock_version() -> int:
    """Return the version of Landlock that the kernel offers, 0 if it offers none."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, 0, 1)))


def apply_landlock(rules: Iterable[tuple[str | Path, int]]) -> int:
    """Allow this process and all that it starts only the given rights below the given paths. Cannot be undone.

    It can no longer trace or read the memory and environment of processes outside, nor mount. Paths that do not exist
    are passed over. Sets `no_new_privs`.

    Returns:
        The version of Landlock.

    Raises:
        OSError: the kernel offers no Landlock.
    """
    version = landlock_version()
    if version < 1:
        raise OSError(ENOSYS, "the kernel offers no Landlock")
    handled = _FIRST_VERSION | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    attributes = struct.pack("=Q", handled)
    if version >= LANDLOCK_SIGNALS_VERSION:
        attributes = struct.pack("=QQQ", handled, 0, _SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS)
    ruleset = _checked(_libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0))
    try:
        for path, rights in rules:
            _add_rule(ruleset, path, rights & handled)
        set_no_new_privileges()
        _checked(_libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return version


def _add_rule(ruleset: int, path: str | Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # it is not there, or not for this user: a rule could not make it readable
        return
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _FOR_FILES
        if rights:
            _checked(_libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, descriptor), 0))
    finally:
        os.close(descriptor)


def set_no_new_privileges() -> None:
    """Make programs with set-user-ID bits and file capabilities run without them, from now on."""
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def hide_from_same_user() -> None:
    """Keep other processes of the same user, except root, from reading this one's memory, environment and files."""
    _checked(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def drop_capabilities(*, keep: int = 0) -> None:
    """Give up what makes root more than an ordinary user: also for programs started later, with `no_new_privs`.

    A process with CAP_PERFMON reads the environment of others even where Landlock denies it.

    Args:
        keep: The set of capabilities to keep, as far as the process has them.
    """
    header, sets = struct.pack("=Ii", _CAPABILITY_VERSION, 0), ctypes.create_string_buffer(24)
    _checked(_libc.capget(header, sets))
    # Effective, permitted and inheritable ones, 32 at a time. The ambient set can hold inheritable ones only.
    kept = struct.unpack("=6I", sets.raw)[1] & keep
    _checked(_libc.capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0)))


def set_parent_death_signal(signal_number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0))


def become_subreaper() -> None:
    """Become the parent of descendants whose own parent ends."""
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


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
        **{"sched_setaffinity": 203, "sched_setattr": 314},
    },
    "aarch64": {
        **{"socket": 198, "connect": 203, "sendto": 206, "kill": 129, "truncate": 45, "ptrace": 117, "mount": 40},
        **{"umount2": 39, "tkill": 130, "setxattr": 5, "lsetxattr": 6, "fchownat": 54, "fchmodat": 53},
        **{"utimensat": 88, "tgkill": 131, "keyctl": 219, "add_key": 217, "request_key": 218, "unshare": 97},
        **{"setns": 268, "perf_event_open": 241, "process_vm_readv": 270, "process_vm_writev": 271, "bpf": 280},
        **{"userfaultfd": 282, "removexattr": 14, "lremovexattr": 15, "open_by_handle_at": 265, "pivot_root": 41},
        **{"prlimit64": 261, "setpriority": 140, "ioprio_set": 30, "sched_setparam": 118, "sched_setscheduler": 119},
        **{"sched_setaffinity": 122, "sched_setattr": 274},
    },
}
_COMMON_SYSCALL_NUMBERS: Final = {
    **{"pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
    **{"pidfd_getfd": 438, "fchmodat2": 452, "setxattrat": 463, "removexattrat": 466, "open_tree": 428},
    **{"move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442},
    **{"open_tree_attr": 467},
}
"""System calls whose number is the same everywhere."""
_ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_X32: Final = 0x40000000
_URING: Final = {"io_uring_setup", "io_uring_enter", "io_uring_register"}
"""With it a process opens and connects sockets past the filter."""

_MOUNTS: Final = {
    *("mount", "umount2", "pivot_root", "open_tree", "open_tree_attr", "move_mount", "mount_setattr"),
    *("fsopen", "fsconfig", "fsmount", "fspick"),
}
_KERNEL: Final = {"keyctl", "add_key", "request_key", "bpf", "perf_event_open", "userfaultfd"}
"""Keys are those of all processes of the user. The others are for tools that look into the kernel."""

PRIVILEGED_CALLS: Final = _URING | _MOUNTS | _KERNEL
"""What no job process needs. io_uring is among them because of the socket families that `refuse` refuses."""
LIMIT_AND_PRIORITY_CALLS: Final = {
    *("prlimit64", "setpriority", "ioprio_set", "sched_setparam", "sched_setscheduler", "sched_setaffinity"),
    "sched_setattr",
}
"""Calls with which a process changes the limits and priorities of any other one of its user. See `only_itself`."""
OUTSIDE_ACCESS_CALLS: Final = PRIVILEGED_CALLS | {
    *("socket", "connect", "sendto", "kill", "tkill", "pidfd_send_signal", "pidfd_getfd", "ptrace"),
    *("truncate", "chmod", "fchmodat", "fchmodat2", "chown", "lchown", "fchownat"),
    *("setxattr", "lsetxattr", "setxattrat", "removexattr", "lremovexattr", "removexattrat"),
    *("utime", "utimes", "futimesat", "utimensat", "open_by_handle_at"),
    *("unshare", "setns", "process_vm_readv", "process_vm_writev"),
}
"""What Landlock leaves open: sockets, signals, and changes to files that are only named, such as their modes."""


def is_seccomp_supported() -> bool:
    """Return whether `refuse` knows this machine's system calls."""
    return platform.machine() in _SYSCALL_NUMBERS


def apply_seccomp_filter(
    denied_calls: Iterable[str], *, socket_families: Iterable[int] = (), self_only_calls: Iterable[str] = ()
) -> None:
    """Make system calls fail with EPERM in this process and all that it starts. Cannot be undone.

    Args:
        calls: Names of system calls. Those that the machine does not have are passed over.
        socket_families: Address families for which `socket` fails with EACCES.
        only_itself: Calls that a process may use for itself only: by its ID, or by the ID 0 in what it starts. They
            are `tgkill` and `LIMITS_AND_PRIORITIES`. The last ones are also refused for single threads.

    Raises:
        OSError: seccomp is not available, or the machine is not a known one.
    """
    machine = platform.machine()
    if machine not in _SYSCALL_NUMBERS:
        raise OSError(ENOSYS, f"no table of system calls for {machine}")
    numbers = _SYSCALL_NUMBERS[machine] | _COMMON_SYSCALL_NUMBERS
    program = [
        *_unless(_ARCHITECTURE, _ARCHITECTURES[machine], _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":  # the same calls have other numbers there
        program += [(_JUMP_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _ERROR | ENOSYS)]
    for name in sorted(denied_calls):
        if name in numbers:
            error = ENOSYS if name in _URING else EPERM
            program += [(_JUMP_EQUAL, 0, 1, numbers[name]), (_RETURN, 0, 0, _ERROR | error)]
    for name in sorted(self_only_calls):
        program += _if_arguments(numbers[name], _of_itself(name, os.getpid()))
    if families := sorted(socket_families):
        program += [(_JUMP_EQUAL, 0, 2 * len(families) + 1, numbers["socket"]), (_LOAD, 0, 0, _ARGUMENTS)]
        for family in families:
            program += [(_JUMP_EQUAL, 0, 1, family), (_RETURN, 0, 0, _ERROR | EACCES)]
    program.append((_RETURN, 0, 0, _ALLOW))
    set_no_new_privileges()
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    _checked(_libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0))


def _of_itself(name: str, pid: int) -> list[tuple[int, ...]]:
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


def _if_arguments(number: int, allowed: list[tuple[int, ...]]) -> list[tuple[int, int, int, int]]:
    """Refuse a call unless its first arguments have one of the values for each. They are of 32 bits."""
    body = []
    for position, values in enumerate(allowed):
        body.append((_LOAD, 0, 0, _ARGUMENTS + 8 * position))
        body += [(_JUMP_EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
        body.append((_RETURN, 0, 0, _ERROR | EPERM))
    return [(_JUMP_EQUAL, 0, len(body) + 1, number), *body, (_RETURN, 0, 0, _ALLOW)]


def _unless(place: int, value: int, result: int) -> list[tuple[int, int, int, int]]:
    return [(_LOAD, 0, 0, place), (_JUMP_EQUAL, 1, 0, value), (_RETURN, 0, 0, result)]


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)


# Namespaces -------------------------------------------------------------------------------------------------------

_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_RECURSIVE, _SLAVE = 1 << 14, 1 << 19  # linux/mount.h
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_CLONE, _FROM_DESCRIPTOR, _READ_ONLY = 1, 4, 1
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000


def make_read_only(writable: Iterable[str | Path]) -> bool:
    """Make all file systems read-only for this process and all that it starts, except below `writable`.

    Then it also cannot change modes, owners, times and attributes of files outside, which Landlock does not cover. It
    needs root, or a system that lets users have namespaces. Paths that do not exist are passed over.

    Returns:
        Whether the process could get mounts of its own; nothing has changed if not.

    Raises:
        OSError: The system does not allow to change them, or is older than Linux 5.12.
    """
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(_NEW_MOUNTS) != 0:
        if _libc.unshare(_NEW_MOUNTS | _NEW_USER) != 0:
            return False
        _keep_user(user, group)
    _checked(_libc.mount(None, b"/", None, _RECURSIVE | _SLAVE, None))
    places = sorted(os.fsencode(os.path.realpath(path)) for path in {*writable} if Path(path).exists())
    flags = _CLONE | _AT_RECURSIVE | os.O_CLOEXEC
    trees = [_checked(_libc.syscall(_OPEN_TREE, _AT_FDCWD, place, flags)) for place in places]
    attributes = struct.pack("=QQQQ", _READ_ONLY, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    _checked(_libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, size))
    for place, tree in zip(places, trees, strict=True):  # parents first; each mount is as writable as it was
        _checked(_libc.syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, place, _FROM_DESCRIPTOR))
        os.close(tree)
    return True


def can_make_read_only() -> bool:
    """Return whether `make_read_only` works on this system: a process forked for it tries."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with suppress(BaseException):
            code = 0 if make_read_only([tempfile.gettempdir()]) else 1
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _keep_user(user: int, group: int) -> None:
    """In a new user namespace, be the same user as outside."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def unshare_namespaces() -> bool:
    """Move to a user, network and IPC namespace of its own; what is started next begins a PID namespace.

    Returns:
        Whether the system allows that.
    """
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(_NEW_USER | _NEW_NET | _NEW_IPC | _NEW_PID) != 0:
        return False
    with suppress(OSError):  # without, it is the user `nobody` for itself; the files it may open stay the same
        _keep_user(user, group)
    return True
