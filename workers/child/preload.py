"""workers: loaded once by the server process that children are forked from, so that each child finds it all loaded."""

import sys

from jobledger.workers.registry import ProcessorUnusable, check_preload, load_processors

for _job_type in load_processors():
    try:
        check_preload(_job_type)
    except ProcessorUnusable as _error:  # its own jobs say so when they run, and those of others are not concerned
        print(f"jobledger: job type {_job_type}: {_error}", file=sys.stderr)
