"""The views that the projector maintains, with their version and indexes."""

from __future__ import annotations

from typing import Final

from jobledger.projections.slots import Views
from jobledger.projections.views import (
    batches,
    deliveries,
    endpoints,
    files,
    jobs,
    projection_errors,
    queue,
    statistics,
    step_files,
    steps,
)

PROJECTION_VERSION: Final = 13
"""The version of all folds together. Increase it with each change of what a fold returns.

The projector rebuilds views of an older version.
"""
ALL_VIEWS: Final = (
    jobs,
    batches,
    queue,
    files,
    statistics,
    steps,
    step_files,
    deliveries,
    endpoints,
    projection_errors,
)
VIEW_NAMES: Final = tuple(view.NAME for view in ALL_VIEWS)
FOLDED_VIEWS: Final = (jobs.NAME, batches.NAME, statistics.NAME, deliveries.NAME, endpoints.NAME)
"""The views whose documents are folded from events. The rows of all other views are derived from these documents."""


async def create_indexes(views: Views) -> None:
    """Create the indexes of all views that do not exist yet."""
    for view in ALL_VIEWS:
        if view.INDEXES:
            await views[view.NAME].create_indexes(list(view.INDEXES))
