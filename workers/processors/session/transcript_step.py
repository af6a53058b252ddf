"""The step `transcript`: fetch and transcribe the recording (progress 20 to 60 percent). Problems are only warnings."""

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


def inputs(ctx: StepContext) -> dict[str, JSON]:
    """Return the inputs of the step. The step is not repeated with the same inputs."""
    return {
        "url": ctx.session.video_url,
        "max_bytes": ctx.settings.video_max_bytes,
        "max_audio_seconds": ctx.settings.max_audio_seconds,
        "backend": ctx.settings.transcription.backend,
        "endpoint": ctx.settings.transcription.url,
        "model": ctx.settings.transcription.model,
        "chunk_seconds": ctx.settings.transcription.chunk_seconds,
        "language": primary_subtag(ctx.session.source_language),
        "keep_audio": ctx.settings.keep_audio,
    }


@dataclass(slots=True)
class _PartialResult:
    """The part of the result that is kept after a timeout."""

    extraction: ExtractionProgress | None = None
    segments: list[Segment] = field(default_factory=list)
    audio: SavedFile | None = None


async def run(ctx: StepContext) -> JSON:
    """Fetch the recording, extract its audio, and transcribe it if a backend is configured."""
    so_far = _PartialResult()
    reason = await _run_and_explain(ctx, so_far)
    if reason and ctx.session.video_url and not so_far.segments:
        await ctx.warn(reason)
    await ctx.job.report_progress(60, "Recording processed")
    return TranscriptResult(
        audio_seconds=so_far.extraction.seconds if so_far.extraction else None,
        segments=so_far.segments,
        missing_reason=reason,
        audio=so_far.audio,
        warnings=ctx.warnings,
    ).model_dump(mode="json")


async def _run_and_explain(ctx: StepContext, so_far: _PartialResult) -> str | None:
    """Run the step and return why there is no transcript, or None if there is one."""
    if ctx.session.video_url is None:
        return "There is no transcript. No recording was given."
    if ctx.settings.transcription.backend == "none" and not ctx.settings.keep_audio:
        return "There is no transcript. Transcription is not configured. The recording was not downloaded."
    try:
        async with asyncio.timeout(ctx.settings.transcript_timeout_seconds):
            await _fetch_and_transcribe(ctx, ctx.session.video_url, so_far)
    except Cancelled:
        raise
    except TimeoutError:
        limit = f"{ctx.settings.transcript_timeout_seconds:g} seconds"
        if not so_far.segments:
            return f"There is no transcript. The recording was not processed within {limit}."
        await ctx.warn(f"The transcript is incomplete: the recording was not processed within {limit}.")
    except (ProcessorError, TranscriptUnavailable) as error:
        return f"There is no transcript. {error}"
    if ctx.settings.transcription.backend == "none":
        return "There is no transcript. Transcription is not configured."
    return None if so_far.segments else "There is no transcript. No speech was recognized in the recording."


async def _fetch_and_transcribe(ctx: StepContext, url: str, so_far: _PartialResult) -> None:
    video, audio = ctx.job.scratch_dir / "video", ctx.job.scratch_dir / "audio.wav"
    await ctx.job.report_progress(20, "Fetching the recording")
    if is_video_site_url(url, ctx.settings.video_sites):
        seconds = ctx.settings.read_timeout_seconds
        scratch = ctx.job.scratch_dir / "yt-dlp"
        url = await resolve_media_url(url, seconds=seconds, scratch=scratch, fetcher=ctx.fetcher)
    response = await ctx.fetcher.fetch(
        url,
        max_bytes=ctx.settings.video_max_bytes,
        timeout_seconds=ctx.settings.transcript_timeout_seconds * FETCH_TIMEOUT_FRACTION,
        target=video,
        check_media_type=reject_html_type,
        on_progress=ctx.report_download_progress("Fetching the recording", 20, 35),
    )
    await ctx.log_fetch(response)
    await _extract(ctx, video, audio, so_far)
    video.unlink()
    try:
        await _transcribe(ctx, audio, so_far)
    finally:
        if ctx.settings.keep_audio:
            so_far.audio = await ctx.job.save(ctx.result_layout.asset_path(AUDIO_FILE_NAME), audio, "audio/wav")


