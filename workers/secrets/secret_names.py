"""Decide by its name whether a setting or variable is a secret, and by its text whether a value can be one."""

from __future__ import annotations

import re
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise
from typing import Final


def _read_words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORDS: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_DECORATIONS: Final = _read_words("value text string raw plain b64 base64 hex json current old new next previous v")
"""Last words that say nothing about a value: `token_value`, `password_v2`."""
_FILES: Final = _read_words("file files filename path paths location")
_VARIABLES: Final = _read_words("env environment variable var")
_CONNECTIONS: Final = _read_words("url uri dsn connection")
_CERTAIN: Final = _read_words(
    """
    password passwords passwd passphrase passphrases passcode pwd pw secret secrets passwort kennwort sig
    apikey apikeys accesskey secretkey privatekey authkey authorization bearer jwt pat
    """
)
_CERTAIN_ENDS: Final = ("password", "passwd", "passphrase", "passwort", "kennwort", "secret", "apikey")
"""Ends of words that were joined: `PGPASSWORD`, `clientsecret`."""
_PROBABLE: Final = _read_words(
    "key keys token tokens pass credential credentials creds auth oauth cookie cookies signature salt pin"
)
_CERTAIN_BEFORE_PROBABLE: Final = _read_words(
    "api secret access refresh private auth basic bearer signing encryption master account smtp db"
)
"""Words that make the next one certain: `api_key`, `access_token`, `basic_auth`, `smtp_pass`."""
_PLURALS: Final = _read_words("keys passwords secrets tokens passphrases apikeys")
_TEXTS: Final = _read_words("glossary terminology vocabulary dictionary replacements translations")
_WORKING_DIRECTORIES: Final = ("PWD", "OLDPWD")
"""Variables of a shell. `MYSQL_PWD` is a password."""

MIN_RANDOM_CHARACTERS: Final = 16
_MIN_LETTERS: Final = 8
"""Shorter secrets of letters only are not hidden: they may be words."""
_MIN_MIXED_CHARACTERS: Final = 6
_MIN_DIGITS: Final = 16
_MIN_DISTINCT: Final = 4
_MIN_DISTINCT_IF_LONG: Final = 6
_REPEATED: Final = re.compile(r"(.)\1{3,}", re.DOTALL)
_GROUPS: Final = re.compile("[A-Za-z0-9]+")
_IS_MIXED: Final = re.compile(r"(?=.*[A-Za-z])(?=.*[0-9])(?=.*[!#$%&*+?@^~])\S{8,}").fullmatch
"""A password of letters, digits and signs that names do not contain, such as `hunter2!`."""
_COMMON_WORDS: Final = _read_words("""
    a access account admin administrator anonymous api apikey auth authorization automatic bearer canceled cancelled
    certificate change changeme completed conference connection credentials custom database default demo dev development
    disabled docker dummy embedded enabled example exception external failed false geheimnis guest here host insert
    internal invalid jobledger kennwort key local localhost me minioadmin mongo mongodb my none null optional origin
    pass passwd password passwort pending placeholder postgres postgresql process processing production progress
    public rabbitmq redis remote replace required root running same sample secret service session sessions staging
    test testing the token topsecret true undefined unknown unlimited user username warning your
    """)
"""A text of these words is a placeholder or a default, or it is in many log entries."""


class SecretKind(IntEnum):
    """What a name says about its value."""

    NONE = 0
    PROBABLE = 1
    """A secret if it looks random: a `key` or `token` may be a word."""
    CERTAIN = 2
    DECLARED = 3
    """The type of the setting says that it is a secret, and everything below it."""


class NameMeaning(IntEnum):
    """What a value with a name is."""

    VALUE = 0
    FILE = 1
    """The path of a file."""
    VARIABLE = 2
    """The name of an environment variable."""
    TEXTS = 3
    """Words for which names in it stand, such as a glossary."""


@lru_cache(2000)
def classify_name(name: str) -> tuple[SecretKind, NameMeaning]:
    """Return whether a setting or variable with this name is a secret, and what its value is. The last word decides."""
    words = _split_name(name)
    if not words or name in _WORKING_DIRECTORIES:
        return SecretKind.NONE, NameMeaning.VALUE
    if words[-1] in _TEXTS:
        return SecretKind.NONE, NameMeaning.TEXTS
    if words[-1] in _FILES or words[-1] in _VARIABLES:
        meaning = NameMeaning.FILE if words[-1] in _FILES else NameMeaning.VARIABLE
        is_connection = len(words) > 1 and words[-2] in _CONNECTIONS
        return SecretKind.CERTAIN if is_connection else _classify_words(words[:-1]), meaning
    return _classify_words(words), NameMeaning.VALUE


def is_plural(name: str) -> bool:
    """Return whether a name is that of several secrets, such as `api_keys`."""
    return bool(words := _split_name(name)) and words[-1] in _PLURALS


def _split_name(name: str) -> list[str]:
    words = [word.lower() for word in _WORDS.findall(name[-200:])]
    while len(words) > 1 and (words[-1].isdigit() or words[-1] in _DECORATIONS):
        words.pop()
    return words


def _classify_words(words: list[str]) -> SecretKind:
    if not words:
        return SecretKind.NONE
    last = words[-1]
    if last in _CERTAIN or last.endswith(_CERTAIN_ENDS):
        return SecretKind.CERTAIN
    if last in _PROBABLE and words[-2:-1] and words[-2] in _CERTAIN_BEFORE_PROBABLE:
        return SecretKind.CERTAIN
    return SecretKind.PROBABLE if last in _PROBABLE or words[0] in _CERTAIN else SecretKind.NONE


def is_secret_value(text: str, kind: SecretKind) -> bool:
    """Return whether a value is hidden: not if it may as well be an ordinary word, a number or a placeholder."""
    groups = _GROUPS.findall(text.lower())
    if kind is SecretKind.NONE or is_placeholder(text) or (groups and _COMMON_WORDS.issuperset(groups)):
        return False
    if kind is SecretKind.PROBABLE:
        return len(text) >= _MIN_LETTERS and (has_random_group(text) or _IS_MIXED(text) is not None)
    if text.replace(".", "").isdigit():
        return len(text) >= _MIN_DIGITS
    return len(text) >= (_MIN_LETTERS if text.isalpha() else _MIN_MIXED_CHARACTERS)


def is_placeholder(text: str) -> bool:
    """Return whether a text is one like `sk-00000000` or `********`."""
    least = _MIN_DISTINCT if len(text) < MIN_RANDOM_CHARACTERS else _MIN_DISTINCT_IF_LONG
    return len(set(text)) < least or 2 * len(_REPEATED.sub("", text)) < len(text)


def looks_random(text: str) -> bool:
    """Return whether a text is long and has no words only, so that a part of it is no ordinary text."""
    return len(text) >= MIN_RANDOM_CHARACTERS and has_random_group(text)


def has_random_group(text: str) -> bool:
    """Return whether letters and digits are mixed in a text without spaces, or it has very long groups of them."""
    if any(map(str.isspace, text)) or "://" in text:
        return False
    return any(_is_random_group(group) for group in _GROUPS.findall(text))


def _is_random_group(group: str) -> bool:
    if len(group) >= 24 or (len(group) >= 16 and not group.isalpha() and not group.isdigit()):
        return True
    kinds = [2 if character.isdigit() else character.isupper() for character in group]
    changes = sum(one != next_one and not (one == 1 and next_one == 0) for one, next_one in pairwise(kinds))
    return len(group) >= 6 and changes >= 3
