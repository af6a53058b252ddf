"""api: what each route takes and answers, for the OpenAPI document. tests/api/test_openapi.py names routes without it.

A new route needs one entry in `DOORS`. What goes without saying is added by api/openapi/document.py: refusals of
bodies, of
query parameters, of who is not signed in; 404 for `{job_id}`, `{batch_id}` and `{path}` in the address;
`Idempotency-Key` for POST; what every change may meet. Only what is special has to be named.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.http.sse import EventStreamResponse
from jobledger.api.routes import (
    archives,
    batch_actions,
    batches,
    docs,
    files,
    history,
    jobs,
    log,
    log_stream,
    metrics,
    monitoring,
    webhook_echo,
    webhook_endpoints,
    webhooks,
)
from jobledger.api.schemas import requests as models
from jobledger.api.schemas import responses as answers
from jobledger.api.schemas import webhook_responses

RouteHandler = Callable[[Request], Awaitable[Response | EventStreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A route. `answer` is a model, or a media type where it is not JSON; `optional_body`: none means `{}`.

    `views`: it reads the views, so it can wait for a `Ledger-Position`. `records`: if it is no GET, it causes events
    and answers with their `Ledger-Position`. `statuses`: more answers, without content.
    `errors`: codes of `ERROR_CODES`. `takes` and `gives`: names of headers in api/openapi/document.py.
    """

    summary: str
    response: type[BaseModel] | str
    status: int = 200
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    is_body_optional: bool = False
    reads_views: bool = False
    appends_events: bool = True
    extra_statuses: tuple[int, ...] = ()
    error_codes: tuple[str, ...] = ()
    request_headers: tuple[str, ...] = ()
    response_headers: tuple[str, ...] = ()

    @property
    def query_model(self) -> type[BaseModel]:
        """The model of the query parameters, also of a route that does not read them itself."""
        return self.query or (models.MinPositionQuery if self.reads_views else models.NoQuery)


def _job_action(summary: str, body: type[BaseModel] = models.ReasonBody) -> Operation:
    return Operation(
        summary=summary,
        response=answers.JobActionResponse,
        body=body,
        is_body_optional=True,
        response_headers=("ETag",),
    )


def _batch_action(
    summary: str, answer: type[BaseModel] = answers.BulkActionResponse, body: type[BaseModel] = models.ReasonBody
) -> Operation:
    return Operation(summary=summary, response=answer, body=body, is_body_optional=True)


