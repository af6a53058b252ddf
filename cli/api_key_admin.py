"""Create, list and revoke API keys, directly on the database."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pydantic import ValidationError

from jobledger.api.auth import api_keys, browser_sessions
from jobledger.api.auth.api_keys import ApiKey, ApiKeyToken
from jobledger.cli.database import open_database
from jobledger.cli.formatting import format_timestamp
from jobledger.cli.terminal_text import SafeTable
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.domain.events import truncate_to_milliseconds
from jobledger.ledger.mongo.connection import Connection

_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_MAX_LIFETIME: Final = timedelta(days=36_500)
_OPTIONS: Final = {"user_id": "--user", "groups": "--group", "roles": "--role", "name": "--name"}


def parse_lifetime(text: str) -> timedelta:
    """Parse the lifetime of a key: `30m`, `12h`, `90d`, `8w`.

    Raises:
        ConfigurationError: `text` is not a lifetime, or longer than 36,500 days.
    """
    match = re.fullmatch(r"([1-9]\d{0,7})([mhdw])", text, re.ASCII)
    lifetime = timedelta(**{_UNITS[match[2]]: int(match[1])}) if match else None
    if lifetime is None or lifetime > _MAX_LIFETIME:
        raise ConfigurationError(
            f"--expires-in {text}: expected a number of minutes, hours, days or weeks, such as 30m, 12h, 90d or 8w."
        )
    return lifetime


def new_key(
    *, user: str, groups: Iterable[str], roles: Iterable[str], name: str | None, expires_in: str | None
) -> tuple[ApiKey, ApiKeyToken]:
    """Return a new key, which is not stored yet, and the token that its holder sends.

    Raises:
        ConfigurationError: a value is invalid; the message names its option.
    """
    token, now = ApiKeyToken.generate(), truncate_to_milliseconds(datetime.now(UTC))
    try:
        key = ApiKey.model_validate(
            {
                "key_id": token.key_id,
                "sha256": token.digest,
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
    return key, token


async def store_key(connection: Connection, key: ApiKey) -> None:
    """Store a key. It is valid immediately.

    Raises:
        LedgerUnavailable, DatabaseUnsuitable: the database cannot be used.
    """
    async with open_database(connection) as db:
        await api_keys.store_key(db, key)


async def list_api_keys(connection: Connection) -> tuple[list[ApiKey], dict[str, int]]:
    """Return all keys, and the number of dashboard sessions by key ID.

    Raises:
        LedgerUnavailable, DatabaseUnsuitable: the database cannot be used.
    """
    async with open_database(connection) as db:
        keys, counts = await api_keys.list_api_keys(db), await browser_sessions.count_sessions(db)
        return keys, {key.key_id: counts.get(browser_sessions.get_session_owner(key_id=key.key_id), 0) for key in keys}


async def revoke_key(connection: Connection, key_id: str) -> bool:
    """Remove a key and its sessions. Return whether the key existed.

    Raises:
        LedgerUnavailable, DatabaseUnsuitable: the database cannot be used.
    """
    async with open_database(connection) as db:
        existed = await api_keys.revoke_key(db, key_id)
        await browser_sessions.end_sessions(db, browser_sessions.get_session_owner(key_id=key_id))
        return existed


async def end_sessions(connection: Connection, owner: str) -> int:
    """End all dashboard sessions of a key or of a user with tokens. Return their number.

    Raises:
        LedgerUnavailable, DatabaseUnsuitable: the database cannot be used.
    """
    async with open_database(connection) as db:
        return await browser_sessions.end_sessions(db, owner)


def parse_key_id(text: str) -> str:
    """Return the ID in `text`, which is a key ID or a whole key. The owner of a leaked key often knows only the key."""
    token = ApiKeyToken.parse(text)
    return text if token is None else token.key_id


def key_to_json(key: ApiKey) -> dict[str, Any]:
    """Return a key for JSON output, without its digest."""
    return key.model_dump(exclude={"sha256"})


def keys_table(keys: Iterable[ApiKey], session_counts: Mapping[str, int]) -> SafeTable:
    """Return the table of keys.

    Args:
        keys: The keys.
        session_counts: Number of dashboard sessions by key ID.
    """
    now = datetime.now(UTC)
    table = SafeTable("KEY ID", "USER", "GROUPS", "ROLES", "NAME", "CREATED", "EXPIRES", "SESSIONS")
    for key in keys:
        table.add_row(
            key.key_id,
            key.user_id,
            ", ".join(key.groups),
            ", ".join(key.roles),
            key.name or "",
            format_timestamp(key.created_at, "minutes"),
            _format_expiry(key, now),
            str(session_counts[key.key_id]),
        )
    return table


def _format_expiry(key: ApiKey, now: datetime) -> str:
    if key.expires_at is None:
        return "never"
    expiry = format_timestamp(key.expires_at, "minutes")
    return expiry if key.is_valid(now) else f"expired {expiry}"
