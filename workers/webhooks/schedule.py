"""Decide which webhook delivery is attempted next. Pure: no clock and no network.

A delivery waits for its due time, and until its host may get another attempt. The number of concurrent attempts is
limited, and hosts take turns, so a host that hangs does not delay the others.

Each host has a circuit breaker. After a number of consecutive attempts without a response, the host gets no attempts
during a cooldown. After it, one delivery is attempted. If it gets no response, the next cooldown is twice as long.
Waiting costs no attempt, but a delivery that has waited longer than its whole retry schedule is abandoned.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from jobledger.workers.settings import WebhookSettings

_MAX_COOLDOWN: Final = timedelta(minutes=10)


class ScheduledDelivery(NamedTuple):
    """A pending delivery: not attempted before `due_at`, and not after `give_up_at`. `version` identifies its state."""

    due_at: datetime
    delivery_id: str
    version: int
    host: str
    give_up_at: datetime
    sequence: int = 0


@dataclass(slots=True)
class _Host:
    """The due deliveries of a host, in order, and the state of its circuit breaker."""

    ready: deque[ScheduledDelivery] = field(default_factory=deque)
    in_flight: int = 0
    consecutive_failures: int = 0
    cooldown: timedelta = timedelta()
    open_until: datetime | None = None


class DeliverySchedule:
    """All pending deliveries."""

    def __init__(self, settings: WebhookSettings) -> None:
        self._settings = settings
        self._current: dict[str, ScheduledDelivery] = {}
        self._scheduled: list[ScheduledDelivery] = []
        self._hosts: dict[str, _Host] = {}
        self._in_flight: dict[str, str] = {}

    def clear(self) -> None:
        """Remove all waiting deliveries. Attempts in flight continue, and the state of hosts is kept."""
        self._current.clear()
        self._scheduled.clear()
        for host in self._hosts.values():
            host.ready.clear()

    def add(self, due: ScheduledDelivery) -> None:
        """Add a delivery or its newer state."""
        self._current[due.delivery_id] = due
        heapq.heappush(self._scheduled, due)

    def remove(self, delivery_id: str) -> None:
        """Remove a delivery that is no longer pending."""
        self._current.pop(delivery_id, None)

    def take_due(self, now: datetime) -> tuple[list[ScheduledDelivery], list[ScheduledDelivery]]:
        """Return and remove the deliveries to attempt now, and those to abandon.

        Call `record_result` for each attempt.
        """
        while self._scheduled and self._scheduled[0].due_at <= now:
            due = heapq.heappop(self._scheduled)
            if self._is_current(due):
                self._hosts.setdefault(due.host, _Host()).ready.append(due)
        to_abandon = [due for host in self._hosts.values() for due in self._take_expired(host, now)]
        to_attempt: list[ScheduledDelivery] = []
        while len(self._in_flight) < self._settings.max_concurrent and (round_ := list(self._take_round(now))):
            to_attempt += round_
        self._hosts = {
            name: host
            for name, host in self._hosts.items()
            if host.ready or host.in_flight or host.consecutive_failures
        }
        return to_attempt, to_abandon

    def record_result(self, due: ScheduledDelivery, *, is_responsive: bool, now: datetime) -> None:
        """Record that an attempt has ended, and whether the host responded."""
        self._in_flight.pop(due.delivery_id, None)
        host = self._hosts.setdefault(due.host, _Host())
        host.in_flight -= 1
        if is_responsive:
            host.consecutive_failures, host.cooldown, host.open_until = 0, timedelta(), None
            return
        host.consecutive_failures += 1
        if host.consecutive_failures >= self._settings.circuit_breaker_failures and (
            host.open_until is None or host.open_until <= now
        ):
            first_cooldown = timedelta(seconds=self._settings.circuit_breaker_cooldown_seconds)
            host.cooldown = min(2 * host.cooldown, _MAX_COOLDOWN) if host.cooldown else first_cooldown
            host.open_until = now + host.cooldown

    def get_next_due_at(self, now: datetime) -> datetime | None:
        """Return when `take_due` may return a delivery again if nothing changes. Call after `take_due(now)`."""
        while self._scheduled and not self._is_current(self._scheduled[0]):
            heapq.heappop(self._scheduled)
        cooldown_ends = [host.open_until for host in self._hosts.values() if host.ready and host.open_until]
        # Do not wait for a cooldown that has ended: its one attempt is in flight, and its result will be recorded.
        return min(
            [*(end for end in cooldown_ends if end > now), *(due.due_at for due in self._scheduled[:1])], default=None
        )

    def _is_current(self, due: ScheduledDelivery) -> bool:
        return self._current.get(due.delivery_id) is due

    def _take_expired(self, host: _Host, now: datetime) -> Iterator[ScheduledDelivery]:
        """Yield deliveries that have waited too long, but only when a cooldown has ended."""
        if host.open_until is None or host.open_until > now or host.in_flight:
            return
        expired = [due for due in host.ready if due.give_up_at <= now and self._is_current(due)]
        for due in expired:
            del self._current[due.delivery_id]
            yield due

    def _take_round(self, now: datetime) -> Iterator[ScheduledDelivery]:
        for name, host in list(self._hosts.items()):
            if len(self._in_flight) >= self._settings.max_concurrent:
                return
            if (due := self._find_next_delivery(host, now)) is not None:
                del self._current[due.delivery_id]
                self._in_flight[due.delivery_id] = name
                host.in_flight += 1
                self._hosts[name] = self._hosts.pop(name)  # this host is last in the next round
                yield due

    def _find_next_delivery(self, host: _Host, now: datetime) -> ScheduledDelivery | None:
        max_attempts = self._settings.max_concurrent_per_host
        if host.open_until is not None:
            max_attempts = 1 if host.open_until <= now else 0
        if host.in_flight >= max_attempts:
            return None
        while host.ready:
            due = host.ready.popleft()
            # A delivery in flight is not attempted again. Its next state is added when the attempt has ended.
            if self._is_current(due) and due.delivery_id not in self._in_flight:
                return due
        return None
