"""Install the job types of `tests.support.misbehaving` as a third-party package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobledger.workers import registry
from jobledger.workers.child.fork_server_client import fork_server_client
from jobledger.workers.registry import get_processor_version

_ENTRY_POINTS = """[jobledger.processors]
misbehaving = tests.support.misbehaving:MisbehavingProcessor
misbehaving-inline = tests.support.misbehaving:InlineMisbehavingProcessor
"""


@pytest.fixture(scope="module")
def misbehaving_processors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The job types `misbehaving` and `misbehaving-inline`, in this process and in subprocesses.

    Yields the site directory that contains their package.
    """
    site = tmp_path_factory.mktemp("site")
    package = site / "misbehaving-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: misbehaving\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(_ENTRY_POINTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", str(site))  # for workers in subprocesses
        _clear_caches()
        yield site
    _clear_caches()


def _clear_caches() -> None:
    registry._load_all.cache_clear()
    get_processor_version.cache_clear()
    fork_server_client.stop()
