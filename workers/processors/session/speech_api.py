"""Transcribe audio with an OpenAI-compatible API. The audio is split at silence and sent in chunks.

Only the chunks that are being sent are in memory. Each transcribed part is a checkpoint: it is not sent again in a
later attempt at the job.
"""

from __future__ import annotations

import asyncio
import io
import re
import wave
from array import array
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from jobledger.workers.processor import JSON
from jobledger.workers.processors.session.openai_api import OpenAiClient, OpenAiError
from jobledger.workers.processors.session.settings import TranscriptionSettings
from jobledger.workers.processors.session.subtitles import parse_subtitles
from jobledger.workers.processors.session.transcript import SAMPLE_RATE, WAV_PARAMETERS, Segment, format_timecode

StoredSegments = list[tuple[float, str]]
"""The start in seconds and the text of each segment."""
RunStep = Callable[[str, Mapping[str, JSON], Callable[[], Awaitable[StoredSegments]]], Awaitable[StoredSegments]]
"""Runs a step whose output is stored: name, inputs, and the function that returns the output."""
Bounds = tuple[int, int]
"""Start and end of a chunk, in samples."""

PROGRESS_INTERVAL_SECONDS: Final = 2.0
_SPLIT_WINDOW_SECONDS: Final = 10
_SILENCE_SAMPLES: Final = SAMPLE_RATE // 5
_MIN_CHUNK_SECONDS: Final = 1
"""APIs reject shorter audio."""
_MAX_PARTS: Final = 200
"""Maximum number of checkpoints of a recording. Small chunks are combined."""
_FORMATS: Final = ("verbose_json", "srt", "json", "text")
"""Response formats in the order of preference. Some models support only one of them. The last two have no times."""
_FORMAT_REJECTED_CODES: Final = frozenset({400, 415, 422, 501})
_PERMANENT_STATUS_CODES: Final = frozenset({401, 402, 403, 404, 405})
"""Status codes that the API would return for all chunks."""
_INVALID_STATUS_CODES: Final = frozenset({400, 413, 415, 422, 501})
"""Status codes that the API would return for all chunks, unless it has transcribed another one."""
_MAX_FAILURES_IN_A_ROW: Final = 4


@dataclass(frozen=True, slots=True)
class AudioPart:
    """A part of the recording. `error` says why it has no text. `waited_seconds` is set while it is pending."""

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


"""The output of a step: start time and text of each segment."""


