"""Audio extraction and transcription of the video formats that conferences publish."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.pipeline import run
from jobledger.workers.processors.session.transcript import TranscriptUnavailable, extract_audio
from tests.processors.session.fixtures import (
    RecordingJob,
    Site,
    SiteResponse,
    make_parameters,
    make_settings,
    read_document,
)
from tests.processors.session.video_files import (
    VIDEO_FORMATS,
    make_tone,
    make_video_file,
    needs_speech,
    synthesize_speech,
)

SPEECH = (
    "The database keeps every event. A worker may die at any moment, and nothing is lost. "
    "Please remember to open the window before you leave the building."
)
KEY_WORDS = {"database", "keeps", "event", "moment", "nothing", "lost", "remember", "window", "building"}


@pytest.mark.parametrize("kind", VIDEO_FORMATS)
def test_extract_audio_of_every_format_has_length_of_video(kind: str, tmp_path: Path) -> None:
    (tmp_path / "video").write_bytes(make_video_file(kind, make_tone(), repeated=20))
    *_, progress = extract_audio(tmp_path / "video", tmp_path / "audio.wav", max_seconds=3600)
    assert progress.damage is None
    assert progress.seconds == pytest.approx(20, abs=0.2)


@pytest.mark.parametrize("kind", ["vp9.webm", "av1.webm", "flac.mkv"])
def test_extract_audio_of_truncated_video_uses_available_part(kind: str, tmp_path: Path) -> None:
    video = make_video_file(kind, make_tone(), repeated=40)
    (tmp_path / "video").write_bytes(video[: len(video) // 2])
    *_, progress = extract_audio(tmp_path / "video", tmp_path / "audio.wav", max_seconds=3600)
    assert 5 < progress.seconds < 35
    assert progress.damage is not None


def test_extract_audio_of_mp4_without_index_fails(tmp_path: Path) -> None:
    video = make_video_file("h264.mp4", make_tone(), repeated=40)
    (tmp_path / "video").write_bytes(video[: len(video) // 2])
    with pytest.raises(TranscriptUnavailable, match="damaged or"):
        list(extract_audio(tmp_path / "video", tmp_path / "audio.wav", max_seconds=3600))


@needs_speech
@pytest.mark.parametrize("kind", ["vp9.webm", "h264.mp4"])
async def test_speech_in_video_is_transcribed(kind: str, site: Site, page_url: str, tmp_path: Path) -> None:
    pytest.importorskip("pocketsphinx", reason="install pocketsphinx: pip install pocketsphinx")
    video_url = site.put(
        f"/talk.{kind}",
        SiteResponse(
            make_video_file(kind, synthesize_speech(SPEECH, tmp_path)), headers={"Content-Type": "video/webm"}
        ),
    )
    job = RecordingJob(make_parameters(url=page_url, video_url=video_url), tmp_path)
    settings = make_settings(transcription={"backend": "pocketsphinx"})
    results = await run(job, settings, Fetcher(settings, lock_directory=tmp_path / "locks"))
    transcript = read_document(job, results).partition("## Transcript")[2].partition("## Links")[0]
    recognized = KEY_WORDS & set(transcript.split())
    assert len(recognized) >= len(KEY_WORDS) - 2, transcript
    assert job.warnings == []
