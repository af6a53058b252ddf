"""A job process has no privileges over the machine, and mounts stay read-only."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from jobledger.workers.sandbox import confinement, restrictions, runner
from tests.support.mongodb_provider import needs_local_mongod
from tests.workers.system_calls import DEFINE_CALL, SYSTEM_CALL_NUMBERS

pytestmark = needs_local_mongod

_REBOOT = {"x86_64": 169, "aarch64": 142}.get(os.uname().machine)
PRIVILEGED_CALLS = {
    "FIFO": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99))",
    "round robin": "os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))",
    "FIFO for children": "os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))",
    "FIFO by attributes": f"call({SYSTEM_CALL_NUMBERS.get('sched_setattr')}, 0, "
    "struct.pack('=IIQiIQQQ', 48, 1, 0, 0, 1, 0, 0, 0), 0)",
    "FIFO of a thread": "thread = ctypes.c_void_p(threading.get_ident()); "
    "raise_if_failed(libc.pthread_setschedparam(thread, 1, struct.pack('i', 1)))",
    "deadline": f"call({SYSTEM_CALL_NUMBERS.get('sched_setattr')}, 0, "
    "struct.pack('=IIQiIQQQ', 48, 6, 0, 0, 0, 10**7, 10**8, 10**8), 0)",
    "FIFO of a program": "run('chrt', '-f', '1', 'true')",
    "FIFO of a program with capabilities": "run('setpriv', '--reset-env', 'chrt', '-f', '1', 'true')",
    "better priority": "os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) - 1)",
    "real-time limit": "raise_limit(resource.RLIMIT_RTPRIO)",
    "limit of descriptors": "raise_limit(resource.RLIMIT_NOFILE)",
    "killed last": "os.write(os.open('/proc/self/oom_score_adj', os.O_WRONLY), b'-1000')",
    "clock": "time.clock_settime(time.CLOCK_REALTIME, time.time())",
    "reboot": f"call({_REBOOT}, 0, 0, 0, 0)",  # EINVAL for root: these are not the magic numbers
    "mount": "raise_if_failed(-libc.mount(b'none', os.fsencode(scratch), b'tmpfs', 0, None) and ctypes.get_errno())",
    "root directory": "os.chroot(scratch)",
    "name of the machine": "socket.sethostname(socket.gethostname())",
    "device": "os.mknod(scratch / 'device', 0o600 | stat.S_IFBLK, os.makedev(7, 0))",
    "raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)",
    "kernel log": "raise_if_failed(-libc.klogctl(8, None, 99) and ctypes.get_errno())",  # EINVAL for root
}
"""What root may do to the machine. A call that could do harm has invalid arguments."""
HARMLESS_CALLS = {
    "worse priority": "os.nice(1)",
    "idle": "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))",
    "program": "run('true')",
    "file": "(scratch / 'file').write_text('x'); os.chmod(scratch / 'file', 0o600)",
}
UNCONFINED_ROOT_CALLS = {
    "owner": "(scratch / 'other').touch(); os.chown(scratch / 'other', 1234, 1234)",
    "file of another user": "(scratch / 'other').chmod(0); (scratch / 'other').read_bytes()",
    "act as another user": "run('setpriv', '--reuid', '1234', '--clear-groups', 'true')",
}


def _run_confined(mode: confinement.ConfinementMode, attempts: dict[str, str], directory: Path) -> dict[str, int]:
    """Run attempts in a process that is confined like a job. Return the error number of each, 0 without an error."""
    attempt_dir = directory / "worker/attempt"
    scratch, inbox = attempt_dir / "scratch", attempt_dir / "saved"
    for path in (scratch, inbox):
        path.mkdir(parents=True)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _confine_and_run(mode, attempts, scratch, inbox, writing)
        except BaseException:  # noqa: BLE001 - the forked process must not return into pytest
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        numbers: dict[str, int] = json.loads(pipe.read())
    os.waitpid(pid, 0)
    return numbers


def _confine_and_run(
    mode: confinement.ConfinementMode, attempts: dict[str, str], scratch: Path, inbox: Path, writing: int
) -> None:
    def raise_if_failed(number: int) -> None:
        if number:
            raise OSError(number, os.strerror(number))

    def run(*command: str) -> None:
        raise_if_failed(
            errno.EPERM if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode else 0
        )

    def raise_limit(kind: int) -> None:
        try:
            resource.setrlimit(kind, (resource.getrlimit(kind)[1] + 1,) * 2)
        except ValueError:
            raise PermissionError(errno.EPERM, "limit") from None

    with suppress(ValueError):  # as an administrator may set it for a unit
        resource.setrlimit(resource.RLIMIT_RTPRIO, (99, 99))
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
    confinement.confine(
        confinement.ConfinementSettings(confinement=mode),
        scratch_dir=scratch,
        inbox_dir=inbox,
        readable_paths=[],
        shared_dirs=[],
    )
    numbers = {}
    scope = {"scratch": scratch, "raise_if_failed": raise_if_failed, "run": run, "raise_limit": raise_limit}
    exec(f"{DEFINE_CALL}\nimport socket, stat, threading, time", scope)
    for name, code in attempts.items():
        try:
            exec(code, scope)
            numbers[name] = 0
        except OSError as error:
            numbers[name] = error.errno or -1
    os.write(writing, json.dumps(numbers).encode())


@pytest.mark.skipif(_REBOOT is None, reason="needs an x86-64 or ARM64 processor: make test there")
@pytest.mark.parametrize(("mode", "landlock"), [("off", True), ("auto", True), ("auto", False)])
def test_job_process_has_no_privileges_over_the_machine(
    mode: confinement.ConfinementMode, landlock: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not landlock:
        monkeypatch.setattr(restrictions, "get_landlock_version", lambda: 0)
    denied = _run_confined(mode, PRIVILEGED_CALLS, tmp_path / "denied")
    assert {name: number for name, number in denied.items() if number not in (errno.EPERM, errno.EACCES)} == {}
    harmless = {**HARMLESS_CALLS, **(UNCONFINED_ROOT_CALLS if mode == "off" and os.getuid() == 0 else {})}
    if (mode == "off" or not landlock) and not runner._find_problem("bubblewrap"):
        harmless["bubblewrap"] = (
            "from jobledger.workers.sandbox import runner; raise_if_failed(bool(runner._find_problem('bubblewrap')))"
        )
    assert set(_run_confined(mode, harmless, tmp_path / "allowed").values()) == {0}


def test_job_process_reads_all_paths_that_helper_programs_need(tmp_path: Path) -> None:
    paths = [path for path in runner.SYSTEM_PATHS if Path(path).exists()]
    attempts = {path: f"os.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r}).close()" for path in paths}
    assert _run_confined("auto", attempts, tmp_path) == dict.fromkeys(paths, 0)


@pytest.mark.skipif(
    not restrictions.can_make_read_only(),
    reason="job processes have no mounts of their own on this machine: sudo make test",
)
def test_read_only_mounts_stay_read_only_below_a_writable_one(tmp_path: Path) -> None:
    """This includes a writable directory inside another, a writable file, and a path that does not exist."""
    for name in ("inner", "read-only", "other"):
        (tmp_path / "outer" / name).mkdir(parents=True)
    outside, file = tmp_path / "outside", tmp_path / "file"
    outside.mkdir()
    file.touch()
    outer = tmp_path / "outer"
    pid = os.fork()
    if pid == 0:
        try:
            restrictions.make_read_only([outer / "inner", tmp_path / "second"])  # the rest of `outer` is read-only now
            restrictions.make_read_only([outer / "inner", file])
            changeable = [can_change(path) for path in (outer, outer / "other", outer / "inner", file, outside)]
            os._exit(changeable == [False, False, True, False, False])
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def can_change(path: Path) -> bool:
    try:
        path.chmod(path.stat().st_mode)
    except OSError:
        return False
    return True
