"""The content of the demo conference, read from `conference.yaml`.

`abstract`, `body` and `biography` are HTML, as a conference system stores them. People and places are fictional.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict

Note = Literal["C4", "D4", "E4", "G4", "A4", "C5", "D5", "E5", "rest"]


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Speaker(_Content):
    name: str
    biography: str


class Chart(_Content):
    """Horizontal bars. Each value is followed by `unit`."""

    unit: str
    bars: tuple[tuple[str, float], ...]


class Flow(_Content):
    """Boxes from left to right, with an arrow between neighbors."""

    boxes: tuple[str, ...]
    caption: str


class Code(_Content):
    text: str


Figure = Chart | Flow | Code


class Slide(_Content):
    title: str
    points: tuple[str, ...] = ()
    figure: Figure | None = None


class Video(_Content):
    """A short video with a moving picture, a caption, a melody of (note, length in beats), and subtitles.

    Captions must be ASCII: the bundled font has few other characters. `subtitles` are shown one after the other.
    """

    container: Literal["webm", "mp4"]
    animation: Literal["ledger", "contrast"]
    caption: tuple[str, str]
    melody: tuple[tuple[Note, float], ...]
    seconds: int
    subtitles: tuple[str, ...]


class Talk(_Content):
    slug: str
    title: str
    subtitle: str
    filename: str
    track: str
    day: str
    start: str
    end: str
    room: str
    language: Literal["en", "de"]
    speakers: tuple[Speaker, ...]
    abstract: str
    body: str
    color: tuple[int, int, int]
    slides: tuple[Slide, ...] = ()
    video: Video | None = None

    @property
    def page_count(self) -> int:
        """Number of slides including the cover, or 0 for a talk without slides."""
        return len(self.slides) + 1 if self.slides else 0


class Conference(_Content):
    name: str
    venue: str
    dates: dict[str, str]
    talks: tuple[Talk, ...]


@cache
def load_conference() -> Conference:
    """Read the conference from the package data."""
    text = files(__package__).joinpath("conference.yaml").read_text(encoding="utf-8")
    return Conference.model_validate(yaml.safe_load(text))
