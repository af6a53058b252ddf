"""session: everything found out about a talk becomes one Markdown document. Pure; the layout is in the template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import jinja2
import yaml
from pydantic import BaseModel, ConfigDict

from jobledger.ledger.net.url_policy import strip_userinfo
from jobledger.workers.processor import ProcessorError, SavedFile
from jobledger.workers.processors.session.enrichment import Summary
from jobledger.workers.processors.session.page import PageText
from jobledger.workers.processors.session.parameters import SessionParameters
from jobledger.workers.processors.session.pdf_rendering import Slide, slide_file_names
from jobledger.workers.processors.session.presentation_files import SlideText
from jobledger.workers.processors.session.result_layout import ResultLayout
from jobledger.workers.processors.session.safe_markdown import escape_link_target, escape_text
from jobledger.workers.processors.session.template_labels import load_labels
from jobledger.workers.processors.session.transcript import Segment, format_timecode

MAX_ALT_CHARACTERS = 250
AUDIO_FILE_NAME = "audio.wav"
PARAGRAPH_SECONDS = 60


class TranscriptResult(BaseModel):
    """What the step `transcript` found. `reason` says why there is no text, where there is none."""

    model_config = ConfigDict(frozen=True)

    audio_seconds: float | None = None
    segments: list[Segment] = []
    missing_reason: str | None = None
    audio: SavedFile | None = None
    warnings: list[str] = []

    def with_result_paths(self, layout: ResultLayout) -> TranscriptResult:
        """Return the same with its file among the job's own."""
        if self.audio is None:
            return self
        return self.model_copy(
            update={"audio": self.audio.model_copy(update={"path": layout.asset_path(AUDIO_FILE_NAME)})}
        )


class SlidesResult(BaseModel):
    """What the step `slides` found: images, or the words of a presentation that no images could be made of."""

    model_config = ConfigDict(frozen=True)

    slides: list[Slide] = []
    texts: list[SlideText] = []
    warnings: list[str] = []

    def with_result_paths(self, where: ResultLayout) -> SlidesResult:
        """Return the same with its files among the job's own."""
        return self.model_copy(update={"slides": [_placed(slide, where) for slide in self.slides]})


class EnrichmentResult(BaseModel):
    """What the step `enrich` found. `markdown` is the page's text, translated if it could be, in `language`."""

    model_config = ConfigDict(frozen=True)

    language: str
    markdown: str
    summary: Summary | None = None
    warnings: list[str] = []


class SessionContent(NamedTuple):
    """All that was found out about a talk."""

    page: PageText
    enrichment: EnrichmentResult
    transcript: TranscriptResult
    slides: SlidesResult


def _placed(slide: Slide, where: ResultLayout) -> Slide:
    image, small = slide_file_names(slide.number)
    thumbnail = slide.thumbnail.model_copy(update={"path": where.asset_path(small)})
    return slide.model_copy(update={"path": where.asset_path(image), "thumbnail": thumbnail})


def built_in_template() -> str:
    """Return the text of the template that is used when the settings name no other."""
    return files(__package__).joinpath("document.md.j2").read_text(encoding="utf-8")


def render_document(
    *,
    session: SessionParameters,
    job_id: str,
    content: SessionContent,
    warnings: Sequence[str],
    template: str,
) -> str:
    """The whole document.

    Raises:
        ProcessorError: TEMPLATE_ERROR, if the operator's own template cannot be used.
    """
    page, composed, recording, show = content
    labels = load_labels(composed.language)
    context: dict[str, Any] = {
        "front_matter": render_front_matter(session=session, job_id=job_id, page=page, composed=composed),
        "session": session,
        "event_details": _event_details(session),
        "page": page.model_copy(update={"markdown": composed.markdown}),
        "labels": labels,
        "slides": [{"alt": _alt(slide, labels["slide"]), "path": _relative_path(slide)} for slide in show.slides],
        "slide_texts": [
            {"number": slide.number, "text_lines": slide.text.splitlines(), "note_lines": slide.notes.splitlines()}
            for slide in show.texts
        ],
        "transcript": {"paragraphs": _paragraphs(recording.segments), "missing_reason": recording.missing_reason or ""},
        "warnings": warnings,
    }
    try:
        return _environment().from_string(template).render(context)
    except jinja2.TemplateError as error:
        raise ProcessorError(
            "TEMPLATE_ERROR", f"The Markdown template cannot be used: {error}", details={"reason": str(error)}
        ) from error


def render_front_matter(*, session: SessionParameters, job_id: str, page: PageText, composed: EnrichmentResult) -> str:
    """The YAML between the dashes. What only a language model could tell is empty without one."""
    summary = composed.summary
    tags = page.keywords if summary is None else summary.tags
    values = {
        "tags": list(dict.fromkeys([session.event, session.track, *tags])),
        "title": session.session,
        "subtitle": summary.subtitle or None if summary else None,
        "intro": summary.intro if summary else page.intro,
        "speaker": session.speakers or [],
        "date": session.day,
        "place": None,
        "track": session.track,
        "topic": summary.topic or None if summary else None,
        "url": strip_userinfo(session.url),
        "video_url": strip_userinfo(session.video_url) if session.video_url else None,
        "language": composed.language,
        "job_id": job_id,
    }
    # Wide, because folded long values are harder to read, and to edit, than long lines.
    return yaml.dump(values, Dumper=_FrontMatterDumper, allow_unicode=True, sort_keys=False, width=100_000)


class _FrontMatterDumper(yaml.SafeDumper):
    """Safe YAML that also keeps the line ends PyYAML would otherwise fold away (U+0085, U+2028), on one line."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_FrontMatterDumper.add_representer(str, _represent_text)


def resolve_language(session: SessionParameters, page: PageText) -> str:
    """The language the text is in: the page should know, otherwise the client does."""
    return page.language or session.source_language


def primary_subtag(language: str) -> str:
    """Return a language without its region: `de` for `de-AT`."""
    return language.partition("-")[0].lower()


def _event_details(session: SessionParameters) -> list[str]:
    times = "–".join(time for time in (session.starttime, session.endtime) if time)
    day = ", ".join(part for part in (session.day, times) if part)
    return [part for part in (session.event, session.track, day) if part]


def _alt(slide: Slide, label: str) -> str:
    """What stands on the slide, for those who cannot see it and for search."""
    words = " ".join(slide.text.split())
    short = words if len(words) <= MAX_ALT_CHARACTERS else words[:MAX_ALT_CHARACTERS].rsplit(" ", 1)[0] + " …"
    return f"{label} {slide.number}: {short}" if short else f"{label} {slide.number}"


def _relative_path(file: SavedFile) -> str:
    """The file as seen from the Markdown, which lies next to the folder `assets`."""
    return "/".join(file.path.rsplit("/", 2)[-2:])


def _paragraphs(segments: Sequence[Segment]) -> list[dict[str, str]]:
    """One paragraph for about each minute, with the time it begins at."""
    groups: list[list[Segment]] = []
    for segment in segments:
        if groups and segment.start_seconds - groups[-1][0].start_seconds < PARAGRAPH_SECONDS:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return [
        {"start": format_timecode(said[0].start_seconds), "text": " ".join(one.text for one in said)} for said in groups
    ]


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=False,  # noqa: S701  the output is Markdown: values pass through the filters `escape_text` and `link_target`
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"escape_text": escape_text, "link_target": escape_link_target}
    return environment
