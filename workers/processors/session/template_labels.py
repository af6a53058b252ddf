"""session: the few words our template says itself, in the document's language where we know it, else in English."""

from __future__ import annotations

from typing import Final

_ENGLISH: Final = {
    "slides": "Slides",
    "slide": "Slide",
    "notes": "Notes",
    "transcript": "Transcript",
    "links": "Links",
    "page": "Session page",
    "recording": "Recording",
    "attachments": "Slides and attachments",
    "warnings": "What could not be done",
}
_GERMAN: Final = {
    "slides": "Folien",
    "slide": "Folie",
    "notes": "Notizen",
    "transcript": "Mitschrift",
    "links": "Links",
    "page": "Seite des Vortrags",
    "recording": "Aufzeichnung",
    "attachments": "Folien und Anhänge",
    "warnings": "Was nicht gelang",
}
_BY_LANGUAGE: Final = {"de": _GERMAN}


def load_labels(language: str) -> dict[str, str]:
    """The words by their keys, for a language code such as `de-AT`."""
    return _BY_LANGUAGE.get(language.partition("-")[0].lower(), _ENGLISH)
