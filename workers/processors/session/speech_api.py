"""Transcribe audio with an OpenAI-compatible API. The audio is split at silence and sent in chunks.

Only the chunks that are being sent are in memory.
"""

from __future__ import annotations

import asyncio
import io
import wave
from array import array
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from jobledger.workers.processors.session.openai_api import OpenAiClient, OpenAiError
from jobledger.workers.processors.session.settings import TranscriptionSettings
from jobledger.workers.processors.session.transcript import SAMPLE_RATE, WAV_PARAMETERS, Segment

PROGRESS_INTERVAL_SECONDS: Final = 2.0
_SPLIT_WINDOW_SECONDS: Final = 10
_SILENCE_SAMPLES: Final = SAMPLE_RATE // 5
_PERMANENT_STATUS_CODES: Final = frozenset({400, 401, 403, 404, 405, 413, 415, 422})
"""Status codes that the API would return for all chunks."""


@dataclass(frozen=True, slots=True)
class AudioChunk:
    """A chunk of the recording. `error` says why it has no text. `waited_seconds` is set while it is pending."""

    start_seconds: float
    end_seconds: float
    segments: list[Segment] = field(default_factory=list)
    error: str | None = None
    waited_seconds: float = 0.0


class _ResponseSegment(BaseModel):
    start: float
    text: str


class _TranscriptionResponse(BaseModel):
    text: str | None = None
    segments: list[_ResponseSegment] | None = None


def split_at_silence(audio: Path, chunk_seconds: float) -> Iterator[tuple[int, int]]:
    """Yield start and end, in samples, of chunks of at most `chunk_seconds`. Chunks end at a quiet point."""
    with audio.open("rb") as file, closing(wave.open(file)) as sound:
        begin, length, chunk_length = 0, sound.getnframes(), int(chunk_seconds * SAMPLE_RATE)
        while begin < length:
            end = min(begin + chunk_length, length)
            if end < length:
                window = min(_SPLIT_WINDOW_SECONDS * SAMPLE_RATE, chunk_length // 2)
                sound.setpos(end - window)
                end = end - window + _find_silence(array("h", sound.readframes(window)))
            yield begin, end
            begin = end


def _find_silence(samples: array[int]) -> int:
    """Return the middle of the quietest fifth of a second. If there are several, return the last."""
    windows = range(0, max(1, len(samples) - _SILENCE_SAMPLES + 1), _SILENCE_SAMPLES)
    loudness = [(sum(map(abs, samples[at : at + _SILENCE_SAMPLES])), -at) for at in windows]
    return min(-min(loudness)[1] + _SILENCE_SAMPLES // 2, len(samples))


def _read_chunk(audio: Path, begin: int, end: int) -> io.BytesIO:
    """Return a chunk as a WAV file."""
    with audio.open("rb") as file, closing(wave.open(file)) as sound:
        sound.setpos(begin)
        samples = sound.readframes(end - begin)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as chunk:
        chunk.setparams(WAV_PARAMETERS)
        chunk.writeframes(samples)
    return buffer


async def transcribe(
    api: OpenAiClient, audio: Path, settings: TranscriptionSettings, language: str
) -> AsyncGenerator[AudioChunk, None]:
    """Transcribe the chunks of a recording and yield them in order.

    At most `settings.max_concurrent` requests run at a time. While the next chunk is pending, an empty chunk with
    `waited_seconds` is yielded every two seconds.

    Raises:
        OpenAiError: The API rejects a request in a way that applies to all chunks.
    """
    bounds = split_at_silence(audio, settings.chunk_seconds)
    fields = {"model": settings.model, "language": language, "response_format": "verbose_json"}
    pending: deque[tuple[float, float, asyncio.Task[list[Segment]]]] = deque()
    done_seconds = 0.0
    try:
        while True:
            while len(pending) < settings.max_concurrent and (chunk := await asyncio.to_thread(next, bounds, None)):
                begin, end = chunk
                task = asyncio.create_task(_transcribe_chunk(api, audio, begin, end, fields))
                pending.append((begin / SAMPLE_RATE, end / SAMPLE_RATE, task))
            if not pending:
                return
            start, stop, task = pending[0]
            waited = 0.0
            while not (await asyncio.wait({task}, timeout=PROGRESS_INTERVAL_SECONDS))[0]:
                waited += PROGRESS_INTERVAL_SECONDS
                yield AudioChunk(done_seconds, done_seconds, waited_seconds=waited)
            pending.popleft()
            done_seconds = stop
            try:
                yield AudioChunk(start, stop, segments=task.result())
            except OpenAiError as error:
                if error.status in _PERMANENT_STATUS_CODES:
                    raise
                yield AudioChunk(start, stop, error=str(error))
    finally:
        for _, _, task in pending:
            task.cancel()
        await asyncio.gather(*(task for _, _, task in pending), return_exceptions=True)


async def _transcribe_chunk(
    api: OpenAiClient, audio: Path, begin: int, end: int, fields: dict[str, str | None]
) -> list[Segment]:
    # Close the buffer to free its memory. The request is part of a reference cycle that is collected much later.
    with await asyncio.to_thread(_read_chunk, audio, begin, end) as sound:
        file = ("audio.wav", sound, "audio/wav")
        response: Any = await api.post("audio/transcriptions", data=fields, files={"file": file})
    try:
        transcription = _TranscriptionResponse.model_validate(response)
    except ValidationError as error:
        raise OpenAiError("its response does not match the protocol") from error
    offset = begin / SAMPLE_RATE
    segments = [segment for segment in transcription.segments or () if segment.text.strip()]
    if not segments and transcription.text and transcription.text.strip():
        segments = [_ResponseSegment(start=0.0, text=transcription.text)]
    seconds = (end - begin) / SAMPLE_RATE
    return [
        Segment(
            start_seconds=round(offset + min(max(0.0, segment.start), seconds), 2), text=" ".join(segment.text.split())
        )
        for segment in sorted(segments, key=lambda segment: segment.start)
    ]
