"""Job types that misbehave on request: `misbehaving` in a job process and `misbehaving-inline` inline.

Both run the same functions. The parameter `{"action": "exit at once"}` runs the function `exit_at_once`.
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

from jobledger.ledger.domain.limits import MAX_FILE_BYTES
from jobledger.workers.child import main as child
from jobledger.workers.child.messages import FRAME_HEADER, FileSaved
from jobledger.workers.processor import Isolation, JobContext, ProcessorError, Results, SavedFile

ACTIONS: dict[str, Callable[[JobContext], Awaitable[Any]]] = {}


def action(function: Callable[[JobContext], Awaitable[Any]]) -> Callable[[JobContext], Awaitable[Any]]:
    ACTIONS[function.__name__.strip("_").replace("_", " ")] = function
    return function


class Parameters(BaseModel):
    model_config = ConfigDict(extra="allow")

    action: str = "nothing"
    file: Path | None = None


class Settings(BaseModel):
    model_config = ConfigDict(extra="allow")


class MisbehavingProcessor:
    job_type: ClassVar[str] = "misbehaving"
    isolation: ClassVar[Isolation] = "process"
    preload: ClassVar[Sequence[str]] = ()
    Parameters: ClassVar[type[BaseModel]] = Parameters
    Settings: ClassVar[type[BaseModel]] = Settings

    def __init__(self, settings: Any) -> None:
        pass

    async def run(self, job: JobContext) -> Results:
        result: Results = await ACTIONS[job.parameters.action](job)
        return result


class InlineMisbehavingProcessor(MisbehavingProcessor):
    job_type: ClassVar[str] = "misbehaving-inline"
    isolation: ClassVar[Isolation] = "inline"


def write_marker_file(job: JobContext, text: object) -> None:
    """Atomically write the file that the job's parameters name."""
    new = job.parameters.file.with_suffix(".new")
    new.write_text(str(text))
    new.rename(job.parameters.file)


# Raising ----------------------------------------------------------------------------------------------------------


class CustomBaseException(BaseException):
    pass


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)

    __repr__ = __str__


class UninitializedError(ProcessorError):
    def __init__(self) -> None:
        pass


def add_raising_action(name: str, error: Callable[[], BaseException]) -> None:
    async def run(job: JobContext) -> Results:
        raise error()

    ACTIONS[name] = run


def make_odd_error(**attributes: Any) -> ProcessorError:
    error = ProcessorError("ODD", "an odd error")
    vars(error).update(attributes)
    return error


add_raising_action("raise SystemExit", lambda: SystemExit(3))
add_raising_action("raise KeyboardInterrupt", KeyboardInterrupt)
add_raising_action("raise GeneratorExit", GeneratorExit)
add_raising_action("raise CancelledError", asyncio.CancelledError)
add_raising_action("raise BaseException", lambda: CustomBaseException("own"))
add_raising_action("raise StopIteration", StopIteration)
add_raising_action("raise StopAsyncIteration", StopAsyncIteration)
add_raising_action("raise MemoryError", MemoryError)
add_raising_action("raise unprintable", UnprintableError)
add_raising_action("raise surrogate", lambda: ValueError("half \ud800 of a pair"))
add_raising_action("raise long", lambda: ValueError("x" * 20_000_000))
add_raising_action("raise without attributes", UninitializedError)
add_raising_action("raise odd code", lambda: make_odd_error(code=None, message=b"bytes"))
add_raising_action(
    "raise odd details", lambda: make_odd_error(details={"when": {1}, "fine": 1, 2: 3, "nan": float("nan")})
)
add_raising_action("raise large details", lambda: make_odd_error(details={"large": "x" * 20_000_000, "fine": 1}))
add_raising_action("raise no details", lambda: make_odd_error(details=7))
add_raising_action(
    "raise group",
    lambda: ExceptionGroup("several", [ProcessorError("LATER", "later", transient=True), ProcessorError("NO", "no")]),
)
add_raising_action(
    "raise group of one", lambda: ExceptionGroup("one", [ExceptionGroup("inner", [ProcessorError("NO", "no")])])
)
add_raising_action(
    "raise mixed group", lambda: BaseExceptionGroup("mixed", [ProcessorError("NO", "no"), SystemExit(1)])
)


