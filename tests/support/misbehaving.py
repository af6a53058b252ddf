"""tests: job types that misbehave as their parameters say: `misbehaving` in a job process, `misbehaving-inline` inline.

Both run the same functions. `{"do": "exit"}` runs the function `exit_`, and so on.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import dataclasses
import enum
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from jobledger.ledger.domain.limits import FILE_BYTES
from jobledger.workers.child import main as child
from jobledger.workers.child.messages import HEADER, Saved
from jobledger.workers.processor import Isolation, Job, ProcessorError, Results, SavedFile

ACTIONS: dict[str, Callable[[Job], Awaitable[Any]]] = {}


def action(function: Callable[[Job], Awaitable[Any]]) -> Callable[[Job], Awaitable[Any]]:
    ACTIONS[function.__name__.strip("_").replace("_", " ")] = function
    return function


class Parameters(BaseModel):
    model_config = ConfigDict(extra="allow")

    do: str = "nothing"
    file: Path | None = None


class Anything(BaseModel):
    model_config = ConfigDict(extra="allow")


class InProcess:
    job_type: ClassVar[str] = "misbehaving"
    isolation: ClassVar[Isolation] = "process"
    preload: ClassVar[Sequence[str]] = ()
    Parameters: ClassVar[type[BaseModel]] = Parameters
    Settings: ClassVar[type[BaseModel]] = Anything

    def __init__(self, settings: Any) -> None:
        pass

    async def run(self, job: Job) -> Results:
        result: Results = await ACTIONS[job.parameters.do](job)
        return result


class Inline(InProcess):
    job_type: ClassVar[str] = "misbehaving-inline"
    isolation: ClassVar[Isolation] = "inline"


def note(job: Job, text: object) -> None:
    """Write the file that the job's parameters name, at once as a whole."""
    new = job.parameters.file.with_suffix(".new")
    new.write_text(str(text))
    new.rename(job.parameters.file)


# Raising ----------------------------------------------------------------------------------------------------------


class OfItsOwn(BaseException):
    pass


class Speechless(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)

    __repr__ = __str__


class WithoutAttributes(ProcessorError):
    def __init__(self) -> None:
        pass


def raising(name: str, error: Callable[[], BaseException]) -> None:
    async def run(job: Job) -> Results:
        raise error()

    ACTIONS[name] = run


def odd_error(**attributes: Any) -> ProcessorError:
    error = ProcessorError("ODD", "an odd error")
    vars(error).update(attributes)
    return error


raising("raise SystemExit", lambda: SystemExit(3))
raising("raise KeyboardInterrupt", KeyboardInterrupt)
raising("raise GeneratorExit", GeneratorExit)
raising("raise CancelledError", asyncio.CancelledError)
raising("raise BaseException", lambda: OfItsOwn("own"))
raising("raise StopIteration", StopIteration)
raising("raise StopAsyncIteration", StopAsyncIteration)
raising("raise MemoryError", MemoryError)
raising("raise speechless", Speechless)
raising("raise surrogate", lambda: ValueError("half \ud800 of a pair"))
raising("raise long", lambda: ValueError("x" * 20_000_000))
raising("raise without attributes", WithoutAttributes)
raising("raise odd code", lambda: odd_error(code=None, message=b"bytes"))
raising("raise odd details", lambda: odd_error(details={"when": {1}, "fine": 1, 2: 3, "nan": float("nan")}))
raising("raise large details", lambda: odd_error(details={"large": "x" * 20_000_000, "fine": 1}))
raising("raise no details", lambda: odd_error(details=7))
raising(
    "raise group",
    lambda: ExceptionGroup("several", [ProcessorError("LATER", "later", transient=True), ProcessorError("NO", "no")]),
)
raising("raise group of one", lambda: ExceptionGroup("one", [ExceptionGroup("inner", [ProcessorError("NO", "no")])]))
raising("raise mixed group", lambda: BaseExceptionGroup("mixed", [ProcessorError("NO", "no"), SystemExit(1)]))


