"""Tests of the sandbox for helper programs, with each method that works on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from jobledger.workers.sandbox import restrictions
from jobledger.workers.sandbox import runner as sandbox
from jobledger.workers.sandbox.process_tree import list_children
from jobledger.workers.sandbox.runner import ProbeResult, Program, ResourceLimits, SandboxMethod, SandboxUnavailable
from tests.support.polling import DEADLINE_SECONDS, poll_until

WORKING = [
    pytest.param(
        method,
        marks=pytest.mark.skipif(not works, reason=f"{method} does not work on this machine: {command}"),
    )
    for method, command, works in (
        (
            "landlock",
            "boot Linux with the option lsm=landlock,lockdown,yama",
            restrictions.get_landlock_version() > 0 and restrictions.is_seccomp_supported(),
        ),
        (
            "bubblewrap",
            "apt-get install bubblewrap",
            shutil.which("bwrap") is not None and not sandbox._find_problem("bubblewrap"),
        ),
    )
]

LIMITS = ResourceLimits(file_bytes=1_000_000, memory_bytes=600_000_000, processes=100)
ATTEMPTS = {
    "file": "open(canary).read()",
    "directory": "os.listdir(os.path.dirname(canary))",
    "home": "os.listdir('/root') + os.listdir('/home')",
    "passwords": "open('/etc/passwd').read()",
    "environment": "open(f'/proc/{parent}/environ').read()",
    "memory": "open(f'/proc/{parent}/mem', 'rb')",
    "write to the system": "open('/usr/canary', 'w')",
    "write next to it": "os.mkdir(canary + '.directory')",
    "remove": "os.unlink(canary)",
    "rename": "os.rename(canary, 'canary')",
    "hard link": "os.link(canary, 'canary')",
    "mode": "os.chmod(canary, 0)",
    "truncate": "os.truncate(canary, 0)",
    "times": "os.utime(canary, (0, 0))",
    "TCP": "socket.create_connection(('127.0.0.1', port), 2)",
    "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('127.0.0.1', port))",
    "IPv6": "socket.create_connection(('::1', port), 2)",
    "local socket": "socket.socket(socket.AF_UNIX).connect(canary + '.socket')",
    "pair of local sockets": (
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendmsg([b'x'], [], 0, canary + '.datagrams')"
    ),
    "pair of raw local sockets": (
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_RAW)[0].sendmsg([b'x'], [], 0, canary + '.datagrams')"
    ),
    "abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0canary')",
    "signal": "os.kill(parent, 0)",
    "many processes": "[os.fork() or time.sleep(3) or os._exit(0) for _ in range(700)]",
    "large file": "open('large', 'wb').write(bytes(3_000_000))",
    "much memory": "bytearray(900_000_000)",
    "secrets of the parent": "os.environ['CANARY']",
}
_TRY_ALL = """
import json, os, socket, sys, time
canary, port, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for name, code in json.loads(sys.argv[4]).items():
    pid = os.fork()
    if pid == 0:
        try:
            exec(code)
        except (OSError, MemoryError, KeyError):
            os._exit(3)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        print(name)
print("tried")
"""


@pytest.mark.parametrize("method", WORKING)
async def test_sandboxed_program_reaches_nothing_outside(
    method: SandboxMethod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", "canary")
    monkeypatch.chdir(tmp_path)
    canary, scratch = tmp_path / "canary", tmp_path / "scratch"
    canary.write_text("canary")
    scratch.mkdir()
    before = canary.stat()
    attempts = dict(ATTEMPTS)
    if os.getuid() == 0:
        del attempts["many processes"]  # the kernel sets no limit for root
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local, datagrams:
        local.bind("canary.socket")
        local.listen()
        datagrams.bind("canary.datagrams")
        arguments = (str(canary), str(server.getsockname()[1]), str(os.getpid()), json.dumps(attempts))
        program = Program(sandbox.build_python_command("-c", _TRY_ALL, *arguments), scratch, limits=LIMITS)
        ended = await sandbox._run(program, method, None, 10_000)
    reached = ended.output.decode().split("\n")[:-1]
    assert reached.pop() == "tried"
    # With bubblewrap the parent directories exist too. They are empty and belong to the sandbox.
    assert set(reached) <= ({"directory", "home", "write next to it"} if method == "bubblewrap" else set())
    assert sorted(path.name for path in canary.parent.iterdir()) == [
        "canary",
        "canary.datagrams",
        "canary.socket",
        "scratch",
    ]
    assert canary.read_text() == "canary"
    assert (canary.stat().st_mode, canary.stat().st_mtime) == (before.st_mode, before.st_mtime)


@pytest.mark.parametrize("method", WORKING)
async def test_sandboxed_program_can_use_files_threads_and_subprocesses(method: SandboxMethod, tmp_path: Path) -> None:
    command = sandbox.build_python_command(
        "-c",
        "import os, threading; threading.Thread(target=print).start(); os.mkdir('d');"
        "open('d/a', 'w').close(); os.rename('d/a', 'b'); print(os.popen('echo done').read())",
    )
    ended = await sandbox._run(Program(command, tmp_path), method, None, 100)
    assert ended.exit_code == 0
    assert b"done" in ended.output
    assert (tmp_path / "b").exists()


@pytest.mark.parametrize("method", WORKING)
async def test_cancelled_program_ends_with_all_its_processes(method: SandboxMethod, tmp_path: Path) -> None:
    escape = "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n"
    write_beats = "  while True:\n   open('beat', 'a').write('x'); time.sleep(0.05)\n"
    running = asyncio.create_task(
        sandbox._run(
            Program(sandbox.build_python_command("-c", escape + write_beats + "time.sleep(100)"), tmp_path),
            method,
            None,
            0,
        )
    )
    await poll_until((tmp_path / "beat").exists, "the program writes")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    size = 0
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (now := (tmp_path / "beat").stat().st_size) != size:  # until no process writes
            size = now
            await asyncio.sleep(0.5)


async def test_run_program_without_a_sandbox_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = ProbeResult("landlock", is_working=False, reason="the kernel does not support Landlock")
    monkeypatch.setattr(sandbox, "probe_methods", lambda: (probe,))
    with pytest.raises(SandboxUnavailable, match=r"the kernel does not support Landlock.*apt install bubblewrap"):
        await sandbox.run_program(Program(sandbox.build_python_command("-c", "open('ran', 'w')"), tmp_path))
    assert not (tmp_path / "ran").exists()


def test_probe_detects_a_method_that_confines_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel, a container engine or a bwrap may only pretend to confine."""

    def build_unconfined(program: Program, method: SandboxMethod) -> list[str]:
        return ["/bin/sh", "-c", f'cd {program.scratch_dir} && exec "$@"', "sh", *program.command]

    monkeypatch.setattr(sandbox, "_build_command", build_unconfined)
    problem = sandbox._find_problem("landlock" if restrictions.get_landlock_version() else "bubblewrap")
    assert problem
    if restrictions.get_landlock_version() or shutil.which("bwrap"):
        assert "files outside" in problem
        assert "the network" in problem


