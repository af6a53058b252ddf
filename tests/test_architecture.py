"""The house keeps its own rules: who may import whom, what a module says of itself, who knows the driver's errors."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("ledger", "projections", "workers", "api", "cli")
MODULES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))

KNOW_THE_DRIVERS_ERRORS = {
    "ledger/mongo/connection.py": "the table from the driver's errors to ours",
    "ledger/store/change_stream.py": "a change stream is opened again after any trouble",
    "ledger/mongo/embedded.py": "starting a server means asking one that is not there yet",
    "ledger/store/endpoint_secrets.py": "two processes may create the same secret; a duplicate key is no error",
    "ledger/files/gridfs.py": "a file that is stored again is found by its unique index",
    "ledger/mongo/lease.py": "heartbeats go on through interruptions, in a thread of their own",
    "ledger/store/event_store.py": "a hole that could not be filled is looked at again",
    "ledger/mongo/server_clock.py": "a measurement that nobody waits for is made again after the next heartbeat",
    "ledger/store/appender.py": "appends are repeated until they are known to be written or lost",
    "projections/engine/writer.py": "a document that MongoDB rejects is isolated; a server failure is retried",
}

CONTAIN_FOREIGN_CODE = {
    "workers/child/attempt.py": "whatever a processor raises fails its job, not the process that reports it",
    "workers/child/failures.py": "attributes and details of a foreign exception may raise anything when they are read",
    "workers/child/containment.py": "a closed coroutine of a processor may raise anything; the worker goes on",
    "workers/result_conversion.py": "a __str__ of a foreign class may raise anything; a text is needed",
    "workers/child/main.py": "whatever a processor does to its process or its connection, the worker learns of it",
    "workers/child/fork_server.py": "a module that raises on import must not end the process for all job types",
    "workers/registry.py": "a plug-in that raises when it is loaded makes only its own job type unusable",
    "workers/child/supervisor.py": "a forked job process ends here; nothing may return into the fork server's code",
}
"""Modules that may catch `BaseException` and not raise it again, with a reason on the same line."""


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_imports_point_only_downwards() -> None:
    command = Path(sys.executable).parent / "lint-imports"
    if not command.exists():
        pytest.skip("import-linter is not installed")
    checked = subprocess.run(
        [command, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "KEPT" in checked.stdout
    assert "BROKEN" not in checked.stdout


def test_modules_do_not_import_each_other_in_cycles() -> None:
    """All imports count: those under TYPE_CHECKING and within functions, too."""
    grimp = pytest.importorskip("grimp", reason="grimp, which import-linter brings, is not installed")
    graph = grimp.build_graph("jobledger", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"an import cycle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__init__.py"], ids=name_of)
def test_module_has_a_docstring_that_says_what_it_does(path: Path) -> None:
    docstring = ast.get_docstring(parsed(path))
    assert docstring, "add a docstring whose first sentence says what the module does"
    assert len(docstring) > 20


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_whoever_catches_everything_says_why_on_the_same_line(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if re.search(r"except\s*(\(?\s*(Base)?Exception\b.*)?:", line) and "except BaseException" not in line:
            assert re.search(r"#.*\S{4,}.* - \S.*", line), (
                f"{name_of(path)}:{number} catches everything: {line.strip()}"
            )


def swallow_base_exceptions(path: Path) -> list[int]:
    """Return the lines of the handlers that catch `BaseException`, or everything, and do not end with `raise`."""
    return [
        node.lineno
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or "BaseException" in {it.id for it in ast.walk(node.type) if isinstance(it, ast.Name)})
        and not isinstance(node.body[-1], ast.Raise)
    ]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_base_exception_handler_raises_again_or_gives_its_reason(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number in swallow_base_exceptions(path):
        assert name_of(path) in CONTAIN_FOREIGN_CODE, f"{name_of(path)}:{number} swallows cancellation"
        assert re.search(r"# noqa: BLE001 - \S", lines[number - 1]), f"{name_of(path)}:{number} gives no reason"


def test_list_of_modules_that_contain_foreign_code_has_no_others() -> None:
    assert {name_of(path) for path in MODULES if swallow_base_exceptions(path)} == CONTAIN_FOREIGN_CODE.keys()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_rule_is_switched_off_only_with_a_reason_on_the_same_line(path: Path) -> None:
    bare = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        ignored = "# type: ignore" in line and not re.search(r"# type: ignore\[[\w, -]+\]\s+# \S", line)
        silenced = "# noqa" in line and not re.search(r"# noqa: [A-Z]+\d+(, [A-Z]+\d+)*\s+\S", line)
        if ignored or silenced:
            bare.append(f"{name_of(path)}:{number}")
    assert bare == []


def test_the_drivers_errors_are_known_only_where_they_must_be() -> None:
    found = {name_of(path) for path in MODULES if "pymongo.errors" in set(imported(parsed(path)))}
    assert found == KNOW_THE_DRIVERS_ERRORS.keys()


def test_only_the_log_touches_the_events() -> None:
    found = {
        name_of(path)
        for path in MODULES
        if re.search(r"\.events\b\.(insert|update|delete|replace|bulk|find|aggregate|count)", path.read_text())
        or re.search(r"get_collection\(\s*\"events\"|\[\"events\"\]", path.read_text())
    }
    # An import makes sure that there is none before it makes one.
    assert found <= {
        "ledger/store/event_store.py",
        "ledger/store/appender.py",
        "ledger/store/import_.py",
        "ledger/store/export_file.py",  # only the field `events` of the trailer
    }


def test_nobody_changes_or_removes_an_event() -> None:
    modules = ("event_store.py", "appender.py")
    text = "".join((REPOSITORY / "ledger" / "store" / name).read_text(encoding="utf-8") for name in modules)
    assert re.findall(r"events\.(?:update|delete|replace|find_one_and|drop)\w*", text) == []
    assert re.findall(r"\b(?:UpdateOne|DeleteOne|ReplaceOne|UpdateMany|DeleteMany)\b", text) == []


def imported(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_functions_have_docstrings(path: Path) -> None:
    functions = [node for node in parsed(path).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    without = {it.name for it in functions if not it.name.startswith("_") and not ast.get_docstring(it)}
    assert without == set()


def test_no_module_is_a_drawer_for_everything() -> None:
    forbidden = {"utils", "util", "helpers", "common", "base", "manager", "misc"}
    assert [name_of(path) for path in MODULES if path.stem in forbidden] == []
