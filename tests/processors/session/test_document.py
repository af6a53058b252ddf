"""The Markdown document of a session: its layout, and its validity for any values."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from jobledger.workers.processor import SavedFile
from jobledger.workers.processors.session import SessionParameters
from jobledger.workers.processors.session.document import TranscriptResult, read_built_in_template, render_document
from jobledger.workers.processors.session.page import PageText
from jobledger.workers.processors.session.pdf_rendering import Slide
from jobledger.workers.processors.session.transcript import Chapter, Segment, format_timecode
from tests.processors.session.fixtures import (
    load_samples,
    make_content,
    make_page_text,
    make_parameters,
    split_front_matter,
    without_deadline,
)

FRONT_MATTER_FIELDS = ["tags", "title", "subtitle", "intro", "speaker", "date", "place"]
FRONT_MATTER_FIELDS += ["track", "topic", "url", "video_url", "language", "job_id"]


def make_slide(number: int, text: str) -> Slide:
    def make_file(name: str) -> SavedFile:
        return SavedFile(path=f"e/t/s/assets/{name}", sha256="0" * 64, size=1, media_type="image/jpeg")

    image = make_file(f"slide-{number:03}.jpg")
    return Slide(**image.model_dump(), number=number, text=text, thumbnail=make_file(f"slide-{number:03}-thumb.jpg"))


def render(
    parameters: SessionParameters | None = None,
    *,
    page_text: PageText | None = None,
    transcript: TranscriptResult | None = None,
    slides: list[Slide] | None = None,
    warnings: list[str] | None = None,
) -> str:
    return render_document(
        parameters=parameters or make_parameters(),
        job_id="job-1",
        content=make_content(parameters or make_parameters(), page_text or make_page_text(), transcript, slides),
        warnings=warnings or [],
        template=read_built_in_template(),
    )


def find_headings(body: str) -> list[tuple[str, str]]:
    tokens = MarkdownIt("commonmark").parse(body)
    return [
        (token.tag, "".join(child.content for child in tokens[number + 1].children or []))
        for number, token in enumerate(tokens)
        if token.type == "heading_open"
    ]


def test_chapter_after_last_segment_is_shown() -> None:
    transcript = TranscriptResult(
        segments=[Segment(start_seconds=0, text="Hello.")],
        chapters=[Chapter(start_seconds=0, title="Begin"), Chapter(start_seconds=3600, title="Questions")],
    )
    document = render(transcript=transcript)
    assert "### Begin\n\n**0:00** Hello.\n\n### Questions\n\n**1:00:00**\n" in document


def test_render_document_with_all_parts_gives_expected_markdown() -> None:
    text = render(
        make_parameters(
            video_url="https://video.conference.example/ledgers.webm",
            attachments_url="https://conference.example/ledgers (1).pdf".replace(" ", "%20"),
        ),
        page_text=make_page_text(
            markdown="It begins.\n\n## Agenda\n\n1. History", keywords=["databases"], intro="In short."
        ),
        transcript=TranscriptResult(
            audio_seconds=130,
            segments=[
                Segment(start_seconds=0, text="good morning"),
                Segment(start_seconds=20, text="and welcome"),
                Segment(start_seconds=75, text="let us begin"),
            ],
        ),
        slides=[make_slide(1, "Ledgers\nthat never [forget]"), make_slide(2, "")],
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
def test_front_matter_round_trips_any_text(field: str, value: str) -> None:
    check_front_matter(make_parameters(**{field: value, "speakers": [value]}))


@pytest.mark.parametrize("value", NASTY_VALUES)
def test_nasty_values_round_trip_and_stay_text(value: str) -> None:
    parameters = make_parameters(session=value, event=value, track=value, day=value, speakers=[value, value])
    body = check_front_matter(parameters)
    assert find_headings(body)[0] == ("h1", " ".join(value.split()))
    assert [title for tag, title in find_headings(body)[1:]] == ["Transcript", "Links"]
    rendered = MarkdownIt("commonmark").render(body)
    assert "<script" not in rendered
    assert "<img" not in rendered
    assert rendered.count("<a ") == 1


def test_front_matter_round_trips_all_samples() -> None:
    for sample in load_samples():
        check_front_matter(SessionParameters.model_validate(sample))


def check_front_matter(parameters: SessionParameters) -> str:
    front_matter, body = split_front_matter(render(parameters, page_text=make_page_text(intro=parameters.session)))
    assert list(front_matter) == FRONT_MATTER_FIELDS
    assert front_matter["title"] == front_matter["intro"] == parameters.session
    assert front_matter["speaker"] == (parameters.speakers or [])
    assert front_matter["date"] == parameters.day
    assert front_matter["track"] == parameters.track
    assert front_matter["url"] == parameters.url
    assert front_matter["video_url"] == parameters.video_url
    assert {parameters.event, parameters.track} == set(front_matter["tags"])
    return body


@without_deadline
@given(st.lists(st.text(), max_size=3), st.text(), st.text())
@example(["- x\n# y"], "]( <b>", "`")
def test_slides_speech_and_warnings_never_change_structure(texts: list[str], speech: str, warning: str) -> None:
    slides = [make_slide(number, text) for number, text in enumerate(texts, 1)]
    transcript = TranscriptResult(segments=[Segment(start_seconds=0, text=speech)])
    body = split_front_matter(render(slides=slides, transcript=transcript, warnings=[f"x {warning}"]))[1]
    expected = ["Slides"] * bool(slides) + ["Transcript", "Links", "Warnings"]
    assert [title for _, title in find_headings(body)][1:] == expected
    tokens = [token for block in MarkdownIt("commonmark").parse(body) for token in block.children or []]
    targets = [token.attrs["src"] for token in tokens if token.type == "image"]
    assert targets == [f"assets/slide-{number:03}.jpg" for number in range(1, len(texts) + 1)]
    assert not any(token.type == "html_inline" for token in tokens)


def test_long_slide_text_is_shortened_in_image_description() -> None:
    body = render(slides=[make_slide(1, "word " * 500)])
    assert len(re.findall("word", body)) <= 50
    assert "word …](assets/slide-001.jpg)" in body


def test_missing_values_leave_no_empty_lines() -> None:
    text = render(make_parameters(speakers=None, day=None, starttime=None, endtime=None))
    assert "\n# Ledgers that never forget\n\nExampleConf 2025 · Databases-3\n\nThe text.\n" in text
    assert "\n\n\n" not in text


def test_language_of_page_takes_precedence_over_source_language() -> None:
    parameters = make_parameters(source_language="nl")
    for language, expected in (("fr", "fr"), (None, "nl")):
        document = render(parameters, page_text=make_page_text(language=language))
        assert split_front_matter(document)[0]["language"] == expected


def test_format_timecode_gives_minutes_and_hours() -> None:
    assert [format_timecode(seconds) for seconds in (0, 75.9, 3_700)] == ["0:00", "1:15", "1:01:40"]


def test_german_document_has_german_headings() -> None:
    text = render(page_text=make_page_text(language="de-AT"), slides=[make_slide(1, "Übung")], warnings=["Hinweis."])
    headings = [title for _, title in find_headings(split_front_matter(text)[1])]
    assert headings[1:] == ["Folien", "Transkript", "Links", "Hinweise"]
    assert "![Folie 1: Übung]" in text
    assert "[Vortragsseite](" in text


def test_german_document_says_once_in_german_why_there_is_no_transcript() -> None:
    reason = "There is no transcript. No recording was given."
    text = render(
        page_text=make_page_text(language="de"), transcript=TranscriptResult(missing_reason=reason), warnings=[reason]
    )
    assert text.count("Es gibt kein Transkript. Es ist keine Aufzeichnung angegeben.") == 1
    assert "There is" not in text
    assert "## Hinweise" not in text


def test_details_of_event_are_escaped_only_where_needed() -> None:
    assert "FOSDEM · 1. Raum \\* · 5. November" in render(
        make_parameters(event="FOSDEM", track="1. Raum *", day="5. November", starttime=None, endtime=None)
    )


def make_transcript(*segments: tuple[float, str], chapters: Sequence[tuple[float, str]] = ()) -> TranscriptResult:
    return TranscriptResult(
        segments=[Segment(start_seconds=start, text=text) for start, text in segments],
        chapters=[Chapter(start_seconds=start, title=title) for start, title in chapters],
    )


def list_paragraphs(document: str) -> list[str]:
    return re.findall(r"^(?:\*\*(?=\d)|### ).*$", document, re.MULTILINE)


def test_paragraph_of_transcript_ends_with_sentence() -> None:
    long = "a long text " * 12
    segments = [
        (0, f"{long}one"),
        (25, f"{long}two"),
        (50, "and"),
        (70, "ends here."),
        (80, f"{long}three"),
        (175, f"{long}four"),
    ]
    starts = [paragraph.split()[0] for paragraph in list_paragraphs(render(transcript=make_transcript(*segments)))]
    assert starts == ["**0:00**", "**1:20**", "**2:55**"]


def test_short_rest_belongs_to_paragraph_before() -> None:
    long = "a long text " * 12
    segments = [
        (0, f"{long}."),
        (25, "So."),
        (50, "And."),
        (65, "Bye."),
        (70, f"{long}."),
        (95, "So."),
        (120, "And."),
        (135, "End."),
    ]
    document = render(transcript=make_transcript(*segments, chapters=[(0, "One"), (70, "Two")]))
    assert [paragraph.split()[:2][0] for paragraph in list_paragraphs(document)] == [
        *("###", "**0:00**", "###", "**1:10**"),
    ]
    assert ". Bye." in document
    assert ". End." in document


def test_language_of_transcript_is_named_in_language_of_document() -> None:
    content = make_content(make_parameters(), make_page_text(language="de"), make_transcript((0, "Hello.")))
    content.enrichment.transcript_language = "en-US"
    text = render_document(
        parameters=make_parameters(), job_id="job-1", content=content, warnings=[], template=read_built_in_template()
    )
    assert "\nSprache: Englisch\n" in text


def test_chapters_are_translated_with_transcript() -> None:
    content = make_content(
        make_parameters(), make_page_text(language="de"), make_transcript((0, "Hello."), chapters=[(0, "Start")])
    )
    content.enrichment.chapter_titles = ["Beginn"]
    text = render_document(
        parameters=make_parameters(), job_id="job-1", content=content, warnings=[], template=read_built_in_template()
    )
    assert ("h3", "Beginn") in find_headings(split_front_matter(text)[1])
