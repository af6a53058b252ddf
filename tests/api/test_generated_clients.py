"""Client generators understand the OpenAPI document. Generated clients submit, read and list jobs of two plug-ins."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from textwrap import dedent
from typing import Any
from zipfile import is_zipfile

import pytest

from jobledger.workers import registry
from tests.api.conftest import Api, run_api
from tests.support.plugins import install_plugin

NPM_PACKAGES = "openapi-typescript@7 openapi-fetch@0 typescript@5"
PLUGIN = """
from decimal import Decimal
from typing import Annotated, Literal
import jobledger
from pydantic import BaseModel, Field

class Item(BaseModel):
    name: str
    price: Decimal = Decimal(1)
    parts: list["Item"] = []

@jobledger.job("JOB_TYPE", isolation="inline")
async def bill(
    ctx: jobledger.Context,
    items: list[Item],
    currency: Literal["EUR", 978, True, None] = None,
    copies: Annotated[int, Field(description="Printed copies.")] = 2,
) -> str:
    await ctx.save("bill.md", b"# Bill", "text/markdown")
    return str(sum(item.price for item in items))
"""
PLUGIN_NAMES = ("invoice-pdf", "invoicePdf")
"""Job types whose schemas have the same names, but for a number."""
PYTHON_GENERATOR = {"post_hooks": [], "content_type_overrides": {"application/zip": "application/octet-stream"}}
"""Formatting takes time, and the generator does not know ZIP archives."""
SMOKE = """
import createClient from "openapi-fetch";
import type { components, paths } from "./api.js";

declare const process: { argv: string[] };
const client = createClient<paths>({ baseUrl: process.argv[2]! });
const invalid: components["schemas"]["InvoicePdfJobBody"] = {
  job_type: "invoice-pdf",
  // @ts-expect-error: a required parameter is missing
  parameters: {},
};
const submitted = await client.POST("/api/events/jobs", {
  params: { header: { Prefer: "wait=60" } },
  body: { job_type: "invoicePdf", parameters: { items: [{ name: "desk", price: "2.5" }] } },
});
if (submitted.error) throw new Error(submitted.error.message);
const job = submitted.data.job;
const history = await client.GET("/api/events/jobs/{job_id}/history", { params: { path: { job_id: job.job_id } } });
const outputs = [];
for (const event of history.data?.events ?? []) {
  if (event.type === "JobCompleted") outputs.push(event.data.results?.output);
}
const path = job.results?.files[0]?.path ?? "";
const file = await client.GET("/api/events/files/{path}", { params: { path: { path } }, parseAs: "text" });
const listed = await client.GET("/api/events/jobs", { params: { query: { job_type: "invoicePdf", limit: 5 } } });
const missing = await client.GET("/api/events/jobs/{job_id}", { params: { path: { job_id: "job-unknown" } } });
console.log(JSON.stringify({
  status: job.status,
  outputs,
  file: file.data,
  listed: listed.data?.jobs.map((it) => it.job_id).indexOf(job.job_id),
  missing: missing.error?.code,
  invalid: (await client.POST("/api/events/jobs", { body: invalid })).error?.code,
}));
"""


def find_node_modules() -> Path | None:
    """Return the directory with the npm packages, if all are installed."""
    tsc = shutil.which("tsc")
    directory = Path(tsc).resolve().parents[2] if tsc else None
    names = [package.partition("@")[0] for package in NPM_PACKAGES.split()]
    return directory if directory is not None and all((directory / name).is_dir() for name in names) else None


NODE_MODULES = find_node_modules()


async def run(*command: str | Path) -> str:
    """Run a program, also one of the virtual environment, and return its output."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=90, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
