"""ledger: read a moment that somebody has written. One rule for the API, its queries, and the command line."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

EXAMPLE_TIMESTAMP: Final = "2026-02-01T09:30:00Z"
_LOST_PLUS: Final = re.compile(r"(.*\d) (\d\d:?\d\d)")


def parse_timestamp(text: str) -> datetime:
    """Return a moment written in ISO 8601 with its offset from UTC, in UTC.

    A time without an offset is refused: the server and the command line would take it for different moments.

    Raises:
        ValueError: it is not one; the message says how to write it.
    """
    try:
        if "-" not in text[1:]:  # a bare number would be taken for a date without hyphens
            raise ValueError(text)
        moment = datetime.fromisoformat(text)
    except ValueError:
        if lost := _LOST_PLUS.fullmatch(text):
            raise ValueError(f"write the + of an offset as %2B in an address: {lost[1]}%2B{lost[2]}") from None
        raise ValueError(f"expected a time such as {EXAMPLE_TIMESTAMP}, with its offset") from None
    if moment.tzinfo is None:
        written = moment.isoformat()
        raise ValueError(
            f"the time {text} has no offset from UTC: write {written}Z, or the local time with its offset, such as "
            f"{written}+01:00"
        )
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("this moment has no date in UTC: expected the years 1 to 9999") from None
