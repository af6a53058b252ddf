"""Options that several commands share, and the functions that parse their values."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.domain.timestamps import EXAMPLE_TIMESTAMP, parse_timestamp

LARGEST_POSITION: Final = 2**63 - 1
"""Equal to `jobledger.ledger.store.event_store.MAX_POSITION`. Importing that would load the MongoDB driver."""
AS_OF_HELP: Final = "Position in the log or time, e.g. 2026-02-01T09:30:00Z"
ConfigOption = Annotated[
    Path | None, typer.Option("--config", envvar="JOBLEDGER_CONFIG", help="Settings file. Default: ./config.yaml")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON")]
UrlOption = Annotated[str, typer.Option(envvar="JOBLEDGER_URL", help="URL of the API")]
DEFAULT_URL: Final = "http://127.0.0.1:5001"


def parse_as_of(text: str, option: str) -> int | datetime:
    """Parse a position in the log or a time with its UTC offset.

    Args:
        text: Value of the option.
        option: Name of the option, for the error message.

    Raises:
        ConfigurationError: `text` is neither.
    """
    if text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= LARGEST_POSITION:
        return int(text)
    if "-" not in text:
        raise ConfigurationError(
            f"{option} {text}: expected a position in the log or a time such as {EXAMPLE_TIMESTAMP}."
        )
    return _parse_time(text, option)


def parse_time_option(text: str | None, option: str) -> str | None:
    """Return a time option in ISO 8601 with its UTC offset, as the API expects it.

    Raises:
        ConfigurationError: `text` is not a time, or has no offset.
    """
    return None if text is None else _parse_time(text, option).isoformat()


def _parse_time(text: str, option: str) -> datetime:
    try:
        return parse_timestamp(text)
    except ValueError as error:
        raise ConfigurationError(f"{option} {text}: {error}") from None
