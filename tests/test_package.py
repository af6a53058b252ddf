"""The built wheel, installed into an empty environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.doc_examples import read_code_blocks

REPOSITORY = Path(__file__).parents[1]


def run_outside_repository(
    *command: str | Path, directory: Path, data_dir: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command outside the repository and without its settings."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JOBLEDGER_", "PYTHON"))}
    if data_dir is not None:
        env["JOBLEDGER_MONGODB__DATA_DIR"] = str(data_dir)
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=110, check=False)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a virtual environment with this wheel and the dependencies of the one that runs the tests.

    The environment's own site-packages directory has the wheel only.
    """
    base = tmp_path_factory.mktemp("package")
    source = base / "source"  # a build leaves files in its directory and would reuse those of an earlier build
    for name in ("jobledger", "ledger", "projections", "workers", "api", "client", "cli", "testing"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    built = run_outside_repository(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--disable-pip-version-check", "--wheel-dir", base / "wheel", source),
        directory=base,
    )
    assert built.returncode == 0, built.stderr
    [wheel] = (base / "wheel").glob("*.whl")
    created = run_outside_repository(sys.executable, "-m", "venv", "--without-pip", base / "venv", directory=base)
    assert created.returncode == 0, created.stderr
    installed = run_outside_repository(
        *(sys.executable, "-m", "pip", "--python", base / "venv" / "bin" / "python", "install", "--quiet"),
        *("--disable-pip-version-check", "--no-deps", "--root-user-action=ignore", wheel),
        directory=base,
    )
    assert installed.returncode == 0, installed.stderr
    return base / "venv"


def find_site_packages(environment: Path) -> Path:
    [directory] = environment.glob("lib/python*/site-packages")
    return directory


def add_dependencies(environment: Path) -> None:
    """Make the packages of the environment that runs the tests importable, but not its editable install."""
    dependencies = find_site_packages(Path(sys.prefix))
    code = f"import sys; sys.path.append({str(dependencies)!r})"
    (find_site_packages(environment) / "dependencies.pth").write_text(code + "\n")


def test_wheel_adds_exactly_one_top_level_name(environment: Path) -> None:
    names = {
        path.name
        for path in find_site_packages(environment).iterdir()
        if not path.name.endswith((".pth", ".dist-info"))
    }
    assert names == {"jobledger"}


def test_installed_package_is_complete_and_typed(environment: Path) -> None:
    package = find_site_packages(environment) / "jobledger"
    sources = {
        path.relative_to(REPOSITORY).as_posix()
        for folder in ("ledger", "projections", "workers", "api", "client", "cli", "testing")
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    installed = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert sources - installed == set()
    assert (package / "py.typed").is_file()


def test_installed_command_runs_without_the_repository(environment: Path, tmp_path: Path) -> None:
    add_dependencies(environment)
    imported = run_outside_repository(
        environment / "bin" / "python", "-c", "import jobledger; print(jobledger.__file__)", directory=tmp_path
    )
    assert Path(imported.stdout.strip()).is_relative_to(environment), imported.stderr

    version_output = run_outside_repository(environment / "bin" / "jobledger", "--version", directory=tmp_path)
    assert (version_output.returncode, version_output.stdout) == (0, version("jobledger") + "\n"), version_output.stderr

    doctor = run_outside_repository(
        environment / "bin" / "jobledger", "doctor", directory=tmp_path, data_dir=tmp_path / "data"
    )
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert "replica set rs0" in doctor.stdout


def test_public_names_are_importable(environment: Path, tmp_path: Path) -> None:
    add_dependencies(environment)
    code = (
        "import json, jobledger; print(json.dumps({name: str(getattr(jobledger, name)) for name in jobledger.__all__}))"
    )
    outcome = run_outside_repository(environment / "bin" / "python", "-c", code, directory=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert {"Processor", "ProcessorError", "Results", "__version__"} <= json.loads(outcome.stdout).keys()


def test_examples_of_the_test_kit_pass_in_a_project_of_a_user(
    environment: Path, tmp_path: Path, mongodb_uri: str
) -> None:
    """The project has the directories `shop` and `tests`, and uses only the installed package."""
    add_dependencies(environment)
    page = REPOSITORY / "docs" / "how-to" / "test-your-jobs.md"
    paths = ("shop/jobs.py", "tests/test_invoice.py", "tests/test_order.py", "tests/test_shop.py")
    for path, code in zip(paths, read_code_blocks(page, "python"), strict=True):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(code, encoding="utf-8")
    [settings] = read_code_blocks(page, "toml")
    (tmp_path / "pyproject.toml").write_text(settings, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JOBLEDGER_", "PYTHON", "PYTEST"))}
    outcome = subprocess.run(
        [environment / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:schemathesis"],
        cwd=tmp_path,
        env={**env, "JOBLEDGER_TEST_MONGODB_URI": mongodb_uri, "JOBLEDGER_JOBS__APP": "from.the.environment"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "7 passed" in outcome.stdout


def test_pytest_plugin_imports_only_pytest(environment: Path, tmp_path: Path) -> None:
    add_dependencies(environment)
    code = (
        "import sys, pytest; before = set(sys.modules); import jobledger.testing.fixtures; "
        "print(sorted(name for name in set(sys.modules) - before if not name.startswith('jobledger')))"
    )
    outcome = run_outside_repository(environment / "bin" / "python", "-c", code, directory=tmp_path)
    assert (outcome.returncode, outcome.stdout) == (0, "[]\n"), outcome.stdout + outcome.stderr
