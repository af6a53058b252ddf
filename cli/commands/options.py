"""Options that several commands share, and the functions that parse their values."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from jobledger.cli.output.errors import with_hint
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.domain.timestamps import EXAMPLE_TIMESTAMP, parse_timestamp

LARGEST_POSITION: Final = 2**63 - 1
"""Equal to `jobledger.ledger.store.event_store.MAX_POSITION`. Importing that would load the MongoDB driver."""
AS_OF_HELP: Final = "Position in the log or time, e.g. 2026-02-01T09:30:00Z"
_UNITS: Final = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
_DURATION: Final = re.compile(r"(?:\d{1,7}[wdhms])+", re.ASCII)
_MAX_DURATION: Final = timedelta(days=36_500)
ConfigOption = Annotated[
    Path | None, typer.Option("--config", envvar="JOBLEDGER_CONFIG", help="Settings file. Default: ./config.yaml")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON")]
UrlOption = Annotated[str, typer.Option(envvar="JOBLEDGER_URL", help="URL of the API")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing")]
TimeoutOption = Annotated[
    str | None, typer.Option("--timeout", metavar="DURATION", help="Stop waiting after this time, e.g. 5m. Exit with 4")
]
DEFAULT_URL: Final = "http://127.0.0.1:5001"


def parse_duration(text: str, option: str) -> timedelta:
    """Parse a duration such as `90s`, `5m` or `1h30m`.

    Args:
        text: Value of the option.
        option: Name of the option, for the error message.

    Raises:
        ConfigurationError: `text` is not a duration, or is longer than a hundred years.
    """
    duration = timedelta()
    if _DURATION.fullmatch(text):
        for number, unit in re.findall(r"(\d+)([wdhms])", text):
            duration += timedelta(**{_UNITS[unit]: int(number)})
    if not timedelta() < duration <= _MAX_DURATION:
        raise ConfigurationError(f"{option} {text}: expected a duration such as 30s, 5m, 1h30m or 90d.")
    return duration


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
    """Return a time, or the time that is a duration ago, in ISO 8601 with its UTC offset, as the API expects it.

    Raises:
        ConfigurationError: `text` is neither a duration nor a time with an offset.
    """
    if text is None:
        return None
    if _DURATION.fullmatch(text):
        return (datetime.now(UTC) - parse_duration(text, option)).isoformat()
    return _parse_time(text, option).isoformat()


def _parse_time(text: str, option: str) -> datetime:
    try:
        return parse_timestamp(text)
    except ValueError as error:
        raise ConfigurationError(f"{option} {text}: {error}") from None


def parse_assignments(texts: list[str] | None, option: str, current: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a copy of parameters with changes such as `pages=3` or `speaker.name=Ada`.

    A value is JSON if it can be read as JSON, and text otherwise. If it replaces text, it is text or null.

    Args:
        texts: Values of the option.
        option: Name of the option, for the error message.
        current: The parameters to change.

    Raises:
        ConfigurationError: A text has no name and value, or changes a field of something that is not an object.
    """
    import copy

    import orjson

    parameters = copy.deepcopy(current or {})
    for text in texts or ():
        path, equals, value_text = text.partition("=")
        names = path.split(".")
        if not equals or not all(names):
            raise with_hint(
                ConfigurationError(f"{option} {text}: expected NAME=VALUE, e.g. {option} language=en."),
                f"""A value is JSON or text: {option} pages=3, {option} 'tags=["a","b"]', {option} text=hello.""",
            )
        target = parameters
        for name in names[:-1]:
            target = target.setdefault(name, {})
            if not isinstance(target, dict):
                raise ConfigurationError(f"{option} {text}: {name} is not an object.")
        try:
            value: Any = orjson.loads(value_text)
        except orjson.JSONDecodeError:
            value = value_text
        is_text = isinstance(target.get(names[-1]), str)
        target[names[-1]] = value_text if is_text and not isinstance(value, str | None) else value
    return parameters
