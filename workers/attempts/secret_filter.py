"""Hide secrets in everything that attempts report, directly before it is written. Results and outputs are not changed.

All processors, in job processes and inline, report through the worker, so this is the one place that a plug-in cannot
pass by. The secrets are those in the settings of all processors, in other settings, in the environment of the worker,
and in files that these name. If hiding fails, the text is removed: no failure here fails a job or publishes a secret.
If the file system of these files does not respond, a report waits for two seconds at most.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import structlog
from pydantic import BaseModel

from jobledger.ledger.domain.commands import FailAttempt, ReleaseJob, ReportEvent, WorkerCommand
from jobledger.ledger.domain.events import ErrorInfo, JobCompleted, JobLogged, JobProgressed, StepCompleted
from jobledger.ledger.domain.limits import truncate_error
from jobledger.workers.secrets.hidden_secrets import HiddenSecrets
from jobledger.workers.secrets.secret_finder import MAX_SECRETS, FoundSecrets, merge_fairly, read_secret_file

_log = structlog.get_logger()
_READ_SECONDS: Final = 2.0
"""How long an attempt waits for secret files. Their file system may hang, which must not stop the worker."""
_PAUSE_SECONDS: Final = 10.0
"""How long files are not read after their file system has not responded."""
_MAX_FILES: Final = 100
_MAX_KEPT: Final = 10
"""Number of current and earlier secrets of a file, if it has no more current ones."""
_MAX_CHARACTERS_IN_LOOP: Final = 4096
"""Longer texts are searched in a thread, so that other tasks of the worker run."""
_MARKS_OF_CUT: Final = ("…", "...")
_NOTE: Final = "(This text was removed: the worker failed to hide secrets in it.)"
# A thread for these files only: on a file system that hangs, it never ends.
_file_executor = ThreadPoolExecutor(1, thread_name_prefix="secret-files")
_search_executor = ThreadPoolExecutor(1, thread_name_prefix="hide-secrets")
_Stamp = tuple[int, int, int] | None
_AttemptEvent = JobProgressed | JobLogged | StepCompleted | JobCompleted


class _File(NamedTuple):
    """A secret file as it was read.

    `secrets` contains those of the content before as well: a job may have read that one.
    """

    stamp: _Stamp
    secrets: list[str]


class SecretFilter:
    """The secrets of one worker.

    Args:
        processor_settings: The sections `processors.<job_type>` of config.yaml, by job type.
        models: The classes `Settings` of processors by job type. Only the types of their fields are used.
        environment: Environment variables.
    """

    def __init__(
        self,
        processor_settings: Mapping[str, Mapping[str, Any]],
        models: Mapping[str, type[BaseModel]],
        environment: Mapping[str, str],
    ) -> None:
        self._environment = environment
        self._sources: list[list[str]] = []
        self._files: dict[Path, None] = {}
        self._contents: dict[Path, _File] = {}
        self._next_read = 0.0
        self._reading: asyncio.Future[dict[Path, _File]] | None = None
        variables = FoundSecrets(environment)
        variables.add_environment()
        self._add(variables)
        for job_type, section in processor_settings.items():
            self._add_section(section, models.get(job_type))
        self._hidden = self._build_hidden_secrets()

    def add_settings(self, settings: Mapping[str, Any]) -> None:
        """Hide the secrets of other settings as well."""
        self._add_section(settings)
        self._hidden = self._build_hidden_secrets()

    def _add_section(self, section: Mapping[str, Any], model: type[BaseModel] | None = None) -> None:
        found = FoundSecrets(self._environment)
        found.add_settings(section, model)
        self._add(found)

    def _add(self, found: FoundSecrets) -> None:
        files = list(self._files | found.files)
        self._sources.append(list(found.texts))
        self._files = dict.fromkeys(files[:_MAX_FILES])
        if len(files) > _MAX_FILES or not found.is_complete:
            _log.warning("settings and environment are too large to find all secrets, some are not hidden")

    def _build_hidden_secrets(self) -> HiddenSecrets:
        secrets = merge_fairly([*self._sources, *(file.secrets for file in self._contents.values())])
        if len(secrets) > MAX_SECRETS:
            _log.warning("too many secrets, some are not hidden", found=len(secrets), limit=MAX_SECRETS)
        return HiddenSecrets(secrets[:MAX_SECRETS])

    async def refresh(self) -> None:
        """Read secret files that are new or have changed. Wait for them only for a moment."""
        if not self._files or time.monotonic() < self._next_read:
            return
        if self._reading is None:
            read = asyncio.get_running_loop().run_in_executor
            self._reading = read(_file_executor, _read_changed, list(self._files), dict(self._contents))
        reading = self._reading
        done, _ = await asyncio.wait({reading}, timeout=_READ_SECONDS)
        if self._reading is not reading:  # a concurrent call was first
            return
        if not done:
            self._next_read = time.monotonic() + _PAUSE_SECONDS
            _log.warning("cannot read files with secrets: the file system does not respond")
            return
        self._reading = None
        try:
            contents = reading.result()
        except Exception as error:  # noqa: BLE001 - attempts must not fail because of such a file
            _log.error("unexpected error while reading files with secrets", error=repr(error))
            return
        if contents != self._contents:
            self._contents = contents
            self._hidden = self._build_hidden_secrets()

    def hide(self, text: str) -> str:
        """Return the text with a placeholder instead of each secret."""
        return _hide_texts(self._hidden, [text])[0]

    async def hide_in_command(self, command: WorkerCommand) -> WorkerCommand:
        """Return the command with a placeholder instead of each secret in texts for people."""
        if self._hidden.is_empty and not self._files:
            return command
        match command:
            case ReportEvent(event=event):
                return ReportEvent(command.worker_id, await self._hide_in_event(event))
            case FailAttempt(error=error):
                return replace(command, error=await self._hide_in_error(truncate_error(error)))
            case ReleaseJob(reason=reason):
                [hidden] = await self._hide_in_texts([reason])
                return replace(command, reason=hidden)
            case _:
                return command

    async def _hide_in_event(self, event: _AttemptEvent) -> _AttemptEvent:
        match event:
            case JobLogged(entries=entries):
                messages = await self._hide_in_texts([entry.message for entry in entries])
                pairs = zip(entries, messages, strict=True)
                hidden = [entry.model_copy(update={"message": message}) for entry, message in pairs]
                return event.model_copy(update={"entries": hidden})
            case JobProgressed():
                [message] = await self._hide_in_texts([event.message])
                return event.model_copy(update={"step": self._hide_in_name(event.step), "message": message})
            case StepCompleted():
                warnings = await self._hide_in_texts(event.warnings)
                return event.model_copy(update={"step": self._hide_in_name(event.step), "warnings": warnings})
            case JobCompleted(results=results):
                warnings = await self._hide_in_texts(results.metadata.warnings)
                metadata = results.metadata.model_copy(update={"warnings": warnings})
                return event.model_copy(update={"results": results.model_copy(update={"metadata": metadata})})

    async def _hide_in_texts(self, texts: Sequence[str]) -> list[str]:
        await self.refresh()
        call = partial(_hide_texts, self._hidden, texts)
        if sum(map(len, texts)) <= _MAX_CHARACTERS_IN_LOOP:
            return call()
        return await asyncio.get_running_loop().run_in_executor(_search_executor, call)

    def _hide_in_name(self, name: str) -> str:
        """Hide secrets in the name of a step or the code of an error. Parts are hidden only if the name was cut."""
        may_be_cut = any(mark in name for mark in _MARKS_OF_CUT)
        return _hide_texts(self._hidden, [name], may_be_cut=may_be_cut)[0]

    async def _hide_in_error(self, error: ErrorInfo) -> ErrorInfo:
        [message] = await self._hide_in_texts([error.message])
        call = partial(_hide_in_details, self._hidden, error.details)
        details = await asyncio.get_running_loop().run_in_executor(_search_executor, call)
        return ErrorInfo(code=self._hide_in_name(error.code), message=message, details=details)


def _hide_texts(hidden: HiddenSecrets, texts: Sequence[str], *, may_be_cut: bool = True) -> list[str]:
    try:
        return [hidden.hide(text, may_be_cut=may_be_cut) for text in texts]
    except Exception:  # noqa: BLE001 - see the module. Not logged: the log uses this filter
        return [_NOTE] * len(texts)


def _hide_in_details(hidden: HiddenSecrets, details: dict[str, Any]) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", hidden.hide_in_json(details))
    except Exception as failure:  # noqa: BLE001 - see the module
        _log.error("cannot hide secrets in the details of an error", error=type(failure).__name__)
        return {"removed": _NOTE}


def _read_changed(files: Iterable[Path], contents: Mapping[Path, _File]) -> dict[Path, _File]:
    """Return the secrets in files. Only those that have changed are read. Blocks."""
    changed = dict(contents)
    for file in files:
        stamp = _read_stamp(file)
        before = contents.get(file)
        if before is not None and before.stamp == stamp:
            continue
        found = FoundSecrets()
        if (content := read_secret_file(file)) is not None:
            found.add_content(content)
        secrets = list(dict.fromkeys([*found.texts, *(before.secrets if before is not None else [])]))
        changed[file] = _File(stamp, secrets[: max(_MAX_KEPT, 2 * len(found.texts))])
    return changed


def _read_stamp(file: Path) -> _Stamp:
    """Return what changes whenever the content of a file does; None if it cannot be accessed."""
    try:
        status = file.stat()
    except (OSError, ValueError):
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
