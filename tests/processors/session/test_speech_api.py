"""Transcription by an OpenAI-compatible API: chunks, order of the text, and the reasons of missing parts."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
import wave
from array import array
from functools import cache
from itertools import pairwise
from pathlib import Path
from threading import Event, Lock
from typing import Any

import pytest

from jobledger.workers import safe_http
from jobledger.workers.processor import ProcessorError, Results
from jobledger.workers.processors.session import SessionProcessor, speech_api
from jobledger.workers.processors.session.openai_api import OpenAiClient
from jobledger.workers.processors.session.settings import TranscriptionSettings
from jobledger.workers.processors.session.speech_api import split_at_silence
from jobledger.workers.processors.session.transcript import SAMPLE_RATE
from tests.processors.session.fixtures import (
    RecordingJob,
    Site,
    SiteResponse,
    make_parameters,
    make_settings,
    make_video,
    read_document,
    split_front_matter,
)
from tests.processors.session.openai_server import KEY, FakeOpenAiServer
from tests.support.polling import poll_until


@cache
def make_recording() -> bytes:
    return make_video(65)


@pytest.fixture
def urls(site: Site, page_url: str) -> dict[str, str]:
    """Parameters of a session with a recording of 65 seconds."""
    response = SiteResponse(make_recording(), headers={"Content-Type": "video/webm"})
    return {"url": page_url, "video_url": site.put("/talk.webm", response)}


async def run(job: RecordingJob, openai_server: FakeOpenAiServer, **changes: Any) -> Results:
    key = job.scratch_dir / "key"
    key.write_text(KEY)
    transcription = {
        "backend": "openai",
        "url": openai_server.url,
        "model": "whisper",
        "api_key_file": key,
        "chunk_seconds": 20,
        **changes,
    }
    return await SessionProcessor(make_settings(transcription=transcription)).run(job)


def make_response(seconds: float) -> Any:
    """Return the response for a chunk, with one segment at its start and one at its end."""
    segments = [
        {"id": 0, "start": 0.5, "end": 2.0, "text": " begin "},
        {"id": 1, "start": seconds - 1, "end": seconds, "text": "end"},
    ]
    return {"task": "transcribe", "language": "english", "duration": seconds, "text": "begin end", "segments": segments}


async def test_client_ignores_certificates_of_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    safe_http.get_ssl_context.cache_clear()
    settings = TranscriptionSettings(backend="openai", url="https://127.0.0.1/v1", model="whisper")
    async with OpenAiClient(settings):
        pass


async def test_recording_is_sent_in_chunks_and_text_is_in_order(
    openai_server: FakeOpenAiServer, urls: dict[str, str], tmp_path: Path
) -> None:
    arrivals: list[Event] = []
    received_seconds = 0.0
    lock = Lock()

    def answer_second_request_first(seconds: float) -> Any:
        """Hold back every other response until the next request is answered. The last one may have no successor."""
        nonlocal received_seconds
        with lock:
            number = len(arrivals)
            arrivals.append(Event())
            received_seconds += seconds
            is_last = received_seconds > 64.5
        if number % 2:
            arrivals[number - 1].set()
        elif not is_last:
            assert arrivals[number].wait(60)
            time.sleep(0.05)  # only makes it more likely that the next response arrives first
        return make_response(seconds)

    openai_server.answer_speech = answer_second_request_first
    job = RecordingJob(make_parameters(**urls, source_language="en-GB"), tmp_path)
    document = read_document(job, await run(job, openai_server, max_concurrent=2))
    assert 3 < len(openai_server.requests) <= 7
    assert sum(request["seconds"] for request in openai_server.requests) == pytest.approx(65, abs=0.2)
    assert all(request["seconds"] <= 20 for request in openai_server.requests)
    assert {
        (request["model"], request["language"], request["response_format"]) for request in openai_server.requests
    } == {("whisper", "en", "verbose_json")}
    assert openai_server.peak_concurrency == 2
    assert document.count("begin") == document.count("end ") + document.count("end\n") == len(openai_server.requests)
    starts = [60 * int(m) + int(s) for m, s in re.findall(r"^\*\*(\d+):(\d\d)\*\*", document, re.MULTILINE)]
    assert starts == sorted(starts)
    assert not [warning for warning in job.warnings if "transcript" in warning]


@pytest.mark.parametrize("segments", [{}, {"segments": None}, {"segments": []}])
async def test_response_without_segments_is_used(
    openai_server: FakeOpenAiServer, urls: dict[str, str], tmp_path: Path, segments: dict[str, Any]
) -> None:
    openai_server.answer_speech = lambda seconds: {"text": "only words", **segments}
    job = RecordingJob(make_parameters(**urls), tmp_path)
    assert "**0:00** only words" in read_document(job, await run(job, openai_server))


async def test_times_outside_the_recording_are_moved_into_it(
    openai_server: FakeOpenAiServer, urls: dict[str, str], tmp_path: Path
) -> None:
    segments = [{"start": -5.0, "text": "early"}, {"start": 9999.0, "text": "late"}]
    openai_server.answer_speech = lambda seconds: {"text": None, "segments": segments}
    job = RecordingJob(make_parameters(**urls), tmp_path)
    await run(job, openai_server)
    outputs = json.dumps([output for output, _ in job.steps.values()])
    starts = [float(start) for start in re.findall(r'"start_seconds": ([\d.]+)', outputs)]
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert 0 < starts[-1] < 600
    assert starts.count(starts[-1]) == 1


async def test_text_is_used_if_all_segments_are_empty(
    openai_server: FakeOpenAiServer, urls: dict[str, str], tmp_path: Path
) -> None:
    openai_server.answer_speech = lambda seconds: {"text": "only words", "segments": [{"start": 0, "text": " "}]}
    job = RecordingJob(make_parameters(**urls), tmp_path)
    assert "**0:00** only words" in read_document(job, await run(job, openai_server))


async def test_failed_chunk_is_named_in_warning(
    openai_server: FakeOpenAiServer, urls: dict[str, str], tmp_path: Path
) -> None:
    openai_server.answer_speech = make_response
    openai_server.scripted_failures = [(500, {"Retry-After": "0"})] * 4
    job = RecordingJob(make_parameters(**urls), tmp_path)
    document = read_document(job, await run(job, openai_server, max_concurrent=1))
    [warning] = [warning for warning in job.warnings if "incomplete" in warning]
    assert re.search(r"Missing: 0:00–0:\d\d \(it returned status 500: busy\)", warning)
    assert "incomplete" in document
    assert "begin" in document


@pytest.mark.parametrize(
    ("failures", "status", "max_requests"),
    [
        ([(401, {})], "401", 1),
        ([(404, {})], "404", 1),
        ([(500, {"Retry-After": "0"})] * 99, "500", 16),
        ([(429, {"Retry-After": "3600"})] * 99, "429", 4),
    ],
)
async def test_failed_transcription_is_explained_in_document(
    openai_server: FakeOpenAiServer,
    urls: dict[str, str],
    tmp_path: Path,
    failures: list[Any],
    status: str,
    max_requests: int,
) -> None:
    openai_server.scripted_failures = list(failures)
    failure_count = len(openai_server.scripted_failures)
    job = RecordingJob(make_parameters(**urls), tmp_path)
    document = read_document(job, await run(job, openai_server, max_concurrent=1))
    assert re.search(rf"There is no transcript\. The transcription .*{status}", document)
    assert any("There is no transcript" in warning for warning in job.warnings)
    assert failure_count - len(openai_server.scripted_failures) <= max_requests + 4
    assert KEY not in document + "".join(job.log_messages)


@pytest.mark.parametrize("answer", [[], {"segments": "x"}, b"<html>", {"segments": [{"text": "no time"}]}])
async def test_response_of_wrong_shape_is_explained(
    openai_server: FakeOpenAiServer, urls: dict[str, str], tmp_path: Path, answer: Any
) -> None:
    openai_server.answer_speech = lambda seconds: answer
    job = RecordingJob(make_parameters(**urls), tmp_path)
    assert re.search(r"There is no transcript.*its response", read_document(job, await run(job, openai_server)))


async def test_pending_request_reports_progress_and_can_be_cancelled(
    openai_server: FakeOpenAiServer, urls: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openai_server.scripted_failures = ["hang"] * 9
    job = RecordingJob(make_parameters(**urls), tmp_path)
    monkeypatch.setattr(speech_api, "PROGRESS_INTERVAL_SECONDS", 0.05)
    running = asyncio.create_task(run(job, openai_server))
    await poll_until(lambda: any("waiting for" in message for _, message in job.progress))
    job.cancel_at_percent = 0
    progress_count = len(job.progress)
    async with asyncio.timeout(60):
        with pytest.raises(ProcessorError, match="cancelled"):
            await running
    assert len(job.progress) == progress_count


async def test_metadata_says_that_session_was_transcribed(
    openai_server: FakeOpenAiServer, urls: dict[str, str], tmp_path: Path
) -> None:
    openai_server.answer_speech = make_response
    job = RecordingJob(make_parameters(**urls), tmp_path)
    results = await run(job, openai_server)
    assert results.metadata["transcribed"] is True
    assert split_front_matter(read_document(job, results))[0]["language"]


def write_audio(path: Path, seconds: float, quiet_at: list[float]) -> Path:
    """Write a tone with pauses of half a second at the seconds `quiet_at`."""
    samples = array("h")
    for number in range(int(seconds * SAMPLE_RATE)):
        second = number / SAMPLE_RATE
        is_quiet = any(pause <= second < pause + 0.5 for pause in quiet_at)
        samples.append(0 if is_quiet else int(8000 * math.sin(number / 8)))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())
    return path


def test_split_at_silence_covers_all_audio_and_cuts_at_pauses(tmp_path: Path) -> None:
    audio = write_audio(tmp_path / "a.wav", 50, [17.0, 33.0])
    chunks = [(begin / SAMPLE_RATE, end / SAMPLE_RATE) for begin, end in split_at_silence(audio, 20)]
    assert chunks[0][0] == 0
    assert chunks[-1][1] == 50
    assert all(previous[1] == chunk[0] for previous, chunk in pairwise(chunks))
    assert 17.0 <= chunks[0][1] <= 17.5
    assert 33.0 <= chunks[1][1] <= 33.5
    assert all(0 < end - begin <= 20 for begin, end in chunks)


def test_split_at_silence_ends_for_any_chunk_length(tmp_path: Path) -> None:
    audio = write_audio(tmp_path / "a.wav", 12, [])
    for seconds in (10, 11.99, 12, 500):
        chunks = list(split_at_silence(audio, seconds))
        assert chunks[0][0] == 0
        assert chunks[-1][1] == 12 * SAMPLE_RATE
