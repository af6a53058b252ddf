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

_LONGEST_REST: Final = timedelta(minutes=10)


class Due(NamedTuple):
    """A pending delivery: not before `due`, and not after `give_up_at`. `version` tells its states apart."""

    due: datetime
    delivery_id: str
    version: int
    host: str
    give_up_at: datetime
    sequence: int = 0


@dataclass(slots=True)
class _Host:
    """The deliveries whose time has come, in that order, and how the host has behaved."""

    ready: deque[Due] = field(default_factory=deque)
    in_flight: int = 0
    silent: int = 0
    rest: timedelta = timedelta()
    resting_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """How many at a time, in all and at one host; after how many times without an answer a host rests, and how long."""

    at_a_time: int = 20
    per_host: int = 4
    silent_times: int = 10
    first_rest: timedelta = timedelta(seconds=30)


class Waiting:
    """All pending deliveries."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._current: dict[str, Due] = {}
        self._later: list[Due] = []
        self._hosts: dict[str, _Host] = {}
        self._flying: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._current)

    def clear(self) -> None:
        """Forget all that wait; what is being tried goes on, and what is known of hosts stays."""
        self._current.clear()
        self._later.clear()
        for host in self._hosts.values():
            host.ready.clear()

    def put(self, due: Due) -> None:
        """Take in a delivery, or its newer state."""
        self._current[due.delivery_id] = due
        heapq.heappush(self._later, due)

    def drop(self, delivery_id: str) -> None:
        """Forget a delivery: it is not pending any more."""
        self._current.pop(delivery_id, None)

    def take(self, now: datetime) -> tuple[list[Due], list[Due]]:
        """Return which deliveries are to be tried now, and which are to be given up. They wait no longer.

        Each that is tried has to be reported to `done`.
        """
        while self._later and self._later[0].due <= now:
            due = heapq.heappop(self._later)
            if self._waits(due):
                self._hosts.setdefault(due.host, _Host()).ready.append(due)
        given_up = [due for host in self._hosts.values() for due in self._too_late(host, now)]
        tried: list[Due] = []
        while len(self._flying) < self._limits.at_a_time and (round_ := list(self._one_each(now))):
            tried += round_
        self._forget_idle_hosts()
        return tried, given_up

    def done(self, due: Due, *, answered: bool, now: datetime) -> None:
        """Note that a try has ended, and whether the host gave any answer."""
        self._flying.pop(due.delivery_id, None)
        host = self._hosts.setdefault(due.host, _Host())
        host.in_flight -= 1
        if answered:
            host.silent, host.rest, host.resting_until = 0, timedelta(), None
            return
        host.silent += 1
        if host.silent >= self._limits.silent_times and (host.resting_until is None or host.resting_until <= now):
            host.rest = min(2 * host.rest, _LONGEST_REST) if host.rest else self._limits.first_rest
            host.resting_until = now + host.rest

    def next_at(self, now: datetime) -> datetime | None:
        """Return when `take`, which had no more `now`, may have something again, if nothing else happens before."""
        while self._later and not self._waits(self._later[0]):
            heapq.heappop(self._later)
        rests = [host.resting_until for host in self._hosts.values() if host.ready and host.resting_until]
        # A rest that is over is no moment to wait for: its one try is on its way, and will be reported.
        return min([*(moment for moment in rests if moment > now), *(due.due for due in self._later[:1])], default=None)

    def _waits(self, due: Due) -> bool:
        return self._current.get(due.delivery_id) is due

    def _too_late(self, host: _Host, now: datetime) -> Iterator[Due]:
        """Yield what has waited for too long, when a rest is over: not at every look at it."""
        if host.resting_until is None or host.resting_until > now or host.in_flight:
            return
        late = [due for due in host.ready if due.give_up_at <= now and self._waits(due)]
        for due in late:
            del self._current[due.delivery_id]
            yield due

    def _one_each(self, now: datetime) -> Iterator[Due]:
        for name, host in list(self._hosts.items()):
            if len(self._flying) >= self._limits.at_a_time:
                return
            if (due := self._next_of(host, now)) is not None:
                del self._current[due.delivery_id]
                self._flying[due.delivery_id] = name
                host.in_flight += 1
                self._hosts[name] = self._hosts.pop(name)  # who had a turn is last in the next round
                yield due

    def _next_of(self, host: _Host, now: datetime) -> Due | None:
        most = self._limits.per_host
        if host.resting_until is not None:
            most = 1 if host.resting_until <= now else 0
        if host.in_flight >= most:
            return None
        while host.ready:
            due = host.ready.popleft()
            # One of which a state is being tried waits until that has ended: its next state comes then.
            if self._waits(due) and due.delivery_id not in self._flying:
                return due
        return None

    def _forget_idle_hosts(self) -> None:
        for name in [name for name, it in self._hosts.items() if not (it.ready or it.in_flight or it.silent)]:
            del self._hosts[name]
