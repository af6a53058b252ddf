"""Import the modules in `preload` of processors, when this module is imported.

The fork server imports it once, because a fork server can only import modules before it forks.
`python -m jobledger.workers.child.preload JOB_TYPE…` writes a line for each job type instead: its name, a tab, and the
problem if there is one.
"""

import sys
from collections.abc import Iterable, Iterator

from jobledger.workers.registry import ProcessorUnusable, check_preload, load_processors


def _preload(job_types: Iterable[str]) -> Iterator[tuple[str, str]]:
    for job_type in job_types:
        try:
            check_preload(job_type)
            yield job_type, ""
        except ProcessorUnusable as error:  # its jobs report the error when they run; others are not affected
            yield job_type, str(error)
        except KeyError:
            yield job_type, "it cannot be loaded by another process"


if __name__ == "__main__":
    for _job_type, _problem in _preload(sys.argv[1:]):
        print(f"{_job_type}\t{_problem}", flush=True)
else:
    for _job_type, _problem in _preload(load_processors()):
        if _problem:
            print(f"jobledger: job type {_job_type}: {_problem}", file=sys.stderr)
