"""Create API keys, and format them for output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pydantic import ValidationError

from jobledger.api.auth.api_keys import ApiKey, ApiKeyToken
from jobledger.cli.output.formatting import format_timestamp
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.domain.events import truncate_to_milliseconds

_OPTIONS: Final = {"user_id": "--user", "groups": "--group", "roles": "--role", "name": "--name"}


def generate_key(
    *, user: str, groups: Iterable[str], roles: Iterable[str], name: str | None, expires_in: timedelta | None
) -> tuple[ApiKey, ApiKeyToken]:
    """Return a new key, which is not stored yet, and the token that its holder sends.

    Raises:
        ConfigurationError: A value is invalid. The message names its option.
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
                "expires_at": None if expires_in is None else now + expires_in,
            }
        )
    except ValidationError as error:
        problem = error.errors()[0]
        option = _OPTIONS[str(problem["loc"][0])]
        raise ConfigurationError(f"{option}: {problem['msg'].removeprefix('Value error, ')}.") from None
    return key, token


def parse_key_id(text: str) -> str:
    """Return the ID in `text`, which is a key ID or a whole key. The owner of a leaked key often knows only the key."""
    token = ApiKeyToken.parse(text)
    return text if token is None else token.key_id


def build_key_json(key: ApiKey) -> dict[str, Any]:
    """Return a key for JSON output, without its digest."""
    return key.model_dump(exclude={"sha256"})


def build_key_rows(keys: Iterable[ApiKey], session_counts: Mapping[str, int]) -> Iterator[Sequence[str]]:
    """Yield the header and the rows of the table of keys.

    Args:
        keys: The keys.
        session_counts: Number of browser sessions by key ID.
    """
    now = datetime.now(UTC)
    yield ("KEY ID", "USER", "GROUPS", "ROLES", "NAME", "CREATED", "EXPIRES", "SESSIONS")
    for key in keys:
        expiry = "never" if key.expires_at is None else format_timestamp(key.expires_at, "minutes")
        yield (
            key.key_id,
            key.user_id,
            ", ".join(key.groups),
            ", ".join(key.roles),
            key.name or "",
            format_timestamp(key.created_at, "minutes"),
            expiry if key.is_valid(now) else f"expired {expiry}",
            str(session_counts[key.key_id]),
        )
