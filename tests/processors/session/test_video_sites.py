"""Recordings on configured video sites: yt-dlp finds the media URL in a sandbox, and the fetcher downloads it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from jobledger.workers.processor import LogLevel
from jobledger.workers.processors.session import video_sites
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.pipeline import run
from jobledger.workers.processors.session.transcript import TranscriptUnavailable
from jobledger.workers.processors.session.video_sites import find_recording, is_video_site_url
from jobledger.workers.sandbox import restrictions
from jobledger.workers.sandbox import runner as sandbox
from tests.processors.session.fixtures import (
    RecordingJob,
    Site,
    SiteResponse,
    html,
    make_parameters,
    make_settings,
    make_video,
    read_document,
)
from tests.processors.session.test_hls import make_hls_files, put_files
from tests.processors.session.video_files import Sound


def _has_namespaces() -> bool:
    if not restrictions.get_landlock_version():
        return False
    pid = os.fork()
    if pid == 0:
        os._exit(0 if restrictions.unshare_namespaces() else 1)
    return os.waitpid(pid, 0)[1] == 0


needs_namespaces = pytest.mark.skipif(
    not _has_namespaces(),
    reason="needs user namespaces, and Landlock: sysctl kernel.unprivileged_userns_clone=1",
)


def install_fake_yt_dlp(monkeypatch: pytest.MonkeyPatch, folder: Path, result: Any) -> None:
    """Replace yt-dlp by a package that returns `result`, or fails if it is a message, or runs its `code`."""
    package = folder / "packages" / "yt_dlp"
    package.mkdir(parents=True)
    (package / "result.json").write_text(json.dumps(result))
    (package / "__init__.py").write_text(_FAKE_YT_DLP)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "yt_dlp", raising=False)


_FAKE_YT_DLP = """
import json, pathlib
class YoutubeDL:
    def __init__(self, options):
        assert options["allowed_extractors"] == ["default", "-generic"], options
        assert options["proxy"].startswith("http://127.0.0.1:"), options
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def extract_info(self, url, *, download):
        assert not download
        result = json.loads(pathlib.Path(__file__).with_name("result.json").read_text())
        if isinstance(result, str):
            raise RuntimeError(result)
        if result and "code" in result:
            exec(result["code"], {"result": result})
        return result
