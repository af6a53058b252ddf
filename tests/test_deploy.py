"""The files in `deploy/` agree with the commands and settings of the program."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from jobledger.cli import main
from jobledger.cli.exit_codes import EXIT_USAGE
from jobledger.cli.settings import Settings
from jobledger.cli.settings_file import read_settings

DEPLOY = Path(__file__).parents[1] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def list_commands() -> set[str]:
    command: Any = typer.main.get_command(main.app)
    return set(command.commands)


def load_services() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    return services


def test_compose_file_roles_and_settings_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    roles = {name: service for name, service in load_services().items() if service["image"] == "jobledger"}
    assert roles.keys() == {"api", "projector", "worker"}
    for service in roles.values():
        assert service["command"][0] in list_commands()
        with monkeypatch.context() as patched:
            for name, value in service["environment"].items():
                patched.setenv(name, value)
            settings = Settings()
        assert settings.auth.mode == "keys"
        assert service["command"] != ["worker"] or "mem_limit" in service
        grace = int(service.get("stop_grace_period", "40s").removesuffix("s"))
        assert service["command"] != ["worker"] or grace > settings.event_worker.shutdown_grace_seconds


def test_compose_file_replica_set_members_match_uri() -> None:
    members = {name for name in load_services() if name.startswith("mongo-")}
    [initiate] = load_services()["replica-set"]["command"]
    assert set(re.findall(r"host: \"(mongo-\d):27017\"", initiate)) == members
    uri = load_services()["api"]["environment"]["JOBLEDGER_MONGODB__URI"]
    assert set(re.findall(r"mongo-\d", uri)) == members


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_systemd_unit_starts_role_and_allows_clean_stop(unit: Path) -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keep the case of names
    parser.read_string(unit.read_text(encoding="utf-8"))
    service = parser["Service"]
    command, role = service["ExecStart"].split()
    assert Path(command).name == "jobledger"
    assert role in list_commands()
    assert service["Restart"] == "always"
    if role == "worker":
        assert "MemoryMax" in service
        assert int(service["TimeoutStopSec"]) > Settings().event_worker.shutdown_grace_seconds


def test_install_how_to_settings_use_writable_paths_of_units(tmp_path: Path) -> None:
    text = (DEPLOY.parent / "docs" / "how-to" / "install.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    config = tmp_path / "config.yaml"
    config.write_text(example, encoding="utf-8")
    settings, _ = read_settings(config)
    for unit in UNITS:
        [writable] = re.findall(r"^ReadWritePaths=(\S+)$", unit.read_text(encoding="utf-8"), re.MULTILINE)
        assert Path(str(settings.results.store)).is_relative_to(writable)
    [secret] = re.findall(r"^```ini\n(\w+)=", text, re.MULTILINE)
    assert secret == "JOBLEDGER_MONGODB__URI"
    assert set(re.findall(r"jobledger-\w+", text)) >= {unit.stem.rstrip("@") for unit in UNITS}


def test_systemd_unit_restarts_except_after_usage_error() -> None:
    for unit in UNITS:
        text = unit.read_text(encoding="utf-8")
        assert f"\nRestartPreventExitStatus={EXIT_USAGE}\n" in text
        assert "\nStartLimitIntervalSec=0\n" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="install systemd-analyze: apt-get install systemd")
def test_systemd_analyze_verify_accepts_units(tmp_path: Path) -> None:
    def verify(units: list[Path]) -> list[str]:
        result = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
        lines = (result.stdout + result.stderr).splitlines()  # units of the system may have errors of their own
        return [line for line in lines if "jobledger" in line]

    units = [tmp_path / unit.name.replace("@", "@1") for unit in UNITS]
    program = Path(sys.executable).with_name("jobledger")
    for unit, copy in zip(UNITS, units, strict=True):
        text = unit.read_text(encoding="utf-8")
        copy.write_text(text.replace("/opt/jobledger/bin/jobledger", str(program)), encoding="utf-8")
    assert verify(units) == []
    units[0].write_text(units[0].read_text(encoding="utf-8").replace("Restart=always", "Restart=ever"))
    assert verify(units) != []


def test_container_image_copies_all_packages_and_starts_command() -> None:
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    packages = {path.parent.name for path in DEPLOY.parent.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert set(re.findall(r"^COPY (\w+) \w+$", text, re.MULTILINE)) == packages
    assert 'ENTRYPOINT ["jobledger"]' in text
