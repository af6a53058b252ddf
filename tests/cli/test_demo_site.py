"""The conference site of the demo: its files, its sessions, and its server."""

from __future__ import annotations

import signal
from array import array
from pathlib import Path

import av
import httpx
import pypdfium2
import pytest
import trafilatura

from jobledger.cli.demo_site import list_sessions, serve_directory, write_site
from jobledger.cli.demo_site.conference import Talk, load_conference

TALKS = load_conference().talks
SESSION_FIELDS = [
    *("event", "session", "url", "filename", "track", "day", "starttime", "endtime", "speakers"),
    *("video_url", "attachments_url", "source_language", "target_language"),
]
WITH_SLIDES = [talk for talk in TALKS if talk.slides]
WITH_VIDEO = [talk for talk in TALKS if talk.video]


def get_slug(talk: Talk) -> str:
    return talk.slug


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    write_site(directory)
    return directory


def read_pages(deck: Path) -> list[str]:
    """Return the text of each page."""
    with pypdfium2.PdfDocument(deck) as document:
        return [page.get_textpage().get_text_bounded() for page in document]


def test_write_site_returns_all_files(tmp_path: Path) -> None:
    written = write_site(tmp_path)

    assert sorted(written) == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())


def test_write_site_twice_gives_same_pages_and_decks(site: Path, tmp_path: Path) -> None:
    for name in write_site(tmp_path):
        if name.suffix != ".webm" and name.suffix != ".mp4":
            assert (tmp_path / name).read_bytes() == (site / name).read_bytes(), name


def test_list_sessions_have_all_fields_and_different_media() -> None:
    sessions = list_sessions("http://127.0.0.1:1/")

    assert [list(session) for session in sessions] == [SESSION_FIELDS] * 4
    assert len({session["filename"] for session in sessions}) == 4
    assert len({session["track"] for session in sessions}) == 2
    assert sum(session["attachments_url"] is None for session in sessions) == 1
    assert sum(session["video_url"] is None for session in sessions) == 2
    assert {(session["source_language"], session["target_language"]) for session in sessions} == {
        ("en", "en"),
        ("de", "de"),
    }


@pytest.mark.parametrize("talk", TALKS, ids=get_slug)
def test_talk_page_main_content_is_extractable(site: Path, talk: Talk) -> None:
    page = (site / "talks" / talk.slug / "index.html").read_text(encoding="utf-8")
    content = trafilatura.extract(page, output_format="markdown", include_tables=True, include_formatting=True)

    assert content is not None
    assert "biscuit" in page
    assert "biscuit" not in content
    assert "never took place" not in content
    assert "| " in content, "the table"
    assert "```" in content, "the code block"
    assert "\n- " in content, "the list"
    assert "\n## " in content, "the headings"
    assert all(speaker.name in content for speaker in talk.speakers)


@pytest.mark.parametrize("talk", WITH_SLIDES, ids=get_slug)
def test_deck_has_declared_pages_with_text(site: Path, talk: Talk) -> None:
    pages = read_pages(site / "files" / f"{talk.slug}.pdf")

    assert len(pages) == talk.page_count
    assert 4 <= talk.page_count <= 7
    assert talk.speakers[0].name in pages[0]
    for slide, page in zip(talk.slides, pages[1:], strict=True):
        assert slide.title in page


@pytest.mark.parametrize("talk", WITH_VIDEO, ids=get_slug)
def test_recording_has_motion_and_sound(site: Path, talk: Talk) -> None:
    assert talk.video is not None
    with av.open(str(site / "media" / f"{talk.slug}.{talk.video.container}")) as container:
        assert container.duration is not None
        assert container.duration / av.time_base == pytest.approx(talk.video.seconds, abs=0.2)
        frames = [bytes(frame.planes[0]) for frame in container.decode(video=0)]
    assert len(set(frames)) > len(frames) / 2

    assert measure_peak(site / "media" / f"{talk.slug}.{talk.video.container}") > 2_000


def measure_peak(path: Path) -> int:
    """Return the largest absolute value of the 16-bit samples: 0 to 32768."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=16_000)
    with av.open(str(path)) as container:
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
    return max(abs(sample) for frame in frames for sample in array("h", bytes(frame.planes[0])))


async def test_served_session_files_have_media_types(site: Path) -> None:
    async with serve_directory(site) as base, httpx.AsyncClient() as client:
        for session in list_sessions(base):
            page = await client.get(session["url"])
            assert page.status_code == 200
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            assert session["speakers"][0] in page.text
            if session["attachments_url"]:
                assert (await client.head(session["attachments_url"])).headers["content-type"] == "application/pdf"
            if session["video_url"]:
                suffix = session["video_url"].rpartition(".")[2]
                assert (await client.head(session["video_url"])).headers["content-type"] == f"video/{suffix}"
        assert (await client.get(f"{base}/no-such-page")).status_code == 404


async def test_site_links_have_targets(site: Path) -> None:
    async with serve_directory(site) as base, httpx.AsyncClient(follow_redirects=True) as client:
        for url in [f"{base}/", *(session["url"] for session in list_sessions(base))]:
            for link in extract_links(await client.get(url)):
                assert (await client.head(link)).status_code == 200, f"{link} on {url}"


def extract_links(page: httpx.Response) -> set[httpx.URL]:
    """Return the absolute URLs to which a page links."""
    document = trafilatura.load_html(page.text)
    assert document is not None
    return {page.url.join(link).copy_with(fragment=None) for link in map(str, document.xpath("//@href | //@src"))}


async def test_server_range_request_returns_that_range(site: Path) -> None:
    async with serve_directory(site) as base, httpx.AsyncClient() as client:
        url = next(session["video_url"] for session in list_sessions(base) if session["video_url"])
        whole = (await client.get(url)).content
        part = await client.get(url, headers={"Range": "bytes=100-199"})

    assert part.status_code == 206
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole)}"
    assert part.content == whole[100:200]


async def test_server_keeps_signal_handlers_and_frees_port(site: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    async with serve_directory(site) as base:
        assert signal.getsignal(signal.SIGINT) is before

    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(base)
