"""Create recordings in the formats that conferences publish: VP9, AV1 and H.264, with speech or a tone."""

from __future__ import annotations

import io
import math
import shutil
import subprocess
import wave
from array import array
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import pytest

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


def make_tone() -> bytes:
    """Return one second of a tone that is silent every other quarter."""
    return array("h", (int(3000 * math.sin(n * 0.17)) * (n // 4000 % 2) for n in range(SAMPLE_RATE))).tobytes()


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
