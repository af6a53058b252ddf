"""Tests of confinement: a job of a hostile plug-in reaches its own job only, and nothing of others or of Jobledger."""

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

from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.mongo.embedded_files import wait_until
from jobledger.workers.sandbox import confinement, restrictions
from tests.support.installation import Installation, assert_one_line_error, http_client, list_descendants
from tests.support.mongodb_provider import needs_local_mongod
from tests.workers.system_calls import DEFINE_CALL, SYSTEM_CALL_NUMBERS

pytestmark = needs_local_mongod
needs_landlock = pytest.mark.skipif(
    restrictions.get_landlock_version() < 1,
    reason="needs Landlock: boot Linux with the option lsm=landlock,lockdown,yama",
)

PRYING_MODULE = '''
"""Run code of the parameters, and report the results."""
import asyncio, os, sys, traceback
from pathlib import Path
from pydantic import BaseModel
from jobledger.workers.processor import Results

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
        (job.scratch_dir / "secret").write_text("of this job")
        outcomes = {}
        for name, code in job.parameters.attempts.items():
            scope = {"job": job, "settings": self.settings}
            try:
                exec(code, scope)
                outcomes[name] = "GOT " + repr(scope.get("got"))[:4000]
            except BaseException as error:
                outcomes[name] = f"{type(error).__name__}: {error}"[:200]
        await job.log("info", str(job.scratch_dir))
        await asyncio.sleep(job.parameters.wait)
        return Results(metadata={"outcomes": outcomes})
'''
ENTRY_POINTS = "[jobledger.processors]\nprying = prying:Prying\n"


