"""Extract the audio of a recording (16 kHz, mono, 16 bit), and transcribe it locally."""

from __future__ import annotations

import importlib
import wave
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from pydantic import BaseModel, ConfigDict

SAMPLE_RATE = 16_000
WAV_PARAMETERS = (1, 2, SAMPLE_RATE, 0, "NONE", "not compressed")
"""Arguments of `wave.Wave_write.setparams`: one channel of 16-bit samples."""
PROGRESS_INTERVAL_SECONDS = 60.0

# Only formats that contain the media. A playlist (HLS, concat, DASH) would make FFmpeg open other files and URLs.
_FORMATS = "matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,ogg,wav,mp3,flac,aac,avi,mpegts,mpeg,flv,asf"


class TranscriptUnavailable(Exception):
    """There is no transcript. The message is a sentence with the reason."""


class Segment(BaseModel):
    """A passage of the transcript and its start time."""

    model_config = ConfigDict(frozen=True)

    start_seconds: float
    text: str


@dataclass(frozen=True, slots=True)
class ExtractionProgress:
    """How much of the recording was read. The last one has `damage` if a part could not be read."""

    seconds: float
    total_seconds: float | None
    damage: str | None = None


def reject_html_type(media_type: str) -> None:
    """Reject a web page, such as one with a video player, before the download.

    Raises:
        TranscriptUnavailable: The media type is HTML.
    """
    if media_type in ("text/html", "application/xhtml+xml"):
        raise TranscriptUnavailable("The URL of the recording is a web page, not a media file.")


def extract_audio(video: Path, audio: Path, *, max_seconds: float) -> Generator[ExtractionProgress, None, None]:
    """Write the audio of `video` to the WAV file `audio`. Yield the progress after each minute and at the end.

    Raises:
        TranscriptUnavailable: The file has no audio or cannot be decoded.
    """
    try:
        with av.open(
            video, metadata_errors="ignore", options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        ) as media:
            if not media.streams.audio:
                raise TranscriptUnavailable("The recording has no audio.")
            yield from _write_audio(media, audio, max_seconds)
    except av.error.FFmpegError as error:
        raise TranscriptUnavailable("The recording is damaged or not a supported media file.") from error


def _write_audio(media: Any, audio: Path, max_seconds: float) -> Generator[ExtractionProgress, None, None]:
    expected = _read_duration(media)
    resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
    seconds, reported_at, is_damaged = 0.0, 0.0, False
    with wave.open(str(audio), "wb") as file:
        file.setparams(WAV_PARAMETERS)

        def write(frame: Any) -> float:
            """Write a frame, or the last samples if it is None, and return the seconds written so far."""
            for block in resampler.resample(frame):
                file.writeframes(bytes(block.planes[0])[: block.samples * 2])
            return file.tell() / SAMPLE_RATE

        for frame in _decode_frames(media):
            if frame is None:
                is_damaged = True
                continue
            seconds = write(frame)
            if seconds >= max_seconds:
                break
            if seconds - reported_at >= PROGRESS_INTERVAL_SECONDS:
                reported_at = seconds
                yield ExtractionProgress(seconds, expected)
        seconds = write(None)
    if not seconds:
        raise TranscriptUnavailable("The recording has an audio track, but it cannot be decoded.")
    yield ExtractionProgress(seconds, expected, _describe_damage(seconds, expected, max_seconds, is_damaged=is_damaged))


def _decode_frames(media: Any) -> Generator[Any, None, None]:
    """Yield the audio frames, and None for a damaged packet. Later packets may be intact."""
    try:
        for packet in media.demux(media.streams.audio[0]):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                yield None
    except av.error.InvalidDataError:
        yield None


def _read_duration(media: Any) -> float | None:
    stream = media.streams.audio[0]
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return float(Fraction(media.duration, av.time_base)) if media.duration else None


def _describe_damage(seconds: float, expected: float | None, max_seconds: float, *, is_damaged: bool) -> str | None:
    if seconds >= max_seconds:
        return f"only the first {format_timecode(max_seconds)} were used"
    if expected and seconds < 0.95 * expected - 1:
        return f"it ends after {format_timecode(seconds)} of {format_timecode(expected)}"
    return "parts of it are damaged" if is_damaged else None


def format_timecode(seconds: float) -> str:
    """Return `75` as `1:15` and `3700` as `1:01:40`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def transcribe_locally(audio: Path) -> Generator[Segment, None, None]:
    """Transcribe the WAV file `audio` with pocketsphinx.

    Raises:
        TranscriptUnavailable: pocketsphinx is not installed.
    """
    try:
        sphinx = importlib.import_module("pocketsphinx")
    except ImportError as error:
        raise TranscriptUnavailable(
            "The transcription backend pocketsphinx is not installed. Install it with: pip install pocketsphinx."
        ) from error
    decoder = sphinx.Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")
    with audio.open("rb") as file, closing(wave.open(file)) as sound:
        for speech in sphinx.Segmenter(sample_rate=SAMPLE_RATE).segment(_Samples(sound)):
            decoder.start_utt()
            decoder.process_raw(speech.pcm, full_utt=True)
            decoder.end_utt()
            if (hypothesis := decoder.hyp()) and hypothesis.hypstr.strip():
                yield Segment(start_seconds=round(speech.start_time, 2), text=hypothesis.hypstr.strip())


class _Samples:
    """The samples of a WAV file as a byte stream, followed by a second of silence to end the last segment."""

    def __init__(self, sound: wave.Wave_read) -> None:
        self._sound = sound
        self._silence = 2 * SAMPLE_RATE

    def read(self, size: int) -> bytes:
        samples = self._sound.readframes(size // 2)
        padding = min(size - len(samples), self._silence)
        self._silence -= padding
        return samples + bytes(padding)
