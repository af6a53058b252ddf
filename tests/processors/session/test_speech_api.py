"""Speech to text by an endpoint: every second is sent once, answers come in order, and what fails is told honestly."""

from __future__ import annotations

import asyncio
import math
import re
import time
import wave
from array import array
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobledger.workers.processor import ProcessorError, Results
from jobledger.workers.processors.session import SessionProcessor
from jobledger.workers.processors.session.speech_api import PROGRESS_INTERVAL_SECONDS, split_at_silence
from jobledger.workers.processors.session.transcript import SAMPLE_RATE
from tests.processors.session.fixtures import (
    CONFERENCE_PAGE,
    RecordingJob,
    Site,
    SiteResponse,
    html,
    make_parameters,
    make_settings,
    make_video,
)
from tests.processors.session.openai_server import KEY, FakeOpenAiServer, run_fake_openai


@pytest.fixture
def api() -> Iterator[FakeOpenAiServer]:
    with run_fake_openai() as found:
        yield found


@cache
def recording() -> bytes:
    return make_video(65)


@pytest.fixture
def talk(site: Site, tmp_path: Path) -> dict[str, str]:
    """A session with a recording of 65 seconds."""
    page = site.put("/talk/", html(CONFERENCE_PAGE))
    return {
        "url": page,
        "video_url": site.put("/talk.webm", SiteResponse(recording(), headers={"Content-Type": "video/webm"})),
    }


async def run(job: RecordingJob, api: FakeOpenAiServer, **chosen: Any) -> Results:
    key = job.scratch_dir / "key"
    key.write_text(KEY)
    given = {
        "backend": "openai",
        "url": api.url,
        "model": "whisper",
        "api_key_file": key,
        "chunk_seconds": 20,
        **chosen,
    }
    return await SessionProcessor(make_settings(transcription=given)).run(job)


def body_of(job: RecordingJob, results: Results) -> str:
    assert results.markdown is not None
    return job.files[results.markdown.path].decode()


def segments(seconds: float) -> Any:
    """What an endpoint says of a piece: something at its beginning, and near its end."""
    found = [
        {"id": 0, "start": 0.5, "end": 2.0, "text": " begin "},
        {"id": 1, "start": seconds - 1, "end": seconds, "text": "end"},
    ]
    return {"task": "transcribe", "language": "english", "duration": seconds, "text": "begin end", "segments": found}


async def test_all_of_it_is_sent_in_pieces_and_put_together_in_order(
    api: FakeOpenAiServer, talk: dict[str, str], tmp_path: Path
) -> None:
    answered = 0

    def later_ones_first(seconds: float) -> Any:
        nonlocal answered
        answered += 1
        time.sleep(0.3 if answered % 2 else 0.0)
        return segments(seconds)

    api.answer_speech = later_ones_first
    job = RecordingJob(make_parameters(**talk, source_language="en-GB"), tmp_path)
    body = body_of(job, await run(job, api, max_concurrent=2))
    assert 3 < len(api.requests) <= 7
    assert sum(it["seconds"] for it in api.requests) == pytest.approx(65, abs=0.2)
    assert all(it["seconds"] <= 20 for it in api.requests)
    assert {(it["model"], it["language"], it["response_format"]) for it in api.requests} == {
        ("whisper", "en", "verbose_json")
    }
    assert api.peak_concurrency == 2
    assert body.count("begin") == body.count("end ") + body.count("end\n") == len(api.requests)
    starts = [60 * int(m) + int(s) for m, s in re.findall(r"^\*\*(\d+):(\d\d)\*\*", body, re.MULTILINE)]
    assert starts == sorted(starts)
    assert not [it for it in job.warnings if "transcript" in it]


async def test_a_text_without_times_is_taken_too(api: FakeOpenAiServer, talk: dict[str, str], tmp_path: Path) -> None:
    api.answer_speech = lambda seconds: {"text": "only words"}
    job = RecordingJob(make_parameters(**talk), tmp_path)
    assert "**0:00** only words" in body_of(job, await run(job, api))


async def test_a_piece_that_fails_is_missing_and_that_is_said(
    api: FakeOpenAiServer, talk: dict[str, str], tmp_path: Path
) -> None:
    api.answer_speech = segments
    api.scripted_failures = [(500, {"Retry-After": "0"})] * 4
    job = RecordingJob(make_parameters(**talk), tmp_path)
    body = body_of(job, await run(job, api, max_concurrent=1))
    [warning] = [it for it in job.warnings if "incomplete" in it]
    assert re.search(r"Missing: 0:00–0:\d\d \(it returned status 500: busy\)", warning)
    assert "incomplete" in body
    assert "begin" in body


