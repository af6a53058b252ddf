"""`jobledger up`, and the commands that run one role: `api`, `projector`, `worker`, `webhook-sender`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from jobledger.cli.commands.options import ConfigOption
from jobledger.cli.runtime import run_roles
from jobledger.ledger.domain.errors import ConfigurationError

if TYPE_CHECKING:
    from jobledger.cli.composition import Role

_APP_VARIABLE: Final = "JOBLEDGER_JOBS__APP"
_APP_DIR_VARIABLE: Final = "JOBLEDGER_JOBS__APP_DIR"
AppOption = Annotated[
    str | None,
    typer.Option(
        "--app",
        help="Module with the job types, or an App in it, e.g. shop.jobs:app. Default: jobs.app",
        callback=lambda name: _check_app(name),
    ),
]
AppDirOption = Annotated[
    Path, typer.Option("--app-dir", file_okay=False, help="Directory from which --app is imported")
]
ReloadOption = Annotated[bool, typer.Option("--reload", help="Restart when a Python file in --app-dir changes")]
_HERE: Final = Path()


def run_all(
    config: ConfigOption = None, app: AppOption = None, app_dir: AppDirOption = _HERE, reload: ReloadOption = False
) -> None:
    """Run all roles on this machine

    Starts the embedded MongoDB server (if configured), the API, the projector, a worker and the webhook sender.
    Ctrl-C stops them cleanly.

    Examples:
        jobledger up
        jobledger up --config config.yaml
        jobledger up --app shop.jobs:app --reload
    """
    _run(config, None, app, app_dir, reload=reload)


def run_api(
    config: ConfigOption = None, app: AppOption = None, app_dir: AppDirOption = _HERE, reload: ReloadOption = False
) -> None:
    """Run the API

    Examples:
        jobledger api
        jobledger api --app shop.jobs:app
    """
    _run(config, frozenset({"api"}), app, app_dir, reload=reload)


def run_projector(config: ConfigOption = None) -> None:
    """Run the projector, which keeps the views up to date

    One projector is the leader. The others stand by.

    Examples:
        jobledger projector
    """
    run_roles(config, frozenset({"projector"}))


def run_worker(
    config: ConfigOption = None, app: AppOption = None, app_dir: AppDirOption = _HERE, reload: ReloadOption = False
) -> None:
    """Run a worker

    Run any number of workers, on any number of machines. Each worker can send webhooks; one
    process at a time does.

    Examples:
        jobledger worker
        jobledger worker --app shop.jobs:app
    """
    _run(config, frozenset({"worker", "webhook-sender"}), app, app_dir, reload=reload)


def run_webhook_sender(config: ConfigOption = None) -> None:
    """Run the webhook sender

    One process, a webhook sender or a worker, is the leader. The others stand by.

    Examples:
        jobledger webhook-sender
    """
    run_roles(config, frozenset({"webhook-sender"}))


def _check_app(name: str | None) -> str | None:
    from jobledger.workers.job_types.app import check_app_name

    try:
        return None if name is None else check_app_name(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _run(
    config: Path | None, selected: frozenset[Role] | None, app: str | None, app_dir: Path, *, reload: bool
) -> None:
    """Run roles with the job types of an application.

    Raises:
        ConfigurationError: `--reload` is given without an application.
    """
    if app is not None:  # options override the environment, which overrides config.yaml
        os.environ[_APP_VARIABLE] = app
        os.environ[_APP_DIR_VARIABLE] = str(app_dir.absolute())
    if not reload:
        run_roles(config, selected)
        return
    if app is None:
        raise ConfigurationError("--reload requires --app: the code whose changes restart the roles.")
    from jobledger.cli.hosting.reloader import run_with_reload

    arguments = [argument for argument in sys.argv[1:] if argument != "--reload"]
    raise typer.Exit(run_with_reload(arguments, app_dir.absolute(), config))
