"""tests: what a job of a hostile plug-in gets hold of: its own job, and nothing of others or of the ledger."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest
import structlog

from ledger.errors import ConfigurationError
from ledger.server_note import until
from tests.support.installation import Installation, client_of, descendants, one_line
from tests.support.mongod import needs_local_mongod
from workers import confinement, restrictions

pytestmark = needs_local_mongod
needs_landlock = pytest.mark.skipif(
    restrictions.landlock_version() < 1, reason="the kernel does not offer Landlock (boot option lsm=landlock,…)"
)

PRYING = '''
"""prying: tries everything that the code it is given says, and reports what it got."""
import asyncio, os, sys, traceback
from pathlib import Path
from pydantic import BaseModel
from workers.processor import Results

class Prying:
    job_type = "prying"
    isolation = "process"
    preload = ()
    class Parameters(BaseModel):
        attempts: dict[str, str]
        wait: float = 0
    class Settings(BaseModel):
        key_file: Path | None = None
    def __init__(self, settings): self.settings = settings
    async def run(self, job):
        (job.scratch / "secret").write_text("of this job")
        got = {}
        for name, code in job.parameters.attempts.items():
            place = {"job": job, "settings": self.settings}
            try:
                exec(code, place)
                got[name] = "GOT " + repr(place.get("got"))[:4000]
            except BaseException as error:
                got[name] = f"{type(error).__name__}: {error}"[:200]
        await job.log("info", str(job.scratch))
        await asyncio.sleep(job.parameters.wait)
        return Results(metadata={"got": got})
'''
ENTRY = "[jobledger.processors]\nprying = prying:Prying\n"


@pytest.fixture(scope="module")
def plug_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PYTHONPATH, in which a plug-in is installed."""
    directory = tmp_path_factory.mktemp("site")
    (directory / "prying.py").write_text(PRYING)
    about = directory / "prying-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: prying\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY)
    return directory


@pytest.fixture(scope="module")
def installation(plug_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    directory = tmp_path_factory.mktemp("ledger")
    (directory / "key").write_text("of the processor")
    (directory / "webhooks").write_text("canary")
    sections: dict[str, dict[str, Any]] = {
        "processors": {"prying": {"key_file": "key"}},
        "event_worker": {"child_environment": ["MODEL_HOME"], "protected_paths": ["webhooks"]},
    }
    with Installation(directory) as running:
        running.configure(**sections)
        results = directory / "data/results"
        results.mkdir(parents=True)
        (results / "canary").write_text("canary")
        running.start(
            "up",
            PYTHONPATH=str(plug_in),
            JOBLEDGER_WEBHOOKS__ALLOW_PRIVATE='["canary.example"]',
            CLOUD_TOKEN="canary",
            MODEL_HOME="/models",
        ).ready()
        yield running


def pry(installation: Installation, attempts: dict[str, str], *, wait: float = 0) -> str:
    """Submit a job that makes these attempts; return its id."""
    body = {"job_type": "prying", "parameters": {"attempts": attempts, "wait": wait}}
    with client_of(installation.roles[0]) as client:
        answer = client.post("/api/events/jobs", json=body)
        assert answer.status_code < 300, answer.text
        return str(answer.json()["job_id"])


def read_job(installation: Installation, job_id: str) -> dict[str, Any]:
    with client_of(installation.roles[0]) as client:
        job: dict[str, Any] = client.get(f"/api/events/jobs/{job_id}").json()["job"]
        return job


def results_of(installation: Installation, job_id: str) -> dict[str, str]:
    """Wait for the end of a job; return what each of its attempts got."""
    assert until(lambda: read_job(installation, job_id)["status"] in ("completed", "failed"), 40)
    job = read_job(installation, job_id)
    assert job["status"] == "completed", job
    return dict(job["results"]["metadata"]["got"])


@needs_landlock
def test_job_process_reaches_nothing_but_its_own_job(installation: Installation) -> None:
    here = installation.directory
    worker = installation.roles[0].process.pid
    neighbour = pry(installation, {}, wait=20)
    assert until(lambda: bool(scratch_of(installation, neighbour)), 20), read_job(installation, neighbour)
    (scratch,) = scratch_of(installation, neighbour)
    port = urlsplit(installation.roles[0].url).port
    home = Path.home() / ".jobledger-canary"
    home.write_text("canary")
    pids = sorted(descendants(worker) | {worker})
    try:
        job_id = pry(
            installation,
            {
                "all environment variables": "import os; got = dict(os.environ)",
                "environment of own process": "got = open('/proc/self/environ').read()",
                **{f"environment of {pid}": f"got = open('/proc/{pid}/environ').read()" for pid in pids},
                **{f"memory of {pid}": f"got = open('/proc/{pid}/mem', 'rb')" for pid in pids},
                **{f"root of {pid}": f"import os; got = os.listdir('/proc/{pid}/root/')" for pid in pids},
                **{f"signal to {pid}": f"import os; os.kill({pid}, 0)" for pid in pids},
                "signal to everybody": "import os; os.kill(-1, 0); raise OSError('only to itself')",
                "settings": f"got = open('{here}/config.yaml').read()",
                "protected path": f"got = open('{here}/webhooks').read()",
                "database files": f"import os; got = os.listdir('{here}/data/db') or os.listdir('{here}/data')",
                "a database file": f"got = open('{server_file(here)}', 'rb').read(10)",
                "results": f"got = open('{here}/data/results/canary').read()",
                "new result": f"open('{here}/data/results/new', 'w')",
                "file of another job": f"got = open('{scratch}/secret').read()",
                "write to another job": f"open('{scratch}/secret', 'w')",
                "list other jobs": f"import os; got = os.listdir('{scratch.parent.parent}')",
                "home directory": f"got = open('{home}').read()",
                "write to /tmp": "open('/tmp/jobledger-canary', 'w')",
                "write to code": "import workers.child; open(workers.child.__file__, 'a')",
                "local socket": "import socket; socket.socket(socket.AF_UNIX)",
                "password hashes": "got = open('/etc/shadow').read()",
                "symbolic link": f"import os; os.symlink('{here}/config.yaml', job.scratch / 'l'); "
                "got = open(job.scratch / 'l').read()",
                "hard link": f"import os; os.link('{here}/config.yaml', job.scratch / 'h'); "
                "got = open(job.scratch / 'h').read()",
                "program that reads": f"import subprocess; got = subprocess.run(['cat', '{here}/config.yaml'], "
                "check=True, capture_output=True)",
                "traces": f"import ctypes\nif ctypes.CDLL(None, use_errno=True).ptrace(16, {worker}, 0, 0): "
                "raise PermissionError('ptrace')",
                "core files": "import resource\nif resource.getrlimit(resource.RLIMIT_CORE) == (0, 0): "
                "raise PermissionError('core')",
                # What it must be able to do
                "may read its key": "got = settings.key_file.read_text()",
                "may use its scratch": "p = job.scratch / 'a'; p.mkdir(); (p / 'b').write_text('x'); "
                "(p / 'b').rename(job.scratch / 'c'); got = (job.scratch / 'c').read_text()",
                "may use temporary files": "import tempfile; got = tempfile.mkdtemp()",
                "may run programs": "import subprocess; got = subprocess.run(['echo', 'ok'], check=True, "
                "capture_output=True).stdout",
                "may run Python": "import subprocess, sys; got = subprocess.run([sys.executable, '-c', 'import "
                "pydantic; print(1)'], check=True, capture_output=True).stdout",
                "may import late": "import sqlite3, xml.dom.minidom; got = 1",
                "may connect": f"import socket; got = socket.create_connection(('127.0.0.1', {port}))",
                "may resolve names": "import socket; got = socket.getaddrinfo('localhost', 80)",
                "may use threads and pipes": "import asyncio, threading; threading.Thread(target=print).start(); "
                "asyncio.new_event_loop().close(); got = 1",
                "may stop its programs": "import subprocess; p = subprocess.Popen(['sleep', '9']); p.kill(); "
                "got = p.wait()",
            },
        )
        got = results_of(installation, job_id)
    finally:
        home.unlink()
        with client_of(installation.roles[0]) as client:
            client.post(f"/api/events/jobs/{neighbour}/cancel")
    variables = got.pop("all environment variables"), got.pop("environment of own process")
    assert not any("canary" in text for text in variables), variables
    assert "MODEL_HOME" in variables[0]
    allowed = {name: text for name, text in got.items() if name.startswith("may ")}
    assert all(text.startswith("GOT") for text in allowed.values()), allowed
    reached = {name: text for name, text in got.items() if text.startswith("GOT") and name not in allowed}
    assert reached == {}


def test_worker_without_landlock_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restrictions, "landlock_version", lambda: 0)
    monkeypatch.setattr(restrictions, "hide_from_same_user", lambda: None)
    with structlog.testing.capture_logs() as lines:
        confinement.check("auto")
    assert ["not confined" in line["event"] for line in lines] == [True]
    with pytest.raises(ConfigurationError, match="`required`, but this kernel"):
        confinement.check("required")
    confinement.check("off")


