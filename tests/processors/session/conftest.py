"""The local conference website."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processors.session.fixtures import Site, serve_site


@pytest.fixture
def site() -> Iterator[Site]:
    with serve_site() as running:
        yield running
