"""Programs of an application with own packages `workers` and `api` submit its job functions, and get typed results."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pymongo import MongoClient

from tests.support.doc_examples import DOCS, read_code_blocks
from tests.support.installation import Installation, RunningCommand
from tests.workers.test_job_functions import write_shop

SYNCHRONOUS = """
from decimal import Decimal

from jobledger import Client, JobFailedError
from shop.jobs import Invoice, Order, invoice, picky

with Client.from_env() as client:
    job = client.with_options(priority=7).submit(invoice, "x", Order(item="tea", count=2), price=Decimal("1.50"))
    result = job.result(timeout=60)
    assert type(result) is Invoice, result
    assert (result.total, result.lines) == (Decimal("3.600"), [("tea", 2)]), result
    assert client.job(job.job_id, invoice).result() == result
    assert job.get().priority == 7

    failed = client.submit(picky, kind="permanent")
    codes = []
    for parameters in (None, picky.bind(kind="value")):
        if parameters is not None:
            assert failed.restart(parameters=parameters).parameters == {"kind": "value"}
        try:
            failed.result(timeout=60)
        except JobFailedError as error:
            codes.append(error.code)
    assert codes == ["NO_CUSTOMER", "PROCESSOR_FAULT"], codes
    print(job.job_id, failed.job_id)
"""
WEB = """
from contextlib import asynccontextmanager

from fastapi import FastAPI

from jobledger import AsyncClient
from shop.jobs import Invoice, Order, invoice


@asynccontextmanager
async def lifespan(app):
    async with AsyncClient.from_env() as app.state.client:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/invoices")
async def submit(customer: str, order: Order) -> dict[str, str]:
    job = await app.state.client.submit(invoice, customer, order)
    return {"job_id": job.job_id}


@app.get("/invoices/{job_id}")
async def get(job_id: str) -> Invoice:
    events = [event.type async for event in app.state.client.follow(job_id)]
    assert events[0] == "JobSubmitted" and events[-1] == "JobCompleted", events
    return await app.state.client.job(job_id, invoice).result()
"""
ASYNCHRONOUS = """
import asyncio

import httpx

from api.web import app


async def main():
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://app", timeout=60) as http,
    ):
        answer = await http.post("/invoices", params={"customer": "x"}, json={"item": "tea", "count": 2})
        result = (await http.get(f"/invoices/{answer.json()['job_id']}")).json()
        assert result == {"total": "24.120", "due": "2026-02-01", "lines": [["tea", 2]], "currency": "EUR"}, result


asyncio.run(main())
"""


@pytest.fixture(scope="module")
def up(
    mongodb_uri: str, mongodb_client: MongoClient[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Installation, RunningCommand]]:
    """All roles with the application, started in its directory."""
    db_name = f"test_{uuid4().hex[:16]}"
    directory = write_shop(tmp_path_factory.mktemp("shop"))
    (directory / "api" / "web.py").write_text(WEB)
    with Installation(directory, mongodb={"uri": mongodb_uri, "db_name": db_name}) as installation:
        yield installation, installation.start("up", "--app", "shop.jobs:app").wait_until_ready()
    mongodb_client.drop_database(db_name)


def run_program(up: tuple[Installation, RunningCommand], name: str, text: str) -> str:
    """Run a program in the directory of the application, and return its output."""
    installation, command = up
    path = Path(installation.directory, f"{name}.py")
    path.write_text(text)
    outcome = installation.start_command([sys.executable, path], name, JOBLEDGER_URL=command.url).wait_for_exit()
    assert outcome.exit_code == 0, outcome.err
    return outcome.out


def test_synchronous_program_gets_typed_result_and_restarts_with_parameters(
    up: tuple[Installation, RunningCommand],
) -> None:
    completed, failed = run_program(up, "synchronous", SYNCHRONOUS).split()
    installation, command = up
    shown = installation.run("jobs", "get", completed, JOBLEDGER_URL=command.url).out
    output = '{"total":"3.600","due":"2026-02-01","lines":[["tea",2]],"currency":"EUR"}'
    assert re.search(rf"^ +output +{re.escape(output)}$", shown, re.MULTILINE), shown
    shown = installation.run("jobs", "get", failed, JOBLEDGER_URL=command.url).out
    assert "PROCESSOR_FAULT" in shown
    assert "Traceback" not in shown


def test_readme_programs_run_and_print_result(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    jobs, program = read_code_blocks(DOCS.parent / "README.md", "python")
    with Installation(tmp_path, mongodb={"uri": mongodb_uri, "db_name": db_name}) as installation:
        (tmp_path / "jobs.py").write_text(jobs)
        command = installation.start("up", "--app", "jobs").wait_until_ready()
        assert run_program((installation, command), "program", program) == "Hello Ada!\n"


def test_fastapi_application_submits_follows_and_returns_typed_result(
    up: tuple[Installation, RunningCommand],
) -> None:
    pytest.importorskip("fastapi", reason="install fastapi: pip install fastapi")
    run_program(up, "asynchronous", ASYNCHRONOUS)
