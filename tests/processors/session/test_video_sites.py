"""tests: behind a page of a video site is a recording, which yt-dlp finds and we fetch, from named sites only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.processors.session.support import (
    CONFERENCE_PAGE,
    Answer,
    RecordingJob,
    Site,
    html,
    serving,
    session,
    settings,
    video,
)
from workers.processors.session.fetch import Fetcher
from workers.processors.session.pipeline import run
from workers.processors.session.transcript import NoTranscript
from workers.processors.session.video_sites import is_on_a_video_site, media_address


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as running:
        yield running


def finding(monkeypatch: pytest.MonkeyPatch, found: Any) -> list[dict[str, Any]]:
    """Put something in yt-dlp's place that finds this; return the options it is given."""
    given: list[dict[str, Any]] = []

    class YoutubeDL:
        def __init__(self, options: dict[str, Any]) -> None:
            given.append(options)

        def __enter__(self) -> YoutubeDL:
            return self

        def __exit__(self, *_: object) -> None: ...

        def extract_info(self, url: str, *, download: bool) -> Any:
            assert not download
            if isinstance(found, Exception):
                raise found
            return found

    monkeypatch.setitem(sys.modules, "yt_dlp", SimpleNamespace(YoutubeDL=YoutubeDL))
    return given


async def heard(page: str, site: Site, folder: Path) -> tuple[RecordingJob, Any]:
    job = RecordingJob(session(url=site.put("/page", html(CONFERENCE_PAGE)), video_url=page), folder)
    chosen = settings(keep_audio=True, video_sites=["video.example"])
    results = await run(job, chosen, Fetcher(chosen, turns=folder / "turns"))
    return job, results


async def test_the_recording_behind_a_page_is_fetched_by_us(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = site.put("/hidden/film", Answer(video(2), headers={"Content-Type": "video/webm"}))
    given = finding(monkeypatch, {"url": film})
    job, results = await heard("https://www.video.example/watch?v=1", site, tmp_path)
    assert results.metadata["audio_seconds"] == pytest.approx(2, abs=0.1)
    assert job.warnings == ["There is no transcript. No transcription is configured."]
    assert given[0]["allowed_extractors"] == ["default", "-generic"]


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (RuntimeError("ERROR: Private video. Sign in\nmore"), "cannot be had: Private video. Sign in."),
        (None, "no recording that can be fetched as one file on the page of video.example"),
        ({"entries": []}, "no recording that can be fetched as one file"),
        ({"url": "http://10.0.0.1/film"}, "10.0.0.1"),  # what it finds is checked like every address
        ({"url": "file:///etc/passwd"}, "is not an http or https address"),
    ],
)
async def test_what_cannot_be_had_there_is_a_reason(
    found: Any, sentence: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding(monkeypatch, found)
    job, results = await heard("https://video.example/1", site, tmp_path)
    assert sentence in job.warnings[0]
    assert not results.metadata["transcribed"]


async def test_without_yt_dlp_it_is_said_what_to_install(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yt_dlp", None)
    job, _ = await heard("https://video.example/1", site, tmp_path)
    assert "pip install yt-dlp" in job.warnings[0]


def test_only_named_sites_and_their_subdomains_are_video_sites() -> None:
    sites = ["video.example"]
    assert is_on_a_video_site("https://video.example/1", sites)
    assert is_on_a_video_site("https://WWW.Video.Example:443/1", sites)
    assert not is_on_a_video_site("https://badvideo.example/1", sites)
    assert not is_on_a_video_site("https://video.example.evil/1", sites)
    assert not is_on_a_video_site("not an address", sites)


def test_the_real_yt_dlp_does_not_guess(site: Site) -> None:
    """With its guessing extractor it would have fetched the page, wherever that is."""
    pytest.importorskip("yt_dlp")
    page = site.put("/watch", html("<video src='/film.webm'></video>"))
    with pytest.raises(NoTranscript, match="cannot be had"):
        media_address(page, seconds=5)
    assert site.asked == []
