"""Import the modules in `preload` of all processors. The fork server imports this module once."""

import sys

from jobledger.workers.registry import ProcessorUnusable, check_preload, load_processors

for _job_type in load_processors():
    try:
        check_preload(_job_type)
    except ProcessorUnusable as _error:  # its jobs report the error when they run; others are not affected
        print(f"jobledger: job type {_job_type}: {_error}", file=sys.stderr)
