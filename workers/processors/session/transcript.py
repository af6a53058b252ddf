"""Extract the audio of a recording (16 kHz, mono, 16 bit), and transcribe it locally."""

from __future__ import annotations

import importlib
import wave
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from pydantic import BaseModel, ConfigDict

from jobledger.workers.processors.session.media_structure import Structure, has_mp4_index, read_structure
from jobledger.workers.processors.session.media_tracks import Track

SAMPLE_RATE = 16_000
WAV_PARAMETERS = (1, 2, SAMPLE_RATE, 0, "NONE", "not compressed")
"""Arguments of `wave.Wave_write.setparams`: one channel of 16-bit samples."""
PROGRESS_INTERVAL_SECONDS = 60.0

# Only formats that contain the media. A playlist (HLS, concat, DASH) would make FFmpeg open other files and URLs.
_FORMATS = "matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,ogg,wav,mp3,flac,aac,avi,mpegts,mpeg,flv,asf"
_MIN_GAP_SECONDS = 0.1
"""Shorter gaps between frames are inaccuracies of the timestamps."""
_MAX_GAP_SECONDS = 3600.0
"""A longer gap is a jump of the timestamps if it leads beyond the end of the recording."""
_SILENT_PEAK = 33
"""Highest sample of a track without sound: -60 dB."""
_PEAK_STRIDE = 16
_MAX_DEMUX_ERRORS = 100
_TIME_TOLERANCE_SECONDS = 0.5


class TranscriptUnavailable(Exception):
    """There is no transcript. The message is a sentence with the reason."""


class Segment(BaseModel):
    """A passage of the transcript and its start time."""

    model_config = ConfigDict(frozen=True)

    start_seconds: float
    text: str


class Chapter(BaseModel):
    """A chapter of the recording."""

    model_config = ConfigDict(frozen=True)

    start_seconds: float
    title: str


@dataclass(frozen=True, slots=True)
class ExtractionProgress:
    """How much of the recording was read.

    Only the last one has `track`, a description of the sound track, and `damage` if a part could not be read.
    """

    seconds: float
    total_seconds: float | None
    damage: str | None = None
    track: str | None = None


def reject_html_type(media_type: str) -> None:
    """Reject a web page, such as one with a video player, before the download.

    Raises:
        TranscriptUnavailable: The media type is HTML.
    """
    if media_type in ("text/html", "application/xhtml+xml"):
        raise TranscriptUnavailable("The URL of the recording is a web page, not a media file.")


def open_media(video: Path) -> Any:
    """Open a media file with FFmpeg, which cannot open other files.

    Raises:
        FFmpegError: The format is not supported, or the file is damaged.
    """
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    return av.open(video, metadata_errors="ignore", options=options)


def get_start_seconds(media: Any) -> float:
    """Return the timestamp at which players show the time 0:00."""
    return float(media.start_time / av.time_base) if media.start_time else 0.0


def extract_audio(
    video: Path, audio: Path, *, max_seconds: float, language: str | None = None, total_seconds: float | None = None
) -> Generator[ExtractionProgress, None, None]:
    """Write the audio of `video` to the WAV file `audio`. Yield the progress after each minute and at the end.

    Times in `audio` are those of a player: gaps in the sound become silence. The track is chosen by `language` and
    kind. If it cannot be decoded or is silent, the next one is used.

    Args:
        video: The recording.
        audio: The WAV file.
        max_seconds: Length after which the rest is ignored.
        language: Language of the speech.
        total_seconds: Length of the recording if it is known. Default: as the file says.

    Raises:
        TranscriptUnavailable: The file has no audio or cannot be decoded.
    """
    try:
        with open_media(video) as media:
            tracks = {stream.index: _describe_stream(stream) for stream in media.streams.audio}
        if not tracks:
            raise TranscriptUnavailable("The recording has no audio.")
        yield from _extract_best_track(video, audio, tracks, max_seconds, language, total_seconds)
    except av.error.FFmpegError as error:
        if not has_mp4_index(video):
            raise TranscriptUnavailable(
                "The recording is damaged or cut off: it is an MP4 file without its index (moov)."
            ) from error
        raise TranscriptUnavailable("The recording is damaged or not a supported media file.") from error


