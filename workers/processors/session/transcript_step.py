"""The step `transcript`: fetch and transcribe the recording (progress 20 to 60 percent). Problems are only warnings.

Subtitles replace speech recognition if they are a transcript of the recording.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from jobledger.workers.processor import JSON, ProcessorError
from jobledger.workers.processors.session import hls, transcript
from jobledger.workers.processors.session.document import AUDIO_FILE_NAME, TranscriptResult, get_primary_subtag
from jobledger.workers.processors.session.download import ProgressRange, choose_retry_delay, download
from jobledger.workers.processors.session.embedded_media import VideoTrack
from jobledger.workers.processors.session.language import detect_language
from jobledger.workers.processors.session.media_tracks import normalize_language
from jobledger.workers.processors.session.openai_api import OpenAiClient, OpenAiError
from jobledger.workers.processors.session.parameters import SessionParameters
from jobledger.workers.processors.session.settings import SessionSettings
from jobledger.workers.processors.session.speech_api import SpeechApi, StoredSegments
from jobledger.workers.processors.session.step_context import (
    FETCH_TIMEOUT_FRACTION,
    SHARED_STEP_MAX_AGE,
    Cancelled,
    StepContext,
    may_succeed_later,
)
from jobledger.workers.processors.session.subtitles import (
    MAX_SUBTITLE_BYTES,
    parse_subtitles,
    read_media_text,
    to_segments,
)
from jobledger.workers.processors.session.translation_checks import is_same_language
from jobledger.workers.processors.session.video_sites import (
    Recording,
    VideoSiteFailed,
    find_recording,
    is_video_site_url,
)

MAX_CHARACTERS = 1_000_000


_MEDIA_SUFFIX: Final = re.compile(
    r"(\.(av1|vp8|vp9|h26[45]|hevc))?\.(mp4|m4v|m4a|webm|mkv|mov|ogv|ogg|mp3|opus|m3u8)$", re.IGNORECASE
)
_SUBTITLE_SUFFIXES: Final = (".vtt", ".srt")


def list_subtitle_urls(
    parameters: SessionParameters, settings: SessionSettings, tracks: Sequence[VideoTrack]
) -> list[str]:
    """Return the URLs where subtitles of the recording may be, best first.

    They are those that the page has for the recording, and files beside it that have its name.
    """
    url = parameters.video_url
    if url is None or settings.use_subtitles == "never" or is_video_site_url(url, settings.video_sites):
        return []
    name, language = _remove_media_suffix(url), normalize_language(parameters.source_language)
    own = [track for track in tracks if name in map(_remove_media_suffix, track.video_urls)]
    with_language = [track.url for track in own if normalize_language(track.language) == language]
    without = [track.url for track in own if normalize_language(track.language) is None]
    is_file = name != url and not urlsplit(url).query
    beside = [f"{name}{suffix}" for suffix in _SUBTITLE_SUFFIXES] if is_file else []
    return list(dict.fromkeys([*with_language, *without, *beside]))


def _remove_media_suffix(url: str) -> str:
    """Return the URL without the suffix of its format, so that several formats of a recording have the same name."""
    return _MEDIA_SUFFIX.sub("", url.partition("#")[0])


def build_inputs(ctx: StepContext, subtitle_urls: Sequence[str]) -> dict[str, JSON]:
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
        "use_subtitles": ctx.settings.use_subtitles,
        "subtitles": list(subtitle_urls),
    }


class _Missing(NamedTuple):
    """Why there is no transcript. `may_change`: a restart of the job may find one."""

    reason: str
    may_change: bool


async def run(ctx: StepContext, subtitle_urls: Sequence[str]) -> TranscriptResult:
    """Fetch the recording, and use its subtitles or transcribe its audio, if a backend is configured."""
    result = TranscriptResult()
    result.warnings = ctx.warnings
    if (missing := await _fill_result(ctx, result, subtitle_urls)) is not None:
        result.missing_reason = f"There is no transcript. {missing.reason}"
        if ctx.parameters.video_url:
            await ctx.warn(result.missing_reason, repeat_on_restart=missing.may_change)
    await ctx.job.report_progress(60, "Recording processed")
    return result


async def _fill_result(ctx: StepContext, result: TranscriptResult, subtitle_urls: Sequence[str]) -> _Missing | None:
    """Fill `result` and return why there is no transcript, or None if there is one. A timeout keeps what is there."""
    if ctx.parameters.video_url is None:
        return _Missing("No recording was given.", may_change=False)
    is_needed_without_backend = ctx.settings.keep_audio or ctx.settings.use_subtitles == "always"
    if ctx.settings.transcription.backend == "none" and not is_needed_without_backend:
        return _Missing("Transcription is not configured. The recording was not downloaded.", may_change=False)
    backend_problem = None
    try:
        async with asyncio.timeout(ctx.settings.transcript_timeout_seconds):
            backend_problem = await _find_backend_problem(ctx)
            if backend_problem and not is_needed_without_backend:
                return _Missing(f"{backend_problem} The recording was not downloaded.", may_change=True)
            can_transcribe = backend_problem is None
            await _process_recording(
                ctx, ctx.parameters.video_url, result, subtitle_urls, can_transcribe=can_transcribe
            )
    except Cancelled:
        raise
    except TimeoutError:
        limit = f"{ctx.settings.transcript_timeout_seconds:g} seconds"
        if not result.segments:
            return _Missing(f"The recording was not processed within {limit}.", may_change=True)
        message = f"The transcript is incomplete: the recording was not processed within {limit}."
        await ctx.warn(message, repeat_on_restart=True)
    except (ProcessorError, transcript.TranscriptUnavailable) as error:
        may_change = not isinstance(error, ProcessorError) or may_succeed_later(error)
        if not result.segments:
            return _Missing(str(error), may_change)
        await ctx.warn(f"The recording was not processed completely. {error}", repeat_on_restart=may_change)
    if result.segments:
        return None
    if backend_problem:
        return _Missing(backend_problem, may_change=ctx.settings.transcription.backend != "none")
    return _Missing("No speech was recognized in the recording.", may_change=False)


async def _find_backend_problem(ctx: StepContext) -> str | None:
    """Return why recordings cannot be transcribed, as far as it can be known before the download."""
    match ctx.settings.transcription.backend:
        case "none":
            return "Transcription is not configured."
        case "pocketsphinx":
            try:
                await asyncio.to_thread(transcript.load_pocketsphinx)
            except transcript.TranscriptUnavailable as error:
                return str(error)
        case "openai":
            try:
                async with OpenAiClient(ctx.settings.transcription) as api:
                    await api.check_access()
            except OpenAiError as error:
                return f"The transcription API failed: {error}."
    return None


async def _process_recording(
    ctx: StepContext, url: str, result: TranscriptResult, subtitle_urls: Sequence[str], *, can_transcribe: bool
) -> None:
    await ctx.job.report_progress(20, "Fetching the recording")
    recording = await _find_recording(ctx, url)
    result.chapters = recording.chapters
    if recording.subtitles_url is not None and ctx.settings.use_subtitles != "never":
        await _read_subtitle_file(ctx, recording.subtitles_url, recording.seconds, result, "of the video site")
    if result.segments and not ctx.settings.keep_audio:
        return
    video, audio = ctx.job.scratch_dir / "video", ctx.job.scratch_dir / "audio.wav"
    seconds = await _fetch_recording(ctx, recording.media_url, video, result)
    if seconds is None:
        return  # its subtitles suffice
    await _read_media_text(ctx, video, result, seconds=seconds or recording.seconds, can_transcribe=can_transcribe)
    for subtitle_url in subtitle_urls:
        if not result.segments:
            await _read_subtitle_file(ctx, subtitle_url, result.audio_seconds, result, f"in {subtitle_url}")
    if ctx.settings.keep_audio or (can_transcribe and not result.segments):
        await _extract_audio(ctx, video, audio, result, seconds or None)
    video.unlink()
    try:
        if can_transcribe and not result.segments:
            await _transcribe(ctx, audio, result)
    finally:
        if ctx.settings.keep_audio:
            result.audio = await ctx.job.save(ctx.result_layout.build_asset_path(AUDIO_FILE_NAME), audio, "audio/wav")


async def _find_recording(ctx: StepContext, url: str) -> Recording:
    if not is_video_site_url(url, ctx.settings.video_sites):
        return Recording(url)
    tries = 1
    while True:
        try:
            return await find_recording(
                url,
                language=get_primary_subtag(ctx.parameters.source_language),
                seconds=ctx.settings.read_timeout_seconds,
                scratch=ctx.job.scratch_dir / f"yt-dlp-{tries}",
                fetcher=ctx.fetcher,
            )
        except VideoSiteFailed as error:
            delay = choose_retry_delay(tries)
            if delay is None:
                raise transcript.TranscriptUnavailable(f"{error} It was tried {tries} times.") from error
            await ctx.job.log("warning", f"{error} Trying again in {delay:.0f} s.")
        await ctx.sleep(delay)
        tries += 1


async def _read_subtitle_file(
    ctx: StepContext, url: str, seconds: float | None, result: TranscriptResult, description: str
) -> None:
    """Use subtitles if they are a transcript of the recording of this length, in the language of the talk."""
    try:
        response = await ctx.fetcher.fetch(
            url,
            max_bytes=MAX_SUBTITLE_BYTES,
            timeout_seconds=ctx.settings.page_timeout_seconds,
            check_media_type=transcript.reject_html_type,
        )
    except (ProcessorError, transcript.TranscriptUnavailable) as error:
        is_missing = isinstance(error, ProcessorError) and error.details.get("status_code") == 404
        if not is_missing:
            await ctx.job.log("info", f"The subtitles cannot be used: {error}")
        return
    await ctx.log_fetch(response)
    cues = await asyncio.to_thread(parse_subtitles, response.body.decode("utf-8", "replace"))
    segments = await asyncio.to_thread(to_segments, cues, seconds)
    language = await asyncio.to_thread(detect_language, " ".join(segment.text for segment in segments))
    if language and not is_same_language(language, get_primary_subtag(ctx.parameters.source_language)):
        await ctx.job.log("info", f"The subtitles {description} are in another language ({language})")
        return
    if segments:
        result.segments, result.audio_seconds = segments, seconds
    await _log_subtitles(ctx, result, description)


async def _log_subtitles(ctx: StepContext, result: TranscriptResult, description: str) -> None:
    if result.segments:
        await ctx.job.log("info", f"Used {len(result.segments)} subtitles {description} as the transcript")
    else:
        await ctx.job.log("info", f"The subtitles {description} cover too little of the recording")


async def _fetch_recording(ctx: StepContext, url: str, video: Path, result: TranscriptResult) -> float | None:
    """Download the recording to `video` and return its length in seconds, or 0 if it is only in the file.

    Return None if it is not needed, because the subtitles that are published with it are a transcript of it.
    """
    timeout_seconds = ctx.settings.transcript_timeout_seconds * FETCH_TIMEOUT_FRACTION
    response = await download(
        ctx,
        url,
        video,
        progress=ProgressRange("Fetching the recording", 20, 35),
        max_bytes=ctx.settings.video_max_bytes,
        timeout_seconds=timeout_seconds,
        check_media_type=_reject_media_type,
    )
    head = await asyncio.to_thread(_read_head, video)
    hls.reject_manifest(head, response.media_type)
    if not hls.is_playlist(head):
        return 0.0
    limits = hls.Limits(ctx.settings.video_max_bytes, ctx.settings.max_audio_seconds, timeout_seconds)
    client = hls.HlsClient(ctx.fetcher, limits, ctx.job.scratch_dir)
    playlist = await asyncio.to_thread(video.read_bytes)
    presentation = await client.open(playlist, response.url, get_primary_subtag(ctx.parameters.source_language))
    if presentation.subtitles_url is not None and ctx.settings.use_subtitles != "never" and not result.segments:
        await _read_hls_subtitles(ctx, client, presentation, result)
        if result.segments and not ctx.settings.keep_audio:
            return None

    async def report(size: int, seconds: float) -> None:
        ctx.raise_if_cancelled()
        message = f"Fetching the recording: {transcript.format_timecode(seconds)}"
        await ctx.report_part(message, 20, 35, seconds, presentation.seconds)

    downloaded = await client.download_sound(presentation, video, on_progress=report)
    await ctx.log_fetch(replace(response, size=downloaded.size))
    if downloaded.missing:
        await ctx.warn(
            f"The recording is incomplete: {downloaded.missing} of {downloaded.segments} segments cannot be fetched.",
            repeat_on_restart=True,
        )
    return presentation.seconds


def _reject_media_type(media_type: str) -> None:
    transcript.reject_html_type(media_type)
    hls.reject_manifest(b"", media_type)


def _read_head(video: Path) -> bytes:
    with video.open("rb") as file:
        return file.read(1024)


async def _read_hls_subtitles(
    ctx: StepContext, client: hls.HlsClient, presentation: hls.Presentation, result: TranscriptResult
) -> None:
    try:
        cues = await client.fetch_subtitles(presentation)
    except (ProcessorError, transcript.TranscriptUnavailable) as error:
        await ctx.job.log("info", f"The subtitles cannot be used: {error}")
        return
    result.segments = await asyncio.to_thread(to_segments, cues, presentation.seconds)
    result.audio_seconds = presentation.seconds if result.segments else None
    await _log_subtitles(ctx, result, "of the playlist")


async def _read_media_text(
    ctx: StepContext, video: Path, result: TranscriptResult, *, seconds: float | None, can_transcribe: bool
) -> None:
    """Use the chapters of a recording, and its subtitles if they are a transcript of it."""
    text = await asyncio.to_thread(
        read_media_text,
        video,
        get_primary_subtag(ctx.parameters.source_language),
        accept_unknown_language=not can_transcribe,
        read_subtitles=ctx.settings.use_subtitles != "never" and not result.segments,
    )
    ctx.raise_if_cancelled()
    result.chapters = result.chapters or text.chapters
    result.audio_seconds = result.audio_seconds or seconds or text.seconds
    if text.subtitles:
        result.segments = text.subtitles
        await _log_subtitles(ctx, result, f"in the recording ({text.language or 'no language'})")


async def _extract_audio(
    ctx: StepContext, video: Path, audio: Path, result: TranscriptResult, total_seconds: float | None
) -> None:
    await ctx.job.report_progress(35, "Extracting the audio")
    damage = track = None
    extraction = transcript.extract_audio(
        video,
        audio,
        max_seconds=ctx.settings.max_audio_seconds,
        language=get_primary_subtag(ctx.parameters.source_language),
        total_seconds=total_seconds,
    )
    async with ctx.iterate_in_thread(extraction) as steps:
        async for progress in steps:
            result.audio_seconds, damage, track = progress.seconds, progress.damage, progress.track
            message = f"Extracting the audio: {transcript.format_timecode(progress.seconds)}"
            await ctx.report_part(message, 35, 45, progress.seconds, progress.total_seconds)
    length = transcript.format_timecode(result.audio_seconds or 0)
    await ctx.job.log("info", f"Extracted {length} of audio from the sound track {track}")
    if damage:
        await ctx.warn(f"The recording is incomplete: {damage}.")


async def _transcribe(ctx: StepContext, audio: Path, result: TranscriptResult) -> None:
    await ctx.job.report_progress(45, "Transcribing")
    if ctx.settings.transcription.backend == "openai":
        await _transcribe_by_api(ctx, audio, result)
    else:
        await _transcribe_locally(ctx, audio, result)


async def _report_transcribed(ctx: StepContext, result: TranscriptResult, seconds: float, suffix: str = "") -> None:
    length = result.audio_seconds or 0.0
    message = f"Transcribing: {transcript.format_timecode(seconds)} of {transcript.format_timecode(length)}{suffix}"
    await ctx.report_part(message, 45, 60, seconds, length)


async def _transcribe_by_api(ctx: StepContext, audio: Path, result: TranscriptResult) -> None:
    settings = ctx.settings.transcription

    async def run_step(
        name: str, inputs: Mapping[str, JSON], function: Callable[[], Awaitable[StoredSegments]]
    ) -> StoredSegments:
        async def run(_inputs: object) -> StoredSegments:
            return await function()

        return await ctx.job.step(name, run, inputs, share=SHARED_STEP_MAX_AGE)

    missing: list[str] = []
    characters = 0
    try:
        async with OpenAiClient(settings) as api:
            speech = SpeechApi(api, settings, get_primary_subtag(ctx.parameters.source_language), run_step)
            async with aclosing(speech.transcribe(audio)) as parts:
                async for part in parts:
                    ctx.raise_if_cancelled()
                    if part.error is not None:
                        start, end = map(transcript.format_timecode, (part.start_seconds, part.end_seconds))
                        missing.append(f"{start}–{end} ({part.error})")
                    characters += sum(len(segment.text) for segment in part.segments)
                    if characters > MAX_CHARACTERS:
                        await ctx.warn(f"The transcript is cut after {MAX_CHARACTERS:,} characters.")
                        break
                    result.segments += part.segments
                    waiting = f", waiting for {part.waited_seconds:.0f} s" if part.waited_seconds else ""
                    await _report_transcribed(ctx, result, part.end_seconds, waiting)
    except OpenAiError as error:
        raise transcript.TranscriptUnavailable(f"The transcription API failed: {error}.") from error
    if missing and result.segments:
        more = f"; and {len(missing) - 5} more parts" if len(missing) > 5 else ""
        message = f"The transcript is incomplete. Missing: {'; '.join(missing[:5])}{more}."
        await ctx.warn(message, repeat_on_restart=True)
    elif missing:
        raise transcript.TranscriptUnavailable(f"The transcription failed: {missing[0]}.")
    await ctx.job.log("info", f"Transcribed {len(result.segments)} segments with {settings.model}")


async def _transcribe_locally(ctx: StepContext, audio: Path, result: TranscriptResult) -> None:
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
