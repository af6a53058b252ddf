"""Run helper programs (LibreOffice, yt-dlp, Chromium, the PDF renderer, Tesseract) in a sandbox.

Hostile input can therefore do no harm through them.

A program in the sandbox sees the system's programs, libraries and fonts, and writes to one directory. It has no
network, cannot access other processes, and ends with the process that started it. There are two methods:

- Landlock and seccomp, in its own namespaces where the system allows them. They need no privileges, and work in job
  processes that are confined themselves.
- bubblewrap, where the kernel has no Landlock.

Each method is probed before its first use. If neither works, the program is not run: never without a sandbox. The only
exceptions are programs with `can_run_unconfined`, which run code that a job process could run itself.
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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Final, Literal

from jobledger.workers.sandbox import restrictions
from jobledger.workers.sandbox.launcher import EXIT_NOT_STARTED

SandboxMethod = Literal["landlock", "bubblewrap"]
SANDBOX_ADVICE: Final = (
    "It needs Linux 5.13 or later with Landlock enabled, or bubblewrap (apt install bubblewrap) and user namespaces."
)
SYSTEM_PATHS: Final = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"),
    *("/var/cache/fontconfig", "/var/lib/libreoffice", "/var/spool/libreoffice"),
    *("/etc/fonts", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime"),
    *("/etc/libreoffice", "/etc/mime.types", "/etc/ssl/certs", "/etc/ca-certificates", "/etc/pki/tls/certs"),
)
"""Readable by every program. Nothing of users and services: not /home, /root, /proc, /run, /etc/passwd, /var."""
_PACKAGE: Final = Path(__file__).parents[2].resolve()
_CODE_PATHS: Final = (_PACKAGE, *((_PACKAGE / name).resolve() for name in ("ledger", "workers")))
"""Directories of launchers and helper programs. In an editable install, the second and third are elsewhere."""
_LAUNCH_CODE: Final = """
import importlib.util, sys
path = sys.argv.pop(1)
spec = importlib.util.spec_from_file_location("jobledger", path + "/__init__.py", submodule_search_locations=[path])
sys.modules["jobledger"] = importlib.util.module_from_spec(spec)
from jobledger.workers.sandbox.launcher import main
main()
"""
"""Load the package from its directory. A confined job process cannot list the parent of an editable install."""
_PROBE_SECONDS: Final = 20
_END_SECONDS: Final = 1
"""How long a program that has closed its output may take to end."""


class SandboxUnavailable(Exception):
    """No sandbox method works on this system. The text states what is needed."""


@dataclass(frozen=True, slots=True)
class ResourceLimits:
    """Resource limits of a program. Memory, CPU time and open files are limited for each of its processes.

    Attributes:
        memory_bytes: Limit of the address space.
        data_bytes: If set, it replaces `memory_bytes`, and limits only the writable private memory. For programs that
            reserve far more address space than they use.
    """

    cpu_seconds: int = 600
    memory_bytes: int = 4 * 1024**3
    data_bytes: int | None = None
    file_bytes: int = 2 * 1024**3
    processes: int = 512
    open_files: int = 1024


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """How a program ended. `output` is its standard output, truncated to `max_output`."""

    exit_code: int
    output: bytes


@dataclass(frozen=True, slots=True)
class Program:
    """A program with its arguments, and what it may access besides the system.

    Attributes:
        command: The program with its arguments.
        scratch_dir: The only writable directory, and the working directory.
        readable_paths: Readable files and directories.
        environment: Additional environment variables.
        limits: Resource limits.
        can_run_unconfined: Without a sandbox method, run it with the rights of this process and resource limits.
    """

    command: Sequence[str]
    scratch_dir: Path
    readable_paths: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    limits: ResourceLimits = ResourceLimits()
    can_run_unconfined: bool = False


def build_python_command(*arguments: str) -> list[str]:
    """Return the command for a bare interpreter, without installed packages."""
    return [os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable), "-I", "-S", *arguments]


async def run_program(
    program: Program, *, proxy: Callable[[socket.socket], Awaitable[None]] | None = None, max_output: int = 0
) -> ProgramResult:
    """Run a program to its end. If cancelled, kill it with all its descendants.

    Args:
        proxy: Serves the listening socket that is at `http://127.0.0.1:3128` in the sandbox: the only way out.
        max_output: Number of bytes of standard output to keep.

    Raises:
        SandboxUnavailable: No sandbox method works on this system.
    """
    return await _run(program, await asyncio.to_thread(_find_working_method), proxy, max_output)


@asynccontextmanager
async def start_program(program: Program) -> AsyncIterator[asyncio.StreamReader]:
    """Start a program and yield its standard output. At the end of the block, kill it with all its descendants.

    Raises:
        SandboxUnavailable: No sandbox method works on this system, and the program cannot run unconfined.
    """
    method: SandboxMethod | None = None
    if not program.can_run_unconfined or await asyncio.to_thread(is_available):
        method = await asyncio.to_thread(_find_working_method)
    async with _start(_build_command(program, method)) as process:
        assert process.stdout is not None  # noqa: S101 - stdout=PIPE
        try:
            yield process.stdout
        finally:
            if process.stdout.at_eof():  # `kill` would take the exit code of an ended process from asyncio
                with suppress(TimeoutError):
                    async with asyncio.timeout(_END_SECONDS):
                        await process.wait()
            with suppress(ProcessLookupError):
                process.kill()
            await _discard_output(process.stdout)
            # Without a PID namespace, a descendant may keep the pipe open, and asyncio would wait for that.
            process._transport.close()  # type: ignore[attr-defined]  # only the transport can close a pipe whose writer lives


async def _discard_output(output: asyncio.StreamReader) -> None:
    """Read the rest of the output for a bounded time, so that asyncio sees the end of the process."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_END_SECONDS):
            while await output.read(64 * 1024):
                pass


