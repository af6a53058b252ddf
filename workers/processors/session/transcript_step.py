"""The step `transcript`: fetch and transcribe the recording (progress 20 to 60 percent). Problems are only warnings."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from pathlib import Path

from jobledger.workers.processor import JSON, ProcessorError
from jobledger.workers.processors.session import transcript
from jobledger.workers.processors.session.document import AUDIO_FILE_NAME, TranscriptResult, get_primary_subtag
from jobledger.workers.processors.session.openai_api import OpenAiClient, OpenAiError
from jobledger.workers.processors.session.speech_api import transcribe
from jobledger.workers.processors.session.step_context import FETCH_TIMEOUT_FRACTION, Cancelled, StepContext
from jobledger.workers.processors.session.video_sites import is_video_site_url, resolve_media_url

MAX_CHARACTERS = 1_000_000


def build_inputs(ctx: StepContext) -> dict[str, JSON]:
    """Return the inputs of the step. The step is not repeated with the same inputs."""
    return {
        "url": ctx.parameters.video_url,
        "max_bytes": ctx.settings.video_max_bytes,
        "max_audio_seconds": ctx.settings.max_audio_seconds,
        "backend": ctx.settings.transcription.backend,
        "endpoint": ctx.settings.transcription.url,
        "model": ctx.settings.transcription.model,
        "chunk_seconds": ctx.settings.transcription.chunk_seconds,
        "language": get_primary_subtag(ctx.parameters.source_language),
        "keep_audio": ctx.settings.keep_audio,
    }


async def run(ctx: StepContext) -> TranscriptResult:
    """Fetch the recording, extract its audio, and transcribe it if a backend is configured."""
    result = TranscriptResult()
    result.warnings = ctx.warnings
    result.missing_reason = await _fill_result(ctx, result)
    if result.missing_reason and ctx.parameters.video_url and not result.segments:
        await ctx.warn(result.missing_reason)
    await ctx.job.report_progress(60, "Recording processed")
    return result


async def _fill_result(ctx: StepContext, result: TranscriptResult) -> str | None:
    """Fill `result` and return why there is no transcript, or None if there is one. A timeout keeps what is there."""
    if ctx.parameters.video_url is None:
        return "There is no transcript. No recording was given."
    if ctx.settings.transcription.backend == "none" and not ctx.settings.keep_audio:
        return "There is no transcript. Transcription is not configured. The recording was not downloaded."
    try:
        async with asyncio.timeout(ctx.settings.transcript_timeout_seconds):
            await _fetch_and_transcribe(ctx, ctx.parameters.video_url, result)
    except Cancelled:
        raise
    except TimeoutError:
        limit = f"{ctx.settings.transcript_timeout_seconds:g} seconds"
        if not result.segments:
            return f"There is no transcript. The recording was not processed within {limit}."
        await ctx.warn(f"The transcript is incomplete: the recording was not processed within {limit}.")
    except (ProcessorError, transcript.TranscriptUnavailable) as error:
        return f"There is no transcript. {error}"
    if ctx.settings.transcription.backend == "none":
        return "There is no transcript. Transcription is not configured."
    return None if result.segments else "There is no transcript. No speech was recognized in the recording."


async def _fetch_and_transcribe(ctx: StepContext, url: str, result: TranscriptResult) -> None:
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
        check_media_type=transcript.reject_html_type,
        on_progress=partial(ctx.report_download, "Fetching the recording", 20, 35),
    )
    await ctx.log_fetch(response)
    await _extract_audio(ctx, video, audio, result)
    video.unlink()
    try:
        match ctx.settings.transcription.backend:
            case "openai":
                await _transcribe_by_api(ctx, audio, result)
            case "pocketsphinx":
                await _transcribe_locally(ctx, audio, result)
    finally:
        if ctx.settings.keep_audio:
            result.audio = await ctx.job.save(ctx.result_layout.build_asset_path(AUDIO_FILE_NAME), audio, "audio/wav")


async def _extract_audio(ctx: StepContext, video: Path, audio: Path, result: TranscriptResult) -> None:
    await ctx.job.report_progress(35, "Extracting the audio")
    damage = None
    async with ctx.iterate_in_thread(
        transcript.extract_audio(video, audio, max_seconds=ctx.settings.max_audio_seconds)
    ) as steps:
        async for progress in steps:
            result.audio_seconds, damage = progress.seconds, progress.damage
            message = f"Extracting the audio: {transcript.format_timecode(progress.seconds)}"
            await ctx.report_part(message, 35, 45, progress.seconds, progress.total_seconds)
    await ctx.job.log("info", f"Extracted {transcript.format_timecode(result.audio_seconds or 0)} of audio")
    if damage:
        await ctx.warn(f"The recording is incomplete: {damage}.")


async def _report_transcribed(ctx: StepContext, result: TranscriptResult, seconds: float, suffix: str = "") -> None:
    length = result.audio_seconds or 0.0
    message = f"Transcribing: {transcript.format_timecode(seconds)} of {transcript.format_timecode(length)}{suffix}"
    await ctx.report_part(message, 45, 60, seconds, length)


async def _transcribe_by_api(ctx: StepContext, audio: Path, result: TranscriptResult) -> None:
    await ctx.job.report_progress(45, "Transcribing")
    settings = ctx.settings.transcription
    missing: list[str] = []
    try:
        async with (
            OpenAiClient(settings) as api,
            aclosing(transcribe(api, audio, settings, get_primary_subtag(ctx.parameters.source_language))) as chunks,
        ):
            async for chunk in chunks:
                ctx.raise_if_cancelled()
                if chunk.error is not None:
                    start, end = map(transcript.format_timecode, (chunk.start_seconds, chunk.end_seconds))
                    missing.append(f"{start}–{end} ({chunk.error})")
                result.segments += chunk.segments
                waiting = f", waiting for {chunk.waited_seconds:.0f} s" if chunk.waited_seconds else ""
                await _report_transcribed(ctx, result, chunk.end_seconds, waiting)
    except OpenAiError as error:
        raise transcript.TranscriptUnavailable(f"The transcription API failed: {error}.") from error
    if missing and result.segments:
        await ctx.warn(f"The transcript is incomplete. Missing: {'; '.join(missing[:5])}.")
    elif missing:
        raise transcript.TranscriptUnavailable(f"The transcription failed: {missing[0]}.")
    await ctx.job.log("info", f"Transcribed {len(result.segments)} segments with {settings.model}")


async def _transcribe_locally(ctx: StepContext, audio: Path, result: TranscriptResult) -> None:
    await ctx.job.report_progress(45, "Transcribing")
    characters = 0
    async with ctx.iterate_in_thread(transcript.transcribe_locally(audio)) as segments:
        async for segment in segments:
            characters += len(segment.text)
            if characters > MAX_CHARACTERS:
                await ctx.warn(f"The transcript is cut after {MAX_CHARACTERS:,} characters.")
                break
            result.segments.append(segment)
            await _report_transcribed(ctx, result, segment.start_seconds)
    await ctx.job.log("info", f"Transcribed {len(result.segments)} segments with pocketsphinx")
