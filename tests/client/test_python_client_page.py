"""Run the programs of docs/how-to/python-client.md."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import Api
from tests.support.doc_examples import DOCS, read_code_blocks, read_line, run_program
from tests.support.polling import DEADLINE_SECONDS

FIRST, MANY, FASTAPI, EVENTS = read_code_blocks(DOCS / "how-to" / "python-client.md", "python")


@pytest.fixture(autouse=True)
def _environment(api: Api, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JOBLEDGER_URL", api.url)
    monkeypatch.setenv("JOBLEDGER_STATE_DIR", str(tmp_path / "state"))


async def run(text: str, path: Path) -> str:
    await asyncio.to_thread(path.write_text, text)
    process = await asyncio.create_subprocess_exec(sys.executable, path, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(DEADLINE_SECONDS):
        output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def test_first_program_prints_the_result(tmp_path: Path) -> None:
    assert '"text":"Hello"' in await run(FIRST, tmp_path / "first.py")


async def test_program_submits_many_jobs(tmp_path: Path) -> None:
    text = MANY.replace("range(1000)", "range(20)").replace(', on_end=Webhook("https://example.org/hook")', "")
    assert await run(text, tmp_path / "many.py") == "20\n"


async def test_fastapi_application_submits_and_follows(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="install fastapi: pip install fastapi")
    namespace: dict[str, Any] = {}
    exec(compile(FASTAPI, "python-client.md", "exec"), namespace)
    app = namespace["app"]
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://app", timeout=DEADLINE_SECONDS) as http,
    ):
        job_id = (await http.post("/greetings", params={"text": "x"})).json()["job_id"]
        lines = (await http.get(f"/greetings/{job_id}/progress")).text.split("\n\n")
    assert lines[0].startswith("data: JobSubmitted")
    assert any(line.startswith("data: JobProgressed 0") for line in lines)
    assert lines[-2].startswith("data: JobCompleted")


async def test_events_program_continues_after_kill(api: Api, tmp_path: Path) -> None:
    first = await api.submit({"text": "a"})
    with run_program(EVENTS, tmp_path / "events.py") as lines:
        assert first in await read_line(lines)
        second = await api.submit({"text": "b"})
        assert second in await read_line(lines)
    third = await api.submit({"text": "c"})
    with run_program(EVENTS, tmp_path / "events.py") as lines:
        line = await read_line(lines)
        assert first not in line
        if second in line:  # it was not yet saved as processed
            line = await read_line(lines)
        assert third in line