def test_doctor_names_the_sandbox_or_the_missing_part(monkeypatch: pytest.MonkeyPatch) -> None:
    from jobledger.cli.checks.machine import check_confinement
    from jobledger.cli.settings import Settings

    monkeypatch.setattr(sandbox, "probe_methods", lambda: (ProbeResult("landlock", is_working=False, reason="no"),))
    monkeypatch.setattr(restrictions, "get_landlock_version", lambda: 0)
    for mode in ("auto", "required"):
        worker = Settings().event_worker.model_copy(update={"confinement": mode})
        jobs, programs = check_confinement(Settings().model_copy(update={"event_worker": worker}))
        assert jobs.is_ok is (mode == "auto")
        assert "Landlock enabled" in (jobs.detail if mode == "auto" else jobs.advice)
        assert "apt install bubblewrap" in programs.detail
    monkeypatch.setattr(sandbox, "probe_methods", lambda: (ProbeResult("bubblewrap", is_working=True),))
    monkeypatch.setattr(restrictions, "get_landlock_version", lambda: 7)
    jobs, programs = check_confinement(Settings())
    assert (jobs.is_ok, jobs.detail) == (True, "Landlock, version 7")
    assert (programs.is_ok, programs.detail) == (True, "bubblewrap")


_FAMILIES = """
import socket
for family in range(64):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            socket.socket(family, kind)
        except OSError:
            continue
        print(family)
        break
"""


async def test_program_with_a_proxy_can_open_only_ip_sockets(tmp_path: Path) -> None:
    async def proxy(listener: socket.socket) -> None:
        await asyncio.Event().wait()

    try:
        ended = await sandbox.run_program(
            Program(sandbox.build_python_command("-c", _FAMILIES), tmp_path), proxy=proxy, max_output=1000
        )
    except SandboxUnavailable as error:
        pytest.skip(f"{error}: apt-get install bubblewrap")
    assert ended.exit_code == 0
    assert {int(family) for family in ended.output.split()} == {socket.AF_INET, socket.AF_INET6}


_ANSWER = """
import os, sys
assert os.read(3, 100) == b"hello"
os.write(4, b"answer\\0")
bytearray(int(sys.argv[1]))
os.write(4, b"allocated\\0")
os.read(3, 1)
"""


@pytest.mark.parametrize("method", WORKING)
@pytest.mark.parametrize(("size", "is_allowed"), [(100_000_000, True), (600_000_000, False)])
async def test_open_program_exchanges_messages_within_its_memory(
    method: SandboxMethod, size: int, is_allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "_find_working_method", lambda: method)
    command = sandbox.build_python_command("-c", _ANSWER, str(size))
    children = list_children()
    program = Program(command, tmp_path, limits=ResourceLimits(memory_bytes=1, data_bytes=500_000_000))
    async with sandbox.open_program(program, max_message=1000) as (reader, writer):
        writer.write(b"hello")
        assert await reader.readuntil(b"\0") == b"answer\0"
        assert await reader.read(100) == (b"allocated\0" if is_allowed else b"")
    assert list_children() <= children


async def test_start_program_ends_while_grandchild_keeps_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "is_available", lambda: False)  # then there is no PID namespace
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.write(1, f'{os.getpid()}\\n'.encode())\n"
        "    while True: os.write(1, bytes(65536))\n"
        "time.sleep(600)"
    )
    program = Program(sandbox.build_python_command("-c", code), tmp_path, can_run_unconfined=True)
    writer = 0
    try:
        async with asyncio.timeout(DEADLINE_SECONDS), sandbox.start_program(program) as output:
            writer = int(await output.readline())
        os.kill(writer, 0)  # it still runs: nothing but the end of the block stopped waiting for it
    finally:
        if writer:
            os.kill(writer, signal.SIGKILL)
