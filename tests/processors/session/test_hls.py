"""Recordings that are published in segments: selection of the sound, formats of segments, limits and errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES128
from cryptography.hazmat.primitives.ciphers.modes import CBC

from jobledger.workers.processors.session import hls
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.pipeline import run
from tests.processors.session.fixtures import RecordingJob, Site, SiteResponse, html, make_parameters, make_settings
from tests.processors.session.video_files import Sound, measure_pitch, read_sound, write_media_file

SOUND = Sound(600, seconds=12)


def make_hls_files(sound: Sound = SOUND, options: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """Return the files of an HLS recording by name. The playlist is `media.m3u8`."""
    with TemporaryDirectory() as folder:
        playlist = Path(folder, "media.m3u8")
        settings = {"hls_time": "2", "hls_list_size": "0", "hls_playlist_type": "vod", **(options or {})}
        write_media_file(playlist, "hls", [sound], options=settings)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def put_files(site: Site, folder: str, files: Mapping[str, bytes]) -> str:
    """Put files on the website and return the URL of the playlist."""
    for name, content in files.items():
        site.put(f"{folder}/{name}", SiteResponse(content))
    return site.url(f"{folder}/media.m3u8")


async def run_job(page_url: str, video_url: str, folder: Path, **settings: Any) -> RecordingJob:
    language = settings.pop("language", "en")
    parameters = make_parameters(url=page_url, video_url=video_url, source_language=language)
    job = RecordingJob(parameters, folder)
    resolved = make_settings(**({"keep_audio": True} | settings))
    await run(job, resolved, Fetcher(resolved, lock_directory=folder / "locks"))
    return job


def measure_result(job: RecordingJob, folder: Path) -> tuple[float, float]:
    """Return the length of the audio of a job in seconds and the frequency of its tone."""
    [sound] = [content for path, content in job.files.items() if path.endswith("audio.wav")]
    (folder / "result.wav").write_bytes(sound)
    samples = read_sound(folder / "result.wav")
    return len(samples) / 16_000, measure_pitch(samples)


NOT_CONFIGURED = "There is no transcript. Transcription is not configured."


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hls_segment_type": "fmp4"},
        {"hls_flags": "single_file"},
        {"hls_segment_type": "fmp4", "hls_flags": "single_file"},
    ],
    ids=["TS", "fMP4", "TS in one file", "fMP4 in one file"],
)
async def test_segments_are_combined(options: dict[str, str], site: Site, page_url: str, tmp_path: Path) -> None:
    await check_recording(make_hls_files(options=options), site, page_url, tmp_path)


async def check_recording(files: Mapping[str, bytes], site: Site, page_url: str, tmp_path: Path) -> None:
    """Check that the whole recording is used."""
    job = await run_job(page_url, put_files(site, "/hls", files), tmp_path)
    assert job.warnings == [NOT_CONFIGURED]
    seconds, pitch = measure_result(job, tmp_path)
    assert seconds == pytest.approx(12, abs=0.2)
    assert pitch == pytest.approx(600, abs=5)


async def test_byte_range_without_offset_follows_the_previous_one(site: Site, page_url: str, tmp_path: Path) -> None:
    files = make_hls_files(Sound(600, seconds=12, pauses=((6, 8),)), options={"hls_flags": "single_file"})
    files["media.m3u8"] = re.sub(rb"(BYTERANGE:\d+)@\d+", rb"\1", files["media.m3u8"])
    assert files["media.m3u8"].count(b"BYTERANGE") > 3
    job = await run_job(page_url, put_files(site, "/hls", files), tmp_path)
    assert measure_result(job, tmp_path)[0] == pytest.approx(12, abs=0.2)
    samples = read_sound(tmp_path / "result.wav")
    has_sound = [max(samples[second * 16_000 : (second + 1) * 16_000 - 8_000]) > 1000 for second in range(12)]
    assert [second for second, value in enumerate(has_sound) if not value] == [7]


@pytest.mark.parametrize("iv", [None, "0x000102030405060708090a0b0c0d0e0f"])
async def test_encrypted_segments_are_decrypted(iv: str | None, site: Site, page_url: str, tmp_path: Path) -> None:
    key = b"0123456789abcdef"
    files = make_hls_files()
    for number, name in enumerate(sorted(name for name in files if name.endswith(".ts"))):
        vector = bytes.fromhex(iv[2:]) if iv else number.to_bytes(16, "big")
        padding = 16 - len(files[name]) % 16
        encryptor = Cipher(AES128(key), CBC(vector)).encryptor()
        files[name] = encryptor.update(files[name] + bytes([padding]) * padding) + encryptor.finalize()
    tag = f'#EXT-X-KEY:METHOD=AES-128,URI="talk.key"{f",IV={iv}" if iv else ""}\n#EXTINF'
    files["media.m3u8"] = files["media.m3u8"].replace(b"#EXTINF", tag.encode(), 1)
    await check_recording(files | {"talk.key": key}, site, page_url, tmp_path)
    assert site.requested_paths.count("/hls/talk.key") <= 3


MASTER = """#EXTM3U
#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="low",LANGUAGE="de",NAME="Deutsch",DEFAULT=YES,URI="german/media.m3u8"
#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="low",LANGUAGE="en",NAME="English",URI="english/media.m3u8"
#EXT-X-STREAM-INF:BANDWIDTH=900000,AUDIO="low",CODECS="avc1.4d401f,mp4a.40.2"
picture.m3u8
#EXT-X-STREAM-INF:BANDWIDTH=100000,AUDIO="low",CODECS="avc1.4d401f,mp4a.40.2"
small.m3u8
"""


@pytest.mark.parametrize(("language", "pitch"), [("en", 600), ("de-AT", 300), ("fr", 300)])
async def test_sound_is_selected_by_language(
    language: str, pitch: float, site: Site, page_url: str, tmp_path: Path
) -> None:
    put_files(site, "/hls/english", make_hls_files())
    put_files(site, "/hls/german", make_hls_files(Sound(300, seconds=12)))
    url = site.put("/hls/master.m3u8", SiteResponse(MASTER.encode(), headers={"Content-Type": "audio/mpegurl"}))
    job = await run_job(page_url, url, tmp_path, language=language)
    assert measure_result(job, tmp_path)[1] == pytest.approx(pitch, abs=5)
    assert not [path for path in site.requested_paths if path.startswith("/hls/picture")]


async def test_smallest_variant_with_sound_is_used(site: Site, page_url: str, tmp_path: Path) -> None:
    put_files(site, "/hls/a", make_hls_files())
    master = """#EXTM3U
