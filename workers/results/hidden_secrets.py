"""Hide secrets in the texts that leave an attempt: log entries, progress, warnings, errors, results and step outputs.

A service may echo the key of a request in its error, and a processor passes the error on. The log is never changed, so
a secret must not get there.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from pydantic import BaseModel, SecretBytes, SecretStr

PLACEHOLDER: Final = "[secret]"
MIN_CHARACTERS: Final = 8
"""Shorter secrets are not hidden: they may be parts of words."""
MAX_CHARACTERS: Final = 10_000
MAX_SECRETS: Final = 100
_MIN_CUT_CHARACTERS: Final = 24
"""A secret of this length is also hidden if it was cut in its second half."""
_NAME_PATTERN: Final = (
    "token|(?:.*_)?(?:(?:api|access|auth|encryption|private|secret|signing)_?key"
    "|(?:access|api|auth|bearer|bot|refresh)_?token|secret|password|passwd|passphrase|credentials?)"
)
_IS_SECRET: Final = re.compile(_NAME_PATTERN, re.IGNORECASE).fullmatch
_IS_SECRET_FILE: Final = re.compile(f"(?:{_NAME_PATTERN})_(?:file|path)", re.IGNORECASE).fullmatch


class HiddenSecrets:
    """The secrets of one attempt.

    A secret is also hidden in the forms that JSON, URLs and HTML give it, and a long one if its end was cut.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._forms: list[str] = []
        self._heads: re.Pattern[str] | None = None
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """Hide these secrets from now on."""
        for secret in secrets:
            text = secret.strip()
            if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS and text not in self._forms:
                self._forms += {text: None, **dict.fromkeys(_list_other_forms(text))}
        heads = {form if len(form) < _MIN_CUT_CHARACTERS else form[: len(form) // 2] for form in self._forms}
        self._heads = re.compile("|".join(map(re.escape, sorted(heads)))) if heads else None

    def hide(self, text: str) -> str:
        """Return the text with a placeholder instead of each secret."""
        if self._heads is None or (match := self._heads.search(text)) is None:
            return text
        parts: list[str] = []
        end = 0
        while match is not None:
            start = match.start()
            parts += text[end:start], PLACEHOLDER
            end = start + max(_count_equal(text, start, form) for form in self._forms)
            match = self._heads.search(text, end)
        return "".join([*parts, text[end:]])

    def hide_in_bytes(self, content: bytes) -> bytes:
        """Return the content with a placeholder instead of each secret that consists of ASCII characters."""
        return self.hide(content.decode("latin-1")).encode("latin-1")

    def hide_in_json(self, value: Any) -> Any:
        """Return a JSON value with a placeholder instead of each secret, in keys as well."""
        if self._heads is None:
            return value
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide_in_json(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide_in_json(item) for item in value]
        return value


def _count_equal(text: str, start: int, form: str) -> int:
    """Return how many characters of the text from `start` on are those of `form`."""
    return next((n for n, char in enumerate(form) if text[start + n : start + n + 1] != char), len(form))


def _list_other_forms(secret: str) -> list[str]:
    return [
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        quote(secret, safe=""),
        quote(secret),
        html.escape(secret),
        " ".join(secret.split()),
    ]


def find_secrets(settings: BaseModel, environment: Mapping[str, str]) -> list[str]:
    """Return the secrets in the settings of a processor and in the environment variables of its job processes.

    These are `SecretStr` and `SecretBytes`, texts with names such as `api_key`, `token`, `secret` or `db_password`, and
    the contents of the files that settings such as `api_key_file` name.
    """
    found = [value for name, value in environment.items() if _IS_SECRET(name)]
    for name, value in _iterate_values("", settings):
        if isinstance(value, SecretStr | SecretBytes):
            secret = value.get_secret_value()
            found.append(secret if isinstance(secret, str) else secret.decode("utf-8", "replace"))
        elif isinstance(value, str) and _IS_SECRET(name):
            found.append(value)
        elif isinstance(value, str | Path) and _IS_SECRET_FILE(name):
            found += _read_secret(Path(value))
    return [secret for secret in found if secret][:MAX_SECRETS]


def _iterate_values(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, BaseModel):
        for field, item in value:
            yield from _iterate_values(field, item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _iterate_values(str(key), item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from _iterate_values(name, item)
    else:
        yield name, value


def _read_secret(file: Path) -> list[str]:
    """Return the content of a secret file, and the lines of one with several. The processor reports what is wrong."""
    try:
        with file.open("rb") as content:
            text = content.read(MAX_CHARACTERS).decode("utf-8", "replace")
    except OSError:
        return []
    return [text, *text.splitlines()] if "\n" in text.strip() else [text]