@action
async def cancel_itself(job: JobContext) -> Results:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(1)
    return Results()


@action
async def await_cancelled(job: JobContext) -> Results:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future
    return Results()


@action
async def exit_in_step(job: JobContext) -> Results:
    async def step() -> None:
        sys.exit(2)

    await job.run_step("page", {}, step)
    return Results()


@action
async def exit_in_task(job: JobContext) -> Results:
    async def task() -> None:
        sys.exit(2)

    failing = asyncio.create_task(task())
    await asyncio.sleep(0.1)
    assert isinstance(failing.exception(), SystemExit)
    return Results()


@action
async def exit_in_task_group(job: JobContext) -> Results:
    async def task() -> None:
        sys.exit(2)

    async with asyncio.TaskGroup() as group:
        group.create_task(task())
    return Results()


@action
async def exit_in_callback(job: JobContext) -> Results:
    loop = asyncio.get_running_loop()
    loop.call_soon(sys.exit, 2)
    loop.call_later(0.01, sys.exit, 2)
    asyncio.create_task(asyncio.sleep(0)).add_done_callback(lambda task: sys.exit(2))
    await asyncio.to_thread(loop.call_soon_threadsafe, sys.exit, 2)
    await asyncio.sleep(0.1)
    return Results()


@action
async def exit_in_thread(job: JobContext) -> Results:
    thread = threading.Thread(target=sys.exit)
    thread.start()
    thread.join()
    return Results()


@action
async def leave_tasks(job: JobContext) -> Results:
    async def ignore_cancellations() -> None:
        while True:
            try:
                await asyncio.sleep(3600)
            except BaseException:  # noqa: BLE001 - cancellation and SystemExit too
                continue

    async def exit_when_cancelled() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            sys.exit(2)

    async def log_later() -> None:
        await asyncio.sleep(0.2)
        await job.log("error", "logged after the job ended")

    job.tasks = [asyncio.create_task(task()) for task in (ignore_cancellations, exit_when_cancelled, log_later)]  # type: ignore[attr-defined]
    await asyncio.sleep(0.01)
    return Results()


@action
async def ignore_cancellation(job: JobContext) -> Results:
    await job.log("info", "started")
    while True:
        try:
            await asyncio.sleep(3600)
        except BaseException:  # noqa: BLE001 - cancellation and SystemExit too
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


