"""tests: behind a page of a video site is a recording, which yt-dlp finds and we fetch, from named sites only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobledger.workers.processors.session import video_sites
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.pipeline import run
from jobledger.workers.processors.session.transcript import TranscriptUnavailable
from jobledger.workers.processors.session.video_sites import is_video_site_url, resolve_media_url
from jobledger.workers.sandbox import restrictions
from jobledger.workers.sandbox import runner as sandbox
from tests.processors.session.fixtures import (
    CONFERENCE_PAGE,
    RecordingJob,
    Site,
    SiteResponse,
    html,
    make_parameters,
    make_settings,
    make_video,
    serve_site,
)


def _has_namespaces() -> bool:
    if not restrictions.landlock_version():
        return False
    pid = os.fork()
    if pid == 0:
        os._exit(0 if restrictions.unshare_namespaces() else 1)
    return os.waitpid(pid, 0)[1] == 0


needs_namespaces = pytest.mark.skipif(
    not _has_namespaces(),
    reason="needs Landlock, and user namespaces (sysctl kernel.unprivileged_userns_clone=1; not in most containers)",
)


@pytest.fixture
def site() -> Iterator[Site]:
    with serve_site() as running:
        yield running


def finding(monkeypatch: pytest.MonkeyPatch, folder: Path, found: Any) -> None:
    """Put something in yt-dlp's place that finds this, or fails with a message."""
    package = folder / "packages" / "yt_dlp"
    package.mkdir(parents=True)
    (package / "found.json").write_text(json.dumps(found))
    (package / "__init__.py").write_text(_FINDS)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "yt_dlp", raising=False)


_FINDS = """
import json, pathlib
class YoutubeDL:
    def __init__(self, options):
        assert options["allowed_extractors"] == ["default", "-generic"], options
        assert options["proxy"].startswith("http://127.0.0.1:"), options
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def extract_info(self, url, *, download):
        assert not download
        found = json.loads(pathlib.Path(__file__).with_name("found.json").read_text())
        if isinstance(found, str):
            raise RuntimeError(found)
        if found and "code" in found:
            exec(found["code"], {"found": found})
        return found
"""


async def heard(page: str, site: Site, folder: Path) -> tuple[RecordingJob, Any]:
    job = RecordingJob(make_parameters(url=site.put("/page", html(CONFERENCE_PAGE)), video_url=page), folder)
    chosen = make_settings(keep_audio=True, video_sites=["video.example"])
    results = await run(job, chosen, Fetcher(chosen, lock_directory=folder / "locks"))
    return job, results


