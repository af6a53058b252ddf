"""Detect a blocked event loop from another thread.

A timer of the loop ticks. The other thread checks at regular intervals whether it has ticked. Checks are counted
instead of time: a machine that was suspended, or a process that was stopped, has missed many seconds but only one
check.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback


class LoopTicker:
    """Ticks on an event loop. Create and stop it on the loop; call the other methods from another thread."""

    def __init__(self, seconds: float) -> None:
        """Tick every `seconds`, which must be less than the interval between two checks."""
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._seconds = seconds
        self._ticks = 0
        self._seen = -1
        self._missed = 0
        self._timer = self._loop.call_later(seconds, self._tick)

    def stop(self) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        self._ticks += 1
        self._timer = self._loop.call_later(self._seconds, self._tick)

    def count_missed(self) -> int:
        """Return the number of consecutive checks, including this one, that found no tick since the check before."""
        self._missed = self._missed + 1 if self._ticks == self._seen else 0
        self._seen = self._ticks
        return self._missed

    def format_stack(self) -> str:
        """Return the name of the loop's current task and the stack of its thread."""
        task = asyncio.current_task(self._loop)
        frame = sys._current_frames().get(self._thread_id)
        lines = "".join(traceback.format_stack(frame)[-12:]) if frame is not None else "no stack"
        return f"{task.get_name() if task is not None else 'no task'}\n{lines}"
