"""Generate the recording of a talk: a few seconds of animation with a melody.

Videos are short because the user waits for `jobledger demo`. Output is reproducible with the same codecs.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal

import av
from av.container import OutputContainer
from PIL import Image, ImageDraw, ImageFont

from jobledger.cli.demo_site.conference import Note, Talk, Video, load_conference

WIDTH, HEIGHT = 640, 360
FRAMES_PER_SECOND = 10
SAMPLE_RATE = 24_000  # one of the rates that Opus supports
BEAT_SECONDS = 0.4
SEMITONES_FROM_A4: dict[Note, int] = {"C4": -9, "D4": -7, "E4": -5, "G4": -2, "A4": 0, "C5": 3, "D5": 5, "E5": 7}

# The fastest settings of each encoder.
CODECS: dict[str, tuple[Literal["libvpx-vp9", "libx264"], dict[str, str], Literal["libopus", "aac"]]] = {
    "webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "36", "b": "0"}, "libopus"),
    "mp4": ("libx264", {"preset": "ultrafast", "crf": "26"}, "aac"),
}


_SUBTITLE_CODECS: dict[str, str] = {"webm": "webvtt", "mp4": "mov_text"}


def write_video(talk: Talk, video: Video, path: Path) -> None:
    """Encode `video` to `path`, as WebM (VP9, Opus) or MP4 (H.264, AAC)."""
    with av.open(str(path), "w", format=video.container, options={"fflags": "+bitexact"}) as output:
        output.metadata["title"] = talk.title
        _encode(output, talk, video)


def _encode(output: OutputContainer, talk: Talk, video: Video) -> None:
    video_codec, options, audio_codec = CODECS[video.container]
    picture = output.add_stream(video_codec, rate=FRAMES_PER_SECOND, options=options)
    picture.width, picture.height, picture.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    sound = output.add_stream(audio_codec, rate=SAMPLE_RATE)
    sound.bit_rate = 48_000
    sound.layout = "mono"
    for packet in _make_subtitles(video, _add_subtitle_stream(output, talk, video)):
        output.mux(packet)
    samples = _synthesize(video)
    for second in range(video.seconds):  # interleave per second so that the file can be streamed
        for number in range(second * FRAMES_PER_SECOND, (second + 1) * FRAMES_PER_SECOND):
            progress = number / (video.seconds * FRAMES_PER_SECOND)
            output.mux(picture.encode(_make_video_frame(_draw_frame(talk, video, progress), number)))
        output.mux(sound.encode(_make_audio_frame(samples, second * SAMPLE_RATE)))
    output.mux(picture.encode(None))
    output.mux(sound.encode(None))


def _add_subtitle_stream(output: OutputContainer, talk: Talk, video: Video) -> Any:
    stream: Any = output.add_stream(_SUBTITLE_CODECS[video.container])
    stream.codec_context.subtitle_header = b"[Script Info]\nScriptType: v4.00+\n"
    stream.metadata["language"] = {"en": "eng", "de": "deu"}[talk.language]
    return stream


def _make_subtitles(video: Video, stream: Any) -> Iterator[Any]:
    """Yield a packet for each subtitle. They share the length of the video."""
    milliseconds = video.seconds * 1000 // len(video.subtitles)
    for number, text in enumerate(video.subtitles):
        data = text.encode()
        packet: Any = av.Packet(len(data).to_bytes(2, "big") + data if video.container == "mp4" else data)
        packet.stream, packet.time_base = stream, Fraction(1, 1000)
        packet.pts = packet.dts = number * milliseconds
        packet.duration = milliseconds
        yield packet


def _make_video_frame(picture: Image.Image, number: int) -> av.VideoFrame:
    frame: av.VideoFrame = av.VideoFrame.from_image(picture)  # type: ignore[no-untyped-call]  # its stub is bare
    frame.pts, frame.time_base = number, Fraction(1, FRAMES_PER_SECOND)
    return frame


def _make_audio_frame(samples: array[int], start: int) -> av.AudioFrame:
    """Return one second of `samples` from `start`."""
    frame = av.AudioFrame(format="s16", layout="mono", samples=SAMPLE_RATE)
    frame.planes[0].update(samples[start : start + SAMPLE_RATE].tobytes())
    frame.sample_rate = SAMPLE_RATE
    frame.pts, frame.time_base = start, Fraction(1, SAMPLE_RATE)
    return frame


def _synthesize(video: Video) -> array[int]:
    """Return the melody as 16-bit samples, padded with silence or cut to the length of the video."""
    samples = array("h")
    for note, beats in video.melody:
        samples.extend(_synthesize_note(note, beats * BEAT_SECONDS))
    length = video.seconds * SAMPLE_RATE
    samples.extend([0] * (length - len(samples)))
    return samples[:length]


def _synthesize_note(note: Note, seconds: float) -> Iterator[int]:
    """Yield the samples of a plucked note: two fading partials with a soft attack to avoid clicks."""
    frequency_hz = 0 if note == "rest" else 440 * 2 ** (SEMITONES_FROM_A4[note] / 12)
    step = 2 * math.pi * frequency_hz / SAMPLE_RATE
    for at in range(round(seconds * SAMPLE_RATE)):
        envelope = 9_000 * min(1.0, at / 240) * math.exp(-at * 3.0 / SAMPLE_RATE)
        yield int(envelope * (math.sin(step * at) + 0.3 * math.sin(2 * step * at)))


@cache
def _load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _draw_frame(talk: Talk, video: Video, progress: float) -> Image.Image:
    """Return the frame at `progress` (0 to 1) of the video."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), talk.color)
    draw = ImageDraw.Draw(picture)
    headline, byline = video.caption
    draw.text((36, 34), headline, font=_load_font(32), fill="white")
    draw.text((36, 80), byline, font=_load_font(18), fill="white")
    match video.animation:
        case "ledger":
            _draw_ledger(draw, talk, progress)
        case "contrast":
            _draw_contrast(draw, progress)
    draw.text((36, HEIGHT - 46), load_conference().name, font=_load_font(15), fill="white")
    draw.rectangle((0, HEIGHT - 8, round(WIDTH * progress), HEIGHT), fill="white")
    return picture


