"""ledger: the catalogue of everything that can happen. One class an event, in the past tense, one sentence each.

An event's name in the database is its class name; its payload is its fields. Payloads are never rewritten: `schema` is
the payload's version, and older ones are brought up to date when they are read (`UPCASTS`). Pure: no database, no
clock, no event loop.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar, Final, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from jobledger.ledger.domain.canonical_json import canonical_json
from jobledger.ledger.domain.errors import InvalidEvent, UnreadableEvent, UnsupportedEvent

_BELOW_A_MILLISECOND = [timedelta(microseconds=microseconds) for microseconds in range(1000)]


def truncate_to_milliseconds(moment: datetime) -> datetime:
    """Return the moment in UTC, cut to the milliseconds that BSON keeps, so that hashes survive the database.

    Raises:
        ValueError: in UTC it lies before the year 1 or after 9999.
    """
    try:
        if moment.tzinfo is not UTC:
            moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError as error:
        raise ValueError("the moment is beyond the calendar") from error
    return moment - _BELOW_A_MILLISECOND[moment.microsecond % 1000]  # eight times as fast as replace()


def _whole(number: float) -> float:
    """Write a whole number as one: 3600.0 costs the hash chain ten times the work of 3600, and means the same."""
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _is_none(value: object) -> bool:
    return value is None


UtcDatetime = Annotated[datetime, AfterValidator(truncate_to_milliseconds)]
CompactFloat = Annotated[float, PlainSerializer(_whole)]
LogLevel = Literal["debug", "info", "warning", "error"]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class AccessControl(_Value):
    """Who else may see or change a job or batch (konzept.md, "Benutzer-Autorisierung")."""

    visibility: Literal["private", "team", "public"] = "private"
    read_access: list[str] = Field(default_factory=list)
    write_access: list[str] = Field(default_factory=list)
    admin_access: list[str] = Field(default_factory=list)


Teams = Annotated[list[str], Field(exclude_if=operator.not_)]
"""The groups that the owner was in when it was submitted; left out if there are none."""


class Webhook(_Value):
    """Whom to tell about the end. Values of headers, and what it is `signed` with, never enter the log: `secrets_ref`
    names where those secrets lie."""

    url: str
    header_names: list[str] = Field(default_factory=list)
    secrets_ref: str | None = None
    include_markdown: bool = False
    include_metadata: bool = False
    has_own_secrets: Annotated[bool, Field(exclude_if=operator.not_)] = False


class Failure(_Value):
    """Why something failed: a stable code for programs, a sentence for people."""

    code: str
    message: str
    details: dict[str, Any] = Field(default_factory=dict)


class LogEntry(_Value):
    timestamp: UtcDatetime
    level: LogLevel
    message: str


class ResultFile(_Value):
    """A file by its digest. `path` is relative, below the place where results are served; `size` in bytes."""

    path: str
    sha256: str
    size: int
    media_type: str


class Asset(_Value):
    type: str
    path: str
    url: str


class ResultMetadata(_Value):
    model_config = ConfigDict(frozen=True, extra="allow")

    processed_at: UtcDatetime
    duration: CompactFloat
    tokens_used: int = 0
    warnings: list[str] = Field(default_factory=list)


class JobResults(_Value):
    # Left out if there is none: a null in a payload costs the hash chain ten times the work.
    markdown_file: Annotated[str | None, Field(exclude_if=_is_none)] = None
    markdown_url: Annotated[str | None, Field(exclude_if=_is_none)] = None
    assets: list[Asset] = Field(default_factory=list)
    files: list[ResultFile] = Field(default_factory=list)
    metadata: ResultMetadata


class Event(BaseModel):
    """Something that happened. `schema_version` is the payload's version, stored as `schema`."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    schema_version: ClassVar[int] = 1

    def to_payload(self) -> dict[str, Any]:
        """Return the fields as the database stores them: optional fields that were not given are left out."""
        absent = {name for name in _optional(type(self)) if getattr(self, name) is None}
        payload: dict[str, Any] = self.__pydantic_serializer__.to_python(self, exclude=absent or None)
        return payload


def _optional(event: type[Event]) -> tuple[str, ...]:
    names = _OPTIONAL.get(event)
    if names is None:
        names = tuple(name for name, info in event.model_fields.items() if info.default is None)
        _OPTIONAL[event] = names
    return names


