"""tests: sound is taken out of what is itself a recording, and of nothing else."""

from __future__ import annotations

import wave
from pathlib import Path

import pytest

from jobledger.workers.processors.session.transcript import ExtractionProgress, TranscriptUnavailable, extract_audio
from tests.processors.session.fixtures import make_video


def extracted(folder: Path, *, max_seconds: float = 3_600) -> list[ExtractionProgress]:
    return list(extract_audio(folder / "video", folder / "audio.wav", max_seconds=max_seconds))


@pytest.mark.parametrize("container", ["matroska", "mp4"])
def test_sound_becomes_16_khz_mono_of_the_same_length(container: str, tmp_path: Path) -> None:
    (tmp_path / "video").write_bytes(make_video(3, container=container))
    (heard,) = extracted(tmp_path)
    with wave.open(str(tmp_path / "audio.wav")) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (16_000, 1, 2)
        assert sound.getnframes() / 16_000 == heard.seconds == pytest.approx(3, abs=0.1)
        loudest = max(memoryview(sound.readframes(16_000)).cast("h"))
    assert 8_000 < loudest < 14_000
    assert heard.damage is None


def test_only_so_much_sound_is_taken(tmp_path: Path) -> None:
    (tmp_path / "video").write_bytes(make_video(4))
    (heard,) = extracted(tmp_path, max_seconds=1)
    assert heard.seconds == pytest.approx(1, abs=0.2)
    assert heard.damage == "only the first 0:01 were used"


def test_a_playlist_does_not_make_us_open_other_files(tmp_path: Path) -> None:
    (tmp_path / "other.mkv").write_bytes(make_video(1))
    (tmp_path / "video").write_text("ffconcat version 1.0\nfile other.mkv\n")
    with pytest.raises(TranscriptUnavailable, match="not a supported media file"):
        extracted(tmp_path)


def test_a_video_without_sound_is_told(tmp_path: Path) -> None:
    (tmp_path / "video").write_bytes(make_video(1, sound=False))
    with pytest.raises(TranscriptUnavailable, match="has no audio"):
        extracted(tmp_path)
