"""The views that the projector maintains, with their version and indexes."""

from __future__ import annotations

from typing import Final

from jobledger.projections.slots import Views
from jobledger.projections.views import (
    batches,
    deliveries,
    endpoints,
    files,
    job_list,
    jobs,
    projection_errors,
    queue,
    statistics,
    step_files,
    steps,
)

PROJECTION_VERSION: Final = 19
"""The version of all folds together. Increase it with each change of what a fold returns.

The projector rebuilds views of an older version.
"""
_DOCUMENT_VIEWS: Final = (jobs, batches, statistics, deliveries, endpoints)
_ROW_VIEWS: Final = (job_list, queue, files, steps, step_files)
ALL_VIEWS: Final = (*_DOCUMENT_VIEWS, *_ROW_VIEWS, projection_errors)
VIEW_NAMES: Final = tuple(view.NAME for view in ALL_VIEWS)
DOCUMENT_VIEWS: Final = tuple(view.NAME for view in _DOCUMENT_VIEWS)
"""The views whose documents are loaded, changed and written back."""
ROW_VIEWS: Final = tuple(view.NAME for view in _ROW_VIEWS)
"""The views whose rows are derived from the documents of jobs."""


async def create_indexes(views: Views) -> None:
    """Create the indexes of all views that do not exist yet."""
    for view in ALL_VIEWS:
        if view.INDEXES:
            await views[view.NAME].create_indexes(list(view.INDEXES))
