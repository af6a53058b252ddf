"""Transcription by an OpenAI-compatible API: chunks, order of the text, and the reasons of missing parts."""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
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
from jobledger.workers.processors.session.step_context import SHARED_STEP_MAX_AGE
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
from tests.processors.session.video_files import Sound, make_media_file
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


def test_split_at_silence_leaves_no_chunk_that_is_too_short(tmp_path: Path) -> None:
    audio = write_audio(tmp_path / "a.wav", 20.05, [19.5])
    chunks = list(split_at_silence(audio, 20))
    assert chunks[-1][1] == int(20.05 * SAMPLE_RATE)
    assert all(end - begin >= SAMPLE_RATE for begin, end in chunks)


SRT = "1\n00:00:00,500 --> 00:00:02,000\nbegin\n\n2\n00:00:03,000 --> 00:00:04,000\nend\n"


@pytest.mark.parametrize(
    ("formats", "answer", "starts"),
    [
        (["srt"], SRT.encode(), [0, 3]),
        (["srt"], {"text": SRT}, [0, 3]),
        (["srt"], json.dumps(SRT).encode(), [0, 3]),
        (["srt", "json"], b"WEBVTT\n\n00:00.500 --> 00:02.000\nbegin\n\n00:03.000 --> 00:04.000\nend\n", [0, 3]),
        (["json"], {"text": "begin end"}, [0]),
        (["text"], b"begin end\n", [0]),
        (["json", "text"], {"text": "begin end", "usage": {"type": "tokens"}}, [0]),
    ],
)
async def test_format_that_the_api_supports_is_used(
    openai_server: FakeOpenAiServer,
    urls: dict[str, str],
    tmp_path: Path,
    formats: list[str],
    answer: Any,
    starts: list[float],
) -> None:
    openai_server.speech_formats = formats
    openai_server.answer_speech = lambda seconds: answer
    job = RecordingJob(make_parameters(**urls), tmp_path)
    document = read_document(job, await run(job, openai_server, max_concurrent=1))
    assert [warning for warning in job.warnings if "transcript" in warning] == []
    assert "**0:00** begin end begin end" in document
    assert {request["response_format"] for request in openai_server.requests} == {formats[0]}
    [first, *_] = [output for name, output in get_outputs(job) if name.startswith("transcript 0:00")]
    assert [int(start) for start, _ in first] == starts


def get_outputs(job: RecordingJob) -> list[tuple[str, Any]]:
    return [(name, output) for (name, _), (output, _) in job.steps.items()]


async def test_format_is_requested_from_the_api_only_until_it_is_known(
    openai_server: FakeOpenAiServer, urls: dict[str, str], tmp_path: Path
) -> None:
    rejected: list[str] = []

    class Formats(tuple[str, ...]):
        def __contains__(self, name: object) -> bool:
            rejected.append(str(name))
            return name == "json"

    openai_server.speech_formats = Formats()
    openai_server.answer_speech = lambda seconds: {"text": "words"}
    job = RecordingJob(make_parameters(**urls), tmp_path)
    await run(job, openai_server, max_concurrent=1)
    assert rejected == ["verbose_json", "srt"] + ["json"] * len(openai_server.requests)
    assert len(openai_server.requests) > 3


@pytest.mark.parametrize(("status", "is_rejected"), [(400, True), (422, True), (401, True), (503, False)])
async def test_failure_after_some_parts_keeps_them(
    openai_server: FakeOpenAiServer, urls: dict[str, str], tmp_path: Path, status: int, is_rejected: bool
) -> None:
    """A rejection of one part does not stop the others, except for one that holds for all."""

    def answer_and_fail_once(seconds: float) -> Any:
        if len(openai_server.requests) == 2:
            openai_server.scripted_failures = [(status, {"Retry-After": "0"})] * (1 if is_rejected else 4)
        return make_response(seconds)

    openai_server.answer_speech = answer_and_fail_once
    job = RecordingJob(make_parameters(**urls), tmp_path)
    document = read_document(job, await run(job, openai_server, max_concurrent=1))
    [warning] = [warning for warning in job.warnings if "transcript" in warning]
    assert re.fullmatch(
        rf"The transcript is incomplete\. Missing: 0:\d\d–\d:\d\d \(it returned status {status}: busy\)\.", warning
    )
    assert warning.count("–1:05") == (status == 401)
    assert document.count("begin") == (2 if status == 401 else len(openai_server.requests)) > 1


async def test_later_attempt_sends_only_missing_parts(
    openai_server: FakeOpenAiServer, urls: dict[str, str], tmp_path: Path
) -> None:
    """The first attempt ends after two parts, as by a crash of its process. The recording is fetched again."""
    openai_server.answer_speech = make_response
    job = RecordingJob(make_parameters(**urls), tmp_path)
    complete = read_document(job, await run(job, openai_server, max_concurrent=1))
    sent = [request["seconds"] for request in openai_server.requests]
    openai_server.requests.clear()
    steps = {key: step for key, step in job.steps.items() if key[0].startswith("transcript ")}
    assert len(steps) == len(sent) > 3
    (tmp_path / "2").mkdir()
    job = RecordingJob(make_parameters(**urls), tmp_path / "2", attempt=2, steps=dict(list(steps.items())[:2]))
    document = read_document(job, await run(job, openai_server))
    assert sorted(request["seconds"] for request in openai_server.requests) == sorted(sent[2:])
    assert document == complete


