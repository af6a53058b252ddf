"""tests: recordings as conferences publish them: VP9, AV1 and H.264, with speech, an hour long, or with no sound."""

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
needs_speech = pytest.mark.skipif(shutil.which("flite") is None, reason="the speech synthesiser flite is not installed")

VIDEO_FORMATS = {
    # the file's ending: (container, picture, sound)
    "vp9.webm": ("webm", "libvpx-vp9", "libopus"),
    "av1.webm": ("webm", "libsvtav1", "libopus"),
    "h264.mp4": ("mp4", "libx264", "aac"),
    "flac.mkv": ("matroska", "mpeg4", "flac"),
}


def synthesize_speech(text: str, folder: Path) -> bytes:
    """The samples of `text` as a synthesiser says it: 16 kHz, mono, 16 bit."""
    path = folder / "spoken.wav"
    subprocess.run(["flite", "-voice", "slt", "-t", text, "-o", str(path)], check=True, timeout=60)
    with wave.open(str(path)) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (SAMPLE_RATE, 1, 2)
        return bytes(sound.readframes(sound.getnframes()))


def make_tone() -> bytes:
    """A tone that comes and goes."""
    return array("h", (int(3000 * math.sin(n * 0.17)) * (n // 4000 % 2) for n in range(SAMPLE_RATE))).tobytes()


def make_video_file(kind: str, samples: bytes, *, repeated: int = 1) -> bytes:
    """A film with these samples, which are `repeated`, and one grey picture a second.

    A process of its own makes it: the AV1 encoder gives the process of a superuser real-time priority, for good.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as maker:
        return maker.submit(_film, kind, samples, repeated).result()


def _film(kind: str, samples: bytes, repeated: int) -> bytes:
    container, picture, sound = VIDEO_FORMATS[kind]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as media:
        video: Any = media.add_stream(picture, rate=1)
        video.width, video.height, video.pix_fmt = 320, 180, "yuv420p"
        audio: Any = media.add_stream(sound, rate=48_000 if sound == "libopus" else SAMPLE_RATE)
        audio.layout = "mono"
        resample = av.AudioResampler(format=audio.format.name, layout="mono", rate=audio.rate)
        second = 0
        for _ in range(repeated):
            for begin in range(0, len(samples), 2 * SAMPLE_RATE):
                media.mux(video.encode(_picture(second)))
                heard = _sound(samples[begin : begin + 2 * SAMPLE_RATE], second)
                for frame in resample.resample(heard):
                    media.mux(audio.encode(frame))
                second += 1
        for frame in resample.resample(None):
            media.mux(audio.encode(frame))
        media.mux(video.encode())
        media.mux(audio.encode())
    return buffer.getvalue()


def _picture(second: int) -> av.VideoFrame:
    frame = av.VideoFrame(320, 180, "yuv420p")
    for plane in frame.planes:
        plane.update(bytes([second % 256]) * plane.buffer_size)
    frame.pts, frame.time_base = second, Fraction(1, 1)
    return frame


def _sound(samples: bytes, second: int) -> av.AudioFrame:
    frame = av.AudioFrame(format="s16", layout="mono", samples=len(samples) // 2)
    frame.planes[0].update(samples)
    frame.sample_rate = SAMPLE_RATE
    frame.pts, frame.time_base = second * SAMPLE_RATE, Fraction(1, SAMPLE_RATE)
    return frame