_OPTIONAL: dict[type[Event], tuple[str, ...]] = {}


# The job stream ---------------------------------------------------------------------------------------------------


class JobSubmitted(Event):
    """Somebody asked for a job to be done."""

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


class JobClaimed(Event):
    """A worker took the job: attempt `attempt` has begun and is the only one that may speak for the job."""

    worker_id: str
    attempt: int


class JobProgressed(Event):
    """The attempt got on: how far the whole job is, in percent, and what it is doing."""

    attempt: int
    step: str
    percent: CompactFloat
    message: str


class JobLogged(Event):
    """The attempt had something to say: one or more log lines, in order."""

    attempt: int
    entries: list[LogEntry]


class StepCompleted(Event):
    """A part of the attempt is done and need not be done again for inputs with the same digest `key`.

    `reused_from` names the job whose output this is, if it was not done here. `cache_version` is the version of the
    processor whose later jobs of the same owner and type may reuse the output. None means that no other job may.
    """

    attempt: int
    step: str
    key: str
    output: Any
    duration_s: CompactFloat
    tokens_used: int = 0
    warnings: list[str] = Field(default_factory=list)
    reused_from: str | None = None
    cache_version: str | None = None


class JobCompleted(Event):
    """The work is done and its result files are stored."""

    attempt: int
    results: JobResults


class JobAttemptFailed(Event):
    """The attempt failed in a way that may pass: the job waits until `retry_at` and is tried again."""

    attempt: int
    error: Failure
    retry_at: UtcDatetime


class JobFailed(Event):
    """The job failed for good: the error will not pass, or its attempts are used up."""

    attempt: int
    error: Failure


class JobLeaseExpired(Event):
    """The worker gave no proof of life in time: its attempt is over and the job is free again."""

    worker_id: str
    attempt: int


class JobReleased(Event):
    """The worker gave the job back unharmed, for example at shutdown: the attempt does not count.

    `is_machine_failure`: the worker's machine could not run it.
    """

    worker_id: str
    attempt: int
    reason: str
    is_machine_failure: bool = False


class JobCancelRequested(Event):
    """Somebody asked for a running job to be stopped; its worker will obey."""

    by: str
    reason: str | None = None


class JobCancelled(Event):
    """The job was stopped and will not be done."""

    by: str
    reason: str | None = None


class JobRestarted(Event):
    """An ended job is to be done again, with or without what its finished steps have yielded."""

    by: str
    reason: str | None = None
    reuse_steps: bool = True


class JobUpdated(Event):
    """A waiting job was changed; what is not named stays as it is."""

    by: str
    parameters: dict[str, Any] | None = None
    priority: int | None = None
    not_before: UtcDatetime | None = None


class JobAccessChanged(Event):
    """Who may see or change the job was set anew."""

    by: str
    access_control: AccessControl


class JobArchived(Event):
    """The job was put out of sight of everyday lists."""

    by: str
    reason: str | None = None


class JobUnarchived(Event):
    """The job was put back into everyday lists."""

    by: str
    reason: str | None = None


class JobDeleted(Event):
    """The job is gone from the views and its files are no longer served; its history stays."""

    by: str
    reason: str | None = None


class WorkerFenced(Event):
    """A worker spoke for an attempt that was over, and was refused: the visible trace of a zombie."""

    worker_id: str
    attempt: int
    rejected_event: str


# The batch stream -------------------------------------------------------------------------------------------------


class BatchCounts(_Value):
    """How many of a batch's jobs ended how."""

    completed: int = 0
    failed: int = 0
    cancelled: int = 0


class BatchSummary(_Value):
    """What a batch took: seconds of processing (summed over its jobs) and language-model tokens."""

    duration: CompactFloat = 0.0
    tokens_used: int = 0


class BatchSubmitted(Event):
    """Jobs were submitted together; their own `JobSubmitted` events are in the same transaction."""

    batch_name: str | None = None
    total_jobs: int
    job_ids: list[str]
    parameters: dict[str, Any] = Field(default_factory=dict)
    webhook: Webhook | None = None
    user_id: str
    access_control: AccessControl = AccessControl()
    teams: Teams = Field(default_factory=list)


