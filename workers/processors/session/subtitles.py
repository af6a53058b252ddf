"""Read subtitles (in the recording, SRT or WebVTT), and decide whether they are a transcript of it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import av

from jobledger.workers.processors.session.media_tracks import normalize_language
from jobledger.workers.processors.session.transcript import (
    Chapter,
    Segment,
    get_start_seconds,
    open_media,
    rank_streams,
)

MAX_SUBTITLE_BYTES: Final = 16 * 1024 * 1024
MAX_CHARACTERS: Final = 1_000_000
_MAX_CHAPTERS: Final = 500
_MAX_TITLE_CHARACTERS: Final = 200
_WINDOW_SECONDS: Final = 30.0
_MIN_WINDOWS: Final = 10
_MIN_COVERAGE: Final = 0.7
_MIN_CHARACTERS_PER_MINUTE: Final = 100
_TEXT_CODECS: Final = frozenset({"subrip", "srt", "webvtt", "mov_text", "ass", "ssa", "text"})
_TIME: Final = r"(?:\d{1,4}:)?\d{1,2}:\d\d[.,]\d{1,3}"
_TIMING: Final = re.compile(rf"\s*({_TIME})\s*-->\s*({_TIME})")
_TAG: Final = re.compile(r"<[^<>]*>|\{[^{}]*\}")
_SOUND: Final = re.compile(r"\[[^\[\]]*\]|[♪♫]+|^\s*\([^()]*\)\s*$")
_GENERIC_TITLE: Final = re.compile(r"\W*(?:chapter|kapitel|chapitre|part|teil)?\W*\d*\W*", re.IGNORECASE)


class Cue(NamedTuple):
    """A text of a subtitle track and the time at which it is shown."""

    start_seconds: float
    end_seconds: float
    text: str


@dataclass(frozen=True, slots=True)
class MediaText:
    """What a recording contains beside picture and sound. `subtitles` are those that are a transcript of it."""

    seconds: float | None
    chapters: list[Chapter]
    subtitles: list[Segment]
    language: str | None = None


def read_media_text(video: Path, language: str, *, accept_unknown_language: bool, read_subtitles: bool) -> MediaText:
    """Return the chapters of a recording, and the text of the best subtitle track in `language`.

    A file that cannot be read has neither.

    Args:
        video: The recording.
        language: Language of the speech.
        accept_unknown_language: Whether a track without language may be used.
        read_subtitles: Whether subtitles are read.
    """
    try:
        with open_media(video) as media:
            seconds = media.duration / av.time_base if media.duration else None
            chapters = _read_chapters(media)
            streams = rank_streams(media.streams.subtitles, language) if read_subtitles and seconds else []
            candidates = [
                stream.index for stream in streams if _is_candidate(stream, language, accept_unknown_language)
            ]
        for index in candidates:
            with open_media(video) as media:
                stream = media.streams[index]
                segments = to_segments(_read_cues(media, stream), seconds)
                if segments:
                    return MediaText(seconds, chapters, segments, stream.language)
    except (av.error.FFmpegError, ValueError):
        return MediaText(None, [], [])
    return MediaText(seconds, chapters, [])


def _is_candidate(stream: Any, language: str, accept_unknown_language: bool) -> bool:
    kinds = av.stream.Disposition
    own = normalize_language(stream.language)
    return (
        stream.codec_context is not None
        and stream.codec_context.codec.name in _TEXT_CODECS
        and not stream.disposition & (kinds.forced | kinds.lyrics | kinds.comment)
        and (own == normalize_language(language) or (own is None and accept_unknown_language))
    )


def _read_chapters(media: Any) -> list[Chapter]:
    start = get_start_seconds(media)
    return build_chapters(
        (float(chapter["start"] * chapter["time_base"]) - start, chapter["metadata"].get("title") or "")
        for chapter in media.chapters()
    )


def build_chapters(chapters: Iterable[tuple[float, str]]) -> list[Chapter]:
    """Return the chapters in order, or nothing if their titles are only numbers."""
    titles = sorted((max(0.0, start), " ".join(title.split())[:_MAX_TITLE_CHARACTERS]) for start, title in chapters)
    if len(titles) < 2 or all(_GENERIC_TITLE.fullmatch(title) for _, title in titles):
        return []
    return [Chapter(start_seconds=round(start, 2), title=title) for start, title in titles if title][:_MAX_CHAPTERS]


def _read_cues(media: Any, stream: Any) -> Iterator[Cue]:
    start, size = get_start_seconds(media), 0
    codec = stream.codec_context.codec.name
    for packet in media.demux(stream):
        if packet.pts is None or not packet.size:
            continue
        size += packet.size
        if size > MAX_SUBTITLE_BYTES:
            return
        begin = float(packet.pts * packet.time_base) - start
        end = begin + float((packet.duration or 0) * packet.time_base)
        yield Cue(begin, end, _decode_packet(bytes(packet), codec))


def _decode_packet(data: bytes, codec: str) -> str:
    if codec == "mov_text":
        data = data[2 : 2 + int.from_bytes(data[:2], "big")]
    text = data.decode("utf-8", "replace")
    if codec in ("ass", "ssa"):
        text = re.sub(r"\\[Nnh]", "\n", text.split(",", 8)[-1])
    return text


def parse_subtitles(text: str) -> list[Cue]:
    """Return the cues of an SRT or WebVTT file. Lines that belong to no cue are ignored."""
    cues: list[Cue] = []
    lines: list[str] = []
    times: tuple[float, float] | None = None

    def add_cue() -> None:
        if times is not None:
            cues.append(Cue(*times, "\n".join(lines)))
        lines.clear()

    for line in text.lstrip("\ufeff").splitlines():
        if (match := _TIMING.match(line)) is not None:
            if lines and lines[-1].strip().isdigit():
                lines.pop()  # the number of this cue, without an empty line before it
            add_cue()
            times = parse_timecode(match[1]), parse_timecode(match[2])
        elif not line.strip():
            add_cue()
            times = None
        elif times is not None:
            lines.append(line)
    add_cue()
    return cues


def parse_timecode(text: str) -> float:
    """Return the seconds of a time such as `1:02:03.5` or `02:03,500`.

    Raises:
        ValueError: It is not a time.
    """
    if not re.fullmatch(_TIME, text):
        raise ValueError(text)
    seconds = 0.0
    for part in text.replace(",", ".").split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def to_segments(cues: Iterable[Cue], total_seconds: float | None) -> list[Segment]:
    """Return the text of subtitles as segments, or nothing if they are no transcript of the recording.

    A transcript has text in most parts of the recording. Descriptions of sounds do not count.
    """
    texts = _remove_repeated_lines(cues)
    if not total_seconds or total_seconds <= 0:
        return []
    windows = min(max(_MIN_WINDOWS, int(total_seconds / _WINDOW_SECONDS)), 10_000)
    covered: set[int] = set()
    for cue in texts:
        first, last = (int(time / total_seconds * windows) for time in (cue.start_seconds, cue.end_seconds))
        covered.update(range(max(0, first), min(max(first, last), windows - 1) + 1))
    characters = sum(character.isalnum() for cue in texts for character in cue.text)
    if len(covered) < _MIN_COVERAGE * windows or characters < _MIN_CHARACTERS_PER_MINUTE * total_seconds / 60:
        return []
    return [Segment(start_seconds=round(min(cue.start_seconds, total_seconds), 2), text=cue.text) for cue in texts]


def _remove_repeated_lines(cues: Iterable[Cue]) -> list[Cue]:
    """Return the cues with clean text. Automatic captions repeat the last lines of the cue before."""
    result: list[Cue] = []
    previous: list[str] = []
    characters = 0
    for cue in sorted(cues):
        lines = [line for line in map(_clean_line, cue.text.splitlines()) if line]
        text = " ".join(line for line in lines if line not in previous)
        previous = lines or previous
        characters += len(text)
        if characters > MAX_CHARACTERS:
            break
        if text:
            result.append(Cue(max(0.0, cue.start_seconds), cue.end_seconds, text))
    return result


def _clean_line(line: str) -> str:
    text = html.unescape(_TAG.sub("", line))
    return " ".join(_SOUND.sub(" ", text).split()).removeprefix("- ").removeprefix(">> ").strip()
