"""ledger: the one road. Whoever changes a job, batch or delivery (API, worker, watcher, command) comes through here."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from bson import ObjectId

from jobledger.ledger.domain import batch, delivery, job
from jobledger.ledger.domain.batch import Batch
from jobledger.ledger.domain.commands import BatchCommand, DeliveryCommand, JobCommand
from jobledger.ledger.domain.delivery import Delivery
from jobledger.ledger.domain.errors import CommandRefused, UnreadableEvent, VersionConflict
from jobledger.ledger.domain.events import BatchDeleted, Event, JobDeleted, Meta, Recorded
from jobledger.ledger.domain.job import Job
from jobledger.ledger.store.envelope import Append, Head
from jobledger.ledger.store.event_store import EventLog

Command = JobCommand | BatchCommand | DeliveryCommand
State = Job | Batch | Delivery
_TRIES = 20  # a job has few writers at a time; who loses twenty races in a row is in a loop with itself


def new_job_id() -> str:
    """Return an id for a new job, which is also the name of its stream."""
    return f"job-{ObjectId()}"


def new_batch_id() -> str:
    """Return an id for a new batch, which is also the name of its stream."""
    return f"batch-{ObjectId()}"


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a stream: its state and how far that goes. May be behind; an append finds out."""

    state: State | None = None
    head: Head = Head()  # noqa: RUF009 - frozen

    def after(self, events: Iterable[Recorded]) -> Known:
        """Return what is known when these events, the next of the same stream, are taken in.

        Raises:
            UnreadableEvent: one of them is damaged or missing, or a later version of this program has written it.
        """
        known = self
        for event in events:
            version, digest = known.head.version + 1, event.hash
            if event.version != version or not digest:
                raise UnreadableEvent(f"Version {version} of {event.stream} is damaged or missing.")
            state = rules_of(event.stream).evolve(known.state, event.event)
            known = Known(state, Head(version, event.position, digest))
        return known


class Handled(NamedTuple):
    """The events that a command caused (none if there was nothing to do), and the stream as it is now."""

    events: list[Recorded]
    known: Known


class Rules(Protocol):
    """The pure functions of one kind of stream."""

    def decide(self, command: Any, state: Any) -> Sequence[Event]: ...

    def evolve(self, state: Any, event: Any) -> State: ...


def rules_of(stream: str) -> Rules:
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


async def handle(
    log: EventLog,
    stream: str,
    command: Command,
    *,
    meta: Meta,
    known: Known | None = None,
    check: Callable[[Known], None] = lambda known: None,
) -> Handled:
    """Apply `command` and return the events it causes, with their positions.

    A lost race is decided again on what is true now, never blindly repeated. Whoever has followed the stream passes
    what is `known` of it and saves the reading. `check` raises if the command is not to be given to this state: it is
    asked of every state that is decided on.

    Raises:
        CommandRefused: the rules say no.
        InvalidEvent, LedgerBusy, LedgerUnavailable: as `EventLog.append`.
    """
    rules = rules_of(stream)
    current = known is None
    if known is None:
        known = await load(log, stream)
    tries = 0
    while True:
        tries += 1
        now = log.clock.estimate()
        check(known)
        try:
            events = rules.decide(command, known.state)
        except CommandRefused:
            if current:
                raise
            events = []
        if not events and not current:  # only an append finds out that `known` is behind; without one we have to look
            known, current = await _brought_up_to_date(log, stream, known), True
            continue
        try:
            correlated = _correlated(meta, known.state)
            appends = [Append(stream, known.head, events, correlated, now), *_consequences(stream, known, events, now)]
            recorded = (await log.append(*appends))[: len(events)] if events else []
        except VersionConflict:
            if tries == _TRIES:
                raise
            if tries > 1:  # many want this stream: not all of them again in the same instant
                await asyncio.sleep(random.uniform(0, 0.002 * tries))  # noqa: S311 - spreads load, guards no secret
            known, current = await _brought_up_to_date(log, stream, known), True
        else:
            return Handled(recorded, known.after(recorded))


def _consequences(stream: str, known: Known, events: Sequence[Event], now: datetime) -> Iterable[Append]:
    """Return what begins with an end: whoever asked for it is told, so the delivery is queued in the same transaction.

    Each end has a delivery of its own, named after it: so there is one and never two, whoever dies when.
    """
    if not isinstance(known.state, Job | Batch) or known.state.asked.webhook is None:
        return
    for version, event in enumerate(events, known.head.version + 1):
        queued = delivery.of_end(stream, known.state, event, version)
        if queued is not None:
            meta = Meta("system", queued.batch_id or stream)
            yield Append(delivery.name_of(stream, version), Head(), [queued], meta, now)


async def _brought_up_to_date(log: EventLog, stream: str, known: Known) -> Known:
    """Take in what follows in the stream, event by event: all of it together may be larger than memory."""
    async with aclosing(log.iterate_stream(stream, after_version=known.head.version)) as events:
        async for event in events:
            known = known.after([event])
    return known


def _correlated(meta: Meta, state: State | None) -> Meta:
    """Every event of a batch's job names the batch, whoever caused it: so a batch can be followed as one story."""
    if meta.correlation_id is None and isinstance(state, Job | Delivery) and state.asked.batch_id is not None:
        return replace(meta, correlation_id=state.asked.batch_id)
    return meta


async def outcome(log: EventLog, stream: str, command: Command, *, known: Known) -> Handled | None:
    """Find out, after `LedgerUnavailable`, whether `command` took effect all the same: an append may land unheard.

    `known` is what the command was decided on. None means that it did not, and may be given again.

    Raises:
        LedgerUnavailable: the database still does not answer.
    """
    expected = rules_of(stream).decide(command, known.state)
    since = await log.read_stream(stream, after_version=known.head.version)
    mine = since[: len(expected)]
    if expected and [it.event for it in mine] == list(expected):
        return Handled(mine, known.after(since))
    return None


async def handle_new(log: EventLog, commands: Sequence[tuple[str, Command]], *, meta: Meta) -> list[Recorded]:
    """Apply commands that each begin a stream (a batch and its jobs): all of them happen, or none.

    Raises:
        CommandRefused, VersionConflict: a stream exists already.
        InvalidEvent, LedgerBusy, LedgerUnavailable: as `EventLog.append`.
    """
    now = log.clock.estimate()
    appends = [
        Append(stream, Head(), rules_of(stream).decide(command, None), meta, now) for stream, command in commands
    ]
    return await log.append(*appends)


async def load(log: EventLog, stream: str) -> Known:
    """Return what the log says of a stream now."""
    return await _brought_up_to_date(log, stream, Known())


async def is_deleted(log: EventLog, stream: str) -> bool:
    """Return whether a job or batch was deleted."""
    return bool(await log.read_stream(stream, types=(JobDeleted, BatchDeleted), limit=1))


async def load_all(log: EventLog, streams: Collection[str]) -> dict[str, Known | UnreadableEvent]:
    """Return what the log says of many streams now, or why one of them cannot be read."""
    found: dict[str, Known | UnreadableEvent] = dict.fromkeys(streams, Known())
    async with aclosing(log.read_in_parts(streams)) as parts:
        async for events in parts:
            for event in events:
                known = found[event.stream]
                if isinstance(known, Known):
                    found[event.stream] = _after(known, event)
    return found


def _after(known: Known, event: Recorded) -> Known | UnreadableEvent:
    try:
        return known.after((event,))
    except UnreadableEvent as error:
        return error
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not stop the other streams
        return UnreadableEvent(f"{event.stream} cannot be read: {error!r}")
