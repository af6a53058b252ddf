"""An hour of film: memory stays what it is for a quarter, progress moves, and a cancellation takes effect at once."""

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
from tests.support.job_processes import has_exited, list_own_job_processes
from tests.support.role_runner import RunningRoles, WorkerOptions, poll_until, run_roles_in_process

_MOST_MEGABYTES_MORE = 30


@pytest.fixture
def site() -> Iterator[Site]:
    with serve_site() as running:
        running.put("/talk", html(CONFERENCE_PAGE))
        yield running


@pytest.fixture
def api() -> Iterator[FakeOpenAiServer]:
    with run_fake_openai() as running:
        yield running


def worker(api: FakeOpenAiServer, folder: Path) -> WorkerOptions:
    key = folder / "key"
    key.write_text(KEY)
    listening = {
        "backend": "openai",
        "url": api.url,
        "model": "whisper-1",
        "api_key_file": str(key),
        "max_concurrent": 2,
    }
    return WorkerOptions(processors={"session": {"allowed_private_hosts": ["127.0.0.1"], "transcription": listening}})


def asked(site: Site, minutes: int) -> dict[str, Any]:
    film_url = site.put(
        f"/{minutes}.mkv", SiteResponse(make_video_file("flac.mkv", make_tone(), repeated=60 * minutes))
    )
    return {
        **{"event": "A conference", "session": f"A talk of {minutes} minutes", "filename": f"talk-{minutes}.md"},
        **{"track": "A track", "url": site.url("/talk"), "video_url": film_url},
    }


def memory_megabytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return max((int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM")), default=0)


async def peak_megabytes(here: RunningRoles, job_id: str) -> int:
    """Follow the job to its end; return the most memory its child ever had."""
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            for child in list_own_job_processes():
                most = max(most, memory_megabytes(child))
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    job = await here.wait_until_finished(job_id, seconds=120)
    watching.cancel()
    assert job["status"] == "completed", job["error"]
    return most


@pytest.mark.timeout(240)
async def test_an_hour_takes_no_more_memory_than_a_quarter_and_its_progress_moves(
    site: Site, api: FakeOpenAiServer, connection: Connection, store: Path, tmp_path: Path
) -> None:
    api.answer_speech = lambda seconds: {"text": "words", "segments": [{"start": 0.0, "end": seconds, "text": "words"}]}
    async with run_roles_in_process(connection, store, projector=True, worker=worker(api, tmp_path)) as here:
        quarter = await peak_megabytes(here, await here.submit(asked(site, 15), job_type="session"))
        del api.requests[:]
        job_id = await here.submit(asked(site, 60), job_type="session")
        hour = await peak_megabytes(here, job_id)
        assert quarter > 0
        assert hour < quarter + _MOST_MEGABYTES_MORE
        events = await here.event_store.read_stream(job_id)
        told = [event.time for event in events if isinstance(event.event, JobProgressed | JobLogged)]
        waits = [(later - earlier).total_seconds() for earlier, later in pairwise(told)]
        assert max(waits) < 5
        assert sum(entry["seconds"] for entry in api.requests) == pytest.approx(3600, abs=1)


@pytest.mark.timeout(120)
async def test_a_job_that_listens_is_cancelled_within_two_seconds(
    site: Site, api: FakeOpenAiServer, connection: Connection, store: Path, tmp_path: Path
) -> None:
    api.scripted_failures = ["hang"] * 10
    async with run_roles_in_process(connection, store, projector=True, worker=worker(api, tmp_path)) as here:
        job_id = await here.submit(asked(site, 20), job_type="session")
        await here.wait_for_event(
            JobProgressed, job_id, predicate=lambda event: "Listening" in event.message, seconds=60
        )
        (child,) = list_own_job_processes()
        await here.handle_commands(job_id, CancelJob("user-1"))
        await poll_until(lambda: has_exited(child), "the child is gone", seconds=2)
        assert (await here.wait_until_finished(job_id))["status"] == "cancelled"
