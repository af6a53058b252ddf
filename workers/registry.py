"""The registry of processors. They are entry points in the group `jobledger.processors`.

A processor is third-party code. If one cannot be used, only its own job type is affected. `get_unusable_job_types`
returns the reasons.
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

from jobledger.workers.processor import Processor
from jobledger.workers.sandbox.confinement import UNUSABLE_PROCESSORS, build_job_environment

ENTRY_POINT_GROUP: Final = "jobledger.processors"
LOAD_SECONDS: Final = 30.0
"""Timeout for importing a processor."""
PRELOAD_SECONDS: Final = 120.0
_BUILT_IN: Final = "jobledger.workers."
_T = TypeVar("_T")


class ProcessorUnusable(Exception):
    """A processor cannot be used. The text contains the problem."""


@cache
def _load_all() -> tuple[dict[str, type[Processor]], dict[str, str]]:
    """Load all processors. Return the usable ones, and the problems of the others, by job type."""
    usable: dict[str, type[Processor]] = {}
    unusable: dict[str, str] = {}
    skipped = os.environ.get(UNUSABLE_PROCESSORS, "").split(",")
    for job_type, candidates in _find_entry_points().items():
        try:
            if job_type in skipped:
                raise ProcessorUnusable("it is unusable in the parent process")
            usable[job_type] = _load(job_type, candidates)
        except ProcessorUnusable as error:
            unusable[job_type] = str(error)
    _export_unusable(unusable)
    return usable, unusable


def load_processors() -> dict[str, type[Processor]]:
    """Return all usable processors by job type."""
    return _load_all()[0]


def get_unusable_job_types() -> dict[str, str]:
    """Return the job types whose processors are installed but unusable, with the problem of each."""
    return _load_all()[1]


def disable_job_type(job_type: str, reason: str) -> None:
    """Disable a job type in this process."""
    usable, unusable = _load_all()
    if usable.pop(job_type, None) is not None:
        unusable[job_type] = reason
        _export_unusable(unusable)


def _export_unusable(unusable: Iterable[str]) -> None:
    if names := ",".join(unusable):
        os.environ[UNUSABLE_PROCESSORS] = names


def is_built_in(job_type: str) -> bool:
    """Return whether a processor is part of Jobledger."""
    processor = load_processors().get(job_type)
    return processor is not None and processor.__module__.startswith(_BUILT_IN)


@cache
def get_processor_version(job_type: str) -> str:
    """Return the version of the processor's distribution, such as "jobledger 1.0"."""
    entry = _choose_entry_point(job_type, _find_entry_points()[job_type])
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""


def get_processor(job_type: str) -> type[Processor]:
    """Return the processor for a job type.

    Raises:
        LookupError: There is no such processor, or it is unusable.
    """
    return load_processors()[job_type]


def get_shared_directories(processor: type[Processor]) -> list[Path]:
    """Return the directories that all jobs of a type write to.

    Raises:
        TypeError: `shared_directories()` returned something else. It is third-party code and may raise anything.
    """
    paths: object = getattr(processor, "shared_directories", tuple)()
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str | Path) for path in paths):
        raise TypeError(f"shared_directories() must return a list or tuple of paths, not a {type(paths).__name__}")
    return [Path(path) for path in paths]


def check_preload(job_type: str) -> None:
    """Import the modules in a processor's `preload`, and call its `shared_directories`. May take seconds.

    Raises:
        ProcessorUnusable: A module cannot be imported, or `shared_directories()` failed.
    """
    processor = get_processor(job_type)
    _call_plugin_code(partial(get_shared_directories, processor), "shared_directories()", "called")
    for module in processor.preload:
        _call_plugin_code(partial(import_module, module), f"its module {module!r} (preload)", seconds=PRELOAD_SECONDS)