@pytest.fixture(scope="module")
def plug_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PYTHONPATH in which the plug-in is installed."""
    directory = tmp_path_factory.mktemp("site")
    (directory / "prying.py").write_text(PRYING_MODULE)
    dist_info = directory / "prying-1.0.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: prying\nVersion: 1.0\n")
    (dist_info / "entry_points.txt").write_text(ENTRY_POINTS)
    return directory


@pytest.fixture(scope="module")
def installation(plug_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    directory = tmp_path_factory.mktemp("ledger")
    (directory / "key").write_text("of the processor")
    (directory / "webhooks").write_text("canary")
    sections: dict[str, dict[str, Any]] = {
        "processors": {"prying": {"key_file": "key"}},
        "event_worker": {"pass_environment": ["MODEL_HOME"], "protected_paths": ["webhooks"]},
    }
    with Installation(directory) as running:
        running.write_config(**sections)
        results = directory / "data/results"
        results.mkdir(parents=True)
        (results / "canary").write_text("canary")
        running.start(
            "up",
            PYTHONPATH=str(plug_in),
            JOBLEDGER_WEBHOOKS__ALLOWED_PRIVATE_HOSTS='["canary.example"]',
            CLOUD_TOKEN="canary",
            MODEL_HOME="/models",
        ).wait_until_ready()
        yield running


def submit_prying_job(installation: Installation, attempts: dict[str, str], *, wait: float = 0) -> str:
    """Submit a job that runs the code of the attempts. Return its ID."""
    body = {"job_type": "prying", "parameters": {"attempts": attempts, "wait": wait}}
    with http_client(installation.commands[0]) as client:
        response = client.post("/api/events/jobs", json=body)
        assert response.status_code < 300, response.text
        return str(response.json()["job_id"])


def read_job(installation: Installation, job_id: str) -> dict[str, Any]:
    with http_client(installation.commands[0]) as client:
        job: dict[str, Any] = client.get(f"/api/events/jobs/{job_id}").json()["job"]
        return job


def wait_for_outcomes(installation: Installation, job_id: str) -> dict[str, str]:
    """Wait for the end of a job. Return the outcome of each of its attempts."""
    assert wait_until(lambda: read_job(installation, job_id)["status"] in ("completed", "failed"), 100)
    job = read_job(installation, job_id)
    assert job["status"] == "completed", job
    return dict(job["results"]["metadata"]["outcomes"])


@needs_landlock
def test_job_process_reaches_only_its_own_job(installation: Installation) -> None:
    directory = installation.directory
    worker = installation.commands[0].process.pid
    other_job = submit_prying_job(installation, {}, wait=60)
    assert wait_until(lambda: bool(find_scratch(installation, other_job)), 60), read_job(installation, other_job)
    (scratch,) = find_scratch(installation, other_job)
    port = urlsplit(installation.commands[0].url).port
    home = Path.home() / ".jobledger-canary"
    home.write_text("canary")
    pids = sorted(list_descendants(worker) | {worker})
    try:
        job_id = submit_prying_job(
            installation,
            {
                "all environment variables": "import os; got = dict(os.environ)",
                "environment of own process": "got = open('/proc/self/environ').read()",
                **{f"environment of {pid}": f"got = open('/proc/{pid}/environ').read()" for pid in pids},
                **{f"memory of {pid}": f"got = open('/proc/{pid}/mem', 'rb')" for pid in pids},
                **{f"root of {pid}": f"import os; got = os.listdir('/proc/{pid}/root/')" for pid in pids},
                **{f"signal to {pid}": f"import os; os.kill({pid}, 0)" for pid in pids},
                "signal to all": "import os; os.kill(-1, 0); raise OSError('only to itself')",
                "settings": f"got = open('{directory}/config.yaml').read()",
                "protected path": f"got = open('{directory}/webhooks').read()",
                "database files": f"import os; got = os.listdir('{directory}/data/db') or "
                f"os.listdir('{directory}/data')",
                "a database file": f"got = open('{find_database_file(directory)}', 'rb').read(10)",
                "results": f"got = open('{directory}/data/results/canary').read()",
                "new result": f"open('{directory}/data/results/new', 'w')",
                "file of another job": f"got = open('{scratch}/secret').read()",
                "write to another job": f"open('{scratch}/secret', 'w')",
                "list other jobs": f"import os; got = os.listdir('{scratch.parents[1]}')",
                "home directory": f"got = open('{home}').read()",
                "write to /tmp": "open('/tmp/jobledger-canary', 'w')",
                "write to code": "from jobledger.workers.child import main; open(main.__file__, 'a')",
                "local socket": "import socket; socket.socket(socket.AF_UNIX)",
                "password hashes": "got = open('/etc/shadow').read()",
                "symbolic link": f"import os; os.symlink('{directory}/config.yaml', job.scratch_dir / 'l'); "
                "got = open(job.scratch_dir / 'l').read()",
                "hard link": f"import os; os.link('{directory}/config.yaml', job.scratch_dir / 'h'); "
                "got = open(job.scratch_dir / 'h').read()",
                "program that reads": f"import subprocess; got = subprocess.run(['cat', '{directory}/config.yaml'], "
                "check=True, capture_output=True)",
                "traces": f"import ctypes\nif ctypes.CDLL(None, use_errno=True).ptrace(16, {worker}, 0, 0): "
                "raise PermissionError('ptrace')",
                "core files": "import resource\nif resource.getrlimit(resource.RLIMIT_CORE) == (0, 0): "
                "raise PermissionError('core')",
                # What a job must be able to do
                "may read its key": "got = settings.key_file.read_text()",
                "may use its scratch": "p = job.scratch_dir / 'a'; p.mkdir(); (p / 'b').write_text('x'); "
                "(p / 'b').rename(job.scratch_dir / 'c'); got = (job.scratch_dir / 'c').read_text()",
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
        outcomes = wait_for_outcomes(installation, job_id)
    finally:
        home.unlink()
        with http_client(installation.commands[0]) as client:
            client.post(f"/api/events/jobs/{other_job}/cancel")
    variables = outcomes.pop("all environment variables"), outcomes.pop("environment of own process")
    assert not any("canary" in text for text in variables), variables
    assert "MODEL_HOME" in variables[0]
    allowed = {name: text for name, text in outcomes.items() if name.startswith("may ")}
    assert all(text.startswith("GOT") for text in allowed.values()), allowed
    reached = {name: text for name, text in outcomes.items() if text.startswith("GOT") and name not in allowed}
    assert reached == {}


CHANGES = {
    "mode": "os.chmod(path, stat.S_IMODE(os.stat(path).st_mode))",
    "owner": "os.chown(path, os.getuid(), os.getgid())",
    "times": "os.utime(path, (os.stat(path).st_atime, os.stat(path).st_mtime))",
    "mode of an open file": "os.fchmod(os.open(path, os.O_RDONLY), stat.S_IMODE(os.stat(path).st_mode))",
}
"""What the owner of a file may change by its name alone."""


@needs_landlock
@pytest.mark.skipif(
    not restrictions.can_make_read_only(),
    reason="job processes have no mounts of their own on this machine: sudo make test",
)
def test_job_process_cannot_change_modes_owners_or_times_outside(installation: Installation) -> None:
    directory = installation.directory
    outside = ["/", "/tmp", "/dev/null", "/usr", sys.executable, confinement.__file__]
    outside += [
        str(path) for path in (directory, directory / "config.yaml", directory / "data", directory / "data/results")
    ]
    attempts = {
        f"{name} of {path}": f"import os, stat; path = {path!r}; {code}"
        for path in outside
        for name, code in CHANGES.items()
    }
    attempts |= {
        f"{name} of directory {level}": f"import os, stat; path = job.scratch_dir.parents[{level}]; {code}"
        for level in (1, 2)
        for name, code in CHANGES.items()
    }
    attempts["mode of standard input"] = "import os; os.fchmod(0, 0o666)"
    attempts |= {
        "may " + name: f"import os, stat; path = job.scratch_dir / 'own'; path.touch(); {code}"
        for name, code in CHANGES.items()
    }
    attempts["may copy with metadata"] = (
        "import shutil, sys; shutil.copy2(sys.executable, job.scratch_dir / 'python'); "
        "shutil.copytree(job.scratch_dir, job.scratch_dir.parent / 'saved' / 'copy')"
    )
    attempts["may unpack an archive"] = (
        "import os, tarfile; os.chdir(job.scratch_dir); t = tarfile.open('a.tar', 'w'); t.add('secret'); t.close(); "
        "os.mkdir('out'); tarfile.open('a.tar').extractall('out', filter='tar')"
    )
    attempts["may copy by program"] = (
        "import subprocess; subprocess.run(['cp', '-pr', '.', '../saved/by-cp'], cwd=job.scratch_dir, check=True)"
    )
    attempts["may move to the saved files"] = (
        "import os; os.rename(job.scratch_dir / 'own', job.scratch_dir.parent / 'saved/own')"
    )
    outcomes = wait_for_outcomes(installation, submit_prying_job(installation, attempts))
    assert [name for name, text in outcomes.items() if name.startswith("may ") != text.startswith("GOT")] == [], (
        outcomes
    )


PROCESS_CALLS = {
    "limits": "resource.prlimit(pid, resource.RLIMIT_NOFILE, (1024, 1024))",
    "reading limits": "resource.prlimit(pid, resource.RLIMIT_NOFILE)",
    "priority": "os.setpriority(os.PRIO_PROCESS, pid, nice)",
    "priority of its group": "os.setpriority(os.PRIO_PGRP, os.getpgid(pid), nice)",
    "CPUs": "os.sched_setaffinity(pid, os.sched_getaffinity(0))",
    "scheduler": "os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))",
    "scheduling parameters": "os.sched_setparam(pid, os.sched_param(0))",
    "scheduling attributes": "attributes = struct.pack('=IIQiIQQQ', 48, 0, 0, nice, 0, 0, 0, 0); "
    f"call({SYSTEM_CALL_NUMBERS.get('sched_setattr')}, pid, attributes, 0)",
    "priority of its disk access": f"call({SYSTEM_CALL_NUMBERS.get('ioprio_set')}, 1, pid, 0)",
    "signal": "os.kill(pid, 0)",
    "signal by handle": "signal.pidfd_send_signal(os.pidfd_open(pid), 0)",
    "signal to a thread": f"call({SYSTEM_CALL_NUMBERS.get('tgkill')}, pid, pid, 0)",
    "descriptors": f"call({SYSTEM_CALL_NUMBERS['pidfd_getfd']}, os.pidfd_open(pid), 0, 0)",
    "trace": f"call({SYSTEM_CALL_NUMBERS.get('ptrace')}, 16, pid, 0, 0)",
}
USER_CALLS = {
    "priority of the user": "os.setpriority(os.PRIO_USER, 0, 0)",
    "priority of its group": "os.setpriority(os.PRIO_PGRP, 0, 0)",
    "disk access of the user": f"call({SYSTEM_CALL_NUMBERS.get('ioprio_set')}, 3, os.getuid(), 0)",
    "keys of the user": f"call({SYSTEM_CALL_NUMBERS.get('keyctl')}, 0, -4, 1)",
    "mounts": f"call({SYSTEM_CALL_NUMBERS['mount_setattr']}, -100, b'/', 0, bytes(32), 32)",
}


@needs_landlock
@pytest.mark.skipif(
    not restrictions.is_seccomp_supported(), reason="needs an x86-64 or ARM64 processor: make test there"
)
@pytest.mark.skipif(
    restrictions.get_landlock_version() < restrictions.LANDLOCK_SIGNALS_VERSION,
    reason="needs Linux 6.12 or later, which restricts signals: upgrade the kernel, then make test",
)
def test_job_process_cannot_change_limits_or_priorities_of_others(installation: Installation) -> None:
    worker = installation.commands[0].process.pid
    # They include supervisor and fork server: as descendants of the worker, or as ancestors of the job.
    pids = [f"{pid}" for pid in sorted(list_descendants(worker) | {worker})]
    pids += ["os.getppid()", "int(open(f'/proc/{os.getppid()}/stat').read().rpartition(')')[2].split()[1])"]
    attempts = {
        f"{name} of {pid}": f"{DEFINE_CALL}\npid = {pid}\n{code}"
        for pid in pids
        for name, code in PROCESS_CALLS.items()
    }
    attempts |= {name: f"{DEFINE_CALL}\n{code}" for name, code in USER_CALLS.items()}
    own_calls = ["limits", "priority", "CPUs", "scheduler", "scheduling parameters", "scheduling attributes"]
    own_calls += ["priority of its disk access", "signal", "signal by handle", "signal to a thread"]
    attempts |= {
        f"may change {name} of {pid}": f"{DEFINE_CALL}\npid = {pid}\n{PROCESS_CALLS[name]}"
        for name in own_calls
        for pid in ("0", "os.getpid()")
        if pid == "os.getpid()" or not name.startswith("signal")
    }
    for program in (
        "nice true",
        "taskset 1 true",
        "ionice -c 3 true",
        "prlimit --nofile=100 true",
        "sh -c 'ulimit -n 50'",
    ):
        attempts[f"may run {program}"] = f'import subprocess; subprocess.run("{program}", shell=True, check=True)'
    outcomes = wait_for_outcomes(installation, submit_prying_job(installation, attempts))
    assert [name for name, text in outcomes.items() if name.startswith("may ") != text.startswith("GOT")] == [], (
        outcomes
    )


def test_worker_without_landlock_logs_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restrictions, "get_landlock_version", lambda: 0)
    monkeypatch.setattr(restrictions, "hide_from_same_user", lambda: None)
    with structlog.testing.capture_logs() as lines:
        confinement.check_confinement("auto")
    assert ["not confined" in line["event"] for line in lines] == [True]
    with pytest.raises(ConfigurationError, match=r"`required`, but .* the kernel does not support Landlock"):
        confinement.check_confinement("required")
    confinement.check_confinement("off")


def test_job_environment_hides_other_variables_from_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBLEDGER_AUTH__JWT__SECRET", "canary")
    monkeypatch.setenv("MODEL_HOME", "/models")
    environment = confinement.build_job_environment(["MODEL_HOME"])
    test = 'test -z "$JOBLEDGER_AUTH__JWT__SECRET" -a -n "$MODEL_HOME" -a -n "$PATH"'
    subprocess.run(["/bin/sh", "-c", test], env=environment, check=True)
    assert environment["OPENBLAS_NUM_THREADS"] == "1"
    assert os.environ["JOBLEDGER_AUTH__JWT__SECRET"] == "canary"
    assert subprocess.run(["sh", "-c", "echo $MODEL_HOME"], capture_output=True, check=True).stdout == b"/models\n"


def find_scratch(installation: Installation, job_id: str) -> list[Path]:
    """Return the scratch directory of a running job, which the job logs."""
    with http_client(installation.commands[0]) as client:
        lines = client.get(f"/api/events/jobs/{job_id}/logs").json()
    texts = [line["message"] for line in lines.get("logs", lines.get("items", []))]
    return [Path(text) for text in texts if text.startswith("/")]


def find_database_file(directory: Path) -> Path:
    return next(path for path in sorted((directory / "data").rglob("*")) if path.is_file() and path.stat().st_size)


@pytest.mark.skipif(
    restrictions.get_landlock_version() > 0,
    reason="needs Linux without Landlock: boot it with the option lsm=capability",
)
def test_worker_does_not_start_without_required_confinement(tmp_path: Path) -> None:
    with Installation(tmp_path, event_worker={"confinement": "required"}) as installation:
        assert_one_line_error(installation.start("up").wait_for_exit(), 2, "event_worker.confinement", "Landlock")


def test_packages_of_editable_installs_are_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editable install has no entry in `sys.path`, and its repository may be in a temporary directory."""
    (tmp_path / "installed").mkdir()
    package = ModuleType("installed")
    package.__path__ = [str(tmp_path / "installed")]
    monkeypatch.setitem(sys.modules, "installed", package)
    assert (str(tmp_path / "installed"), restrictions.READ_RIGHTS) in set(confinement._iterate_default_rules([]))
    assert str(tmp_path) not in {path for path, _ in confinement._iterate_default_rules([])}
