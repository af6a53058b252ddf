"""ledger: whether an event loop makes progress, judged from another thread.

A callback of the loop ticks; the other thread looks at regular intervals whether it has ticked. Looks are counted, and
no clock is read: a machine that was suspended, or a process that was stopped, has missed many seconds but one look.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback


class LoopProgress:
    """Ticks on an event loop. Create and stop it on the loop; call `missed` and `stack` from another thread."""

    def __init__(self, seconds: float) -> None:
        """Tick every `seconds`, which is shorter than the interval between two looks."""
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
        """Return how many looks in a row, this one included, have found no tick since the look before."""
        self._missed = self._missed + 1 if self._ticks == self._seen else 0
        self._seen = self._ticks
        return self._missed

    def format_stack(self) -> str:
        """Return what the loop's thread is doing: the name of its task, and its stack."""
        task = asyncio.current_task(self._loop)
        frame = sys._current_frames().get(self._thread_id)
        lines = "".join(traceback.format_stack(frame)[-12:]) if frame is not None else "no stack"
        return f"{task.get_name() if task is not None else 'no task'}\n{lines}"
