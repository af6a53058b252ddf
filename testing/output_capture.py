"""Write the output of a job that runs in the process of a test to the log of the job."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import BinaryIO, TextIO


class _Tee(io.TextIOBase):
    """Writes to a stream, and each line to a log as well."""

    def __init__(self, stream: TextIO, add_line: Callable[[str], None]) -> None:
        self._stream = stream
        self._add_line = add_line
        self._lock = threading.Lock()
        self._rest = ""

    def write(self, text: str) -> int:
        self._stream.write(text)
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._add_line(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def buffer(self) -> BinaryIO:
        """The binary stream. What is written to it is not in the log."""
        return self._stream.buffer

    def writable(self) -> bool:
        return True

    def end(self) -> None:
        """Write the last line if it has no end."""
        if self._rest:
            self._add_line(self._rest)


@contextmanager
def capture_output(add_line: Callable[[str], None]) -> Iterator[None]:
    """In the block, also add each line of the standard output and standard error to a log, with its end."""
    out, err = _Tee(sys.stdout, add_line), _Tee(sys.stderr, add_line)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            out.end()
            err.end()
