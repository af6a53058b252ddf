"""The fixture `ledger` of `jobledger.testing` on the MongoDB server of the other tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def jobledger_mongodb_uri(mongodb_uri: str) -> str:
    """Replace the server of the plug-in."""
    return mongodb_uri
