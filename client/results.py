"""The result of a completed job: typed as its function declares, or as the API returns it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

from jobledger.client.errors import InvalidResultError
from jobledger.client.models import Job, Results

R = TypeVar("R")


def read_results(job: Job) -> Results:
    """Return the results of a completed job.

    Raises:
        InvalidResultError: There are none.
    """
    if job.results is None:
        raise InvalidResultError(f"Job {job.job_id} is completed without results.", job)
    return job.results


def create_result_reader(result_type: TypeAdapter[R]) -> Callable[[Job], R]:
    """Return the function that returns the output of a job with its type."""

    def read_output(job: Job) -> R:
        try:
            return result_type.validate_json(orjson.dumps(read_results(job).output))
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            message = f"The result of job {job.job_id} ({job.job_type}) does not fit its type: {problem['msg']}."
            raise InvalidResultError(message, job) from error

    return read_output
