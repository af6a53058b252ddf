"""Response models that several topics share.

Routes send the documents of the views without passing them through the response models, because that would cost more
than the rest of the response. tests/api/test_response_models.py checks that documents and models agree.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class FieldError(BaseModel):
    """An invalid field. `path` is its location, such as `jobs[3].parameters.url`."""

    path: str
    message: str


class ErrorResponse(BaseModel):
    """An error. `code` is for programs, `message` for people; `details.errors` lists invalid fields."""

    status: Literal["error"]
    code: str
    message: str
    details: dict[str, Any]


class SuccessResponse(BaseModel):
    """The request succeeded."""

    status: Literal["success"]


class ListResponse(SuccessResponse):
    """A page of a list."""

    total: int
    total_is_lower_bound: bool = Field(default=False, description="`total` is a lower bound.")
    next_cursor: str | None = Field(None, description="The cursor of the next page. Absent on the last page.")


class ProjectionError(BaseModel):
    """Why a document differs from the log: the event that could not be applied, or the content not stored."""

    position: int | None
    version: int | None
    type: str | None
    message: str


class PartialDocument(BaseModel):
    """Fields that are present only if a document is incomplete."""

    truncated: list[str] = Field([], description="Fields that are stored in part, because they are too large.")
    omitted: list[str] = Field(
        [], description="Large fields that lists leave out. They are empty here; read the single resource."
    )
    projection_error: ProjectionError | None = Field(
        None, description="Why this document differs from the log. The history is complete."
    )


class IndexResponse(SuccessResponse):
    """The URLs of the service."""

    service: Literal["jobledger"]
    jobs: str
    batches: str
    statistics: str
    log: str
    openapi: str
    docs: str
    dashboard: str