def _draw_ledger(draw: ImageDraw.ImageDraw, talk: Talk, progress: float) -> None:
    """Draw entries that arrive one by one from the right and then stay."""
    arriving = progress * 7
    for entry in range(math.floor(arriving) + 1):
        rest = max(0.0, 1 - (arriving - entry) * 1.6)
        left = 36 + entry * 82 + round(rest**2 * WIDTH)
        draw.rounded_rectangle((left, 156, left + 72, 246), radius=8, fill="white")
        draw.text((left + 22, 176), f"{entry + 1:02}", font=_load_font(24), fill=talk.color)
        for line in range(3):
            draw.rectangle((left + 12, 214 + line * 8, left + 60 - line * 9, 217 + line * 8), fill=talk.color)


def _draw_contrast(draw: ImageDraw.ImageDraw, progress: float) -> None:
    """Draw grey text on white whose contrast increases (ratio: WCAG 2.2, section 1.4.3)."""
    grey = round(225 * (1 - progress))
    ratio = 1.05 / (_compute_luminance(grey) + 0.05)
    draw.rounded_rectangle((36, 140, WIDTH - 36, 270), radius=10, fill="white")
    draw.text((60, 156), "Can you read this?", font=_load_font(40), fill=(grey, grey, grey))
    verdict = "yes" if ratio >= 4.5 else "not yet"
    draw.text((60, 222), f"contrast {ratio:.1f} : 1, {verdict}", font=_load_font(24), fill="black")


def _compute_luminance(grey: int) -> float:
    """Return the relative luminance of an sRGB grey from 0 to 255 (WCAG 2.2)."""
    level = grey / 255
    return level / 12.92 if level <= 0.04045 else float(((level + 0.055) / 1.055) ** 2.4)
