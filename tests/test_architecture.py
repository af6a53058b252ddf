"""Rules of the source code: imports, docstrings, broad exception handlers, and access to the events collection."""

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
PACKAGES = ("ledger", "projections", "workers", "api", "client", "cli", "testing")
MODULES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))

USE_DRIVER_ERRORS = {
    "ledger/mongo/connection.py": "translates the errors of the driver",
    "ledger/store/change_stream.py": "a change stream is opened again after any error",
    "ledger/mongo/embedded.py": "a starting server does not answer yet",
    "ledger/files/gridfs.py": "the unique index detects a file that is stored again",
    "ledger/mongo/lease.py": "the heartbeat thread continues after connection failures",
    "ledger/store/event_store.py": "the index may exist, and the clock may be estimated",
    "ledger/store/gap_filler.py": "a gap that could not be filled is filled later",
    "ledger/mongo/server_clock.py": "a failed measurement is repeated after the next heartbeat",
    "ledger/store/appender.py": "appends are repeated until it is certain that they are written or lost",
    "projections/engine/writer.py": "a document that MongoDB rejects is isolated; a server failure is retried",
}

CONTAIN_THIRD_PARTY_CODE = {
    "workers/child/attempt.py": "any exception of a processor fails its job, not the process that reports it",
    "workers/child/failures.py": "reading attributes and details of a third-party exception may raise anything",
    "workers/child/containment.py": "a closed coroutine of a processor may raise anything; the worker continues",
    "workers/results/conversion.py": "a __str__ of a third-party class may raise anything, but a text is required",
    "workers/child/main.py": "any failure of the process or its connection is reported to the worker",
    "workers/child/fork_server.py": "a module that raises on import must not end the process for all job types",
    "workers/registry.py": "a plug-in that raises when it is loaded makes only its own job type unusable",
    "workers/child/supervisor.py": "a forked job process ends here; nothing may return into the fork server's code",
}
"""Modules that may catch `BaseException` and not raise it again, with a reason on the same line."""


