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

from jobledger.api.http.sse import EventStream
from jobledger.api.routes import (
    archives,
    batch_actions,
    batches,
    docs,
    files,
    history,
    jobs,
    live,
    log,
    metrics,
    monitoring,
    webhook_echo,
    webhook_endpoints,
    webhooks,
)
from jobledger.api.schemas import requests as models
from jobledger.api.schemas import responses as answers
from jobledger.api.schemas import webhook_responses

Endpoint = Callable[[Request], Awaitable[Response | EventStream]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """A route. `answer` is a model, or a media type where it is not JSON; `optional_body`: none means `{}`.

    `views`: it reads the views, so it can wait for a `Ledger-Position`. `records`: if it is no GET, it causes events
    and answers with their `Ledger-Position`. `statuses`: more answers, without content.
    `errors`: codes of `CODES`. `takes` and `gives`: names of headers in api/openapi/document.py.
    """

    summary: str
    answer: type[BaseModel] | str
    status: int = 200
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    optional_body: bool = False
    views: bool = False
    records: bool = True
    statuses: tuple[int, ...] = ()
    errors: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()

    @property
    def parameters(self) -> type[BaseModel]:
        """The model of the query parameters, also of a route that does not read them itself."""
        return self.query or (models.ViewQuery if self.views else models.NoQuery)


CODES: Final[Mapping[str, tuple[int, str]]] = {
    "address_too_long": (414, "the address is longer than 16,384 characters"),
    "ambiguous_length": (400, "Content-Length together with Transfer-Encoding"),
    "already_exists": (409, "there is one with this id already"),
    "bad_credentials": (401, "credentials that are malformed, unknown, expired, revoked or forged"),
    "batch_not_found": (404, "there is no such batch, or you may not see it"),
    "behind": (503, "this process does not know yet who may see what"),
    "busy": (429, "too much is being written to the same place at once"),
    "deleted": (410, "the job or batch of this webhook was deleted"),
    "delivery_not_found": (404, "there is no such webhook, or you may not see it"),
    "database_unavailable": (503, "the database does not answer"),
    "endpoint_not_found": (404, "there is no such endpoint, or it is not yours"),
    "event_damaged": (409, "an event was changed in the database; `jobledger log verify` names it"),
    "file_damaged": (500, "the file was changed in this server's store"),
    "file_missing": (500, "the file is on record, but not in this server's store"),
    "file_not_found": (404, "there is no such file, or you may not see it"),
    "forbidden": (403, "you may see it, but not do that"),
    "foreign_origin": (403, "another site's page may not change anything"),
    "headers_too_large": (431, "more than 100 headers, or 32 KB of them"),
    "idempotency_key_reused": (422, "the key came with another body before"),
    "incomplete_body": (400, "the connection ended before the body did"),
    "insufficient_storage": (507, "the server's disk is nearly full"),
    "internal_error": (500, "a fault; the log has it under the request's id"),
    "invalid_content": (422, "`details.errors` names each wrong field"),
    "job_not_found": (404, "there is no such job, or you may not see it"),
    "job_type_unusable": (503, "the processor of this job type cannot be used here"),
    "keys_unavailable": (503, "`auth.jwt.jwks_url` does not answer"),
    "link_expired": (403, "the signed link has expired"),
    "link_invalid": (403, "the signed link has been altered, or what it led to is gone"),
    "malformed_idempotency_key": (400, "the Idempotency-Key has no visible characters, or too many"),
    "malformed_json": (400, "the body is not JSON"),
    "malformed_position": (400, "the Ledger-Position is no number"),
    "method_not_allowed": (405, "the address does not know this method"),
    "no_results": (409, "there are no result files"),
    "not_found": (404, "there is nothing at this address"),
    "not_signed_in": (401, "say who you are"),
    "precondition_failed": (412, "the file is not the one that the conditions name"),
    "range_not_satisfiable": (416, "the file has no such range"),
    "repeated_header": (400, "a header that has one value is there several times"),
    "refused": (400, "the request cannot be understood"),
    "server_busy": (503, "the requests in progress use all memory allowed (`api.request_memory_mb`)"),
    "store_unavailable": (503, "this server cannot use its result store now"),
    "still_running": (503, "the job is being cancelled; delete it again in a moment"),
    "stream_not_found": (404, "there is no such stream"),
    "too_large": (413, "the body is larger than `api.max_body_bytes`"),
    "too_many_values": (413, "the body has more than 1,000,000 values, or 250,000 objects and arrays"),
    "too_many_refused_sign_ins": (
        429,
        "more wrong credentials from one address than `api.refused_sign_ins_per_minute` allows",
    ),
    "too_many_requests": (429, "more requests than `api.requests_per_second` allows"),
    "too_many_streams_open": (503, "more live streams in this process than `api.max_streams` allows"),
    "too_many_streams": (429, "more live streams than `api.max_streams_per_user` allows"),
    "unknown_event_type": (422, "there is no such type of event"),
    "unknown_host": (400, "nothing here has the name by which you asked"),
    "unknown_job_type": (422, "no such processor is installed"),
    "unreadable_event": (500, "an event was written by a later version"),
    "unsupported_content_encoding": (415, "the body is compressed"),
    "unsupported_media_type": (415, "the body is not application/json"),
    "validation_timeout": (503, "the validator of a job type takes too long"),
    "version_changed": (412, "it is not at the version that If-Match names"),
    "version_conflict": (409, "somebody else changed it in this moment"),
    "views_stalled": (503, "the views have not got on for half a minute; the message says why"),
    "views_behind": (503, "the views have not reached the Ledger-Position in time"),
    "wrong_state": (409, "not while it is as it is"),
}
"""Every code of a failure, its HTTP status, and what it means."""


def _job_action(summary: str, body: type[BaseModel] = models.ReasonBody) -> Door:
    return Door(summary=summary, answer=answers.JobChanged, body=body, optional_body=True, gives=("ETag",))


def _batch_action(
    summary: str, answer: type[BaseModel] = answers.BatchChanged, body: type[BaseModel] = models.ReasonBody
) -> Door:
    return Door(summary=summary, answer=answer, body=body, optional_body=True)


DOORS: Final[Mapping[Endpoint, Door]] = {
    jobs.submit: Door(
        summary="Submit a job",
        answer=answers.JobAccepted,
        status=202,
        body=models.JobBody,
        errors=("unknown_job_type", "job_type_unusable", "validation_timeout", "insufficient_storage"),
        takes=("Prefer",),
        gives=("Location",),
    ),
    jobs.listing: Door(summary="List jobs", answer=answers.Jobs, query=models.JobList, views=True),
    jobs.single: Door(
        summary="Read a job",
        answer=answers.OneJob,
        query=models.Single,
        views=True,
        statuses=(304,),
        takes=("If-None-Match", "Prefer"),
        gives=("ETag",),
    ),
    jobs.update: Door(
        summary="Change a waiting job, or who may see or change it",
        answer=answers.JobChanged,
        body=models.UpdateBody,
        errors=("validation_timeout",),
        gives=("ETag",),
    ),
    jobs.delete: Door(
        summary="Cancel a job if it is running, then remove it", answer=answers.JobChanged, errors=("still_running",)
    ),
    jobs.cancel: _job_action("Cancel a job"),
    jobs.restart: _job_action("Do an ended job again", models.RestartBody),
    jobs.archive: _job_action("Put a job out of sight of everyday lists"),
    jobs.unarchive: _job_action("Put a job back into everyday lists"),
    history.of_job: Door(summary="All that happened to a job", answer=answers.History, query=models.HistoryQuery),
    history.log_lines: Door(summary="All log lines of a job", answer=answers.LogLines, query=models.HistoryQuery),
    archives.of_job: Door(
        summary="A job's result files as a ZIP",
        answer="application/zip",
        views=True,
        errors=("no_results", "file_missing", "file_damaged", "store_unavailable"),
    ),
    batches.submit: Door(
        summary="Submit jobs that belong together, all or none",
        answer=answers.BatchAccepted,
        status=202,
        body=models.BatchBody,
        errors=("unknown_job_type", "job_type_unusable", "validation_timeout", "insufficient_storage"),
        takes=("Prefer",),
        gives=("Location",),
    ),
    batches.listing: Door(summary="List batches", answer=answers.Batches, query=models.BatchList, views=True),
    batches.single: Door(
        summary="Read a batch",
        answer=answers.OneBatch,
        query=models.Single,
        views=True,
        statuses=(304,),
        takes=("If-None-Match", "Prefer"),
        gives=("ETag",),
    ),
    batch_actions.update: Door(
        summary="Say who may see or change a batch and its jobs",
        answer=answers.BatchChanged,
        body=models.BatchUpdateBody,
    ),
    batch_actions.delete: Door(summary="Remove a batch that has ended, and its jobs", answer=answers.BatchChanged),
    batches.jobs_of: Door(summary="List the jobs of a batch", answer=answers.Jobs, query=models.JobList, views=True),
    batch_actions.pause: _batch_action("Start no more of a batch's jobs", answers.BatchSwitched),
    batch_actions.resume: _batch_action("Start a batch's jobs again", answers.BatchSwitched),
    batch_actions.cancel: _batch_action("Cancel a batch's jobs that have not ended"),
    batch_actions.restart: _batch_action("Do ended jobs of a batch again", body=models.BatchRestartBody),
    batch_actions.archive: _batch_action("Put a batch and its jobs out of sight of everyday lists"),
    batch_actions.unarchive: _batch_action("Put a batch and its jobs back into everyday lists"),
    history.of_batch: Door(summary="A batch's own events", answer=answers.History, query=models.HistoryQuery),
    archives.of_batch: Door(
        summary="The result files of a batch's jobs as a ZIP",
        answer="application/zip",
        views=True,
        errors=("no_results", "file_missing", "file_damaged", "store_unavailable"),
    ),
    files.single: Door(
        summary="A result file",
        answer="*/*",
        query=files.FileQuery,
        views=True,
        statuses=(206, 304),
        errors=(
            "precondition_failed",
            "range_not_satisfiable",
            "link_expired",
            "link_invalid",
            "file_missing",
            "store_unavailable",
            "file_damaged",
        ),
        takes=("If-Match", "If-None-Match", "Range"),
        gives=("ETag",),
    ),
    files.link: Door(
        summary="A link that opens a result file without sign-in",
        answer=answers.SignedLink,
        body=files.LinkBody,
        optional_body=True,
        records=False,
    ),
    log.page: Door(
        summary="A page of the log",
        answer=answers.Events,
        query=models.EventsQuery,
        errors=("unknown_event_type", "job_not_found", "batch_not_found", "stream_not_found", "behind"),
    ),
    live.stream: Door(
        summary="The log, live, as Server-Sent Events: `id:` is the position, `event:` the type, `data:` an event",
        answer="text/event-stream",
        query=models.StreamQuery,
        errors=(
            "unknown_event_type",
            "job_not_found",
            "batch_not_found",
            "behind",
            "too_many_streams",
            "too_many_streams_open",
        ),
        takes=("Last-Event-ID",),
    ),
    log.head: Door(summary="How far the log goes, and the views", answer=answers.LogHead),
    monitoring.stats: Door(
        summary="Counters of jobs, batches and tracks; workers; how far the views are behind",
        answer=answers.Statistics,
        views=True,
        errors=("forbidden",),
    ),
    webhooks.listing: Door(
        summary="List webhooks, sent or to be sent, with every attempt",
        answer=webhook_responses.Deliveries,
        query=models.DeliveryList,
        views=True,
        errors=("job_not_found",),
    ),
    webhooks.single: Door(summary="Read a webhook", answer=webhook_responses.OneDelivery, views=True),
    webhooks.redeliver: Door(
        summary="Send a webhook again",
        answer=webhook_responses.OneDelivery,
        status=202,
        body=models.ReasonBody,
        optional_body=True,
        errors=("forbidden", "deleted"),
    ),
    webhooks.redeliver_many: Door(
        summary="Send webhooks again: those that were given up, or what the body names",
        answer=webhook_responses.Redelivered,
        status=202,
        body=models.RedeliverBody,
        views=True,
        errors=("job_not_found", "forbidden"),
    ),
    webhook_endpoints.listing: Door(
        summary="List the endpoints that webhooks go to",
        answer=webhook_responses.Endpoints,
        query=webhook_endpoints.EndpointList,
    ),
    webhook_endpoints.rotate: Door(
        summary="Give an endpoint a new signing secret, shown this once",
        answer=webhook_responses.Rotated,
        body=webhook_endpoints.RotateBody,
        optional_body=True,
        records=False,
    ),
    webhook_endpoints.revoke: Door(
        summary="Revoke the signing secrets of an endpoint",
        answer=answers.Success,
        records=False,
    ),
    webhook_echo.receive: Door(
        summary="A receiver of webhooks for trying them out, if `webhooks.sink` is on",
        answer=webhook_responses.OneReceived,
        query=models.AnyQuery,
        records=False,
        errors=("not_found", "too_large", "incomplete_body", "unsupported_content_encoding", "server_busy"),
    ),
    webhook_echo.listing: Door(
        summary="What that receiver was sent",
        answer=webhook_responses.AllReceived,
        query=webhook_echo.SinkQuery,
        errors=("not_found",),
    ),
    docs.index: Door(summary="Where things are", answer=answers.Index),
    docs.document: Door(
        summary="This document", answer="application/json", statuses=(304,), takes=("If-None-Match",), gives=("ETag",)
    ),
    docs.page: Door(
        summary="This document, to read", answer="text/html", statuses=(304,), takes=("If-None-Match",), gives=("ETag",)
    ),
    metrics.scrape: Door(
        summary="The numbers for Prometheus",
        answer="text/plain",
        errors=("forbidden",),
    ),
    monitoring.alive: Door(summary="Whether it is alive", answer=answers.Success),
    monitoring.ready: Door(summary="Whether it can serve", answer=answers.Ready),
}
