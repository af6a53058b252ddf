"""Hooks before and after driver commands that suspend or kill the process, or count commands.

They use the command monitoring of the driver, so they are independent of the event store. "before insert" is before an
insert is sent. "after insert" is when its response arrived, before the caller continues.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pymongo.monitoring import CommandFailedEvent, CommandListener, CommandStartedEvent, CommandSucceededEvent

from jobledger.ledger.mongo.connection import Connection

HookPoint = Literal[
    "before insert", "after insert", "before commitTransaction", "after commitTransaction", "after findAndModify"
]


@dataclass(frozen=True, slots=True)
class MonitoredConnection(Connection):
    """A connection with command listeners."""

    listeners: tuple[CommandListener, ...] = ()

    def _build_options(self, *listeners: Any) -> dict[str, Any]:
        return Connection._build_options(self, *listeners, *self.listeners)


def monitor_connection(connection: Connection, *listeners: CommandListener) -> MonitoredConnection:
    return MonitoredConnection(connection.uri, connection.db_name, connection.max_pool_size, listeners=listeners)


class OneTimeHook(CommandListener):
    """Calls a function the first time a hook point is reached."""

    def __init__(self, hook_point: HookPoint, action: Callable[[], None]) -> None:
        self._hook_point: str | None = hook_point
        self._act = action

    def _reach(self, hook_point: str) -> None:
        if hook_point == self._hook_point:
            self._hook_point = None
            self._act()

    def started(self, event: CommandStartedEvent) -> None:
        self._reach(f"before {event.command_name}")

    def succeeded(self, event: CommandSucceededEvent) -> None:
        self._reach(f"after {event.command_name}")

    def failed(self, event: CommandFailedEvent) -> None:
        """Ignore the event."""


class CommandCounter(CommandListener):
    """Counts commands by name and error responses by code."""

    def __init__(self) -> None:
        self.started_by_name: Counter[str] = Counter()
        self.failed_by_code: Counter[int] = Counter()

    def started(self, event: CommandStartedEvent) -> None:
        self.started_by_name[event.command_name] += 1

    def succeeded(self, event: CommandSucceededEvent) -> None:
        """Ignore the event. Commands are counted at their start."""

    def failed(self, event: CommandFailedEvent) -> None:
        self.failed_by_code[event.failure.get("code", 0)] += 1


def suspend_own_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
