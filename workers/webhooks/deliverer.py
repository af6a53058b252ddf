"""workers: sends the webhooks that are to be sent, and puts on record what came of it.

A delivery is queued by the very transaction that records the end it tells of (ledger/store/command_handler.py), so
none is forgotten.
One process leads and sends; it learns of deliveries by the change stream of their view, and timers tell it when one is
due again. Why none is left out: at every start of the stream all pending ones are read. Why one may come twice: whoever
dies between sending and recording leaves it pending, and it is sent again, under the same `webhook-id`.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.commands import AbandonDelivery, DeliveryCommand, RecordAttempt
from jobledger.ledger.domain.delivery import Delivery, endpoint_id_for
from jobledger.ledger.domain.errors import CommandRejected, LedgerBusy, LedgerUnavailable, UnreadableEvent
from jobledger.ledger.domain.events import EventMetadata, Failure
from jobledger.ledger.files.directory import FileStore
from jobledger.ledger.mongo.connection import Connection, Database, Document, translate_errors
from jobledger.ledger.mongo.leader_election import LeaderElection
from jobledger.ledger.net.webhook_signature import build_signature_headers
from jobledger.ledger.store.change_stream import CallbackListener, ChangeStream
from jobledger.ledger.store.command_handler import (
    CommandResult,
    StreamState,
    find_outcome,
    handle_command,
    is_deleted,
    load_stream_state,
)
from jobledger.ledger.store.endpoint_secrets import Endpoint, load_signing_secrets
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import Checkpoint
from jobledger.projections.slots import SLOTS, collection_name
from jobledger.projections.views import deliveries
from jobledger.workers.webhooks.body import BodyUnavailable, build_body
from jobledger.workers.webhooks.schedule import DeliveryLimits, DeliverySchedule, ScheduledDelivery
from jobledger.workers.webhooks.sender import Sender, WebhookRequest, WebhookResponse

_log = structlog.get_logger()
SECRETS: Final = "webhook_secrets"
"""Values of headers, and what is signed with, by the `secrets_ref` of a webhook. They are nowhere else."""
_LONGEST_RETRY_AFTER: Final = 86_400.0
_PAUSE_SECONDS: Final = 1.0
_AFTER_FAULT_SECONDS: Final = 60.0
_READ_AT_ONCE: Final = 1000


@dataclass(frozen=True, slots=True)
class DeliverySettings:
    """`schedule` holds the pauses before each attempt, in seconds; they vary at random by the share `jitter`."""

    retry_delays: Sequence[float] = (0, 5, 300, 1800, 7200, 18_000, 36_000, 86_400)
    jitter: float = 0.1
    timeout_seconds: float = 10.0
    allowed_private_hosts: Sequence[str] = ()
    limits: DeliveryLimits = DeliveryLimits()  # noqa: RUF009 - frozen
    base_url: str = ""

    @property
    def max_age(self) -> timedelta:
        """After this time nothing is tried any more that had to wait for its receiver."""
        return timedelta(seconds=sum(self.retry_delays) * (1 + self.jitter) + 60)


class Deliverer:
    """Delivers webhooks while it is the leader, and stands by while another is."""

    def __init__(
        self,
        db: Database,
        event_store: EventStore,
        file_store: FileStore,
        checkpoint: Checkpoint,
        change_stream: ChangeStream,
        connection: Connection,
        *,
        settings: DeliverySettings,
        holder: str,
        lease_seconds: float = 10.0,
        sender: Sender | None = None,
    ) -> None:
        self._db = db
        self._log = event_store
        self._store = file_store
        self._checkpoint = checkpoint
        self._settings = settings
        self._meta = EventMetadata(f"webhooks:{holder}")
        self._sender = sender or Sender(
            allowed_private_hosts=settings.allowed_private_hosts, timeout_seconds=settings.timeout_seconds
        )
        self._election = LeaderElection(connection, "webhooks", holder=holder, lease_seconds=lease_seconds)
        self._schedule = DeliverySchedule(settings.limits)
        self._wake = asyncio.Event()
        self._is_leader = False
        self._needs_full_read = False
        """All that is pending has to be read."""
        self._changed_ids: set[str] = set()
        """Deliveries that have changed, or may have."""
        self._recorded: dict[str, int] = {}
        """The version of each delivery that is on record by us, until the view has it: what it says before is old."""
        self._sending: set[asyncio.Task[None]] = set()
        change_stream.add_listener(self._election)
        for side in SLOTS:  # what is made anew beside the live view is heard, too, and looked for where it is live
            change_stream.add_listener(
                CallbackListener(collection_name(deliveries.NAME, side), self._changed, self._resync)
            )

    async def run(self) -> None:
        """Stand by, lead, stand by …, until cancelled."""
        try:
            await self._election.run(self._lead)
        finally:
            await self._sender.aclose()

    # Hearing ------------------------------------------------------------------------------------------------------

    async def _resync(self, session: AsyncClientSession) -> None:
        self._needs_full_read = True
        self._wake.set()

    def _changed(self, change: Mapping[str, Any]) -> None:
        if self._is_leader:
            self._mark_changed(change["documentKey"]["_id"])

    async def _read_pending(self) -> None:
        """Take in what is pending: all of it, or what has changed. What changes meanwhile is news again."""
        if self._needs_full_read:
            self._needs_full_read = False
            self._changed_ids.clear()
            self._schedule.clear()
            async for delivery in deliveries.iter_pending(self._checkpoint.views):
                self._schedule_delivery(delivery)
        while self._changed_ids:
            news = [self._changed_ids.pop() for _ in range(min(len(self._changed_ids), _READ_AT_ONCE))]
            try:
                found = {it["_id"]: it async for it in deliveries.iter_pending(self._checkpoint.views, news)}
            except LedgerUnavailable:
                self._changed_ids.update(news)
                raise
            for delivery_id in news:
                if delivery_id in found:
                    self._schedule_delivery(found[delivery_id])
                else:
                    self._schedule.remove(delivery_id)
                    self._recorded.pop(delivery_id, None)

    def _schedule_delivery(self, delivery: Document) -> None:
        if delivery["version"] < self._recorded.get(delivery["_id"], 0):
            self._schedule.remove(delivery["_id"])
            return
        self._recorded.pop(delivery["_id"], None)
        self._schedule.add(
            ScheduledDelivery(
                delivery["next_attempt_at"],
                delivery["_id"],
                delivery["version"],
                delivery["host"],
                delivery["queued_at"] + self._settings.max_age,
                delivery["sequence"],
            )
        )

    # Sending ------------------------------------------------------------------------------------------------------

    async def _lead(self) -> None:
        self._is_leader = self._needs_full_read = True
        _log.info("webhooks are sent from here")
        try:
            while True:
                self._wake.clear()
                await self._read_pending()
                now = await self._log.server_time()
                tried, given_up = self._schedule.take_due(now)
                for due in tried:
                    self._start_task(self._deliver(due), due)
                for due in given_up:
                    self._start_task(self._give_up(due), due)
                await self._sleep(self._schedule.next_due_at(now))
        finally:
            self._is_leader = False
            await self._drain()

    def _start_task(self, work: Coroutine[None, None, None], due: ScheduledDelivery) -> None:
        task = asyncio.create_task(work, name=due.delivery_id)
        self._sending.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        delivery_id = task.get_name()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a webhook could not be dealt with", delivery_id=delivery_id, exc_info=error)
            task.get_loop().call_later(_AFTER_FAULT_SECONDS, self._mark_changed, delivery_id)
        else:
            self._mark_changed(delivery_id)  # it may have been asked for again while it was on its way

    def _mark_changed(self, delivery_id: str) -> None:
        self._changed_ids.add(delivery_id)
        self._wake.set()

    async def _sleep(self, next_attempt_at: datetime | None) -> None:
        """Wait until something happens, or a delivery is due by the server's clock, which is read again and again."""
        clock = self._log.clock
        while True:
            try:
                async with asyncio.timeout(
                    None if next_attempt_at is None else clock.sleep_seconds_until(next_attempt_at)
                ):
                    await self._wake.wait()
                    return
            except TimeoutError:
                if next_attempt_at is None or clock.is_uncertain or clock.seconds_until(next_attempt_at) == 0:
                    return

    async def _drain(self) -> None:
        """Let what is on its way arrive and be recorded; else it would be sent once more by the next leader."""
        if self._sending:
            await asyncio.wait(self._sending, timeout=self._settings.timeout_seconds + _PAUSE_SECONDS)
        for task in self._sending:
            task.cancel()

    async def _deliver(self, due: ScheduledDelivery) -> None:
        answered = True
        try:
            known = await load_stream_state(self._log, due.delivery_id)
            delivery, now = known.state, self._log.clock.estimate()
            if not isinstance(delivery, Delivery):
                return
            if delivery.status != "pending" or (delivery.due_at is not None and delivery.due_at > now):
                self._recorded[due.delivery_id] = (
                    known.head.version
                )  # somebody else has put on record what we did not know
                return
            if await is_deleted(self._log, delivery.spec.source):
                # Its content is not sent any more. Asked before each call: who deletes it later deletes it too late.
                await self._record(due.delivery_id, AbandonDelivery(f"{delivery.spec.source} was deleted."), known)
                return
            command, answered = await self._attempt(due, delivery)
            await self._record(due.delivery_id, command, known)
        except (LedgerUnavailable, LedgerBusy) as error:
            _log.warning("a webhook has to wait for the database", delivery_id=due.delivery_id, error=str(error))
            await asyncio.sleep(_PAUSE_SECONDS)
        finally:
            self._schedule.record_result(due, is_responsive=answered, now=self._log.clock.estimate())

    async def _attempt(self, due: ScheduledDelivery, delivery: Delivery) -> tuple[RecordAttempt, bool]:
        """Call the receiver; return what to put on record, and whether it answered at all."""
        try:
            outgoing = await self._build_request(due, delivery)
        except (BodyUnavailable, UnreadableEvent) as error:
            failure = Failure(code="BODY_UNAVAILABLE", message=str(error))
            return RecordAttempt(0.0, None, error=failure, retry_at=self._retry_at(delivery, 0.0)), True
        answer = await self._sender.send(outgoing)
        failure_ = self._failure(answer)
        if failure_ is not None:
            _log.info("webhook not delivered", delivery_id=due.delivery_id, host=due.host, error=failure_.code)
        command = RecordAttempt(
            duration_s=round(answer.duration_s, 3),
            body_sha256=hashlib.sha256(outgoing.body).hexdigest(),
            status_code=answer.status_code,
            error=failure_,
            response=answer.body,
            retry_at=None if answer.is_permanent else self._retry_at(delivery, answer.retry_after_s or 0.0),
        )
        return command, answer.is_host_responsive

    @staticmethod
    def _failure(answer: WebhookResponse) -> Failure | None:
        if answer.error_code is None:
            return None
        return Failure(code=answer.error_code, message=answer.message or answer.error_code)

    async def _build_request(self, due: ScheduledDelivery, delivery: Delivery) -> WebhookRequest:
        webhook = delivery.spec.webhook
        kept = await self._load_secrets(webhook.secrets_ref)
        receiver = endpoint_id_for(delivery.spec.user_id, webhook.url)
        body = await build_body(
            self._log,
            self._store,
            due.delivery_id,
            delivery,
            sequence=due.sequence,
            endpoint_id=receiver,
            base_url=self._settings.base_url,
        )
        secrets = kept.get("secrets") or await load_signing_secrets(
            self._db, Endpoint(delivery.spec.user_id, webhook.url)
        )
        if not secrets:
            raise BodyUnavailable("The signing secret of this endpoint was revoked. Rotate it to have a new one.")
        headers = {
            **kept.get("headers", {}),
            "Content-Type": "application/json",
            **build_signature_headers(secrets, due.delivery_id, int(self._log.clock.estimate().timestamp()), body),
        }
        return WebhookRequest(webhook.url, headers, body)

    async def _load_secrets(self, reference: str | None) -> Document:
        """Return the secrets of a webhook."""
        if reference is None:
            return {}
        with translate_errors("reading the secrets of a webhook"):
            kept = await self._db[SECRETS].find_one({"_id": reference})
        if kept is None:
            raise BodyUnavailable("The values of its headers, or what it is signed with, have been removed.")
        return kept

    def _retry_at(self, delivery: Delivery, retry_after: float) -> datetime | None:
        """Return when to try again after one more failure, None if there were enough."""
        made = delivery.counted_attempts + 1
        if made >= len(self._settings.retry_delays):
            return None
        share = self._settings.jitter
        pause = self._settings.retry_delays[made] * random.uniform(1 - share, 1 + share)  # noqa: S311 - spreads load
        return self._log.clock.estimate() + timedelta(seconds=max(pause, min(retry_after, _LONGEST_RETRY_AFTER)))

    async def _give_up(self, due: ScheduledDelivery) -> None:
        reason = f"{due.host} has not answered for so long that the schedule is over."
        known = await load_stream_state(self._log, due.delivery_id)
        with suppress(CommandRejected):
            await self._record(due.delivery_id, AbandonDelivery(reason), known)

    async def _record(self, delivery_id: str, command: DeliveryCommand, known: StreamState) -> None:
        """Put it on record, once. While the database is away it is tried again."""
        handled: CommandResult | None = None
        while handled is None:
            try:
                handled = await handle_command(self._log, delivery_id, command, meta=self._meta, stream_state=known)
            except (LedgerUnavailable, LedgerBusy) as error:
                _log.warning("not recorded yet", delivery_id=delivery_id, error=str(error))
                await asyncio.sleep(_PAUSE_SECONDS)
                with suppress(LedgerUnavailable):
                    handled = await find_outcome(self._log, delivery_id, command, stream_state=known)
        self._recorded[delivery_id] = handled.stream_state.head.version