@needs_namespaces
async def test_the_recording_behind_a_page_is_fetched_by_us(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = site.put("/hidden/film", SiteResponse(make_video(2), headers={"Content-Type": "video/webm"}))
    finding(monkeypatch, tmp_path, {"url": film})
    job, results = await heard("https://www.video.example/watch?v=1", site, tmp_path)
    assert results.metadata["audio_seconds"] == pytest.approx(2, abs=0.1)
    assert job.warnings == ["There is no transcript. Transcription is not configured."]


@needs_namespaces
@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ("ERROR: Private video. Sign in\nmore", "is not available: Private video. Sign in."),
        (None, "The page of video.example has no recording that can be downloaded as one file"),
        ({"entries": []}, "has no recording that can be downloaded as one file"),
        ({"url": "http://10.0.0.1/film"}, "10.0.0.1"),  # what it finds is checked like every address
        ({"url": "file:///etc/passwd"}, "is not an http or https URL"),
    ],
)
async def test_what_cannot_be_had_there_is_a_reason(
    found: Any, sentence: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding(monkeypatch, tmp_path, found)
    job, results = await heard("https://video.example/1", site, tmp_path)
    assert sentence in job.warnings[0]
    assert not results.metadata["transcribed"]


async def test_without_yt_dlp_it_is_said_what_to_install(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_sites, "_find_package", lambda: None)
    job, _ = await heard("https://video.example/1", site, tmp_path)
    assert "pip install yt-dlp" in job.warnings[0]


def test_only_named_sites_and_their_subdomains_are_video_sites() -> None:
    sites = ["video.example"]
    assert is_video_site_url("https://video.example/1", sites)
    assert is_video_site_url("https://WWW.Video.Example:443/1", sites)
    assert not is_video_site_url("https://badvideo.example/1", sites)
    assert not is_video_site_url("https://video.example.evil/1", sites)
    assert not is_video_site_url("not an address", sites)


@needs_namespaces
async def test_the_real_yt_dlp_does_not_guess(site: Site, tmp_path: Path) -> None:
    """With its guessing extractor it would have fetched the page, wherever that is."""
    pytest.importorskip("yt_dlp")
    page = site.put("/watch", html("<video src='/film.webm'></video>"))
    with pytest.raises(TranscriptUnavailable, match="is not available"):
        await resolve_media_url(page, seconds=5, scratch=tmp_path / "scratch", fetcher=Fetcher(make_settings()))
    assert site.requested_paths == []


_CONNECT = """
import socket, os
def asked(target):
    with socket.create_connection(("127.0.0.1", 3128), 5) as s:
        s.sendall(f"{target} HTTP/1.1\\r\\n\\r\\n".encode())
        answer = s.recv(100).split(b"\\r\\n")[0].decode()
        if "200" in answer:
            s.sendall(b"GET /through HTTP/1.0\\r\\n\\r\\n")
            answer += " " + s.recv(100).split(b"\\r\\n")[0].decode()
        return answer
def tried(what):
    try:
        return str(what())
    except OSError as error:
        return type(error).__name__
"""


@needs_namespaces
async def test_yt_dlp_reaches_only_what_the_address_policy_allows(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put("/through", html("reached"))
    (tmp_path / "secret").write_text("canary")
    attempts = {
        "allowed": f"asked('CONNECT 127.0.0.1:{site.port}')",
        "private": "asked('CONNECT 10.0.0.1:80')",
        "metadata": "asked('CONNECT 169.254.169.254:80')",
        "another method": f"asked('GET http://127.0.0.1:{site.port}/x')",
        "no port": "asked('CONNECT 127.0.0.1')",
        "directly": f"socket.create_connection(('127.0.0.1', {site.port}), 2)",
        "a file": f"open('{tmp_path}/secret').read()",
        "a local socket": "socket.socket(socket.AF_UNIX)",
    }
    lines = [_CONNECT, "import json", "got = {}"]
    lines += [f"got[{name!r}] = tried(lambda: {code})" for name, code in attempts.items()]
    lines += ["found['url'] = json.dumps(got)"]
    finding(monkeypatch, tmp_path, {"code": "\n".join(lines)})
    fetcher = Fetcher(make_settings())
    said = await resolve_media_url("https://video.example/1", seconds=5, scratch=tmp_path / "scratch", fetcher=fetcher)
    got = json.loads(said)
    assert got == {
        "allowed": "HTTP/1.1 200 OK HTTP/1.0 200 OK",
        "private": "HTTP/1.1 403 Forbidden",
        "metadata": "HTTP/1.1 403 Forbidden",
        "another method": "HTTP/1.1 403 Forbidden",
        "no port": "HTTP/1.1 403 Forbidden",
        "directly": "ConnectionRefusedError",
        "a file": "PermissionError",
        "a local socket": "PermissionError",
    }


async def test_without_namespaces_yt_dlp_is_not_run(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding(monkeypatch, tmp_path, {"url": "http://x.example/"})
    monkeypatch.setattr(
        sandbox, "probe_methods", lambda: (sandbox.ProbeResult("landlock", is_working=False, reason="none"),)
    )
    job, _ = await heard("https://video.example/1", site, tmp_path)
    assert "yt-dlp cannot run in a sandbox" in job.warnings[0]
