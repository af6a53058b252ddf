"""The conference website and the OpenAI server of a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobledger.workers.processors.session import download
from tests.processors.session.fixtures import CONFERENCE_PAGE, Site, html, serve_site
from tests.processors.session.openai_server import FakeOpenAiServer, run_fake_openai


@pytest.fixture(autouse=True)
def short_retry_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let downloads be retried at once."""
    monkeypatch.setattr(download, "RETRY_DELAYS_SECONDS", (0.01,) * len(download.RETRY_DELAYS_SECONDS))


@pytest.fixture
def site() -> Iterator[Site]:
    with serve_site() as running_site:
        yield running_site


@pytest.fixture
def page_url(site: Site) -> str:
    """The URL of a session page on the website."""
    return site.put("/2025/talks/ledgers/", html(CONFERENCE_PAGE))


@pytest.fixture
def openai_server() -> Iterator[FakeOpenAiServer]:
    with run_fake_openai() as running_server:
        yield running_server
