"""Hide secrets in texts: a service may echo a key in an error message, and the log is never changed.

Each secret is found as it is, with escaped characters as in JSON, URLs, HTML or `repr`, and within Base64. A short one
is found only as a whole word. Of a long random one, a part is found where a text was cut. The time grows linearly with
the length of the text.
"""

from __future__ import annotations

import html
import json
import re
from base64 import b64encode
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, Final
from urllib.parse import quote

from jobledger.workers.secrets.secret_names import MIN_RANDOM_CHARACTERS, looks_random

PLACEHOLDER: Final = "[secret]"
_MIN_PART: Final = 6
"""A shorter part of a secret is not hidden. Services show some characters, so that users recognize their key."""
_MIN_PART_ANYWHERE: Final = 12
"""Half of a random secret is hidden anywhere, if it has so many characters."""
_MIN_DISTINCT: Final = 4
"""No parts are hidden of a secret that begins or ends with fewer different characters, such as `AAAAAA`."""
_MIN_BASE64: Final = 8
_IS_CUT_AFTER: Final = re.compile(r"[\"']?[ ]?[\[(<]?(?:…|\.\.\.)").match
_IS_CUT_AFTER_REVERSED: Final = re.compile(r"[\"']?[ ]?[\])>]?(?:…|\.\.\.)").match
_IS_WORD: Final = re.compile("[-_]?(?:[A-Z]?[a-z]+|[a-z]+[A-Z]|[A-Z]+)[-_]?").fullmatch
_UNITS: Final = re.compile(r"\\+|\s+|.", re.DOTALL)
"""Repeated backslashes and spaces are one unit, so that each part of a text matches in few ways."""
_ENTITIES: Final = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "apos"}
_HEX: Final = "[0-9A-Fa-f]"
_ESCAPE: Final = rf"\\(?:[bfnrt]|u{_HEX}{{4}}|x{_HEX}{{2}})|%(?:25)?{_HEX}{{2}}|\[[0-9;]{{0,15}}m"
"""What may be before a short secret although it ends with a letter or digit: an escape sequence or a color."""


class HiddenSecrets:
    """Secrets that are replaced in texts.

    Args:
        secrets: The secrets. An empty one is ignored.
        placeholder: Replaces each secret.
    """

    def __init__(self, secrets: Iterable[str], *, placeholder: str = PLACEHOLDER) -> None:
        texts = list(filter(None, dict.fromkeys(map(str.strip, secrets))))
        self._secrets = list(map(_Secret, texts))
        self._placeholder = placeholder
        forms = {form: looks_random(text) for text in texts for form in _iterate_forms(text)}
        self._beginnings = _Beginnings(forms, _IS_CUT_AFTER)
        self._reversed_ends = _Beginnings(
            {form[::-1]: is_random for form, is_random in forms.items()}, _IS_CUT_AFTER_REVERSED
        )

    @property
    def is_empty(self) -> bool:
        """Whether there are no secrets."""
        return not self._secrets

    def hide(self, text: str, *, may_be_cut: bool = True) -> str:
        """Return the text with a placeholder instead of each secret.

        Args:
            may_be_cut: Whether parts of a random secret are hidden as well, where a text was cut.
        """
        kept: list[str] = []
        position = 0
        for start, end in sorted(self._find(text, may_be_cut=may_be_cut)):
            if start >= position:
                kept += text[position:start], self._placeholder
            position = max(position, end)
        return "".join([*kept, text[position:]])

    def _find(self, text: str, *, may_be_cut: bool) -> Iterator[tuple[int, int]]:
        for secret in self._secrets:
            yield from secret.find(text)
        yield from self._beginnings.find(text, may_be_cut=may_be_cut)
        if may_be_cut:
            for start, end in self._reversed_ends.find(text[::-1], may_be_cut=True):
                yield len(text) - end, len(text) - start

    def hide_in_json(self, value: Any, *, may_be_cut: bool = True) -> Any:
        """Return a JSON value with a placeholder instead of each secret. Of keys that become equal, the last remains.

        Raises:
            RecursionError: The value is nested hundreds of levels deep.
        """
        hide = partial(self.hide_in_json, may_be_cut=may_be_cut)
        if isinstance(value, str):
            return self.hide(value, may_be_cut=may_be_cut)
        if isinstance(value, list):
            return list(map(hide, value))
        if isinstance(value, dict):
            return {hide(key): hide(item) for key, item in value.items()}
        return value


class _Secret:
    """One secret."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._core = max(re.findall("[A-Za-z0-9]+", text), key=len, default="")
        """A part of the secret that no encoding but Base64 changes. A text without it is not searched further."""

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pattern = f"({''.join(map(_build_pattern, _UNITS.findall(self._text)))})"
        if len(self._text) < MIN_RANDOM_CHARACTERS:
            around = r"[\w-]" if self._text.isalpha() else r"\w"
            start = rf"(?:(?<!{around})|{_ESCAPE})" if re.match(r"\w", self._text) else ""
            end = rf"(?!{around})" if re.search(r"\w$", self._text) else ""
            pattern = start + pattern + end
        return re.compile(pattern)

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield start and end of each occurrence in a text."""
        if self._core in text:
            for match in self._pattern.finditer(text):
                yield match.span(1)


