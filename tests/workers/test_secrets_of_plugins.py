"""No secret of a plug-in gets into the database, although the plug-in reports what a service has echoed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobledger.ledger.mongo.connection import Connection
from jobledger.workers import registry
from jobledger.workers.child.fork_server_client import fork_server_client
from jobledger.workers.registry import get_processor_version
from jobledger.workers.results.hidden_secrets import PLACEHOLDER
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process

FILE_KEY = "file-key-4711-0815"
SETTING_KEY = "setting-key-4711-0815"
ENVIRONMENT_KEY = "environment-key-4711-0815"
KEYS = (FILE_KEY, SETTING_KEY, ENVIRONMENT_KEY)
MODULE = """
import os
from pydantic import BaseModel, SecretStr
from jobledger import ProcessorError, Results

class EchoesSecrets:
    job_type = "echoes-secrets"
    isolation = "process"
    preload = ()

    class Parameters(BaseModel):
        fails: str = ""

    class Settings(BaseModel):
        api_key_file: str
        credential: SecretStr

    def __init__(self, settings):
        self.settings = settings

    async def run(self, job):
        keys = [
            open(self.settings.api_key_file).read().strip(),
            self.settings.credential.get_secret_value(),
            os.environ["TEST_API_KEY"],
        ]
        echo = "The service says: invalid key " + ", ".join(keys)
        print(echo)
        await job.log("info", echo)
        await job.log("info", "x" * 9_000 + " " + " ".join(keys * 30))
        await job.report_progress(50, echo)

        async def step():
            await job.warn(echo)
            return {"answer": [echo], keys[0]: 1}

        await job.run_step("ask", {}, step)
        await job.warn(echo)
        if job.parameters.fails == "ProcessorError":
            raise ProcessorError("REJECTED", echo, details={"response": {"error": echo}})
        if job.parameters.fails == "exception":
            raise RuntimeError(echo)
        if job.parameters.fails == "exit":
            os._exit(3)
        return Results(metadata={"answer": echo})

class EchoesSecretsInline(EchoesSecrets):
    job_type = "echoes-secrets-inline"
    isolation = "inline"
"""
ENTRY_POINTS = """[jobledger.processors]
echoes-secrets = echoes_secrets:EchoesSecrets
echoes-secrets-inline = echoes_secrets:EchoesSecretsInline
"""


@pytest.fixture(scope="module")
def _plug_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    site = tmp_path_factory.mktemp("site")
    (site / "echoes_secrets.py").write_text(MODULE)
    package = site / "echoes_secrets-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: echoes-secrets\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(ENTRY_POINTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("TEST_API_KEY", ENVIRONMENT_KEY)
        _forget_processors()
        yield
    _forget_processors()


def _forget_processors() -> None:
    registry._load_all.cache_clear()
    get_processor_version.cache_clear()
    fork_server_client.stop()


async def read_database(roles: RunningRoles) -> str:
    names = await roles.db.list_collection_names()
    documents = [document for name in names for document in await roles.db[name].find().to_list()]
    return "\n".join(map(repr, documents))


@pytest.mark.usefixtures("_plug_in")
@pytest.mark.parametrize(
    ("job_type", "fails", "code"),
    [
        ("echoes-secrets", "", None),
        ("echoes-secrets", "ProcessorError", "REJECTED"),
        ("echoes-secrets", "exception", "PROCESSOR_FAULT"),
        ("echoes-secrets", "exit", "PROCESS_DIED"),
        ("echoes-secrets-inline", "", None),
        ("echoes-secrets-inline", "ProcessorError", "REJECTED"),
        ("echoes-secrets-inline", "exception", "PROCESSOR_FAULT"),
    ],
)
async def test_no_report_of_a_plug_in_contains_its_secrets(
    connection: Connection, store: Path, tmp_path: Path, job_type: str, fails: str, code: str | None
) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(FILE_KEY + "\n")
    settings = {"api_key_file": str(key_file), "credential": SETTING_KEY}
    options = WorkerOptions(confinement="off", pass_environment=["TEST_API_KEY"], processors={job_type: settings})
    async with run_roles_in_process(connection, store, projector=True, worker=options) as roles:
        job_id = await roles.submit({"fails": fails}, job_type=job_type, max_attempts=1)
        job = await roles.wait_until_finished(job_id)
        assert (job["error"] and job["error"]["code"]) == code
        content = await read_database(roles)
        assert [key for key in KEYS if key in content or key[: len(key) - 4] in content] == []
        assert f"invalid key {PLACEHOLDER}, {PLACEHOLDER}, {PLACEHOLDER}" in content
        reports = [event.data for event in await roles.event_store.read_stream(job_id)]
        assert sum(str(report).count("invalid key [secret]") > 0 for report in reports) >= 3
