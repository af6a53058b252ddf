"""Extraction of audio from media files: choice of the track, times of a player, and what is reported as missing."""

from __future__ import annotations

import re
import struct
import wave
from pathlib import Path

import pytest
from av.stream import Disposition

from jobledger.workers.processors.session.transcript import ExtractionProgress, TranscriptUnavailable, extract_audio
from tests.processors.session.fixtures import make_video
from tests.processors.session.video_files import SAMPLE_RATE, Sound, make_media_file, measure_pitch, read_sound


def extract(folder: Path, *, max_seconds: float = 3_600) -> list[ExtractionProgress]:
    return list(extract_audio(folder / "video", folder / "audio.wav", max_seconds=max_seconds))


@pytest.mark.parametrize("container", ["matroska", "mp4"])
def test_audio_is_16_khz_mono_of_the_same_length(container: str, tmp_path: Path) -> None:
    (tmp_path / "video").write_bytes(make_video(3, container=container))
    (progress,) = extract(tmp_path)
    with wave.open(str(tmp_path / "audio.wav")) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (16_000, 1, 2)
        assert sound.getnframes() / 16_000 == progress.seconds == pytest.approx(3, abs=0.1)
        peak = max(memoryview(sound.readframes(16_000)).cast("h"))
    assert 8_000 < peak < 14_000
    assert progress.damage is None


def test_audio_is_limited_to_max_seconds(tmp_path: Path) -> None:
    (tmp_path / "video").write_bytes(make_video(4))
    (progress,) = extract(tmp_path, max_seconds=1)
    assert progress.seconds == pytest.approx(1, abs=0.2)
    assert progress.damage == "only the first 0:01 were used"


def test_playlist_of_other_files_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "other.mkv").write_bytes(make_video(1))
    (tmp_path / "video").write_text("ffconcat version 1.0\nfile other.mkv\n")
    with pytest.raises(TranscriptUnavailable, match="not a supported media file"):
        extract(tmp_path)


def test_video_without_audio_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "video").write_bytes(make_video(1, sound=False))
    with pytest.raises(TranscriptUnavailable, match="has no audio"):
        extract(tmp_path)


GERMAN = Sound(300, language="ger", title="native", disposition=Disposition.default)
ENGLISH = Sound(600, language="eng", title="Translated")
FRENCH = Sound(900, language="fra")
UNKNOWN = Sound(1200)


def extract_pitch(folder: Path, container: str, sounds: list[Sound], language: str | None) -> float:
    (folder / "video").write_bytes(make_media_file(container, sounds))
    list(extract_audio(folder / "video", folder / "audio.wav", max_seconds=3600, language=language))
    return measure_pitch(read_sound(folder / "audio.wav"))


@pytest.mark.parametrize(
    ("container", "sounds", "language", "pitch"),
    [
        ("matroska", [GERMAN, ENGLISH, FRENCH], "en", 600),
        ("mp4", [GERMAN, ENGLISH, FRENCH], "en", 600),
        ("mpegts", [GERMAN, ENGLISH, FRENCH], "fr", 900),
        ("matroska", [FRENCH, ENGLISH, GERMAN], "de", 300),
        ("matroska", [FRENCH, ENGLISH, GERMAN], "es", 300),
        ("matroska", [ENGLISH, GERMAN], None, 300),
        ("matroska", [Sound(900, language="fre"), UNKNOWN], "en", 1200),
        ("matroska", [Sound(900, language="deu"), Sound(600, title="English")], "en", 600),
        ("matroska", [Sound(900, language="en", disposition=Disposition.visual_impaired), UNKNOWN], "en", 1200),
        ("matroska", [Sound(900, language="en", title="Commentary"), FRENCH], "en", 900),
        ("matroska", [Sound(600, language="en", disposition=Disposition.dub), Sound(300, language="eng")], "en", 300),
        ("matroska", [Sound(600, language="en", disposition=Disposition.comment)], "en", 600),
    ],
)
def test_track_is_selected_by_language_and_kind(
    container: str, sounds: list[Sound], language: str | None, pitch: float, tmp_path: Path
) -> None:
    assert extract_pitch(tmp_path, container, sounds, language) == pytest.approx(pitch, abs=5)


def test_silent_track_is_replaced_by_next_one(tmp_path: Path) -> None:
    assert extract_pitch(tmp_path, "webm", [Sound(0, language="eng"), GERMAN], "en") == pytest.approx(300, abs=5)


def test_track_that_cannot_be_decoded_is_replaced_by_next_one(tmp_path: Path) -> None:
    media = make_media_file("matroska", [Sound(600, language="eng"), GERMAN])
    assert media.count(b"A_FLAC") == 2
    (tmp_path / "video").write_bytes(media.replace(b"A_FLAC", b"A_NONE", 1))
    *_, progress = extract_audio(tmp_path / "video", tmp_path / "audio.wav", max_seconds=3600, language="en")
    assert measure_pitch(read_sound(tmp_path / "audio.wav")) == pytest.approx(300, abs=5)
    assert progress.track == "2 of 2 (ger, native)"


def find_sound(folder: Path) -> list[bool]:
    """Return for each tenth of a second whether the WAV file has sound."""
    samples = read_sound(folder / "audio.wav")
    step = SAMPLE_RATE // 10
    return [max(samples[at : at + step]) > 1000 for at in range(0, len(samples) - step, step)]


