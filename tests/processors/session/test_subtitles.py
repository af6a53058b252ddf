"""Subtitles and chapters of recordings: formats, when they replace speech recognition, and how they appear."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from av.stream import Disposition

from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.pipeline import run
from jobledger.workers.processors.session.subtitles import Cue, build_chapters, parse_subtitles, to_segments
from jobledger.workers.processors.session.transcript import Chapter
from tests.processors.session.fixtures import (
    RecordingJob,
    Site,
    SiteResponse,
    html,
    make_parameters,
    make_settings,
    read_document,
)
from tests.processors.session.openai_server import KEY, FakeOpenAiServer
from tests.processors.session.test_hls import make_hls_files, put_files
from tests.processors.session.video_files import Sound, Subtitles, make_media_file

SPOKEN = [
    (number * 2.0, number * 2.0 + 1.8, f"Sentence number {number} tells about an append-only log.")
    for number in range(10)
]
SOUND = Sound(seconds=20)


async def run_job(
    page_url: str, video_url: str, folder: Path, server: FakeOpenAiServer | None = None, **changes: Any
) -> tuple[RecordingJob, str]:
    language = changes.pop("language", "en")
    if server is not None:
        server.answer_speech = lambda seconds: {"text": "recognized words"}
        (folder / "key").write_text(KEY)
        changes["transcription"] = {
            "backend": "openai",
            "url": server.url,
            "model": "whisper",
            "api_key_file": folder / "key",
        }
    settings = make_settings(**changes)
    parameters = make_parameters(url=page_url, video_url=video_url, source_language=language, target_language=language)
    job = RecordingJob(parameters, folder)
    results = await run(job, settings, Fetcher(settings, lock_directory=folder / "locks"))
    return job, read_document(job, results)


def put_recording(site: Site, container: str, *subtitles: Subtitles, **options: Any) -> str:
    return site.put("/talk", SiteResponse(make_media_file(container, [SOUND], subtitles=subtitles, **options)))


@pytest.mark.parametrize(
    ("container", "codec"), [("matroska", "subrip"), ("matroska", "ass"), ("webm", "webvtt"), ("mp4", "mov_text")]
)
async def test_embedded_subtitles_replace_recognition(
    container: str, codec: str, site: Site, page_url: str, tmp_path: Path, openai_server: FakeOpenAiServer
) -> None:
    cues = [(start, end, f"<i>{text}</i>") for start, end, text in SPOKEN]
    job, document = await run_job(
        page_url, put_recording(site, container, Subtitles(codec, cues)), tmp_path, openai_server
    )
    assert openai_server.requests == []
    assert job.warnings == []
    assert "**0:00** Sentence number 0 tells about an append-only log. Sentence number 1 tells" in document


LATE = [(start + 15, end + 15, text) for start, end, text in SPOKEN[:2]]
MUSIC = [(start, end, "[Music and applause in the room]") for start, end, _ in SPOKEN]
FEW_WORDS = [(start, end, "Yes") for start, end, _ in SPOKEN]


@pytest.mark.parametrize(
    "subtitles",
    [
        Subtitles("subrip", SPOKEN, language="ger"),
        Subtitles("subrip", SPOKEN, language=None),
        Subtitles("subrip", SPOKEN, disposition=Disposition.forced),
        Subtitles("subrip", LATE),
        Subtitles("subrip", MUSIC),
        Subtitles("subrip", FEW_WORDS),
    ],
    ids=["language", "no language", "forced", "part", "sounds", "few words"],
)
async def test_other_subtitles_do_not_replace_recognition(
    subtitles: Subtitles, site: Site, page_url: str, tmp_path: Path, openai_server: FakeOpenAiServer
) -> None:
    _, document = await run_job(page_url, put_recording(site, "matroska", subtitles), tmp_path, openai_server)
    assert "**0:00** recognized words" in document
    assert "Sentence" not in document


async def test_subtitles_are_not_used_if_configured(
    site: Site, page_url: str, tmp_path: Path, openai_server: FakeOpenAiServer
) -> None:
    url = put_recording(site, "matroska", Subtitles("subrip", SPOKEN))
    _, document = await run_job(page_url, url, tmp_path, openai_server, use_subtitles="never")
    assert "recognized words" in document


def format_srt(cues: list[tuple[float, float, str]]) -> bytes:
    return "\n\n".join(
        f"{number}\n00:00:{start:06.3f} --> 00:00:{end:06.3f}\n{text}" for number, (start, end, text) in enumerate(cues)
    ).encode()


GERMAN = [
    (start, end, f"Satz {number} handelt von einem Protokoll, das nur wächst.")
    for number, (start, end, _) in enumerate(SPOKEN)
]


def put_page_with_video(site: Site, tracks: str) -> str:
    text = "<p>This talk is about an append-only log, which makes the recovery of workers simple for everyone.</p>"
    video = f"<video><source src=/media/talk.mp4><source src=/media/talk.webm>{tracks}</video>"
    return site.put("/page/", html(f"<html lang=en><body><main><h1>Talk</h1>{text}{video}{text}</main>"))


@pytest.mark.parametrize("video", ["/media/talk.mp4", "/media/talk.webm#t=3"])
async def test_subtitles_of_page_replace_speech_recognition(
    video: str, site: Site, tmp_path: Path, openai_server: FakeOpenAiServer
) -> None:
    recording = SiteResponse(make_media_file("mp4", [SOUND]))
    site.put("/media/talk.mp4", recording)
    site.put("/media/talk.webm", recording)
    site.put("/de.srt", SiteResponse(format_srt(GERMAN)))
    site.put("/page/en.srt", SiteResponse(format_srt(SPOKEN)))
    page_url = put_page_with_video(
        site,
        "<track src=/de.srt srclang=de><track src=/chapters.srt kind=chapters srclang=en><track src=en.srt srclang=en>",
    )
    job, document = await run_job(page_url, site.url(video), tmp_path, openai_server)
    assert "Sentence number 9" in document
    assert "recognized words" not in document
    assert not {"/de.srt", "/chapters.srt"} & set(site.requested_paths)
    assert any("subtitles in http" in message for message in job.log_messages)


async def test_subtitles_of_another_video_of_the_page_are_not_used(
    site: Site, tmp_path: Path, openai_server: FakeOpenAiServer
) -> None:
    site.put("/other.mp4", SiteResponse(make_media_file("mp4", [SOUND])))
    site.put("/page/en.srt", SiteResponse(format_srt(SPOKEN)))
    page_url = put_page_with_video(site, "<track src=en.srt srclang=en>")
    _, document = await run_job(page_url, site.url("/other.mp4"), tmp_path, openai_server)
    assert "recognized words" in document


@pytest.mark.parametrize(
    ("video", "beside"),
    [("/talk.mp4", "/talk.srt"), ("/talk.av1.webm", "/talk.vtt"), ("/talk.MP4", "/talk.vtt")],
)
async def test_subtitle_file_beside_the_recording_is_used(
    video: str, beside: str, site: Site, page_url: str, tmp_path: Path, openai_server: FakeOpenAiServer
) -> None:
    site.put(video, SiteResponse(make_media_file("mp4", [SOUND])))
    site.put(beside, SiteResponse(format_srt(SPOKEN)))
    _, document = await run_job(page_url, site.url(video), tmp_path, openai_server)
    assert "Sentence number 9" in document


@pytest.mark.parametrize(
    "response",
    [
        SiteResponse(format_srt(GERMAN)),
        SiteResponse(format_srt(SPOKEN[:2])),
        SiteResponse(format_srt(SPOKEN), headers={"Content-Type": "text/html"}),
        SiteResponse(status=503),
    ],
    ids=["another language", "too little", "web page", "error"],
)
async def test_unusable_subtitle_file_beside_the_recording_is_ignored(
    response: SiteResponse, site: Site, page_url: str, tmp_path: Path, openai_server: FakeOpenAiServer
) -> None:
    site.put("/talk.mp4", SiteResponse(make_media_file("mp4", [SOUND])))
    site.put("/talk.vtt", response)
    job, document = await run_job(page_url, site.url("/talk.mp4"), tmp_path, openai_server)
    assert "recognized words" in document
    assert job.warnings == []


async def test_subtitle_files_are_not_requested_if_configured(site: Site, page_url: str, tmp_path: Path) -> None:
    url = site.put("/talk.mp4", SiteResponse(make_media_file("mp4", [SOUND])))
    await run_job(page_url, url, tmp_path, use_subtitles="never", keep_audio=True)
    assert "/talk.mp4" in site.requested_paths
    assert not {"/talk.vtt", "/talk.srt"} & set(site.requested_paths)


async def test_best_of_several_subtitle_tracks_is_used(site: Site, page_url: str, tmp_path: Path) -> None:
    tracks = [
        Subtitles("subrip", SPOKEN),
        Subtitles("subrip", LATE, language="ger"),
        Subtitles("subrip", GERMAN, language="deu"),
    ]
    url = put_recording(site, "matroska", *tracks)
    _, document = await run_job(page_url, url, tmp_path, use_subtitles="always", language="de")
    assert "Satz 0 handelt" in document
    assert "Sentence" not in document


async def test_recording_is_downloaded_for_subtitles_only_if_configured(
    site: Site, page_url: str, tmp_path: Path
) -> None:
    url = put_recording(site, "matroska", Subtitles("subrip", SPOKEN, language=None))
    job, document = await run_job(page_url, url, tmp_path)
    assert "/talk" not in site.requested_paths
    assert "The recording was not downloaded" in job.warnings[0]
    job, document = await run_job(page_url, url, tmp_path, use_subtitles="always")
    assert job.warnings == []
    assert "Sentence number 9" in document
    assert not [path for path in job.files if path.endswith(".wav")]


async def test_audio_is_stored_although_subtitles_are_used(site: Site, page_url: str, tmp_path: Path) -> None:
    url = put_recording(site, "matroska", Subtitles("subrip", SPOKEN))
    job, document = await run_job(page_url, url, tmp_path, keep_audio=True)
    assert "Sentence number 9" in document
    assert [path for path in job.files if path.endswith(".wav")]


CHAPTERS = [(0, "Welcome"), (7.9, "The *log*"), (16, "Questions")]


@pytest.mark.parametrize("container", ["matroska", "mp4"])
async def test_chapters_become_headings_of_the_transcript(
    container: str, site: Site, page_url: str, tmp_path: Path
) -> None:
    codec = "subrip" if container == "matroska" else "mov_text"
    url = put_recording(site, container, Subtitles(codec, SPOKEN), chapters=CHAPTERS)
    _, document = await run_job(page_url, url, tmp_path, use_subtitles="always")
    lines = [line for line in document.partition("## Transcript")[2].partition("## Links")[0].splitlines() if line]
    assert [line[:32] for line in lines] == [
        "### Welcome",
        "**0:00** Sentence number 0 tells",
        r"### The \*log\*",
        "**0:08** Sentence number 4 tells",
        "### Questions",
        "**0:16** Sentence number 8 tells",
    ]


async def test_chapters_are_listed_without_transcript(site: Site, page_url: str, tmp_path: Path) -> None:
    url = put_recording(site, "matroska", chapters=CHAPTERS)
    _, document = await run_job(page_url, url, tmp_path, keep_audio=True)
    assert "Transcription is not configured.\n\n- **0:00** Welcome\n- **0:07** The \\*log\\*\n" in document


def test_chapters_without_titles_are_not_used() -> None:
    assert build_chapters([(0, "Chapter 1"), (60, "Chapter 02")]) == []
    assert build_chapters([(0, "The whole talk")]) == []
    assert build_chapters([(60, "B"), (-1, "A")]) == [
        Chapter(start_seconds=0, title="A"),
        Chapter(start_seconds=60, title="B"),
    ]


def test_parse_subtitles_reads_srt_and_webvtt() -> None:
    srt = "\ufeff1\r\n00:00:01,500 --> 00:00:02,000\r\nOne\r\nmore\r\n\r\n2\r\n01:00:03,000 --> 01:00:04,000\r\nTwo\r\n"
    assert parse_subtitles(srt) == [Cue(1.5, 2, "One\nmore"), Cue(3603, 3604, "Two")]
    vtt = (
        "WEBVTT\nKind: captions\n\nNOTE\nA note --> no time\n\nSTYLE\n::cue { color: red }\n\n"
        "intro\n00:01.000 --> 00:02.5 align:start\n<v Ada>Hello\n\n00:03.000 --> 00:04.000\n\n"
    )
    assert parse_subtitles(vtt) == [Cue(1, 2.5, "<v Ada>Hello"), Cue(3, 4, "")]
    dense = "1\n00:00:01,000 --> 00:00:02,000\nOne\n2\n00:00:02,000 --> 00:00:03,000\nTwo"
    assert parse_subtitles(dense) == [Cue(1, 2, "One"), Cue(2, 3, "Two")]
    assert parse_subtitles("no subtitles at all\n" * 3) == []
    assert parse_subtitles(f"{'9' * 400}:00:01,000 --> 00:00:02,000\nOne") == []  # an infinite number of hours


def test_repeated_lines_of_automatic_captions_are_removed() -> None:
    lines = [f"the words of line {number} are &amp; remain" for number in range(11)]
    cues = [Cue(number * 2, number * 2 + 2, f"{lines[number]}\n<c>{lines[number + 1]}</c>") for number in range(10)]
    segments = to_segments(cues, 20)
    text = " ".join(segment.text for segment in segments)
    assert re.findall(r"line (\d+) are & remain", text) == [str(number) for number in range(11)]


SUBTITLE_MASTER = """#EXTM3U
#EXT-X-MEDIA:TYPE=SUBTITLES,GROUP-ID="s",LANGUAGE="de",NAME="Deutsch",URI="de.m3u8"
#EXT-X-MEDIA:TYPE=SUBTITLES,GROUP-ID="s",LANGUAGE="en",NAME="Signs",FORCED=YES,URI="forced.m3u8"
#EXT-X-MEDIA:TYPE=SUBTITLES,GROUP-ID="s",LANGUAGE="en",NAME="English",URI="en.m3u8"
#EXT-X-STREAM-INF:BANDWIDTH=100000,SUBTITLES="s"
media.m3u8
"""


def format_webvtt(cues: list[tuple[float, float, str]], shift: float) -> bytes:
    times = f"X-TIMESTAMP-MAP=LOCAL:00:00:00.000,MPEGTS:{int(90_000 * (10 + shift))}"
    lines = [f"00:{start - shift:06.3f} --> 00:{end - shift:06.3f}\n{text}\n" for start, end, text in cues]
    return "\n".join(["WEBVTT", times, "", *lines]).encode()


async def test_subtitles_of_hls_replace_recognition_without_download_of_the_sound(
    site: Site, page_url: str, tmp_path: Path, openai_server: FakeOpenAiServer
) -> None:
    put_files(site, "/hls", make_hls_files(SOUND))
    playlist = "#EXTM3U\n#EXTINF:10,\na.vtt\n#EXTINF:10,\nb.vtt\n#EXT-X-ENDLIST\n"
    site.put("/hls/en.m3u8", SiteResponse(playlist.encode()))
    site.put("/hls/a.vtt", SiteResponse(format_webvtt(SPOKEN[:6], 0)))
    site.put("/hls/b.vtt", SiteResponse(format_webvtt(SPOKEN[5:], 10)))  # the cue at the border is in both
    url = site.put("/hls/master.m3u8", SiteResponse(SUBTITLE_MASTER.encode()))
    job, document = await run_job(page_url, url, tmp_path, openai_server)
    assert re.findall(r"Sentence number (\d)", document) == [str(number) for number in range(10)]
    assert (openai_server.requests, job.warnings) == ([], [])
    assert not [path for path in site.requested_paths if path.endswith(".ts")]


@pytest.mark.parametrize("header", [f"LOCAL:00:00:00.000,MPEGTS:{'9' * 400}", "LOCAL:1e999,MPEGTS:0", "LOCAL:x"])
async def test_invalid_timestamp_map_is_ignored(header: str, site: Site, page_url: str, tmp_path: Path) -> None:
    put_files(site, "/hls", make_hls_files(SOUND))
    site.put("/hls/en.m3u8", SiteResponse(b"#EXTM3U\n#EXTINF:20,\na.vtt\n#EXT-X-ENDLIST\n"))
    content = format_webvtt(SPOKEN, 0).decode()
    content = re.sub("TIMESTAMP-MAP=.*", f"TIMESTAMP-MAP={header}", content)
    site.put("/hls/a.vtt", SiteResponse(content.encode()))
    url = site.put("/hls/master.m3u8", SiteResponse(SUBTITLE_MASTER.encode()))
    job, document = await run_job(page_url, url, tmp_path, use_subtitles="always")
    assert "Sentence number 9" in document
    assert job.warnings == []


async def test_recognition_is_used_if_subtitles_of_hls_are_missing(
    site: Site, page_url: str, tmp_path: Path, openai_server: FakeOpenAiServer
) -> None:
    put_files(site, "/hls", make_hls_files(SOUND))
    url = site.put("/hls/master.m3u8", SiteResponse(SUBTITLE_MASTER.encode()))
    job, document = await run_job(page_url, url, tmp_path, openai_server)
    assert "recognized words" in document
    assert job.warnings == []
