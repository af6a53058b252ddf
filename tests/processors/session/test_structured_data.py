"""What JSON-LD and microdata say about the talk."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.page_source import PageSource
from jobledger.workers.processors.session.pipeline import run
from jobledger.workers.processors.session.structured_data import TalkData, find_talk_data
from tests.processors.session.fixtures import (
    RecordingJob,
    Site,
    html,
    make_parameters,
    make_settings,
    read_document,
    split_front_matter,
)
from tests.processors.session.no_talk_pages import TITLE, page, talk

ABSTRACT = "State that is overwritten is gone. An append-only log keeps every word of it for you."
TALK = {
    "@type": "EducationEvent",
    "name": TITLE,
    "description": ABSTRACT,
    "inLanguage": {"@type": "Language", "name": "English", "@value": "en-GB"},
    "keywords": "databases, event sourcing",
    "performer": [{"@type": "Person", "name": "Ada Example"}, {"name": "Grace &amp; Co"}],
    "recordedIn": {"@type": "VideoObject", "contentUrl": "https://video.example/1.mp4"},
}
CONFERENCE = {"@type": "Event", "name": "ExampleConf 2025", "description": "The conference. " * 30}


def script(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value).replace("</", "<\\/")
    return f"<script type='application/ld+json'>{text}</script>"


def find(source: str) -> TalkData | None:
    return find_talk_data(PageSource("https://c.example/t", source), TITLE)


@pytest.mark.parametrize(
    "value",
    [
        TALK,
        [CONFERENCE, TALK],
        {"@context": "https://schema.org", "@graph": [CONFERENCE, {"@type": "WebPage", "name": TITLE}, TALK]},
        CONFERENCE | {"subEvent": [{"@type": "Event", "name": "Another talk", "description": "x"}, TALK]},
        {"@type": "WebPage", "mainEntity": {"@type": "ItemList", "itemListElement": [{"item": TALK}]}},
        TALK | {"name": f"{TITLE} - ExampleConf"},
        TALK | {"@type": ["Thing", "https://schema.org/Event"]},
        TALK | {"name": {"@language": "en", "@value": TITLE.upper()}},
    ],
)
def test_object_of_the_talk_is_chosen(value: Any) -> None:
    data = find(page("", "", script(CONFERENCE) + script(value)))
    assert data is not None
    assert (data.description, data.language, data.keywords, data.video_url) == (
        ABSTRACT,
        "en-GB",
        ["databases", "event sourcing"],
        "https://video.example/1.mp4",
    )


@pytest.mark.parametrize(
    "value",
    [
        CONFERENCE,
        TALK | {"name": "Ledgers in accounting"},
        TALK | {"name": f"{TITLE} and forty other talks about databases, queues, logs, events and streams"},
        TALK | {"@type": "Person"},
        TALK | {"name": None},
        "{",
        "[[[",
        '"text"',
        "null",
    ],
)
def test_other_objects_and_invalid_data_are_ignored(value: Any) -> None:
    assert find(page("", "", script(value))) is None


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(TALK)[:-1] + ",}",
        "/* talk */ " + json.dumps(TALK) + " // end",
        "<!-- " + json.dumps(TALK) + " -->",
        "//<![CDATA[\n" + json.dumps(TALK) + "\n//]]>",
        json.dumps(TALK).replace('"', "&quot;"),
        json.dumps(TALK).replace("gone. An", "gone.\nAn"),
        json.dumps(TALK) + ";",
    ],
)
def test_damaged_json_is_mended(text: str) -> None:
    data = find(page("", "", script(text)))
    assert data is not None
    assert data.description.split() == ABSTRACT.split()
    assert data.video_url == "https://video.example/1.mp4"


def test_microdata_is_read() -> None:
    data = find(
        page(
            "",
            "<div itemscope itemtype='https://schema.org/Event'><meta itemprop=name content=ExampleConf>"
            "<section itemprop=subEvent itemscope itemtype='https://schema.org/EducationEvent'>"
            f"<h2 itemprop=name>Ledgers <i>that</i> never forget</h2><div itemprop=description><p>{ABSTRACT}</p></div>"
            "<meta itemprop=inLanguage content=de><p itemprop=performer itemscope itemtype='https://schema.org/Person'>"
            "<span itemprop=name>Ada Example</span>, <b itemprop=jobTitle>Engineer</b></p></section></div>",
        )
    )
    assert data == TalkData(title=TITLE, description=ABSTRACT, language="de")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 400_000,
        '{"a":' * 300_000,
        "/*" * 400_000,
        '"' * 900_001,
        ",   " * 200_000,
        json.dumps([TALK | {"name": f"Talk {number}"} for number in range(1_000)]),
    ],
)
def test_hostile_data_are_read_in_seconds(text: str) -> None:
    started = time.process_time()
    assert find(page("", "", script(text))) is None
    assert time.process_time() - started < 10


async def process(source: str, site: Site, folder: Path, **settings: Any) -> tuple[RecordingJob, str]:
    url = site.put("/talk", html(source))
    job = RecordingJob(make_parameters(url=url), folder)
    configured = make_settings(**settings)
    results = await run(job, configured, Fetcher(configured, lock_directory=folder / "locks"))
    return job, read_document(job, results)


SHELL = "<div id=root></div><script src=/app.js></script>"


async def test_shell_gets_its_text_from_structured_data(site: Site, tmp_path: Path) -> None:
    rich = TALK | {
        "description": f"<p>{ABSTRACT}</p><ul><li>First &amp; <b>second</b></li></ul><script>alert(1)</script>"
    }
    job, document = await process(page("ExampleConf", SHELL, script(rich)), site, tmp_path, render="never")
    front_matter, body = split_front_matter(document)
    assert ABSTRACT in body
    assert "- First & **second**" in body
    assert "alert" not in body
    assert "event sourcing" in str(front_matter)
    assert "The page shows its text only with JavaScript. The text is that of its structured data." in job.warnings


@pytest.mark.parametrize("video_url", [None, "http://127.0.0.1:9/given.mp4"])
async def test_recording_is_linked_if_none_was_given(video_url: str | None, site: Site, tmp_path: Path) -> None:
    url = site.put("/talk", html(talk(TITLE, ABSTRACT, head=script(TALK))))
    job = RecordingJob(make_parameters(url=url, video_url=video_url), tmp_path)
    document = read_document(job, await run(job, make_settings(), Fetcher(make_settings())))
    assert ("[Video](https://video.example/1.mp4)" in document) == (video_url is None)


async def test_abstract_that_the_page_does_not_show_is_added(site: Site, tmp_path: Path) -> None:
    job, document = await process(talk(TITLE, "Room 1", head=script(TALK)), site, tmp_path)
    assert "Room 1" in document
    assert ABSTRACT in document
    assert any("taken from the page's structured data" in warning for warning in job.warnings)


async def test_abstract_that_the_page_shows_is_not_repeated(site: Site, tmp_path: Path) -> None:
    source = talk(TITLE, f"<em>State</em> {ABSTRACT.removeprefix('State ')}", head=script(TALK))
    job, document = await process(source, site, tmp_path)
    assert split_front_matter(document)[1].count("An append-only log keeps every word") <= 2  # intro and text
    assert not any("structured data" in warning for warning in job.warnings)


async def test_page_without_text_gets_it_from_structured_data(site: Site, tmp_path: Path) -> None:
    job, document = await process(page("ExampleConf", f"<h1>{TITLE}</h1>", script(TALK)), site, tmp_path)
    assert ABSTRACT in document
    assert "The page is empty. The text is that of its structured data." in job.warnings


async def test_abstract_of_hidden_elements_does_not_fail_the_job(site: Site, tmp_path: Path) -> None:
    hidden = TALK | {"description": f"<div hidden><p>{ABSTRACT}</p></div>"}
    _, document = await process(talk(TITLE, "Room 1", head=script(hidden)), site, tmp_path)
    assert "Room 1" in document
    assert ABSTRACT not in split_front_matter(document)[1]


@pytest.mark.parametrize(
    "player",
    [
        "<iframe src=https://www.youtube.com/embed/abcdefghijk></iframe>",
        "<p>There is a <a href=https://youtu.be/abcdefghijk>recording</a> of this talk at the last conference.</p>",
    ],
)
@pytest.mark.parametrize("url", ["https://www.youtube.com/embed/abcdefghijk", "https://youtu.be/abcdefghijk"])
async def test_video_that_the_page_links_is_not_linked_again(player: str, url: str, site: Site, tmp_path: Path) -> None:
    data = TALK | {"recordedIn": {"@type": "VideoObject", "embedUrl": url}, "contentUrl": None, "video": None}
    _, document = await process(talk(TITLE, f"{ABSTRACT}</p>{player}", head=script(data)), site, tmp_path)
    assert document.count("abcdefghijk") == 1
