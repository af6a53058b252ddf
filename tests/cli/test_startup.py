"""Start of a role while a resource is unavailable: it waits, or exits with a code after which it is restarted."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jobledger.cli.composition import ALL_ROLES, start_roles
from jobledger.ledger.domain.errors import ConfigurationError, ResourceUnavailable, classify_os_error
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.embedded_files import wait_until
from tests.api.conftest import make_settings
from tests.support.installation import COMMAND, Installation, http_client
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.soak_only import soak_only


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, ResourceUnavailable),
        (errno.EDQUOT, ResourceUnavailable),
        (errno.EROFS, ResourceUnavailable),
        (errno.EIO, ResourceUnavailable),
        (errno.ESTALE, ResourceUnavailable),
        (errno.EMFILE, ResourceUnavailable),
        (errno.ENOMEM, ResourceUnavailable),
        (errno.EADDRINUSE, ResourceUnavailable),
        (errno.EADDRNOTAVAIL, ResourceUnavailable),
        (errno.ENOENT, ConfigurationError),
        (errno.EACCES, ConfigurationError),
        (errno.ENOTDIR, ConfigurationError),
        (errno.EISDIR, ConfigurationError),
        (errno.ENAMETOOLONG, ConfigurationError),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_classify_os_error_separates_transient_from_settings_errors(number: int, expected: type[Exception]) -> None:
    assert type(classify_os_error(OSError(number, os.strerror(number)), "it failed")) is expected


def _can_use_namespaces() -> bool:
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([unshare, "-rm", "true"], check=False).returncode == 0


async def test_start_roles_read_only_store_starts_and_reports_problem(
    mongodb_uri: str, db_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    settings = make_settings(mongodb_uri, db_name, tmp_path)
    failures: list[BaseException] = []
    monkeypatch.setattr("jobledger.ledger.files.directory.tempfile.TemporaryFile", raise_read_only)
    async with start_roles(
        settings, Connection(mongodb_uri, db_name), ALL_ROLES, on_failure=failures.append
    ) as running:
        await poll_until(lambda: running.db.workers.find_one({"problem": {"$ne": None}}), "the worker reports it")
        assert failures == []


@soak_only
@needs_local_mongod
@pytest.mark.skipif(
    not _can_use_namespaces(),
    reason="needs user namespaces: sysctl kernel.unprivileged_userns_clone=1",
)
@pytest.mark.parametrize("mount", ["-o ro", "-o size=4k"], ids=["read-only", "full"])
def test_worker_unwritable_store_starts_and_claims_no_jobs(
    mongodb_uri: str, db_name: str, tmp_path: Path, mount: str
) -> None:
    store = tmp_path / "results"
    store.mkdir()
    with Installation(
        tmp_path / "installation",
        mongodb={"uri": mongodb_uri, "db_name": db_name},
        results={"store": str(store)},
    ) as installation:
        api = installation.start("api").wait_until_ready()
        command = installation.directory / "worker"
        command.write_text(f"mount -t tmpfs {mount} none {store} && exec {COMMAND} worker\n")
        worker = installation.start_command(
            ["unshare", "-rm", "sh", str(command)], "worker-without-store"
        ).wait_until_ready()
        with http_client(api) as client:

            def read_problem() -> str | None:
                workers = client.get("/api/monitoring/events/stats").json()["stats"]["workers"]
                return workers[0]["problem"] if workers else None

            assert wait_until(lambda: bool(read_problem()), DEADLINE_SECONDS), worker.stderr
            assert 'jobledger_worker_healthy{worker_id="' in client.get("/metrics").text
        doctor = installation.start("doctor").wait_for_exit()
        assert doctor.exit_code == 1
        assert "1 active, 1 not claiming jobs" in doctor.out
        assert worker.process.poll() is None
        assert worker.stop().exit_code == 0