def relative_name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_import_contracts_are_kept() -> None:
    command = Path(sys.executable).parent / "lint-imports"
    if not command.exists():
        pytest.skip("install import-linter: pip install import-linter")
    result = subprocess.run(
        [command, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "KEPT" in result.stdout
    assert "BROKEN" not in result.stdout


def test_imports_have_no_cycles() -> None:
    """Imports under TYPE_CHECKING and in functions count too."""
    grimp = pytest.importorskip("grimp", reason="install grimp: pip install import-linter")
    graph = grimp.build_graph("jobledger", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__init__.py"], ids=relative_name)
def test_module_has_docstring(path: Path) -> None:
    docstring = ast.get_docstring(parse(path))
    assert docstring, "add a docstring whose first sentence says what the module does"
    assert len(docstring) > 20


@pytest.mark.parametrize("path", MODULES, ids=relative_name)
def test_broad_except_has_reason_on_same_line(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if re.search(r"except\s*(\(?\s*(Base)?Exception\b.*)?:", line) and "except BaseException" not in line:
            assert re.search(r"#.*\S{4,}.* - \S.*", line), (
                f"{relative_name(path)}:{number} catches everything: {line.strip()}"
            )


def find_swallowed_base_exceptions(path: Path) -> list[int]:
    """Return the lines of the handlers that catch `BaseException`, or everything, and do not end with `raise`."""
    return [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler)
        and (
            node.type is None
            or "BaseException" in {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
        )
        and not isinstance(node.body[-1], ast.Raise)
    ]


@pytest.mark.parametrize("path", MODULES, ids=relative_name)
def test_base_exception_handler_reraises_or_has_reason(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number in find_swallowed_base_exceptions(path):
        assert relative_name(path) in CONTAIN_THIRD_PARTY_CODE, f"{relative_name(path)}:{number} swallows cancellation"
        assert re.search(r"# noqa: BLE001 - \S", lines[number - 1]), f"{relative_name(path)}:{number} gives no reason"


def test_list_of_modules_that_contain_third_party_code_is_current() -> None:
    assert {
        relative_name(path) for path in MODULES if find_swallowed_base_exceptions(path)
    } == CONTAIN_THIRD_PARTY_CODE.keys()


@pytest.mark.parametrize("path", MODULES, ids=relative_name)
def test_suppressed_check_has_reason_on_same_line(path: Path) -> None:
    without_reason = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        ignored = "# type: ignore" in line and not re.search(r"# type: ignore\[[\w, -]+\]\s+# \S", line)
        silenced = "# noqa" in line and not re.search(r"# noqa: [A-Z]+\d+(, [A-Z]+\d+)*\s+\S", line)
        if ignored or silenced:
            without_reason.append(f"{relative_name(path)}:{number}")
    assert without_reason == []


def test_driver_errors_are_imported_only_by_listed_modules() -> None:
    modules = {relative_name(path) for path in MODULES if "pymongo.errors" in set(list_imports(parse(path)))}
    assert modules == USE_DRIVER_ERRORS.keys()


def test_events_collection_is_used_only_by_listed_modules_of_the_store() -> None:
    modules = {
        relative_name(path)
        for path in MODULES
        if re.search(r"\.events\b\.(insert|update|delete|replace|bulk|find|aggregate|count)", path.read_text())
        or re.search(r"get_collection\(\s*\"events\"|\[\"events\"\]", path.read_text())
    }
    # import_.py checks that the collection does not exist before it creates it.
    assert modules <= {
        "ledger/store/event_store.py",
        "ledger/store/appender.py",
        "ledger/store/verification.py",  # reads documents as they are stored, even if damaged
        "ledger/store/import_.py",
        "ledger/store/export_file.py",  # only the field `events` of the trailer
    }


def test_event_store_has_no_update_or_delete_of_events() -> None:
    modules = ("event_store.py", "appender.py")
    text = "".join((REPOSITORY / "ledger" / "store" / name).read_text(encoding="utf-8") for name in modules)
    assert re.findall(r"events\.(?:update|delete|replace|find_one_and|drop)\w*", text) == []
    assert re.findall(r"\b(?:UpdateOne|DeleteOne|ReplaceOne|UpdateMany|DeleteMany)\b", text) == []


def list_imports(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=relative_name)
def test_public_functions_have_docstrings(path: Path) -> None:
    functions = [node for node in parse(path).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    undocumented = {
        function.name for function in functions if not function.name.startswith("_") and not ast.get_docstring(function)
    }
    assert undocumented == set()


def list_documented_names(docstring: str, section: str) -> set[str]:
    """Return the names that a section of a docstring, such as `Args`, describes."""
    _, _, rest = docstring.partition(f"\n{section}:\n")
    entries = re.findall(r"^ {4}(\S[^:\n]*):", rest.partition("\n\n")[0], re.MULTILINE)
    return {name.strip("* ") for entry in entries for name in entry.split(",")}


def list_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}


def list_attributes(definition: ast.ClassDef) -> set[str]:
    """Return the names of the fields and properties of a class, and of the attributes that `__init__` sets."""
    attributes = set()
    for node in definition.body:
        if isinstance(node, ast.AnnAssign):
            attributes.add(ast.unparse(node.target))
        elif isinstance(node, ast.FunctionDef) and node.decorator_list:
            attributes.add(node.name)
        elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
            attributes |= {
                target.attr
                for target in ast.walk(node)
                if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
            }
    return attributes


def find_unknown_names(definition: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[str]:
    """Return the names in `Args` and `Attributes` that are no parameter and no attribute."""
    docstring = ast.get_docstring(definition) or ""
    arguments, attributes = (list_documented_names(docstring, section) for section in ("Args", "Attributes"))
    if not isinstance(definition, ast.ClassDef):
        return arguments - list_parameters(definition) | attributes
    init = [node for node in definition.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    parameters = list_parameters(init[0]) if init else list_attributes(definition)
    return arguments - parameters | attributes - list_attributes(definition)


@pytest.mark.parametrize("path", MODULES, ids=relative_name)
def test_docstrings_describe_existing_parameters_and_attributes(path: Path) -> None:
    unknown = [
        f"{relative_name(path)}:{node.lineno} {name}"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        for name in find_unknown_names(node)
    ]
    assert unknown == []


def test_unknown_names_in_docstrings_are_found() -> None:
    source = '"""D."""\ndef f(a):\n    """D.\n\n    Args:\n        a, c: An a.\n        b: A b.\n    """'
    assert find_unknown_names(ast.parse(source).body[1]) == {"b", "c"}  # type: ignore[arg-type]  # a function
    source = 'class C:\n    """D.\n\n    Attributes:\n        x: An x.\n        y: A y.\n    """\n    x: int'
    assert find_unknown_names(ast.parse(source).body[0]) == {"y"}  # type: ignore[arg-type]  # a class


def test_no_module_has_generic_name() -> None:
    forbidden = {"utils", "util", "helpers", "common", "base", "manager", "misc"}
    assert [relative_name(path) for path in MODULES if path.stem in forbidden] == []
