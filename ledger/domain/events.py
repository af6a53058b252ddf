"""The catalog of all events: one class each, in the past tense, with one sentence of description.

The class name is the event's type in the database; its fields are the payload. Payloads are never rewritten. `schema`
is the version of a payload, and older payloads are upgraded when they are read (`UPCASTERS`). Pure: no database, no
clock, no event loop.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated, Any, ClassVar, Final, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from jobledger.ledger.domain.canonical_json import encode_canonical_json
from jobledger.ledger.domain.errors import InvalidEvent, UnreadableEvent, UnsupportedEvent

_SUB_MILLISECONDS = [timedelta(microseconds=microseconds) for microseconds in range(1000)]


def truncate_to_milliseconds(time: datetime) -> datetime:
    """Return a time in UTC, truncated to the milliseconds that BSON keeps, so that hashes stay valid.

    Raises:
        ValueError: In UTC the time is before year 1 or after year 9999.
    """
    try:
        if time.tzinfo is not UTC:
            time = time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except OverflowError as error:
        raise ValueError("the time is outside the years 1 to 9999") from error
    return time - _SUB_MILLISECONDS[time.microsecond % 1000]  # eight times as fast as replace()


def _to_compact(number: float) -> float:
    """Return a whole number as an integer: hashing 3600.0 takes ten times as long as 3600, and both mean the same."""
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


UtcDatetime = Annotated[datetime, AfterValidator(truncate_to_milliseconds)]
CompactFloat = Annotated[float, PlainSerializer(_to_compact)]
OptionalText = Annotated[str | None, Field(exclude_if=lambda value: value is None)]
"""Omitted if None: a null in a payload makes hashing ten times slower."""
LogLevel = Literal["debug", "info", "warning", "error"]
WorkerStopReason = Literal["stopped", "failed"]
ClaimVia = Literal["dispatched", "fresh", "queue"]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class AccessControl(_Value):
    """Who, in addition to the owner, may read or change a job or batch (konzept.md, "Benutzer-Autorisierung")."""

    visibility: Literal["private", "team", "public"] = "private"
    read_access: list[str] = Field(default_factory=list)
    write_access: list[str] = Field(default_factory=list)
    admin_access: list[str] = Field(default_factory=list)


Teams = Annotated[list[str], Field(exclude_if=operator.not_)]
"""The groups of the owner at submission. Omitted if empty."""


class Webhook(_Value):
    """Where to send a message when the job or batch is finished.

    The log contains no header values and signing secrets. `secrets_ref` is the ID of the document that holds them.

    `has_own_secrets`: the message is signed with the secrets of the submission, not with the endpoint's.
    """

    url: str
    header_names: list[str] = Field(default_factory=list)
    secrets_ref: str | None = None
    include_markdown: bool = False
    include_metadata: bool = False
    has_own_secrets: Annotated[bool, Field(exclude_if=operator.not_)] = False


class ErrorInfo(_Value):
    """Why an attempt or a delivery attempt failed: a stable code for programs and a message for people."""

    code: str
    message: str
    details: dict[str, Any] = Field(default_factory=dict)


class LogEntry(_Value):
    """One entry of a job's log. `logger` is the name of the logger that wrote it, if any."""

    timestamp: UtcDatetime
    level: LogLevel
    message: str
    logger: OptionalText = None


class ResultFile(_Value):
    """A file, identified by its digest. `path` is relative to the URL of the results; `size` is in bytes."""

    path: str
    sha256: str
    size: int
    media_type: str


class Asset(_Value):
    """A result that is available at a URL."""

    type: str
    path: str
    url: str


class ResultMetadata(_Value):
    """How a job was processed: `duration` is in seconds. Processors may add fields."""

    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)

    processed_at: UtcDatetime
    duration: CompactFloat
    tokens_used: int = 0
    warnings: list[str] = Field(default_factory=list)


class JobResults(_Value):
    """The results of a job. `output` is the value that the job returned."""

    output: Annotated[Any, Field(exclude_if=lambda value: value is None)] = None
    markdown_file: OptionalText = None
    markdown_url: OptionalText = None
    assets: list[Asset] = Field(default_factory=list)
    files: list[ResultFile] = Field(default_factory=list)
    metadata: ResultMetadata


class ParameterChange(_Value):
    """A changed parameter. A value is null if it is absent, or larger than 1024 bytes as JSON."""

    name: str
    kind: Literal["added", "changed", "removed"]
    before: Any = None
    after: Any = None


