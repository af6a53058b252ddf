"""Run a role with the two job types of the comparison kit: `run_role.py worker`."""

from __future__ import annotations

from kit_jobs import HoldProcessor, NoopProcessor  # a separate module: the API validates in other processes

from jobledger.cli.main import main
from jobledger.workers.registry import load_processors

if __name__ == "__main__":
    load_processors().update(noop=NoopProcessor, hold=HoldProcessor)
    main()
