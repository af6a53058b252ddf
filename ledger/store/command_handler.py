"""ledger: the one road. Whoever changes a job, batch or delivery (API, worker, watcher, command) comes through here."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from bson import ObjectId

from jobledger.ledger.domain import batch, delivery, job
from jobledger.ledger.domain.batch import Batch
from jobledger.ledger.domain.commands import BatchCommand, DeliveryCommand, JobCommand
from jobledger.ledger.domain.delivery import Delivery
from jobledger.ledger.domain.errors import (
    CommandRejected,
    LedgerBusy,
    LedgerUnavailable,
    UnreadableEvent,
    VersionConflict,
)
from jobledger.ledger.domain.events import BatchDeleted, Event, EventMetadata, JobDeleted, RecordedEvent
from jobledger.ledger.domain.job import Job
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.ledger.store.event_store import EventStore

Command = JobCommand | BatchCommand | DeliveryCommand
State = Job | Batch | Delivery
_MAX_ATTEMPTS = 20  # a job has few writers at a time; who loses twenty races in a row is in a loop with itself


def new_job_id() -> str:
    """Return an id for a new job, which is also the name of its stream."""
    return f"job-{ObjectId()}"


def new_batch_id() -> str:
    """Return an id for a new batch, which is also the name of its stream."""
    return f"batch-{ObjectId()}"


@dataclass(frozen=True, slots=True)
class StreamState:
    """What is known of a stream: its state and how far that goes. May be behind; an append finds out."""

    state: State | None = None
    head: StreamHead = StreamHead()  # noqa: RUF009 - frozen

    def apply(self, events: Iterable[RecordedEvent]) -> StreamState:
        """Return what is known when these events, the next of the same stream, are taken in.

        Raises:
            UnreadableEvent: one of them is damaged or missing, or a later version of this program has written it.
        """
        known = self
        for event in events:
            version, digest = known.head.version + 1, event.hash
            if event.version != version or not digest:
                raise UnreadableEvent(f"Version {version} of {event.stream} is damaged or missing.")
            state = decider_for(event.stream).evolve(known.state, event.event)
            known = StreamState(state, StreamHead(version, event.position, digest))
        return known


class CommandResult(NamedTuple):
    """The events that a command caused (none if there was nothing to do), and the stream as it is now."""

    events: list[RecordedEvent]
    stream_state: StreamState


class Decider(Protocol):
    """The pure functions of one kind of stream."""

    def decide(self, command: Any, state: Any) -> Sequence[Event]: ...

    def evolve(self, state: Any, event: Any) -> State: ...


def decider_for(stream: str) -> Decider:
    """Return the rules for a stream, told by the beginning of its name."""
    match stream.partition("-")[0]:
        case "job":
            return job
        case "batch":
            return batch
        case "delivery":
            return delivery
        case _:
            raise LookupError(f"{stream!r} names no kind of stream")


async def handle_command(
    log: EventStore,
    stream: str,
    command: Command,
    *,
    meta: EventMetadata,
    stream_state: StreamState | None = None,
    check: Callable[[StreamState], None] = lambda known: None,
) -> CommandResult:
    """Apply `command` and return the events it causes, with their positions.

    A lost race is decided again on what is true now, never blindly repeated. Whoever has followed the stream passes
    what is `known` of it and saves the reading. `check` raises if the command is not to be given to this state: it is
    asked of every state that is decided on.

    Raises:
        CommandRefused: the rules say no.
        InvalidEvent, LedgerBusy, LedgerUnavailable: as `EventLog.append`.
    """
    rules = decider_for(stream)
    current = stream_state is None
    if stream_state is None:
        stream_state = await load_stream_state(log, stream)
    tries = 0
    while True:
        tries += 1
        now = log.clock.estimate()
        check(stream_state)
        try:
            events = rules.decide(command, stream_state.state)
        except CommandRejected:
            if current:
                raise
            events = []
        if not events and not current:  # only an append finds out that `known` is behind; without one we have to look
            stream_state, current = await _catch_up(log, stream, stream_state), True
            continue
        try:
            correlated = _correlated(meta, stream_state.state)
            appends = [
                StreamAppend(stream, stream_state.head, events, correlated, now),
                *_consequences(stream, stream_state, events, now),
            ]
            recorded = (await log.append(*appends))[: len(events)] if events else []
        except VersionConflict:
            if tries == _MAX_ATTEMPTS:
                raise
            if tries > 1:  # many want this stream: not all of them again in the same instant
                await asyncio.sleep(random.uniform(0, 0.002 * tries))  # noqa: S311 - spreads load, guards no secret
            stream_state, current = await _catch_up(log, stream, stream_state), True
        else:
            return CommandResult(recorded, stream_state.apply(recorded))


def _consequences(stream: str, known: StreamState, events: Sequence[Event], now: datetime) -> Iterable[StreamAppend]:
    """Return what begins with an end: whoever asked for it is told, so the delivery is queued in the same transaction.

    Each end has a delivery of its own, named after it: so there is one and never two, whoever dies when.
    """
    if not isinstance(known.state, Job | Batch) or known.state.spec.webhook is None:
        return
    for version, event in enumerate(events, known.head.version + 1):
        queued = delivery.delivery_for_event(stream, known.state, event, version)
        if queued is not None:
            meta = EventMetadata("system", queued.batch_id or stream)
            yield StreamAppend(delivery.delivery_id_for(stream, version), StreamHead(), [queued], meta, now)


async def _catch_up(log: EventStore, stream: str, known: StreamState) -> StreamState:
    """Take in what follows in the stream, event by event: all of it together may be larger than memory."""
    async with aclosing(log.iterate_stream(stream, after_version=known.head.version)) as events:
        async for event in events:
            known = known.apply([event])
    return known


def _correlated(meta: EventMetadata, state: State | None) -> EventMetadata:
    """Every event of a batch's job names the batch, whoever caused it: so a batch can be followed as one story."""
    if meta.correlation_id is None and isinstance(state, Job | Delivery) and state.spec.batch_id is not None:
        return replace(meta, correlation_id=state.spec.batch_id)
    return meta