"""


async def run_job(page_url: str, video_url: str, folder: Path) -> tuple[RecordingJob, Any]:
    job = RecordingJob(make_parameters(url=page_url, video_url=video_url), folder)
    settings = make_settings(keep_audio=True, video_sites=["video.example"])
    results = await run(job, settings, Fetcher(settings, lock_directory=folder / "locks"))
    return job, results


@needs_namespaces
async def test_media_url_of_yt_dlp_is_fetched(
    site: Site, page_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    media_url = site.put("/hidden/film", SiteResponse(make_video(2), headers={"Content-Type": "video/webm"}))
    install_fake_yt_dlp(monkeypatch, tmp_path, {"url": media_url})
    job, results = await run_job(page_url, "https://www.video.example/watch?v=1", tmp_path)
    assert results.metadata["audio_seconds"] == pytest.approx(2, abs=0.1)
    assert job.warnings == ["There is no transcript. Transcription is not configured."]


@needs_namespaces
async def test_playlist_subtitles_and_chapters_of_yt_dlp_are_used(
    site: Site, page_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "\n".join(f"00:0{n}.000 --> 00:0{n}.900\nThese are the words of second {n}.\n" for n in range(6))
    result = {
        "url": put_files(site, "/hls", make_hls_files(Sound(seconds=6))),
        "requested_subtitles": {"en-GB": {"url": site.put("/en.vtt", SiteResponse(f"WEBVTT\n\n{lines}".encode()))}},
        "chapters": [{"start_time": 0, "title": "Begin"}, {"start_time": 4.0, "title": "End"}],
        "duration": 6,
    }
    install_fake_yt_dlp(monkeypatch, tmp_path, result)
    job, results = await run_job(page_url, "https://video.example/1", tmp_path)
    transcript = read_document(job, results).partition("## Transcript")[2]
    assert "### Begin\n\n**0:00** These are the words of second 0. These" in transcript
    assert "### End\n\n**0:04** These are the words of second 4." in transcript
    assert results.metadata["audio_seconds"] == pytest.approx(6, abs=0.1)  # of the HLS recording
    assert job.warnings == []


def test_yt_dlp_accepts_the_choice_of_formats() -> None:
    yt_dlp = pytest.importorskip("yt_dlp", reason="install yt-dlp: pip install yt-dlp")

    def select(*formats: dict[str, str]) -> str:
        common: dict[str, Any] = {"vcodec": "none", "acodec": "opus", "ext": "webm", "url": "u", "preference": None}
        candidates = [common | values for values in formats]
        with yt_dlp.YoutubeDL({"quiet": True}) as downloader:
            selector = downloader.build_format_selector(video_sites._FORMAT.format(language="de"))
            [chosen] = selector({"formats": candidates, "incomplete_formats": False, "has_merged_format": True})
        return str(chosen["format_id"])

    english = {"format_id": "en", "protocol": "https", "language": "en"}
    german = {"format_id": "de", "protocol": "https", "language": "de-AT"}
    dash = {"format_id": "dash", "protocol": "http_dash_segments", "language": "de"}
    playlist = {"format_id": "hls", "protocol": "m3u8_native", "language": "de"}
    assert select(german, english, dash) == "de"
    assert select(english, dash, playlist) == "en"
    assert select(dash, playlist) == "hls"


@needs_namespaces
@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("ERROR: Private video. Sign in\nmore", "is not available: Private video. Sign in."),
        (None, "The page of video.example has no recording that can be downloaded as one file"),
        ({"entries": []}, "has no recording that can be downloaded as one file"),
        ({"url": "http://10.0.0.1/film"}, "10.0.0.1"),  # the address policy applies to the result
        ({"url": "file:///etc/passwd"}, "is not an http or https URL"),
    ],
)
async def test_unusable_result_of_yt_dlp_is_a_warning(
    result: Any, message: str, page_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake_yt_dlp(monkeypatch, tmp_path, result)
    job, results = await run_job(page_url, "https://video.example/1", tmp_path)
    assert message in job.warnings[0]
    assert not results.metadata["transcribed"]


async def test_missing_yt_dlp_is_a_warning_with_install_command(
    site: Site, page_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_sites, "_find_package", lambda: None)
    job, _ = await run_job(page_url, "https://video.example/1", tmp_path)
    assert "pip install yt-dlp" in job.warnings[0]


def test_is_video_site_url_matches_sites_and_subdomains() -> None:
    sites = ["video.example"]
    assert is_video_site_url("https://video.example/1", sites)
    assert is_video_site_url("https://WWW.Video.Example:443/1", sites)
    assert not is_video_site_url("https://badvideo.example/1", sites)
    assert not is_video_site_url("https://video.example.evil/1", sites)
    assert not is_video_site_url("not an address", sites)


@needs_namespaces
async def test_real_yt_dlp_does_not_use_generic_extractor(site: Site, tmp_path: Path) -> None:
    """The generic extractor of yt-dlp, which is disabled, would request the page."""
    pytest.importorskip("yt_dlp", reason="install yt-dlp: pip install yt-dlp")
    page = site.put("/watch", html("<video src='/film.webm'></video>"))
    with pytest.raises(TranscriptUnavailable, match="is not available"):
        await find_recording(
            page, language="en", seconds=60, scratch=tmp_path / "scratch", fetcher=Fetcher(make_settings())
        )
    assert site.requested_paths == []


_CONNECT = """
import socket, os
def request(target):
    with socket.create_connection(("127.0.0.1", 3128), 60) as s:
        s.sendall(f"{target} HTTP/1.1\\r\\n\\r\\n".encode())
        answer = s.recv(100).split(b"\\r\\n")[0].decode()
        if "200" in answer:
            s.sendall(b"GET /through HTTP/1.0\\r\\n\\r\\n")
            answer += " " + s.recv(100).split(b"\\r\\n")[0].decode()
        return answer
def attempt(function):
    try:
        return str(function())
    except OSError as error:
        return type(error).__name__
