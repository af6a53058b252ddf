"""Tests of long recordings: 20 minutes need no more memory than 5, and can be cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import CancelJob
from jobledger.ledger.domain.events import JobLogged, JobProgressed
from jobledger.ledger.mongo.connection import Connection
from tests.processors.session.fixtures import CONFERENCE_PAGE, Site, SiteResponse, html, serve_site
from tests.processors.session.openai_server import KEY, FakeOpenAiServer, run_fake_openai
from tests.processors.session.video_files import make_tone, make_video_file
from tests.support.installation import has_exited
from tests.support.job_processes import list_own_job_processes
from tests.support.polling import poll_until
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process

_MAX_EXTRA_MEGABYTES = 20


@pytest.fixture
def site() -> Iterator[Site]:
    with serve_site() as running:
        running.put("/talk", html(CONFERENCE_PAGE))
        yield running


@pytest.fixture
def openai() -> Iterator[FakeOpenAiServer]:
    with run_fake_openai() as running:
        yield running


def make_worker_options(openai: FakeOpenAiServer, folder: Path) -> WorkerOptions:
    key = folder / "key"
    key.write_text(KEY)
    transcription = {
        "backend": "openai",
        "url": openai.url,
        "model": "whisper-1",
        "api_key_file": str(key),
        "max_concurrent": 2,
        "chunk_seconds": 60,  # with small chunks, the peak hardly depends on how many are in memory at the same time
    }
    return WorkerOptions(
        processors={"session": {"allowed_private_hosts": ["127.0.0.1"], "transcription": transcription}}
    )


def make_parameters(site: Site, minutes: int) -> dict[str, Any]:
    tone = make_tone(pitch=0.1 + minutes / 1000)  # jobs would share the chunks of equal recordings
    video_url = site.put(f"/{minutes}.mkv", SiteResponse(make_video_file("flac.mkv", tone, repeated=60 * minutes)))
    return {
        **{"event": "A conference", "session": f"A talk of {minutes} minutes", "filename": f"talk-{minutes}.md"},
        **{"track": "A track", "url": site.url("/talk"), "video_url": video_url},
    }


def read_peak_megabytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return max((int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM")), default=0)


async def measure_peak_megabytes(roles: RunningRoles, job_id: str) -> int:
    """Wait for the end of the job. Return the peak memory of its job process."""
    peak = 0

    async def watch() -> None:
        nonlocal peak
        while True:
            for pid in list_own_job_processes():
                peak = max(peak, read_peak_megabytes(pid))
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    job = await roles.wait_until_finished(job_id, seconds=120)
    watching.cancel()
    assert job["status"] == "completed", job["error"]
    return peak


@pytest.mark.timeout(240)
async def test_long_recording_needs_constant_memory_and_reports_progress(
    site: Site, openai: FakeOpenAiServer, connection: Connection, store: Path, tmp_path: Path
) -> None:
    openai.answer_speech = lambda seconds: {
        "text": "words",
        "segments": [{"start": 0.0, "end": seconds, "text": "words"}],
    }
    async with run_roles_in_process(
        connection, store, projector=True, worker=make_worker_options(openai, tmp_path)
    ) as roles:
        short = await measure_peak_megabytes(roles, await roles.submit(make_parameters(site, 5), job_type="session"))
        del openai.requests[:]
        job_id = await roles.submit(make_parameters(site, 20), job_type="session")
        long = await measure_peak_megabytes(roles, job_id)
        assert short > 0
        assert long < short + _MAX_EXTRA_MEGABYTES
        events = await roles.event_store.read_stream(job_id)
        times = [event.time for event in events if isinstance(event.event, JobProgressed | JobLogged)]
        gaps = [(later - earlier).total_seconds() for earlier, later in pairwise(times)]
        assert max(gaps) < 20
        assert sum(entry["seconds"] for entry in openai.requests) == pytest.approx(1200, abs=1)


@pytest.mark.timeout(240)
async def test_transcribing_job_process_is_killed_on_cancellation(
    site: Site, openai: FakeOpenAiServer, connection: Connection, store: Path, tmp_path: Path
) -> None:
    openai.scripted_failures = ["hang"] * 10
    async with run_roles_in_process(
        connection, store, projector=True, worker=make_worker_options(openai, tmp_path)
    ) as roles:
        job_id = await roles.submit(make_parameters(site, 20), job_type="session")
        await roles.wait_for_event(
            JobProgressed, job_id, predicate=lambda event: "Transcribing" in event.message, seconds=100
        )
        (pid,) = list_own_job_processes()
        await roles.handle_commands(job_id, CancelJob("user-1"))
        await poll_until(lambda: has_exited(pid), "the job process has exited", seconds=15)
        assert (await roles.wait_until_finished(job_id))["status"] == "cancelled"
