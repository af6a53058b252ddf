"""Load a stream, decide on a command, and append the resulting events.

Every change of an existing stream uses `handle_command`. `create_streams` appends the first events of new streams.
`create_claimed_job` also claims a new job.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

import structlog
from bson import ObjectId

from jobledger.ledger.domain import batch, delivery, job, worker
from jobledger.ledger.domain.batch import Batch
from jobledger.ledger.domain.commands import (
    BatchCommand,
    ClaimJob,
    DeliveryCommand,
    JobCommand,
    SubmitJob,
    WorkerStreamCommand,
)
from jobledger.ledger.domain.delivery import Delivery
from jobledger.ledger.domain.errors import (
    CommandRejected,
    LedgerBusy,
    LedgerUnavailable,
    StreamBusy,
    UnreadableEvent,
    VersionConflict,
)
from jobledger.ledger.domain.events import BatchDeleted, Event, EventMetadata, JobDeleted, RecordedEvent
from jobledger.ledger.domain.job import Job
from jobledger.ledger.domain.worker import Worker
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.ledger.store.event_store import EventStore

Command = JobCommand | BatchCommand | DeliveryCommand | WorkerStreamCommand
Aggregate = Job | Batch | Delivery | Worker
_log = structlog.get_logger()
DISPATCH_ACTOR: Final = "system"
"""The actor of claims that are made for a worker when the job is submitted. A worker is the actor of its own claims."""
_MAX_TRIES = 20  # few processes append to one stream, so more conflicts in a row are rare


def create_job_id() -> str:
    """Return an ID for a new job, which is also the name of its stream."""
    return f"job-{ObjectId()}"


def create_batch_id() -> str:
    """Return an ID for a new batch, which is also the name of its stream."""
    return f"batch-{ObjectId()}"


@dataclass(frozen=True, slots=True)
class StreamState:
    """The state of a stream and its head. May be stale; an append then fails with a version conflict."""

    aggregate: Aggregate | None = None
    head: StreamHead = StreamHead()  # noqa: RUF009 - frozen

    def apply(self, events: Iterable[RecordedEvent]) -> StreamState:
        """Return the state after these events, which are the next of the same stream.

        Raises:
            UnreadableEvent: One of them is damaged or missing, or a later version of the program wrote it.
        """
        stream_state = self
        for event in events:
            version, digest = stream_state.head.version + 1, event.hash
            if event.version != version or not digest:
                raise UnreadableEvent(f"Version {version} of {event.stream} is damaged or missing.")
            state = decider_for(event.stream).evolve(stream_state.aggregate, event.event)
            stream_state = StreamState(state, StreamHead(version, event.position, digest))
        return stream_state


class CommandResult(NamedTuple):
    """The events that a command caused, none if there was nothing to do, and the new state of the stream."""

    events: list[RecordedEvent]
    stream_state: StreamState


class Decider(Protocol):
    """The pure functions of one stream type."""

    def decide(self, command: Any, state: Any) -> Sequence[Event]: ...

    def evolve(self, state: Any, event: Any) -> Aggregate: ...


def decider_for(stream: str) -> Decider:
    """Return the decider of a stream, by the prefix of its name."""
    match stream.partition("-")[0]:
        case "job":
            return job
        case "batch":
            return batch
        case "delivery":
            return delivery
        case "worker":
            return worker
        case _:
            raise LookupError(
                f"{stream!r} is not the name of a stream: expected job-…, batch-…, delivery-… or worker-…"
            )


async def handle_command(
    event_store: EventStore,
    stream: str,
    command: Command,
    *,
    meta: EventMetadata,
    stream_state: StreamState | None = None,
    check: Callable[[StreamState], None] = lambda stream_state: None,
) -> CommandResult:
    """Handle a command: load the stream, decide, and append the resulting events, which are returned.

    After a version conflict it decides again on the current state. It never repeats a decision blindly.

    Args:
        event_store: The event store.
        stream: The name of the stream.
        command: The command.
        meta: The metadata of the events.
        stream_state: The state of the stream if the caller has it, which saves reading. May be stale.
        check: Called with each state that is decided on. Raises to reject the command.

    Raises:
        CommandRejected: The state does not allow the command.
        StreamBusy: In all tries, another process appended to the stream first.
        VersionConflict: The delivery of an event exists already, although the event does not: the log was changed.
        UnreadableEvent: An event of the stream is damaged, or a later version of the program wrote it.
        InvalidEvent: As `EventStore.append`.
        LedgerBusy: As `EventStore.append`.
        LedgerUnavailable: As `EventStore.append`.
    """
    decider = decider_for(stream)
    is_current = stream_state is None
    if stream_state is None:
        stream_state = await load_stream_state(event_store, stream)
    tries = 0
    while True:
        tries += 1
        now = event_store.clock.estimate()
        check(stream_state)
        try:
            events = decider.decide(command, stream_state.aggregate)
        except CommandRejected:
            if is_current:
                raise
            events = []
        if not events and not is_current:  # only an append detects a stale state; without one we read
            stream_state, is_current = await _catch_up(event_store, stream, stream_state), True
            continue
        try:
            correlated = _add_correlation_id(meta, stream_state.aggregate)
            appends = [
                StreamAppend(stream, stream_state.head, events, correlated, now),
                *_derive_deliveries(stream, stream_state, events, now),
            ]
            recorded = (await event_store.append(*appends))[: len(events)] if events else []
        except VersionConflict as conflict:
            if conflict.stream != stream:
                raise  # a derived stream, which exists already: the log was changed
            if tries == _MAX_TRIES:
                raise StreamBusy(
                    f"Other processes appended to {stream} first, {tries} times in a row. Try again in a moment."
                ) from conflict
            if tries > 1:  # many processes append to this stream: spread their retries
                await asyncio.sleep(random.uniform(0, 0.002 * tries))  # noqa: S311 - spreads load, guards no secret
            stream_state, is_current = await _catch_up(event_store, stream, stream_state), True
        else:
            return CommandResult(recorded, stream_state.apply(recorded))


class CommandRequest(NamedTuple):
    """A command for a stream whose state the caller has. The state may be stale."""

    stream: str
    command: Command
    stream_state: StreamState


async def handle_commands(
    event_store: EventStore, requests: Sequence[CommandRequest], *, meta: EventMetadata
) -> AsyncGenerator[Sequence[tuple[int, CommandResult | Exception | None]]]:
    """Try once to handle commands for different streams, each independently of the others, and write them together.

    It is for many commands that nearly always succeed. The caller handles the others one by one
    (`handle_command_with_retries`). If the caller stops early, their events may be written nevertheless.

    Yields:
        The outcomes by index in `requests`, as soon as they are known: a result, or the error of the append (see
        `EventStore.append`). None: nothing was tried, because the given state does not allow the command, or it
        requires several streams. Each command has one outcome.
    """
    now = event_store.clock.estimate()
    appends: list[StreamAppend] = []
    indexes: list[int] = []
    for index, (stream, command, stream_state) in enumerate(requests):
        try:
            events = decider_for(stream).decide(command, stream_state.aggregate)
            if events and not any(_derive_deliveries(stream, stream_state, events, now)):
                correlated = _add_correlation_id(meta, stream_state.aggregate)
                appends.append(StreamAppend(stream, stream_state.head, events, correlated, now))
                indexes.append(index)
        except Exception as error:  # noqa: BLE001 - it concerns only this command, and is raised when it is tried alone
            _log.debug("command not tried together with others", stream=stream, error=repr(error))
    tried = set(indexes)
    if untried := [(index, None) for index in range(len(requests)) if index not in tried]:
        yield untried
    async with aclosing(event_store.append_each(appends)) as written:
        async for outcomes in written:
            results: list[tuple[int, CommandResult | Exception | None]] = []
            for number, outcome in outcomes:
                index = indexes[number]
                if isinstance(outcome, list):
                    stream_state = requests[index].stream_state.apply(outcome)
                    results.append((index, CommandResult(outcome, stream_state)))
                else:
                    results.append((index, outcome))
            yield results


def _derive_deliveries(
    stream: str, stream_state: StreamState, events: Sequence[Event], now: datetime
) -> Iterable[StreamAppend]:
    """Yield a delivery for each event that finishes a job or batch with a webhook. The same transaction queues it.

    The ID of a delivery is derived from the event. Each such event has exactly one delivery, whichever process crashes.
    """
    if not isinstance(stream_state.aggregate, Job | Batch) or stream_state.aggregate.spec.webhook is None:
        return
    for version, event in enumerate(events, stream_state.head.version + 1):
        queued = delivery.build_delivery(stream, stream_state.aggregate, event, version)
        if queued is not None:
            meta = EventMetadata("system", queued.batch_id or stream)
            yield StreamAppend(delivery.build_delivery_id(stream, version), StreamHead(), [queued], meta, now)


async def _catch_up(event_store: EventStore, stream: str, stream_state: StreamState) -> StreamState:
    """Apply the later events of the stream one by one: all of them together may exceed the memory."""
    async with aclosing(event_store.iterate_stream(stream, after_version=stream_state.head.version)) as events:
        async for event in events:
            stream_state = stream_state.apply([event])
    return stream_state


def _add_correlation_id(meta: EventMetadata, aggregate: Aggregate | None) -> EventMetadata:
    """Add the batch of a job as correlation ID, so that all events of a batch can be found."""
    if meta.correlation_id is None and isinstance(aggregate, Job | Delivery) and aggregate.spec.batch_id is not None:
        return replace(meta, correlation_id=aggregate.spec.batch_id)
    return meta


async def _find_outcome(
    event_store: EventStore, stream: str, command: Command, stream_state: StreamState
) -> CommandResult | None:
    """Return the result of a command that ended with `LedgerUnavailable`; None if it may be repeated.

    After a version conflict the command was decided on a later state than `stream_state`. So each later state is
    tried: the command took effect if exactly the events that it causes in a state follow that state.

    Raises:
        LedgerUnavailable: The database still does not respond.
    """
    later_events = await event_store.read_stream(stream, after_version=stream_state.head.version)
    for index, event in enumerate(later_events):
        with suppress(CommandRejected):
            expected = list(decider_for(stream).decide(command, stream_state.aggregate))
            own_events = later_events[index : index + len(expected)]
            if expected and [own_event.event for own_event in own_events] == expected:
                return CommandResult(own_events, stream_state.apply(later_events[index:]))
        stream_state = stream_state.apply([event])
    return None


async def handle_command_with_retries(
    event_store: EventStore,
    stream: str,
    command: Command,
    *,
    meta: EventMetadata,
    stream_state: StreamState,
    retry_seconds: float,
    on_retry: Callable[[LedgerUnavailable | LedgerBusy], None],
    previous_error: Exception | None = None,
) -> CommandResult:
    """Handle a command, and retry it while the database is unavailable or busy. The command takes effect once.

    If the outcome of a try is unknown, it looks in the stream for it before the next one.

    Args:
        event_store: The event store.
        stream: The name of the stream.
        command: The command.
        meta: The metadata of the events.
        stream_state: The state to decide on, as for `handle_command`.
        retry_seconds: The pause before each retry.
        on_retry: Called before each pause. Raises to give up.
        previous_error: The error with which `handle_commands` has tried the same command on the same state.

    Raises:
        CommandRejected: The stream's state does not allow the command.
        VersionConflict: As `handle_command`.
        UnreadableEvent: As `handle_command`.
        InvalidEvent: As `EventStore.append`.
    """
    error = previous_error if isinstance(previous_error, LedgerUnavailable | LedgerBusy) else None
    may_have_effect = False
    latest_state = stream_state
    while True:
        if error is not None:
            on_retry(error)
            may_have_effect |= isinstance(error, LedgerUnavailable)
            await asyncio.sleep(retry_seconds)
        try:
            if not may_have_effect:
                # After a version conflict, the state is stale. Then the stream is read.
                state = None if isinstance(previous_error, VersionConflict) else stream_state
                return await handle_command(event_store, stream, command, meta=meta, stream_state=state)
            # A command that is decided on the state after its own events would take effect twice. So the outcome is
            # read before each decision on a newer state. An earlier append that the server still executes is either
            # found then, or can no longer be written: its version is taken.
            result = await _find_outcome(event_store, stream, command, stream_state)
            if result is not None:
                return result
            check = partial(_check_unchanged, latest_state)
            return await handle_command(event_store, stream, command, meta=meta, stream_state=latest_state, check=check)
        except _StateChanged as changed:
            latest_state, error = changed.stream_state, None
        except (LedgerUnavailable, LedgerBusy) as failure:
            error = failure


class _StateChanged(Exception):
    """The stream has events after the state on which a command was to be decided."""

    def __init__(self, stream_state: StreamState) -> None:
        super().__init__("the stream has newer events")
        self.stream_state = stream_state


def _check_unchanged(expected: StreamState, stream_state: StreamState) -> None:
    if stream_state is not expected:
        raise _StateChanged(stream_state)


async def create_streams(
    event_store: EventStore, commands: Sequence[tuple[str, Command]], *, meta: EventMetadata
) -> list[RecordedEvent]:
    """Handle commands that each begin a stream, such as a batch and its jobs: all or none.

    Raises:
        CommandRejected: A command is not valid for a new stream.
        VersionConflict: A stream already exists.
        InvalidEvent: As `EventStore.append`.
        LedgerBusy: As `EventStore.append`.
        LedgerUnavailable: As `EventStore.append`.
    """
    now = event_store.clock.estimate()
    appends = [
        StreamAppend(stream, StreamHead(), decider_for(stream).decide(command, None), meta, now)
        for stream, command in commands
    ]
    return await event_store.append(*appends)


async def create_claimed_job(
    event_store: EventStore, job_id: str, command: SubmitJob, worker_id: str, *, meta: EventMetadata
) -> RecordedEvent:
    """Begin the stream of a job, and claim the job for a worker directly after. Return the first event.

    The claim may be missing. Then the job is pending, as any other.

    Raises:
        CommandRejected: The job is not valid, or may not be claimed yet. Nothing was written.
        VersionConflict: The stream already exists.
        InvalidEvent, LedgerBusy, LedgerUnavailable: As `EventStore.append`.
    """
    now = event_store.clock.estimate()
    [submitted] = job.decide(command, None)
    [claimed] = job.decide(ClaimJob(worker_id, now, via="dispatched"), job.evolve(None, submitted))
    append = StreamAppend(job_id, StreamHead(), [submitted], meta, now)
    return await event_store.append_with_next(append, claimed, EventMetadata(DISPATCH_ACTOR))


async def load_stream_state(event_store: EventStore, stream: str) -> StreamState:
    """Load the current state of a stream."""
    return await _catch_up(event_store, stream, StreamState())


async def is_deleted(event_store: EventStore, stream: str) -> bool:
    """Return whether a job or batch was deleted."""
    return bool(await event_store.read_stream(stream, types=(JobDeleted, BatchDeleted), limit=1))


async def load_stream_states(
    event_store: EventStore, streams: Collection[str]
) -> dict[str, StreamState | UnreadableEvent]:
    """Load the current states of many streams. A stream that cannot be read has the error as its value."""
    found: dict[str, StreamState | UnreadableEvent] = dict.fromkeys(streams, StreamState())
    async with aclosing(event_store.iterate_stream_batches(streams)) as parts:
        async for events in parts:
            for event in events:
                stream_state = found[event.stream]
                if isinstance(stream_state, UnreadableEvent):
                    continue
                try:
                    found[event.stream] = stream_state.apply((event,))
                except UnreadableEvent as error:
                    found[event.stream] = error
                except Exception as error:  # noqa: BLE001 - no error may stop the other streams
                    found[event.stream] = UnreadableEvent(f"{event.stream} cannot be read: {error!r}")
    return found