class _Beginnings:
    """Literal forms of all secrets, of which the beginnings are found.

    Args:
        forms: Each form, and whether its parts are hidden where a text was cut.
        is_cut_after: Matches the mark of a cut after a part.
    """

    def __init__(self, forms: Mapping[str, bool], is_cut_after: Callable[[str, int], object]) -> None:
        self._has_parts = forms
        self._forms = sorted(form for form in forms if len(set(form[:_MIN_PART])) >= _MIN_DISTINCT)
        self._heads = {form[:_MIN_PART] for form in self._forms}
        self._longest = max(map(len, self._forms), default=0)
        self._is_cut_after = is_cut_after

    def find(self, text: str, *, may_be_cut: bool) -> Iterator[tuple[int, int]]:
        """Yield start and end of each form, and of the beginnings beside the end of a line or the mark of a cut."""
        heads, hidden_end = self._heads, 0
        for start in [i for i in range(len(text) - _MIN_PART + 1) if text[i : i + _MIN_PART] in heads]:
            if start < hidden_end:
                continue
            # The form that has the most characters in common with the text is a neighbour in the order of texts.
            index = bisect(self._forms, text[start : start + self._longest])
            for form in self._forms[max(0, index - 1) : index + 1]:
                end = start + _count_equal(form, text, start)
                is_part = may_be_cut and self._has_parts[form]
                if end - start == len(form) or (is_part and self._is_part_hidden(text, start, end, len(form))):
                    hidden_end = max(end, hidden_end)
                    yield start, end

    def _is_part_hidden(self, text: str, start: int, end: int, length: int) -> bool:
        """Return whether to hide a part. A line may begin or end with one by chance, such as the word `github`."""
        part = text[start:end]
        if len(part) >= max(_MIN_PART_ANYWHERE, length // 2) or self._is_cut_after(text, end):
            return True
        return (end == len(text) or text[end] == "\n") and not _IS_WORD(part)


def _count_equal(form: str, text: str, start: int) -> int:
    """Return with how many characters of a form a text continues."""
    equal, too_many = 0, len(form) + 1
    while too_many - equal > 1:
        middle = (equal + too_many) // 2
        if text.startswith(form[equal:middle], start + equal):
            equal = middle
        else:
            too_many = middle
    return equal


# Forms of a secret ------------------------------------------------------------------------------------------------


def _build_pattern(unit: str) -> str:
    """Return a regular expression for a unit and its escaped forms. The time to search grows linearly."""
    if unit.isascii() and unit.isalnum():
        return unit
    if unit.isspace():
        return r"(?:\s|\+|%(?:25)?20|&(?:amp;)?#0{0,4}32;){1,16}+"
    if unit.startswith("\\"):
        return r"(?:\\|(?i:%(?:25)?5c)|&(?:amp;)?#0{0,4}92;){1,64}+"
    return _build_character_pattern(unit)


def _build_character_pattern(character: str) -> str:
    code = ord(character)
    content = character.encode("utf-8", "replace")
    units = re.findall("....", character.encode("utf-16-be", "surrogatepass").hex())
    entity = f"|{_ENTITIES[character]}" if character in _ENTITIES else ""
    forms = [
        rf"&(?:amp;)?(?:\#0{{0,4}}{code}|\#x0{{0,4}}{code:x}{entity});",
        "".join(f"%(?:25)?{byte:02x}" for byte in content),
        r"\\{1,8}".join(f"u{unit}" for unit in units),
        r"\\{1,8}".join(f"x{byte:02x}" for byte in content),
        *([f"x{code:02x}"] if code < 256 else []),
    ]
    return rf"\\{{0,8}}+(?:(?i:{'|'.join(forms)})|{re.escape(character)})"


def _iterate_forms(secret: str) -> Iterator[str]:
    """Yield forms that are found literally: all in Base64, and those of a random one of which parts are hidden."""
    if looks_random(secret):
        in_json = json.dumps(secret)[1:-1]
        urls = (quote(secret, safe=safe, errors="replace") for safe in ("", "/"))
        yield from (secret, in_json, in_json.replace("/", "\\/"), html.escape(secret), *urls)
    content = secret.encode("utf-8", "replace")
    for offset in range(3):  # the characters depend on the number of bytes before, such as a user name
        encoded = b64encode(bytes(offset) + content).decode()
        common = encoded[-(-offset * 8 // 6) : (offset + len(content)) * 8 // 6]
        if len(common) >= _MIN_BASE64:
            yield common
            yield common.replace("+", "-").replace("/", "_")