async def api(mongodb_uri: str, db_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    """An API with two plug-ins whose models have the same names."""
    plugins = tmp_path / "plugins"
    for name in PLUGIN_NAMES:
        install_plugin(plugins, name, attribute="bill", template=dedent(PLUGIN))
    monkeypatch.syspath_prepend(plugins)
    registry.clear_registry()
    async for api in run_api(mongodb_uri, db_name, tmp_path):
        yield api
    monkeypatch.undo()
    registry.clear_registry()


async def write_document(api: Api, folder: Path) -> Path:
    path = folder / "openapi.json"
    path.write_text(json.dumps((await api.get("/api/openapi.json")).json()), encoding="utf-8")
    return path


async def test_generated_python_client_submits_reads_and_lists_jobs_of_two_plugins(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = await write_document(api, tmp_path)
    config, output = tmp_path / "config.json", tmp_path / "ledger_client"
    config.write_text(json.dumps(PYTHON_GENERATOR), encoding="utf-8")
    options = ("--config", config, "--meta", "none", "--fail-on-warning", "--output-path", output)
    await run("openapi-python-client", "generate", "--path", document, *options)
    monkeypatch.syspath_prepend(tmp_path)
    models: Any = importlib.import_module("ledger_client.models")
    client: Any = importlib.import_module("ledger_client").Client(base_url="http://test")
    client.set_async_httpx_client(api.http)

    def send(operation: str, *arguments: Any, **named: Any) -> Any:
        module = importlib.import_module(f"ledger_client.api.{operation}")
        return module.asyncio(*arguments, client=client, **named)

    item = models.InvoicePdfItem("desk", price="2.5")
    first = models.InvoicePdfJobBody(models.InvoicePdfParameters([item]), "invoice-pdf")
    second = models.InvoicePdfJobBody2(models.InvoicePdfParameters2([models.InvoicePdfItem2("chair")]), "invoicePdf")
    accepted = [await send("jobs.jobs_submit", body=body, prefer="wait=60") for body in (first, second)]

    assert [answer.job.results.output for answer in accepted] == ["2.5", "1"]
    job = accepted[0].job
    assert (await send("jobs.jobs_get", job.job_id)).job.status == "completed"
    downloaded = await send("files.files_get", job.results.files[0].path)
    assert downloaded.payload.read() == b"# Bill"
    archive = await send("jobs.jobs_download_archive", job.job_id)
    assert is_zipfile(archive.payload)
    events = (await send("jobs.jobs_get_history", job.job_id)).events
    assert [event.data.results.output for event in events if isinstance(event, models.JobCompletedEvent)] == ["2.5"]
    listed = await send("jobs.jobs_list", job_type="invoicePdf")
    assert [found.job_id for found in listed.jobs] == [accepted[1].job_id]
    missing = await send("jobs.jobs_get", "job-unknown")
    assert isinstance(missing, models.ErrorResponse)
    assert missing.code == "job_not_found"


async def test_types_commands_show_parameters_of_plugins(api: Api) -> None:
    listed = await run("jobledger", "types", "ls", "-o", "name", "--url", api.url)
    assert listed.split() == ["echo", *PLUGIN_NAMES, "session"]
    table = await run("jobledger", "types", "get", "invoicePdf", "--url", api.url)
    rows = [line.split() for line in table.splitlines()]
    assert rows[1:] == [
        ["items", "array", "yes", "-", "-"],
        ["currency", '"EUR"|978|true|null', "no", "-", "-"],
        ["copies", "integer", "no", "2", "Printed", "copies."],
    ]


@pytest.mark.skipif(NODE_MODULES is None, reason=f"npm packages are missing: npm install --global {NPM_PACKAGES}")
async def test_generated_typescript_client_passes_strict_check_and_submits_and_reads_jobs(
    api: Api, tmp_path: Path
) -> None:
    document = await write_document(api, tmp_path)
    assert NODE_MODULES is not None
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    (tmp_path / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    (tmp_path / "smoke.ts").write_text(SMOKE, encoding="utf-8")
    await run("openapi-typescript", document, "-o", tmp_path / "api.ts")
    options = ("--strict", "--skipLibCheck", "--module", "nodenext", "--target", "es2022", "--lib", "es2022,dom")
    await run("tsc", *options, tmp_path / "smoke.ts")

    assert json.loads(await run("node", tmp_path / "smoke.js", api.url)) == {
        "status": "completed",
        "outputs": ["2.5"],
        "file": "# Bill",
        "listed": 0,
        "missing": "job_not_found",
        "invalid": "invalid_content",
    }
