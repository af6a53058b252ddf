"""The processor messages between a job and its worker, and their framing on a socket.

A frame consists of a length (four bytes, big-endian) and that many bytes of JSON. JSON rather than pickle: a job
process that was taken over by hostile input must not be able to run code in the worker. A request has an ID, and its
response contains the same ID, so any number of requests may be pending.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from jobledger.ledger.domain.events import ResultFile, StepCompleted
from jobledger.workers.processor import JSON, LogLevel
from jobledger.workers.results.conversion import format_validation_error, to_text

FRAME_HEADER: Final = struct.Struct(">I")
MAX_FRAME_BYTES: Final = 32 * 1024 * 1024
"""Maximum size of a frame that the worker accepts."""
MAX_FRAME_VALUES: Final = 1_500_000
"""Maximum number of values in a frame that the worker accepts.

It is more than any value has that `result_conversion` accepts. Parsing 32 MiB of empty lists would take eight seconds
and 1.2 GB.
"""
_NON_STRUCTURAL_BYTES: Final = bytes(set(range(256)) - set(b'",[{'))
STOP_MESSAGE: Final = {"stop": True}
"""Sent by the worker instead of a response when the job must stop."""

RawLogEntry = tuple[float, LogLevel, str, str]
"""An entry of the job's log: Unix time in seconds, level, text, and the name of the logger or an empty text."""


@dataclass(frozen=True, slots=True)
class LogEntries:
    """Entries for the job's log, in order."""

    entries: list[RawLogEntry]
    kind: Literal["log"] = "log"


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of the whole job, in percent."""

    step: str
    percent: float
    message: str
    kind: Literal["progress"] = "progress"


@dataclass(frozen=True, slots=True)
class FindSharedStep:
    """Requests a step that another job shares, not older than `max_age_s` seconds.

    Response: `{job_id, output, files}` or None.
    """

    key: str
    max_age_s: float
    kind: Literal["find_shared_step"] = "find_shared_step"


@dataclass(frozen=True, slots=True)
class FileSaved:
    """Reports a file in the inbox. Response: the reserved path, when the file is in the result store."""

    sha256: str
    path: str
    kind: Literal["file_saved"] = "file_saved"


@dataclass(frozen=True, slots=True)
class StepResult:
    """Reports a completed step. Response: None, when the event is stored.

    The worker sets the number of the attempt, and the cache version if the step is shared.
    """

    completed: StepCompleted
    is_shared: bool = False
    kind: Literal["step_completed"] = "step_completed"


@dataclass(frozen=True, slots=True)
class AttemptCompleted:
    """The processor's results. The last message of an attempt. `duration_s` is in seconds."""

    results: dict[str, JSON]
    warnings: list[str]
    duration_s: float
    kind: Literal["completed"] = "completed"


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """The reason why there are no results. The last message of an attempt.

    `errno` is the number of the system error that caused it, if there is one. The worker then checks its machine.
    """

    code: str
    message: str
    transient: bool = False
    details: dict[str, JSON] = field(default_factory=dict)
    errno: int | None = None
    kind: Literal["failed"] = "failed"


Message = LogEntries | Progress | FindSharedStep | FileSaved | StepResult | AttemptCompleted | AttemptFailed


@dataclass(frozen=True, slots=True)
class MessageEnvelope:
    """A message of a job process. `request_id` is 0 if the message has no response."""

    request_id: int
    message: Annotated[Message, Field(discriminator="kind")]


_envelope_adapter = TypeAdapter(MessageEnvelope)


class InvalidMessage(Exception):
    """A job process sent something that is not a valid message. The text contains the reason."""


def encode_frame(content: Any) -> bytes:
    """Return a frame with this content."""
    text = orjson.dumps(content, default=_convert_event)
    return FRAME_HEADER.pack(len(text)) + text


def _convert_event(value: object) -> dict[str, Any]:
    """Return the fields of the event in a `StepResult`, or of a file in it. orjson encodes no pydantic models.

    Raises:
        TypeError: The value is something else, which has no JSON.
    """
    if isinstance(value, StepCompleted | ResultFile):
        return dict(value)
    raise TypeError


def decode_message(text: bytes) -> MessageEnvelope:
    """Decode a message of a job process.

    Raises:
        InvalidMessage: It is not a valid message.
    """
    if len(text) > MAX_FRAME_VALUES and _has_too_many_values(text):
        raise InvalidMessage(f"message: more than {MAX_FRAME_VALUES:,} values")
    try:
        return _envelope_adapter.validate_json(text)
    except ValidationError as error:
        raise InvalidMessage(to_text(format_validation_error(error, "message"), 500)) from None


def _has_too_many_values(text: bytes) -> bool:
    """Count commas and opening brackets: first everywhere, and only if these are too many, outside of strings.

    This takes about 5 ms per MiB. Invalid JSON may be miscounted, but parsing it stops at the first error.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) <= MAX_FRAME_VALUES:
        return False
    unescaped = text.replace(rb"\\", b"").replace(rb"\"", b"")
    structure = unescaped.translate(None, _NON_STRUCTURAL_BYTES)
    if structure.count(b'"') > 4 * MAX_FRAME_VALUES + 2:  # each value has at most one key
        return True
    return sum(map(len, structure.split(b'"')[::2])) > MAX_FRAME_VALUES