async def _extract(ctx: StepContext, video: Path, audio: Path, so_far: _PartialResult) -> None:
    await ctx.job.report_progress(35, "Extracting the audio")
    async with ctx.iterate_in_thread(extract_audio(video, audio, max_seconds=ctx.settings.max_audio_seconds)) as steps:
        async for progress in steps:
            so_far.extraction = progress
            fraction = min(1.0, progress.seconds / progress.total_seconds) if progress.total_seconds else 0.5
            await ctx.job.report_progress(
                35 + 10 * fraction, f"Extracting the audio: {format_timecode(progress.seconds)}"
            )
    if so_far.extraction:
        await ctx.job.log("info", f"Extracted {format_timecode(so_far.extraction.seconds)} of audio")
        if so_far.extraction.damage:
            await ctx.warn(f"The recording is incomplete: {so_far.extraction.damage}.")


async def _transcribe_by_api(ctx: StepContext, audio: Path, so_far: _PartialResult) -> None:
    settings, length = ctx.settings.transcription, so_far.extraction.seconds if so_far.extraction else 0.0
    missing: list[str] = []
    try:
        api = OpenAiClient(
            settings.url or "", key=read_api_key(settings.api_key_file), timeout_seconds=settings.timeout_seconds
        )
        try:
            chunks = transcribe(
                api,
                audio,
                model=settings.model or "",
                language=primary_subtag(ctx.session.source_language),
                chunk_seconds=settings.chunk_seconds,
                max_concurrent=settings.max_concurrent,
            )
            async with aclosing(chunks):
                async for chunk in chunks:
                    ctx.raise_if_cancelled()
                    if chunk.error is not None:
                        start, end = format_timecode(chunk.start_seconds), format_timecode(chunk.end_seconds)
                        missing.append(f"{start}–{end} ({chunk.error})")
                    so_far.segments += chunk.segments
                    fraction = min(1.0, chunk.end_seconds / length) if length else 0.5
                    waiting = f", waiting for {chunk.waited_seconds:.0f} s" if chunk.waited_seconds else ""
                    done = f"Transcribing: {format_timecode(chunk.end_seconds)} of {format_timecode(length)}{waiting}"
                    await ctx.job.report_progress(45 + 15 * fraction, done)
        finally:
            await api.aclose()
    except OpenAiError as error:
        raise TranscriptUnavailable(f"The transcription API failed: {error}.") from error
    if missing and so_far.segments:
        await ctx.warn(f"The transcript is incomplete. Missing: {'; '.join(missing[:5])}.")
    elif missing:
        raise TranscriptUnavailable(f"The transcription failed: {missing[0]}.")
    await ctx.job.log("info", f"Transcribed {len(so_far.segments)} segments with {settings.model}")


async def _transcribe(ctx: StepContext, audio: Path, so_far: _PartialResult) -> None:
    backend = ctx.settings.transcription.backend
    if backend == "none":
        return
    await ctx.job.report_progress(45, "Transcribing")
    if backend == "openai":
        await _transcribe_by_api(ctx, audio, so_far)
        return
    length = so_far.extraction.seconds if so_far.extraction else 0.0
    characters = 0
    async with ctx.iterate_in_thread(transcribe_locally(audio, backend=backend)) as segments:
        async for segment in segments:
            characters += len(segment.text)
            if characters > MAX_CHARACTERS:
                await ctx.warn(f"The transcript is cut after {MAX_CHARACTERS:,} characters.")
                break
            so_far.segments.append(segment)
            fraction = min(1.0, segment.start_seconds / length) if length else 0.5
            await ctx.job.report_progress(
                45 + 15 * fraction,
                f"Transcribing: {format_timecode(segment.start_seconds)} of {format_timecode(length)}",
            )
    await ctx.job.log("info", f"Transcribed {len(so_far.segments)} segments with {backend}")
