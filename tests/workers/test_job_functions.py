"""Job functions of an application, run by the command line as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any
from uuid import uuid4

import httpx
import pytest
from pymongo import MongoClient

from tests.support.installation import Installation, RunningCommand, assert_one_line_error, http_client

JOBS = '''
"""The jobs of a shop. It has packages with the names of Jobledger's own."""
from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

import jobledger
from api.prices import PRICE
from workers.tax import TAX


class ShopSettings(BaseModel):
    currency: str = "EUR"


class Order(BaseModel):
    item: str
    count: Annotated[int, Field(gt=0)] = 1


class Invoice(BaseModel):
    total: Decimal
    due: date
    lines: list[tuple[str, int]]
    currency: str


@dataclass
class Rendered:
    total: Decimal
    day: date


CALLS = Path(__file__).with_name("calls")


def render(order: Order, price: Decimal) -> Rendered:
    assert isinstance(order, Order)
    print("rendering", order.item, *range(100))
    return Rendered(total=order.count * price * TAX, day=date(2026, 2, 1))


@jobledger.job("invoice", retry=jobledger.Retry(max_attempts=2, base_delay="100ms"), timeout="90s")
async def invoice(
    ctx: jobledger.Context[ShopSettings], customer: str, order: Order, price: Decimal = PRICE, fail_once: bool = False
) -> Invoice:
    rendered = await ctx.step("render", render, order, price)
    assert type(rendered) is Rendered and type(rendered.total) is Decimal and type(rendered.day) is date
    ctx.log.info("rendered for %s", customer)
    logging.getLogger("shop.mail").warning("no mail server")
    warnings.warn("old template")
    await ctx.progress(50, "half")
    ctx.warn("The logo is missing.")
    await ctx.save(f"invoices/{ctx.job_id}.md", f"# {rendered.total}")
    if fail_once and ctx.attempt == 1:
        raise ValueError("<b>no luck</b>")
    return Invoice(
        total=rendered.total, due=rendered.day, lines=[(order.item, order.count)], currency=ctx.settings.currency
    )


@jobledger.job("report")
def report(ctx: jobledger.SyncContext, days: list[int], wait: bool = False) -> dict[str, int]:
    assert threading.current_thread() is not threading.main_thread()
    saved = ctx.save("reports/a.bin", bytes(days))
    total = ctx.step("sum", sum, days)
    ctx.log.warning("total %d", total)
    while wait and not ctx.cancelled:
        time.sleep(0.05)
    return {"total": total, "size": saved.size}


@jobledger.job("never", retry=None)
async def never() -> None:
    raise RuntimeError("broken")


@jobledger.job("picky", retry=jobledger.Retry(3, on=(OSError,), base_delay=0.1))
async def picky(kind: str) -> None:
    if kind == "permanent":
        raise jobledger.PermanentError("No such customer.", code="NO_CUSTOMER")
    raise {"os": OSError, "value": ValueError}[kind]("broken")


@jobledger.job("quick", isolation="inline")
async def quick(number: int) -> int:
    logging.getLogger("shop").warning("quick %d", number)
    return number + 1


@jobledger.job("step-file", retry=jobledger.Retry(2, base_delay=0.1))
async def step_file(ctx: jobledger.Context) -> str:
    async def write() -> str:
        await ctx.save(f"files/{ctx.job_id}.txt", "content")
        return "written"

    text = await ctx.step("write", write)
    if ctx.attempt == 1:
        raise RuntimeError("after the step")
    return text


@jobledger.job("lookup", version="1")
async def lookup(ctx: jobledger.Context, word: str) -> str:
    async def look_up(word: str) -> str:
        with CALLS.open("a") as calls:
            calls.write(word)
        return word.upper()

    return await ctx.step("look up", look_up, word, share=timedelta(days=1))


@jobledger.job("unversioned")
async def unversioned(ctx: jobledger.Context) -> int:
    return await ctx.step("add", sum, [1, 2], share=timedelta(days=1))


