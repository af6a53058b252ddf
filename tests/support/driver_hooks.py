"""Hooks before and after driver commands that suspend or kill the process, or count commands.

They are the driver's own announcements, so they say nothing of how the log works inside: "before insert" is when an
insert is about to be sent, "after insert" when its answer has arrived and nobody has been told.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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

    def _options(self) -> dict[str, Any]:
        return {**Connection._options(self), "event_listeners": list(self.listeners)}


def monitor_connection(connection: Connection, *listeners: CommandListener) -> MonitoredConnection:
    return MonitoredConnection(connection.uri, connection.db_name, connection.max_pool_size, listeners=listeners)


class OneTimeHook(CommandListener):
    """Calls a function the first time a hook point is reached."""

    def __init__(self, hook_point: HookPoint, action: Callable[[], None]) -> None:
        self._awaited: str | None = hook_point
        self._act = action

    def _comes(self, moment: str) -> None:
        if moment == self._awaited:
            self._awaited = None
            self._act()

    def started(self, event: CommandStartedEvent) -> None:
        self._comes(f"before {event.command_name}")

    def succeeded(self, event: CommandSucceededEvent) -> None:
        self._comes(f"after {event.command_name}")

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


def is_suspended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