def check_plugins(environment: Iterable[str] = ()) -> None:
    """Disable plug-ins whose `preload` cannot be imported or whose `shared_directories()` fails. Blocks.

    The check runs in another process: this process must not load the modules, and a library may end the process that
    imports it. Built-in processors are not checked, `jobledger doctor` does that.

    Args:
        environment: Names of variables that job processes get besides the default ones. The check gets the same.
    """
    remaining = [
        name
        for name, processor in load_processors().items()
        if (processor.preload or hasattr(processor, "shared_directories")) and not is_built_in(name)
    ]
    while remaining:
        command = [sys.executable, "-m", "jobledger.workers.child.preload", *remaining]
        variables = {**build_job_environment(environment), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(  # noqa: S603 - our own command line
            command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=variables
        ) as process:
            watchdog = threading.Timer(len(remaining) * PRELOAD_SECONDS + LOAD_SECONDS, process.kill)
            watchdog.start()
            assert process.stdout is not None  # noqa: S101 - stdout=PIPE
            for line in process.stdout:
                name, separator, problem = line.rstrip("\n").partition("\t")
                if separator and name in remaining:  # ignores what a plug-in prints
                    remaining.remove(name)
                    if problem:
                        disable_job_type(name, problem)
            watchdog.cancel()
        if remaining:  # the process ended before it reported the next one
            disable_job_type(
                remaining.pop(0),
                f"its modules (preload) end the process that imports them (exit code {process.returncode})",
            )


def _find_entry_points() -> dict[str, list[EntryPoint]]:
    candidates: dict[str, list[EntryPoint]] = {}
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: (entry.name, entry.value)):
        same_type = candidates.setdefault(entry.name, [])
        if entry.value not in [other.value for other in same_type]:
            same_type.append(entry)
    return candidates


def _load(job_type: str, candidates: list[EntryPoint]) -> type[Processor]:
    entry = _choose_entry_point(job_type, candidates)
    processor = _call_plugin_code(entry.load, f"{entry.value}{_format_origin(entry)}")
    if problem := _call_plugin_code(lambda: _find_interface_problem(processor, job_type), entry.value):
        raise ProcessorUnusable(f"{entry.value}{_format_origin(entry)} is not a processor: {problem}")
    return processor  # type: ignore[no-any-return]  # checked above


def _choose_entry_point(job_type: str, candidates: list[EntryPoint]) -> EntryPoint:
    """Choose between entry points for the same job type. Plug-ins never replace built-in processors."""
    if len(candidates) == 1:
        return candidates[0]
    for entry in candidates:
        if entry.value.startswith(_BUILT_IN):
            return entry
    names = " and ".join(f"{entry.value}{_format_origin(entry)}" for entry in candidates)
    raise ProcessorUnusable(f"{names} both provide the job type {job_type!r}: uninstall all but one")


def _format_origin(entry: EntryPoint) -> str:
    return f" of {entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""


def _call_plugin_code(work: Callable[[], _T], what: str, verb: str = "imported", *, seconds: float | None = None) -> _T:
    """Call third-party code that runs at import or before an attempt, and return its result.

    The code runs in a thread that is abandoned if it hangs. An endless loop in it is interrupted.

    Args:
        work: The code to call.
        what: Name of the code in error messages.
        verb: Past participle of what is done with it, for error messages.
        seconds: Timeout. Default: `LOAD_SECONDS`.

    Raises:
        ProcessorUnusable: The code raised anything or did not return in time.
    """
    results: list[_T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - includes SystemExit and KeyboardInterrupt
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
        raise ProcessorUnusable(
            f"{what} cannot be {verb}: {type(error).__name__}: {_format_error(error)}{hint}"
        ) from error
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    rule = "to import: do not do work at import" if verb == "imported" else "to return: do not do work there"
    raise ProcessorUnusable(f"{what} took longer than {seconds:.0f} s {rule}")


def _format_error(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())[:300]
    except Exception:  # noqa: BLE001 - third-party code
        return "(no error text)"


def _find_interface_problem(processor: Any, job_type: str) -> str | None:
    """Return why a class is not a processor; None if it is one."""
    if not isinstance(processor, type):
        return f"expected a class, got {type(processor).__name__}"
    own = getattr(processor, "job_type", None)
    if own != job_type:
        return f"its `job_type` {own!r} must equal the name of its entry point {job_type!r}"
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
