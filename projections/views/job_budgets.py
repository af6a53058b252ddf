"""Fit the fields of a job's document into their budgets (ledger/domain/limits.py).

Each field has its own budget. Therefore, a document fits whatever its other fields contain, and no document is measured
as a whole.
"""

from __future__ import annotations

from typing import Final

from jobledger.ledger.domain import limits
from jobledger.ledger.mongo.connection import Document
from jobledger.projections.views import step_files
from jobledger.projections.views.documents import set_name_in_list

LARGE_BYTES: Final = 64 * 1024
"""A field with more bytes of JSON is named in `large_fields`. The projector does not cache such a document."""
BUDGETS: Final = {"parameters": limits.MAX_PARAMETERS_BYTES, "results": limits.MAX_RESULTS_BYTES}
_URL_FIELDS: Final = ("markdown_file", "markdown_url")
BUDGETED_FIELDS: Final = frozenset({"parameters", "results", "logs", "steps"})


def apply_budgets(job: Document, changes: Document) -> None:
    """Cut the changed fields that exceed their budgets, and name these fields in `truncated`."""
    for name, budget in BUDGETS.items():
        if name in changes:
            size = limits.compute_json_size(job[name])
            if size <= LARGE_BYTES and "large_fields" not in job and "truncated" not in job:
                continue  # the usual case: nothing to cut, no list to change
            exceeds = not limits.fits_in_document(job[name], budget, text_bytes=size)
            set_name_in_list(job, "large_fields", name, is_listed=size > LARGE_BYTES)
            if exceeds:
                if name == "results":  # the job still needs these files, so they stay in the store
                    job |= step_files.add_digests(job, (file["sha256"] for file in job[name]["files"]))
                job[name] = {} if name == "parameters" else _reduce_results(job[name])
            set_name_in_list(job, "truncated", name, is_listed=exceeds)
    if "logs" in changes:
        job["logs"] = _keep_newest(changes["logs"], limits.MAX_VIEW_LOGS_BYTES)
    if "steps" in changes:
        steps = changes["steps"]
        job["steps"] = _keep_newest(steps, limits.MAX_VIEW_STEPS_BYTES)
        # Steps that were cut earlier are missing as long as the others remain.
        was_truncated = bool(steps) and "steps" in job.get("truncated", ())
        set_name_in_list(job, "truncated", "steps", is_listed=len(job["steps"]) < len(steps) or was_truncated)


def _keep_newest(items: list[Document], max_bytes: int) -> list[Document]:
    kept = limits.count_newest_within(items, max_bytes)
    return items if kept == len(items) else items[len(items) - kept :]


def _reduce_results(results: Document) -> Document:
    """Return results without their output, files, assets and warnings."""
    given = results["metadata"]
    metadata = {name: given[name] for name in ("processed_at", "duration", "tokens_used")} | {"warnings": []}
    urls = {name: results[name] and limits.truncate_text(results[name], 1000) for name in _URL_FIELDS}
    return {**results, **urls, "output": None, "assets": [], "files": [], "metadata": metadata}
