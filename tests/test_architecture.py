"""The house keeps its own rules: who may import whom, what a module says of itself, who knows the driver's errors."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ROOMS = ("ledger", "projections", "workers", "api", "cli")
MODULES = sorted(path for room in ROOMS for path in (REPOSITORY / room).rglob("*.py"))

KNOW_THE_DRIVERS_ERRORS = {
    "ledger/mongo.py": "the table from the driver's errors to ours",
    "ledger/changes.py": "a change stream is opened again after any trouble",
    "ledger/embedded.py": "starting a server means asking one that is not there yet",
    "ledger/lease.py": "heartbeats go on through interruptions, in a thread of their own",
    "ledger/log.py": "a hole that could not be filled is looked at again",
    "ledger/writer.py": "appends are repeated until they are known to be written or lost",
}


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


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__init__.py"], ids=name_of)
def test_a_module_begins_with_the_name_of_its_room(path: Path) -> None:
    docstring = ast.get_docstring(parsed(path))
    rooms = "session" if "processors/session" in name_of(path) else path.relative_to(REPOSITORY).parts[0]

    assert docstring, "a module says in its first lines which room it is in and what may live there"
    assert docstring.startswith(f"{rooms}: "), docstring.splitlines()[0]
    assert len(docstring) > len(rooms) + 20


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_whoever_catches_everything_says_why_on_the_same_line(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if re.search(r"except\s*(\(?\s*(Base)?Exception\b.*)?:", line) and "except BaseException" not in line:
            assert re.search(r"#.*\S{4,}.* - \S.*", line), (
                f"{name_of(path)}:{number} catches everything: {line.strip()}"
            )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_whoever_catches_even_cancellation_raises_it_again(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name) and node.type.id == "BaseException":
            assert isinstance(node.body[-1], ast.Raise), f"{name_of(path)}:{node.lineno}"


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
    # The doctor looks at its head, and an import makes sure that there is none before it makes one.
    assert found <= {"ledger/log.py", "ledger/writer.py", "ledger/transfer.py", "cli/doctor.py"}


def test_nobody_changes_or_removes_an_event() -> None:
    text = "".join((REPOSITORY / "ledger" / name).read_text(encoding="utf-8") for name in ("log.py", "writer.py"))
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
