"""Inline jobs share an event loop with the rest of the process. Their faults affect only themselves."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.support.installation import Installation, http_client
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.plugins import install_plugin

HOSTILE_PROCESSOR = """
import asyncio, threading, time

def block_thread():
    threading.Thread(target=time.sleep, args=(3600,)).start()

async def leave():
    raise SystemExit(3)

async def numbers():
    try:
        yield 1
    finally:
        raise SystemExit(5)

async def run(self, job):
    loop = asyncio.get_running_loop()
    match job.parameters.action:
        case "cancel all tasks":
            for task in asyncio.all_tasks():
                task.cancel()
        case "stop the loop":
            loop.stop()
        case "stop the loop later":
            loop.call_soon(loop.stop)
        case "exit in a coroutine of a thread":
            threading.Thread(target=asyncio.run_coroutine_threadsafe, args=(leave(), loop)).start()
        case "stop the loop in a thread":
            threading.Thread(target=loop.call_soon_threadsafe, args=(loop.stop,)).start()
        case "exit in a generator that is left":
            async for _ in numbers():
                break
        case "block threads":
            await asyncio.gather(*(asyncio.to_thread(time.sleep, 3600) for _ in range(100)))
        case "block a thread":
            block_thread()
    await asyncio.sleep(0.1)
    return Results()

class Parameters(BaseModel):
    action: str

ValidProcessor.Parameters = Parameters
ValidProcessor.run = run
"""
OUTCOMES = {
    "cancel all tasks": ("failed", "PROCESSOR_FAULT"),
    "stop the loop": ("failed", "PROCESSOR_FAULT"),
    "stop the loop later": ("completed", None),
    "exit in a coroutine of a thread": ("completed", None),
    "stop the loop in a thread": ("completed", None),
    "exit in a generator that is left": ("completed", None),
    "block threads": ("failed", "TIMEOUT"),
    "block a thread": ("completed", None),
}


@needs_local_mongod
def test_inline_job_that_attacks_the_event_loop_affects_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin(tmp_path / "plugins", "hostile", HOSTILE_PROCESSOR)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "plugins"))
    # The embedded server must stop properly after the attacks, too.
    with Installation(tmp_path / "installation", event_worker={"shutdown_grace_seconds": 1}) as installation:
        up = installation.start_up_command()
        with http_client(up) as client:
            for action, (status, code) in OUTCOMES.items():
                for _ in range(2):
                    body = {
                        "job_type": "hostile",
                        "parameters": {"action": action},
                        "max_attempts": 1,
                        "timeout_s": 1 if code == "TIMEOUT" else 60,
                    }
                    response = client.post("/api/events/jobs", json=body, headers={"Prefer": "wait=60"})
                    job = response.json()["job"]
                    assert (job["status"], (job["error"] or {}).get("code")) == (status, code), (action, response.text)
            echo = client.post(
                "/api/events/jobs", json={"job_type": "echo", "parameters": {}}, headers={"Prefer": "wait=60"}
            )
            job = echo.json()["job"]
            assert job["status"] == "completed"
            assert client.get(job["results"]["markdown_url"]).status_code == 200
            assert client.get("/api/openapi.json").status_code == 200
        stopped_at = time.monotonic()
        outcome = up.stop(signal.SIGINT)
        assert time.monotonic() - stopped_at < 15
        assert outcome.exit_code == 0
        assert "Traceback" not in outcome.err