async def find_outcome(
    log: EventStore, stream: str, command: Command, *, stream_state: StreamState
) -> CommandResult | None:
    """Find out, after `LedgerUnavailable`, whether `command` took effect all the same: an append may land unheard.

    `known` is what the command was decided on. None means that it did not, and may be given again.

    Raises:
        LedgerUnavailable: the database still does not answer.
    """
    expected = decider_for(stream).decide(command, stream_state.state)
    since = await log.read_stream(stream, after_version=stream_state.head.version)
    mine = since[: len(expected)]
    if expected and [it.event for it in mine] == list(expected):
        return CommandResult(mine, stream_state.apply(since))
    return None


async def handle_command_until_known(
    log: EventStore,
    stream: str,
    command: Command,
    *,
    meta: EventMetadata,
    stream_state: StreamState,
    retry_seconds: float,
    on_retry: Callable[[LedgerUnavailable | LedgerBusy], None],
) -> CommandResult:
    """Handle a command, and repeat it while the database is unavailable. The command takes effect once.

    Args:
        log: The event store.
        stream: The name of the stream.
        command: The command.
        meta: The metadata of the events.
        stream_state: The state to decide on, as for `handle_command`.
        retry_seconds: The pause before each retry.
        on_retry: Called before each pause. Raises to give up.

    Raises:
        CommandRejected: The stream's state does not allow the command.
        InvalidEvent: As `EventStore.append`.
    """
    while True:
        try:
            return await handle_command(log, stream, command, meta=meta, stream_state=stream_state)
        except (LedgerUnavailable, LedgerBusy) as error:
            on_retry(error)
        await asyncio.sleep(retry_seconds)
        with suppress(LedgerUnavailable):
            if (result := await find_outcome(log, stream, command, stream_state=stream_state)) is not None:
                return result


async def create_streams(
    log: EventStore, commands: Sequence[tuple[str, Command]], *, meta: EventMetadata
) -> list[RecordedEvent]:
    """Apply commands that each begin a stream (a batch and its jobs): all of them happen, or none.

    Raises:
        CommandRefused, VersionConflict: a stream exists already.
        InvalidEvent, LedgerBusy, LedgerUnavailable: as `EventLog.append`.
    """
    now = log.clock.estimate()
    appends = [
        StreamAppend(stream, StreamHead(), decider_for(stream).decide(command, None), meta, now)
        for stream, command in commands
    ]
    return await log.append(*appends)


async def load_stream_state(log: EventStore, stream: str) -> StreamState:
    """Return what the log says of a stream now."""
    return await _catch_up(log, stream, StreamState())


async def is_deleted(log: EventStore, stream: str) -> bool:
    """Return whether a job or batch was deleted."""
    return bool(await log.read_stream(stream, types=(JobDeleted, BatchDeleted), limit=1))


async def load_stream_states(log: EventStore, streams: Collection[str]) -> dict[str, StreamState | UnreadableEvent]:
    """Return what the log says of many streams now, or why one of them cannot be read."""
    found: dict[str, StreamState | UnreadableEvent] = dict.fromkeys(streams, StreamState())
    async with aclosing(log.iterate_stream_batches(streams)) as parts:
        async for events in parts:
            for event in events:
                known = found[event.stream]
                if isinstance(known, StreamState):
                    found[event.stream] = _after(known, event)
    return found


def _after(known: StreamState, event: RecordedEvent) -> StreamState | UnreadableEvent:
    try:
        return known.apply((event,))
    except UnreadableEvent as error:
        return error
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not stop the other streams
        return UnreadableEvent(f"{event.stream} cannot be read: {error!r}")
