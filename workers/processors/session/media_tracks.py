"""Choose among the tracks of a recording: its language, its kind, and what the container says about it. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Final

from babel import Locale
from babel.core import get_global

_NO_LANGUAGE: Final = frozenset({"und", "mul", "mis", "zxx", "qaa", "unk", "none"})
"""Codes of ISO 639-2 and of common programs that name no language."""
_COMMON_LANGUAGES: Final = "en de fr es it pt nl pl cs ru uk ja zh ko tr sv"
_TRANSLATION_TITLE: Final = re.compile(
    r"translat|interpretation|interpreter|übersetz|dolmetsch|audio.?descri|audiodeskript|\bdub", re.I
)
_COMMENTARY_TITLE: Final = re.compile(r"comment|kommentar", re.I)


@dataclass(frozen=True, slots=True)
class Track:
    """A sound or subtitle track.

    Attributes:
        language: Language tag as the container has it, such as `ger`, `deu` or `de-AT`.
        title: Title for people.
        is_default: Whether players choose it.
        is_alternative: Whether it is a translation, or made for people who cannot hear or see.
        is_commentary: Whether it comments on the recording.
    """

    language: str | None = None
    title: str = ""
    is_default: bool = False
    is_alternative: bool = False
    is_commentary: bool = False

    def rank(self, language: str | None) -> tuple[int, bool]:
        """Return a value to sort tracks by. The best track for `language` has the lowest."""
        own = self.find_language()
        is_alternative = self.is_alternative or bool(_TRANSLATION_TITLE.search(self.title))
        if self.is_commentary or _COMMENTARY_TITLE.search(self.title):
            kind = 5
        elif language is None or own == normalize_language(language):
            kind = 2 if is_alternative else 0
        elif own is None:
            kind = 4 if is_alternative else 1
        else:
            kind = 4 if is_alternative else 3
        return kind, not self.is_default

    def find_language(self) -> str | None:
        """Return the primary subtag of the language from the tag, or else from a title that is its name."""
        return normalize_language(self.language) or _find_named_language(self.title)

    def __str__(self) -> str:
        return ", ".join(part for part in (self.language, self.title) if part) or "no language"


def normalize_language(tag: str | None) -> str | None:
    """Return the primary subtag of a language tag, `de` for `ger`, `deu` and `de-AT`, or None if it names none."""
    subtag = re.split("[-_]", (tag or "").strip().lower(), maxsplit=1)[0]
    if not re.fullmatch("[a-z]{2,3}", subtag) or subtag in _NO_LANGUAGE:
        return None
    return str(get_global("language_aliases").get(subtag, subtag))


def _find_named_language(title: str) -> str | None:
    words = set(re.findall(r"\w+", title.casefold()))
    return next((code for name, code in _load_language_names().items() if name in words), None)


@cache
def _load_language_names() -> dict[str, str]:
    """Return the names of common languages of conferences, in English and in the language, with their codes."""
    locales = [Locale.parse(code) for code in _COMMON_LANGUAGES.split()]
    return {
        str(name).casefold(): locale.language
        for locale in locales
        for name in (locale.english_name, locale.display_name)
    }