@pytest.mark.parametrize(
    ("troubles", "says", "requests"),
    [
        ([(401, {})], "401", 1),
        ([(404, {})], "404", 1),
        ([(500, {"Retry-After": "0"})] * 99, "500", 16),
        ([(429, {"Retry-After": "3600"})] * 99, "429", 4),
    ],
)
async def test_without_a_text_the_document_says_why(
    api: FakeOpenAiServer, talk: dict[str, str], tmp_path: Path, troubles: list[Any], says: str, requests: int
) -> None:
    api.scripted_failures = list(troubles)
    before = len(api.scripted_failures)
    job = RecordingJob(make_parameters(**talk), tmp_path)
    body = body_of(job, await run(job, api, max_concurrent=1))
    assert re.search(rf"There is no transcript\. The transcription .*{says}", body)
    assert any("There is no transcript" in it for it in job.warnings)
    assert before - len(api.scripted_failures) <= requests + 4
    assert KEY not in body + "".join(job.lines)


@pytest.mark.parametrize("answer", [[], {"segments": "x"}, b"<html>", {"segments": [{"text": "no time"}]}])
async def test_answers_of_another_form_are_told(
    api: FakeOpenAiServer, talk: dict[str, str], tmp_path: Path, answer: Any
) -> None:
    api.answer_speech = lambda seconds: answer
    job = RecordingJob(make_parameters(**talk), tmp_path)
    assert re.search(r"There is no transcript.*its response", body_of(job, await run(job, api)))


async def test_while_it_is_waited_for_the_progress_moves_and_a_cancel_is_heard(
    api: FakeOpenAiServer, talk: dict[str, str], tmp_path: Path
) -> None:
    api.scripted_failures = ["hang"] * 9
    job = RecordingJob(make_parameters(**talk), tmp_path)
    running = asyncio.create_task(run(job, api))
    async with asyncio.timeout(20):
        while not any("waiting for" in message for _, message in job.told):  # noqa: ASYNC110 - nobody tells us
            await asyncio.sleep(0.05)
    job._cancel_at = 0
    begun = time.monotonic()
    with pytest.raises(ProcessorError, match="cancelled"):
        await running
    assert time.monotonic() - begun < PROGRESS_INTERVAL_SECONDS + 1


async def test_the_front_matter_says_that_it_was_transcribed(
    api: FakeOpenAiServer, talk: dict[str, str], tmp_path: Path
) -> None:
    api.answer_speech = segments
    job = RecordingJob(make_parameters(**talk), tmp_path)
    results = await run(job, api)
    assert results.metadata["transcribed"] is True
    assert yaml.safe_load(body_of(job, results).split("---")[1])["language"]


def sound(path: Path, seconds: float, quiet_at: list[float]) -> Path:
    """A tone with pauses of half a second."""
    samples = array("h")
    for number in range(int(seconds * SAMPLE_RATE)):
        at = number / SAMPLE_RATE
        loud = not any(pause <= at < pause + 0.5 for pause in quiet_at)
        samples.append(int(8000 * math.sin(number / 8)) if loud else 0)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())
    return path


def test_it_is_cut_where_it_is_quiet_and_nothing_is_left_out(tmp_path: Path) -> None:
    audio = sound(tmp_path / "a.wav", 50, [17.0, 33.0])
    found = [(begin / SAMPLE_RATE, end / SAMPLE_RATE) for begin, end in split_at_silence(audio, 20)]
    assert found[0][0] == 0
    assert found[-1][1] == 50
    assert all(one[1] == other[0] for one, other in pairwise(found))
    assert 17.0 <= found[0][1] <= 17.5
    assert 33.0 <= found[1][1] <= 33.5
    assert all(0 < end - begin <= 20 for begin, end in found)


def test_however_long_a_piece_may_be_it_ends(tmp_path: Path) -> None:
    audio = sound(tmp_path / "a.wav", 12, [])
    for seconds in (10, 11.99, 12, 500):
        found = list(split_at_silence(audio, seconds))
        assert found[0][0] == 0
        assert found[-1][1] == 12 * SAMPLE_RATE
