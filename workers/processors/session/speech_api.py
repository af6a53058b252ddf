"""session: speech to text by an OpenAI-compatible endpoint. Sound is cut where it is quiet, and sent in pieces.

Only the pieces on their way are in memory, however long the recording is.
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
from jobledger.workers.processors.session.transcript import SAMPLE_RATE, Segment

PROGRESS_INTERVAL_SECONDS: Final = 2.0
_LOOK_BACK_SECONDS: Final = 10
_QUIET_SAMPLES: Final = SAMPLE_RATE // 5
_PERMANENT_STATUS_CODES: Final = frozenset({400, 401, 403, 404, 405, 413, 415, 422})
"""What answers one piece so, answers all so."""


@dataclass(frozen=True, slots=True)
class AudioChunk:
    """A piece of the recording, in seconds. `failed`: there is no text of it, and why. `waited`: nor is there yet."""

    start_seconds: float
    end_seconds: float
    segments: list[Segment] = field(default_factory=list)
    error: str | None = None
    waited_seconds: float = 0.0


class _ResponseSegment(BaseModel):
    start: float
    text: str


class _Answer(BaseModel):
    text: str = ""
    segments: list[_ResponseSegment] = []


def split_at_silence(audio: Path, chunk_seconds: float) -> Iterator[tuple[int, int]]:
    """Yield where pieces of at most so many seconds begin and end, in samples; each end is at the quietest near by."""
    with audio.open("rb") as file, closing(wave.open(file)) as sound:
        begin, length, most = 0, sound.getnframes(), int(chunk_seconds * SAMPLE_RATE)
        while begin < length:
            end = min(begin + most, length)
            if end < length:
                back = min(_LOOK_BACK_SECONDS * SAMPLE_RATE, most // 2)
                sound.setpos(end - back)
                end = end - back + _quietest(array("h", sound.readframes(back)))
            yield begin, end
            begin = end


def _quietest(samples: array[int]) -> int:
    """Return the middle of the quietest fifth of a second; of several, the last."""
    windows = range(0, max(1, len(samples) - _QUIET_SAMPLES + 1), _QUIET_SAMPLES)
    loudness = [(sum(map(abs, samples[at : at + _QUIET_SAMPLES])), -at) for at in windows]
    return min(-min(loudness)[1] + _QUIET_SAMPLES // 2, len(samples))


def _piece(audio: Path, begin: int, end: int) -> io.BytesIO:
    """Return a piece as a WAV file of its own."""
    with audio.open("rb") as file, closing(wave.open(file)) as sound:
        sound.setpos(begin)
        samples = sound.readframes(end - begin)
    written = io.BytesIO()
    with wave.open(written, "wb") as piece:
        piece.setnchannels(1)
        piece.setsampwidth(2)
        piece.setframerate(SAMPLE_RATE)
        piece.writeframes(samples)
    return written


async def transcribe(
    api: OpenAiClient, audio: Path, *, model: str, language: str, chunk_seconds: float, max_concurrent: int
) -> AsyncGenerator[AudioChunk, None]:
    """Yield the pieces in their order, so many on their way at a time; while one is awaited, that, every two seconds.

    Raises:
        ApiFailed: the endpoint refuses what would be the same with every piece.
    """
    places = split_at_silence(audio, chunk_seconds)
    on_their_way: deque[tuple[float, float, asyncio.Task[list[Segment]]]] = deque()
    heard = 0.0
    try:
        while True:
            while len(on_their_way) < max_concurrent and (place := await asyncio.to_thread(next, places, None)):
                begin, end = place
                task = asyncio.create_task(_text_of(api, audio, begin, end, model=model, language=language))
                on_their_way.append((begin / SAMPLE_RATE, end / SAMPLE_RATE, task))
            if not on_their_way:
                return
            start, stop, task = on_their_way[0]
            waited = 0.0
            while not (await asyncio.wait({task}, timeout=PROGRESS_INTERVAL_SECONDS))[0]:
                waited += PROGRESS_INTERVAL_SECONDS
                yield AudioChunk(heard, heard, waited_seconds=waited)
            on_their_way.popleft()
            heard = stop
            try:
                yield AudioChunk(start, stop, segments=task.result())
            except OpenAiError as failed:
                if failed.status in _PERMANENT_STATUS_CODES:
                    raise
                yield AudioChunk(start, stop, error=str(failed))
    finally:
        for _, _, task in on_their_way:
            task.cancel()
        await asyncio.gather(*(task for _, _, task in on_their_way), return_exceptions=True)


async def _text_of(api: OpenAiClient, audio: Path, begin: int, end: int, *, model: str, language: str) -> list[Segment]:
    # Closed, its memory is free: the request that held it is part of a cycle, which may be collected much later.
    with await asyncio.to_thread(_piece, audio, begin, end) as sound:
        answer: Any = await api.post(
            "audio/transcriptions",
            data={"model": model, "language": language, "response_format": "verbose_json"},
            files={"file": ("audio.wav", sound, "audio/wav")},
        )
    try:
        said = _Answer.model_validate(answer)
    except ValidationError as error:
        raise OpenAiError("its answer has not the form of the protocol") from error
    offset = begin / SAMPLE_RATE
    found = said.segments or [_ResponseSegment(start=0.0, text=said.text)]
    return [
        Segment(start_seconds=round(offset + max(0.0, it.start), 2), text=" ".join(it.text.split()))
        for it in found
        if it.text.strip()
    ]