def split_at_silence(audio: Path, chunk_seconds: float) -> Iterator[Bounds]:
    """Yield start and end, in samples, of chunks of at most `chunk_seconds`. Chunks end at a quiet point."""
    with audio.open("rb") as file, closing(wave.open(file)) as sound:
        begin, length, chunk_length = 0, sound.getnframes(), int(chunk_seconds * SAMPLE_RATE)
        while begin < length:
            end = min(begin + chunk_length, length)
            if end < length:
                end = min(end, length - _MIN_CHUNK_SECONDS * SAMPLE_RATE)
                window = min(_SPLIT_WINDOW_SECONDS * SAMPLE_RATE, chunk_length // 2)
                sound.setpos(end - window)
                end = end - window + _find_silence(array("h", sound.readframes(window)))
            yield begin, end
            begin = end


def _combine_chunks(chunks: Iterator[Bounds], min_samples: float) -> Iterator[list[Bounds]]:
    """Yield lists of consecutive chunks that are together at least `min_samples` long, except for the last."""
    part: list[Bounds] = []
    for chunk in chunks:
        part.append(chunk)
        if chunk[1] - part[0][0] >= min_samples:
            yield part
            part = []
    if part:
        yield part


def _find_silence(samples: array[int]) -> int:
    """Return the middle of the quietest fifth of a second. If there are several, return the last."""
    windows = range(0, max(1, len(samples) - _SILENCE_SAMPLES + 1), _SILENCE_SAMPLES)
    loudness = [(sum(map(abs, samples[at : at + _SILENCE_SAMPLES])), -at) for at in windows]
    return min(-min(loudness)[1] + _SILENCE_SAMPLES // 2, len(samples))


def _read_samples(audio: Path, bounds: Bounds) -> bytes:
    begin, end = bounds
    with audio.open("rb") as file, closing(wave.open(file)) as sound:
        sound.setpos(begin)
        samples: bytes = sound.readframes(end - begin)
        return samples


def _compute_digest(audio: Path, part: list[Bounds]) -> str:
    digest = sha256()
    for bounds in part:
        digest.update(_read_samples(audio, bounds))
    return digest.hexdigest()


def _make_wav(samples: bytes) -> io.BytesIO:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as chunk:
        chunk.setparams(WAV_PARAMETERS)
        chunk.writeframes(samples)
    return buffer


class SpeechApi:
    """Transcribes recordings with the API of the settings in one language. It learns which formats the API supports."""

    def __init__(self, api: OpenAiClient, settings: TranscriptionSettings, language: str, run_step: RunStep) -> None:
        """Initialize the object. `run_step` stores each transcribed part."""
        self._api = api
        self._settings = settings
        self._language = language
        self._run_step = run_step
        self._format = 0
        self._has_transcribed = False
        self._slots = asyncio.Semaphore(settings.max_concurrent)

    async def transcribe(self, audio: Path) -> AsyncGenerator[AudioPart, None]:
        """Transcribe a recording and yield its parts in order.

        At most `max_concurrent` requests run at a time. While the next part is pending, an empty part with
        `waited_seconds` is yielded every two seconds. When the API rejects all requests, the rest of the recording is
        yielded as one part with an error.
        """
        length = await asyncio.to_thread(_count_samples, audio)
        chunks = split_at_silence(audio, self._settings.chunk_seconds)
        parts = _combine_chunks(chunks, length / _MAX_PARTS)
        pending: deque[tuple[Bounds, asyncio.Task[list[Segment]]]] = deque()
        done, failures = 0, 0
        try:
            while True:
                while len(pending) < self._settings.max_concurrent and (
                    part := await asyncio.to_thread(next, parts, None)
                ):
                    task = asyncio.create_task(self._transcribe_part(audio, part))
                    pending.append(((part[0][0], part[-1][1]), task))
                if not pending:
                    return
                (begin, end), task = pending[0]
                waited = 0.0
                while not (await asyncio.wait({task}, timeout=PROGRESS_INTERVAL_SECONDS))[0]:
                    waited += PROGRESS_INTERVAL_SECONDS
                    yield AudioPart(done / SAMPLE_RATE, done / SAMPLE_RATE, waited_seconds=waited)
                pending.popleft()
                done = end
                try:
                    yield AudioPart(begin / SAMPLE_RATE, end / SAMPLE_RATE, segments=task.result())
                    failures = 0
                except OpenAiError as error:
                    failures += 1
                    is_last = failures == _MAX_FAILURES_IN_A_ROW or self._is_permanent(error)
                    stop = length if is_last else end
                    yield AudioPart(begin / SAMPLE_RATE, stop / SAMPLE_RATE, error=str(error))
                    if is_last:
                        return
        finally:
            for _, task in pending:
                task.cancel()
            await asyncio.gather(*(task for _, task in pending), return_exceptions=True)

    def _is_permanent(self, error: OpenAiError) -> bool:
        if error.status in _PERMANENT_STATUS_CODES:
            return True
        return error.status in _INVALID_STATUS_CODES and not self._has_transcribed

    async def _transcribe_part(self, audio: Path, part: list[Bounds]) -> list[Segment]:
        """Transcribe consecutive chunks, or return their stored text."""
        begin, end = part[0][0] / SAMPLE_RATE, part[-1][1] / SAMPLE_RATE
        inputs = {
            "samples": await asyncio.to_thread(_compute_digest, audio, part),
            "chunks": [list(bounds) for bounds in part],
            "endpoint": self._settings.url,
            "model": self._settings.model,
            "language": self._language,
        }

        async def transcribe() -> StoredSegments:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._transcribe_chunk(audio, bounds)) for bounds in part]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from errors
            return [(segment.start_seconds, segment.text) for task in tasks for segment in task.result()]

        name = f"transcript {format_timecode(begin)}–{format_timecode(end)}"
        stored = await self._run_step(name, inputs, transcribe)
        return [Segment(start_seconds=start, text=text) for start, text in stored]

    async def _transcribe_chunk(self, audio: Path, bounds: Bounds) -> list[Segment]:
        async with self._slots:
            samples = await asyncio.to_thread(_read_samples, audio, bounds)
            if samples.count(0) == len(samples):
                return []  # models invent text for silence
            response = await self._request(samples)
        offset, seconds = bounds[0] / SAMPLE_RATE, (bounds[1] - bounds[0]) / SAMPLE_RATE
        return [
            Segment(
                start_seconds=round(offset + min(max(0.0, segment.start), seconds), 2),
                text=" ".join(segment.text.split()),
            )
            for segment in sorted(_parse_response(response), key=lambda segment: segment.start)
        ]

    async def _request(self, samples: bytes) -> Any:
        """Send a chunk. Try the next response format if the API rejects the best one."""
        first_error: OpenAiError | None = None
        for number in range(self._format, len(_FORMATS)):
            fields = {
                "model": self._settings.model,
                "language": self._language,
                "response_format": _FORMATS[number],
            }
            # Close the buffer to free its memory. The request is part of a reference cycle that is collected later.
            with _make_wav(samples) as sound:
                file = ("audio.wav", sound, "audio/wav")
                try:
                    response = await self._api.post(
                        "audio/transcriptions", accept_text=True, data=fields, files={"file": file}
                    )
                except OpenAiError as error:
                    is_supported = self._has_transcribed and number == self._format
                    if error.status not in _FORMAT_REJECTED_CODES or is_supported:
                        raise
                    first_error = first_error or error
                else:
                    self._format, self._has_transcribed = number, True
                    return response
        raise first_error or OpenAiError("it supports no response format")


def _count_samples(audio: Path) -> int:
    with audio.open("rb") as file, closing(wave.open(file)) as sound:
        length: int = sound.getnframes()
        return length


def _parse_response(response: Any) -> list[_ResponseSegment]:
    """Return the segments of a response in any of the formats. An API may ignore which one was requested."""
    if isinstance(response, str):
        return _parse_text(response)
    try:
        transcription = _TranscriptionResponse.model_validate(response)
    except ValidationError as error:
        raise OpenAiError("its response does not match the protocol") from error
    segments = [segment for segment in transcription.segments or () if segment.text.strip()]
    return segments or _parse_text(transcription.text or "")


def _parse_text(text: str) -> list[_ResponseSegment]:
    if re.match(r"\s*<(!doctype|html|\?xml)", text, re.IGNORECASE):
        raise OpenAiError("its response is a web page")
    cues = [
        _ResponseSegment(start=cue.start_seconds, text=cue.text) for cue in parse_subtitles(text) if cue.text.strip()
    ]
    if cues or not text.strip() or text.strip().startswith("WEBVTT"):
        return cues
    return [_ResponseSegment(start=0.0, text=text)]
