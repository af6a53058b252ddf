"""Jobledger: an event-sourced job queue on MongoDB.

The names in `__all__` are the public API. Each is imported on first use, so `import jobledger` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from jobledger.ledger.domain.errors import JobledgerError
    from jobledger.ledger.subscriber import ledger_client
    from jobledger.workers.processor import JobContext, Processor, ProcessorError, Results, SavedFile

__all__ = [
    "JobContext",
    "JobledgerError",
    "Processor",
    "ProcessorError",
    "Results",
    "SavedFile",
    "__version__",
    "ledger_client",
]

_MODULES: Final = {
    "JobContext": "jobledger.workers.processor",
    "JobledgerError": "jobledger.ledger.domain.errors",
    "Processor": "jobledger.workers.processor",
    "ProcessorError": "jobledger.workers.processor",
    "Results": "jobledger.workers.processor",
    "SavedFile": "jobledger.workers.processor",
    "ledger_client": "jobledger.ledger.subscriber",
}


def __getattr__(name: str) -> object:
    """Load a public name (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("jobledger")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'jobledger' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