class BatchPaused(Event):
    """The batch's waiting jobs are not to be started for now."""

    by: str
    reason: str | None = None


class BatchResumed(Event):
    """The batch's waiting jobs may be started again."""

    by: str
    reason: str | None = None


class BatchFinished(Event):
    """The last of the batch's jobs has ended."""

    status: Literal["completed", "partial", "failed"]
    counts: BatchCounts
    summary: BatchSummary


class BatchReopened(Event):
    """A job of the finished batch was restarted."""


class BatchAccessChanged(Event):
    """Who may see or change the batch was set anew; each of its jobs says for itself who may see it."""

    by: str
    access_control: AccessControl


class BatchArchived(Event):
    """The batch was put out of sight of everyday lists."""

    by: str
    reason: str | None = None


class BatchUnarchived(Event):
    """The batch was put back into everyday lists."""

    by: str
    reason: str | None = None


class BatchDeleted(Event):
    """The batch is gone from the views; its history stays."""

    by: str
    reason: str | None = None


# The delivery stream ----------------------------------------------------------------------------------------------

WebhookEventType = Literal[
    "job.completed", "job.failed", "job.cancelled", "batch.completed", "batch.partial", "batch.failed"
]


class DeliveryQueued(Event):
    """A webhook is to be sent: `source`, a job or batch, has ended with the event of this version of its stream."""

    source: str
    source_version: int
    event_type: WebhookEventType
    user_id: str
    webhook: Webhook
    batch_id: str | None = None


class DeliveryAttempted(Event):
    """The receiver was called. It said `response` (its beginning), or nothing; `error` if that was no 2xx.

    `body_sha256` is the digest of what was sent, in hexadecimal; `next_attempt_at` is when it is tried again.
    """

    attempt: int
    status_code: int | None = None
    error: Failure | None = None
    response: str = ""
    duration_s: CompactFloat
    body_sha256: str | None = None
    next_attempt_at: UtcDatetime | None = None


class DeliverySucceeded(Event):
    """The receiver has confirmed it with a 2xx."""

    attempt: int


class DeliveryAbandoned(Event):
    """It is not tried any more, unless somebody asks for that."""

    reason: str


class DeliveryRequeued(Event):
    """Somebody asked for it to be sent, once more or at once; the schedule begins anew."""

    by: str
    reason: str | None = None


# Log housekeeping -------------------------------------------------------------------------------------------------


class PositionVoided(Event):
    """A position whose writer died between taking the number and writing the event; nothing happened here."""


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
JOB_EVENTS: tuple[type[Event], ...] = get_args(JobEvent)
BATCH_EVENTS: tuple[type[Event], ...] = get_args(BatchEvent)
DELIVERY_EVENTS: tuple[type[Event], ...] = get_args(DeliveryEvent)
EVENT_TYPES: Mapping[str, type[Event]] = {
    event.__name__: event for event in JOB_EVENTS + BATCH_EVENTS + DELIVERY_EVENTS + (PositionVoided,)
}


@dataclass(frozen=True, slots=True)
class EventMetadata:
    """Where an event comes from.

    `actor`: who did it (`user:…`, `worker:…`, `system`); `correlation_id`: the batch or request it belongs to;
    `causation_id`: the `event_id` that led here; `traceparent`: W3C trace context; `request`: what tells a request that
    is repeated, with its Idempotency-Key, from a new one.
    """

    actor: str = "system"
    correlation_id: str | None = None
    causation_id: str | None = None
    traceparent: str | None = None
    request_fingerprint: str | None = None

    def to_document(self) -> dict[str, str]:
        """Return what is known, as the database stores it."""
        payload = {"actor": self.actor}
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
        """Return what `payload` wrote; names from later versions are passed over."""
        get = stored.get
        return cls(
            get("actor", "system"),
            get("correlation_id"),
            get("causation_id"),
            get("traceparent"),
            get("request_fingerprint"),
        )


_HASHED_FIELDS: Final = ("data", "event_id", "meta", "prev", "schema", "stream", "time", "type", "version")
UNKNOWN_TIME = datetime(1970, 1, 1, tzinfo=UTC)
"""The time of an event whose time is damaged."""


