"""tests: the document, whatever the values are."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from jobledger.workers.processor import SavedFile
from jobledger.workers.processors.session import SessionParameters
from jobledger.workers.processors.session.document import (
    EnrichmentResult,
    SessionContent,
    SlidesResult,
    TranscriptResult,
    read_built_in_template,
    render_document,
    resolve_language,
)
from jobledger.workers.processors.session.page import PageText
from jobledger.workers.processors.session.pdf_rendering import Slide
from jobledger.workers.processors.session.transcript import Segment, format_timecode
from tests.processors.session.fixtures import make_parameters, without_deadline
from tests.processors.session.test_parameters import samples

FIELDS = ["tags", "title", "subtitle", "intro", "speaker", "date", "place"]
FIELDS += ["track", "topic", "url", "video_url", "language", "job_id"]


def page(**changes: Any) -> PageText:
    values: dict[str, Any] = {
        "url": "u",
        "title": "t",
        "language": "en",
        "intro": None,
        "keywords": [],
        "markdown": "The text.",
    }
    return PageText.model_validate(values | changes)


def slide(number: int, text: str) -> Slide:
    def file(name: str) -> SavedFile:
        return SavedFile(path=f"e/t/s/assets/{name}", sha256="0" * 64, size=1, media_type="image/jpeg")

    image = file(f"slide-{number:03}.jpg")
    return Slide(**image.model_dump(), number=number, text=text, thumbnail=file(f"slide-{number:03}-thumb.jpg"))


def material(
    parameters: SessionParameters, of_page: PageText, recording: TranscriptResult | None, slides: list[Slide] | None
) -> SessionContent:
    return SessionContent(
        of_page,
        EnrichmentResult(language=resolve_language(parameters, of_page), markdown=of_page.markdown),
        recording or TranscriptResult(missing_reason="There is no transcript. No recording was given."),
        SlidesResult(slides=slides or []),
    )


def document(
    parameters: SessionParameters | None = None,
    *,
    of_page: PageText | None = None,
    recording: TranscriptResult | None = None,
    slides: list[Slide] | None = None,
    warnings: list[str] | None = None,
) -> str:
    return render_document(
        session=parameters or make_parameters(),
        job_id="job-1",
        content=material(parameters or make_parameters(), of_page or page(), recording, slides),
        warnings=warnings or [],
        template=read_built_in_template(),
    )


def parts_of(markdown: str) -> tuple[dict[str, Any], str]:
    match = re.match(r"---\n(.*?\n)---\n", markdown, re.DOTALL)
    assert match
    front = yaml.safe_load(match.group(1))
    assert isinstance(front, dict)
    return front, markdown[match.end() :]


def headings_in(body: str) -> list[tuple[str, str]]:
    tokens = MarkdownIt("commonmark").parse(body)
    return [
        (token.tag, "".join(child.content for child in tokens[number + 1].children or []))
        for number, token in enumerate(tokens)
        if token.type == "heading_open"
    ]


def test_a_document_reads_well() -> None:
    text = document(
        make_parameters(
            video_url="https://video.conference.example/ledgers.webm",
            attachments_url="https://conference.example/ledgers (1).pdf".replace(" ", "%20"),
        ),
        of_page=page(markdown="It begins.\n\n## Agenda\n\n1. History", keywords=["databases"], intro="In short."),
        recording=TranscriptResult(
            audio_seconds=130,
            segments=[
                Segment(start_seconds=0, text="good morning"),
                Segment(start_seconds=20, text="and welcome"),
                Segment(start_seconds=75, text="let us begin"),
            ],
        ),
        slides=[slide(1, "Ledgers\nthat never [forget]"), slide(2, "")],
        warnings=["Only the first 2 of 3 slides are shown."],
    )
    assert (
        text
        == """---
tags:
- ExampleConf 2025
- Databases-3
- databases
title: Ledgers that never forget
subtitle: null
intro: In short.
speaker:
- Ada Example
- Grace "GH" Sample
date: Saturday
place: null
track: Databases-3
topic: null
url: https://conference.example/talks/ledgers
video_url: https://video.conference.example/ledgers.webm
language: en
job_id: job-1
---

# Ledgers that never forget

**Ada Example, Grace "GH" Sample**

ExampleConf 2025 · Databases-3 · Saturday, 10:00–10:30

It begins.

## Agenda

1. History

## Slides

![Slide 1: Ledgers that never \\[forget\\]](assets/slide-001.jpg)

![Slide 2](assets/slide-002.jpg)

## Transcript

**0:00** good morning and welcome

**1:15** let us begin

## Links

