"""The demo's conference site: really made, really served, and worth processing."""

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


def by_slug(talk: Talk) -> str:
    return talk.slug


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    write_site(directory)
    return directory


def text_of(deck: Path) -> list[str]:
    """The text of every page."""
    with pypdfium2.PdfDocument(deck) as document:
        return [page.get_textpage().get_text_bounded() for page in document]


def test_making_the_site_names_every_file_it_wrote(tmp_path: Path) -> None:
    made = write_site(tmp_path)

    assert sorted(made) == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())


def test_a_site_made_twice_has_the_same_pages_and_decks(site: Path, tmp_path: Path) -> None:
    for name in write_site(tmp_path):
        if name.suffix != ".webm" and name.suffix != ".mp4":
            assert (tmp_path / name).read_bytes() == (site / name).read_bytes(), name


def test_sessions_have_the_thirteen_fields_and_differ_in_what_they_offer() -> None:
    listed = list_sessions("http://127.0.0.1:1/")

    assert [list(session) for session in listed] == [SESSION_FIELDS] * 4
    assert len({session["filename"] for session in listed}) == 4
    assert len({session["track"] for session in listed}) == 2
    assert sum(session["attachments_url"] is None for session in listed) == 1
    assert sum(session["video_url"] is None for session in listed) == 2
    assert {(session["source_language"], session["target_language"]) for session in listed} == {
        ("en", "de"),
        ("de", "en"),
    }


@pytest.mark.parametrize("talk", TALKS, ids=by_slug)
def test_a_talk_page_has_a_main_content_that_can_be_told_from_its_frame(site: Path, talk: Talk) -> None:
    page = (site / "talks" / talk.slug / "index.html").read_text(encoding="utf-8")
    found = trafilatura.extract(page, output_format="markdown", include_tables=True, include_formatting=True)

    assert found is not None
    assert "biscuit" in page
    assert "biscuit" not in found
    assert "never took place" not in found
    assert "| " in found, "the table"
    assert "```" in found, "the code block"
    assert "\n- " in found, "the list"
    assert "\n## " in found, "the headings"
    assert all(speaker.name in found for speaker in talk.speakers)


@pytest.mark.parametrize("talk", WITH_SLIDES, ids=by_slug)
def test_a_deck_has_the_declared_pages_with_real_text(site: Path, talk: Talk) -> None:
    pages = text_of(site / "files" / f"{talk.slug}.pdf")

    assert len(pages) == talk.page_count
    assert 4 <= talk.page_count <= 7
    assert talk.speakers[0].name in pages[0]
    for slide, page in zip(talk.slides, pages[1:], strict=True):
        assert slide.title in page


@pytest.mark.parametrize("talk", WITH_VIDEO, ids=by_slug)
def test_a_recording_moves_and_sounds(site: Path, talk: Talk) -> None:
    assert talk.video is not None
    with av.open(str(site / "media" / f"{talk.slug}.{talk.video.container}")) as film:
        assert film.duration is not None
        assert film.duration / av.time_base == pytest.approx(talk.video.seconds, abs=0.2)
        pictures = [bytes(frame.planes[0]) for frame in film.decode(video=0)]
    assert len(set(pictures)) > len(pictures) / 2

    assert loudest_sample(site / "media" / f"{talk.slug}.{talk.video.container}") > 2_000


def loudest_sample(path: Path) -> int:
    """The largest deviation of a 16-bit sample from silence: 0 to 32768."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=16_000)
    with av.open(str(path)) as film:
        frames = [part for frame in film.decode(audio=0) for part in resampler.resample(frame)]
    return max(abs(sample) for frame in frames for sample in array("h", bytes(frame.planes[0])))


async def test_everything_a_session_names_is_served_with_its_media_type(site: Path) -> None:
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


async def test_every_link_on_every_page_leads_somewhere(site: Path) -> None:
    async with serve_directory(site) as base, httpx.AsyncClient(follow_redirects=True) as client:
        for address in [f"{base}/", *(session["url"] for session in list_sessions(base))]:
            for link in links(await client.get(address)):
                assert (await client.head(link)).status_code == 200, f"{link} on {address}"


def links(page: httpx.Response) -> set[httpx.URL]:
    """The absolute addresses a page links to."""
    document = trafilatura.load_html(page.text)
    assert document is not None
    return {page.url.join(link).copy_with(fragment=None) for link in map(str, document.xpath("//@href | //@src"))}


async def test_a_range_of_a_recording_is_answered_with_just_that_range(site: Path) -> None:
    async with serve_directory(site) as base, httpx.AsyncClient() as client:
        address = next(session["video_url"] for session in list_sessions(base) if session["video_url"])
        whole = (await client.get(address)).content
        part = await client.get(address, headers={"Range": "bytes=100-199"})

    assert part.status_code == 206
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole)}"
    assert part.content == whole[100:200]


async def test_serving_leaves_the_signals_to_the_program_and_frees_the_port(site: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    async with serve_directory(site) as base:
        assert signal.getsignal(signal.SIGINT) is before

    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(base)
