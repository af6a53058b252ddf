"""workers: which job types there are. They are entry points in the group `jobledger.processors`.

A processor is foreign code. One that cannot be used takes nothing with it but its own job type: it is listed in
`unusable_types` with the reason, and everything else works.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel

from jobledger.workers.child.confinement import UNUSABLE_PROCESSORS, build_job_environment
from jobledger.workers.processor import Processor

ENTRY_POINT_GROUP: Final = "jobledger.processors"
LOAD_SECONDS: Final = 30.0
"""How long a processor may take to import. One that takes longer is taken for hung."""
PRELOAD_SECONDS: Final = 120.0
_BUILT_IN: Final = "jobledger.workers."
_T = TypeVar("_T")


class ProcessorUnusable(Exception):
    """A processor cannot be used. The text says what is wrong with it."""


@cache
def _installed() -> tuple[dict[str, type[Processor]], dict[str, str]]:
    """Load all processors; return those that can be used, and why others cannot be."""
    usable: dict[str, type[Processor]] = {}
    unusable: dict[str, str] = {}
    skipped = os.environ.get(UNUSABLE_PROCESSORS, "").split(",")
    for job_type, candidates in _entries().items():
        try:
            if job_type in skipped:
                raise ProcessorUnusable("the process that started this one could not use it")
            usable[job_type] = _load(job_type, candidates)
        except ProcessorUnusable as error:
            unusable[job_type] = str(error)
    _export_unusable(unusable)
    return usable, unusable


def load_processors() -> dict[str, type[Processor]]:
    """Return every processor that can be used, by its job type."""
    return _installed()[0]


def unusable_job_types() -> dict[str, str]:
    """Return the job types whose processor is installed but cannot be used, each with what is wrong."""
    return _installed()[1]


def disable_job_type(job_type: str, reason: str) -> None:
    """Take a job type out of use in this process."""
    usable, unusable = _installed()
    if usable.pop(job_type, None) is not None:
        unusable[job_type] = reason
        _export_unusable(unusable)


def _export_unusable(unusable: Iterable[str]) -> None:
    if names := ",".join(unusable):
        os.environ[UNUSABLE_PROCESSORS] = names


def is_built_in(job_type: str) -> bool:
    """Return whether a processor is part of this program."""
    processor = load_processors().get(job_type)
    return processor is not None and processor.__module__.startswith(_BUILT_IN)


@cache
def processor_version(job_type: str) -> str:
    """Return the version of the distribution that a processor comes from, such as "jobledger 1.0"."""
    entry = _choose(job_type, _entries()[job_type])
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""


def get_processor(job_type: str) -> type[Processor]:
    """Return the processor for a job type.

    Raises:
        LookupError: there is none, or it cannot be used.
    """
    return load_processors()[job_type]


def shared_directories(processor: type[Processor]) -> list[Path]:
    """Return the directories that all jobs of a type write to.

    Raises:
        TypeError: `shared_directories` returns something else. Foreign code, so it may also raise anything.
    """
    found: object = getattr(processor, "shared_directories", tuple)()
    if not isinstance(found, list | tuple) or not all(isinstance(path, str | Path) for path in found):
        raise TypeError(f"shared_directories() must return a list or tuple of paths, not a {type(found).__name__}")
    return [Path(path) for path in found]


def check_preload(job_type: str) -> None:
    """Import the modules that a processor wants to have loaded before its jobs start. Takes seconds for some.

    It also calls `shared_directories`, which every job process does.

    Raises:
        ProcessorUnusable: one of them cannot be imported, or `shared_directories` fails.
    """
    _call_foreign_code(partial(shared_directories, load_processors()[job_type]), "shared_directories()", "called")
    for module in load_processors()[job_type].preload:
        _call_foreign_code(partial(import_module, module), f"its module {module!r} (preload)", seconds=PRELOAD_SECONDS)


def check_plugins(environment: Iterable[str] = ()) -> None:
    """Take plug-ins out of use whose `preload` cannot be imported, or whose `shared_directories` fail. Blocks.

    `environment` names variables that job processes get besides the usual ones; the imports get the same.

    They are imported in another process, because this one must not carry their modules, and because a library may end
    the process that imports it. Processors of this program are not checked: `jobledger doctor` does that.
    """
    waiting = [
        name
        for name, processor in load_processors().items()
        if (processor.preload or hasattr(processor, "shared_directories")) and not is_built_in(name)
    ]
    while waiting:
        command = [sys.executable, "-m", "jobledger.workers.child.preload_check", *waiting]
        variables = {**build_job_environment(environment), "PYTHONPATH": os.pathsep.join(it for it in sys.path if it)}
        with subprocess.Popen(  # noqa: S603 - our own command line
            command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=variables
        ) as process:
            watchdog = threading.Timer(len(waiting) * PRELOAD_SECONDS + LOAD_SECONDS, process.kill)
            watchdog.start()
            assert process.stdout is not None  # noqa: S101 - as asked for
            for line in process.stdout:
                name, separator, problem = line.rstrip("\n").partition("\t")
                if separator and name in waiting:  # not what a plug-in prints
                    waiting.remove(name)
                    if problem:
                        disable_job_type(name, problem)
            watchdog.cancel()
        if waiting:  # it ended without a word about the next one
            disable_job_type(
                waiting.pop(0), f"its modules (preload) end the process that imports them ({process.returncode})"
            )


def _entries() -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda it: (it.name, it.value)):
        others = found.setdefault(entry.name, [])
        if entry.value not in [other.value for other in others]:
            others.append(entry)
    return found


def _load(job_type: str, candidates: list[EntryPoint]) -> type[Processor]:
    entry = _choose(job_type, candidates)
    processor = _call_foreign_code(entry.load, f"{entry.value}{_origin(entry)}")
    if (lack := _call_foreign_code(lambda: _find_interface_problem(processor, job_type), entry.value)) is not None:
        raise ProcessorUnusable(f"{entry.value}{_origin(entry)} is not a processor: {lack}")
    return processor  # type: ignore[no-any-return]  # as has just been checked


def _choose(job_type: str, candidates: list[EntryPoint]) -> EntryPoint:
    """Choose among the entry points for a job type. A foreign one never replaces one of this program."""
    if len(candidates) == 1:
        return candidates[0]
    for entry in candidates:
        if entry.value.startswith(_BUILT_IN):
            return entry
    names = " and ".join(f"{entry.value}{_origin(entry)}" for entry in candidates)
    raise ProcessorUnusable(f"{names} both provide the job type {job_type!r}: uninstall all but one")


def _origin(entry: EntryPoint) -> str:
    return f" of {entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""


def _call_foreign_code(
    work: Callable[[], _T], what: str, verb: str = "imported", *, seconds: float | None = None
) -> _T:
    """Return the result of foreign code that runs at import, or before an attempt, whatever it does.

    It runs in a thread, because code that hangs can be abandoned there. An endless loop in it is interrupted.

    Raises:
        ProcessorUnusable: it raised anything at all, or did not return in time.
    """
    results: list[_T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt included
            failures.append(error)

    thread = threading.Thread(target=run, name="load-processor", daemon=True)
    thread.start()
    seconds = LOAD_SECONDS if seconds is None else seconds
    thread.join(seconds)
    if results:
        return results[0]
    if failures:
        error = failures[0]
        hint = f"; install the package with {error.name!r}" if isinstance(error, ModuleNotFoundError) else ""
        raise ProcessorUnusable(f"{what} cannot be {verb}: {type(error).__name__}: {_text(error)}{hint}") from error
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    ends = "its import" if verb == "imported" else "its work"
    raise ProcessorUnusable(f"{what} did not end {ends} within {seconds:.0f} s: it must do no work there")


def _text(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())[:300]
    except Exception:  # noqa: BLE001 - foreign code
        return "(its text cannot be shown)"


def _find_interface_problem(processor: Any, job_type: str) -> str | None:
    """Return what a class lacks to be a processor; None if it lacks nothing."""
    if not isinstance(processor, type):
        return f"expected a class, found {type(processor).__name__}"
    own = getattr(processor, "job_type", None)
    if own != job_type:
        return f"its `job_type` is {own!r}, and its entry point is named {job_type!r}: they must be the same"
    if getattr(processor, "isolation", None) not in ("process", "inline"):
        return f"`isolation` must be 'process' or 'inline', not {getattr(processor, 'isolation', None)!r}"
    for name in ("Parameters", "Settings"):
        model = getattr(processor, name, None)
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return f"`{name}` must be a subclass of pydantic.BaseModel"
        model.model_json_schema()
    run = getattr(processor, "run", None)
    if not callable(run):
        return "`async def run(self, job)` is missing"
    try:
        inspect.signature(processor).bind(None)
        inspect.signature(run).bind(None, None)
    except TypeError:
        return "expected `__init__(self, settings)` and `async def run(self, job)`"
    return _find_preload_problem(processor)


def _find_preload_problem(processor: Any) -> str | None:
    preload = getattr(processor, "preload", None)
    if isinstance(preload, str) or not isinstance(preload, list | tuple):
        return "`preload` must be a tuple of module names; () for none"
    for module in preload:
        if not isinstance(module, str) or find_spec(module.partition(".")[0]) is None:
            return f"its module {module!r} (preload) is not installed"
    return None
