"""tests: recordings of the kinds conferences publish are heard, and words that were said stand in the Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.pipeline import run
from jobledger.workers.processors.session.transcript import TranscriptUnavailable, extract_audio
from tests.processors.session.fixtures import (
    CONFERENCE_PAGE,
    RecordingJob,
    Site,
    SiteResponse,
    html,
    make_parameters,
    make_settings,
    serve_site,
)
from tests.processors.session.video_files import (
    VIDEO_FORMATS,
    make_tone,
    make_video_file,
    needs_speech,
    synthesize_speech,
)

SAID = (
    "The database keeps every event. A worker may die at any moment, and nothing is lost. "
    "Please remember to open the window before you leave the building."
)
KEY_WORDS = {"database", "keeps", "event", "moment", "nothing", "lost", "remember", "window", "building"}


@pytest.fixture
def site() -> Iterator[Site]:
    with serve_site() as running:
        yield running


@pytest.mark.parametrize("kind", VIDEO_FORMATS)
def test_the_sound_of_every_kind_is_as_long_as_the_film(kind: str, tmp_path: Path) -> None:
    (tmp_path / "film").write_bytes(make_video_file(kind, make_tone(), repeated=20))
    *_, heard = extract_audio(tmp_path / "film", tmp_path / "audio.wav", max_seconds=3600)
    assert heard.damage is None
    assert heard.seconds == pytest.approx(20, abs=0.2)


@pytest.mark.parametrize("kind", ["vp9.webm", "av1.webm", "flac.mkv"])
def test_of_a_film_that_breaks_off_is_used_what_there_is(kind: str, tmp_path: Path) -> None:
    whole = make_video_file(kind, make_tone(), repeated=40)
    (tmp_path / "film").write_bytes(whole[: len(whole) // 2])
    *_, heard = extract_audio(tmp_path / "film", tmp_path / "audio.wav", max_seconds=3600)
    assert 5 < heard.seconds < 35
    assert heard.damage is not None


def test_an_mp4_that_breaks_off_before_its_index_cannot_be_read(tmp_path: Path) -> None:
    whole = make_video_file("h264.mp4", make_tone(), repeated=40)
    (tmp_path / "film").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TranscriptUnavailable, match="damaged or"):
        list(extract_audio(tmp_path / "film", tmp_path / "audio.wav", max_seconds=3600))


@needs_speech
@pytest.mark.parametrize("kind", ["vp9.webm", "h264.mp4"])
async def test_what_is_said_in_a_film_is_written_down(kind: str, site: Site, tmp_path: Path) -> None:
    pytest.importorskip("pocketsphinx")
    talk = site.put(
        f"/talk.{kind}",
        SiteResponse(make_video_file(kind, synthesize_speech(SAID, tmp_path)), headers={"Content-Type": "video/webm"}),
    )
    job = RecordingJob(make_parameters(url=site.put("/page", html(CONFERENCE_PAGE)), video_url=talk), tmp_path)
    chosen = make_settings(transcription={"backend": "pocketsphinx"})
    results = await run(job, chosen, Fetcher(chosen, lock_directory=tmp_path / "locks"))
    assert results.markdown is not None
    transcript = job.files[results.markdown.path].decode().partition("## Transcript")[2].partition("## Links")[0]
    found = KEY_WORDS & set(transcript.split())
    assert len(found) >= len(KEY_WORDS) - 2, transcript
    assert job.warnings == []
