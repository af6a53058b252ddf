"""Parse timestamps. The API and the command line share this rule. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

EXAMPLE_TIMESTAMP: Final = "2026-02-01T09:30:00Z"
_LOST_PLUS: Final = re.compile(r"(.*\d) (\d\d:?\d\d)")


def parse_timestamp(text: str) -> datetime:
    """Return an ISO 8601 timestamp in UTC. The text must have a UTC offset.

    Without an offset, the server and the command line could read it as different times.

    Raises:
        ValueError: The text is not such a timestamp. The message says how to write it.
    """
    try:
        if "-" not in text[1:]:  # a bare number would be taken for a date without hyphens
            raise ValueError(text)
        moment = datetime.fromisoformat(text)
    except ValueError:
        if lost := _LOST_PLUS.fullmatch(text):
            raise ValueError(f"write the + of an offset as %2B in a URL: {lost[1]}%2B{lost[2]}") from None
        raise ValueError(f"expected a time with a UTC offset, such as {EXAMPLE_TIMESTAMP}") from None
    if moment.tzinfo is None:
        written = moment.isoformat()
        raise ValueError(
            f"the time {text} has no offset from UTC: write {written}Z, or the local time with its offset, such as "
            f"{written}+01:00"
        )
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("this time is outside the years 1 to 9999 in UTC") from None
