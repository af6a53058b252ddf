"""The filters of jobs that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from jobledger.cli.commands.options import parse_time_option
from jobledger.cli.commands.resources import build_list_query
from jobledger.cli.output.documents import Document
from jobledger.ledger.domain.statuses import JobStatus

_FILTERS = "Filters"


def build_job_filters(
    status: Annotated[JobStatus | None, typer.Option(help="Jobs with this status", rich_help_panel=_FILTERS)] = None,
    error: Annotated[
        str | None, typer.Option(help="Jobs with this error code, e.g. TIMEOUT", rich_help_panel=_FILTERS)
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Jobs of this batch", rich_help_panel=_FILTERS)] = None,
    job_type: Annotated[
        str | None, typer.Option("--type", help="Jobs of this job type", rich_help_panel=_FILTERS)
    ] = None,
    user: Annotated[str | None, typer.Option(help="Jobs of this user", rich_help_panel=_FILTERS)] = None,
    track: Annotated[str | None, typer.Option(help="Jobs of this track", rich_help_panel=_FILTERS)] = None,
    event: Annotated[str | None, typer.Option(help="Jobs of this conference", rich_help_panel=_FILTERS)] = None,
    day: Annotated[str | None, typer.Option(help="Jobs of this day", rich_help_panel=_FILTERS)] = None,
    language: Annotated[
        str | None, typer.Option(help="Jobs with this target language, e.g. en", rich_help_panel=_FILTERS)
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--created-after",
            "--since",
            metavar="TIME",
            help="Jobs submitted after this time, or since e.g. 30m, 2d or 2026-02-01T09:30Z",
            rich_help_panel=_FILTERS,
        ),
    ] = None,
    created_before: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Jobs submitted before this time", rich_help_panel=_FILTERS),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(
            help="Jobs with all these words in name, ID, session, event, track, file name or speakers",
            rich_help_panel=_FILTERS,
        ),
    ] = None,
    archived: Annotated[
        bool | None,
        typer.Option("--archived/--not-archived", help="Only archived, or only other jobs", rich_help_panel=_FILTERS),
    ] = None,
) -> Document:
    """Return the query parameters of the API for these filters."""
    filters = {
        "status": status,
        "error_code": error,
        "batch_id": batch,
        "job_type": job_type,
        "track": track,
        "event": event,
        "day": day,
        "language": language,
        "created_after": parse_time_option(since, "--created-after"),
        "created_before": parse_time_option(created_before, "--created-before"),
    }
    return {
        **{name: value for name, value in filters.items() if value is not None},
        **build_list_query(user, search, archived),
    }
