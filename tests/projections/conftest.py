from __future__ import annotations

from pathlib import Path

import pytest

from jobledger.ledger.mongo.connection import Connection


@pytest.fixture
def connection(mongodb_uri: str, db_name: str) -> Connection:
    return Connection(mongodb_uri, db_name)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "results"
