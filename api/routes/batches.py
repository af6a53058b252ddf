"""api: batches. Submit many jobs at once, all or none, and see how they are getting on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing, suppress
from datetime import datetime
from operator import attrgetter
from typing import Any, Final

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.disclosure import BATCH, shown
from jobledger.api.auth.permissions import actor, for_user, may_see, teams_of, viewer_of, while_signed_in, who_asks
from jobledger.api.context import query_of, refuse_without_space, services, views_reach_wanted_position, views_show
from jobledger.api.http.bodies import MOST_VALUES, counted, note_size, off_loop, read_body
from jobledger.api.http.conditional import unless_known
from jobledger.api.http.errors import ApiError, json_response, path
from jobledger.api.http.preconditions import Once, happened_by, noted, preferred_wait, prefers_wait, readable_past
from jobledger.api.http.validation import validated
from jobledger.api.routes import bulk_commands
from jobledger.api.routes.jobs import going_on, listed
from jobledger.api.schemas.requests import BatchBody, BatchList, JobBody, JobList, Page, Single
from jobledger.api.submission.build import (
    Secrets,
    check_parameters,
    endpoints_of,
    keep,
    refuse_userinfo,
    split_webhook,
    submission,
    webhook_secrets,
)
from jobledger.api.submission.parameters import Check
from jobledger.ledger.domain import limits
from jobledger.ledger.domain.batch import Batch
from jobledger.ledger.domain.commands import SubmitBatch, SubmitJob
from jobledger.ledger.domain.errors import InvalidEvent, VersionConflict
from jobledger.ledger.domain.events import (
    AccessControl,
    BatchSubmitted,
    JobLogged,
    JobProgressed,
    JobSubmitted,
    Meta,
    Recorded,
    StepCompleted,
)
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import Command, handle_new, load, new_batch_id, new_job_id
from jobledger.ledger.store.endpoint_secrets import ShownSecret, take_unshown
from jobledger.ledger.store.event_store import EventLog, payload_with
from jobledger.ledger.store.hash_chain import canonical
from jobledger.projections.engine.writer import FOLDED, Chunk
from jobledger.projections.views import batches as view
from jobledger.projections.views import list_index, statistics

_ALONG_THE_WAY: Final = frozenset(kind.__name__ for kind in (JobProgressed, JobLogged, StepCompleted))
"""What a running job says concerns no batch."""
_COSTS: Final = {
    "metadata": {name: f"$data.results.metadata.{name}" for name in ("processed_at", "duration", "tokens_used")}
}
_OF_BATCH: Final = payload_with(
    {
        "parameters": {},
        "access_control": {},
        "teams": [],
        "webhook": None,
        "results": {"$cond": [{"$eq": [{"$type": "$data.results"}, "object"]}, _COSTS, "$data.results"]},
        "error": {
            "$cond": [
                {"$eq": [{"$type": "$data.error"}, "object"]},
                {"code": "$data.error.code", "message": ""},
                "$data.error",
            ]
        },
    }
)
"""Payloads of jobs' events with what their batch shows of them."""
_FOLDED_A_TURN: Final = 100


async def submit(request: Request) -> Response:
    """POST /api/events/batches"""
    known = services(request)
    submitted, position, shown_secrets = await _submit(request)
    batch_id = submitted.stream
    if prefers_wait(request):
        del submitted  # it may be large, and the wait is long
        await _wait_for_end(request, batch_id)
        batch = await view.get(known.views, known.log, batch_id)
        batch = batch or _as_submitted((await known.log.read_stream(batch_id, limit=1))[0])  # deleted meanwhile
    else:
        batch = _as_submitted(submitted)
    return json_response(
        {
            "status": "success",
            "batch_id": batch_id,
            "job_ids": batch["job_ids"],
            "batch": shown(batch, BATCH, viewer_of(request, batch)),
            **webhook_secrets(shown_secrets),
        },
        202,
        {
            "Location": f"{known.links.prefix}/api/events/batches/{batch_id}",
            "Ledger-Position": str(max(position, batch["position"])),
        },
    )


