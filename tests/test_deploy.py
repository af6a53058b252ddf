"""What is in `deploy/` fits the program: its commands, settings and metrics."""

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


def commands() -> set[str]:
    command: Any = typer.main.get_command(main.app)
    return set(command.commands)


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    return found


def test_the_roles_of_the_compose_file_are_commands_and_its_settings_are_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = {name: it for name, it in services().items() if it["image"] == "jobledger"}
    assert ours.keys() == {"api", "projector", "worker"}
    for service in ours.values():
        assert service["command"][0] in commands()
        with monkeypatch.context() as patched:
            for name, value in service["environment"].items():
                patched.setenv(name, value)
            settings = Settings()
        assert settings.auth.mode == "keys"
        grace = int(service.get("stop_grace_period", "40s").removesuffix("s"))
        assert service["command"] != ["worker"] or grace > settings.event_worker.shutdown_grace_seconds


def test_the_members_of_the_replica_set_are_those_that_the_service_looks_for() -> None:
    members = {name for name in services() if name.startswith("mongo-")}
    [initiate] = services()["replica-set"]["command"]
    assert set(re.findall(r"host: \"(mongo-\d):27017\"", initiate)) == members
    uri = services()["api"]["environment"]["JOBLEDGER_MONGODB__URI"]
    assert set(re.findall(r"mongo-\d", uri)) == members


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_a_unit_starts_a_role_and_lets_it_end(unit: Path) -> None:
    read = configparser.ConfigParser(strict=False, interpolation=None)
    read.optionxform = str  # type: ignore[assignment,method-assign]  # names as they are written
    read.read_string(unit.read_text(encoding="utf-8"))
    service = read["Service"]
    command, role = service["ExecStart"].split()
    assert Path(command).name == "jobledger"
    assert role in commands()
    assert service["Restart"] == "always"
    if role == "worker":
        assert int(service["TimeoutStopSec"]) > Settings().event_worker.shutdown_grace_seconds


def test_the_settings_that_go_with_the_units_keep_files_where_these_may_write(tmp_path: Path) -> None:
    text = (DEPLOY.parent / "docs" / "how-to" / "install.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    config = tmp_path / "config.yaml"
    config.write_text(shown, encoding="utf-8")
    settings, _ = read_settings(config)
    for unit in UNITS:
        [writable] = re.findall(r"^ReadWritePaths=(\S+)$", unit.read_text(encoding="utf-8"), re.MULTILINE)
        assert Path(str(settings.results.store)).is_relative_to(writable)
    [secret] = re.findall(r"^```ini\n(\w+)=", text, re.MULTILINE)
    assert secret == "JOBLEDGER_MONGODB__URI"
    assert set(re.findall(r"jobledger-\w+", text)) >= {unit.stem.rstrip("@") for unit in UNITS}


def test_a_unit_is_started_again_over_anything_but_a_wrong_setting() -> None:
    for unit in UNITS:
        text = unit.read_text(encoding="utf-8")
        assert f"\nRestartPreventExitStatus={EXIT_USAGE}\n" in text
        assert "\nStartLimitIntervalSec=0\n" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed (systemd-analyze)")
def test_systemd_has_nothing_to_say_against_the_units(tmp_path: Path) -> None:
    def said(units: list[Path]) -> list[str]:
        done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
        lines = (done.stdout + done.stderr).splitlines()  # of units that ours depend on, others may be wrong
        return [line for line in lines if "jobledger" in line]

    units = [tmp_path / unit.name.replace("@", "@1") for unit in UNITS]
    program = Path(sys.executable).with_name("jobledger")
    for unit, copy in zip(UNITS, units, strict=True):
        text = unit.read_text(encoding="utf-8")
        copy.write_text(text.replace("/opt/jobledger/bin/jobledger", str(program)), encoding="utf-8")
    assert said(units) == []
    units[0].write_text(units[0].read_text(encoding="utf-8").replace("Restart=always", "Restart=ever"))
    assert said(units) != []


def test_the_image_has_every_room_and_starts_the_command() -> None:
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in DEPLOY.parent.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert set(re.findall(r"^COPY (\w+) \w+$", text, re.MULTILINE)) == rooms
    assert 'ENTRYPOINT ["jobledger"]' in text
