"""Import the modules that processors preload, and report each job type on a line.

Usage: `python -m jobledger.workers.child.preload_check JOB_TYPE…`
"""

import sys

from jobledger.workers.registry import ProcessorUnusable, check_preload

if __name__ == "__main__":
    for _job_type in sys.argv[1:]:
        try:
            check_preload(_job_type)
            print(f"{_job_type}\t", flush=True)
        except ProcessorUnusable as _error:
            print(f"{_job_type}\t{_error}", flush=True)
        except KeyError:
            print(f"{_job_type}\tit cannot be loaded by another process", flush=True)
