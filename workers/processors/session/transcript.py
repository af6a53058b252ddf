"""session: a recording becomes audio (16 kHz, mono, 16 bit), and audio becomes text where a backend is configured."""

from __future__ import annotations

import importlib
import wave
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
from pydantic import BaseModel, ConfigDict

SAMPLE_RATE = 16_000
PROGRESS_INTERVAL_SECONDS = 60.0

# Only what is itself media. A playlist (HLS, concat, DASH) would make ffmpeg open other files and addresses.
_FORMATS = "matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,ogg,wav,mp3,flac,aac,avi,mpegts,mpeg,flv,asf"


class TranscriptUnavailable(Exception):
    """Why there can be none, as a sentence: no media, no sound, no backend."""


class Segment(BaseModel):
    """What was said, and how many seconds after the beginning."""

    model_config = ConfigDict(frozen=True)

    start_seconds: float
    text: str


@dataclass(frozen=True, slots=True)
class ExtractionProgress:
    """How far the recording has been read. `damage` is set at the end if not all of it could be."""

    seconds: float
    total_seconds: float | None
    damage: str | None = None


def reject_html_type(media_type: str) -> None:
    """Refuse a page with a player on it before it is downloaded as if it were the recording.

    Raises:
        NoTranscript: it is a web page.
    """
    if media_type in ("text/html", "application/xhtml+xml"):
        raise TranscriptUnavailable("The address of the recording leads to a web page, not to a media file.")


def extract_audio(video: Path, audio: Path, *, max_seconds: float) -> Generator[ExtractionProgress, None, None]:
    """Write the sound of `video` to the WAV file `audio`, telling every minute of it, and at the end.

    Raises:
        NoTranscript: it has no sound, or is nothing we can play.
    """
    try:
        with av.open(
            video, metadata_errors="ignore", options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        ) as media:
            if not media.streams.audio:
                raise TranscriptUnavailable("The recording has no sound.")
            yield from _write_audio(media, audio, max_seconds)
    except av.error.FFmpegError as error:
        raise TranscriptUnavailable("The recording is not a media file that can be read, or it is damaged.") from error


def _write_audio(media: Any, audio: Path, max_seconds: float) -> Generator[ExtractionProgress, None, None]:
    expected = _expected_seconds(media)
    resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
    samples, told_at, bad_packets = 0, 0.0, 0
    with wave.open(str(audio), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        for frame in _frames(media):
            if frame is None:
                bad_packets += 1
                continue
            for block in resampler.resample(frame):
                file.writeframes(bytes(block.planes[0])[: block.samples * 2])
                samples += block.samples
            seconds = samples / SAMPLE_RATE
            if seconds >= max_seconds:
                break
            if seconds - told_at >= PROGRESS_INTERVAL_SECONDS:
                told_at = seconds
                yield ExtractionProgress(seconds, expected)
        for block in resampler.resample(None):
            file.writeframes(bytes(block.planes[0])[: block.samples * 2])
            samples += block.samples
    if not samples:
        raise TranscriptUnavailable("The recording has a sound track, but nothing of it can be played.")
    yield ExtractionProgress(
        samples / SAMPLE_RATE, expected, _damage(samples / SAMPLE_RATE, expected, max_seconds, bad_packets)
    )


def _frames(media: Any) -> Generator[Any, None, None]:
    """The audio frames; None for a piece that is damaged, after which the sound may well go on."""
    try:
        for packet in media.demux(media.streams.audio[0]):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                yield None
    except av.error.InvalidDataError:
        yield None


def _expected_seconds(media: Any) -> float | None:
    stream = media.streams.audio[0]
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return float(Fraction(media.duration, av.time_base)) if media.duration else None


def _damage(seconds: float, expected: float | None, max_seconds: float, bad_packets: int) -> str | None:
    if seconds >= max_seconds:
        return f"only the first {format_timecode(max_seconds)} were used"
    if expected and seconds < 0.95 * expected - 1:
        return f"it breaks off after {format_timecode(seconds)} of {format_timecode(expected)}"
    return "some of it is damaged" if bad_packets else None


def format_timecode(seconds: float) -> str:
    """`75` as `1:15`, `3700` as `1:01:40`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def transcribe_locally(audio: Path, *, backend: Literal["pocketsphinx"]) -> Generator[Segment, None, None]:
    """Yield what is said in the WAV file `audio`.

    Raises:
        NoTranscript: it is not installed.
    """
    try:
        sphinx = importlib.import_module(backend)
    except ImportError as error:
        raise TranscriptUnavailable(
            f"The transcription backend {backend} is not installed (pip install {backend})."
        ) from error
    decoder = sphinx.Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")
    with audio.open("rb") as file, closing(wave.open(file)) as sound:
        for spoken in sphinx.Segmenter(sample_rate=SAMPLE_RATE).segment(_Samples(sound)):
            decoder.start_utt()
            decoder.process_raw(spoken.pcm, full_utt=True)
            decoder.end_utt()
            if (found := decoder.hyp()) and found.hypstr.strip():
                yield Segment(start_seconds=round(spoken.start_time, 2), text=found.hypstr.strip())


class _Samples:
    """A WAV file as the stream of bytes that the segmenter reads; a second of silence ends what is said last."""

    def __init__(self, sound: wave.Wave_read) -> None:
        self._sound = sound
        self._silence = 2 * SAMPLE_RATE

    def read(self, size: int) -> bytes:
        samples = self._sound.readframes(size // 2)
        added = min(size - len(samples), self._silence)
        self._silence -= added
        return samples + bytes(added)