def circular_list() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def nested_list(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def circular_model() -> Node:
    node = Node()
    node.inner.append(node)
    return node


def exponential_list() -> list[Any]:
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    return value


REJECTED_VALUES: dict[str, tuple[Callable[[], Any], str | None]] = {
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
    "circular list": (circular_list, "[0]"),
    "circular model": (circular_model, None),
    "depth": (lambda: nested_list(150), "[0]"),
    "exponential list": (exponential_list, None),
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
    "exception": (lambda: UnprintableError(), ""),
}
ACCEPTED_VALUES: dict[str, tuple[Any, Any]] = {
    "tuple": ((1, (2, "x")), [1, [2, "x"]]),
    "datetime": (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05+00:00"),
    "date": (date(2026, 1, 2), "2026-01-02"),
    "uuid": (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    "enum": ({"colour": Colour.RED}, {"colour": "red"}),
    "path": (Path("/tmp/x"), "/tmp/x"),
    "dataclass": (Point(1.5, [Point(2.0, None)]), {"x": 1.5, "y": [{"x": 2.0, "y": None}]}),
    "model": (Node(inner=[Node(name="leaf")]), {"name": "node", "inner": [{"name": "leaf", "inner": []}]}),
    "depth": (nested_list(90), nested_list(90)),
    "integers": ([2**53 - 1, -(2**53) + 1, True], [2**53 - 1, -(2**53) + 1, True]),
    "text": ("Grüße \U0001f600 \x00\x1b[31m", "Grüße \U0001f600 \x00\x1b[31m"),
}


@action
async def return_value(job: JobContext) -> Results:
    results = Results()
    results.metadata["value"] = REJECTED_VALUES[job.parameters.value][0]()
    return results


@action
async def step_output(job: JobContext) -> Results:
    async def step() -> Any:
        return REJECTED_VALUES[job.parameters.value][0]()

    await job.run_step("page", {}, step)
    return Results()


@action
async def step_input(job: JobContext) -> Results:
    async def step() -> Any:
        return None

    await job.run_step("page", {"value": REJECTED_VALUES[job.parameters.value][0]()}, step)
    return Results()


@action
async def return_accepted_values(job: JobContext) -> Results:
    outputs = {}
    for name, (value, _) in ACCEPTED_VALUES.items():

        async def step(value: Any = value) -> Any:
            return value

        outputs[name] = await job.run_step(name, {"value": value}, step)
    return Results(metadata={"steps": outputs, "values": {name: value for name, (value, _) in ACCEPTED_VALUES.items()}})


def add_returning_action(name: str, value: Callable[[], Any]) -> None:
    async def run(job: JobContext) -> Any:
        return value()

    ACTIONS[name] = run


add_returning_action("return None", lambda: None)
add_returning_action("return dict", lambda: {"markdown": "x"})
add_returning_action("return class", lambda: Results)
add_returning_action("return wrong fields", lambda: Results().model_copy(update={"markdown": 7, "assets": [{}]}))
add_returning_action("return invalid", lambda: Results(**{"metadata": {1: 2}}))
add_returning_action("return many tokens", lambda: Results(tokens_used=2**60))
add_returning_action("nothing", Results)


@action
async def odd_texts(job: JobContext) -> Results:
    for text in ("half \ud800", "x" * 9_000_000, 7, None, UnprintableError(), b"bytes"):
        await job.log("info", text)  # type: ignore[arg-type]
        await job.report_progress(float("nan"), text)  # type: ignore[arg-type]
        await job.report_progress("much", text)  # type: ignore[arg-type]
        await job.warn(text)  # type: ignore[arg-type]
    await job.log("loud", "an unknown level")  # type: ignore[arg-type]
    return Results()


# Everything at once -----------------------------------------------------------------------------------------------


def run_in_new_loop(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


@action
async def everything_at_once(job: JobContext) -> Results:
    """Call every method hundreds of times concurrently, from tasks and from threads with their own event loops."""
    mismatches: list[str] = []

    async def use_every_method(number: int) -> None:
        async def output() -> dict[str, Any]:
            await asyncio.sleep(number % 7 / 1000)
            await job.warn(f"warning {number}") if number % 10 == 0 else None
            job.add_tokens(1)
            saved = await job.save(f"files/{job.job_id}/{number}", f"file {number}".encode(), "text/plain")
            return {"number": number, "file": saved.model_dump(), "filler": "x" * (number * 37 % 5000)}

        await job.log("info", f"line {number} " + "y" * (number % 300))
        await job.report_progress(number % 100, f"progress {number}")
        step = await job.run_step(f"step {number}", {"number": number}, output, share_max_age=timedelta(days=1))
        if step["number"] != number or step["file"]["path"] != f"files/{job.job_id}/{number}":
            mismatches.append(f"{number} got {step}")

    tasks = [asyncio.create_task(use_every_method(number)) for number in range(150)]
    threads = [asyncio.to_thread(run_in_new_loop, use_every_method(number)) for number in range(150, 180)]
    await asyncio.gather(*tasks, *threads)
    return Results(metadata={"mismatches": mismatches})


# Output and logging -----------------------------------------------------------------------------------------------


@action
async def log_long_line(job: JobContext) -> Results:
    await job.log("info", "x" * 9_000_000)
    await job.log("info", "after")
    return Results()


@action
async def log_many_lines(job: JobContext) -> Results:
    for number in range(job.parameters.lines):
        await job.log("info", f"{number} " + "x" * job.parameters.width)
    return Results(metadata={"peak": peak_megabytes()})


def peak_megabytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@action
async def print_many_lines(job: JobContext) -> Results:
    print("the first line")
    line = "x" * 99
    for _ in range(job.parameters.lines):
        print(line)
    print("to standard error", file=sys.stderr)
    return Results()


# The job process --------------------------------------------------------------------------------------------------


@action
async def exit_at_once(job: JobContext) -> Results:
    os._exit(job.parameters.code)


@action
async def crash(job: JobContext) -> Results:
    print("output before the crash", flush=True)
    ctypes.string_at(0)
    return Results()


@action
async def sleep(job: JobContext) -> Results:
    write_marker_file(job, os.getpid())
    await asyncio.sleep(3600)
    return Results()


@action
async def block_with_gil(job: JobContext) -> Results:
    """Sleep in C with the GIL held and signals blocked, so that no Python code runs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()))
    write_marker_file(job, os.getpid())
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


def start_background_programs(job: JobContext) -> list[subprocess.Popen[bytes]]:
    """Start programs that outlive the job. One of them inherits all open descriptors of the job process."""
    daemon = [sys.executable, "-S", "-c", DAEMON, f"{job.parameters.file}-daemon"]
    descriptors = [number for number in range(3, 64) if is_open(number)]
    stopped = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    os.kill(stopped.pid, signal.SIGSTOP)
    holder = subprocess.Popen(["sleep", "3600"], pass_fds=descriptors)
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


async def wait_for_file(path: Path) -> None:
    while not path.exists():  # noqa: ASYNC110, ASYNC240
        await asyncio.sleep(0.01)


@action
async def start_programs(job: JobContext) -> Results:
    """Start programs and end in the way that the parameters name."""
    start_background_programs(job)
    await wait_for_file(Path(f"{job.parameters.file}-daemon"))
    write_marker_file(job, os.getpid())
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
    """Find the socket that connects this process to its worker, as hostile code would."""
    for number in range(3, 64):
        try:
            candidate = socket.socket(fileno=os.dup(number))
        except OSError:
            continue
        if (
            candidate.family == socket.AF_UNIX
            and candidate.type == socket.SOCK_STREAM
            and candidate.getpeername() == ""
        ):
            credentials = candidate.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if int.from_bytes(credentials[:4], "little") not in (0, os.getpid()):
                return candidate
        candidate.close()
    raise AssertionError("no socket to the worker found")


def add_sending_action(name: str, content: Callable[[], bytes], *, then_sleep: bool = True) -> None:
    async def run(job: JobContext) -> Results:
        connection_to_worker().sendall(content())
        if then_sleep:
            time.sleep(3600)  # noqa: ASYNC251 - nothing else may be sent
        return Results()

    ACTIONS[name] = run


add_sending_action("send half a message", lambda: FRAME_HEADER.pack(1000) + b'{"request_id": 1, "mess')
add_sending_action("send half a header", lambda: b"\0\0")
add_sending_action("send garbage", lambda: FRAME_HEADER.pack(7) + b"garbage")
add_sending_action(
    "send the wrong kind", lambda: FRAME_HEADER.pack(43) + b'{"request_id":1,"message":{"kind":"fancy"}}'
)
add_sending_action("send too much", lambda: FRAME_HEADER.pack(2**32 - 1))


@action
async def fail_while_writing(job: JobContext) -> Results:
    """Raise MemoryError in the thread that sends messages."""
    vars(child)["encode_frame"] = raise_memory_error
    await job.log("info", "cannot be sent")
    await asyncio.sleep(3600)
    return Results()


@action
async def fail_while_reading(job: JobContext) -> Results:
    async def step() -> str:
        return "done"

    vars(child)["_receive"] = raise_memory_error
    for number in range(2):
        await job.run_step(f"step {number}", {}, step)
    await asyncio.sleep(3600)
    return Results()


def raise_memory_error(*_: Any) -> Any:
    raise MemoryError("out of memory")


@action
async def flood_the_worker(job: JobContext) -> Results:
    connection = connection_to_worker()
    text = b'{"request_id":0,"message":{"kind":"log","entries":[[0,"info","flood"]]}}'
    frames = (FRAME_HEADER.pack(len(text)) + text) * 1000
    write_marker_file(job, os.getpid())
    while True:
        connection.sendall(frames)


@action
async def stop_mid_message(job: JobContext) -> Results:
    connection_to_worker().sendall(FRAME_HEADER.pack(1000) + b"{")
    write_marker_file(job, os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)
    return Results()


@action
async def close_everything(job: JobContext) -> Results:
    os.closerange(3, 1024)
    return Results()


@action
async def save(job: JobContext) -> Results:
    saved = await job.save(f"misbehaving/{job.job_id}.md", b"# text\n", "text/markdown")
    return Results(markdown=saved)


class CustomPath(type(Path())):  # type: ignore[misc]  # PosixPath
    """A path with custom methods."""

    def open(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a method of the path was called")

    resolve = exists = is_symlink = replace = chmod = unlink = open


def _create_irregular_file(kind: str, path: Path) -> Path:
    """Create a file that is not regular, or a regular file with an unusual path. Return its path."""
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
        case "custom path":
            path.write_bytes(b"# text\n")
            return CustomPath(path)
    return path


@action
async def save_irregular_file(job: JobContext) -> Results:
    kind = job.parameters.kind
    path = _create_irregular_file(kind, job.scratch_dir / "file")
    return Results(markdown=await job.save(f"misbehaving/{job.job_id}.md", path, "text/markdown"))


@action
async def share_a_step(job: JobContext) -> Results:
    async def step() -> str:
        return "done"

    await job.run_step("shared", {}, step, share_max_age=timedelta(days=1))
    return Results()


@action
async def save_many(job: JobContext) -> Results:
    """Send more requests than the worker answers at a time."""
    write_marker_file(job, os.getpid())
    await asyncio.gather(*(job.save(f"many/{number}.txt", b"text", "text/plain") for number in range(300)))
    return Results()


@action
async def save_the_same(job: JobContext) -> Results:
    """Save the same content many times concurrently, and then once more."""
    paths = [f"same/{job.job_id}/{number}.txt" for number in range(20)]
    saved = await asyncio.gather(*(job.save(path, b"blank", "text/plain") for path in paths))
    last = await job.save(f"same/{job.job_id}/again.txt", b"blank", "text/plain")
    return Results(assets=[*saved, last])


@action
async def leave_a_file(job: JobContext) -> Results:
    (job.scratch_dir / "much").touch()
    return Results()


@action
async def fail_once_and_leave_a_file(job: JobContext) -> Results:
    (job.scratch_dir / "much").touch()
    if job.attempt == 1:
        raise ProcessorError("AGAIN", "again", transient=True)
    await asyncio.sleep(3600)
    return Results()


@action
async def save_too_large(job: JobContext) -> Results:
    large = job.scratch_dir / "large"
    large.touch()
    os.truncate(large, MAX_FILE_BYTES + 1)
    return Results(markdown=await job.save("large.md", large, "text/markdown"))


@action
async def claim_foreign_file(job: JobContext) -> Results:
    """Claim to have saved a file of another job by its digest. Continue with any response."""
    inbox = job._assignment.inbox_dir  # type: ignore[attr-defined]
    sha256, store = job.parameters.value["sha256"], job.parameters.value["store"]
    inbox.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (inbox / sha256[:2]).symlink_to(Path(store, sha256[:2]))
    for _ in range(3):
        with suppress(ProcessorError):
            await job._send(FileSaved(sha256, "mine.md"))  # type: ignore[attr-defined]
    return Results(markdown=SavedFile(path="mine.md", sha256=sha256, size=1, media_type="text/markdown"))


@action
async def modify_saved_file(job: JobContext) -> Results:
    """Modify a saved file before the worker moves it."""
    content = os.urandom(1000)
    inbox = job._assignment.inbox_dir  # type: ignore[attr-defined]
    stop = threading.Event()

    def change() -> None:
        changes = 0
        while not stop.is_set() and changes < 100:  # limit the disk load
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
async def fill_the_disk(job: JobContext) -> Results:
    (job.scratch_dir / "file").write_bytes(b"x")
    raise OSError(28, "No space left on device", str(job.scratch_dir / "file"))


@action
async def one_step(job: JobContext) -> Results:
    async def output() -> int:
        return 1

    await job.run_step("page", {}, output)
    return Results()


def call_outside_containment(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function in a context that is not attributed to the processor."""
    contextvars.Context().run(function, *arguments)


def add_event_loop_action(name: str, function: Callable[[], Any]) -> None:
    async def run(job: JobContext) -> Results:
        function()
        await asyncio.sleep(3600)
        return Results()

    ACTIONS[name] = run


def cancel_all() -> None:
    for task in asyncio.all_tasks():
        task.cancel()


add_event_loop_action("cancel all tasks", cancel_all)
add_event_loop_action("cancel all tasks past containment", lambda: call_outside_containment(cancel_all))
add_event_loop_action("stop the loop", lambda: asyncio.get_running_loop().stop())
add_event_loop_action(
    "stop the loop past containment", lambda: call_outside_containment(asyncio.get_running_loop().stop)
)


@action
async def finish_large_steps(job: JobContext) -> Results:
    async def output(size: int) -> str:
        return "x" * size

    sizes = [1_000_000] * 6 + [6_000_000] + [1] * 120
    await asyncio.gather(*(job.run_step(f"{n}", {}, partial(output, size)) for n, size in enumerate(sizes)))
    return Results()


@action
async def log_and_finish_step(job: JobContext) -> Results:
    for number in range(150):
        await job.log("info", f"{number} ".ljust(9_000, "x"))
    await one_step(job)
    return Results()


# Warnings and files -----------------------------------------------------------------------------------------------

WARNINGS = {"text": "w" * 5000, "control characters": "\x01" * 5000, "emoji": "\U0001f600" * 5000, "short": "w"}


@action
async def warn_many_times(job: JobContext) -> Results:
    text = WARNINGS[job.parameters.value]

    async def inner() -> None:
        for _ in range(job.parameters.lines):
            await job.warn(text)

    async def outer() -> None:
        await job.warn(text)
        await job.run_step("inner", {}, inner)

    await job.run_step("outer", {}, outer)
    await job.warn(text)
    return Results()


def make_forged_file(job: JobContext, digest: str = "a" * 64) -> SavedFile:
    return SavedFile(path=f"misbehaving/{job.job_id}.md", sha256=digest, size=5, media_type="text/markdown")


@action
async def forge_digest(job: JobContext) -> Results:
    return Results(markdown=make_forged_file(job, job.parameters.value or "a" * 64))


@action
async def forge_asset(job: JobContext) -> Results:
    saved = await job.save(f"misbehaving/{job.job_id}", b"text", "text/plain")
    return Results(markdown=saved, assets=[make_forged_file(job)])


@action
async def forge_step(job: JobContext) -> Results:
    """Return a forged file in the output of a step, for the next attempt."""

    saved = await job.save(f"misbehaving/{job.job_id}", b"text", "text/plain")

    async def step() -> Any:
        file = make_forged_file(job) if job.parameters.value == "digest" else saved.model_copy(update={"size": 5})
        return {"files": [{"image": file.model_dump()}]}

    await job.run_step("page", {}, step)
    return Results()


@action
async def forge_size(job: JobContext) -> Results:
    saved = await job.save(f"misbehaving/{job.job_id}.md", b"0123456789", "text/markdown")
    return Results(markdown=saved.model_copy(update={"size": job.parameters.code}))


@action
async def save_in_step(job: JobContext) -> Results:
    """Return a file in the results that an earlier attempt or another job saved in a step."""

    async def step() -> Any:
        saved = await job.save(f"misbehaving/{job.job_id}.md", b"of a step", "text/markdown")
        return {"files": [saved.model_dump()]}

    share = timedelta(days=1) if job.parameters.value == "share" else None
    output = await job.run_step("page", {}, step, share_max_age=share)
    if job.parameters.value == "retry" and job.attempt == 1:
        raise ProcessorError("AGAIN", "again", transient=True)
    return Results(markdown=SavedFile.model_validate(output["files"][0]))


# Scratch and steps ------------------------------------------------------------------------------------------------


@action
async def nest_directories(job: JobContext) -> Results:
    path = os.open(job.scratch_dir, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=path)
        path, parent = os.open("d", os.O_RDONLY, dir_fd=path), path
        os.close(parent)
    os.fchmod(path, 0)
    os.close(path)
    return Results()


@action
async def lock_scratch(job: JobContext) -> Results:
    """Remove all permissions of the directory of all jobs, once, and fail as another job would."""
    marker = Path(job.parameters.file)
    if not marker.exists():  # noqa: ASYNC240
        marker.touch()  # noqa: ASYNC240
        job.scratch_dir.parents[1].chmod(0)
        raise PermissionError(13, "Permission denied", str(job.scratch_dir))
    return Results()


STEP_NAMES = ("s" * 300 + "a", "s" * 300 + "b", "\ud800", "?", "\ud801")


@action
async def use_similar_step_names(job: JobContext) -> Results:
    async def step(name: str) -> str:
        return ascii(name)

    outputs = [await job.run_step(name, {}, partial(step, name)) for name in STEP_NAMES]
    if job.attempt == 1:
        raise ProcessorError("AGAIN", "again", transient=True)
    return Results(metadata={"outputs": outputs})