def test_programs_started_with_a_minimal_environment_get_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBLEDGER_AUTH__JWT__SECRET", "canary")
    monkeypatch.setenv("MODEL_HOME", "/models")
    with confinement.minimal_environment(["MODEL_HOME"]):
        pid = os.fork()
        if pid == 0:
            os.execv("/bin/sh", ["sh", "-c", 'test -z "$JOBLEDGER_AUTH__JWT__SECRET" -a -n "$MODEL_HOME$PATH"'])
        assert os.waitpid(pid, 0)[1] == 0
    assert os.environ["JOBLEDGER_AUTH__JWT__SECRET"] == "canary"
    assert subprocess.run(["sh", "-c", "echo $MODEL_HOME"], capture_output=True, check=True).stdout == b"/models\n"


def scratch_of(installation: Installation, job_id: str) -> list[Path]:
    """Where a running job has its files: it says so in its log."""
    with client_of(installation.roles[0]) as client:
        lines = client.get(f"/api/events/jobs/{job_id}/logs").json()
    texts = [line["message"] for line in lines.get("logs", lines.get("items", []))]
    return [Path(text) for text in texts if text.startswith("/")]


def server_file(directory: Path) -> Path:
    return next(path for path in sorted((directory / "data").rglob("*")) if path.is_file() and path.stat().st_size)


@pytest.mark.skipif(restrictions.landlock_version() > 0, reason="job processes can be confined on this machine")
def test_worker_does_not_start_without_the_confinement_required(tmp_path: Path) -> None:
    with Installation(tmp_path, event_worker={"confine": "required"}) as here:
        one_line(here.start("up").ended(), 2, "event_worker.confine", "Landlock")


def test_packages_of_editable_installs_are_readable_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editable install has no entry in `sys.path`, and its repository may lie in a temporary directory."""
    (tmp_path / "installed").mkdir()
    package = ModuleType("installed")
    package.__path__ = [str(tmp_path / "installed")]
    monkeypatch.setitem(sys.modules, "installed", package)
    assert (str(tmp_path / "installed"), restrictions.READ) in set(confinement._code_and_system([]))
    assert str(tmp_path) not in {path for path, _ in confinement._code_and_system([])}
