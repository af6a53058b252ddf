"""Find the secrets in the settings of processors, in environment variables, and in files that they name.

The settings are searched as they are in config.yaml: models and their code belong to plug-ins. A plug-in need not do
anything, because those that publish a secret are the ones that would not.

Of a value that is a secret, the whole and its parts are hidden: `k1,k2`, `user:password` and `Scheme key` need no
grammar. Other texts are searched for URLs, headers, arguments and connection strings.
"""

from __future__ import annotations

import binascii
import os
import re
import stat
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise, zip_longest
from pathlib import Path, PurePath
from typing import Any, Final, get_args, get_origin
from urllib.parse import unquote

import orjson
import structlog
from pydantic import BaseModel, RootModel, Secret, SecretBytes, SecretStr
from pydantic.fields import FieldInfo

from jobledger.workers.secrets.hidden_secrets import HiddenSecrets
from jobledger.workers.secrets.secret_names import (
    NameMeaning,
    SecretKind,
    classify_name,
    has_random_group,
    is_plural,
    is_secret_value,
    looks_random,
)

MAX_SECRETS: Final = 200
"""Maximum number of secrets. Each text is searched for all of them."""
MAX_SECRET_CHARACTERS: Final = 16_384
MAX_FILE_BYTES: Final = 64 * 1024
"""Only this much of a secret file or of a setting is read."""
_MAX_DEPTH: Final = 20
_MAX_VALUES: Final = 10_000

_QUOTES: Final = "\ufeff\"'{} \t\r\n"
_SEPARATORS: Final = re.compile(r"""(?:[\s,;:="']|%20)+""")
_LABEL: Final = re.compile(r"[A-Za-z][\w.-]{0,60}")
_LABELLED: Final = re.compile(
    r"""["']?(?:\s{0,8}[:=]\s{0,8}|\s{1,8}(?!-))("[^"\n]{1,4096}"|'[^'\n]{1,4096}'|[^\s;&"']{1,4096})"""
)
"""The value after a label: `password=…`, `Bearer …`."""
_PAIR: Final = re.compile(
    r"""(?:export\s+|-\s+)?["']?([A-Za-z][\w.-]{0,60})["']?(?::\s+|\s{0,8}=(?!=)\s{0,8})(\S.*?)(?:\s\#.*)?""",
    re.VERBOSE,
)
"""A header or a line of a file: `Authorization: Bearer …`, `API_KEY=…`."""
_IS_HEADER_VALUE: Final = re.compile(r"(?:[\w-]+\s+)?[^\s=;]+=*").fullmatch
_STARTS_LIKE_ARGUMENTS: Final = re.compile(
    r"(?:[\w./ -]{1,200}\s)?(?:--?[A-Za-z]|[\w.-]+=)|[\w.-]+\s{0,8}=|(?i:basic|bearer)\s|\w+-[\w-]+:\S+\Z"
).match
"""A command with options, a connection string, the value of a header, or a header without a space."""
_USER_OPTION: Final = re.compile(r"""(?:^|\s)(?:-u|--(?:proxy-)?user)[\s=]?["']?[^\s:"'/]{1,100}:([^\s"']{1,4096})""")
"""`curl -u user:password`."""
_USER_AT_HOST: Final = re.compile(
    r"""(?:^|[\s"'=,])(?!(?:mailto|e-?mail|contact|sips?|xmpp|acct):)[\w.%+-]{1,100}:([^\s/"'<>@]{1,256})@"""
    r"[\w.-]{1,253}(?::[0-9]{1,5})?(?![\w:@])"
)
"""`user:password@host` without a scheme, such as a proxy."""
_IS_SENTENCE: Final = re.compile(r"[.,?](?:\s|$)").search
_COMMENTS: Final = ("-----", "#", "[", "//")
"""Starts of lines without a secret: comments, sections, and the first and last line of a private key."""
_URL: Final = re.compile(r"://(?=([^\s\"'<>]{1,2048}))")
_PARAMETER: Final = re.compile(r"[?&;#]([\w.-]{1,60})=([^&;#\s\"'<>]{1,4096})")
_PATH: Final = re.compile(
    r"(?:~|\.{1,2})?/[^\n\0]{1,4096}|[\w./-]{1,4096}\.(?:cer|crt|env|ini|json|key|p12|pem|pfx|toml|txt|ya?ml)"
)
_VARIABLE: Final = re.compile(r"\$?\{?([A-Za-z_][A-Za-z0-9_]{1,200})\}?")

