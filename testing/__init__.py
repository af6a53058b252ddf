"""Test job types and the code that submits jobs.

`run` runs one attempt of a job in this process, without a server. The pytest fixture `ledger` runs a real one. Each
name is imported on first use: pytest loads the plug-in of this package in all projects that have Jobledger installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from jobledger.testing.ledger import Ledger
    from jobledger.testing.outcome import Outcome, OutcomeFile, Progress
    from jobledger.testing.runner import Runner, arun, run, with_options
    from jobledger.testing.submissions import AsyncRecordingClient, RecordingClient, Submitted, assert_submitted

__all__ = [
    "AsyncRecordingClient",
    "Ledger",
    "Outcome",
    "OutcomeFile",
    "Progress",
    "RecordingClient",
    "Runner",
    "Submitted",
    "arun",
    "assert_submitted",
    "run",
    "with_options",
]

_MODULES: Final = {
    "AsyncRecordingClient": "submissions",
    "Ledger": "ledger",
    "Outcome": "outcome",
    "OutcomeFile": "outcome",
    "Progress": "outcome",
    "RecordingClient": "submissions",
    "Runner": "runner",
    "Submitted": "submissions",
    "arun": "runner",
    "assert_submitted": "submissions",
    "run": "runner",
    "with_options": "runner",
}


def __getattr__(name: str) -> object:
    """Load a public name (PEP 562)."""
    if name in _MODULES:
        return getattr(import_module(f"jobledger.testing.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'jobledger.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
