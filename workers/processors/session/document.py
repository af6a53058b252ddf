"""Render the result document from the outputs of the other steps. Pure. The template defines the layout."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import jinja2
import yaml
from pydantic import BaseModel

from jobledger.ledger.net.url_policy import strip_userinfo
from jobledger.workers.processor import ProcessorError, SavedFile
from jobledger.workers.processors.session.enrichment import Summary
from jobledger.workers.processors.session.messages import localize_message
from jobledger.workers.processors.session.page import PageText
from jobledger.workers.processors.session.parameters import SessionParameters
from jobledger.workers.processors.session.pdf_rendering import Slide, make_slide_file_names
from jobledger.workers.processors.session.presentation_files import SlideText
from jobledger.workers.processors.session.result_layout import ResultLayout
from jobledger.workers.processors.session.safe_markdown import escape_link_target, escape_text
from jobledger.workers.processors.session.transcript import Chapter, Segment, format_timecode

MAX_ALT_CHARACTERS = 250
AUDIO_FILE_NAME = "audio.wav"
PARAGRAPH_SECONDS = 60
MAX_PARAGRAPH_SECONDS = 90
"""A paragraph ends at the end of a sentence, at the latest after this time."""
MIN_PARAGRAPH_CHARACTERS = 120
"""A shorter rest before a chapter, or at the end, belongs to the paragraph before."""
CHAPTER_TOLERANCE_SECONDS = 5
"""A segment belongs to a chapter that begins at most this much later, and in the first half of the segment."""


class TranscriptResult(BaseModel):
    """Output of the step `transcript`. `missing_reason` says why there is no text."""

    audio_seconds: float | None = None
    segments: list[Segment] = []
    chapters: list[Chapter] = []
    missing_reason: str | None = None
    audio: SavedFile | None = None
    warnings: list[str] = []

    def with_result_paths(self, layout: ResultLayout) -> TranscriptResult:
        """Return a copy whose file has the path of this job."""
        audio = self.audio and self.audio.model_copy(update={"path": layout.build_asset_path(AUDIO_FILE_NAME)})
        return self.model_copy(update={"audio": audio})


class SlidesResult(BaseModel):
    """Output of the step `slides`: images, and the texts of slides without image.

    `merged_pages` is the number of pages that are not shown because the next page shows all of them.
    """

    slides: list[Slide] = []
    texts: list[SlideText] = []
    merged_pages: int = 0
    warnings: list[str] = []

    def with_result_paths(self, layout: ResultLayout) -> SlidesResult:
        """Return a copy whose files have the paths of this job."""
        return self.model_copy(update={"slides": [_set_paths(slide, layout) for slide in self.slides]})


class EnrichmentResult(BaseModel):
    """Output of the step `enrich`.

    Attributes:
        language: The language of most of the page's text, after a translation.
        markdown: The text of the page, translated if possible.
        summary: The summary, if a language model is configured.
        transcript_language: The language of the transcript, after a translation.
        segment_texts: The texts of all segments of the transcript if it is translated, or else empty.
        chapter_titles: The titles of all chapters if the transcript is translated, or else empty.
        slide_texts: Translations of texts and notes of slides, by the original.
    """

    language: str
    markdown: str
    transcript_language: str | None = None
    segment_texts: list[str] = []
    chapter_titles: list[str] = []
    slide_texts: dict[str, str] = {}
    summary: Summary | None = None
    warnings: list[str] = []


class SessionContent(NamedTuple):
    """The outputs of all steps before the document."""

    page: PageText
    enrichment: EnrichmentResult
    transcript: TranscriptResult
    slides: SlidesResult


def _set_paths(slide: Slide, layout: ResultLayout) -> Slide:
    image_name, thumbnail_name = make_slide_file_names(slide.number)
    thumbnail = slide.thumbnail.model_copy(update={"path": layout.build_asset_path(thumbnail_name)})
    return slide.model_copy(update={"path": layout.build_asset_path(image_name), "thumbnail": thumbnail})


def read_built_in_template() -> str:
    """Return the text of the default template."""
    return files(__package__).joinpath("document.md.j2").read_text(encoding="utf-8")


@cache
def _load_labels() -> dict[str, dict[str, str]]:
    """Return the labels of the built-in template by language."""
    labels: dict[str, dict[str, str]] = yaml.safe_load(
        files(__package__).joinpath("labels.yaml").read_text(encoding="utf-8")
    )
    return labels


def render_document(
    *,
    parameters: SessionParameters,
    job_id: str,
    content: SessionContent,
    warnings: Sequence[str],
    template: str,
) -> str:
    """Render the document.

    Raises:
        ProcessorError: TEMPLATE_ERROR if the custom template is invalid.
    """
    page, enrichment, transcript, slides = content
    transcript = _translate_transcript(transcript, enrichment)
    language = get_primary_subtag(enrichment.language)
    labels = _load_labels().get(language) or _load_labels()["en"]
    context: dict[str, Any] = {
        "front_matter": render_front_matter(parameters=parameters, job_id=job_id, page=page, enrichment=enrichment),
        "session": parameters,
        "event_details": _format_event_details(parameters),
        "page": page.model_copy(update={"markdown": enrichment.markdown}),
        "labels": labels,
        "slides": _build_slides(slides, labels, enrichment.slide_texts),
        "merged_pages": slides.merged_pages,
        "transcript": {
            "language_note": _format_language_note(enrichment, labels) if transcript.segments else "",
            "paragraphs": _group_paragraphs(transcript.segments, transcript.chapters),
            "chapters": [
                {"start": format_timecode(chapter.start_seconds), "title": chapter.title}
                for chapter in transcript.chapters
            ],
            "missing_reason": localize_message(transcript.missing_reason or "", language),
        },
        "warnings": [localize_message(warning, language) for warning in warnings],
    }
    try:
        return _make_environment().from_string(template).render(context)
    except jinja2.TemplateError as error:
        raise ProcessorError(
            "TEMPLATE_ERROR", f"The Markdown template is invalid: {error}", details={"reason": str(error)}
        ) from error


def render_front_matter(
    *, parameters: SessionParameters, job_id: str, page: PageText, enrichment: EnrichmentResult
) -> str:
    """Return the YAML between the dashes. Fields of the summary are empty without a language model."""
    summary = enrichment.summary
    tags = page.keywords if summary is None else summary.tags
    values = {
        "tags": list(dict.fromkeys([parameters.event, parameters.track, *tags])),
        "title": parameters.session,
        "subtitle": summary.subtitle or None if summary else None,
        "intro": summary.intro if summary else page.intro,
        "speaker": parameters.speakers or [],
        "date": parameters.day,
        "place": None,
        "track": parameters.track,
        "topic": summary.topic or None if summary else None,
        "url": strip_userinfo(parameters.url),
        "video_url": strip_userinfo(parameters.video_url) if parameters.video_url else None,
        "language": enrichment.language,
        "job_id": job_id,
    }
    # Long values stay on one line: folded values are harder to read and edit.
    return yaml.dump(values, Dumper=_FrontMatterDumper, allow_unicode=True, sort_keys=False, width=100_000)


class _FrontMatterDumper(yaml.SafeDumper):
    """Safe YAML that preserves the line ends U+0085 and U+2028, which PyYAML would fold."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_FrontMatterDumper.add_representer(str, _represent_text)


