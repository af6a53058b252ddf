"""workers: which webhook is to be sent next. Pure: no clock, no network.

Deliveries wait for their time, and then for a turn at their host: so many at a time, hosts taking turns, so that a
receiver which hangs holds up nobody else. A host that has not answered so many times in a row is left alone for a
while (a circuit breaker): then one delivery is tried, and if that gets no answer either, it is left alone for twice as
long. Waiting costs no attempt; but what has waited for longer than its whole schedule is given up.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, NamedTuple

_MAX_COOLDOWN: Final = timedelta(minutes=10)


class ScheduledDelivery(NamedTuple):
    """A pending delivery: not before `due`, and not after `give_up_at`. `version` tells its states apart."""

    due_at: datetime
    delivery_id: str
    version: int
    host: str
    give_up_at: datetime
    sequence: int = 0


@dataclass(slots=True)
class _Host:
    """The deliveries whose time has come, in that order, and how the host has behaved."""

    ready: deque[ScheduledDelivery] = field(default_factory=deque)
    in_flight: int = 0
    consecutive_failures: int = 0
    cooldown: timedelta = timedelta()
    open_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class DeliveryLimits:
    """How many at a time, in all and at one host; after how many times without an answer a host rests, and how long."""

    max_concurrent: int = 20
    max_concurrent_per_host: int = 4
    circuit_breaker_failures: int = 10
    circuit_breaker_cooldown: timedelta = timedelta(seconds=30)


class DeliverySchedule:
    """All pending deliveries."""

    def __init__(self, limits: DeliveryLimits) -> None:
        self._limits = limits
        self._current: dict[str, ScheduledDelivery] = {}
        self._scheduled: list[ScheduledDelivery] = []
        self._hosts: dict[str, _Host] = {}
        self._in_flight: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._current)

    def clear(self) -> None:
        """Forget all that wait; what is being tried goes on, and what is known of hosts stays."""
        self._current.clear()
        self._scheduled.clear()
        for host in self._hosts.values():
            host.ready.clear()

    def add(self, due: ScheduledDelivery) -> None:
        """Take in a delivery, or its newer state."""
        self._current[due.delivery_id] = due
        heapq.heappush(self._scheduled, due)

    def remove(self, delivery_id: str) -> None:
        """Forget a delivery: it is not pending any more."""
        self._current.pop(delivery_id, None)

    def take_due(self, now: datetime) -> tuple[list[ScheduledDelivery], list[ScheduledDelivery]]:
        """Return which deliveries are to be tried now, and which are to be given up. They wait no longer.

        Each that is tried has to be reported to `done`.
        """
        while self._scheduled and self._scheduled[0].due_at <= now:
            due = heapq.heappop(self._scheduled)
            if self._is_current(due):
                self._hosts.setdefault(due.host, _Host()).ready.append(due)
        given_up = [due for host in self._hosts.values() for due in self._take_expired(host, now)]
        tried: list[ScheduledDelivery] = []
        while len(self._in_flight) < self._limits.max_concurrent and (round_ := list(self._take_round(now))):
            tried += round_
        self._forget_idle_hosts()
        return tried, given_up

    def record_result(self, due: ScheduledDelivery, *, is_responsive: bool, now: datetime) -> None:
        """Note that a try has ended, and whether the host gave any answer."""
        self._in_flight.pop(due.delivery_id, None)
        host = self._hosts.setdefault(due.host, _Host())
        host.in_flight -= 1
        if is_responsive:
            host.consecutive_failures, host.cooldown, host.open_until = 0, timedelta(), None
            return
        host.consecutive_failures += 1
        if host.consecutive_failures >= self._limits.circuit_breaker_failures and (
            host.open_until is None or host.open_until <= now
        ):
            host.cooldown = (
                min(2 * host.cooldown, _MAX_COOLDOWN) if host.cooldown else self._limits.circuit_breaker_cooldown
            )
            host.open_until = now + host.cooldown

    def next_due_at(self, now: datetime) -> datetime | None:
        """Return when `take`, which had no more `now`, may have something again, if nothing else happens before."""
        while self._scheduled and not self._is_current(self._scheduled[0]):
            heapq.heappop(self._scheduled)
        rests = [host.open_until for host in self._hosts.values() if host.ready and host.open_until]
        # A rest that is over is no moment to wait for: its one try is on its way, and will be reported.
        return min(
            [*(moment for moment in rests if moment > now), *(due.due_at for due in self._scheduled[:1])], default=None
        )

    def _is_current(self, due: ScheduledDelivery) -> bool:
        return self._current.get(due.delivery_id) is due

    def _take_expired(self, host: _Host, now: datetime) -> Iterator[ScheduledDelivery]:
        """Yield what has waited for too long, when a rest is over: not at every look at it."""
        if host.open_until is None or host.open_until > now or host.in_flight:
            return
        late = [due for due in host.ready if due.give_up_at <= now and self._is_current(due)]
        for due in late:
            del self._current[due.delivery_id]
            yield due

    def _take_round(self, now: datetime) -> Iterator[ScheduledDelivery]:
        for name, host in list(self._hosts.items()):
            if len(self._in_flight) >= self._limits.max_concurrent:
                return
            if (due := self._next_of(host, now)) is not None:
                del self._current[due.delivery_id]
                self._in_flight[due.delivery_id] = name
                host.in_flight += 1
                self._hosts[name] = self._hosts.pop(name)  # who had a turn is last in the next round
                yield due

    def _next_of(self, host: _Host, now: datetime) -> ScheduledDelivery | None:
        most = self._limits.max_concurrent_per_host
        if host.open_until is not None:
            most = 1 if host.open_until <= now else 0
        if host.in_flight >= most:
            return None
        while host.ready:
            due = host.ready.popleft()
            # One of which a state is being tried waits until that has ended: its next state comes then.
            if self._is_current(due) and due.delivery_id not in self._in_flight:
                return due
        return None

    def _forget_idle_hosts(self) -> None:
        for name in [
            name for name, it in self._hosts.items() if not (it.ready or it.in_flight or it.consecutive_failures)
        ]:
            del self._hosts[name]
