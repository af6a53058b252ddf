"""The synchronous client is generated from the asynchronous one, and imports little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import generated_client


@pytest.mark.parametrize("source", generated_client.list_sources(), ids=lambda path: path.name)
def test_synchronous_module_is_current(source: Path) -> None:
    expected = generated_client.render(source)
    assert (generated_client.TARGET / source.name).read_text() == expected, "run `make reference`"
    assert "await" not in expected
    assert "async " not in expected


def test_both_clients_have_the_same_modules() -> None:
    names = {path.name for path in generated_client.SOURCE.glob("*.py")}
    assert names == {path.name for path in generated_client.TARGET.glob("*.py")}


def test_client_imports_neither_driver_nor_server() -> None:
    code = "import sys, jobledger; jobledger.Client; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    packages = {name.partition(".")[0] for name in result.stdout.split()}
    assert packages & {"pymongo", "bson", "starlette", "uvicorn", "structlog"} == set()
