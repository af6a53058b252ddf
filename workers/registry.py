"""The registry of job types: entry points in the group `jobledger.processors`, and those of the application.

An entry point names a job function or a processor class. The application is what `--app` or `jobs.app` names. Both are
third-party code. If a job type cannot be used, no other one is affected. `get_unusable_job_types` returns the reasons.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Final, TypeVar

from pydantic import BaseModel

from jobledger.workers.job_types.app import JobType, find_app
from jobledger.workers.job_types.function import JobFunction
from jobledger.workers.processor import Processor
from jobledger.workers.retry import DEFAULT_TIMEOUT_SECONDS, Retry, parse_timeout
from jobledger.workers.sandbox.confinement import APP_VARIABLE, UNUSABLE_PROCESSORS, build_job_environment
from jobledger.workers.secrets.secret_finder import hide_secrets_of

ENTRY_POINT_GROUP: Final = "jobledger.processors"
LOAD_SECONDS: Final = 30.0
"""Timeout for importing a processor."""
PRELOAD_SECONDS: Final = 120.0
_BUILT_IN: Final = "jobledger.workers."
_DEFAULT_RETRY: Final = Retry()
_given: Final[dict[str, type[Processor]]] = {}
"""Processors of `use_processor`, by job type."""
_T = TypeVar("_T")


class ProcessorUnusable(Exception):
    """A processor cannot be used. The text contains the problem."""


@dataclass(frozen=True, slots=True)
class _Registry:
    """What was loaded: the usable processors, and the problems of the others, by job type.

    Attributes:
        app_problem: Why the application cannot be used; None if it can, or there is none.
    """

    usable: dict[str, type[Processor]]
    unusable: dict[str, str]
    app_problem: str | None = None


@cache
def _load_all() -> _Registry:
    """Load all job types."""
    usable: dict[str, type[Processor]] = {}
    unusable: dict[str, str] = {}
    skipped = os.environ.get(UNUSABLE_PROCESSORS, "").split(",")
    entries, (app_jobs, app_problem) = _find_entry_points(), _load_app()
    for job_type in sorted(entries.keys() | app_jobs.keys()):
        try:
            if job_type in skipped:
                raise ProcessorUnusable("it is unusable in the parent process")
            usable[job_type] = _load(job_type, entries.get(job_type, []), app_jobs.get(job_type))
        except ProcessorUnusable as error:
            unusable[job_type] = hide_secrets_of(str(error), os.environ)
    _export_unusable(unusable)
    return _Registry(usable, unusable, app_problem)


def use_app(app: str | None, directory: Path) -> None:
    """Use the job types of an application, in this process and in its child processes.

    Args:
        app: `package.module` or `package.module:name`; None: none.
        directory: The directory from which it is imported.
    """
    if app is not None and os.fspath(directory) not in sys.path:
        sys.path.insert(0, os.fspath(directory))
    if os.environ.get(APP_VARIABLE) == app:
        return
    if app is None:
        del os.environ[APP_VARIABLE]
    else:
        os.environ[APP_VARIABLE] = app
    clear_registry()


def clear_registry() -> None:
    """Forget what was loaded: the next call loads all job types again."""
    os.environ.pop(UNUSABLE_PROCESSORS, None)
    _load_all.cache_clear()
    get_processor_version.cache_clear()


def _load_app() -> tuple[Mapping[str, JobType], str | None]:
    """Return the job types of the application, and why it cannot be used, if so."""
    name = os.environ.get(APP_VARIABLE)
    if name is None:
        return {}, None
    try:
        # Without a colon, `resolve_name` hides an ImportError of the module.
        jobs = _call_plugin_code(lambda: find_app(resolve_name(name if ":" in name else f"{name}:")).jobs, name)
    except ProcessorUnusable as error:
        return {}, hide_secrets_of(str(error), os.environ)
    built_in = [
        job_type
        for job_type, entries in _find_entry_points().items()
        if job_type in jobs and any(entry.value.startswith(_BUILT_IN) for entry in entries)
    ]
    problem = f"{name}: the job type {built_in[0]!r} is built in: rename the job" if built_in else None
    return {job_type: item for job_type, item in jobs.items() if job_type not in built_in}, problem


def get_app_problem() -> str | None:
    """Return why the application cannot be used; None if it can, or there is none."""
    return _load_all().app_problem


def load_processors() -> dict[str, type[Processor]]:
    """Return all usable processors by job type."""
    return _load_all().usable


def get_unusable_job_types() -> dict[str, str]:
    """Return the job types whose processors are installed but unusable, with the problem of each."""
    return _load_all().unusable


def disable_job_type(job_type: str, reason: str, section: Mapping[str, Any] | None = None) -> None:
    """Disable a job type in this process.

    Args:
        job_type: The job type.
        reason: Shown to users, without secrets.
        section: The settings of the job type in config.yaml, if the reason may contain secrets in them.
    """
    registry = _load_all()
    if (processor := registry.usable.pop(job_type, None)) is not None:
        registry.unusable[job_type] = hide_secrets_of(reason, os.environ, section, processor.Settings)
        _export_unusable(registry.unusable)


def _export_unusable(unusable: Iterable[str]) -> None:
    if names := ",".join(unusable):
        os.environ[UNUSABLE_PROCESSORS] = names


def is_built_in(job_type: str) -> bool:
    """Return whether a processor is part of Jobledger."""
    processor = load_processors().get(job_type)
    return processor is not None and processor.__module__.startswith(_BUILT_IN)


@cache
def get_processor_version(job_type: str) -> str:
    """Return the version of a job type: its own, or that of its distribution, such as "jobledger 1.0"."""
    if version := getattr(get_processor(job_type), "version", ""):
        return str(version)
    entries = _find_entry_points().get(job_type)
    entry = _choose_entry_point(job_type, entries) if entries else None
    return f"{entry.dist.name} {entry.dist.version}" if entry is not None and entry.dist is not None else ""


def get_processor(job_type: str) -> type[Processor]:
    """Return the processor for a job type.

    Raises:
        LookupError: There is no such processor, or it is unusable.
    """
    return _given.get(job_type) or load_processors()[job_type]


@contextmanager
def use_processor(processor: type[Processor]) -> Iterator[None]:
    """Use a processor in the block, in this process, without loading others. `jobledger.testing` runs it."""
    previous = _given.get(processor.job_type)
    _given[processor.job_type] = processor
    get_processor_version.cache_clear()
    try:
        yield
    finally:
        del _given[processor.job_type]
        if previous is not None:
            _given[processor.job_type] = previous
        get_processor_version.cache_clear()


def get_retry(processor: type[Processor]) -> Retry | None:
    """Return when failed jobs of a type are retried; None: never."""
    retry: Retry | None = getattr(processor, "retry", _DEFAULT_RETRY)
    return retry


def get_default_timeout(processor: type[Processor]) -> float:
    """Return the timeout of jobs whose submission has none, in seconds."""
    timeout = getattr(processor, "timeout", None)
    return DEFAULT_TIMEOUT_SECONDS if timeout is None else parse_timeout(timeout, "timeout")


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


def _load(job_type: str, entries: list[EntryPoint], app_job: JobType | None) -> type[Processor]:
    if app_job is not None:
        name = f"{app_job!r} of {os.environ[APP_VARIABLE]}"
        if entries and _call_plugin_code(_choose_entry_point(job_type, entries).load, entries[0].value) is not app_job:
            others = " and ".join(f"{entry.value}{_format_origin(entry)}" for entry in entries)
            raise ProcessorUnusable(f"{name} and {others} both provide the job type {job_type!r}: rename one")
        return _check_job_type(app_job, job_type, name, "name")
    entry = _choose_entry_point(job_type, entries)
    target = _call_plugin_code(entry.load, f"{entry.value}{_format_origin(entry)}")
    return _check_job_type(target, job_type, f"{entry.value}{_format_origin(entry)}", "name of its entry point")


def _check_job_type(target: Any, job_type: str, name: str, required_name: str) -> type[Processor]:
    """Return the processor of a job function or class, after a check of its interface.

    Raises:
        ProcessorUnusable: A part of the interface is missing or wrong.
    """
    if isinstance(target, JobFunction):
        if target.name != job_type:
            raise ProcessorUnusable(f"{name}: its name {target.name!r} must equal the {required_name} {job_type!r}")
        target = target.processor
    if problem := _call_plugin_code(lambda: _find_interface_problem(target, job_type), name):
        raise ProcessorUnusable(f"{name} is not a job type: {problem}")
    return target  # type: ignore[no-any-return]  # checked above


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
        text = f"{type(error).__name__}: {_format_error(error)}{_find_line(error)}{_suggest_fix(error, what)}"
        raise ProcessorUnusable(f"{what} cannot be {verb}: {text}") from error
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    rule = "to import: do not do work at import" if verb == "imported" else "to return: do not do work there"
    raise ProcessorUnusable(f"{what} took longer than {seconds:.0f} s {rule}")


def _find_line(error: BaseException) -> str:
    """Return the line of the innermost module that could not be imported, in parentheses."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in frames if frame.name == "<module>"]
    return lines[-1] if lines and not isinstance(error, SyntaxError) else ""  # its text has the line


