"""Create recordings in the formats that conferences publish: VP9, AV1 and H.264, with speech, tones or subtitles."""

from __future__ import annotations

import io
import math
import shutil
import subprocess
import wave
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import pytest
from av.stream import Disposition

SAMPLE_RATE = 16_000
needs_speech = pytest.mark.skipif(shutil.which("flite") is None, reason="install flite: apt-get install flite")

VIDEO_FORMATS = {
    # suffix: (container, video codec, audio codec)
    "vp9.webm": ("webm", "libvpx-vp9", "libopus"),
    "av1.webm": ("webm", "libsvtav1", "libopus"),
    "h264.mp4": ("mp4", "libx264", "aac"),
    "flac.mkv": ("matroska", "mpeg4", "flac"),
}


def synthesize_speech(text: str, folder: Path) -> bytes:
    """Return the samples of `text` as synthetic speech: 16 kHz, mono, 16 bit."""
    path = folder / "speech.wav"
    subprocess.run(["flite", "-voice", "slt", "-t", text, "-o", str(path)], check=True, timeout=60)
    with wave.open(str(path)) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (SAMPLE_RATE, 1, 2)
        return bytes(sound.readframes(sound.getnframes()))


def make_tone(pitch: float = 0.17) -> bytes:
    """Return one second of a tone that is silent every other quarter. `pitch` is in radians per sample."""
    return array("h", (int(3000 * math.sin(n * pitch)) * (n // 4000 % 2) for n in range(SAMPLE_RATE))).tobytes()


def make_video_file(kind: str, samples: bytes, *, repeated: int = 1) -> bytes:
    """Return a video with these samples, `repeated` times, and one grey frame per second.

    A separate process creates it because the AV1 encoder permanently sets real-time priority for processes of root.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_encode_video, kind, samples, repeated).result()


def _encode_video(kind: str, samples: bytes, repeated: int) -> bytes:
    container, video_codec, audio_codec = VIDEO_FORMATS[kind]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as media:
        video: Any = media.add_stream(video_codec, rate=1)
        video.width, video.height, video.pix_fmt = 320, 180, "yuv420p"
        audio: Any = media.add_stream(audio_codec, rate=48_000 if audio_codec == "libopus" else SAMPLE_RATE)
        audio.layout = "mono"
        resampler = av.AudioResampler(format=audio.format.name, layout="mono", rate=audio.rate)
        second = 0
        for _ in range(repeated):
            for begin in range(0, len(samples), 2 * SAMPLE_RATE):
                media.mux(video.encode(_make_video_frame(second)))
                audio_frame = _make_audio_frame(samples[begin : begin + 2 * SAMPLE_RATE], second)
                for frame in resampler.resample(audio_frame):
                    media.mux(audio.encode(frame))
                second += 1
        for frame in resampler.resample(None):
            media.mux(audio.encode(frame))
        media.mux(video.encode())
        media.mux(audio.encode())
    return buffer.getvalue()


def _make_video_frame(second: int) -> av.VideoFrame:
    frame = av.VideoFrame(320, 180, "yuv420p")
    for plane in frame.planes:
        plane.update(bytes([second % 256]) * plane.buffer_size)
    frame.pts, frame.time_base = second, Fraction(1, 1)
    return frame


def _make_audio_frame(samples: bytes, second: int) -> av.AudioFrame:
    frame = av.AudioFrame(format="s16", layout="mono", samples=len(samples) // 2)
    frame.planes[0].update(samples)
    frame.sample_rate = SAMPLE_RATE
    frame.pts, frame.time_base = second * SAMPLE_RATE, Fraction(1, SAMPLE_RATE)
    return frame


@dataclass(frozen=True, slots=True)
class Sound:
    """A sound track of a test file. `pitch` is its frequency in Hz, a multiple of 10, or 0 for silence."""

    pitch: int = 440
    seconds: float = 4
    start: float = 0
    language: str | None = None
    title: str | None = None
    disposition: Disposition | None = None
    pauses: tuple[tuple[float, float], ...] = ()
    """Start and end of parts without frames."""


@dataclass(frozen=True, slots=True)
class Subtitles:
    """A subtitle track of a test file."""

    codec: str
    cues: list[tuple[float, float, str]]
    language: str | None = "eng"
    disposition: Disposition | None = None


def make_media_file(
    container: str,
    sounds: Sequence[Sound] = (Sound(),),
    *,
    subtitles: Sequence[Subtitles] = (),
    picture_seconds: float = 0,
    chapters: Sequence[tuple[float, str]] = (),
    options: Mapping[str, str] | None = None,
) -> bytes:
    """Return a media file with these tracks."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "media")
        write_media_file(path, container, sounds, subtitles, picture_seconds, chapters, options)
        return path.read_bytes()


def write_media_file(
    path: Path,
    container: str,
    sounds: Sequence[Sound],
    subtitles: Sequence[Subtitles] = (),
    picture_seconds: float = 0,
    chapters: Sequence[tuple[float, str]] = (),
    options: Mapping[str, str] | None = None,
) -> None:
    """Write a media file, and further files if the format has them."""
    with av.open(path, "w", format=container, options=dict(options or {})) as media:
        picture: Any = (
            media.add_stream({"webm": "libvpx", "flv": "flv"}.get(container, "mpeg4"), rate=5)
            if picture_seconds
            else None
        )
        if picture:
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        streams = [_add_sound_stream(media, container, sound) for sound in sounds]
        texts = [_add_subtitle_stream(media, track) for track in subtitles]
        if chapters:
            ends = [start for start, _ in chapters[1:]] + [chapters[-1][0] + 1]
            media.set_chapters(
                [
                    {
                        "id": number,
                        "start": int(1000 * start),
                        "end": int(1000 * end),
                        "time_base": Fraction(1, 1000),
                        "metadata": {"title": title},
                    }
                    for number, ((start, title), end) in enumerate(zip(chapters, ends, strict=True))
                ]
            )
        packets = [
            packet for sound, stream in zip(sounds, streams, strict=True) for packet in _encode_sound(sound, stream)
        ]
        packets += [
            packet for text, stream in zip(subtitles, texts, strict=True) for packet in _make_cues(text, stream)
        ]
        if picture:
            for number in range(int(picture_seconds * 5)):
                frame = av.VideoFrame(64, 48, "yuv420p")
                for plane in frame.planes:
                    plane.update(bytes([128]) * plane.buffer_size)
                frame.pts = number
                packets += picture.encode(frame)
            packets += picture.encode()
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            media.mux(packet)


def _add_sound_stream(media: Any, container: str, sound: Sound) -> Any:
    codec = {"matroska": "flac", "webm": "libopus", "ogg": "libopus", "mp3": "libmp3lame"}.get(container, "aac")
    stream = media.add_stream(codec, rate=48_000)
    stream.layout = "mono"
    if sound.language:
        stream.metadata["language"] = sound.language
    if sound.title:
        stream.metadata["title"] = sound.title
    stream.disposition = sound.disposition or Disposition(0)
    return stream


def _encode_sound(sound: Sound, stream: Any) -> list[Any]:
    packets: list[Any] = []
    resampler = av.AudioResampler(format=stream.format.name, layout="mono", rate=48_000, frame_size=0)
    for number in range(int(sound.seconds * 10)):
        second = number / 10
        if any(begin <= second < end for begin, end in sound.pauses):
            continue
        frame = av.AudioFrame(format="s16", layout="mono", samples=4800)
        frame.planes[0].update(_make_tenth_of_tone(sound.pitch))
        frame.sample_rate, frame.time_base = 48_000, Fraction(1, 48_000)
        frame.pts = int((sound.start + second) * 48_000)
        for converted in resampler.resample(frame):
            packets += stream.encode(converted)
    return [*packets, *stream.encode()]


@cache
def _make_tenth_of_tone(pitch: int) -> bytes:
    """Return a tenth of a second of a tone. The next one continues it if the pitch is a multiple of 10."""
    return array("h", (int(9000 * math.sin(2 * math.pi * pitch * n / 48_000)) for n in range(4800))).tobytes()


def _add_subtitle_stream(media: Any, track: Subtitles) -> Any:
    stream = media.add_stream(track.codec)
    stream.codec_context.subtitle_header = b"[Script Info]\nScriptType: v4.00+\n"
    if track.language:
        stream.metadata["language"] = track.language
    if track.disposition:
        stream.disposition = track.disposition
    return stream


def _make_cues(track: Subtitles, stream: Any) -> list[Any]:
    packets = []
    for start, end, text in track.cues:
        data = text.encode()
        if track.codec == "mov_text":
            data = len(data).to_bytes(2, "big") + data
        elif track.codec == "ass":
            data = b"0,0,Default,,0,0,0,," + data
        packet: Any = av.Packet(data)
        packet.stream, packet.time_base = stream, Fraction(1, 1000)
        packet.pts = packet.dts = int(1000 * start)
        packet.duration = int(1000 * (end - start))
        packets.append(packet)
    return packets


def read_sound(path: Path) -> array[int]:
    """Return the samples of a WAV file."""
    with wave.open(str(path)) as sound:
        return array("h", sound.readframes(sound.getnframes()))


def measure_pitch(samples: array[int]) -> float:
    """Return the frequency of a tone in Hz."""
    crossings = sum(1 for first, second in pairwise(samples) if first < 0 <= second)
    return crossings * SAMPLE_RATE / len(samples)