async def test_transcribed_parts_are_shared_with_other_jobs(
    openai_server: FakeOpenAiServer, urls: dict[str, str], tmp_path: Path
) -> None:
    openai_server.answer_speech = make_response
    job = RecordingJob(make_parameters(**urls), tmp_path)
    await run(job, openai_server)
    ages = {age for name, age in job.share_max_ages.items() if name.startswith("transcript")}
    assert ages == {SHARED_STEP_MAX_AGE}


async def test_failed_part_is_sent_again_by_later_attempt(
    openai_server: FakeOpenAiServer, urls: dict[str, str], tmp_path: Path
) -> None:
    openai_server.answer_speech = make_response
    openai_server.scripted_failures = [(500, {"Retry-After": "0"})] * 4
    job = RecordingJob(make_parameters(**urls), tmp_path)
    await run(job, openai_server, max_concurrent=1)
    openai_server.requests.clear()
    steps = {key: step for key, step in job.steps.items() if key[0] != "transcript"}
    (tmp_path / "2").mkdir()
    job = RecordingJob(make_parameters(**urls), tmp_path / "2", attempt=2, steps=steps)
    document = read_document(job, await run(job, openai_server))
    assert len(openai_server.requests) == 1
    assert not [warning for warning in job.warnings if "transcript" in warning]
    assert "**0:00** begin" in document


@pytest.mark.parametrize("change", [{"model": "other"}, {"language": "de"}, {"pitch": 500}])
async def test_transcribed_part_is_reused_only_for_same_audio_model_and_language(
    openai_server: FakeOpenAiServer, site: Site, page_url: str, tmp_path: Path, change: dict[str, Any]
) -> None:
    def put_recording(pitch: int) -> str:
        """Put a recording on the site whose chunks end in its pauses, whatever its pitch."""
        sound = Sound(pitch, seconds=45, pauses=((15, 16), (31, 32)))
        return site.put("/talk.webm", SiteResponse(make_media_file("matroska", [sound])))

    openai_server.answer_speech = make_response
    job = RecordingJob(make_parameters(url=page_url, video_url=put_recording(400)), tmp_path)
    await run(job, openai_server)
    sent = sorted(request["seconds"] for request in openai_server.requests)
    openai_server.requests.clear()
    parameters = make_parameters(
        url=page_url,
        video_url=put_recording(change.get("pitch", 400)),
        source_language=change.get("language", "en"),
    )
    (tmp_path / "2").mkdir()
    steps = {key: step for key, step in job.steps.items() if key[0] != "transcript"}
    job = RecordingJob(parameters, tmp_path / "2", attempt=2, steps=steps)
    await run(job, openai_server, model=change.get("model", "whisper"))
    assert sorted(request["seconds"] for request in openai_server.requests) == sent


async def test_small_chunks_share_a_checkpoint(
    openai_server: FakeOpenAiServer, urls: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech_api, "_MAX_PARTS", 2)
    openai_server.answer_speech = make_response
    job = RecordingJob(make_parameters(**urls), tmp_path)
    document = read_document(job, await run(job, openai_server, chunk_seconds=10, max_concurrent=2))
    names = [name for name in job.executed_steps if name.startswith("transcript ")]
    assert 1 <= len(names) <= 2
    assert len(openai_server.requests) > 6
    assert openai_server.peak_concurrency == 2
    assert document.count("begin") == len(openai_server.requests)


async def test_silent_chunk_is_not_sent(
    openai_server: FakeOpenAiServer, site: Site, page_url: str, tmp_path: Path
) -> None:
    openai_server.answer_speech = make_response
    sound = Sound(seconds=60, pauses=((12, 59),))
    url = site.put("/talk.webm", SiteResponse(make_media_file("matroska", [sound])))
    job = RecordingJob(make_parameters(url=page_url, video_url=url), tmp_path)
    await run(job, openai_server)
    assert len(openai_server.requests) == 2


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({}, "sk-wrong-0123456789", "it returned status 401: Incorrect API key provided"),
        ({"api_key_file": "/nonexistent"}, KEY, "the API key file /nonexistent cannot be read"),
        ({"url": "http://127.0.0.1:1/v1"}, KEY, "it cannot be reached (ConnectError)"),
    ],
)
async def test_recording_is_not_downloaded_if_the_api_cannot_be_used(
    openai_server: FakeOpenAiServer,
    site: Site,
    urls: dict[str, str],
    tmp_path: Path,
    changes: dict[str, Any],
    key: str,
    message: str,
) -> None:
    job = RecordingJob(make_parameters(**urls), tmp_path)
    (tmp_path / "other-key").write_text(key)
    changes = {"api_key_file": tmp_path / "other-key"} | changes
    await run(job, openai_server, **changes)
    [warning] = [warning for warning in job.warnings if "transcript" in warning]
    assert warning.startswith(f"There is no transcript. The transcription API failed: {message}")
    assert warning.endswith("The recording was not downloaded.")
    assert "/talk.webm" not in site.requested_paths


async def test_recording_is_not_downloaded_without_pocketsphinx(
    site: Site, urls: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    job = RecordingJob(make_parameters(**urls), tmp_path)
    await SessionProcessor(make_settings(transcription={"backend": "pocketsphinx"})).run(job)
    assert "pocketsphinx is not installed" in job.warnings[0]
    assert "/talk.webm" not in site.requested_paths