app = jobledger.App(jobs=[invoice, report, never, picky, quick, step_file, lookup, unversioned])
'''


def write_shop(directory: Path) -> Path:
    """Write a package `shop` with its jobs, and own packages `workers` and `api` beside it."""
    for name, text in {
        "shop/__init__.py": "",
        "shop/jobs.py": JOBS,
        "workers/__init__.py": "",
        "workers/tax.py": "from decimal import Decimal\nTAX = Decimal('1.2')\n",
        "api/__init__.py": "",
        "api/prices.py": "from decimal import Decimal\nPRICE = Decimal('10.05')\n",
    }.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def up(
    mongodb_uri: str, mongodb_client: MongoClient[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCommand]:
    """All roles with the application, started in its directory."""
    db_name = f"test_{uuid4().hex[:16]}"
    directory = write_shop(tmp_path_factory.mktemp("shop"))
    sections: dict[str, dict[str, Any]] = {
        "mongodb": {"uri": mongodb_uri, "db_name": db_name},
        "processors": {"invoice": {"currency": "CHF"}},
        "event_worker": {"writable_paths": ["shop"]},
    }
    with Installation(directory, **sections) as installation:
        yield installation.start("up", "--app", "shop.jobs:app", PYTHONUNBUFFERED="1").wait_until_ready()
    mongodb_client.drop_database(db_name)


@pytest.fixture
def client(up: RunningCommand) -> Iterator[httpx.Client]:
    with http_client(up) as client:
        yield client


def run(client: httpx.Client, job_type: str, parameters: dict[str, Any], **fields: Any) -> dict[str, Any]:
    body = {"job_type": job_type, "parameters": parameters, **fields}
    response = client.post("/api/events/jobs", json=body, headers={"Prefer": "wait=60"})
    assert response.status_code < 300, response.text
    job: dict[str, Any] = response.json()["job"]
    return job


def read_logs(client: httpx.Client, job: dict[str, Any]) -> list[tuple[str, str | None, str]]:
    entries = client.get(f"/api/events/jobs/{job['job_id']}").json()["job"]["logs"]
    return [(entry["level"], entry.get("logger"), entry["message"]) for entry in entries]


def test_job_function_returns_typed_result_and_its_files(client: httpx.Client) -> None:
    job = run(client, "invoice", {"customer": "x", "order": {"item": "tea", "count": 2}, "price": "1.50"})
    assert job["status"] == "completed", job["error"]
    assert job["results"]["output"] == {
        "total": "3.600",
        "due": "2026-02-01",
        "lines": [["tea", 2]],
        "currency": "CHF",
    }
    path = f"invoices/{job['job_id']}.md"
    assert job["results"]["markdown_file"] == f"/events/{path}"
    assert [file["path"] for file in job["results"]["files"]] == [path]
    assert job["results"]["metadata"]["warnings"] == ["The logo is missing."]
    assert (job["max_attempts"], job["timeout_s"]) == (2, 90)


def test_job_log_has_records_output_and_warnings_with_level_and_logger(client: httpx.Client) -> None:
    job = run(client, "invoice", {"customer": "Ada", "order": {"item": "tea"}})
    logs = read_logs(client, job)
    assert ("info", None, "rendered for Ada") in logs
    assert ("warning", "shop.mail", "no mail server") in logs
    assert ("info", None, f"rendering tea {' '.join(map(str, range(100)))}") in logs
    [warned] = [text for level, logger, text in logs if (level, logger) == ("warning", "py.warnings")]
    assert "old template" in warned
    assert warned == warned.rstrip()


def test_uncaught_exception_is_retried_with_traceback_in_details(client: httpx.Client, up: RunningCommand) -> None:
    job = run(client, "invoice", {"customer": "x", "order": {"item": "tea"}, "fail_once": True})
    assert (job["status"], job["attempt"]) == ("completed", 2), job
    events = client.get(f"/api/events/jobs/{job['job_id']}/history").json()["events"]
    [failed] = [event for event in events if event["type"] == "JobAttemptFailed"]
    details = failed["data"]["error"]["details"]
    assert failed["data"]["error"]["code"] == "PROCESSOR_FAULT"
    assert details["retryable"] is True
    lines = details["traceback"].splitlines()
    assert lines[1].endswith('/shop/jobs.py", line ' + lines[1].rpartition(" line ")[2])
    assert lines[-1] == "ValueError: <b>no luck</b>"
    assert sum(event["type"] == "StepCompleted" for event in events) == 1, "the second attempt reuses the step"
    [line] = [line for line in up.stderr.splitlines() if job["job_id"] in line]
    assert all(text in line for text in ("attempt failed", "attempt=1", "code=PROCESSOR_FAULT")), line


def test_type_without_retry_ends_with_first_failure(client: httpx.Client, up: RunningCommand) -> None:
    job = run(client, "never", {})
    assert (job["status"], job["attempt"], job["max_attempts"]) == ("failed", 1, 1)
    assert job["error"]["details"]["retryable"] is False
    rejected = client.post("/api/events/jobs", json={"job_type": "never", "parameters": {}, "max_attempts": 2})
    assert rejected.status_code == 422
    assert "never retried" in rejected.text
    page = client.get(f"/monitoring/events/jobs/{job['job_id']}").text
    assert "<summary>Traceback</summary>" in page
    assert "RuntimeError: broken" in page


@pytest.mark.parametrize(
    ("kind", "code", "attempts"),
    [("permanent", "NO_CUSTOMER", 1), ("value", "PROCESSOR_FAULT", 1), ("os", "PROCESSOR_FAULT", 3)],
)
def test_retry_policy_selects_exceptions(client: httpx.Client, kind: str, code: str, attempts: int) -> None:
    job = run(client, "picky", {"kind": kind})
    assert (job["status"], job["error"]["code"], job["attempt"]) == ("failed", code, attempts)


def test_submission_overrides_defaults_of_the_type(client: httpx.Client) -> None:
    job = run(client, "picky", {"kind": "os"}, max_attempts=1, timeout_s=5)
    assert (job["attempt"], job["max_attempts"], job["timeout_s"]) == (1, 1, 5)


def test_synchronous_function_runs_in_thread_and_sees_cancellation(client: httpx.Client) -> None:
    job = run(client, "report", {"days": [1, 2]})
    assert job["results"]["output"] == {"total": 3, "size": 2}, job["error"]
    assert ("warning", None, "total 3") in read_logs(client, job)
    body = {"job_type": "report", "parameters": {"days": [1], "wait": True}}
    job_id = client.post("/api/events/jobs", json=body).json()["job_id"]
    url = f"/api/events/jobs/{job_id}"
    while client.get(url).json()["job"]["status"] != "processing":
        time.sleep(0.05)
    client.post(f"{url}/cancel")
    while (status := client.get(url).json()["job"]["status"]) == "processing":
        time.sleep(0.05)
    assert status == "cancelled" or status == "completed"


def test_invalid_parameters_are_rejected_by_the_api(client: httpx.Client) -> None:
    for parameters, place in (
        ({"customer": "x", "order": {"item": "tea", "count": 0}}, "parameters.order.count"),
        ({"customer": "x"}, "parameters.order"),
        ({"customer": "x", "order": {"item": "tea"}, "unknown": 1}, "parameters.unknown"),
    ):
        rejected = client.post("/api/events/jobs", json={"job_type": "invoice", "parameters": parameters})
        assert rejected.status_code == 422, rejected.text
        assert place in rejected.text


def test_inline_function_logs_into_its_job(client: httpx.Client) -> None:
    job = run(client, "quick", {"number": 41})
    assert job["results"]["output"] == 42
    assert ("warning", "shop", "quick 41") in read_logs(client, job)


def test_file_of_reused_step_is_in_results(client: httpx.Client) -> None:
    job = run(client, "step-file", {})
    assert (job["attempt"], job["results"]["output"]) == (2, "written"), job["error"]
    assert [file["path"] for file in job["results"]["files"]] == [f"files/{job['job_id']}.txt"]
    assert client.get(f"/api/events/files/files/{job['job_id']}.txt").text == "content"


def test_step_is_shared_only_with_a_version(client: httpx.Client, up: RunningCommand) -> None:
    assert [run(client, "lookup", {"word": "tea"})["results"]["output"] for _ in range(2)] == ["TEA", "TEA"]
    assert (up.directory / "shop" / "calls").read_text() == "tea"
    job = run(client, "unversioned", {})
    assert job["error"]["code"] == "STEP_NOT_SHAREABLE"
    assert job["attempt"] == 1


BAD_APPS = {
    "import": ("\nraise RuntimeError('no licence')", "cannot be imported: RuntimeError: no licence (jobs.py, line 2)"),
    "library": ("import nosuch", "'nosuch' (jobs.py, line 1); install the package with 'nosuch'"),
    "import of a module without a name in it": ("import nosuch", "No module named 'nosuch' (jobs.py, line 1)"),
    "no jobs": ("import jobledger\napp = jobledger.App()", "the App has no job types: App(jobs=[…])"),
    "name": ("", "shop.jobs:app cannot be imported: AttributeError"),
    "no app": ("app = 7", "it must be a jobledger.App, a job function or a module, not a int"),
    "built-in": (
        "import jobledger\n@jobledger.job('echo')\nasync def f() -> None: ...\napp = jobledger.App(jobs=[f])",
        "the job type 'echo' is built in: rename the job",
    ),
    "untyped": (
        "import jobledger\n@jobledger.job('f')\nasync def f(x): ...\napp = jobledger.App(jobs=[f])",
        "job 'f': parameter 'x' has no type",
    ),
}


@pytest.mark.parametrize("name", BAD_APPS)
def test_application_that_cannot_be_used_ends_the_command_with_the_reason(
    mongodb_uri: str, db_name: str, tmp_path: Path, name: str
) -> None:
    code, message = BAD_APPS[name]
    write_shop(tmp_path)
    (tmp_path / "shop" / "jobs.py").write_text(code)
    with Installation(tmp_path, mongodb={"uri": mongodb_uri, "db_name": db_name}) as installation:
        app = "shop.jobs" if "without a name" in name else "shop.jobs:app"
        outcome = installation.start("up", "--app", app).wait_for_exit()
        assert_one_line_error(outcome, 2, "jobs.app (--app): ", message)


@pytest.mark.parametrize(
    ("app", "message"),
    [
        ("shop.missing", "; use the directory that contains it as working directory or --app-dir"),
        ("./shop/jobs.py:app", "use 'shop.jobs:app', got './shop/jobs.py:app'"),
        ("jobs.py", "use 'jobs', got 'jobs.py'"),
        (
            "shop jobs",
            "expected a module, such as 'shop.jobs', or an App in it, such as 'shop.jobs:app', got 'shop jobs'",
        ),
        ("", "expected a module, such as 'shop.jobs'"),
    ],
)
def test_wrong_name_of_an_application_is_rejected_with_the_fix(tmp_path: Path, app: str, message: str) -> None:
    write_shop(tmp_path)
    command = [sys.executable, "-m", "jobledger", "worker", "--app", app]
    env = {**os.environ, "JOBLEDGER_MONGODB__URI": "mongodb://127.0.0.1:1"}
    outcome = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=100)
    assert outcome.returncode == 2
    assert message in " ".join(outcome.stderr.split()), outcome.stderr


def test_wrong_job_function_leaves_the_others_usable(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    write_shop(tmp_path)
    code = """
        import jobledger

        def make():
            @jobledger.job("hidden")
            async def hidden(x: int) -> int:
                return x
            return hidden

        @jobledger.job("preloads", preload=("a_package_that_is_missing",))
        async def preloads() -> None: ...

        @jobledger.job("good")
        async def good() -> str:
            return "ok"

        app = jobledger.App(jobs=[make(), preloads, good])
    """
    (tmp_path / "shop" / "jobs.py").write_text(dedent(code))
    mongodb, jobs = {"uri": mongodb_uri, "db_name": db_name}, {"app": "shop.jobs:app"}
    with Installation(tmp_path, mongodb=mongodb, jobs=jobs) as installation:
        up = installation.start_up_command()
        with http_client(up) as client:
            assert run(client, "good", {})["results"]["output"] == "ok"
            for job_type, reason in {"hidden": "cannot be imported", "preloads": "is not installed"}.items():
                rejected = client.post("/api/events/jobs", json={"job_type": job_type, "parameters": {}})
                assert rejected.status_code == 503
                assert reason in rejected.text
                assert f"job_type={job_type}" in up.stderr
        doctor = installation.start("doctor").wait_for_exit()
        assert doctor.exit_code == 1
        assert re.search(r"Job type hidden", doctor.out)


def test_reload_restarts_with_new_code_and_keeps_running_jobs(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    code = """
        import asyncio
        import jobledger

        @jobledger.job("version")
        async def version(ctx: jobledger.Context) -> int:
            ctx.log.info("version VERSION")
            await asyncio.sleep(SECONDS)
            return VERSION
    """

    def write(version: int, seconds: int) -> None:
        text = dedent(code).replace("VERSION", str(version)).replace("SECONDS", str(seconds))
        (tmp_path / "jobs.py").write_text(text)

    write(1, 600)
    port = find_free_port()
    with Installation(tmp_path, mongodb={"uri": mongodb_uri, "db_name": db_name}, api={"port": port}) as installation:
        up = installation.start("up", "--app", "jobs", "--reload").wait_until_ready()
        with http_client(up) as client:
            body = {"job_type": "version", "parameters": {}, "max_attempts": 1}
            job_id = client.post("/api/events/jobs", json=body).json()["job_id"]
            url = f"/api/events/jobs/{job_id}"
            # A job process that starts after the change would already run the new code.
            wait_for(lambda: any(it["message"] == "version 1" for it in client.get(url).json()["job"]["logs"]))
            write(2, 0)
            wait_for(lambda: up.stdout.count("Jobledger listens") == 2)
            wait_for(lambda: client.get(url).json()["job"]["status"] == "completed")
            job = client.get(url).json()["job"]
            assert (job["results"]["output"], job["attempt"]) == (2, 2)
            (tmp_path / "jobs.py").write_text("import nothing_like_this\n")
            wait_for(lambda: "waiting for a change of the code" in up.stderr)
            write(3, 0)
            wait_for(lambda: up.stdout.count("Jobledger listens") == 3)
            assert run(client, "version", {})["results"]["output"] == 3
        assert up.stop().exit_code == 0


def find_free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(condition: Any) -> None:
    from tests.support.polling import DEADLINE_SECONDS

    end = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            if condition():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.1)