#EXT-X-STREAM-INF:BANDWIDTH=900,CODECS="avc1.4d401f,mp4a.40.2"
large/media.m3u8
#EXT-X-STREAM-INF:BANDWIDTH=500,CODECS="avc1.4d401f,mp4a.40.2"
a/media.m3u8
#EXT-X-STREAM-INF:BANDWIDTH=100,CODECS="avc1.4d401f"
silent/media.m3u8
"""
    job = await run_job(page_url, site.put("/hls/m", SiteResponse(master.encode())), tmp_path)
    assert job.warnings == [NOT_CONFIGURED]
    assert measure_result(job, tmp_path)[1] == pytest.approx(600, abs=5)


SEGMENT = "#EXTINF:2,\na.ts\n"
END = "#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("playlist", "message"),
    [
        (SEGMENT, "is a live stream that has not ended"),
        (END, "has no segments"),
        (f"#EXTINF:2,\nhttp://10.0.0.1/a.ts\n{END}", "10.0.0.1"),
        (f"#EXTINF:2,\nfile:///etc/passwd\n{END}", "file:/etc/passwd is not an http or https URL"),
        (f'#EXT-X-KEY:METHOD=AES-128,URI="http://10.0.0.1/k"\n{SEGMENT}{END}', "10.0.0.1"),
        (f'#EXT-X-MAP:URI="http://10.0.0.1/i"\n{SEGMENT}{END}', "10.0.0.1"),
        (f'#EXT-X-KEY:METHOD=SAMPLE-AES,URI="k"\n{SEGMENT}{END}', "is protected (DRM)"),
        (f'#EXT-X-KEY:METHOD=AES-128,URI="short.key"\n{SEGMENT}{END}', "or its key is damaged"),
        (f"#EXT-X-BYTERANGE:9@-1\n{SEGMENT}{END}", "invalid byte range"),
        (f"#EXTINF:soon,\na.ts\n{END}", "The playlist of the recording is invalid"),
        (f"{SEGMENT * 10}{END}", "is larger than 100,000 bytes"),
        (f"#EXTINF:2,\nmissing.ts\n{END}", "cannot be fetched"),
        (f"#EXTINF:2,\nlogin.html\n{END}", "is a web page"),
        ("#EXT-X-STREAM-INF:BANDWIDTH=1\nmedia.m3u8\n", "names another list of variants"),
        ("#EXT-X-STREAM-INF:BANDWIDTH=1\na.ts\n", "is not an HLS playlist"),
    ],
)
async def test_unusable_playlist_is_a_warning(
    playlist: str, message: str, site: Site, page_url: str, tmp_path: Path
) -> None:
    site.put("/hls/login.html", html("<p>Sign in</p>"))
    files = {"media.m3u8": b"#EXTM3U\n" + playlist.encode(), "a.ts": bytes(20_000), "short.key": b"key"}
    job = await run_job(page_url, put_files(site, "/hls", files), tmp_path, video_max_bytes=100_000)
    assert len(job.warnings) == 1
    assert message in job.warnings[0]


@pytest.mark.parametrize(
    "response",
    [
        SiteResponse(b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'/>"),
        SiteResponse(b"<x/>", headers={"Content-Type": "application/dash+xml"}),
    ],
)
async def test_dash_is_rejected(response: SiteResponse, site: Site, page_url: str, tmp_path: Path) -> None:
    job = await run_job(page_url, site.put("/talk.mpd", response), tmp_path)
    assert "DASH or Smooth Streaming manifest, which is not supported" in job.warnings[0]


async def test_missing_segment_becomes_silence_and_a_warning(site: Site, page_url: str, tmp_path: Path) -> None:
    files = make_hls_files()
    del files["media2.ts"]
    job = await run_job(page_url, put_files(site, "/hls", files), tmp_path)
    assert job.warnings[0] == "The recording is incomplete: 1 of 7 segments cannot be fetched."
    assert measure_result(job, tmp_path)[0] == pytest.approx(12, abs=0.2)


async def test_segments_beyond_the_maximum_length_are_not_fetched(site: Site, page_url: str, tmp_path: Path) -> None:
    job = await run_job(page_url, put_files(site, "/hls", make_hls_files()), tmp_path, max_audio_seconds=3)
    assert job.warnings[0] == "The recording is incomplete: only the first 0:03 were used."
    assert sorted(path for path in site.requested_paths if path.endswith(".ts")) == ["/hls/media0.ts", "/hls/media1.ts"]


async def test_transient_failure_of_a_segment_is_retried(
    site: Site, page_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hls, "_RETRY_SECONDS", 0.01)
    url = put_files(site, "/hls", make_hls_files())

    class FailOnce(dict[str, SiteResponse]):
        """Responses of the site. The first request for a segment fails."""

        def get(self, path: str, default: Any = None) -> Any:
            if path == "/hls/media3.ts" and site.requested_paths.count(path) == 1:
                return SiteResponse(status=503)
            return super().get(path, default)

    site.responses = FailOnce(site.responses)
    job = await run_job(page_url, url, tmp_path)
    assert job.warnings == [NOT_CONFIGURED]
    assert site.requested_paths.count("/hls/media3.ts") == 2