def resolve_language(parameters: SessionParameters, page: PageText) -> str:
    """Return the language of the text: from the page, or else from the parameters."""
    return page.language or parameters.source_language


def get_primary_subtag(language: str) -> str:
    """Return a language without its region: `de` for `de-AT`."""
    return language.partition("-")[0].lower()


def _format_event_details(parameters: SessionParameters) -> list[str]:
    times = "–".join(time for time in (parameters.starttime, parameters.endtime) if time)
    day = ", ".join(part for part in (parameters.day, times) if part)
    return [part for part in (parameters.event, parameters.track, day) if part]


def list_slide_texts(slides: SlidesResult) -> list[tuple[int, str]]:
    """Return the number and text of everything that the document shows of slides as text. Notes follow their slide."""
    described = [
        (slide.number, text) for slide in slides.slides for text in (_shorten_alt_text(slide.text), slide.notes)
    ]
    written = [(slide.number, text) for slide in slides.texts for text in (slide.text, slide.notes)]
    return [(number, text) for number, text in described + written if text]


def _translate_transcript(transcript: TranscriptResult, enrichment: EnrichmentResult) -> TranscriptResult:
    """Return a copy with the translated texts and chapters, if there are any, at the same times."""
    segments, chapters = transcript.segments, transcript.chapters
    if len(enrichment.segment_texts) == len(segments):
        pairs = zip(segments, enrichment.segment_texts, strict=True)
        segments = [segment.model_copy(update={"text": text}) for segment, text in pairs]
    if len(enrichment.chapter_titles) == len(chapters):
        titles = zip(chapters, enrichment.chapter_titles, strict=True)
        chapters = [chapter.model_copy(update={"title": title}) for chapter, title in titles]
    return transcript.model_copy(update={"segments": segments, "chapters": chapters})


