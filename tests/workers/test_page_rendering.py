"""Chromium renders pages from a job process that is confined and whose memory is limited."""

from __future__ import annotations

from pathlib import Path

from jobledger.ledger.mongo.connection import Connection
from tests.processors.session.fixtures import serve_site
from tests.processors.session.test_rendering import needs_chromium, put_app
from tests.support.role_runner import WorkerOptions, run_roles_in_process

OPTIONS = WorkerOptions(memory_limit_mb=1024, processors={"session": {"allowed_private_hosts": ["127.0.0.1"]}})


@needs_chromium
async def test_job_process_renders_a_page(connection: Connection, store: Path) -> None:
    with serve_site() as site:
        parameters = {"event": "A conference", "session": "A talk", "filename": "talk.md", "track": "A track"}
        async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
            job_id = await roles.submit(parameters | {"url": put_app(site)}, job_type="session", max_attempts=1)
            job = await roles.wait_until_finished(job_id, seconds=60)
            assert (job["status"], job["error"]) == ("completed", None)
        assert site.requested_paths == ["/talk", "/app.js", "/api/talk.json"]
