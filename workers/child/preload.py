"""Import the modules in `preload` of processors.

`python -m jobledger.workers.child.preload JOB_TYPE…` writes a line for each job type: its name, a tab, and the problem
if there is one.
"""

import sys

from jobledger.workers.registry import ProcessorUnusable, check_preload


def preload(job_type: str) -> None:
    """Import the modules of a processor. If that fails, write why to stderr. Its jobs report it when they run."""
    if problem := _find_problem(job_type):
        print(f"jobledger: job type {job_type}: {problem}", file=sys.stderr)


def _find_problem(job_type: str) -> str:
    try:
        check_preload(job_type)
    except ProcessorUnusable as error:
        return str(error)
    except KeyError:
        return "it cannot be loaded by another process"
    return ""


if __name__ == "__main__":
    for _job_type in sys.argv[1:]:
        print(f"{_job_type}\t{_find_problem(_job_type)}", flush=True)