async def _submit(request: Request) -> tuple[Recorded, int, Sequence[ShownSecret]]:
    """Submit the batch of the body; return its first event, its last position, and secrets that were created for it."""
    known = services(request)
    body, content = await read_body(request, BatchBody)
    once = await off_loop(request, Once.of, request, content)
    batch_id = f"batch-{once.name()}" if once else new_batch_id()
    if (before := await _submitted_before(request, batch_id, once)) is not None:
        return before
    refuse_without_space(services(request))
    webhook, secrets = split_webhook(body.webhook, known)
    user_id = for_user(request, body.user_id)
    teams = teams_of(request, user_id, known.groups_of)
    jobs, kept = await jobs_in(request, body, batch_id, user_id)
    job_ids = [f"job-{once.name(number)}" if once else new_job_id() for number in range(1, len(jobs) + 1)]
    batch = BatchSubmitted(
        batch_name=body.batch_name,
        total_jobs=len(jobs),
        job_ids=job_ids,
        parameters=body.parameters,
        webhook=webhook,
        user_id=user_id,
        access_control=AccessControl(**body.access_control.model_dump()),
        teams=sorted(teams),
    )
    endpoints = endpoints_of(batch, *jobs)
    await keep(known, secrets, *kept, endpoints=endpoints)
    commands: list[tuple[str, Command]] = [(batch_id, SubmitBatch(batch))]
    commands += [(job_id, SubmitJob(job)) for job_id, job in zip(job_ids, jobs, strict=True)]
    try:
        recorded = await handle_new(known.log, commands, meta=Meta(actor(request), batch_id, request=noted(once)))
    except VersionConflict:  # a request with the same key was quicker
        if (before := await _submitted_before(request, batch_id, once)) is None:
            raise
        return before
    except InvalidEvent:
        await off_loop(request, _refuse_what_cannot_be_stored, jobs)
        raise
    return recorded[0], recorded[-1].position, await take_unshown(known.db, endpoints)


async def jobs_in(
    request: Request, body: BatchBody, batch_id: str, user_id: str
) -> tuple[list[JobSubmitted], list[Secrets | None]]:
    """Return the events for a batch's jobs, and the secrets of their webhooks.

    Raises:
        ApiError: 422, naming each wrong field of the first job that has any; 413, when its defaults or lists of names
            are too large.
    """
    _refuse_defaults_multiplied(request, body)
    jobs, kept = await off_loop(request, _jobs_in, request, body, batch_id, user_id)
    await off_loop(request, _refuse_large_list_index, jobs)
    types = services(request).job_types
    checks = [
        Check(job.job_type, types[job.job_type], job.parameters, ("jobs", index, "parameters"))
        for index, job in enumerate(jobs)
    ]
    await check_parameters(request, checks)
    # Also defaults that each job replaces: the batch itself is stored and shown with them.
    await off_loop(request, refuse_userinfo, body.parameters, ("parameters",))
    return jobs, kept


def _jobs_in(
    request: Request, body: BatchBody, batch_id: str, user_id: str
) -> tuple[list[JobSubmitted], list[Secrets | None]]:
    known = services(request)
    teams = teams_of(request, user_id, known.groups_of)
    kept, jobs = [], []
    for index, content in enumerate(body.jobs):
        job_body = validated(JobBody, content, within=("jobs", index))
        webhook, secrets = split_webhook(job_body.webhook, known, ("jobs", index))
        kept.append(secrets)
        owner = user_id if job_body.user_id is None else for_user(request, job_body.user_id)
        given: dict[str, Any] = {"parameters": {**body.parameters, **job_body.parameters}}
        if "access_control" not in job_body.model_fields_set:
            given["access_control"] = body.access_control
        jobs.append(
            submission(
                job_body.model_copy(update=given),
                known,
                user_id=owner,
                teams=teams if owner == user_id else teams_of(request, owner, known.groups_of),
                within=("jobs", index),
                batch_id=batch_id,
                webhook=webhook,
            )
        )
    return jobs, kept