def _describe_stream(stream: Any) -> Track:
    kinds = av.stream.Disposition
    alternatives = kinds.dub | kinds.visual_impaired | kinds.hearing_impaired | kinds.descriptions | kinds.clean_effects
    return Track(
        language=stream.language,
        title=stream.metadata.get("title") or stream.metadata.get("handler_name") or "",
        is_default=bool(stream.disposition & kinds.default),
        is_alternative=bool(stream.disposition & (alternatives | kinds.karaoke)),
        is_commentary=bool(stream.disposition & kinds.comment),
    )


def rank_streams(streams: Iterable[Any], language: str | None) -> list[Any]:
    """Return the streams of a media file, the best one for `language` first."""
    return sorted(streams, key=lambda stream: _describe_stream(stream).rank(language))


def _extract_best_track(
    video: Path,
    audio: Path,
    tracks: dict[int, Track],
    max_seconds: float,
    language: str | None,
    total_seconds: float | None,
) -> Generator[ExtractionProgress, None, None]:
    extractions: list[_Extraction] = []
    for index in sorted(tracks, key=lambda index: tracks[index].rank(language)):
        extractions.append(_Extraction(video, index, max_seconds, total_seconds))
        yield from extractions[-1].run(audio)
        if extractions[-1].is_usable:
            break
    used = max(extractions, key=lambda extraction: (extraction.is_usable, extraction.peak, extraction.seconds))
    if used is not extractions[-1]:
        yield from used.run(audio)
    if not used.seconds:
        raise TranscriptUnavailable("The recording has an audio track, but it cannot be decoded.")
    number = f"{1 + list(tracks).index(used.index)} of {len(tracks)} ({tracks[used.index]})"
    yield ExtractionProgress(used.seconds, used.expected, used.describe_damage(), number)


class _Extraction:
    """One attempt to write a sound track to a WAV file, and what it found."""

    def __init__(self, video: Path, index: int, max_seconds: float, total_seconds: float | None) -> None:
        self.index = index
        self.seconds = 0.0
        self.peak = 0
        self.expected: float | None = None
        self._video = video
        self._max_seconds = max_seconds
        self._total_seconds = total_seconds
        self._structure = Structure()

    @property
    def is_usable(self) -> bool:
        """Whether the track has sound and most of it can be decoded."""
        return self.seconds > 0 and self.peak > _SILENT_PEAK and self._bad_packets <= self._good_packets

    def run(self, audio: Path) -> Generator[ExtractionProgress, None, None]:
        """Write the track to `audio` and yield the progress after each minute."""
        self._reached, self._good_packets, self._bad_packets = 0.0, 0, 0
        reported_at = 0.0
        with open_media(self._video) as media, wave.open(str(audio), "wb") as file:
            file.setparams(WAV_PARAMETERS)
            stream = media.streams[self.index]
            self._structure = read_structure(self._video, media.format.name)
            self.expected, streams = self._read_duration(media, stream)
            start = get_start_seconds(media)
            writer = _AudioWriter(file, self._max_seconds, self._total_seconds or self.expected or 0.0)
            for frame in self._decode_frames(media, stream, streams, start):
                writer.write(frame, None if frame.time is None else frame.time - start)
                self.seconds = writer.seconds
                if self.seconds >= self._max_seconds:
                    break
                if self.seconds - reported_at >= PROGRESS_INTERVAL_SECONDS:
                    reported_at = self.seconds
                    yield ExtractionProgress(self.seconds, self.expected)
            writer.flush()
            self.seconds, self.peak = writer.seconds, writer.peak

    def _read_duration(self, media: Any, stream: Any) -> tuple[float | None, Sequence[Any]]:
        """Return the time at which the sound or the file should end, and the streams that must reach it."""
        start = get_start_seconds(media)
        if stream.duration and stream.time_base:
            own_start = float((stream.start_time or 0) * stream.time_base)
            return own_start - start + float(stream.duration * stream.time_base), [stream]
        # Only the length of the longest track is known. The sound may be shorter.
        duration = self._total_seconds or (media.duration / av.time_base if media.duration else None)
        return duration, [other for other in media.streams if other.type in ("audio", "video", "subtitle")]

    def _decode_frames(self, media: Any, stream: Any, streams: Sequence[Any], start: float) -> Generator[Any]:
        """Yield the audio frames. Skip damaged packets, because later ones may be intact."""
        for packet in self._read_packets(media, streams):
            if packet.pts is not None and packet.time_base:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                self._reached = max(self._reached, end - start)
            if packet.stream.index != self.index:
                continue
            try:
                yield from packet.decode()
            except (av.error.FFmpegError, ValueError):  # the latter without a decoder
                self._bad_packets += 1
            else:
                self._good_packets += bool(packet.size)

    def _read_packets(self, media: Any, streams: Sequence[Any]) -> Generator[Any]:
        for _ in range(_MAX_DEMUX_ERRORS):
            try:
                yield from media.demux(*streams)
            except av.error.InvalidDataError:
                self._bad_packets += 1
            else:
                return

    def describe_damage(self) -> str | None:
        """Return which part of the recording is missing, or None if it is complete."""
        if self.seconds >= self._max_seconds:
            return f"only the first {format_timecode(self._max_seconds)} were used"
        is_truncated, has_length = self._structure
        missing = self.expected - self._reached if self.expected and has_length else None
        if is_truncated and (missing is None or missing < -_TIME_TOLERANCE_SECONDS):
            return f"it is cut off after {format_timecode(self._reached)}"
        if missing and self.expected and is_truncated is not False:
            tolerance = _TIME_TOLERANCE_SECONDS if is_truncated else 1 + 0.05 * self.expected
            if missing > tolerance:
                return f"it ends after {format_timecode(self._reached)} of {format_timecode(self.expected)}"
        packets = self._good_packets + self._bad_packets
        return "parts of it are damaged" if self._bad_packets * self.seconds >= packets > 0 else None