@action
async def cancel_itself(job: Job) -> Results:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(1)
    return Results()


@action
async def await_cancelled(job: Job) -> Results:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future
    return Results()


@action
async def exit_in_step(job: Job) -> Results:
    async def step() -> None:
        sys.exit(2)

    await job.step("page", {}, step)
    return Results()


@action
async def exit_in_task(job: Job) -> Results:
    async def task() -> None:
        sys.exit(2)

    left = asyncio.create_task(task())
    await asyncio.sleep(0.1)
    assert isinstance(left.exception(), SystemExit)
    return Results()


@action
async def exit_in_task_group(job: Job) -> Results:
    async def task() -> None:
        sys.exit(2)

    async with asyncio.TaskGroup() as group:
        group.create_task(task())
    return Results()


@action
async def exit_in_callback(job: Job) -> Results:
    loop = asyncio.get_running_loop()
    loop.call_soon(sys.exit, 2)
    loop.call_later(0.01, sys.exit, 2)
    asyncio.create_task(asyncio.sleep(0)).add_done_callback(lambda task: sys.exit(2))
    await asyncio.to_thread(loop.call_soon_threadsafe, sys.exit, 2)
    await asyncio.sleep(0.1)
    return Results()


@action
async def exit_in_thread(job: Job) -> Results:
    thread = threading.Thread(target=sys.exit)
    thread.start()
    thread.join()
    return Results()


@action
async def leave_tasks(job: Job) -> Results:
    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(3600)
            except BaseException:  # noqa: BLE001 - that is the point
                continue

    async def exits_when_cancelled() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            sys.exit(2)

    async def speaks_later() -> None:
        await asyncio.sleep(0.2)
        await job.log("error", "spoke after its end")

    job.tasks = [asyncio.create_task(it()) for it in (stubborn, exits_when_cancelled, speaks_later)]  # type: ignore[attr-defined]
    await asyncio.sleep(0.01)
    return Results()


@action
async def ignore_cancellation(job: Job) -> Results:
    await job.log("info", "begun")
    while True:
        try:
            await asyncio.sleep(3600)
        except BaseException:  # noqa: BLE001 - that is the point
            continue


# Returning --------------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: float
    y: Any


class Node(BaseModel):
    name: str = "node"
    inner: list[Node] = []


def circle() -> list[Any]:
    inside: list[Any] = []
    inside.append(inside)
    return inside


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def circular_model() -> Node:
    node = Node()
    node.inner.append(node)
    return node


def doubling() -> list[Any]:
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    return value


