"""Checks of `jobledger doctor` that need no database."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from jobledger.cli.checks.result import CheckResult
from jobledger.cli.settings import Settings
from jobledger.ledger.domain.errors import JobledgerError
from jobledger.ledger.mongo.embedded import find_mongod
from jobledger.ledger.system.disk_space import MIB, find_existing_directory, read_free_bytes
from jobledger.workers.machine.health import MachineFailure
from jobledger.workers.machine.scratch import ScratchDirectory
from jobledger.workers.registry import (
    ProcessorUnusable,
    check_plugins,
    check_preload,
    disable_job_type,
    get_app_problem,
    get_unusable_job_types,
    is_built_in,
    load_processors,
)
from jobledger.workers.sandbox import confinement, restrictions, runner

_LIBRARIES: Final = {"av": "video and audio", "pypdfium2": "PDF slides", "PIL": "images", "trafilatura": "web pages"}


def check_machine(settings: Settings) -> Iterator[CheckResult]:
    """Yield the results of all checks that need no database."""
    yield CheckResult("Python", sys.version_info >= (3, 11), sys.version.split()[0], "Install Python 3.11 or newer.")
    if settings.mongodb.is_embedded:
        yield _check("MongoDB server", lambda: str(find_mongod()))
        yield _check_disk_space("Database disk", settings.mongodb.data_dir, settings)
    if isinstance(store := settings.results.store, Path):
        yield _check_disk_space("Results disk", store, settings)
    for module, purpose in _LIBRARIES.items():
        yield _check(f"Library for {purpose}", partial(_get_version, module))
    check_plugins()
    for job_type in filter(is_built_in, list(load_processors())):
        try:
            check_preload(job_type)
        except ProcessorUnusable as error:
            disable_job_type(job_type, str(error))
    yield from check_confinement(settings)
    for job_type in sorted(load_processors()):
        source = "built in" if is_built_in(job_type) else "plug-in"
        yield CheckResult(f"Job type {job_type}", is_ok=True, detail=f"{source}, usable")
    if (problem := get_app_problem()) is not None:
        yield CheckResult("Application", is_ok=False, detail="not usable (jobs.app)", advice=problem)
    for job_type, reason in get_unusable_job_types().items():
        yield CheckResult(f"Job type {job_type}", is_ok=False, detail="not usable", advice=reason)
    yield _check("Scratch space", lambda: _check_scratch_directory(settings))


def check_confinement(settings: Settings) -> Iterator[CheckResult]:
    """Yield whether job processes and helper programs can be confined on this machine.

    Jobs also run without confinement, so a missing feature is a fault only if the settings require it.
    """
    mode, version = settings.event_worker.confinement, restrictions.get_landlock_version()
    if mode == "off":
        yield CheckResult("Confinement of jobs", is_ok=True, detail="off (event_worker.confinement)")
    elif version:
        limits = (
            "" if version >= restrictions.LANDLOCK_SIGNALS_VERSION else "; signals are not restricted before Linux 6.12"
        )
        if not restrictions.can_make_read_only():
            limits += "; modes and times of files are not protected, because jobs cannot have their own mounts"
        yield CheckResult("Confinement of jobs", is_ok=True, detail=f"Landlock, version {version}{limits}")
    else:
        hint = f". {confinement.LANDLOCK_ADVICE}" if mode == "auto" else ""
        detail = f"none: the kernel does not support Landlock{hint}"
        yield CheckResult("Confinement of jobs", mode == "auto", detail, confinement.LANDLOCK_ADVICE)
    probes = runner.probe_methods()
    detail = probes[-1].method
    if not probes[-1].is_working:
        reasons = "; ".join(f"{probe.method}: {probe.reason}" for probe in probes)
        detail = f"none ({reasons}): LibreOffice, yt-dlp, Chromium and Tesseract are not run. {runner.SANDBOX_ADVICE}"
    yield CheckResult("Sandbox for helper programs", is_ok=True, detail=detail)


def _check(name: str, check: Callable[[], str]) -> CheckResult:
    """Run a check that returns its detail, or raises if something is not usable."""
    try:
        return CheckResult(name, is_ok=True, detail=check())
    except (JobledgerError, MachineFailure, ImportError, OSError) as error:
        return CheckResult(name, is_ok=False, detail="not usable", advice=str(error))


def _check_scratch_directory(settings: Settings) -> str:
    worker = settings.event_worker
    scratch = ScratchDirectory(worker.scratch_dir, min_free_mb=worker.scratch_min_free_mb)
    try:
        scratch.check()
        return str(scratch.path.parent if scratch.path is not None else "")
    finally:
        scratch.close()


def _check_disk_space(name: str, directory: Path, settings: Settings) -> CheckResult:
    """Check whether there is enough space to accept new jobs."""
    min_free_mb = settings.results.min_free_mb
    try:
        free_mb = read_free_bytes(find_existing_directory(directory)) / MIB
    except OSError as error:
        return CheckResult(name, is_ok=False, detail="not readable", advice=str(error))
    advice = f"New jobs are rejected below {min_free_mb} MiB (results.min_free_mb): free disk space."
    return CheckResult(name, free_mb >= min_free_mb, f"{free_mb:,.0f} MiB free", advice)


def _get_version(module: str) -> str:
    loaded = importlib.import_module(module)
    return str(getattr(loaded, "__version__", "installed"))