class _AudioWriter:
    """Writes frames of any sample format to a WAV file, each at its time."""

    def __init__(self, file: wave.Wave_write, max_seconds: float, total_seconds: float) -> None:
        self.peak = 0
        self._file = file
        self._max_seconds = max_seconds
        self._total_seconds = total_seconds
        self._jumps_seconds = 0.0
        self._resampler: Any = None
        self._sample_format: object = None

    @property
    def seconds(self) -> float:
        return self._file.tell() / SAMPLE_RATE

    def write(self, frame: Any, at_seconds: float | None) -> None:
        """Write a frame. `at_seconds` is its time in the recording, if it is known."""
        if at_seconds is not None:
            if at_seconds + frame.samples / frame.sample_rate <= 0:
                return  # before the start, by an edit list
            self._fill_gap(at_seconds)
        sample_format = (frame.format.name, frame.layout.name, frame.sample_rate)
        if sample_format != self._sample_format:
            self.flush()
            self._sample_format = sample_format
            self._resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        frame.pts = None
        self._store(self._resampler.resample(frame))

    def flush(self) -> None:
        """Write the samples that the resampler holds back."""
        if self._resampler is not None:
            self._store(self._resampler.resample(None))
            self._resampler = None

    def _fill_gap(self, at_seconds: float) -> None:
        gap = at_seconds - self._jumps_seconds - self.seconds
        if gap > _MAX_GAP_SECONDS and at_seconds - self._jumps_seconds > self._total_seconds:
            self._jumps_seconds += gap
        elif gap > _MIN_GAP_SECONDS:
            missing = int(min(gap, self._max_seconds - self.seconds) * SAMPLE_RATE)
            for begin in range(0, missing, SAMPLE_RATE):
                self._file.writeframes(bytes(2 * min(SAMPLE_RATE, missing - begin)))

    def _store(self, blocks: Sequence[Any]) -> None:
        for block in blocks:
            samples = memoryview(bytes(block.planes[0])[: block.samples * 2])
            self._file.writeframes(samples)
            self.peak = max(self.peak, *map(abs, samples.cast("h")[::_PEAK_STRIDE]), 0)


def format_timecode(seconds: float) -> str:
    """Return `75` as `1:15` and `3700` as `1:01:40`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def load_pocketsphinx() -> Any:
    """Return the module of pocketsphinx.

    Raises:
        TranscriptUnavailable: It is not installed.
    """
    try:
        return importlib.import_module("pocketsphinx")
    except ImportError as error:
        raise TranscriptUnavailable(
            "The transcription backend pocketsphinx is not installed. Install it with: pip install pocketsphinx."
        ) from error


def transcribe_locally(audio: Path) -> Generator[Segment, None, None]:
    """Transcribe the WAV file `audio` with pocketsphinx.

    Raises:
        TranscriptUnavailable: pocketsphinx is not installed.
    """
    sphinx = load_pocketsphinx()
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
