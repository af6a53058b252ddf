"""Configure logging to standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, TextIO, cast

import structlog

from jobledger.cli.output.terminal_text import SafeFormatter, SafeStream, escape_log_entry
from jobledger.cli.settings import LoggingSettings

_hide: Callable[[str], str] = str


def set_secret_filter(hide: Callable[[str], str]) -> None:
    """Hide secrets in all further log lines. Logging exists once in a process.

    Args:
        hide: Returns a line without secrets.
    """
    global _hide
    _hide = hide


def _hide_secrets(_logger: Any, _method: str, line: Any) -> str:
    return _hide(line)


class _SecretFormatter(SafeFormatter):
    """Formats log records of other libraries without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return _hide(super().format(record))


def configure_logging(settings: LoggingSettings) -> None:
    """Log to standard error: lines for people (`console`), or JSON for programs (`json`)."""
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    escaping: list[structlog.typing.Processor] = []  # the JSON renderer escapes by itself
    if settings.format == "console":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        escaping = [escape_log_entry]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,  # the request ID
            structlog.processors.add_log_level,
            _create_time_stamper(settings.format),
            structlog.processors.format_exc_info,
            *escaping,
            renderer,
            _hide_secrets,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", SafeStream(sys.stderr))),
    )
    handler = logging.StreamHandler(SafeStream(sys.stderr))
    handler.setFormatter(_SecretFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _create_time_stamper(log_format: str) -> structlog.processors.TimeStamper:
    """Return the processor that adds the time with its UTC offset: local for `console`, UTC for `json`."""
    if log_format == "console":
        return structlog.processors.TimeStamper(fmt="%H:%M:%S%z", utc=False)
    return structlog.processors.TimeStamper(fmt="iso", utc=True)