_log = structlog.get_logger()


class FoundSecrets:
    """The secrets of one source, and the files that contain more of them.

    Attributes:
        texts: The secrets.
        files: Files with secrets.
        is_complete: Whether the source was searched wholly.

    Args:
        environment: Variables that settings may name.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.texts: dict[str, None] = {}
        self.files: dict[Path, None] = {}
        self.is_complete = True
        self._environment = environment or {}
        self._secret_fields: frozenset[str] = frozenset()
        self._remaining = 0
        """How many more values of the source are searched."""

    def add_environment(self) -> None:
        """Add the secrets in all environment variables."""
        self._remaining = _MAX_VALUES
        for name, value in self._environment.items():
            self._add_value(name, value, SecretKind.NONE, 0)

    def add_settings(self, section: Mapping[str, Any], model: type[BaseModel] | None = None) -> None:
        """Add the secrets in the settings of a processor.

        Args:
            section: The section as it is in config.yaml.
            model: The processor's `Settings`. Only the types of its fields are used.
        """
        self._remaining = _MAX_VALUES
        fields = _SecretFields()
        is_secret = False
        try:
            is_secret = model is not None and fields.add_type(model)
        except Exception as error:  # noqa: BLE001 - a class of a plug-in must not stop the worker
            _log.warning("cannot use types of settings to find secrets", model=repr(model), error=type(error).__name__)
        self._secret_fields = frozenset(fields.names)
        for default in fields.defaults:
            self._add_value("", default, SecretKind.NONE, 0)
        self._add_value("", section, SecretKind.DECLARED if is_secret else SecretKind.NONE, 0)

    def add_content(self, content: str) -> None:
        """Add the secrets in the content of a secret file: one secret, JSON, a private key, or lines with names."""
        self._remaining = _MAX_VALUES
        text = content.strip("\ufeff \t\r\n")
        if self._add_json(text, SecretKind.PROBABLE, 0):
            return
        lines = _split_lines(text)
        for line in lines:
            pair = _PAIR.fullmatch(line)
            kind = SecretKind.PROBABLE if pair and len(lines) > 1 else SecretKind.CERTAIN
            self._add_secret(line, kind)
            if pair is not None:
                self._add_value(pair[1], pair[2], kind, 1)

    # Values -------------------------------------------------------------------------------------------------------

    def _add_value(self, name: str, value: Any, inherited: SecretKind, depth: int) -> None:
        """Add the secrets in a value, which may be a secret as well because it is among secrets."""
        self._remaining -= 1
        if depth > _MAX_DEPTH or self._remaining < 0:
            self.is_complete = False
            return
        kind, meaning = classify_name(name)
        if name in self._secret_fields:
            kind, meaning = SecretKind.DECLARED, NameMeaning.VALUE
        if meaning is NameMeaning.TEXTS:
            return
        if isinstance(value, SecretStr | SecretBytes):
            kind, value = SecretKind.DECLARED, value.get_secret_value()
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, Mapping):
            self._add_mapping(name, value, max(kind, inherited), depth)
        elif isinstance(value, list | tuple | set | frozenset):
            self._add_list(name, list(value), max(kind, inherited), depth)
        elif isinstance(value, str | PurePath):
            text = str(value)
            is_url = kind is not SecretKind.DECLARED and kind < inherited and "://" in text
            self._add_setting(text, kind if is_url else max(kind, inherited), meaning, depth)

    def _add_mapping(self, name: str, value: Mapping[Any, Any], kind: SecretKind, depth: int) -> None:
        if kind is SecretKind.CERTAIN and not is_plural(name):
            kind = SecretKind.PROBABLE  # `credentials` have a user as well
        for key, item in value.items():
            self._add_value(str(key), item, kind, depth + 1)
            if kind is not SecretKind.NONE:
                self._add_text(str(key), SecretKind.PROBABLE)  # such as the users of keys
        by_name = {str(key).lower(): item for key, item in value.items()}
        for label in ("name", "key", "header"):  # {name: Authorization, value: …}
            if isinstance(by_name.get(label), str) and "value" in by_name:
                self._add_value(by_name[label], by_name["value"], kind, depth + 1)

    def _add_list(self, name: str, items: Sequence[Any], kind: SecretKind, depth: int) -> None:
        for item in items:
            self._add_value(name, item, kind, depth + 1)
        for label, item in pairwise(items):  # ["--api-key", "…"], ["Authorization", "…"]
            if isinstance(label, str) and isinstance(item, str) and (label.startswith("-") or len(items) == 2):
                self._add_value(label, item, SecretKind.NONE, depth + 1)

    def _add_setting(self, text: str, kind: SecretKind, meaning: NameMeaning, depth: int) -> None:
        text = text.strip()
        if self._add_json(text, kind, depth):
            return
        if kind is SecretKind.NONE:
            self._add_embedded(text[:MAX_FILE_BYTES], depth)
            return
        variable = _VARIABLE.fullmatch(text)
        if variable is not None and variable[1] in self._environment:
            self._add_secret(self._environment[variable[1]], SecretKind.CERTAIN)
        elif "\0" not in text and (meaning is NameMeaning.FILE or _PATH.fullmatch(text)):
            self.files[Path(os.path.expanduser(text))] = None  # noqa: PTH111 - Path.expanduser raises errors
            self._add_text(text, SecretKind.PROBABLE)  # Base64 may begin with a slash
        elif meaning is NameMeaning.VALUE:
            self._add_secret(text, kind)

    def _add_json(self, text: str, kind: SecretKind, depth: int) -> bool:
        """Add the secrets in JSON. Return whether the text is an object or list."""
        if not text.startswith(("{", "[")) or len(text) > MAX_FILE_BYTES:
            return False
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            return False
        self._add_value("", value, kind, depth + 1)
        return True

    # Texts --------------------------------------------------------------------------------------------------------

    def _add_embedded(self, text: str, depth: int) -> None:
        """Add the secrets in a text that is none itself, such as a URL, header or connection string.

        In an ordinary text, a value beside the name of a secret must look random.
        """
        headers = [_PAIR.fullmatch(line.strip()) for line in text.splitlines()]
        self._add_urls(text)
        if all(header is not None and _IS_HEADER_VALUE(header[2]) for header in headers):
            for name, value in (header.groups() for header in headers if header is not None):
                if not value.replace(" ", "").isalpha():  # it may be a title
                    self._add_value(name, value, SecretKind.NONE, depth + 1)
        self._add_credentials(text)
        is_certain = _STARTS_LIKE_ARGUMENTS(text) and not _IS_SENTENCE(text)
        self._add_labelled(text, SecretKind.CERTAIN if is_certain else SecretKind.PROBABLE)

    def _add_secret(self, text: str, kind: SecretKind) -> None:
        """Add a secret, and its lines and words that look random or have digits or signs: it may be a list of keys."""
        if len(text) > MAX_FILE_BYTES:
            self.is_complete = False
            return
        for line in _split_lines(text):
            self._add_words(line, kind)
            self._add_urls(line)
            self._add_labelled(line, kind)

    def _add_words(self, text: str, kind: SecretKind) -> None:
        self._add_text(text, kind)
        if "://" not in text:
            for word in _SEPARATORS.split(text):
                if has_random_group(word) or not word.replace(".", "").isalpha():
                    self._add_text(word, kind)

    def _add_labelled(self, text: str, max_kind: SecretKind) -> None:
        """Add the values beside names: `password=…`, `Bearer …`. Decode those of `Basic`."""
        for label in _LABEL.finditer(text):
            kind = min(classify_name(label[0])[0], max_kind)
            is_basic = label[0].lower() == "basic"
            if (kind is not SecretKind.NONE or is_basic) and (match := _LABELLED.match(text, label.end())):
                self._add_words(match[1], kind)
                if is_basic:
                    self._add_text(_decode_basic(match[1]), max_kind)

    def _add_credentials(self, text: str) -> None:
        kind = SecretKind.CERTAIN if text.startswith("curl ") or not re.search(r"\s", text) else SecretKind.PROBABLE
        for match in chain(_USER_OPTION.finditer(text), _USER_AT_HOST.finditer(text)):
            self._add_text(match[1], kind)

    def _add_urls(self, text: str) -> None:
        """Add the secrets in URLs: user names, passwords and parameters. A password may contain `@`, `/` and `#`."""
        for url in _URL.finditer(text):
            authority = re.split("[/?#]", url[1], maxsplit=1)[0]
            for part in (authority, url[1]):
                user, _, password = part.rpartition("@")[0].partition(":")
                if not re.search(r"[/?#\[]", user) and not re.match("[0-9]+[/?#]", password):
                    self._add_text(user, SecretKind.PROBABLE)
                    self._add_text(password, SecretKind.CERTAIN)
            if "hook" in url[1].lower():  # the path of a webhook is often its secret
                for segment in filter(looks_random, url[1].split("/")):
                    self._add_text(segment, SecretKind.PROBABLE)
        for match in _PARAMETER.finditer(text):
            self._add_text(match[2], classify_name(match[1])[0])

    def _add_text(self, text: str, kind: SecretKind) -> None:
        """Add a text that is a secret, unless it may be an ordinary word."""
        for form in (text, unquote(text)):
            form = form.strip(_QUOTES)
            if len(form) <= MAX_SECRET_CHARACTERS and is_secret_value(form, kind):
                self.texts[form] = None


def _split_lines(text: str) -> list[str]:
    """Return the lines of a secret or of a secret file that may contain secrets."""
    lines = [line.strip() for line in text.splitlines()]
    if len(lines) <= 1:
        return lines
    return [line for line in lines if line and not line.startswith(_COMMENTS) and not line.endswith((":", "{"))]


def _decode_basic(credentials: str) -> str:
    """Return the password in the Base64 of a `Basic` header, or an empty string."""
    try:
        return b64decode(credentials + "=" * (-len(credentials) % 4), validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def merge_fairly(sources: Iterable[Sequence[str]]) -> list[str]:
    """Return the distinct secrets of all sources: the first of each, then the second of each, and so on."""
    return list(dict.fromkeys(text for text in chain.from_iterable(zip_longest(*sources)) if text is not None))


def hide_secrets_of(
    text: str,
    environment: Mapping[str, str],
    section: Mapping[str, Any] | None = None,
    model: type[BaseModel] | None = None,
) -> str:
    """Return a text without the secrets of environment variables, of settings, and of files that these name. Blocks."""
    found = FoundSecrets(environment)
    found.add_settings(section or {}, model)
    found.add_environment()
    for content in filter(None, map(read_secret_file, found.files)):
        found.add_content(content)
    return HiddenSecrets(list(found.texts)[:MAX_SECRETS]).hide(text)


def read_secret_file(file: Path) -> str | None:
    """Return the content of a file; None if it is no regular file, cannot be read, or is not text. Blocks."""
    try:
        # O_NONBLOCK: opening a named pipe must not wait for its writer.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        data = os.read(descriptor, MAX_FILE_BYTES)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None if b"\0" in data else data.decode("utf-8-sig", "replace")


# Types of settings ------------------------------------------------------------------------------------------------


class _SecretFields:
    """The fields of secret types in models: `SecretStr`, `list[SecretStr]`, `SecretStr | None`, …

    Attributes:
        names: Their names and aliases in all models together.
        defaults: Their default values.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.defaults: list[Any] = []
        self._seen: set[int] = set()

    def add_type(self, annotation: Any) -> bool:
        """Add the secret fields of the models in a type. Return whether the type itself is secret."""
        kind = get_origin(annotation) or annotation
        if isinstance(kind, type):
            if issubclass(kind, SecretStr | SecretBytes | Secret):
                return True
            if issubclass(kind, BaseModel):
                return self._add_model(kind)
        return True in [self.add_type(argument) for argument in get_args(annotation)]

    def _add_model(self, model: type[BaseModel]) -> bool:
        if id(model) in self._seen:
            return False
        self._seen.add(id(model))
        for name, field in model.model_fields.items():
            if self.add_type(field.annotation):
                if issubclass(model, RootModel):
                    return True
                self.names.update(_iterate_names(name, field))
                self.defaults.append(field.default)
        return False


def _iterate_names(name: str, field: FieldInfo) -> Iterator[str]:
    yield name
    alias = field.validation_alias
    for choice in [field.alias, *getattr(alias, "choices", [alias])]:
        if isinstance(choice, str):
            yield choice
