"""Processes with a skewed clock, using libfaketime (Debian: `apt-get install faketime`)."""

from __future__ import annotations

from pathlib import Path

import pytest

_LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)

needs_faketime = pytest.mark.skipif(_LIBRARY is None, reason="needs libfaketime: apt-get install faketime")


class SkewedClock:
    """A skewed wall clock for processes with the environment `env`. Monotonic clocks are not affected."""

    def __init__(self, directory: Path, seconds: int) -> None:
        self._file = directory / "clock"
        self.set_offset(seconds)
        self.env = {
            "LD_PRELOAD": str(_LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
            # Otherwise waits for the interpreter lock end at once, and two threads slow each other by a factor of 15.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }

    def set_offset(self, seconds: int) -> None:
        """Set the offset of the clock in seconds."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self._file)