class Event(BaseModel):
    """A fact about a job, batch, delivery or worker. `schema_version` is the version of its payload (`schema`)."""

    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)
    schema_version: ClassVar[int] = 1

    def to_payload(self) -> dict[str, Any]:
        """Return the fields as the database stores them. Optional fields without a value are omitted."""
        absent = {name for name in _get_optional_fields(type(self)) if getattr(self, name) is None}
        payload: dict[str, Any] = self.__pydantic_serializer__.to_python(self, exclude=absent or None)
        return payload


@cache
def _get_optional_fields(event: type[Event]) -> tuple[str, ...]:
    return tuple(name for name, info in event.model_fields.items() if info.default is None)


class _UserEvent(Event):
    """`by` is the actor, such as `user:alice`."""

    by: str
    reason: str | None = None


class _AttemptEvent(Event):
    attempt: int


class _WorkerEvent(Event):
    worker_id: str
    attempt: int


class _AccessChanged(Event):
    by: str
    access_control: AccessControl


# The job stream ---------------------------------------------------------------------------------------------------


class JobSubmitted(Event):
    """A job was submitted."""

    job_type: str
    parameters: dict[str, Any]
    batch_id: str | None = None
    job_name: str | None = None
    user_id: str
    access_control: AccessControl = AccessControl()
    teams: Teams = Field(default_factory=list)
    webhook: Webhook | None = None
    priority: int = 1
    not_before: UtcDatetime | None = None
    max_attempts: int = 3
    timeout_s: CompactFloat = 3600.0
    template: str | None = None


class JobClaimed(_WorkerEvent):
    """The job was claimed for a worker, by the worker or at the submission.

    Attempt `attempt` has begun, and only this attempt may report on the job. `via` says how the worker found the job:
    with its submission (`dispatched`), by its event (`fresh`), or in the queue. `seen` is the last position of the log
    that the worker had observed when it decided, and `free_slots` the jobs of this type that it could start then.
    """

    via: ClaimVia | None = None
    seen: int | None = None
    free_slots: int | None = None


class JobProgressed(_AttemptEvent):
    """The attempt reported progress: the percentage of the whole job, and what it is doing."""

    step: str
    percent: CompactFloat
    message: str


class JobLogged(_AttemptEvent):
    """The attempt wrote log entries. They are in order."""

    entries: list[LogEntry]


class StepCompleted(_AttemptEvent):
    """The attempt completed a step. The step need not run again for inputs with the same digest `key`.

    `reused_from` is the job whose output was reused, if any. `cache_version` is the version of the processor whose
    later jobs of the same owner and type may reuse the output. None means that no other job may.
    `repeat_on_restart`: the cause of a warning may be gone later. Attempts reuse the step until the job is restarted.
    `files` are the files that were saved in the step and that `output` does not name.
    """

    step: str
    key: str
    output: Any
    duration_s: CompactFloat
    tokens_used: int = 0
    warnings: list[str] = Field(default_factory=list)
    reused_from: str | None = None
    cache_version: str | None = None
    repeat_on_restart: Annotated[bool, Field(exclude_if=operator.not_)] = False
    files: Annotated[list[ResultFile], Field(exclude_if=operator.not_)] = Field(default_factory=list)


class JobCompleted(_AttemptEvent):
    """The job completed, and its result files are stored."""

    results: JobResults


class JobAttemptFailed(_AttemptEvent):
    """The attempt failed with a transient error. The job is pending until `retry_at` and is then retried."""

    error: ErrorInfo
    retry_at: UtcDatetime


class JobFailed(_AttemptEvent):
    """The job failed: the error is permanent, or all attempts are used up."""

    error: ErrorInfo


class JobLeaseExpired(_WorkerEvent):
    """The worker stopped sending heartbeats. Its attempt has ended, and the job is pending again."""


class JobReleased(_WorkerEvent):
    """The worker returned the job to the queue, for example at shutdown. The attempt does not count.

    `is_machine_failure`: the worker's machine could not run the job.
    """

    reason: str
    is_machine_failure: bool = False


class JobCancelRequested(_UserEvent):
    """A user requested to cancel a running job. Its worker stops it."""


class JobCancelled(_UserEvent):
    """The job was cancelled."""


class JobRestarted(_UserEvent):
    """A finished job was restarted.

    `reuse_steps`: its completed steps are reused, except those with `repeat_on_restart`. Otherwise all are repeated.
    """

    reuse_steps: bool = True