def _format_language_note(enrichment: EnrichmentResult, labels: Mapping[str, str]) -> str:
    """Return a note if the transcript is not in the language of the document."""
    language = enrichment.transcript_language
    if language is None or get_primary_subtag(language) == get_primary_subtag(enrichment.language):
        return ""
    return f"{labels['language']}: {labels.get(f'language_{get_primary_subtag(language)}', language)}"


def _build_slides(
    slides: SlidesResult, labels: Mapping[str, str], translations: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the slides for the template, in their order. Those without image have the lines of their text."""
    images = [
        {
            "number": slide.number,
            "alt": _format_alt_text(slide, labels, translations),
            "path": _make_relative_path(slide),
            "text_lines": [],
            "note_lines": translations.get(slide.notes, slide.notes).splitlines(),
        }
        for slide in slides.slides
    ]
    texts = [
        {
            "number": slide.number,
            "alt": "",
            "path": None,
            "text_lines": translations.get(slide.text, slide.text).splitlines(),
            "note_lines": translations.get(slide.notes, slide.notes).splitlines(),
        }
        for slide in slides.texts
    ]
    return sorted([*images, *texts], key=itemgetter("number"))


def _shorten_alt_text(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= MAX_ALT_CHARACTERS else words[:MAX_ALT_CHARACTERS].rsplit(" ", 1)[0] + " …"


def _format_alt_text(slide: Slide, labels: Mapping[str, str], translations: Mapping[str, str]) -> str:
    """Return the text of the slide as alternative text of its image."""
    short = _shorten_alt_text(slide.text)
    short = _shorten_alt_text(translations.get(short, short))
    label = f"{labels['slide']} {slide.number}"
    if slide.is_recognized:
        label += f" ({labels['recognized']})"
    return f"{label}: {short}" if short else label


def _make_relative_path(file: SavedFile) -> str:
    """Return the path of the file relative to the document, which is next to the folder `assets`."""
    return "/".join(file.path.rsplit("/", 2)[-2:])


def _group_paragraphs(segments: Sequence[Segment], chapters: Sequence[Chapter]) -> list[dict[str, Any]]:
    """Return one paragraph for about each minute: its start time, the chapters that begin before it, and its text.

    Each chapter behind the last segment has an empty paragraph.
    """
    groups: list[tuple[list[str], list[Segment]]] = []
    waiting = deque(chapters)
    for segment, following in pairwise([*segments, *segments[-1:]]):
        titles = []
        half = (following.start_seconds - segment.start_seconds) / 2
        while waiting and waiting[0].start_seconds <= segment.start_seconds + min(half, CHAPTER_TOLERANCE_SECONDS):
            titles.append(waiting.popleft().title)
        if groups and not titles and not _ends_paragraph(groups[-1][1], segment):
            groups[-1][1].append(segment)
        else:
            if titles:
                _merge_short_rest(groups)
            groups.append((titles, [segment]))
    _merge_short_rest(groups)
    return [
        {
            "start": format_timecode(group[0].start_seconds),
            "chapters": titles,
            "text": _join_segments(group),
        }
        for titles, group in groups
    ] + [
        {"start": format_timecode(chapter.start_seconds), "chapters": [chapter.title], "text": ""}
        for chapter in waiting
        if segments
    ]


def _ends_paragraph(paragraph: Sequence[Segment], following: Segment) -> bool:
    """Return whether a paragraph is long enough to end before a segment. Subtitles often end within a sentence."""
    if _is_far(paragraph[-1], following):
        return True
    seconds = following.start_seconds - paragraph[0].start_seconds
    ends_sentence = paragraph[-1].text.rstrip("\"'”“’»«)] ").endswith((".", "!", "?", "…", "。", "！", "？"))
    return seconds >= (PARAGRAPH_SECONDS if ends_sentence else MAX_PARAGRAPH_SECONDS)


def _merge_short_rest(groups: list[tuple[list[str], list[Segment]]]) -> None:
    """Append a short last paragraph to the one before, unless a chapter begins between them."""
    if len(groups) < 2 or groups[-1][0]:
        return
    rest, before = groups[-1][1], groups[-2][1]
    if len(_join_segments(rest)) < MIN_PARAGRAPH_CHARACTERS and not _is_far(before[-1], rest[0]):
        before.extend(rest)
        groups.pop()


def _is_far(segment: Segment, following: Segment) -> bool:
    """Return whether two segments need a paragraph each, so that the time of the second is known."""
    return following.start_seconds - segment.start_seconds >= PARAGRAPH_SECONDS / 2


def _join_segments(segments: Sequence[Segment]) -> str:
    return " ".join(segment.text for segment in segments)


@cache
def _make_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=False,  # noqa: S701  the output is Markdown: values pass through the filters `escape_text` and `link_target`
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"escape_text": escape_text, "link_target": escape_link_target}
    return environment
