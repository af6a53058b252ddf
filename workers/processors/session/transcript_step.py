"""session: the step `transcript`, 20 to 60 percent of the job. What cannot be had is a warning, never a failure."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from jobledger.workers.processor import JSON, ProcessorError, SavedFile
from jobledger.workers.processors.session.markdown import AUDIO_NAME, Recording, primary
from jobledger.workers.processors.session.openai_api import ApiFailed, OpenAiApi, key_in
from jobledger.workers.processors.session.speech_api import transcribe
from jobledger.workers.processors.session.step_context import FETCH_SHARE, Cancelled, Work
from jobledger.workers.processors.session.transcript import (
    Heard,
    NoTranscript,
    Segment,
    clock,
    extract_audio,
    listen,
    refuse_web_pages,
)
from jobledger.workers.processors.session.video_sites import is_on_a_video_site, media_address

MAX_CHARACTERS = 1_000_000


def inputs(work: Work) -> dict[str, JSON]:
    """Return all that the transcript depends on: with the same inputs the step is not repeated."""
    return {
        "url": work.session.video_url,
        "max_bytes": work.settings.video_max_bytes,
        "max_audio_seconds": work.settings.max_audio_seconds,
        "backend": work.settings.transcription.backend,
        "endpoint": work.settings.transcription.url,
        "model": work.settings.transcription.model,
        "segment_seconds": work.settings.transcription.segment_seconds,
        "language": primary(work.session.source_language),
        "keep_audio": work.settings.keep_audio,
    }


@dataclass(slots=True)
class _SoFar:
    """What is known even if time runs out."""

    heard: Heard | None = None
    segments: list[Segment] = field(default_factory=list)
    audio: SavedFile | None = None


async def run(work: Work) -> JSON:
    """Fetch the recording, take out its sound, and write down what is said where a backend is configured."""
    so_far = _SoFar()
    reason = await _reason_for_no_text(work, so_far)
    if reason and work.session.video_url and not so_far.segments:
        await work.warn(reason)
    await work.job.progress(60, "The recording is done")
    return Recording(
        seconds=so_far.heard.seconds if so_far.heard else None,
        segments=so_far.segments,
        reason=reason,
        audio=so_far.audio,
        warnings=work.warnings,
    ).model_dump(mode="json")


async def _reason_for_no_text(work: Work, so_far: _SoFar) -> str | None:
    """Do the step; the answer is why there is no transcript, or None."""
    if work.session.video_url is None:
        return "There is no transcript. No recording was given."
    if work.settings.transcription.backend == "none" and not work.settings.keep_audio:
        # Nobody would listen, and it may be gigabytes.
        return "There is no transcript. No transcription is configured. The recording was not downloaded."
    try:
        async with asyncio.timeout(work.settings.video_timeout_seconds):
            await _hear(work, work.session.video_url, so_far)
    except Cancelled:
        raise
    except TimeoutError:
        limit = f"{work.settings.video_timeout_seconds:g} seconds"
        if not so_far.segments:
            return f"There is no transcript. The recording could not be worked through within {limit}."
        await work.warn(f"The transcript is incomplete: the recording could not be worked through within {limit}.")
    except (ProcessorError, NoTranscript) as error:
        return f"There is no transcript. {error}"
    if work.settings.transcription.backend == "none":
        return "There is no transcript. No transcription is configured."
    return None if so_far.segments else "There is no transcript. No words were recognised in the recording."


async def _hear(work: Work, url: str, so_far: _SoFar) -> None:
    video, audio = work.job.scratch / "video", work.job.scratch / "audio.wav"
    await work.job.progress(20, "Fetching the recording")
    if is_on_a_video_site(url, work.settings.video_sites):
        seconds = work.settings.read_timeout_seconds
        scratch = work.job.scratch / "yt-dlp"
        url = await media_address(url, seconds=seconds, scratch=scratch, fetcher=work.fetcher)
    fetched = await work.fetcher.fetch(
        url,
        max_bytes=work.settings.video_max_bytes,
        total_seconds=work.settings.video_timeout_seconds * FETCH_SHARE,
        into=video,
        check_type=refuse_web_pages,
        on_progress=work.downloading("Fetching the recording", 20, 35),
    )
    await work.log_fetched(fetched)
    await _extract(work, video, audio, so_far)
    video.unlink()
    try:
        await _transcribe(work, audio, so_far)
    finally:
        if work.settings.keep_audio:
            so_far.audio = await work.job.save(work.layout.asset(AUDIO_NAME), audio, "audio/wav")


async def _extract(work: Work, video: Path, audio: Path, so_far: _SoFar) -> None:
    await work.job.progress(35, "Taking out the sound")
    async with work.one_by_one(extract_audio(video, audio, max_seconds=work.settings.max_audio_seconds)) as steps:
        async for heard in steps:
            so_far.heard = heard
            share = min(1.0, heard.seconds / heard.of_seconds) if heard.of_seconds else 0.5
            await work.job.progress(35 + 10 * share, f"Taking out the sound: {clock(heard.seconds)}")
    if so_far.heard:
        await work.job.log("info", f"Extracted {clock(so_far.heard.seconds)} of sound")
        if so_far.heard.damage:
            await work.warn(f"The recording is not complete: {so_far.heard.damage}.")


async def _transcribe_by_api(work: Work, audio: Path, so_far: _SoFar) -> None:
    chosen, length = work.settings.transcription, so_far.heard.seconds if so_far.heard else 0.0
    missing: list[str] = []
    try:
        api = OpenAiApi(chosen.url or "", key=key_in(chosen.api_key_file), timeout_seconds=chosen.timeout_seconds)
        try:
            parts = transcribe(
                api,
                audio,
                model=chosen.model or "",
                language=primary(work.session.source_language),
                seconds=chosen.segment_seconds,
                parallel=chosen.parallel,
            )
            async with aclosing(parts):
                async for part in parts:
                    work.stop_if_cancelled()
                    if part.failed is not None:
                        missing.append(f"{clock(part.start)}–{clock(part.end)} ({part.failed})")
                    so_far.segments += part.segments
                    share = min(1.0, part.end / length) if length else 0.5
                    waited = f", waiting for {part.waited:.0f} s" if part.waited else ""
                    done = f"Listening: {clock(part.end)} of {clock(length)}{waited}"
                    await work.job.progress(45 + 15 * share, done)
        finally:
            await api.aclose()
    except ApiFailed as failed:
        raise NoTranscript(f"The transcription cannot be used: {failed}.") from failed
    if missing and so_far.segments:
        await work.warn(f"The transcript is incomplete. Missing: {'; '.join(missing[:5])}.")
    elif missing:
        raise NoTranscript(f"The transcription failed: {missing[0]}.")
    await work.job.log("info", f"Transcribed {len(so_far.segments)} passages with {chosen.model}")


async def _transcribe(work: Work, audio: Path, so_far: _SoFar) -> None:
    backend = work.settings.transcription.backend
    if backend == "none":
        return
    await work.job.progress(45, "Listening")
    if backend == "openai":
        await _transcribe_by_api(work, audio, so_far)
        return
    length = so_far.heard.seconds if so_far.heard else 0.0
    characters = 0
    async with work.one_by_one(listen(audio, backend=backend)) as segments:
        async for segment in segments:
            characters += len(segment.text)
            if characters > MAX_CHARACTERS:
                await work.warn(f"The transcript is cut after {MAX_CHARACTERS:,} characters.")
                break
            so_far.segments.append(segment)
            share = min(1.0, segment.start_seconds / length) if length else 0.5
            await work.job.progress(45 + 15 * share, f"Listening: {clock(segment.start_seconds)} of {clock(length)}")
    await work.job.log("info", f"Transcribed {len(so_far.segments)} passages with {backend}")