class JobUpdated(Event):
    """A pending job was changed, perhaps by the request that restarted it. Fields without a value stay as they are.

    `parameters` are all new parameters. `difference` says what changed in them: the first 100 names in order.
    """

    by: str
    parameters: dict[str, Any] | None = None
    priority: int | None = None
    not_before: UtcDatetime | None = None
    difference: Annotated[list[ParameterChange], Field(exclude_if=operator.not_)] = Field(default_factory=list)


class JobAccessChanged(_AccessChanged):
    """The job's access control was replaced."""


class JobArchived(_UserEvent):
    """The job was archived: default lists hide it."""


class JobUnarchived(_UserEvent):
    """The job was unarchived: default lists show it again."""


class JobDeleted(_UserEvent):
    """The job was deleted from the views, and its files are no longer served. Its history stays."""


class WorkerFenced(_WorkerEvent):
    """A worker reported for an attempt that had ended, and the report was rejected."""

    rejected_event: str


# The batch stream -------------------------------------------------------------------------------------------------


class BatchJobCounts(_Value):
    """The number of a batch's finished jobs per status."""

    completed: int = 0
    failed: int = 0
    cancelled: int = 0


class BatchSummary(_Value):
    """What a batch used: processing time in seconds (the sum over its jobs) and language-model tokens."""

    duration: CompactFloat = 0.0
    tokens_used: int = 0


class BatchSubmitted(Event):
    """A batch of jobs was submitted. Its jobs' `JobSubmitted` events are in the same transaction."""

    batch_name: str | None = None
    total_jobs: int
    job_ids: list[str]
    parameters: dict[str, Any] = Field(default_factory=dict)
    webhook: Webhook | None = None
    user_id: str
    access_control: AccessControl = AccessControl()
    teams: Teams = Field(default_factory=list)


class BatchPaused(_UserEvent):
    """The batch was paused: its pending jobs do not start."""


class BatchResumed(_UserEvent):
    """The batch was resumed: its pending jobs may start again."""


class BatchFinished(Event):
    """All jobs of the batch are finished."""

    status: Literal["completed", "partial", "failed"]
    counts: BatchJobCounts
    summary: BatchSummary


class BatchReopened(Event):
    """A job of the finished batch was restarted."""


class BatchAccessChanged(_AccessChanged):
    """The batch's access control was replaced. Each of its jobs has its own access control."""


class BatchArchived(_UserEvent):
    """The batch was archived: default lists hide it."""


class BatchUnarchived(_UserEvent):
    """The batch was unarchived: default lists show it again."""


class BatchDeleted(_UserEvent):
    """The batch was deleted from the views. Its history stays."""


# The delivery stream ----------------------------------------------------------------------------------------------

WebhookEventType = Literal[
    "job.completed", "job.failed", "job.cancelled", "batch.completed", "batch.partial", "batch.failed"
]


class DeliveryQueued(Event):
    """A webhook message is to be sent.

    The job or batch `source` finished with the event at `source_version` of its stream.
    """

    source: str
    source_version: int
    event_type: WebhookEventType
    user_id: str
    webhook: Webhook
    batch_id: str | None = None


class DeliveryAttempted(_AttemptEvent):
    """The endpoint was called.

    `response` is the beginning of its response. `error` is present unless the status is 2xx. `body_sha256` is the
    digest of the message body in hex. `next_attempt_at` is the time of the next attempt.
    """

    status_code: int | None = None
    error: ErrorInfo | None = None
    response: str = ""
    duration_s: CompactFloat
    body_sha256: str | None = None
    next_attempt_at: UtcDatetime | None = None


class DeliverySucceeded(_AttemptEvent):
    """The endpoint accepted the message with status 2xx."""


class DeliveryAbandoned(Event):
    """The delivery is no longer retried unless a user redelivers it."""

    reason: str


class DeliveryRequeued(_UserEvent):
    """A user requested to send the message again. The retry schedule starts over."""


# The worker stream ------------------------------------------------------------------------------------------------


class WorkerStarted(Event):
    """A worker began to claim jobs. Its stream is `worker-` and the ID that its claims have.

    `slots` is the number of jobs that it runs at the same time. `settings_digest` is the digest of the settings
    `event_worker`, which have no secrets: two workers with the same digest are configured alike.
    """

    host: str
    slots: int
    job_types: list[str]
    software_version: str
    settings_digest: str


class WorkerStopped(Event):
    """A worker stopped: it was asked to (`stopped`), or an error ended it (`failed`). It released unfinished jobs."""

    reason: WorkerStopReason


class WorkerLost(Event):
    """Another worker found that a worker had stopped sending heartbeats. The jobs of the lost one become pending."""

    declared_by: str


# Log housekeeping -------------------------------------------------------------------------------------------------