"""


@needs_namespaces
async def test_yt_dlp_reaches_only_allowed_addresses(
    site: Site, page_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put("/through", html("reached"))
    (tmp_path / "secret").write_text("canary")
    attempts = {
        "allowed": f"request('CONNECT 127.0.0.1:{site.port}')",
        "private address": "request('CONNECT 10.0.0.1:80')",
        "metadata service": "request('CONNECT 169.254.169.254:80')",
        "other method": f"request('GET http://127.0.0.1:{site.port}/x')",
        "no port": "request('CONNECT 127.0.0.1')",
        "without proxy": f"socket.create_connection(('127.0.0.1', {site.port}), 60)",
        "file": f"open('{tmp_path}/secret').read()",
        "Unix socket": "socket.socket(socket.AF_UNIX)",
    }
    lines = [_CONNECT, "import json", "outcomes = {}"]
    lines += [f"outcomes[{name!r}] = attempt(lambda: {code})" for name, code in attempts.items()]
    lines += ["result['url'] = json.dumps(outcomes)"]
    install_fake_yt_dlp(monkeypatch, tmp_path, {"code": "\n".join(lines)})
    fetcher = Fetcher(make_settings())
    recording = await find_recording(
        "https://video.example/1", language="en", seconds=60, scratch=tmp_path / "scratch", fetcher=fetcher
    )
    assert json.loads(recording.media_url) == {
        "allowed": "HTTP/1.1 200 OK HTTP/1.0 200 OK",
        "private address": "HTTP/1.1 403 Forbidden",
        "metadata service": "HTTP/1.1 403 Forbidden",
        "other method": "HTTP/1.1 403 Forbidden",
        "no port": "HTTP/1.1 403 Forbidden",
        "without proxy": "ConnectionRefusedError",
        "file": "PermissionError",
        "Unix socket": "PermissionError",
    }


async def test_yt_dlp_is_not_run_without_sandbox(
    site: Site, page_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake_yt_dlp(monkeypatch, tmp_path, {"url": "http://x.example/"})
    monkeypatch.setattr(
        sandbox, "probe_methods", lambda: (sandbox.ProbeResult("landlock", is_working=False, reason="none"),)
    )
    job, _ = await run_job(page_url, "https://video.example/1", tmp_path)
    assert "yt-dlp cannot run in a sandbox" in job.warnings[0]


_RAISE_STATUS = """
class HTTPError(Exception):
    status = {status}
class ExtractorError(Exception):
    cause = HTTPError()
class DownloadError(Exception):
    exc_info = (ExtractorError, ExtractorError(), None)
raise DownloadError("HTTP Error {status}")
"""
_LOSE_CONNECTION = """
class TransportError(Exception): pass
class IncompleteRead(TransportError): pass
raise Exception("Connection lost") from IncompleteRead()
"""


@needs_namespaces
@pytest.mark.parametrize("code", [_RAISE_STATUS.format(status=503), _RAISE_STATUS.format(status=429), _LOSE_CONNECTION])
async def test_transient_error_of_video_site_is_retried(
    code: str, site: Site, page_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    media_url = site.put("/film", SiteResponse(make_video(2), headers={"Content-Type": "video/webm"}))
    install_fake_yt_dlp(monkeypatch, tmp_path, {"code": code})
    site_works_again = tmp_path / "packages" / "yt_dlp" / "result.json"

    class Job(RecordingJob):
        async def log(self, level: LogLevel, message: str, *, logger: str = "") -> None:
            await super().log(level, message, logger=logger)
            if "Trying again" in message:
                site_works_again.write_text(json.dumps({"url": media_url}))

    job = Job(make_parameters(url=page_url, video_url="https://video.example/1"), tmp_path)
    settings = make_settings(keep_audio=True, video_sites=["video.example"])
    results = await run(job, settings, Fetcher(settings, lock_directory=tmp_path / "locks"))
    assert results.metadata["audio_seconds"] == pytest.approx(2, abs=0.1)


@needs_namespaces
@pytest.mark.parametrize(
    ("code", "tries"), [(_RAISE_STATUS.format(status=503), 4), (_RAISE_STATUS.format(status=404), 1), ("1 / 0", 1)]
)
async def test_video_site_that_fails_is_a_warning(
    code: str, tries: int, page_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake_yt_dlp(monkeypatch, tmp_path, {"code": code})
    job, _ = await run_job(page_url, "https://video.example/1", tmp_path)
    [warning] = job.warnings
    assert "is not available" in warning
    assert ("It was tried 4 times." in warning) == (tries > 1)
    assert sum("Trying again" in message for message in job.log_messages) == tries - 1