@asynccontextmanager
async def _start(
    command: Sequence[str], channel: socket.socket | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start the launcher. It inherits `channel`, which is closed here."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={},
        pass_fds=[channel.fileno()] if channel else [],
    )
    if channel:
        channel.close()
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()  # kills the launcher; the kernel kills what it has started
        await process.wait()


async def _run(
    program: Program, method: SandboxMethod, proxy: Callable[[socket.socket], Awaitable[None]] | None, max_output: int
) -> ProgramResult:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = _build_command(program, method, proxy_channel=theirs.fileno() if proxy else None)
        proxy_task = None
        try:
            async with _start(command, theirs if proxy else None) as process:
                proxy_task = asyncio.create_task(_serve_proxy(ours, proxy)) if proxy else None
                output = await _read_output(process, max_output)
                code = await process.wait()
        finally:
            if proxy_task:
                proxy_task.cancel()
                await asyncio.wait({proxy_task})
    if code == EXIT_NOT_STARTED and proxy:
        raise SandboxUnavailable(f"A program could not be started with its own network. {SANDBOX_ADVICE}")
    return ProgramResult(code, output)


async def _serve_proxy(channel: socket.socket, proxy: Callable[[socket.socket], Awaitable[None]]) -> None:
    channel.setblocking(False)  # noqa: FBT003 - a positional-only argument
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
            listening.setblocking(False)  # noqa: FBT003 - a positional-only argument
            await proxy(listening)


async def _read_output(process: asyncio.subprocess.Process, max_bytes: int) -> bytes:
    output = bytearray()
    assert process.stdout is not None  # noqa: S101 - stdout=PIPE
    while chunk := await process.stdout.read(64 * 1024):
        output += chunk[: max_bytes - len(output)]
    return bytes(output)


