"""`jobledger up`, and the commands that run one role: `api`, `projector`, `worker`, `webhook-sender`."""

from __future__ import annotations

from jobledger.cli.commands.options import ConfigOption
from jobledger.cli.runtime import run_roles


def run_all(config: ConfigOption = None) -> None:
    """Run all roles on this machine

    Starts the embedded MongoDB server (if configured), the API, the projector, a worker and the webhook sender.
    Ctrl-C stops them cleanly.
    """
    run_roles(config)


def run_api(config: ConfigOption = None) -> None:
    """Run the API"""
    run_roles(config, frozenset({"api"}))


def run_projector(config: ConfigOption = None) -> None:
    """Run the projector, which keeps the views up to date

    One projector is the leader. The others stand by.
    """
    run_roles(config, frozenset({"projector"}))


def run_worker(config: ConfigOption = None) -> None:
    """Run a worker

    Run any number of workers, on any number of machines. Each worker can send webhooks; one
    process at a time does.
    """
    run_roles(config, frozenset({"worker", "webhook-sender"}))


def run_webhook_sender(config: ConfigOption = None) -> None:
    """Run the webhook sender

    One process, a webhook sender or a worker, is the leader. The others stand by.
    """
    run_roles(config, frozenset({"webhook-sender"}))
