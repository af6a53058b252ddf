"""Render the result document from the outputs of the other steps. Pure. The template defines the layout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import jinja2
import yaml
from pydantic import BaseModel

from jobledger.ledger.net.url_policy import strip_userinfo
from jobledger.workers.processor import ProcessorError, SavedFile
from jobledger.workers.processors.session.enrichment import Summary
from jobledger.workers.processors.session.page import PageText
from jobledger.workers.processors.session.parameters import SessionParameters
from jobledger.workers.processors.session.pdf_rendering import Slide, make_slide_file_names
from jobledger.workers.processors.session.presentation_files import SlideText
from jobledger.workers.processors.session.result_layout import ResultLayout
from jobledger.workers.processors.session.safe_markdown import escape_link_target, escape_text
from jobledger.workers.processors.session.transcript import Segment, format_timecode

MAX_ALT_CHARACTERS = 250
AUDIO_FILE_NAME = "audio.wav"
PARAGRAPH_SECONDS = 60


class TranscriptResult(BaseModel):
    """Output of the step `transcript`. `missing_reason` says why there is no text."""

    audio_seconds: float | None = None
    segments: list[Segment] = []
    missing_reason: str | None = None
    audio: SavedFile | None = None
    warnings: list[str] = []

    def with_result_paths(self, layout: ResultLayout) -> TranscriptResult:
        """Return a copy whose file has the path of this job."""
        audio = self.audio and self.audio.model_copy(update={"path": layout.build_asset_path(AUDIO_FILE_NAME)})
        return self.model_copy(update={"audio": audio})


class SlidesResult(BaseModel):
    """Output of the step `slides`: images, or the text of a presentation that could not be rendered."""

    slides: list[Slide] = []
    texts: list[SlideText] = []
    warnings: list[str] = []

    def with_result_paths(self, layout: ResultLayout) -> SlidesResult:
        """Return a copy whose files have the paths of this job."""
        return self.model_copy(update={"slides": [_set_paths(slide, layout) for slide in self.slides]})


class EnrichmentResult(BaseModel):
    """Output of the step `enrich`. `markdown` is the text of the page in `language`, translated if possible."""

    language: str
    markdown: str
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
    labels = _load_labels().get(get_primary_subtag(enrichment.language)) or _load_labels()["en"]
    context: dict[str, Any] = {
        "front_matter": render_front_matter(parameters=parameters, job_id=job_id, page=page, enrichment=enrichment),
        "session": parameters,
        "event_details": _format_event_details(parameters),
        "page": page.model_copy(update={"markdown": enrichment.markdown}),
        "labels": labels,
        "slides": [
            {"alt": _format_alt_text(slide, labels["slide"]), "path": _make_relative_path(slide)}
            for slide in slides.slides
        ],
        "slide_texts": [
            {"number": slide.number, "text_lines": slide.text.splitlines(), "note_lines": slide.notes.splitlines()}
            for slide in slides.texts
        ],
        "transcript": {
            "paragraphs": _group_paragraphs(transcript.segments),
            "missing_reason": transcript.missing_reason or "",
        },
        "warnings": warnings,
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


def _format_alt_text(slide: Slide, label: str) -> str:
    """Return the text of the slide as alternative text of its image."""
    words = " ".join(slide.text.split())
    short = words if len(words) <= MAX_ALT_CHARACTERS else words[:MAX_ALT_CHARACTERS].rsplit(" ", 1)[0] + " …"
    return f"{label} {slide.number}: {short}" if short else f"{label} {slide.number}"


def _make_relative_path(file: SavedFile) -> str:
    """Return the path of the file relative to the document, which is next to the folder `assets`."""
    return "/".join(file.path.rsplit("/", 2)[-2:])


def _group_paragraphs(segments: Sequence[Segment]) -> list[dict[str, str]]:
    """Return one paragraph for about each minute, with its start time."""
    groups: list[list[Segment]] = []
    for segment in segments:
        if groups and segment.start_seconds - groups[-1][0].start_seconds < PARAGRAPH_SECONDS:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return [
        {"start": format_timecode(group[0].start_seconds), "text": " ".join(segment.text for segment in group)}
        for group in groups
    ]


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
