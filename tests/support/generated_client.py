"""Generate the synchronous client from the asynchronous one. `make reference` writes it, and a test compares it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

CLIENT: Final = Path(__file__).parents[2] / "client"
SOURCE: Final = CLIENT / "asynchronous"
TARGET: Final = CLIENT / "synchronous"
_REPLACEMENTS: Final = (
    (r"\basync (def|with|for)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\basynchronous\b", "synchronous"),
    (r"\basynccontextmanager\b", "contextmanager"),
    (r"\bStopAsyncIteration\b", "StopIteration"),
    (r"\bhttpx\.AsyncClient\b", "httpx.Client"),
    (r"\bAsync(Client|Transport|JobHandle|BatchHandle|EventStream|\w*Feed|ExitStack|Iterator)\b", r"\1"),
    (r"\baiter_bytes\b", "iter_bytes"),
    (r"\benter_async_context\b", "enter_context"),
    (r"\banext\b", "next"),
    (r"\baclose\b", "close"),
    (r"\b__a(enter|exit|iter|next)__", r"__\1__"),
    (r"for an event loop", "for programs without an event loop"),
)
_NOTE: Final = "# Generated from {source} by `make reference`. Change that file instead.\n"


def list_sources() -> list[Path]:
    """Return the modules from which the synchronous ones are generated."""
    return sorted(path for path in SOURCE.glob("*.py") if path.name not in ("__init__.py", "runtime.py"))


def render(source: Path) -> str:
    """Return the synchronous module for an asynchronous one."""
    text = source.read_text(encoding="utf-8")
    for pattern, replacement in _REPLACEMENTS:
        text = re.sub(pattern, replacement, text)
    text = _NOTE.format(source=source.relative_to(CLIENT.parent)) + text
    # Async generators have no `yield from`, so the synchronous ones get it here.
    options = ("--select", "I,UP028", "--fix-only", "--unsafe-fixes", "--quiet")
    text = _run_ruff("check", *options, text=text, name=source.name)
    return _run_ruff("format", "--quiet", text=text, name=source.name)


def _run_ruff(*arguments: str, text: str, name: str) -> str:
    ruff = Path(sys.executable).parent / "ruff"
    command: list[str | Path] = [ruff, *arguments, "--stdin-filename", TARGET / name, "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=True).stdout


def main() -> None:
    """Write the synchronous modules."""
    for source in list_sources():
        (TARGET / source.name).write_text(render(source), encoding="utf-8")


if __name__ == "__main__":
    main()