@pytest.mark.parametrize("container", ["matroska", "mp4", "webm", "mpegts"])
def test_times_are_those_of_a_player(container: str, tmp_path: Path) -> None:
    sound = Sound(seconds=6, start=1, pauses=((2, 4),))
    (tmp_path / "video").write_bytes(make_media_file(container, [sound], picture_seconds=7))
    (progress,) = extract(tmp_path)
    assert progress.seconds == pytest.approx(7, abs=0.1)
    assert progress.damage is None
    tenths = find_sound(tmp_path)
    assert not any(tenths[:9])
    assert all(tenths[11:29])
    assert not any(tenths[32:49])
    assert all(tenths[51:68])


def test_sound_of_a_file_that_starts_late_begins_at_zero(tmp_path: Path) -> None:
    (tmp_path / "video").write_bytes(make_media_file("matroska", [Sound(seconds=3, start=500)]))
    (progress,) = extract(tmp_path)
    assert progress.seconds == pytest.approx(3, abs=0.1)


def test_jump_of_timestamps_is_not_filled(tmp_path: Path) -> None:
    media = make_media_file("mpegts", [Sound(seconds=5_002, pauses=((1, 5_001),))])
    (tmp_path / "video").write_bytes(media)
    *_, progress = extract_audio(tmp_path / "video", tmp_path / "audio.wav", max_seconds=99_999, total_seconds=2)
    assert progress.seconds == pytest.approx(2, abs=0.2)


def change_webm_duration(media: bytes, milliseconds: float) -> bytes:
    """Return a WebM file with another value in its element `Duration`."""
    at = media.index(b"\x44\x89\x88") + 3
    return media[:at] + struct.pack(">d", milliseconds) + media[at + 8 :]


WHOLE_FILES = {
    "sound shorter than picture, WebM": lambda: make_media_file("webm", [Sound(seconds=3)], picture_seconds=8),
    "sound shorter than picture, MP4": lambda: make_media_file("mp4", [Sound(seconds=3)], picture_seconds=8),
    "picture shorter than sound": lambda: make_media_file("matroska", [Sound(seconds=8)], picture_seconds=3),
    "wrong duration": lambda: change_webm_duration(make_media_file("webm", [Sound()], picture_seconds=4), 60_000),
    "live stream": lambda: make_media_file("webm", [Sound(seconds=8)], picture_seconds=8, options={"live": "1"}),
    "fragmented": lambda: make_media_file("mp4", [Sound(seconds=8)], options={"movflags": "frag_keyframe+empty_moov"}),
    "MP3 without length": lambda: (
        make_media_file("mp3", [Sound(seconds=8)], options={"write_xing": "0"}) + bytes(400_000)
    ),
    "Ogg": lambda: make_media_file("ogg", [Sound(seconds=8)]),
    "AVI": lambda: make_media_file("avi", [Sound(seconds=8)], picture_seconds=8),
}


@pytest.mark.parametrize("kind", WHOLE_FILES)
def test_whole_file_is_not_called_incomplete(kind: str, tmp_path: Path) -> None:
    (tmp_path / "video").write_bytes(WHOLE_FILES[kind]())
    (progress,) = extract(tmp_path)
    assert progress.damage is None


def cut(media: bytes) -> bytes:
    return media[: len(media) * 6 // 10]


LONG = [Sound(seconds=8)]
CUT_FILES = {
    "WebM": lambda: cut(make_media_file("webm", LONG, picture_seconds=8)),
    "WebM, sound shorter than picture": lambda: cut(make_media_file("webm", [Sound(seconds=7)], picture_seconds=8)),
    "live stream": lambda: cut(make_media_file("webm", LONG, picture_seconds=8, options={"live": "1"})),
    "MP4 with the index first": lambda: cut(make_media_file("mp4", LONG, options={"movflags": "faststart"})),
    "fragmented": lambda: cut(
        make_media_file("mp4", LONG, picture_seconds=8, options={"movflags": "frag_keyframe+empty_moov"})
    ),
    "MP3 with length": lambda: cut(make_media_file("mp3", LONG)),
    "Ogg": lambda: cut(make_media_file("ogg", LONG)),
    "AVI": lambda: cut(make_media_file("avi", LONG, picture_seconds=8)),
    "FLV": lambda: cut(make_media_file("flv", LONG, picture_seconds=8)),
    "empty rest": lambda: cut(make_media_file("matroska", LONG, picture_seconds=8)) + bytes(100_000),
}


@pytest.mark.parametrize("kind", CUT_FILES)
def test_truncated_file_is_called_incomplete(kind: str, tmp_path: Path) -> None:
    (tmp_path / "video").write_bytes(CUT_FILES[kind]())
    (progress,) = extract(tmp_path)
    assert 3 < progress.seconds < 6
    assert re.match(r"it (ends|is cut off) after 0:0[345]", progress.damage or "")


def test_loss_at_the_end_of_the_picture_is_not_reported(tmp_path: Path) -> None:
    """The sound is complete, and only an index for seeking is missing."""
    media = make_media_file("webm", LONG, picture_seconds=8)
    (tmp_path / "video").write_bytes(media[: media.rindex(b"\x1c\x53\xbb\x6b") + 2])
    (progress,) = extract(tmp_path)
    assert progress.seconds == pytest.approx(8, abs=0.1)
    assert progress.damage is None


def test_truncated_mp4_without_index_has_clear_error(tmp_path: Path) -> None:
    (tmp_path / "video").write_bytes(cut(make_media_file("mp4", LONG, picture_seconds=8)))
    with pytest.raises(TranscriptUnavailable, match=r"cut off: it is an MP4 file without its index \(moov\)"):
        extract(tmp_path)
