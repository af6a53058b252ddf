"""session: the step `transcript`, 20 to 60 percent of the job. What cannot be had is a warning, never a failure."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from jobledger.workers.processor import JSON, ProcessorError, SavedFile
from jobledger.workers.processors.session.document import AUDIO_FILE_NAME, TranscriptResult, primary_subtag
from jobledger.workers.processors.session.openai_api import OpenAiClient, OpenAiError, read_api_key
from jobledger.workers.processors.session.speech_api import transcribe
from jobledger.workers.processors.session.step_context import FETCH_TIMEOUT_FRACTION, Cancelled, StepContext
from jobledger.workers.processors.session.transcript import (
    ExtractionProgress,
    Segment,
    TranscriptUnavailable,
    extract_audio,
    format_timecode,
    reject_html_type,
    transcribe_locally,
)
from jobledger.workers.processors.session.video_sites import is_video_site_url, resolve_media_url

MAX_CHARACTERS = 1_000_000


def inputs(work: StepContext) -> dict[str, JSON]:
    """Return all that the transcript depends on: with the same inputs the step is not repeated."""
    return {
        "url": work.session.video_url,
        "max_bytes": work.settings.video_max_bytes,
        "max_audio_seconds": work.settings.max_audio_seconds,
        "backend": work.settings.transcription.backend,
        "endpoint": work.settings.transcription.url,
        "model": work.settings.transcription.model,
        "chunk_seconds": work.settings.transcription.chunk_seconds,
        "language": primary_subtag(work.session.source_language),
        "keep_audio": work.settings.keep_audio,
    }


@dataclass(slots=True)
class _PartialResult:
    """What is known even if time runs out."""

    extraction: ExtractionProgress | None = None
    segments: list[Segment] = field(default_factory=list)
    audio: SavedFile | None = None


async def run(work: StepContext) -> JSON:
    """Fetch the recording, take out its sound, and write down what is said where a backend is configured."""
    so_far = _PartialResult()
    reason = await _run_and_explain(work, so_far)
    if reason and work.session.video_url and not so_far.segments:
        await work.warn(reason)
    await work.job.report_progress(60, "The recording is done")
    return TranscriptResult(
        audio_seconds=so_far.extraction.seconds if so_far.extraction else None,
        segments=so_far.segments,
        missing_reason=reason,
        audio=so_far.audio,
        warnings=work.warnings,
    ).model_dump(mode="json")


async def _run_and_explain(work: StepContext, so_far: _PartialResult) -> str | None:
    """Do the step; the answer is why there is no transcript, or None."""
    if work.session.video_url is None:
        return "There is no transcript. No recording was given."
    if work.settings.transcription.backend == "none" and not work.settings.keep_audio:
        # Nobody would listen, and it may be gigabytes.
        return "There is no transcript. No transcription is configured. The recording was not downloaded."
    try:
        async with asyncio.timeout(work.settings.transcript_timeout_seconds):
            await _fetch_and_transcribe(work, work.session.video_url, so_far)
    except Cancelled:
        raise
    except TimeoutError:
        limit = f"{work.settings.transcript_timeout_seconds:g} seconds"
        if not so_far.segments:
            return f"There is no transcript. The recording could not be worked through within {limit}."
        await work.warn(f"The transcript is incomplete: the recording could not be worked through within {limit}.")
    except (ProcessorError, TranscriptUnavailable) as error:
        return f"There is no transcript. {error}"
    if work.settings.transcription.backend == "none":
        return "There is no transcript. No transcription is configured."
    return None if so_far.segments else "There is no transcript. No words were recognised in the recording."


async def _fetch_and_transcribe(work: StepContext, url: str, so_far: _PartialResult) -> None:
    video, audio = work.job.scratch_dir / "video", work.job.scratch_dir / "audio.wav"
    await work.job.report_progress(20, "Fetching the recording")
    if is_video_site_url(url, work.settings.video_sites):
        seconds = work.settings.read_timeout_seconds
        scratch = work.job.scratch_dir / "yt-dlp"
        url = await resolve_media_url(url, seconds=seconds, scratch=scratch, fetcher=work.fetcher)
    fetched = await work.fetcher.fetch(
        url,
        max_bytes=work.settings.video_max_bytes,
        timeout_seconds=work.settings.transcript_timeout_seconds * FETCH_TIMEOUT_FRACTION,
        target=video,
        check_media_type=reject_html_type,
        on_progress=work.report_download_progress("Fetching the recording", 20, 35),
    )
    await work.log_fetch(fetched)
    await _extract(work, video, audio, so_far)
    video.unlink()
    try:
        await _transcribe(work, audio, so_far)
    finally:
        if work.settings.keep_audio:
            so_far.audio = await work.job.save(work.result_layout.asset_path(AUDIO_FILE_NAME), audio, "audio/wav")


async def _extract(work: StepContext, video: Path, audio: Path, so_far: _PartialResult) -> None:
    await work.job.report_progress(35, "Taking out the sound")
    async with work.iterate_in_thread(
        extract_audio(video, audio, max_seconds=work.settings.max_audio_seconds)
    ) as steps:
        async for heard in steps:
            so_far.extraction = heard
            share = min(1.0, heard.seconds / heard.total_seconds) if heard.total_seconds else 0.5
            await work.job.report_progress(35 + 10 * share, f"Taking out the sound: {format_timecode(heard.seconds)}")
    if so_far.extraction:
        await work.job.log("info", f"Extracted {format_timecode(so_far.extraction.seconds)} of sound")
        if so_far.extraction.damage:
            await work.warn(f"The recording is not complete: {so_far.extraction.damage}.")


async def _transcribe_by_api(work: StepContext, audio: Path, so_far: _PartialResult) -> None:
    chosen, length = work.settings.transcription, so_far.extraction.seconds if so_far.extraction else 0.0
    missing: list[str] = []
    try:
        api = OpenAiClient(
            chosen.url or "", key=read_api_key(chosen.api_key_file), timeout_seconds=chosen.timeout_seconds
        )
        try:
            parts = transcribe(
                api,
                audio,
                model=chosen.model or "",
                language=primary_subtag(work.session.source_language),
                chunk_seconds=chosen.chunk_seconds,
                max_concurrent=chosen.max_concurrent,
            )
            async with aclosing(parts):
                async for part in parts:
                    work.raise_if_cancelled()
                    if part.error is not None:
                        missing.append(
                            f"{format_timecode(part.start_seconds)}–{format_timecode(part.end_seconds)} ({part.error})"
                        )
                    so_far.segments += part.segments
                    share = min(1.0, part.end_seconds / length) if length else 0.5
                    waited = f", waiting for {part.waited_seconds:.0f} s" if part.waited_seconds else ""
                    done = f"Listening: {format_timecode(part.end_seconds)} of {format_timecode(length)}{waited}"
                    await work.job.report_progress(45 + 15 * share, done)
        finally:
            await api.aclose()
    except OpenAiError as failed:
        raise TranscriptUnavailable(f"The transcription cannot be used: {failed}.") from failed
    if missing and so_far.segments:
        await work.warn(f"The transcript is incomplete. Missing: {'; '.join(missing[:5])}.")
    elif missing:
        raise TranscriptUnavailable(f"The transcription failed: {missing[0]}.")
    await work.job.log("info", f"Transcribed {len(so_far.segments)} passages with {chosen.model}")


async def _transcribe(work: StepContext, audio: Path, so_far: _PartialResult) -> None:
    backend = work.settings.transcription.backend
    if backend == "none":
        return
    await work.job.report_progress(45, "Listening")
    if backend == "openai":
        await _transcribe_by_api(work, audio, so_far)
        return
    length = so_far.extraction.seconds if so_far.extraction else 0.0
    characters = 0
    async with work.iterate_in_thread(transcribe_locally(audio, backend=backend)) as segments:
        async for segment in segments:
            characters += len(segment.text)
            if characters > MAX_CHARACTERS:
                await work.warn(f"The transcript is cut after {MAX_CHARACTERS:,} characters.")
                break
            so_far.segments.append(segment)
            share = min(1.0, segment.start_seconds / length) if length else 0.5
            await work.job.report_progress(
                45 + 15 * share, f"Listening: {format_timecode(segment.start_seconds)} of {format_timecode(length)}"
            )
    await work.job.log("info", f"Transcribed {len(so_far.segments)} passages with {backend}")
