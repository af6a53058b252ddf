"""Extraction of audio from media files. Playlists that name other files are rejected."""

from __future__ import annotations

import wave
from pathlib import Path

import pytest

from jobledger.workers.processors.session.transcript import ExtractionProgress, TranscriptUnavailable, extract_audio
from tests.processors.session.fixtures import make_video


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