- [Session page](https://conference.example/talks/ledgers)
- [Recording](https://video.conference.example/ledgers.webm)
- [Slides and attachments](https://conference.example/ledgers%20%281%29.pdf)

## Warnings

- Only the first 2 of 3 slides are shown.
"""
    )


NASTY_VALUES = [
    "---",
    "a\n---\nb",
    "key: value",
    "- list",
    "# comment",
    "no",
    "null",
    "2025-02-01",
    "07:30",
    "1e3",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "'\"`",
    "&anchor *alias !tag",
    "%TAG",
    "\u2028next\u0085line",
    "tab\there",
    "trailing ",
    "💌 Größe",
    "</script><script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](http://tracker.example/x.png)",
    "**bold** _it_ `code",
    "===",
    "```",
]


@without_deadline
@given(st.text(min_size=1).filter(str.strip))
@pytest.mark.parametrize("field", ["session", "event", "track", "day"])
def test_every_value_survives_the_front_matter(field: str, value: str) -> None:
    _survives(make_parameters(**{field: value, "speakers": [value]}))


@pytest.mark.parametrize("value", NASTY_VALUES)
def test_nasty_values_survive_the_front_matter_and_break_nothing(value: str) -> None:
    parameters = make_parameters(session=value, event=value, track=value, day=value, speakers=[value, value])
    body = _survives(parameters)
    assert headings_in(body)[0] == ("h1", " ".join(value.split()))
    assert [title for tag, title in headings_in(body)[1:]] == ["Transcript", "Links"]
    rendered = MarkdownIt("commonmark").render(body)
    assert "<script" not in rendered
    assert "<img" not in rendered
    assert rendered.count("<a ") == 1


def test_all_samples_make_a_document_whose_front_matter_parses() -> None:
    for sample in samples():
        _survives(SessionParameters.model_validate(sample))


def _survives(parameters: SessionParameters) -> str:
    front, body = parts_of(document(parameters, of_page=page(intro=parameters.session)))
    assert list(front) == FIELDS
    assert front["title"] == front["intro"] == parameters.session
    assert front["speaker"] == (parameters.speakers or [])
    assert front["date"] == parameters.day
    assert front["track"] == parameters.track
    assert front["url"] == parameters.url
    assert front["video_url"] == parameters.video_url
    assert {parameters.event, parameters.track} == set(front["tags"])
    return body


@without_deadline
@given(st.lists(st.text(), max_size=3), st.text(), st.text())
@example(["- x\n# y"], "]( <b>", "`")
def test_slides_words_and_warnings_never_break_the_document(texts: list[str], said: str, warning: str) -> None:
    slides = [slide(number, text) for number, text in enumerate(texts, 1)]
    recording = TranscriptResult(segments=[Segment(start_seconds=0, text=said)])
    body = parts_of(document(slides=slides, recording=recording, warnings=[f"x {warning}"]))[1]
    expected = ["Slides"] * bool(slides) + ["Transcript", "Links", "Warnings"]
    assert [title for _, title in headings_in(body)][1:] == expected
    tokens = [token for block in MarkdownIt("commonmark").parse(body) for token in block.children or []]
    targets = [token.attrs["src"] for token in tokens if token.type == "image"]
    assert targets == [f"assets/slide-{number:03}.jpg" for number in range(1, len(texts) + 1)]
    assert not any(token.type == "html_inline" for token in tokens)


def test_a_long_text_on_a_slide_is_shortened_in_its_description() -> None:
    body = document(slides=[slide(1, "word " * 500)])
    assert len(re.findall("word", body)) <= 50
    assert "word …](assets/slide-001.jpg)" in body


def test_what_is_unknown_leaves_no_gap() -> None:
    text = document(make_parameters(speakers=None, day=None, starttime=None, endtime=None))
    assert "\n# Ledgers that never forget\n\nExampleConf 2025 · Databases-3\n\nThe text.\n" in text
    assert "\n\n\n" not in text


def test_the_language_is_the_pages_own_where_it_says_so() -> None:
    assert parts_of(document(of_page=page(language="fr")))[0]["language"] == "fr"
    assert parts_of(document(make_parameters(source_language="nl"), of_page=page(language=None)))[0]["language"] == "nl"


def test_moments_are_told_like_on_a_player() -> None:
    assert [format_timecode(seconds) for seconds in (0, 75.9, 3_700)] == ["0:00", "1:15", "1:01:40"]


def test_a_german_document_has_german_headings() -> None:
    text = document(of_page=page(language="de-AT"), slides=[slide(1, "Übung")], warnings=["Alas."])
    headings = [words for _, words in headings_in(parts_of(text)[1])]
    assert headings[1:] == ["Folien", "Transkript", "Links", "Hinweise"]
    assert "![Folie 1: Übung]" in text
    assert "[Vortragsseite](" in text
