"""cli: `jobledger keys …`. Makes, lists and revokes API keys, directly on the database."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pydantic import ValidationError

from jobledger.api.auth import api_keys, browser_sessions
from jobledger.api.auth.api_keys import ApiKey, ApiKeyToken
from jobledger.cli.composition import open_database
from jobledger.cli.formatting import format_timestamp
from jobledger.cli.terminal_text import SafeTable
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.domain.events import truncate_to_milliseconds
from jobledger.ledger.mongo.connection import Connection

_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_LONGEST: Final = timedelta(days=36_500)


def parse_lifetime(text: str) -> timedelta:
    """Read how long a key is good for: `30m`, `12h`, `90d`, `8w`.

    Raises:
        ConfigurationError: it is something else, or more than a hundred years.
    """
    found = re.fullmatch(r"([1-9]\d{0,7})([mhdw])", text, re.ASCII)
    lasting = timedelta(**{_UNITS[found[2]]: int(found[1])}) if found else None
    if lasting is None or lasting > _LONGEST:
        raise ConfigurationError(
            f"--expires-in {text}: expected a number of minutes, hours, days or weeks, such as 30m, 12h, 90d or 8w."
        )
    return lasting


def new_key(
    *, user: str, groups: Iterable[str], roles: Iterable[str], name: str | None, expires_in: str | None
) -> tuple[ApiKey, ApiKeyToken]:
    """Return a new key, not stored yet, and what its holder has to send.

    Raises:
        ConfigurationError: there can be no such key.
    """
    text, now = ApiKeyToken.generate(), truncate_to_milliseconds(datetime.now(UTC))
    try:
        key = ApiKey.model_validate(
            {
                "key_id": text.key_id,
                "sha256": text.digest,
                "name": name,
                "user_id": user,
                "groups": list(dict.fromkeys(groups)),
                "roles": list(dict.fromkeys(roles)),
                "created_at": now,
                "expires_at": None if expires_in is None else now + parse_lifetime(expires_in),
            }
        )
    except ValidationError as error:
        problem = error.errors()[0]
        option = _OPTIONS[str(problem["loc"][0])]
        raise ConfigurationError(f"{option}: {problem['msg'].removeprefix('Value error, ')}.") from None
    return key, text


_OPTIONS: Final = {"user_id": "--user", "groups": "--group", "roles": "--role", "name": "--name"}


async def store_key(connection: Connection, key: ApiKey) -> None:
    """Put a key on record: from now on it opens.

    Raises:
        LedgerUnavailable, DatabaseUnsuitable: there is no database for it.
    """
    async with open_database(connection) as db:
        await api_keys.store_key(db, key)


async def list_keys(connection: Connection) -> tuple[list[ApiKey], dict[str, int]]:
    """Return all keys, and the number of dashboard sessions by the key's ID.

    Raises:
        LedgerUnavailable, DatabaseUnsuitable: there is no database to ask.
    """
    async with open_database(connection) as db:
        keys, numbers = await api_keys.list_keys(db), await browser_sessions.count_sessions(db)
        return keys, {key.key_id: numbers.get(browser_sessions.get_session_owner(key_id=key.key_id), 0) for key in keys}


async def revoke_key(connection: Connection, key_id: str) -> bool:
    """Remove a key and its sessions; return whether there was one.

    Raises:
        LedgerUnavailable, DatabaseUnsuitable: there is no database to ask.
    """
    async with open_database(connection) as db:
        found = await api_keys.revoke_key(db, key_id)
        await browser_sessions.end_sessions(db, browser_sessions.get_session_owner(key_id=key_id))
        return found


async def end_sessions(connection: Connection, owner: str) -> int:
    """End all dashboard sessions of a key or of a user with tokens; return how many there were.

    Raises:
        LedgerUnavailable, DatabaseUnsuitable: there is no database to ask.
    """
    async with open_database(connection) as db:
        return await browser_sessions.end_sessions(db, owner)


def parse_key_id(text: str) -> str:
    """Return the id of a key that is named by it, or, because that is what one has at hand, by the whole key."""
    whole = ApiKeyToken.parse(text)
    return text if whole is None else whole.key_id


def key_to_json(key: ApiKey) -> dict[str, Any]:
    """Return a key for programs, without what proves it."""
    return {"id": key.key_id, **key.model_dump(exclude={"key_id", "sha256"})}


def keys_table(keys: Iterable[ApiKey], sessions_of: Mapping[str, int]) -> SafeTable:
    """Return keys for people."""
    now = datetime.now(UTC)
    table = SafeTable("id", "user", "groups", "roles", "name", "created", "expires", "sessions")
    for key in keys:
        table.add_row(
            key.key_id,
            key.user_id,
            ", ".join(key.groups),
            ", ".join(key.roles),
            key.name or "",
            format_timestamp(key.created_at, "minutes"),
            _expiry(key, now),
            str(sessions_of[key.key_id]),
        )
    return table


def _expiry(key: ApiKey, now: datetime) -> str:
    if key.expires_at is None:
        return "never"
    expiry = format_timestamp(key.expires_at, "minutes")
    return expiry if key.is_valid(now) else f"expired {expiry}"
