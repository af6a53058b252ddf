"""workers: run helper programs (LibreOffice, yt-dlp) so that hostile input can do no harm through them.

A program in the sandbox sees the system's programs, libraries and fonts, and writes to one directory. It has no
network, cannot reach other processes, and ends with whoever started it. There are two ways:

- Landlock and seccomp, in namespaces of its own where the system allows them. They work without privileges, and inside
  the job processes that are confined themselves.
- bubblewrap, where the kernel has no Landlock.

Each is tried out before its first use. If neither works the program is not run: never without a sandbox.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Final, Literal

import jobledger
from jobledger.workers.sandbox import restrictions
from jobledger.workers.sandbox.launcher import EXIT_NOT_STARTED

SandboxMethod = Literal["landlock", "bubblewrap"]
SANDBOX_ADVICE: Final = (
    "It needs Linux 5.13 or later with Landlock enabled, or bubblewrap (apt install bubblewrap) and user namespaces."
)
SYSTEM_PATHS: Final = (
    *(
        "/usr",
        "/bin",
        "/sbin",
        "/lib",
        "/lib32",
        "/lib64",
        "/libx32",
        "/var/cache/fontconfig",
        "/var/lib/libreoffice",
        "/var/spool/libreoffice",
    ),
    *("/etc/fonts", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime"),
    *("/etc/libreoffice", "/etc/mime.types", "/etc/ssl/certs", "/etc/ca-certificates", "/etc/pki/tls/certs"),
)
"""What every program may read. Nothing of users and services: not /home, /root, /proc, /run, /etc/passwd, /var."""
_PACKAGE: Final = Path(jobledger.__file__).resolve().parent
_CODE: Final = (_PACKAGE, Path(__file__).resolve().parents[1])
"""Where launchers and helper programs lie. In an editable install `jobledger/workers` is a link to a folder outside
of it."""
_LAUNCH: Final = (
    "import sys; sys.path.append(sys.argv.pop(1)); from jobledger.workers.sandbox.launcher import main; main()"
)
_PROBE_SECONDS: Final = 20


class SandboxUnavailable(Exception):
    """This system has no sandbox that works. The text is a sentence that says what is needed."""


@dataclass(frozen=True, slots=True)
class ResourceLimits:
    """What a program may use. Memory, CPU time and open files are for each of its processes."""

    cpu_seconds: int = 600
    memory_bytes: int = 4 * 1024**3
    file_bytes: int = 2 * 1024**3
    processes: int = 512
    open_files: int = 1024


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """How a program ended. `output` is what it wrote to standard output, cut off after the limit asked for."""

    exit_code: int
    output: bytes


@dataclass(frozen=True, slots=True)
class Program:
    """A program with its arguments, and what it may see besides the system: `scratch` to write to, `readable` paths."""

    command: Sequence[str]
    scratch_dir: Path
    readable_paths: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    limits: ResourceLimits = ResourceLimits()


def python_command(*arguments: str) -> list[str]:
    """Return the command for a bare interpreter, without the packages that are installed."""
    return [os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable), "-I", "-S", *arguments]


async def run_program(
    program: Program, *, proxy: Callable[[socket.socket], Awaitable[None]] | None = None, max_output: int = 0
) -> ProgramResult:
    """Run a program to its end. Cancelled, it ends with everything it has started.

    Args:
        program: What to run.
        proxy: Answers on the listening socket that is at `http://127.0.0.1:3128` in the sandbox: the only way out.
        max_output: How many bytes of its standard output to keep.

    Raises:
        SandboxUnavailable: there is no sandbox that works here.
    """
    return await _run(program, await asyncio.to_thread(_working_method), proxy, max_output)


async def _run(
    program: Program, method: SandboxMethod, proxy: Callable[[socket.socket], Awaitable[None]] | None, max_output: int
) -> ProgramResult:
    ours, theirs = socket.socketpair() if proxy else (None, None)
    answering: asyncio.Task[None] | None = None
    try:
        process = await asyncio.create_subprocess_exec(
            *_command(program, method, proxy_channel=theirs.fileno() if theirs else None),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
            pass_fds=[theirs.fileno()] if theirs else [],
        )
        try:
            if theirs:
                theirs.close()
            if ours and proxy:
                answering = asyncio.create_task(_answer(ours, proxy))
            output = await _read(process, max_output)
            code = await process.wait()
        finally:
            with suppress(ProcessLookupError):
                process.kill()  # the launcher; the kernel ends what it has started
            await process.wait()
    finally:
        if answering:
            answering.cancel()
            await asyncio.wait({answering})
        for end in (ours, theirs):
            if end:
                end.close()
    if code == EXIT_NOT_STARTED and proxy:
        raise SandboxUnavailable(f"A program with a network of its own could not be started. {SANDBOX_ADVICE}")
    return ProgramResult(code, output)


async def _answer(channel: socket.socket, proxy: Callable[[socket.socket], Awaitable[None]]) -> None:
    channel.setblocking(False)  # noqa: FBT003 - it takes no name
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(channel, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(channel)
    _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
    for descriptor in descriptors:
        with socket.socket(fileno=descriptor) as listening:
            listening.setblocking(False)  # noqa: FBT003 - it takes no name
            await proxy(listening)


async def _read(process: asyncio.subprocess.Process, most: int) -> bytes:
    kept = bytearray()
    assert process.stdout is not None  # noqa: S101 - it was asked for
    while part := await process.stdout.read(64 * 1024):
        kept += part[: most - len(kept)]
    return bytes(kept)


def _command(program: Program, method: SandboxMethod, *, proxy_channel: int | None = None) -> list[str]:
    base = Path(sys.base_prefix)
    readable = [*SYSTEM_PATHS, *map(str, _CODE), str(base), *map(str, program.readable_paths)]
    landlock = method == "landlock"
    plan = {
        "parent": os.getpid() if landlock else 0,  # bubblewrap makes it the first process of its namespace
        "namespaces": landlock,
        "landlock": landlock,
        "seccomp": restrictions.is_seccomp_supported(),
        "proxy": proxy_channel,
        "readable": readable,
        "writable": [str(program.scratch_dir)],
        "limits": asdict(program.limits),
        "directory": str(program.scratch_dir),
        "command": list(program.command),
        "environment": {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(program.scratch_dir)}
        | {"TMPDIR": str(program.scratch_dir), **program.environment},
    }
    launch = [*python_command("-c", _LAUNCH), str(_PACKAGE.parent), json.dumps(plan)]
    return launch if landlock else [*_bubblewrap(readable, program.scratch_dir), *launch]


def _bubblewrap(readable: Sequence[str], scratch: Path) -> list[str]:
    return [
        *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"),
        *("--tmpfs", "/tmp", "--proc", "/proc", "--dev", "/dev"),  # noqa: S108 - an empty one, inside
        *(word for path in readable for word in ("--ro-bind-try", path, path)),
        *("--bind", str(scratch), str(scratch), "--clearenv", "--"),
    ]


# Trying it out ----------------------------------------------------------------------------------------------------

_PROBE: Final = """
import os, socket, sys
canary, port, name, parent = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
open("written", "w").close()
def reached(action):
    try:
        action()
    except OSError:
        return False
    return True