def _suggest_fix(error: BaseException, what: str) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return ""
    if what == os.environ.get(APP_VARIABLE) and f"{what.partition(':')[0]}.".startswith(f"{error.name}."):
        return "; use the directory that contains it as working directory or --app-dir"
    return f"; install the package with {error.name!r}"


def _format_error(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())[:300]
    except Exception:  # noqa: BLE001 - third-party code
        return "(no error text)"


def _find_interface_problem(processor: Any, job_type: str) -> str | None:
    """Return why an object is not a processor; None if it is one."""
    if not isinstance(processor, type):
        return f"expected a job function (decorated with @jobledger.job) or a class, got {type(processor).__name__}"
    own = getattr(processor, "job_type", None)
    if own != job_type:
        return f"its `job_type` {own!r} must equal the name of its entry point {job_type!r}"
    if getattr(processor, "isolation", None) not in ("process", "inline"):
        return f"`isolation` must be 'process' or 'inline', not {getattr(processor, 'isolation', None)!r}"
    return (
        _find_model_problem(processor)
        or _find_method_problem(processor)
        or _find_preload_problem(processor)
        or _find_policy_problem(processor)
    )


def _find_model_problem(processor: Any) -> str | None:
    for name in ("Parameters", "Settings"):
        model = getattr(processor, name, None)
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return f"`{name}` must be a subclass of pydantic.BaseModel"
        model.model_json_schema()
    model, where = processor.Parameters, f"{processor.Parameters.__module__}:{processor.Parameters.__qualname__}"
    try:
        found = resolve_name(where)
    except (AttributeError, ImportError, ValueError):
        found = None
    if found is not model:
        return (
            f"`Parameters` cannot be imported as {where}, which the API does: define it at the top of its module, and "
            "a job function under its own name"
        )
    return None