class PositionVoided(Event):
    """A position without an event of a stream: its appender reserved it and did not use it."""


JobEvent = (
    JobSubmitted
    | JobClaimed
    | JobProgressed
    | JobLogged
    | StepCompleted
    | JobCompleted
    | JobAttemptFailed
    | JobFailed
    | JobLeaseExpired
    | JobReleased
    | JobCancelRequested
    | JobCancelled
    | JobRestarted
    | JobUpdated
    | JobAccessChanged
    | JobArchived
    | JobUnarchived
    | JobDeleted
    | WorkerFenced
)
BatchEvent = (
    BatchSubmitted
    | BatchPaused
    | BatchResumed
    | BatchFinished
    | BatchReopened
    | BatchAccessChanged
    | BatchArchived
    | BatchUnarchived
    | BatchDeleted
)
DeliveryEvent = DeliveryQueued | DeliveryAttempted | DeliverySucceeded | DeliveryAbandoned | DeliveryRequeued
WorkerStreamEvent = WorkerStarted | WorkerStopped | WorkerLost
JOB_EVENTS: tuple[type[Event], ...] = get_args(JobEvent)
BATCH_EVENTS: tuple[type[Event], ...] = get_args(BatchEvent)
DELIVERY_EVENTS: tuple[type[Event], ...] = get_args(DeliveryEvent)
WORKER_EVENTS: tuple[type[Event], ...] = get_args(WorkerStreamEvent)
VALUE_TYPES: tuple[type[BaseModel], ...] = tuple(_Value.__subclasses__())
"""The models of the objects in payloads."""
EVENT_TYPES: Mapping[str, type[Event]] = {
    event.__name__: event for event in JOB_EVENTS + BATCH_EVENTS + DELIVERY_EVENTS + WORKER_EVENTS + (PositionVoided,)
}


@dataclass(frozen=True, slots=True)
class EventMetadata:
    """Where an event comes from.

    Attributes:
        actor: Who caused it: `user:…`, `worker:…` or `system`.
        correlation_id: Its batch or request.
        causation_id: The `event_id` of its cause.
        traceparent: The W3C trace context.
        request_fingerprint: Distinguishes a repeated request with the same `Idempotency-Key` from a new one.
    """

    actor: str = "system"
    correlation_id: str | None = None
    causation_id: str | None = None
    traceparent: str | None = None
    request_fingerprint: str | None = None

    def to_document(self) -> dict[str, str]:
        """Return the fields that have a value, as the database stores them."""
        payload = {"actor": self.actor}  # one statement for each field: five times as fast as a loop
        if self.correlation_id is not None:
            payload["correlation_id"] = self.correlation_id
        if self.causation_id is not None:
            payload["causation_id"] = self.causation_id
        if self.traceparent is not None:
            payload["traceparent"] = self.traceparent
        if self.request_fingerprint is not None:
            payload["request_fingerprint"] = self.request_fingerprint
        return payload

    @classmethod
    def from_stored(cls, stored: Mapping[str, str]) -> EventMetadata:
        """Return the metadata of a stored event. Fields of later versions are ignored."""
        return cls(stored.get("actor", "system"), *map(stored.get, _METADATA_FIELDS[1:]))


_METADATA_FIELDS: Final = tuple(it.name for it in fields(EventMetadata))
_HASHED_FIELDS: Final = ("data", "event_id", "meta", "prev", "schema", "stream", "time", "type", "version")
UNKNOWN_TIME = datetime(1970, 1, 1, tzinfo=UTC)
"""The time of an event whose stored time is damaged."""


