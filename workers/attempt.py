"""workers: one attempt at a job, as its processor sees it. Runs in the child process, or inline in the worker.

Everything the processor says becomes a message (plain JSON) for `execution.py`, which alone writes to the log.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ledger.chain import digest
from ledger.files import DirectoryStore
from workers.confinement import Confinement
from workers.processor import JSON, LogLevel, Processor, ProcessorError, Results, SavedFile
from workers.result_paths import normal_path

Message = dict[str, Any]
Send = Callable[[Message], Awaitable[Any]]
"""Sends a message to the worker. `seek` is answered with a shared step or None, `saved` with the path of the file."""


class Assignment(BaseModel):
    """What a processor needs to begin. `steps` maps the digest of a finished step's inputs to what it yielded."""

    job_id: str
    attempt: int
    job_type: str
    parameters: dict[str, Any]
    settings: dict[str, Any]
    steps: dict[str, FinishedStep]
    seek: bool = False
    """Whether finished steps of other jobs may be asked for."""
    inbox: Path
    """Where saved files go, by digest; the worker sees to the rest."""
    scratch: Path
    confinement: Confinement = Confinement()


class FinishedStep(BaseModel):
    """What a finished step yielded."""

    output: Any
    tokens_used: int = 0
    warnings: list[str] = []


Assignment.model_rebuild()


async def run(assignment: Assignment, processor: type[Processor], send: Send, stopping: threading.Event) -> None:
    """Do the job and send `done` or `failed` as the last message. Never raises for what the processor does wrong.

    Once `stopping` is set the job tells its processor that it is to stop.
    """
    begun = time.monotonic()
    try:
        job = _Job(assignment, processor.Parameters.model_validate(assignment.parameters), send, stopping)
        results = await processor(processor.Settings.model_validate(assignment.settings)).run(job)
    except ProcessorError as error:
        await send(
            {
                "is": "failed",
                "code": error.code,
                "message": error.message,
                "details": error.details,
                "transient": error.transient,
            }
        )
    except MemoryError:
        message = "The job needed more memory than event_worker.memory_limit_mb allows."
        await send({"is": "failed", "code": "OUT_OF_MEMORY", "message": message, "details": {}, "transient": False})
    except Exception as error:  # noqa: BLE001 - a processor is foreign code: whatever it raises fails the job, not us
        await send(_crashed(error))
    else:
        await send(job.done(results, time.monotonic() - begun))


def _crashed(error: Exception) -> Message:
    """A fault in the processor: where it happened helps whoever mends it, and is no secret to the job's owner."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else "unknown"
    return {
        "is": "failed",
        "code": "PROCESSOR_FAULT",
        "message": f"The processor failed unexpectedly: {type(error).__name__}: {error}",
        "details": {"exception": type(error).__name__, "at": where},
        "transient": False,
    }


class _Job:
    """What `processor.Job` promises."""

    def __init__(self, assignment: Assignment, parameters: BaseModel, send: Send, stopping: threading.Event) -> None:
        self.job_id = assignment.job_id
        self.attempt = assignment.attempt
        self._scratch = assignment.scratch
        self.parameters = parameters
        self._finished = assignment.steps
        self._seek = assignment.seek
        self._inbox = DirectoryStore(assignment.inbox)
        self._send = send
        self._step = "starting"
        self._warnings: list[str] = []
        self._tokens = 0
        self._stopping = stopping

    @property
    def cancelled(self) -> bool:
        return self._stopping.is_set()

    @property
    def scratch(self) -> Path:
        self._scratch.mkdir(mode=0o700, exist_ok=True)
        return self._scratch

    async def step(
        self,
        name: str,
        inputs: Mapping[str, JSON],
        function: Callable[[], Awaitable[JSON]],
        *,
        share: timedelta | None = None,
    ) -> JSON:
        self._step = name
        key = digest({"step": name, "inputs": dict(inputs)})
        if (known := self._finished.get(key)) is not None:
            self._warnings += known.warnings
            self._tokens += known.tokens_used
            await self.log("info", f"Step {name} was finished by an earlier attempt and is not repeated.")
            return known.output
        begun, warned, spent = time.monotonic(), len(self._warnings), self._tokens
        found = None
        if share is not None and self._seek:
            found = await self._send({"is": "seek", "key": key, "max_age_s": share.total_seconds()})
        if found is not None:
            await self.log("info", f"Step {name} was finished by {found['job_id']} and is not repeated.")
        output = await function() if found is None else found["output"]
        await self._send(
            {
                "is": "step",
                "step": name,
                "key": key,
                "output": output,
                "duration_s": round(time.monotonic() - begun, 3),
                "tokens_used": self._tokens - spent,
                "warnings": self._warnings[warned:],
                "reused_from": found and found["job_id"],
                "share": share is not None,
            }
        )
        return output

    async def progress(self, percent: float, message: str) -> None:
        await self._send(
            {
                "is": "progress",
                "step": self._step,
                "percent": round(min(max(percent, 0.0), 100.0), 1),
                "message": message,
            }
        )

    async def log(self, level: LogLevel, message: str) -> None:
        await self._send({"is": "log", "at": datetime.now(UTC).isoformat(), "level": level, "message": message})

    async def warn(self, message: str) -> None:
        self._warnings.append(message)
        await self.log("warning", message)

    def spent(self, tokens: int) -> None:
        self._tokens += tokens

    async def save(self, path: str, content: bytes | Path, media_type: str) -> SavedFile:
        put = self._inbox.put_bytes if isinstance(content, bytes) else self._inbox.put_file
        path = normal_path(path)
        stored = await asyncio.to_thread(put, content)  # type: ignore[arg-type]  # the type was just asked for
        path = await self._send({"is": "saved", "sha256": stored.sha256, "path": path})
        return SavedFile(path=path, sha256=stored.sha256, size=stored.size, media_type=media_type)

    def done(self, results: Results, seconds: float) -> Message:
        return {
            "is": "done",
            "results": {**results.model_dump(), "tokens_used": results.tokens_used + self._tokens},
            "warnings": self._warnings,
            "duration_s": round(seconds, 3),
        }