def _find_method_problem(processor: Any) -> str | None:
    run = getattr(processor, "run", None)
    if not callable(run):
        return "`async def run(self, job)` is missing"
    try:
        inspect.signature(processor).bind(None)
        inspect.signature(run).bind(None, None)
    except TypeError:
        return "expected `__init__(self, settings)` and `async def run(self, job)`"
    if not inspect.iscoroutinefunction(inspect.unwrap(run)):
        return "`run` must be asynchronous: `async def run(self, job)`"
    return None


def _find_policy_problem(processor: Any) -> str | None:
    retry = getattr(processor, "retry", None)
    if not (retry is None or isinstance(retry, Retry)):
        return f"`retry` must be a jobledger.Retry or None, not {retry!r}"
    try:
        get_default_timeout(processor)
    except (TypeError, ValueError) as error:
        return f"`timeout`: {error}"
    version = getattr(processor, "version", "")
    if isinstance(version, bool) or not isinstance(version, str | int):
        return f"`version` must be text or an integer, not {version!r}"
    return None


def _find_preload_problem(processor: Any) -> str | None:
    preload = getattr(processor, "preload", None)
    if isinstance(preload, str) or not isinstance(preload, list | tuple):
        return "`preload` must be a tuple of module names; () for none"
    for module in preload:
        if not isinstance(module, str) or find_spec(module.partition(".")[0]) is None:
            return f"its module {module!r} (preload) is not installed"
    return None