OPERATIONS: Final[Mapping[RouteHandler, Operation]] = {
    jobs.submit_job: Operation(
        summary="Submit a job",
        response=answers.JobAcceptedResponse,
        status=202,
        body=models.JobBody,
        error_codes=("unknown_job_type", "job_type_unavailable", "validation_timeout", "insufficient_storage"),
        request_headers=("Prefer",),
        response_headers=("Location",),
    ),
    jobs.list_jobs: Operation(
        summary="List jobs", response=answers.JobListResponse, query=models.JobListQuery, reads_views=True
    ),
    jobs.get_job: Operation(
        summary="Read a job",
        response=answers.JobResponse,
        query=models.AsOfQuery,
        reads_views=True,
        extra_statuses=(304,),
        error_codes=("precondition_failed",),
        request_headers=("If-Match", "If-None-Match", "Prefer"),
        response_headers=("ETag",),
    ),
    jobs.update_job: Operation(
        summary="Change a waiting job, or who may see or change it",
        response=answers.JobActionResponse,
        body=models.JobUpdateBody,
        error_codes=("validation_timeout",),
        response_headers=("ETag",),
    ),
    jobs.delete_job: Operation(
        summary="Cancel a job if it is running, then remove it",
        response=answers.JobActionResponse,
        error_codes=("still_running",),
    ),
    jobs.cancel_job: _job_action("Cancel a job"),
    jobs.restart_job: _job_action("Do an ended job again", models.JobRestartBody),
    jobs.archive_job: _job_action("Put a job out of sight of everyday lists"),
    jobs.unarchive_job: _job_action("Put a job back into everyday lists"),
    history.get_job_history: Operation(
        summary="All that happened to a job", response=answers.HistoryResponse, query=models.HistoryQuery
    ),
    history.get_job_logs: Operation(
        summary="All log lines of a job", response=answers.LogLinesResponse, query=models.HistoryQuery
    ),
    archives.download_job_archive: Operation(
        summary="A job's result files as a ZIP",
        response="application/zip",
        reads_views=True,
        error_codes=("no_results", "file_missing", "file_damaged", "file_store_unavailable"),
    ),
    batches.submit_batch: Operation(
        summary="Submit jobs that belong together, all or none",
        response=answers.BatchAcceptedResponse,
        status=202,
        body=models.BatchBody,
        error_codes=("unknown_job_type", "job_type_unavailable", "validation_timeout", "insufficient_storage"),
        request_headers=("Prefer",),
        response_headers=("Location",),
    ),
    batches.list_batches: Operation(
        summary="List batches", response=answers.BatchListResponse, query=models.BatchListQuery, reads_views=True
    ),
    batches.get_batch: Operation(
        summary="Read a batch",
        response=answers.BatchResponse,
        query=models.AsOfQuery,
        reads_views=True,
        extra_statuses=(304,),
        error_codes=("precondition_failed",),
        request_headers=("If-Match", "If-None-Match", "Prefer"),
        response_headers=("ETag",),
    ),
    batch_actions.update_batch: Operation(
        summary="Say who may see or change a batch and its jobs",
        response=answers.BulkActionResponse,
        body=models.BatchUpdateBody,
    ),
    batch_actions.delete_batch: Operation(
        summary="Remove a batch that has ended, and its jobs", response=answers.BulkActionResponse
    ),
    batches.list_batch_jobs: Operation(
        summary="List the jobs of a batch",
        response=answers.JobListResponse,
        query=models.JobListQuery,
        reads_views=True,
    ),
    batch_actions.pause_batch: _batch_action("Start no more of a batch's jobs", answers.BatchActionResponse),
    batch_actions.resume_batch: _batch_action("Start a batch's jobs again", answers.BatchActionResponse),
    batch_actions.cancel_batch: _batch_action("Cancel a batch's jobs that have not ended"),
    batch_actions.restart_batch: _batch_action("Do ended jobs of a batch again", body=models.BatchRestartBody),
    batch_actions.archive_batch: _batch_action("Put a batch and its jobs out of sight of everyday lists"),
    batch_actions.unarchive_batch: _batch_action("Put a batch and its jobs back into everyday lists"),
    history.get_batch_history: Operation(
        summary="A batch's own events", response=answers.HistoryResponse, query=models.HistoryQuery
    ),
    archives.download_batch_archive: Operation(
        summary="The result files of a batch's jobs as a ZIP",
        response="application/zip",
        reads_views=True,
        error_codes=("no_results", "file_missing", "file_damaged", "file_store_unavailable"),
    ),
    files.get_file: Operation(
        summary="A result file",
        response="*/*",
        query=files.FileQuery,
        reads_views=True,
        extra_statuses=(206, 304),
        error_codes=(
            "precondition_failed",
            "range_not_satisfiable",
            "link_expired",
            "link_invalid",
            "file_missing",
            "file_store_unavailable",
            "file_damaged",
        ),
        request_headers=("If-Match", "If-None-Match", "Range"),
        response_headers=("ETag",),
    ),
    files.create_signed_link: Operation(
        summary="A link that opens a result file without sign-in",
        response=answers.SignedLinkResponse,
        body=files.LinkBody,
        is_body_optional=True,
        appends_events=False,
    ),
    log.list_events: Operation(
        summary="A page of the log",
        response=answers.EventListResponse,
        query=models.EventListQuery,
        error_codes=(
            "unknown_event_type",
            "job_not_found",
            "batch_not_found",
            "stream_not_found",
            "visibility_not_ready",
        ),
    ),
    log_stream.stream_events: Operation(
        summary="The log, live, as Server-Sent Events: `id:` is the position, `event:` the type, `data:` an event",
        response="text/event-stream",
        query=models.StreamQuery,
        error_codes=(
            "unknown_event_type",
            "job_not_found",
            "batch_not_found",
            "visibility_not_ready",
            "too_many_streams",
            "stream_capacity_exceeded",
        ),
        request_headers=("Last-Event-ID",),
    ),
    log.get_log_head: Operation(summary="How far the log goes, and the views", response=answers.LogHeadResponse),
    monitoring.get_statistics: Operation(
        summary="Counters of jobs, batches and tracks; workers; how far the views are behind",
        response=answers.StatisticsResponse,
        reads_views=True,
        error_codes=("forbidden",),
    ),
    webhooks.list_deliveries: Operation(
        summary="List webhooks, sent or to be sent, with every attempt",
        response=webhook_responses.DeliveryListResponse,
        query=models.DeliveryListQuery,
        reads_views=True,
        error_codes=("job_not_found",),
    ),
    webhooks.get_delivery: Operation(
        summary="Read a webhook", response=webhook_responses.DeliveryResponse, reads_views=True
    ),
    webhooks.redeliver_webhook: Operation(
        summary="Send a webhook again",
        response=webhook_responses.DeliveryResponse,
        status=202,
        body=models.ReasonBody,
        is_body_optional=True,
        error_codes=("forbidden", "source_deleted"),
    ),
    webhooks.redeliver_webhooks: Operation(
        summary="Send webhooks again: those that were given up, or what the body names",
        response=webhook_responses.RedeliveryResponse,
        status=202,
        body=models.RedeliverBody,
        reads_views=True,
        error_codes=("job_not_found", "forbidden"),
    ),
    webhook_endpoints.list_webhook_endpoints: Operation(
        summary="List the endpoints that webhooks go to",
        response=webhook_responses.EndpointListResponse,
        query=webhook_endpoints.EndpointListQuery,
    ),
    webhook_endpoints.rotate_endpoint_secret: Operation(
        summary="Give an endpoint a new signing secret, shown this once",
        response=webhook_responses.RotatedSecretResponse,
        body=webhook_endpoints.RotateSecretBody,
        is_body_optional=True,
        appends_events=False,
    ),
    webhook_endpoints.revoke_endpoint_secret: Operation(
        summary="Revoke the signing secrets of an endpoint",
        response=answers.SuccessResponse,
        appends_events=False,
    ),
    webhook_echo.receive_webhook_echo: Operation(
        summary="A receiver of webhooks for trying them out, if `webhooks.echo_enabled` is on",
        response=webhook_responses.WebhookEchoResponse,
        query=models.AnyQuery,
        appends_events=False,
        error_codes=(
            "not_found",
            "content_too_large",
            "incomplete_body",
            "unsupported_content_encoding",
            "server_busy",
        ),
    ),
    webhook_echo.list_webhook_echoes: Operation(
        summary="What that receiver was sent",
        response=webhook_responses.WebhookEchoListResponse,
        query=webhook_echo.WebhookEchoQuery,
        error_codes=("not_found",),
    ),
    docs.get_index: Operation(summary="Where things are", response=answers.IndexResponse),
    docs.get_openapi_document: Operation(
        summary="This document",
        response="application/json",
        extra_statuses=(304,),
        error_codes=("precondition_failed",),
        request_headers=("If-Match", "If-None-Match"),
        response_headers=("ETag",),
    ),
    docs.get_docs_page: Operation(
        summary="This document, to read",
        response="text/html",
        extra_statuses=(304,),
        error_codes=("precondition_failed",),
        request_headers=("If-Match", "If-None-Match"),
        response_headers=("ETag",),
    ),
    metrics.get_metrics: Operation(
        summary="The numbers for Prometheus",
        response="text/plain",
        error_codes=("forbidden",),
    ),
    monitoring.check_liveness: Operation(summary="Whether it is alive", response=answers.SuccessResponse),
    monitoring.check_readiness: Operation(summary="Whether it can serve", response=answers.ReadinessResponse),
}