@asynccontextmanager
async def open_program(
    program: Program, *, max_message: int
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Run a program that reads messages from its descriptor 3 and writes messages to its descriptor 4.

    At the end of the context, the program is killed with all its descendants.

    Args:
        program: The program. It has no network, and its standard output is discarded.
        max_message: Number of bytes that the reader buffers for one message.

    Yields:
        What the program writes, and the writer for what it reads.

    Raises:
        SandboxUnavailable: No sandbox method works on this system.
    """
    method = await asyncio.to_thread(_find_working_method)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = await asyncio.create_subprocess_exec(
            *_build_command(program, method, message_channel=theirs.fileno()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        try:
            reader, writer = await asyncio.open_connection(sock=ours, limit=max_message)
            try:
                yield reader, writer
            finally:
                writer.transport.abort()
        finally:
            with suppress(ProcessLookupError):
                process.kill()  # kills the launcher; the kernel kills what it has started
            await process.wait()


def _build_command(
    program: Program,
    method: SandboxMethod | None,
    *,
    proxy_channel: int | None = None,
    message_channel: int | None = None,
) -> list[str]:
    """Return the command that starts the program. Without a `method`, only resource limits and seccomp apply."""
    base = Path(sys.base_prefix)
    readable = [*SYSTEM_PATHS, *map(str, _CODE_PATHS), str(base), *map(str, program.readable_paths)]
    landlock = method == "landlock"
    plan = {
        "parent": 0
        if method == "bubblewrap"
        else os.getpid(),  # in bubblewrap, it is the first process of its namespace
        "landlock": landlock,
        "proxy": proxy_channel,
        "messages": message_channel,
        "readable": readable,
        "limits": asdict(program.limits),
        "directory": str(program.scratch_dir),
        "command": list(program.command),
        "environment": {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(program.scratch_dir)}
        | {"TMPDIR": str(program.scratch_dir), **program.environment},
    }
    launch = [*build_python_command("-c", _LAUNCH_CODE), str(_PACKAGE), json.dumps(plan)]
    return launch if method != "bubblewrap" else [*_build_bubblewrap_command(readable, program.scratch_dir), *launch]


def _build_bubblewrap_command(readable: Sequence[str], scratch: Path) -> list[str]:
    return [
        *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"),
        *("--tmpfs", "/tmp", "--proc", "/proc", "--dev", "/dev"),  # noqa: S108 - an empty tmpfs in the sandbox
        *(word for path in readable for word in ("--ro-bind-try", path, path)),
        *("--bind", str(scratch), str(scratch), "--clearenv", "--"),
    ]


# Probing ------------------------------------------------------------------------------------------------------------

_PROBE_CODE: Final = """
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
    """Whether a sandbox method works on this system, and if not, why."""

    method: SandboxMethod
    is_working: bool
    reason: str = ""


def _find_working_method() -> SandboxMethod:
    """Return the first method that works.

    Raises:
        SandboxUnavailable: No method works.
    """
    results = probe_methods()
    if results[-1].is_working:
        return results[-1].method
    reasons = "; ".join(f"{result.method}: {result.reason}" for result in results)
    raise SandboxUnavailable(f"Helper programs cannot be confined on this machine ({reasons}). {SANDBOX_ADVICE}")


def is_available() -> bool:
    """Return whether programs can be run. Blocks for about 0.2 seconds on the first call."""
    return probe_methods()[-1].is_working


@cache
def probe_methods() -> tuple[ProbeResult, ...]:
    """Probe the methods up to the first that works. The result is cached for this process."""
    results: list[ProbeResult] = []
    methods: tuple[SandboxMethod, ...] = ("landlock", "bubblewrap")
    for method in methods:
        problem = _find_problem(method)
        results.append(ProbeResult(method, is_working=not problem, reason=problem))
        if not problem:
            break
    return tuple(results)


def _find_problem(method: SandboxMethod) -> str:
    """Return why a method does not work; an empty text if it does."""
    if method == "landlock" and restrictions.get_landlock_version() < 1:
        return "the kernel does not support Landlock"
    if method == "landlock" and not restrictions.is_seccomp_supported():
        return "no seccomp filter for this architecture"
    if method == "bubblewrap" and shutil.which("bwrap") is None:
        return "not installed"
    try:
        with tempfile.TemporaryDirectory(prefix="jobledger-probe-", ignore_cleanup_errors=True) as directory:
            return _probe(method, Path(directory))
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error) or type(error).__name__


@contextmanager
def _local_server(path: Path) -> Iterator[None]:
    """Listen at a local socket, unless this process is confined itself and cannot."""
    with ExitStack() as stack:
        with suppress(OSError):
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(str(path))
            listening.listen()
        yield


def _probe(method: SandboxMethod, directory: Path) -> str:
    """Run a program that attempts what the sandbox must prevent. Return what it could do; an empty text if nothing."""
    scratch, canary = directory / "scratch", directory / "canary"
    scratch.mkdir()
    canary.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as listening, _local_server(directory / "socket"):
        port = listening.getsockname()[1]
        arguments = (str(canary), str(port), str(directory / "socket"), str(os.getpid()))
        program = Program(build_python_command("-c", _PROBE_CODE, *arguments), scratch)
        done = subprocess.run(  # noqa: S603 - our own command
            _build_command(program, method),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={},
            timeout=_PROBE_SECONDS,
            check=False,
        )
    reached = done.stdout.decode(errors="replace").strip()
    if done.returncode != 0 or not (scratch / "written").exists():
        error_text = " ".join(done.stderr.decode(errors="replace").split())[-200:]
        return error_text or f"exit code {done.returncode}"
    if (directory / "canary.new").exists():
        reached += ", other directories"
    return "" if reached == "nothing" else f"programs can access {reached}"