class RecordedEvent:
    """An event in the log: a document of `events`, with its payload read when somebody asks for it.

    Two are equal if they are the same event in the same place. Whoever only passes events on, or looks for some types,
    need not know them all: the log may hold events of a later version of this program. The properties can be read of a
    damaged event, too. `event` then raises `UnreadableEvent`.
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
        """Its number in the whole log, from 1."""
        return int(self._document["_id"])

    @property
    def event_id(self) -> str:
        return str(self._document.get("event_id"))

    @property
    def version(self) -> int:
        """Its number in `stream`, from 1."""
        version = self._document.get("version")
        return version if isinstance(version, int) else 0

    @property
    def schema(self) -> int:
        """The version of the payload as it was written, 0 if that is damaged; `event` is brought up to date."""
        schema = self._document.get("schema")
        return schema if isinstance(schema, int) else 0

    @property
    def time(self) -> datetime:
        """When the writer decided it; `UNKNOWN_TIME` if that is damaged."""
        time = self._document.get("time")
        return time if isinstance(time, datetime) else UNKNOWN_TIME

    @property
    def data(self) -> Mapping[str, Any]:
        """The payload as it was written; of a damaged event, it may be anything."""
        data: Mapping[str, Any] = self._document.get("data")  # type: ignore[assignment]  # see above
        return data

    @property
    def payload(self) -> Mapping[str, Any]:
        """The payload as it was written, empty if it is no object."""
        data = self._document.get("data")
        return data if isinstance(data, Mapping) else {}

    @property
    def meta(self) -> EventMetadata:
        meta = self._document.get("meta")
        return EventMetadata.from_stored(meta if isinstance(meta, Mapping) else {})

    @property
    def hash(self) -> bytes:
        """The digest that the next event of the stream is chained to; empty if that is damaged."""
        found = self._document.get("hash")
        return bytes(found) if isinstance(found, bytes) else b""

    @property
    def event(self) -> Event:
        """What happened.

        Raises:
            UnreadableEvent: this version of the program does not know it, or its payload is damaged.
        """
        if self._event is None:
            self._event = self._read()
        return self._event

    def _read(self) -> Event:
        document = self._document
        name, schema = self.type, document.get("schema")
        if not isinstance(document.get("type"), str):
            raise UnreadableEvent(f"{self._place()} is an event without a type")
        if not isinstance(document.get("time"), datetime):
            raise UnreadableEvent(f"{self._place()} is a {name} that cannot be read: it has no time")
        if not isinstance(schema, int) or schema < 1:
            raise UnreadableEvent(f"{self._place()} is a {name} that cannot be read: no schema is called {schema!r}")
        known = EVENT_TYPES.get(name)
        if known is None or schema > known.schema_version:
            if "hash" in document and not self._is_intact():
                raise UnreadableEvent(f"{self._place()} is a {name} with schema {schema}, and its hash is wrong")
            raise UnsupportedEvent(
                f"{self._place()} is a {name} with schema {schema}, which this version of Jobledger does not know: "
                "a later one has written to this log. Upgrade this one."
            )
        try:
            data = document["data"]
            data = data if schema == known.schema_version else upcast(name, schema, data)
            event: Event = known.__pydantic_validator__.validate_python(data)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # the last of them also from pydantic
            raise UnreadableEvent(f"{self._place()} is a {name} that cannot be read: {error}") from error
        return event

    def _is_intact(self) -> bool:
        """Return whether the hash is that of the content."""
        try:
            hashed = {name: self._document[name] for name in _HASHED_FIELDS}
            return hashlib.sha256(canonical_json(hashed)).digest() == self.hash
        except (AttributeError, InvalidEvent, LookupError, TypeError, ValueError):
            return False

    def _place(self) -> str:
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
"""How older payloads are brought up to date when they are read: by type, from schema 1 to 2, from 2 to 3, and so on.

A field that is added with a default needs nothing here. Where a meaning changes, `schema_version` goes up by one and
the step is entered here; old payloads stay in the log as they were written, and in tests/golden for ever.
"""


def upcast(name: str, schema: int, data: Any) -> Any:
    """Return a payload as the newest version of its type has it."""
    changed = deepcopy(data)  # a step may change what lies within, and the stored payload stays as it is
    for step in UPCASTERS.get(name, ())[schema - 1 :]:
        changed = step(changed)
    return changed