class RecordedEvent:
    """An event in the log: a document of `events`. `event` is its parsed payload, `data` its stored one.

    Two recorded events are equal if they are the same event at the same position. Code that only forwards events, or
    filters by type, works with unknown types: the log may contain events of a later version of this program. All
    properties but `event` also work for a damaged event.
    """

    __slots__ = ("_document", "_event", "stream", "type")

    def __init__(self, document: Mapping[str, Any], event: Event | None = None) -> None:
        self._document = document
        self._event = event
        self.stream: Final = str(document.get("stream"))
        self.type: Final = str(document.get("type"))

    @property
    def document(self) -> Mapping[str, Any]:
        """The event as it is stored."""
        return self._document

    @property
    def position(self) -> int:
        """Its position in the whole log, from 1."""
        return int(self._document["_id"])

    @property
    def event_id(self) -> str:
        return str(self._document.get("event_id"))

    @property
    def version(self) -> int:
        """Its version in `stream`, from 1."""
        version = self._document.get("version")
        return version if isinstance(version, int) else 0

    @property
    def schema(self) -> int:
        """The version of the stored payload; 0 if it is damaged. `event` is upgraded to the current version."""
        schema = self._document.get("schema")
        return schema if isinstance(schema, int) else 0

    @property
    def time(self) -> datetime:
        """When it was decided, by the estimated server's clock; `UNKNOWN_TIME` if it is damaged."""
        time = self._document.get("time")
        return time if isinstance(time, datetime) else UNKNOWN_TIME

    @property
    def data(self) -> Mapping[str, Any]:
        """The payload as stored, of any schema version. In a damaged event it may have any type."""
        data: Mapping[str, Any] = self._document.get("data")  # type: ignore[assignment]  # see above
        return data

    @property
    def payload_fields(self) -> Mapping[str, Any]:
        """`data` for code that also reads damaged events: empty if it is not an object."""
        data = self._document.get("data")
        return data if isinstance(data, Mapping) else {}

    @property
    def meta(self) -> EventMetadata:
        meta = self._document.get("meta")
        return EventMetadata.from_stored(meta if isinstance(meta, Mapping) else {})

    @property
    def hash(self) -> bytes:
        """The hash that the next event of the stream contains; empty if it is damaged."""
        found = self._document.get("hash")
        return bytes(found) if isinstance(found, bytes) else b""

    @property
    def event(self) -> Event:
        """The payload, parsed and upgraded to the current schema version. Parsed on first use.

        Raises:
            UnreadableEvent: The event is damaged, or this version of the program does not know it.
        """
        if self._event is None:
            self._event = self._read()
        return self._event

    def _read(self) -> Event:
        document = self._document
        name, schema = self.type, document.get("schema")
        if not isinstance(document.get("type"), str):
            raise UnreadableEvent(f"{self._describe()} is an event without a type")
        if not isinstance(document.get("time"), datetime):
            raise UnreadableEvent(f"{self._describe()} is a {name} that cannot be read: it has no time")
        if not isinstance(schema, int) or schema < 1:
            raise UnreadableEvent(
                f"{self._describe()} is a {name} that cannot be read: {schema!r} is not a schema version"
            )
        event_type = EVENT_TYPES.get(name)
        if event_type is None or schema > event_type.schema_version:
            if "hash" in document and not self._is_intact():
                raise UnreadableEvent(f"{self._describe()} is a {name} with schema {schema}, and its hash is wrong")
            raise UnsupportedEvent(
                f"{self._describe()} is a {name} with schema {schema}, which this version of Jobledger does not know: "
                "a newer version of Jobledger wrote it. Upgrade Jobledger."
            )
        try:
            data = document["data"]
            data = data if schema == event_type.schema_version else upcast(name, schema, data)
            event: Event = event_type.__pydantic_validator__.validate_python(data)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # ValueError also from pydantic
            raise UnreadableEvent(f"{self._describe()} is a {name} that cannot be read: {error}") from error
        return event

    def _is_intact(self) -> bool:
        """Return whether the hash matches the content."""
        try:
            hashed = {name: self._document[name] for name in _HASHED_FIELDS}
            return hashlib.sha256(encode_canonical_json(hashed)).digest() == self.hash
        except (AttributeError, InvalidEvent, LookupError, TypeError, ValueError):
            return False

    def _describe(self) -> str:
        return f"At position {self.position} of the log ({self.stream}, version {self.version})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecordedEvent) and self._key() == other._key() and self.event == other.event

    def __hash__(self) -> int:
        return hash(self.event_id)

    def __repr__(self) -> str:
        return f"<{self.position}: {self.type} {self.data!r}, {self.stream} version {self.version}>"

    def _key(self) -> tuple[object, ...]:
        return self.position, self.event_id, self.stream, self.version, self.time, self.meta, self.hash


Upcaster = Callable[[dict[str, Any]], dict[str, Any]]
UPCASTERS: Mapping[str, Sequence[Upcaster]] = {}
"""How older payloads are upgraded when they are read: by type, from schema 1 to 2, from 2 to 3, and so on.

A new field with a default needs no entry. If a meaning changes, increment `schema_version` and add the step here. Old
payloads stay unchanged in the log, and in tests/golden forever.
"""


def upcast(name: str, schema: int, data: Any) -> Any:
    """Return a payload in the newest version of its type."""
    payload = deepcopy(data)  # a step may change nested values, and the stored payload must stay unchanged
    for step in UPCASTERS.get(name, ())[schema - 1 :]:
        payload = step(payload)
    return payload