REFUSED: dict[str, tuple[Callable[[], Any], str | None]] = {
    "nan": (lambda: {"y": [0, float("nan")]}, ".y[1]"),
    "infinity": (lambda: float("-inf"), ""),
    "surrogate": (lambda: {"text": "half \ud800"}, ".text"),
    "surrogate key": (lambda: {"half \ud800": 1}, ""),
    "integer": (lambda: [2**53], "[0]"),
    "negative integer": (lambda: -(2**70), ""),
    "set": (lambda: {"when": {1, 2}}, ".when"),
    "bytes": (lambda: {"a": {"b": b"bytes"}}, ".a.b"),
    "integer key": (lambda: {"a": {1: 2}}, ".a"),
    "dollar key": (lambda: {"$a": 1}, ""),
    "NUL key": (lambda: {"a\0": 1}, ""),
    "circle": (circle, "[0]"),
    "circular model": (circular_model, None),
    "depth": (lambda: nested(150), "[0]"),
    "doubling": (doubling, None),
    "large": (lambda: "x" * 9_000_000, None),
    "control characters": (lambda: "\x01" * 2_000_000, None),
    "quotes": (lambda: '"' * 4_000_000, None),
    "decimal": (lambda: Decimal("1.5"), ""),
    "timedelta": (lambda: timedelta(1), ""),
    "complex": (lambda: 1j, ""),
    "object": (object, ""),
    "class": (lambda: Node, ""),
    "generator": (lambda: (i for i in range(3)), ""),
    "function": (lambda: len, ""),
    "exception": (lambda: Speechless(), ""),
}
ACCEPTED: dict[str, tuple[Any, Any]] = {
    "tuple": ((1, (2, "x")), [1, [2, "x"]]),
    "datetime": (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05+00:00"),
    "date": (date(2026, 1, 2), "2026-01-02"),
    "uuid": (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    "enum": ({"colour": Colour.RED}, {"colour": "red"}),
    "path": (Path("/tmp/x"), "/tmp/x"),
    "dataclass": (Point(1.5, [Point(2.0, None)]), {"x": 1.5, "y": [{"x": 2.0, "y": None}]}),
    "model": (Node(inner=[Node(name="leaf")]), {"name": "node", "inner": [{"name": "leaf", "inner": []}]}),
    "depth": (nested(90), nested(90)),
    "integers": ([2**53 - 1, -(2**53) + 1, True], [2**53 - 1, -(2**53) + 1, True]),
    "text": ("Grüße \U0001f600 \x00\x1b[31m", "Grüße \U0001f600 \x00\x1b[31m"),
}


@action
async def return_value(job: Job) -> Results:
    results = Results()
    results.metadata["value"] = REFUSED[job.parameters.value][0]()
    return results


@action
async def step_output(job: Job) -> Results:
    async def step() -> Any:
        return REFUSED[job.parameters.value][0]()

    await job.step("page", {}, step)
    return Results()


@action
async def step_input(job: Job) -> Results:
    async def step() -> Any:
        return None

    await job.step("page", {"value": REFUSED[job.parameters.value][0]()}, step)
    return Results()


@action
async def accepted(job: Job) -> Results:
    found = {}
    for name, (value, _) in ACCEPTED.items():

        async def step(value: Any = value) -> Any:
            return value

        found[name] = await job.step(name, {"value": value}, step)
    return Results(metadata={"steps": found, "values": {name: value for name, (value, _) in ACCEPTED.items()}})


def returning(name: str, value: Callable[[], Any]) -> None:
    async def run(job: Job) -> Any:
        return value()

    ACTIONS[name] = run


returning("return None", lambda: None)
returning("return dict", lambda: {"markdown": "x"})
returning("return class", lambda: Results)
returning("return wrong fields", lambda: Results().model_copy(update={"markdown": 7, "assets": [{}]}))
returning("return invalid", lambda: Results(**{"metadata": {1: 2}}))
returning("return many tokens", lambda: Results(tokens_used=2**60))
returning("nothing", Results)


@action
async def odd_texts(job: Job) -> Results:
    for text in ("half \ud800", "x" * 9_000_000, 7, None, Speechless(), b"bytes"):
        await job.log("info", text)  # type: ignore[arg-type]
        await job.progress(float("nan"), text)  # type: ignore[arg-type]
        await job.progress("much", text)  # type: ignore[arg-type]
        await job.warn(text)  # type: ignore[arg-type]
    await job.log("loud", "an unknown level")  # type: ignore[arg-type]
    return Results()


# Everything at once -----------------------------------------------------------------------------------------------


def in_another_loop(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


@action
async def everything_at_once(job: Job) -> Results:
    """Call every method hundreds of times at the same time, from tasks, from threads and from their event loops."""
    wrong: list[str] = []

    async def one(number: int) -> None:
        async def output() -> dict[str, Any]:
            await asyncio.sleep(number % 7 / 1000)
            await job.warn(f"warning {number}") if number % 10 == 0 else None
            job.spent(1)
            saved = await job.save(f"files/{job.job_id}/{number}", f"file {number}".encode(), "text/plain")
            return {"number": number, "file": saved.model_dump(), "filler": "x" * (number * 37 % 5000)}

        await job.log("info", f"line {number} " + "y" * (number % 300))
        await job.progress(number % 100, f"progress {number}")
        step = await job.step(f"step {number}", {"number": number}, output, share=timedelta(days=1))
        if step["number"] != number or step["file"]["path"] != f"files/{job.job_id}/{number}":
            wrong.append(f"{number} got {step}")

    tasks = [asyncio.create_task(one(number)) for number in range(150)]
    in_threads = [asyncio.to_thread(in_another_loop, one(number)) for number in range(150, 180)]
    await asyncio.gather(*tasks, *in_threads)
    return Results(metadata={"wrong": wrong})


# Output and logging -----------------------------------------------------------------------------------------------


@action
async def log_long_line(job: Job) -> Results:
    await job.log("info", "x" * 9_000_000)
    await job.log("info", "after")
    return Results()


@action
async def log_much(job: Job) -> Results:
    for number in range(job.parameters.lines):
        await job.log("info", f"{number} " + "x" * job.parameters.width)
    return Results(metadata={"peak": peak_megabytes()})


def peak_megabytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@action
async def print_much(job: Job) -> Results:
    print("the first line")
    line = "x" * 99
    for _ in range(job.parameters.lines):
        print(line)
    print("to standard error", file=sys.stderr)
    return Results()


# The job process --------------------------------------------------------------------------------------------------


@action
async def exit_at_once(job: Job) -> Results:
    os._exit(job.parameters.code)


@action
async def crash(job: Job) -> Results:
    print("some last words", flush=True)
    ctypes.string_at(0)
    return Results()


@action
async def sleep(job: Job) -> Results:
    note(job, os.getpid())
    await asyncio.sleep(3600)
    return Results()


@action
async def hold_everything(job: Job) -> Results:
    """Sleep in C, with the GIL held and signals blocked: nothing of Python runs meanwhile."""
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()))
    note(job, os.getpid())
    ctypes.PyDLL(None).sleep(3600)
    return Results()


DAEMON = """
import os, signal, sys, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
with open(sys.argv[1] + ".new", "w") as file: file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(3600)
"""


def start_helpers(job: Job) -> list[subprocess.Popen[bytes]]:
    """Start programs that do not want to end with the job; one of them holds all that the job process has open."""
    daemon = [sys.executable, "-S", "-c", DAEMON, f"{job.parameters.file}-daemon"]
    held = [number for number in range(3, 64) if is_open(number)]
    stopped = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    os.kill(stopped.pid, signal.SIGSTOP)
    holder = subprocess.Popen(["sleep", "3600"], pass_fds=held)
    Path(f"{job.parameters.file}-stopped").write_text(str(stopped.pid))
    Path(f"{job.parameters.file}-holder").write_text(str(holder.pid))
    return [subprocess.Popen(daemon), stopped, holder]


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def until_there(path: Path) -> None:
    while not path.exists():  # noqa: ASYNC110, ASYNC240
        await asyncio.sleep(0.01)


@action
async def start_programs(job: Job) -> Results:
    """Start programs, and end as the parameters say."""
    start_helpers(job)
    await until_there(Path(f"{job.parameters.file}-daemon"))
    note(job, os.getpid())
    match job.parameters.end:
        case "return":
            return Results()
        case "exit":
            os._exit(0)
        case "kill the supervisor":
            os.kill(os.getppid(), signal.SIGKILL)
        case "stop the supervisor":
            os.kill(os.getppid(), signal.SIGSTOP)
            return Results()
        case "kill the fork server":
            os.kill(parent_of(os.getppid()), signal.SIGKILL)
            return Results()
        case "kill the group":
            os.killpg(0, signal.SIGKILL)
    await asyncio.sleep(3600)
    return Results()


def connection_to_worker() -> socket.socket:
    """Return the socket through which this process speaks to its worker, as hostile code would find it."""
    for number in range(3, 64):
        try:
            found = socket.socket(fileno=os.dup(number))
        except OSError:
            continue
        if found.family == socket.AF_UNIX and found.type == socket.SOCK_STREAM and found.getpeername() == "":
            before = found.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if int.from_bytes(before[:4], "little") not in (0, os.getpid()):
                return found
        found.close()
    raise AssertionError("no socket to the worker was found")


def sending(name: str, content: Callable[[], bytes], *, then_sleep: bool = True) -> None:
    async def run(job: Job) -> Results:
        connection_to_worker().sendall(content())
        if then_sleep:
            time.sleep(3600)  # noqa: ASYNC251 - nothing else may be sent
        return Results()

    ACTIONS[name] = run


sending("send half a message", lambda: HEADER.pack(1000) + b'{"id": 1, "mess')
sending("send half a header", lambda: b"\0\0")
sending("send garbage", lambda: HEADER.pack(7) + b"garbage")
sending("send the wrong kind", lambda: HEADER.pack(34) + b'{"id":1,"message":{"kind":"fancy"}}'[:34])
sending("send too much", lambda: HEADER.pack(2**32 - 1))


@action
async def fail_while_writing(job: Job) -> Results:
    """As for want of memory, in the thread that sends messages."""
    vars(child)["encode"] = no_memory
    await job.log("info", "cannot be sent")
    await asyncio.sleep(3600)
    return Results()


@action
async def fail_while_reading(job: Job) -> Results:
    async def step() -> str:
        return "done"

    vars(child)["_receive"] = no_memory
    for number in range(2):
        await job.step(f"step {number}", {}, step)
    await asyncio.sleep(3600)
    return Results()


def no_memory(*_: Any) -> Any:
    raise MemoryError("there is none")


@action
async def flood_the_worker(job: Job) -> Results:
    connection = connection_to_worker()
    text = b'{"id":0,"message":{"kind":"log","lines":[[0,"info","flood"]]}}'
    frames = (HEADER.pack(len(text)) + text) * 1000
    note(job, os.getpid())
    while True:
        connection.sendall(frames)


@action
async def stop_in_the_middle(job: Job) -> Results:
    connection_to_worker().sendall(HEADER.pack(1000) + b"{")
    note(job, os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)
    return Results()


@action
async def close_everything(job: Job) -> Results:
    os.closerange(3, 1024)
    return Results()


@action
async def save(job: Job) -> Results:
    saved = await job.save(f"misbehaving/{job.job_id}.md", b"# text\n", "text/markdown")
    return Results(markdown=saved)


class PathOfItsOwn(type(Path())):  # type: ignore[misc]  # PosixPath, where a class of its own is to be based on it
    """A path whose methods do what they like."""

    def open(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("it was used")

    resolve = exists = is_symlink = replace = chmod = unlink = open


def _irregular(kind: str, path: Path) -> Path:
    """Create something that is no regular file, or a regular file in an unusual way; return its path."""
    match kind:
        case "FIFO":
            os.mkfifo(path)
        case "link to a FIFO":
            os.mkfifo(path.with_suffix(".fifo"))
            path.symlink_to(path.with_suffix(".fifo"))
        case "socket":
            socket.socket(socket.AF_UNIX).bind(str(path))
        case "device":
            return Path("/dev/zero")
        case "directory":
            path.mkdir()
        case "link to a file":
            path.with_suffix(".txt").write_bytes(b"# text\n")
            path.symlink_to(path.with_suffix(".txt"))
        case "path of its own":
            path.write_bytes(b"# text\n")
            return PathOfItsOwn(path)
    return path


@action
async def save_what_is_no_file(job: Job) -> Results:
    kind = job.parameters.kind
    path = _irregular(kind, job.scratch / "it")
    return Results(markdown=await job.save(f"misbehaving/{job.job_id}.md", path, "text/markdown"))


@action
async def share_a_step(job: Job) -> Results:
    async def step() -> str:
        return "done"

    await job.step("shared", {}, step, share=timedelta(days=1))
    return Results()


@action
async def save_many(job: Job) -> Results:
    """Have more requests waiting than the worker answers at once."""
    note(job, os.getpid())
    await asyncio.gather(*(job.save(f"many/{number}.txt", b"text", "text/plain") for number in range(300)))
    return Results()


@action
async def save_the_same(job: Job) -> Results:
    """Save the same content many times, at the same time and once more."""
    paths = [f"same/{job.job_id}/{number}.txt" for number in range(20)]
    saved = await asyncio.gather(*(job.save(path, b"blank", "text/plain") for path in paths))
    again = await job.save(f"same/{job.job_id}/again.txt", b"blank", "text/plain")
    return Results(assets=[*saved, again])


@action
async def leave_a_file(job: Job) -> Results:
    (job.scratch / "much").touch()
    return Results()


@action
async def fail_once_and_leave_a_file(job: Job) -> Results:
    (job.scratch / "much").touch()
    if job.attempt == 1:
        raise ProcessorError("AGAIN", "again", transient=True)
    await asyncio.sleep(3600)
    return Results()


@action
async def save_too_large(job: Job) -> Results:
    large = job.scratch / "large"
    large.touch()
    os.truncate(large, FILE_BYTES + 1)
    return Results(markdown=await job.save("large.md", large, "text/markdown"))


@action
async def name_foreign_file(job: Job) -> Results:
    """Claim to have saved a file of another job, of which only the digest is known, and go on whatever the answer."""
    inbox = job._assignment.inbox  # type: ignore[attr-defined]
    sha256, store = job.parameters.value["sha256"], job.parameters.value["store"]
    inbox.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (inbox / sha256[:2]).symlink_to(Path(store, sha256[:2]))
    for _ in range(3):
        with suppress(ProcessorError):
            await job._send(Saved(sha256, "mine.md"))  # type: ignore[attr-defined]
    return Results(markdown=SavedFile(path="mine.md", sha256=sha256, size=1, media_type="text/markdown"))


@action
async def save_and_change(job: Job) -> Results:
    """Change a saved file before the worker has taken it over."""
    content = os.urandom(1000)
    inbox = job._assignment.inbox  # type: ignore[attr-defined]
    stop = threading.Event()

    def change() -> None:
        changes = 0
        while not stop.is_set() and changes < 100:  # a slow disk is to come to other jobs, too
            for path in inbox.glob("*/*"):
                try:
                    path.chmod(0o600)
                    path.write_bytes(b"changed")
                    changes += 1
                except OSError:
                    continue

    thread = threading.Thread(target=change)
    thread.start()
    try:
        saved = await job.save(f"misbehaving/{job.job_id}.md", content, "text/markdown")
    finally:
        stop.set()
        thread.join()
    return Results(markdown=saved)


@action
async def fill_the_disk(job: Job) -> Results:
    (job.scratch / "file").write_bytes(b"x")
    raise OSError(28, "No space left on device", str(job.scratch / "file"))


@action
async def one_step(job: Job) -> Results:
    async def output() -> int:
        return 1

    await job.step("page", {}, output)
    return Results()


def past_containment(function: Callable[..., Any], *arguments: Any) -> None:
    """Call something as code that is not known to be the processor's."""
    contextvars.Context().run(function, *arguments)


def taking_the_loop(name: str, function: Callable[[], Any]) -> None:
    async def run(job: Job) -> Results:
        function()
        await asyncio.sleep(3600)
        return Results()

    ACTIONS[name] = run


def cancel_all() -> None:
    for task in asyncio.all_tasks():
        task.cancel()


taking_the_loop("cancel all tasks", cancel_all)
taking_the_loop("cancel all tasks past containment", lambda: past_containment(cancel_all))
taking_the_loop("stop the loop", lambda: asyncio.get_running_loop().stop())
taking_the_loop("stop the loop past containment", lambda: past_containment(asyncio.get_running_loop().stop))


@action
async def finish_large_steps(job: Job) -> Results:
    async def output(size: int) -> str:
        return "x" * size

    sizes = [1_000_000] * 6 + [6_000_000] + [1] * 120
    await asyncio.gather(*(job.step(f"{n}", {}, partial(output, size)) for n, size in enumerate(sizes)))
    return Results()


@action
async def log_and_finish_step(job: Job) -> Results:
    for number in range(150):
        await job.log("info", f"{number} ".ljust(9_000, "x"))
    await one_step(job)
    return Results()


# Warnings and files -----------------------------------------------------------------------------------------------

WARNINGS = {"text": "w" * 5000, "control characters": "\x01" * 5000, "emoji": "\U0001f600" * 5000, "short": "w"}


@action
async def warn_much(job: Job) -> Results:
    text = WARNINGS[job.parameters.value]

    async def inner() -> None:
        for _ in range(job.parameters.lines):
            await job.warn(text)

    async def outer() -> None:
        await job.warn(text)
        await job.step("inner", {}, inner)

    await job.step("outer", {}, outer)
    await job.warn(text)
    return Results()


def forged(job: Job, digest: str = "a" * 64) -> SavedFile:
    return SavedFile(path=f"misbehaving/{job.job_id}.md", sha256=digest, size=5, media_type="text/markdown")


@action
async def forge_digest(job: Job) -> Results:
    return Results(markdown=forged(job, job.parameters.value or "a" * 64))


@action
async def forge_asset(job: Job) -> Results:
    saved = await job.save(f"misbehaving/{job.job_id}", b"text", "text/plain")
    return Results(markdown=saved, assets=[forged(job)])


@action
async def forge_step(job: Job) -> Results:
    """Have a finished step name a file of another job, for the next attempt."""

    saved = await job.save(f"misbehaving/{job.job_id}", b"text", "text/plain")

    async def step() -> Any:
        file = forged(job) if job.parameters.value == "digest" else saved.model_copy(update={"size": 5})
        return {"files": [{"image": file.model_dump()}]}

    await job.step("page", {}, step)
    return Results()


@action
async def forge_size(job: Job) -> Results:
    saved = await job.save(f"misbehaving/{job.job_id}.md", b"0123456789", "text/markdown")
    return Results(markdown=saved.model_copy(update={"size": job.parameters.code}))


@action
async def save_in_step(job: Job) -> Results:
    """Name a file in the results that an earlier attempt, or another job, has saved in a step."""

    async def step() -> Any:
        saved = await job.save(f"misbehaving/{job.job_id}.md", b"of a step", "text/markdown")
        return {"files": [saved.model_dump()]}

    share = timedelta(days=1) if job.parameters.value == "share" else None
    output = await job.step("page", {}, step, share=share)
    if job.parameters.value == "retry" and job.attempt == 1:
        raise ProcessorError("AGAIN", "again", transient=True)
    return Results(markdown=SavedFile.model_validate(output["files"][0]))


# Scratch and steps ------------------------------------------------------------------------------------------------


@action
async def nest_directories(job: Job) -> Results:
    path = os.open(job.scratch, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=path)
        path, parent = os.open("d", os.O_RDONLY, dir_fd=path), path
        os.close(parent)
    os.fchmod(path, 0)
    os.close(path)
    return Results()


@action
async def lock_scratch(job: Job) -> Results:
    """Take the mode from the directory of all jobs, once, and fail as another job would then."""
    marker = Path(job.parameters.file)
    if not marker.exists():  # noqa: ASYNC240
        marker.touch()  # noqa: ASYNC240
        job.scratch.parents[1].chmod(0)
        raise PermissionError(13, "Permission denied", str(job.scratch))
    return Results()


STEP_NAMES = ("s" * 300 + "a", "s" * 300 + "b", "\ud800", "?", "\ud801")


@action
async def name_steps_alike(job: Job) -> Results:
    async def work(name: str) -> str:
        return ascii(name)

    found = [await job.step(name, {}, partial(work, name)) for name in STEP_NAMES]
    if job.attempt == 1:
        raise ProcessorError("AGAIN", "again", transient=True)
    return Results(metadata={"found": found})