async def _submitted_before(
    request: Request, batch_id: str, once: Once | None
) -> tuple[Recorded, int, Sequence[ShownSecret]] | None:
    """Return what `_submit` returned for the same request made before, if it was.

    Raises:
        ApiError: 422, when that one asked for something else.
    """
    events = await services(request).log.read_stream(batch_id, limit=1) if once else []
    if once is None or (submitted := once.found_in(events)) is None:
        return None
    assert isinstance(submitted.event, BatchSubmitted)  # noqa: S101 - narrows the type; every batch begins with it
    # Its jobs were written with it, in the positions behind it.
    return submitted, submitted.position + submitted.event.total_jobs, ()


def _as_submitted(event: Recorded) -> Document:
    batch = view.as_submitted(view.fold(None, event))
    assert batch is not None  # noqa: S101 - narrows the type; a submission makes a document
    return batch


def _refuse_defaults_multiplied(request: Request, body: BatchBody) -> None:
    """Refuse defaults that make gigabytes of events, because every job carries them.

    Raises:
        ApiError: 413.
    """
    inheriting = sum(1 for job in body.jobs if not (isinstance(job, dict) and "access_control" in job))
    refuse_multiplied(request, "parameters", body.parameters, len(body.jobs))
    refuse_multiplied(request, "access_control", body.access_control, inheriting)


def _refuse_large_list_index(jobs: Sequence[JobSubmitted]) -> None:
    """Refuse names that make gigabytes of list index, because each of them adds rows for each job.

    Raises:
        ApiError: 413.
    """
    size = 0
    for job in jobs:
        size += list_index_bytes(job.user_id, job.access_control, job.teams)
        if size > limits.BATCH_LIST_INDEX_BYTES:  # not all of them need to be counted
            refuse_list_index(size)


def list_index_bytes(user_id: str, access: AccessControl, teams: Sequence[str]) -> int:
    """Return the most that the list index of a job may take."""
    return list_index.most_bytes({"user_id": user_id, "access_control": access.model_dump(), "teams": teams})


def refuse_list_index(size: int) -> None:
    """Make sure that the list index of a batch's jobs together is not too large.

    Raises:
        ApiError: 413.
    """
    if size > limits.BATCH_LIST_INDEX_BYTES:
        message = (
            f"`access_control` and teams of the batch's jobs: the list index takes {size} bytes or more, and at most "
            f"{limits.BATCH_LIST_INDEX_BYTES} are allowed. Use fewer names, groups, or smaller batches."
        )
        raise ApiError(413, "too_large", message)


def refuse_multiplied(request: Request, field: str, value: Any, times: int) -> None:
    """Make sure that a field of a batch's body, which is written for each job, is no more than a body may be.

    Raises:
        ApiError: 413.
    """
    text = bytearray(to_json(value))
    size, limit = len(text) * times, services(request).largest_body_bytes
    if size > limit:
        message = f"The batch's `{field}` in each of its jobs: {size} bytes, more than {limit} (api.max_body_bytes)."
        raise ApiError(413, "too_large", message)
    values = counted(text, times)[0] * times
    if values > MOST_VALUES:
        message = f"The batch's `{field}` in each of its jobs: about {values} values, more than {MOST_VALUES}."
        raise ApiError(413, "too_many_values", message)
    note_size(request, size, values)


def _refuse_what_cannot_be_stored(jobs: Sequence[JobSubmitted]) -> None:
    """Find the first job with content that the log refuses: the log itself does not know its index."""
    for index, job in enumerate(jobs):
        place: tuple[str | int, ...] = ("jobs", index, "parameters")
        try:
            size = len(canonical(job.parameters))
            place = ("jobs", index)
            limits.check(job, size)
        except InvalidEvent as error:
            where = path(place)
            problem = {"path": where, "message": str(error)}
            raise ApiError(422, "invalid_content", f"{where}: {error}", details={"errors": [problem]}) from error


