"""workers: which job types there are. They are entry points in the group `jobledger.processors`."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Final

from ledger.errors import ConfigurationError
from workers.processor import Processor

GROUP: Final = "jobledger.processors"


@cache
def processors() -> dict[str, type[Processor]]:
    """Return every installed processor by its job type.

    Raises:
        ConfigurationError: one of them cannot be loaded.
    """
    found: dict[str, type[Processor]] = {}
    for entry in entry_points(group=GROUP):
        try:
            found[entry.name] = entry.load()
        except (ImportError, AttributeError) as error:
            raise ConfigurationError(
                f"The processor {entry.name!r} ({entry.value}) cannot be loaded: {error}"
            ) from error
    return found


@cache
def processor_version(job_type: str) -> str:
    """Return the version of the distribution that a processor comes from, such as "jobledger 1.0"."""
    [entry] = entry_points(group=GROUP, name=job_type)
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""


def find_processor(job_type: str) -> type[Processor]:
    """Return the processor for a job type.

    Raises:
        LookupError: there is none.
    """
    return processors()[job_type]