try:
    open(canary + ".new", "w").close()
except OSError:
    pass
def read(path):
    with open(path, "rb") as file: file.read(1)
def local():
    with socket.socket(socket.AF_UNIX) as s: s.connect(name)
harm = {
    "files outside": lambda: read(canary),
    "the environment of others": lambda: read(f"/proc/{parent}/environ"),
    "the network": lambda: socket.create_connection(("127.0.0.1", port), 2),
    "local sockets": local,
    "other processes": lambda: os.kill(parent, 0) if parent != os.getpid() else read(canary),
}
print(", ".join(what for what, action in harm.items() if reached(action)) or "nothing")
"""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """A way to run programs: whether it keeps what it promises here, and if not, why."""

    method: SandboxMethod
    is_working: bool
    reason: str = ""


def _working_method() -> SandboxMethod:
    """Return the first method that works.

    Raises:
        SandboxUnavailable: there is none.
    """
    trials = probe_methods()
    for trial in trials:
        if trial.is_working:
            return trial.method
    reasons = "; ".join(f"{trial.method}: {trial.reason}" for trial in trials)
    raise SandboxUnavailable(f"Helper programs cannot be confined on this machine ({reasons}). {SANDBOX_ADVICE}")


def is_available() -> bool:
    """Return whether programs can be run here. Blocks for about 0.2 seconds the first time."""
    return probe_methods()[-1].is_working


@cache
def probe_methods() -> tuple[ProbeResult, ...]:
    """Try out the methods, up to the first that works. The result is kept for this process."""
    trials: list[ProbeResult] = []
    methods: tuple[SandboxMethod, ...] = ("landlock", "bubblewrap")
    for method in methods:
        trials.append(_probe_method(method))
        if trials[-1].is_working:
            break
    return tuple(trials)


def _probe_method(method: SandboxMethod) -> ProbeResult:
    """Run a program that attempts what it must not be able to do."""
    if method == "landlock" and restrictions.landlock_version() < 1:
        return ProbeResult(method, is_working=False, reason="the kernel does not offer it")
    if method == "landlock" and not restrictions.is_seccomp_supported():
        return ProbeResult(method, is_working=False, reason="no seccomp filter for this kind of machine")
    if method == "bubblewrap" and shutil.which("bwrap") is None:
        return ProbeResult(method, is_working=False, reason="not installed")
    try:
        with tempfile.TemporaryDirectory(prefix="jobledger-probe-", ignore_cleanup_errors=True) as directory:
            return _probe(method, Path(directory))
    except (OSError, subprocess.TimeoutExpired) as error:
        return ProbeResult(method, is_working=False, reason=str(error))


@contextmanager
def _local_server(path: Path) -> Iterator[None]:
    """Answer at a local socket, unless this process is confined itself and may not, nor may what it starts."""
    with ExitStack() as stack:
        with suppress(OSError):
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(str(path))
            listening.listen()
        yield


def _probe(method: SandboxMethod, directory: Path) -> ProbeResult:
    scratch, canary = directory / "scratch", directory / "canary"
    scratch.mkdir()
    canary.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as listening, _local_server(directory / "socket"):
        port = listening.getsockname()[1]
        arguments = (str(canary), str(port), str(directory / "socket"), str(os.getpid()))
        program = Program(python_command("-c", _PROBE, *arguments), scratch)
        done = subprocess.run(  # noqa: S603 - our own command
            _command(program, method),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={},
            timeout=_PROBE_SECONDS,
            check=False,
        )
    reached = done.stdout.decode(errors="replace").strip()
    if done.returncode != 0 or not (scratch / "written").exists():
        said = " ".join(done.stderr.decode(errors="replace").split())[-200:]
        return ProbeResult(method, is_working=False, reason=said or f"exit code {done.returncode}")
    if (directory / "canary.new").exists():
        reached += ", other directories"
    if reached != "nothing":
        return ProbeResult(method, is_working=False, reason=f"it does not keep programs from {reached}")
    return ProbeResult(method, is_working=True)