async def listing(request: Request) -> Response:
    """GET /api/events/batches"""
    await views_reach_wanted_position(request)
    known = services(request)
    asked = query_of(request, BatchList)
    principal = who_asks(request)
    wanted = view.query(principal, status=asked.status, user_id=asked.user_id, archived=asked.archived, q=asked.q)
    found, following = await view.page(
        known.views, wanted, limit=asked.limit, skip=asked.skip, after=asked.cursor, newest_first=asked.newest_first
    )
    seen = [shown(batch, BATCH, viewer_of(request, batch)) for batch in found]
    content: dict[str, Any] = {"status": "success", "batches": seen}
    if principal.sees_everything and asked.model_dump(exclude=set(Page.model_fields), exclude_none=True) == {}:
        content["total"] = await statistics.batches_counted(known.views)
    else:
        content["total"] = await view.count(known.views, wanted)
        if content["total"] >= view.COUNTED_UP_TO:
            content["total_is_lower_bound"] = True
    return json_response(content | going_on(following))


async def single(request: Request) -> Response:
    """GET /api/events/batches/{batch_id}"""
    await views_reach_wanted_position(request)
    asked = query_of(request, Single)
    if asked.as_of is None and prefers_wait(request) and (await existing(request))["status"] == "processing":
        await _wait_for_end(request, request.path_params["batch_id"])
    batch = await existing(request)
    viewer = viewer_of(request, batch)  # by the access of today, also of the batch as it was
    if asked.as_of is not None:
        batch = await _as_of(request, batch["batch_id"], asked.as_of)
    return unless_known(request, "batch", shown(batch, BATCH, viewer))


async def _as_of(request: Request, batch_id: str, then: int | datetime) -> Document:
    """Return the batch as the views had it at a position of the log or at a moment: folded as they are.

    Raises:
        ApiError: 404, when it was not there then; 409, when it cannot be read.
    """
    log = services(request).log
    with readable_past(batch_id):
        events = await log.read_stream(batch_id)
        job_ids = events[0].data["job_ids"]
        for begin in range(0, len(job_ids), bulk_commands.AT_ONCE):
            some = job_ids[begin : begin + bulk_commands.AT_ONCE]
            async with aclosing(log.read_in_parts(some, without=_ALONG_THE_WAY, data=_OF_BATCH)) as parts:
                async for of_jobs in parts:
                    events += of_jobs
        chunk = Chunk({name: {} for name in FOLDED})
        for number, event in enumerate(sorted(filter(happened_by(then), events), key=attrgetter("position"))):
            chunk.fold(event)
            if number % _FOLDED_A_TURN == 0:  # other requests are served meanwhile
                await asyncio.sleep(0)
        batch = chunk.get("batches", batch_id)
    if batch is None:
        raise ApiError(404, "batch_not_found", f"There was no batch {batch_id} then.")
    return batch


async def jobs_of(request: Request) -> Response:
    """GET /api/events/batches/{batch_id}/jobs"""
    asked = query_of(request, JobList)
    batch = await existing(request)
    return await listed(request, asked.model_copy(update={"batch_id": batch["batch_id"]}))


async def existing(request: Request) -> Document:
    """Return the batch that the path names, as the views have it.

    Raises:
        ApiError: 404.
    """
    known, batch_id = services(request), request.path_params["batch_id"]
    batch = await view.get(known.views, known.log, batch_id) if batch_id.startswith("batch-") else None
    if batch is None or not may_see(request, batch):
        raise not_found(batch_id)
    return batch


async def _wait_for_end(request: Request, batch_id: str) -> None:
    """Wait for the batch's end if the caller prefers that, as for a job's."""
    known = services(request)
    with preferred_wait(request) as seconds, suppress(TimeoutError):
        if not seconds:
            return
        async with while_signed_in(request, seconds), known.endings.watching(batch_id) as ended:
            while not (found := await _end_of(known.log, batch_id))[0]:
                await ended.wait()
                ended.clear()
            await views_show(request, found[1])


async def _end_of(log: EventLog, batch_id: str) -> tuple[bool, int]:
    """Return whether a batch has ended or was deleted, and the position of its last event."""
    now = await load(log, batch_id)
    has_ended = not isinstance(now.state, Batch) or now.state.status != "processing" or now.state.deleted
    return has_ended, now.head.position


def not_found(batch_id: str) -> ApiError:
    """Return the answer to who asks for a batch that is not there, or that they may not see."""
    return ApiError(404, "batch_not_found", f"There is no batch {batch_id}.")
