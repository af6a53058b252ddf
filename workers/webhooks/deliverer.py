"""Send due webhooks and record the attempts.

The transaction that records the end of a job or batch also queues the delivery (`ledger/store/command_handler.py`), so
no delivery is missed. One process is the leader and sends. It observes deliveries through the change stream of their
view, and timers signal due retries. At each start of the stream, all pending deliveries are read.

A delivery may be sent twice: if the process crashes between sending and recording, the delivery stays pending, and
it is sent again with the same `webhook-id`.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Final

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.commands import AbandonDelivery, DeliveryCommand, RecordAttempt
from jobledger.ledger.domain.delivery import Delivery, build_endpoint_id
from jobledger.ledger.domain.errors import (
    CommandRejected,
    JobledgerError,
    LedgerBusy,
    LedgerUnavailable,
    UnreadableEvent,
)
from jobledger.ledger.domain.events import ErrorInfo, EventMetadata
from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.mongo.connection import Connection, Database, Document, translate_errors
from jobledger.ledger.mongo.leader_election import LeaderElection
from jobledger.ledger.store import command_handler
from jobledger.ledger.store.change_stream import CallbackListener, ChangeStream
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.webhooks.endpoint_secrets import Endpoint, load_signing_secrets
from jobledger.ledger.webhooks.signature import build_signature_headers
from jobledger.projections.engine.checkpoint import CheckpointFollower
from jobledger.projections.slots import SLOTS, get_collection_name
from jobledger.projections.views import deliveries
from jobledger.workers.settings import WebhookSettings
from jobledger.workers.webhooks.body import BodyUnavailable, build_body
from jobledger.workers.webhooks.schedule import DeliverySchedule, ScheduledDelivery
from jobledger.workers.webhooks.webhook_client import WebhookClient, WebhookRequest

_log = structlog.get_logger()
_MAX_RETRY_AFTER_SECONDS: Final = 86_400.0
_PAUSE_SECONDS: Final = 1.0
_RETRY_AFTER_ERROR_SECONDS: Final = 60.0
_READ_BATCH_SIZE: Final = 1000


class SecretsUnavailable(JobledgerError):
    """The header values or signing secrets of a webhook were removed or revoked."""


class Deliverer:
    """The role `webhook-sender`. Delivers webhooks while it is the leader, and otherwise stands by."""

    def __init__(
        self,
        db: Database,
        event_store: EventStore,
        checkpoint: CheckpointFollower,
        change_stream: ChangeStream,
        connection: Connection,
        file_store: FileStore,
        *,
        settings: WebhookSettings,
        base_url: str,
        holder: str,
        client: WebhookClient | None = None,
    ) -> None:
        self._db = db
        self._event_store = event_store
        self._file_store = file_store
        self._checkpoint = checkpoint
        self._settings = settings
        self._base_url = base_url
        self._metadata = EventMetadata(f"webhooks:{holder}")
        self._client = client or WebhookClient(
            allowed_private_hosts=settings.allowed_private_hosts, timeout_seconds=settings.timeout_seconds
        )
        self._election = LeaderElection(connection, "webhooks", holder=holder, lease_seconds=settings.lease_seconds)
        self._schedule = DeliverySchedule(settings)
        self._wake = asyncio.Event()
        self._is_leader = False
        self._needs_full_read = False
        """Whether all pending deliveries must be read."""
        self._changed_ids: set[str] = set()
        """Deliveries that have changed or may have changed."""
        self._recorded: dict[str, int] = {}
        """Recorded versions of deliveries that the view does not contain yet. The older states in the view are ignored.
        """
        self._sending: set[asyncio.Task[None]] = set()
        change_stream.add_listener(self._election)
        for slot in SLOTS:  # also the shadow slot of a rebuild; deliveries are read from the active slot
            change_stream.add_listener(
                CallbackListener(get_collection_name(deliveries.NAME, slot), self._on_change, self._resync)
            )

    async def run(self) -> None:
        """Stand by and lead, alternately, until cancelled."""
        try:
            await self._election.run(self._lead)
        finally:
            await self._client.aclose()

    # Reading ------------------------------------------------------------------------------------------------------

    async def _resync(self, session: AsyncClientSession) -> None:
        self._needs_full_read = True
        self._wake.set()

    def _on_change(self, change: Mapping[str, Any]) -> None:
        if self._is_leader:
            self._mark_changed(change["documentKey"]["_id"])

    async def _read_pending(self) -> None:
        """Read the pending deliveries: all of them, or those that have changed."""
        if self._needs_full_read:
            self._needs_full_read = False
            self._changed_ids.clear()
            self._schedule.clear()
            async for delivery in deliveries.iter_pending(self._checkpoint.views):
                self._schedule_delivery(delivery)
        while self._changed_ids:
            delivery_ids = [self._changed_ids.pop() for _ in range(min(len(self._changed_ids), _READ_BATCH_SIZE))]
            try:
                pending = {
                    row["_id"]: row async for row in deliveries.iter_pending(self._checkpoint.views, delivery_ids)
                }
            except LedgerUnavailable:
                self._changed_ids.update(delivery_ids)
                raise
            for delivery_id in delivery_ids:
                if delivery_id in pending:
                    self._schedule_delivery(pending[delivery_id])
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
        _log.info("this process sends webhooks")
        try:
            while True:
                self._wake.clear()
                await self._read_pending()
                now = await self._event_store.read_server_time()
                to_attempt, to_abandon = self._schedule.take_due(now)
                for due in to_attempt:
                    self._start_task(self._deliver(due), due)
                for due in to_abandon:
                    self._start_task(self._abandon(due), due)
                await self._sleep(self._schedule.get_next_due_at(now))
        finally:
            self._is_leader = False
            await self._drain()

    def _start_task(self, work: Coroutine[None, None, None], due: ScheduledDelivery) -> None:
        task = asyncio.create_task(work, name=due.delivery_id)
        self._sending.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        delivery_id = task.get_name()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("unexpected error while delivering a webhook", delivery_id=delivery_id, exc_info=error)
            task.get_loop().call_later(_RETRY_AFTER_ERROR_SECONDS, self._mark_changed, delivery_id)
        else:
            self._mark_changed(delivery_id)  # it may have been requeued during the attempt

    def _mark_changed(self, delivery_id: str) -> None:
        self._changed_ids.add(delivery_id)
        self._wake.set()

    async def _sleep(self, next_attempt_at: datetime | None) -> None:
        """Wait for a change, or until a delivery is due by the server's clock, which is read repeatedly."""
        clock = self._event_store.clock
        while True:
            try:
                async with asyncio.timeout(
                    None if next_attempt_at is None else clock.compute_sleep_seconds(next_attempt_at)
                ):
                    await self._wake.wait()
                    return
            except TimeoutError:
                if next_attempt_at is None or clock.is_uncertain or clock.compute_seconds_until(next_attempt_at) == 0:
                    return

    async def _drain(self) -> None:
        """Wait for attempts in flight and record them. Otherwise the next leader would send them again."""
        if self._sending:
            await asyncio.wait(self._sending, timeout=self._settings.timeout_seconds + _PAUSE_SECONDS)
        for task in self._sending:
            task.cancel()

    async def _deliver(self, due: ScheduledDelivery) -> None:
        is_responsive = True
        try:
            state = await command_handler.load_stream_state(self._event_store, due.delivery_id)
            delivery, now = state.aggregate, self._event_store.clock.estimate()
            if not isinstance(delivery, Delivery):
                return
            if delivery.status != "pending" or (delivery.due_at is not None and delivery.due_at > now):
                self._recorded[due.delivery_id] = state.head.version  # recorded by another process
                return
            if await command_handler.is_deleted(self._event_store, delivery.spec.source):
                # Content of deleted jobs is not sent. The check precedes each attempt; a later deletion is too late.
                await self._record(due.delivery_id, AbandonDelivery(f"{delivery.spec.source} was deleted."), state)
                return
            command, is_responsive = await self._attempt(due, delivery)
            await self._record(due.delivery_id, command, state)
        except (LedgerUnavailable, LedgerBusy) as error:
            _log.warning("cannot deliver a webhook yet", delivery_id=due.delivery_id, error=str(error))
            await asyncio.sleep(_PAUSE_SECONDS)
        finally:
            self._schedule.record_result(due, is_responsive=is_responsive, now=self._event_store.clock.estimate())

    async def _attempt(self, due: ScheduledDelivery, delivery: Delivery) -> tuple[RecordAttempt, bool]:
        """Send the webhook. Return the command that records the attempt, and whether the host responded."""
        try:
            request = await self._build_request(due, delivery)
        except (BodyUnavailable, SecretsUnavailable, UnreadableEvent) as error:
            code = "SECRETS_UNAVAILABLE" if isinstance(error, SecretsUnavailable) else "BODY_UNAVAILABLE"
            unavailable = ErrorInfo(code=code, message=str(error))
            retry_at = self._compute_next_attempt_at(delivery, 0.0)
            return RecordAttempt(0.0, None, error=unavailable, next_attempt_at=retry_at), True
        response = await self._client.send(request)
        failure = None
        if response.error_code is not None:
            failure = ErrorInfo(code=response.error_code, message=response.message or response.error_code)
            _log.info("webhook attempt failed", delivery_id=due.delivery_id, host=due.host, error=failure.code)
        retry_at = (
            None if response.is_permanent else self._compute_next_attempt_at(delivery, response.retry_after_s or 0.0)
        )
        command = RecordAttempt(
            duration_s=round(response.duration_s, 3),
            body_sha256=hashlib.sha256(request.body).hexdigest(),
            status_code=response.status_code,
            error=failure,
            response=response.body,
            next_attempt_at=retry_at,
        )
        return command, response.is_host_responsive

    async def _build_request(self, due: ScheduledDelivery, delivery: Delivery) -> WebhookRequest:
        webhook = delivery.spec.webhook
        stored = await self._load_secrets(webhook.secrets_ref)
        endpoint_id = build_endpoint_id(delivery.spec.user_id, webhook.url)
        body = await build_body(
            self._event_store,
            self._file_store,
            due.delivery_id,
            delivery,
            sequence=due.sequence,
            endpoint_id=endpoint_id,
            base_url=self._base_url,
        )
        secrets = stored.get("secrets") or await load_signing_secrets(
            self._db, Endpoint(delivery.spec.user_id, webhook.url)
        )
        if not secrets:
            raise SecretsUnavailable("The signing secret of this endpoint was revoked. Rotate it to create a new one.")
        timestamp = int(self._event_store.clock.estimate().timestamp())
        headers = {
            **stored.get("headers", {}),
            "Content-Type": "application/json",
            **build_signature_headers(secrets, due.delivery_id, timestamp, body),
        }
        return WebhookRequest(webhook.url, headers, body)

    async def _load_secrets(self, reference: str | None) -> Document:
        """Return the header values and signing secrets of a webhook. They are stored nowhere else."""
        if reference is None:
            return {}
        with translate_errors("reading the secrets of a webhook"):
            stored = await self._db.webhook_secrets.find_one({"_id": reference})
        if stored is None:
            raise SecretsUnavailable("The header values or signing secrets of this webhook were removed.")
        return stored

    def _compute_next_attempt_at(self, delivery: Delivery, retry_after: float) -> datetime | None:
        """Return the time of the next attempt after one more failure; None if there were enough."""
        attempts = delivery.counted_attempts + 1
        if attempts >= len(self._settings.retry_delays_seconds):
            return None
        jitter = self._settings.jitter
        delay = self._settings.retry_delays_seconds[attempts] * random.uniform(1 - jitter, 1 + jitter)  # noqa: S311 - spreads load
        delay = max(delay, min(retry_after, _MAX_RETRY_AFTER_SECONDS))
        return self._event_store.clock.estimate() + timedelta(seconds=delay)

    async def _abandon(self, due: ScheduledDelivery) -> None:
        reason = f"{due.host} did not respond until the end of the retry schedule."
        state = await command_handler.load_stream_state(self._event_store, due.delivery_id)
        with suppress(CommandRejected):
            await self._record(due.delivery_id, AbandonDelivery(reason), state)

    async def _record(self, delivery_id: str, command: DeliveryCommand, state: command_handler.StreamState) -> None:
        """Record a command once. Retry while the database is unavailable or busy."""
        result = await command_handler.handle_command_with_retries(
            self._event_store,
            delivery_id,
            command,
            meta=self._metadata,
            stream_state=state,
            retry_seconds=_PAUSE_SECONDS,
            on_retry=lambda error: _log.warning(
                "cannot record a delivery attempt yet", delivery_id=delivery_id, error=str(error)
            ),
        )
        self._recorded[delivery_id] = result.stream_state.head.version
