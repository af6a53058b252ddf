"""Labels of the built-in template in English and German."""

from __future__ import annotations

from typing import Final

_ENGLISH: Final = {
    "slides": "Slides",
    "slide": "Slide",
    "notes": "Speaker notes",
    "transcript": "Transcript",
    "links": "Links",
    "page": "Session page",
    "recording": "Recording",
    "attachments": "Slides and attachments",
    "warnings": "Warnings",
}
_GERMAN: Final = {
    "slides": "Folien",
    "slide": "Folie",
    "notes": "Sprechernotizen",
    "transcript": "Transkript",
    "links": "Links",
    "page": "Vortragsseite",
    "recording": "Aufzeichnung",
    "attachments": "Folien und Anhänge",
    "warnings": "Hinweise",
}
_BY_LANGUAGE: Final = {"de": _GERMAN}


def load_labels(language: str) -> dict[str, str]:
    """Return the labels for a language code such as `de-AT`. The default is English."""
    return _BY_LANGUAGE.get(language.partition("-")[0].lower(), _ENGLISH)
