"""A page that is open while the API restarts reconnects by itself and shows what happened meanwhile."""

from __future__ import annotations

import asyncio
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from jobledger.ledger.domain.commands import ClaimJob
from jobledger.ledger.domain.events import EventMetadata, JobResults, ResultMetadata
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.command_handler import handle_command
from tests.api.dashboard.conftest import clear_console_errors, needs_browser
from tests.support.installation import Installation
from tests.support.ledger_setup import open_ledger
from tests.support.replica_set import free_port
from tests.support.worker_reports import report_results

pytestmark = needs_browser


@pytest.mark.timeout(120)
async def test_page_reconnects_after_api_restart(mongodb_uri: str, db_name: str, tmp_path: Path, page: Page) -> None:
    mongodb = {"uri": mongodb_uri, "db_name": db_name}
    with Installation(tmp_path, mongodb=mongodb, api={"port": free_port()}) as installation:
        await asyncio.to_thread(installation.start("projector").wait_until_ready)
        server = await asyncio.to_thread(installation.start("api").wait_until_ready)
        async with open_ledger(Connection(mongodb_uri, db_name), with_change_stream=False) as ledger:
            meta = EventMetadata("test")
            job_id = (await ledger.submit_job()).events[0].stream
            claim = ClaimJob("worker-1", datetime.now(UTC) + timedelta(hours=1))
            await handle_command(ledger.event_store, job_id, claim, meta=meta)
            await page.goto(f"{server.url}/monitoring/events/jobs/{job_id}")
            await expect(page.locator("#status .status-badge.processing")).to_be_visible()
            await expect(page.locator("#live-status.connected")).to_be_visible()
            await page.evaluate("window.isSamePage = true")
            server.process.send_signal(signal.SIGKILL)
            await expect(page.locator("#live-status")).to_have_text("Reconnecting …")
            metadata = ResultMetadata(processed_at=datetime.now(UTC), duration=1.0, tokens_used=0)
            complete = report_results("worker-1", 1, JobResults(metadata=metadata))
            await handle_command(ledger.event_store, job_id, complete, meta=meta)
        await asyncio.to_thread(installation.start("api").wait_until_ready)
        await expect(page.locator("#status .status-badge.completed")).to_be_visible()
        await expect(page.locator("#events")).to_contain_text("JobCompleted")
        await expect(page.locator("#live-status.connected")).to_be_visible()
        assert await page.evaluate("window.isSamePage")
        clear_console_errors(page)
