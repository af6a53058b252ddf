"""The step `enrich`: summary, tags and translation (progress 80 to 90 percent). Problems are only warnings.

The summary and each piece of a translation are separate steps. An attempt after a crash, and a restart after a
failure of the API, therefore pays only for what is missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from pydantic import BaseModel

from jobledger.workers.processor import JSON
from jobledger.workers.processors.session import document, enrichment
from jobledger.workers.processors.session.document import get_primary_subtag
from jobledger.workers.processors.session.enrichment import Glossary, Summary
from jobledger.workers.processors.session.language import detect_language
from jobledger.workers.processors.session.language_model import LanguageModel, UnusableAnswer
from jobledger.workers.processors.session.markdown_sections import Section, join_sections, split_markdown
from jobledger.workers.processors.session.openai_api import OpenAiClient, OpenAiError
from jobledger.workers.processors.session.page import PageText
from jobledger.workers.processors.session.step_context import StepContext, compute_json_digest
from jobledger.workers.processors.session.transcript import format_timecode
from jobledger.workers.processors.session.translation_checks import count_letters, extract_words, is_same_language
from jobledger.workers.processors.session.translator import (
    PartProgress,
    Text,
    TranslationAbandoned,
    Translator,
    compute_piece_size,
    make_batches,
)

MAX_PROMPT_CHARACTERS: Final = 30_000
"""Maximum length of the page text, and of the transcript, in the prompt for the summary."""
_MIN_PROMPT_CHARACTERS: Final = 1_000
_MAX_WARNED_PROBLEMS: Final = 5
_PART_NAMES: Final = {"page": "text was", "transcript": "transcript was", "slides": "slide texts were"}
_DETECTED_CHARACTERS: Final = 600
"""Size of the sections in which passages in another language are found if the page is in the target language."""
_MIN_DETECTED_LETTERS: Final = 200
"""The language of a shorter text is the one that the page or the job declares."""


class _StoredSummary(BaseModel):
    """The output of the checkpoint of the summary. `problem` says why there is none."""

    summary: Summary | None = None
    problem: str | None = None


@dataclass(slots=True)
class _Work:
    """The texts to translate, and what is translated so far. The rest stays as it is if the step ends early.

    Attributes:
        language: The language of the page.
        spoken_language: The language of the transcript.
        sections: All sections of the page.
        texts: The sections, translated as far as possible.
        pending: Numbers of the sections to translate.
        batches: Texts to translate by part of the document.
        translations: Translations of these texts by their originals.
        progress: How much is translated by part of the document.
        too_long: Number of characters of parts that are too long to be translated.
    """

    language: str
    spoken_language: str
    sections: list[Section]
    texts: list[str]
    pending: list[int] = field(default_factory=list)
    batches: dict[str, list[list[Text]]] = field(default_factory=dict)
    translations: dict[str, str] = field(default_factory=dict)
    progress: dict[str, PartProgress] = field(default_factory=dict)
    too_long: dict[str, int] = field(default_factory=dict)


def build_inputs(
    ctx: StepContext, page: PageText, transcript: document.TranscriptResult, slides: document.SlidesResult
) -> dict[str, JSON]:
    """Return the inputs of the step, without API key and timeouts. The step is not repeated with the same inputs."""
    settings = ctx.settings.language_model
    has_model = settings.backend != "none"
    spoken = [segment.text for segment in transcript.segments]
    parts = _get_translated_parts(ctx)
    shown = document.list_slide_texts(slides) if has_model and "slides" in parts else []
    return {
        "content": compute_json_digest([page.model_dump(mode="json"), spoken, _list_chapters(transcript), shown]),
        "title": ctx.parameters.session,
        "names": [ctx.parameters.event, ctx.parameters.track, *(ctx.parameters.speakers or ())],
        "source_language": ctx.parameters.source_language,
        "target_language": ctx.parameters.target_language,
        "prompt_version": enrichment.PROMPT_VERSION,
        **settings.model_dump(mode="json", exclude={"api_key_file", "timeout_seconds"}),
        "translate": list(parts),
    }


async def run(
    ctx: StepContext, page: PageText, transcript: document.TranscriptResult, slides: document.SlidesResult
) -> document.EnrichmentResult:
    """Summarize and translate the texts if a language model is configured."""
    work = await asyncio.to_thread(_prepare, ctx, page, transcript, slides)
    result = document.EnrichmentResult(
        language=work.language, transcript_language=work.spoken_language, markdown=page.markdown
    )
    result.warnings = ctx.warnings
    if ctx.settings.language_model.backend == "none":
        if work.pending or "page" in work.too_long:  # other parts are translated only by a model
            await ctx.warn(f"{_describe_untranslated(ctx, work, 'page')} No language model is configured.")
        return result
    await ctx.job.report_progress(80, "Summarizing")
    try:
        async with (
            asyncio.timeout(ctx.settings.enrich_timeout_seconds),
            OpenAiClient(ctx.settings.language_model) as api,
        ):
            model = LanguageModel(ctx.job, ctx.settings.language_model, api)
            await ctx.run_until_cancelled(_enrich(ctx, model, work, result, transcript))
    except TimeoutError:
        limit = f"{ctx.settings.enrich_timeout_seconds:g} seconds"
        message = f"The language model did not finish within {limit}. Summary or translation may be missing."
        await ctx.warn(message, repeat_on_restart=True)
    except OpenAiError as error:
        await ctx.warn(f"The language model API failed: {error}.", repeat_on_restart=True)
    except TranslationAbandoned:
        await ctx.job.log("info", "The model translates nothing. The rest of the text is not sent.")
    await _warn_about_untranslated(ctx, work)
    _apply_translations(ctx, work, result, transcript)
    await ctx.job.report_progress(90, "Text enriched")
    return result


def _get_translated_parts(ctx: StepContext) -> Sequence[str]:
    """Return which parts of the document are translated: the parameter of the job, or else the setting."""
    chosen = ctx.parameters.translate
    return ctx.settings.language_model.translate if chosen is None else chosen


# What to translate ------------------------------------------------------------------------------------------------


def _prepare(
    ctx: StepContext, page: PageText, transcript: document.TranscriptResult, slides: document.SlidesResult
) -> _Work:
    """Find the languages, and list what is to be translated."""
    settings, target = ctx.settings.language_model, get_primary_subtag(ctx.parameters.target_language)
    parts = _get_translated_parts(ctx)
    language = _find_language(page.markdown, document.resolve_language(ctx.parameters, page))
    spoken = " ".join(segment.text for segment in transcript.segments)
    spoken_language = _find_language(spoken, ctx.parameters.source_language)
    size = compute_piece_size(len(page.markdown), settings.chunk_characters)
    if get_primary_subtag(language) == target:
        size = min(size, _DETECTED_CHARACTERS)
    has_model = settings.backend != "none"
    whole = [Section(page.markdown, "")]  # without a model, the text is only compared with the target language
    sections = split_markdown(page.markdown, size, page.title or "") if has_model else whole
    work = _Work(language, spoken_language, sections, [section.text for section in sections])
    if "page" in parts:
        work.pending = [number for number, section in enumerate(sections) if _is_foreign(section, language, target)]
    if "transcript" in parts and get_primary_subtag(spoken_language) != target:
        texts = [Text(chapter.title, format_timecode(chapter.start_seconds)) for chapter in transcript.chapters]
        texts += [Text(segment.text, format_timecode(segment.start_seconds)) for segment in transcript.segments]
        work.batches["transcript"] = make_batches(texts, settings.chunk_characters)
    if "slides" in parts:
        listed = document.list_slide_texts(slides)
        if get_primary_subtag(_find_language("\n".join(text for _, text in listed), language)) != target:
            texts = [Text(text, f"slide {number}") for number, text in listed]
            work.batches["slides"] = make_batches(texts, settings.chunk_characters)
    _omit_long_parts(work, settings.max_characters)
    return work


def _omit_long_parts(work: _Work, max_characters: int) -> None:
    """Count the pieces of each part to translate. Omit parts that are too long."""
    length = sum(len(section.text) for section in work.sections)
    if work.pending and length > max_characters:
        work.too_long["page"], work.pending = length, []
    work.progress["page"] = PartProgress(len(work.pending))
    for part, batches in work.batches.items():
        length = sum(len(text.text) for batch in batches for text in batch)
        if length > max_characters:
            work.too_long[part], work.batches[part] = length, []
        work.progress[part] = PartProgress(len(work.batches[part]))


def _find_language(markdown: str, declared: str) -> str:
    """Return the language that most of a text is written in. A page may declare the language of its site instead."""
    if count_letters(markdown) < _MIN_DETECTED_LETTERS:
        return declared
    detected = detect_language(markdown)
    return declared if detected is None or is_same_language(detected, get_primary_subtag(declared)) else detected


def _is_foreign(section: Section, language: str, target: str) -> bool:
    """Return whether a section of a page in `language` is to be translated. A page may have several languages."""
    if not section.needs_model:
        return False
    return get_primary_subtag(_find_language(section.text, language)) != target


def _list_chapters(transcript: document.TranscriptResult) -> list[str]:
    return [chapter.title for chapter in transcript.chapters]


# Requests to the model --------------------------------------------------------------------------------------------


async def _enrich(
    ctx: StepContext,
    model: LanguageModel,
    work: _Work,
    result: document.EnrichmentResult,
    transcript: document.TranscriptResult,
) -> None:
    await _summarize(ctx, model, result, transcript)
    total, done = sum(progress.pieces for progress in work.progress.values()), 0
    parameters = ctx.parameters
    names = enrichment.find_names(
        [*(parameters.speakers or []), parameters.event, parameters.track], "\n".join(work.texts)
    )
    glossary = Glossary(parameters.session, names)
    translator = Translator(ctx, model, target=parameters.target_language, glossary=glossary)
    for number in work.pending:
        await ctx.report_part(f"Translating: {done} of {total} chunks", 82, 90, done, total)
        work.texts[number] = await translator.translate_section(work.sections[number], work.progress["page"])
        done += 1
    for part, batches in work.batches.items():
        for batch in batches:
            await ctx.report_part(f"Translating: {done} of {total} chunks", 82, 90, done, total)
            work.translations |= await translator.translate_batch(batch, work.progress[part])
            done += 1


async def _summarize(
    ctx: StepContext, model: LanguageModel, result: document.EnrichmentResult, transcript: document.TranscriptResult
) -> None:
    spoken = " ".join(segment.text for segment in transcript.segments)
    material = result.markdown[:MAX_PROMPT_CHARACTERS], spoken[:MAX_PROMPT_CHARACTERS]
    inputs: dict[str, JSON] = {
        "prompt_version": enrichment.PROMPT_VERSION,
        "material": compute_json_digest([ctx.parameters.session, *material]),
        "language": ctx.parameters.target_language,
        **ctx.settings.language_model.model_dump(mode="json", include={"url", "model", "temperature"}),
    }

    async def generate(_inputs: object) -> _StoredSummary:
        try:
            summary = await _generate_summary(ctx, model, *material)
        except UnusableAnswer as problem:
            if problem.is_temporary:
                raise
            return _StoredSummary(problem=str(problem))
        return _StoredSummary(summary=summary)

    try:
        stored = await ctx.job.step("summarize", generate, inputs)
    except UnusableAnswer as problem:
        await ctx.warn(f"There is no summary: {problem}.", repeat_on_restart=True)
        return
    result.summary = stored.summary
    if stored.problem is not None:
        await ctx.warn(f"There is no summary: {stored.problem}.")


async def _generate_summary(ctx: StepContext, model: LanguageModel, text: str, spoken: str) -> Summary:
    """Return the summary. If the material is too long for the model, use only the beginnings."""
    target, limit = ctx.parameters.target_language, MAX_PROMPT_CHARACTERS
    prompt = enrichment.build_summary_prompt(target)
    parse = partial(enrichment.parse_summary, language=get_primary_subtag(target))
    while True:
        parts = [f"# {ctx.parameters.session}", text[:limit]]
        if spoken:
            parts.append(f"Transcript:\n{spoken[:limit]}")
        try:
            return await model.generate(prompt, "\n\n".join(parts), "summary", parse)
        except UnusableAnswer as problem:
            limit = min(limit, max(len(text), len(spoken))) // 2
            if not problem.is_too_long or limit < _MIN_PROMPT_CHARACTERS:
                raise


# Result -----------------------------------------------------------------------------------------------------------


def _describe_untranslated(ctx: StepContext, work: _Work, part: str) -> str:
    language = work.spoken_language if part == "transcript" else work.language
    return f'The {_PART_NAMES[part]} not translated from "{language}" to "{ctx.parameters.target_language}".'


async def _warn_about_untranslated(ctx: StepContext, work: _Work) -> None:
    """Warn about the parts of the document that are not translated, with the reasons."""
    limit = ctx.settings.language_model.max_characters
    for part, length in work.too_long.items():
        untranslated = _describe_untranslated(ctx, work, part)
        await ctx.warn(f"{untranslated} There are {length:,} characters, more than {limit:,}.")
    for part, progress in work.progress.items():
        missing = progress.pieces - progress.finished + progress.failed
        if not missing:
            continue
        reasons = "; ".join(progress.problems[:_MAX_WARNED_PROBLEMS])
        if len(progress.problems) > _MAX_WARNED_PROBLEMS:
            reasons += f"; and {len(progress.problems) - _MAX_WARNED_PROBLEMS} more"
        if not _has_translation(work, part):
            message = _describe_untranslated(ctx, work, part) + (f" {reasons}." if reasons else "")
            await ctx.warn(message, repeat_on_restart=progress.is_temporary)
            continue
        message = f"The {_PART_NAMES[part]} not translated completely"
        message += f" ({missing} of {progress.pieces} parts)" if progress.pieces > 1 else ""
        message += f": {reasons}." if reasons else "."
        await ctx.warn(message, repeat_on_restart=progress.is_temporary)


def _has_translation(work: _Work, part: str) -> bool:
    if part == "page":
        return any(work.texts[number] != work.sections[number].text for number in work.pending)
    texts = (text.text for batch in work.batches[part] for text in batch)
    return any(work.translations.get(text, text) != text for text in texts)


def _apply_translations(
    ctx: StepContext, work: _Work, result: document.EnrichmentResult, transcript: document.TranscriptResult
) -> None:
    target = ctx.parameters.target_language
    if _has_translation(work, "page"):
        result.markdown = join_sections(work.sections, work.texts)
        if _is_mostly_translated(work):
            result.language = target
    if "transcript" in work.batches and _has_translation(work, "transcript"):
        texts = [segment.text for segment in transcript.segments]
        result.segment_texts = [work.translations.get(text, text) for text in texts]
        result.chapter_titles = [work.translations.get(title, title) for title in _list_chapters(transcript)]
        changed = sum(before != after for before, after in zip(texts, result.segment_texts, strict=True))
        if changed > len(texts) / 2:
            result.transcript_language = target
    if "slides" in work.batches:
        originals = [text.text for batch in work.batches["slides"] for text in batch]
        result.slide_texts = {text: work.translations[text] for text in originals if text in work.translations}


def _is_mostly_translated(work: _Work) -> bool:
    """Return whether most of the text that was to be translated, by letters, is in the target language."""
    letters = {number: count_letters(extract_words(work.texts[number])) for number in work.pending}
    changed = sum(count for number, count in letters.items() if work.texts[number] != work.sections[number].text)
    return changed > sum(letters.values()) / 2
