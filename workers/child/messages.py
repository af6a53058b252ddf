"""workers: the messages between a job and its worker, and how they are framed on a socket.

A frame is four bytes (big-endian length) and that much JSON. JSON and not pickle: a job process that hostile input has
taken over must not be able to run code in the worker. Messages that have an answer carry an id, and the answer carries
the same one, so any number of them may be on their way at once.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from jobledger.workers.processor import JSON, LogLevel
from jobledger.workers.result_conversion import format_validation_error, to_text

FRAME_HEADER: Final = struct.Struct(">I")
MAX_FRAME_BYTES: Final = 32 * 1024 * 1024  # of a frame that the worker accepts
MAX_FRAME_VALUES: Final = 1_500_000
"""Of a frame that the worker accepts: more than any value has that `jobledger.workers.result_conversion` accepts.
Reading 32 MiB of
empty lists would take eight seconds and 1.2 GB."""
_NO_STRUCTURE: Final = bytes(set(range(256)) - set(b'",[{'))
STOP_MESSAGE: Final = {"stop": True}
"""What the worker sends, instead of an answer, when the job is to stop."""

LogLine = tuple[float, LogLevel, str]
"""A line of the job's log: seconds since 1970, level, text."""


@dataclass(frozen=True, slots=True)
class LogEntries:
    """Lines for the job's log, in order."""

    entries: list[LogLine]
    kind: Literal["log"] = "log"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the whole job is, in percent."""

    step: str
    percent: float
    message: str
    kind: Literal["progress"] = "progress"


@dataclass(frozen=True, slots=True)
class FindSharedStep:
    """Ask for a step that another job shares. Answer: `{job_id, output}`, or None."""

    key: str
    max_age_s: float
    kind: Literal["find_shared_step"] = "find_shared_step"


@dataclass(frozen=True, slots=True)
class FileSaved:
    """A file is in the inbox. Answer: the path that it gets, when it is in the result store."""

    sha256: str
    path: str
    kind: Literal["file_saved"] = "file_saved"


@dataclass(frozen=True, slots=True)
class StepFinished:
    """A step is finished. Answer: None, when that is recorded. `duration_s` is in seconds."""

    step: str
    key: str
    output: JSON
    duration_s: float
    tokens_used: int
    warnings: list[str]
    reused_from: str | None = None
    is_shared: bool = False
    kind: Literal["step_finished"] = "step_finished"


@dataclass(frozen=True, slots=True)
class AttemptCompleted:
    """The processor's results. The last message of an attempt. `duration_s` is in seconds."""

    results: dict[str, JSON]
    warnings: list[str]
    duration_s: float
    kind: Literal["completed"] = "completed"


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """Why there are no results. The last message of an attempt.

    `errno` is that of the system error that led to it, if there was one: the worker finds out whose fault it is.
    """

    code: str
    message: str
    transient: bool = False
    details: dict[str, JSON] = field(default_factory=dict)
    errno: int | None = None
    kind: Literal["failed"] = "failed"


Message = LogEntries | Progress | FindSharedStep | FileSaved | StepFinished | AttemptCompleted | AttemptFailed


@dataclass(frozen=True, slots=True)
class MessageEnvelope:
    """A message of a job process; `id` is 0 if it has no answer."""

    request_id: int
    message: Annotated[Message, Field(discriminator="kind")]


_from_job = TypeAdapter(MessageEnvelope)


class InvalidMessage(Exception):
    """A job process sent what is no message. The text says why."""


def encode_frame(content: Any) -> bytes:
    """Return a frame with this content."""
    text = orjson.dumps(content)
    return FRAME_HEADER.pack(len(text)) + text


def decode_message(text: bytes) -> MessageEnvelope:
    """Return what a job process sent.

    Raises:
        InvalidMessage: it is not one of the messages above.
    """
    if len(text) > MAX_FRAME_VALUES and _has_too_many_values(text):
        raise InvalidMessage(f"message: more than {MAX_FRAME_VALUES:,} values")
    try:
        return _from_job.validate_json(text)
    except ValidationError as error:
        raise InvalidMessage(to_text(format_validation_error(error, "message"), 500)) from None


def _has_too_many_values(text: bytes) -> bool:
    """Count commas and opening brackets, first everywhere, and only if these are too many, outside of strings.

    It takes about 5 ms for each MiB. What is no JSON may be counted wrongly: reading it ends where it goes wrong.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) <= MAX_FRAME_VALUES:
        return False
    unescaped = text.replace(rb"\\", b"").replace(rb"\"", b"")
    structure = unescaped.translate(None, _NO_STRUCTURE)
    if structure.count(b'"') > 4 * MAX_FRAME_VALUES + 2:  # there is a key and a value at most for each of them
        return True
    return sum(map(len, structure.split(b'"')[::2])) > MAX_FRAME_VALUES
