"""Requests that are understood in one way only: times, repeated parameters, encodings, headers of browsers, methods."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path

import pytest
from starlette.routing import Route

from jobledger.api.app import ROUTES
from jobledger.api.dashboard import pages as dashboard
from jobledger.api.http.limits import STREAM_PATHS
from jobledger.api.openapi.operation import OPERATIONS
from jobledger.api.routes import webhook_echo
from jobledger.cli.options import parse_as_of, parse_time_option
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.domain.timestamps import parse_timestamp
from tests.api.conftest import Api, run_api

JOBS = "/api/events/jobs"
FRIEND = "https://conference.example.org"
NAIVE = ["2026-02-01T09:30", "2026-02-01T09:30:00.5", "2026-02-01", "2026-02-01 09:30"]


async def test_time_without_offset_is_refused_everywhere_and_the_error_shows_it_with_one(
    api_without_worker: Api,
) -> None:
    job_id = await api_without_worker.submit()
    for text in NAIVE:
        waiting = {"job_type": "echo", "parameters": {}, "not_before": text}
        answers = [
            await api_without_worker.post(JOBS, waiting),
            await api_without_worker.post("/api/events/batches", {"jobs": [waiting]}),
            await api_without_worker.http.put(f"{JOBS}/{job_id}", json={"not_before": text}),
            await api_without_worker.get(f"{JOBS}?created_after={text}"),
            await api_without_worker.get(f"{JOBS}?created_before={text}"),
            await api_without_worker.get(f"{JOBS}/{job_id}?as_of={text}"),
            await api_without_worker.get(f"/api/monitoring/events/webhooks?created_after={text}"),
            await api_without_worker.post("/api/monitoring/events/redeliver", {"created_before": text}),
        ]
        for answer in answers:
            assert answer.status_code == 422, (text, answer.url)
            assert "has no offset" in answer.json()["message"]
            assert "Z, or the local time with its offset" in answer.json()["message"]
        for option in (lambda it: parse_as_of(it, "--as-of"), lambda it: parse_time_option(it, "--created-after")):
            with pytest.raises(ConfigurationError, match=r"has no offset from UTC: write 2026-02-01T0\S+Z"):
                option(text)


async def test_time_with_any_offset_is_taken(api_without_worker: Api) -> None:
    for text in ("2026-02-01T09:30:00Z", "2026-02-01T10:30+01:00", "2026-02-01T02:00:00.000-07:30"):
        answer = await api_without_worker.post(JOBS, {"job_type": "echo", "parameters": {}, "not_before": text})
        assert answer.json()["job"]["due_at"] == "2026-02-01T09:30:00Z"
        assert (await api_without_worker.http.get(JOBS, params={"created_after": text})).status_code == 200
        assert parse_as_of(text, "--as-of") == parse_timestamp("2026-02-01T09:30Z")
    lost = await api_without_worker.get(f"{JOBS}?created_after=2026-02-01T10:30+01:00")
    assert "2026-02-01T10:30%2B01:00" in lost.json()["message"]


@pytest.mark.parametrize("text", ["", "x", "20260201", "1770000000", "0001-01-01T00:00+23:59", "2026-13-01T00:00Z"])
def test_what_is_no_time_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as 2026-02-01T09:30:00Z|years 1 to 9999"):
        parse_timestamp(text)


EVERY_ROUTE = [*ROUTES, *dashboard.ROUTES]


def address_of(route: Route, **known: str) -> str:
    names = {"job_id": "job-none", "batch_id": "batch-none", "delivery_id": "delivery-none", "path": "none"}
    names |= {"endpoint_id": "none", "version": "1", "name": "none.js", **known}
    return route.path.replace(":path}", "}").format(**names)


async def test_query_parameter_repeated_is_refused_by_name_at_every_route(api_without_worker: Api) -> None:
    for route in EVERY_ROUTE:
        for method in route.methods or ():
            for name, query in (
                ("limit", "limit=1&limit=1"),
                ("x", "x=1&y=2&%78="),
                ("signature", "&signature&signature"),
            ):
                answer = await api_without_worker.http.request(method, f"{address_of(route)}?{query}")
                assert answer.status_code == 422, (method, route.path)
                if method != "HEAD":
                    assert answer.json()["details"]["errors"] == [
                        {"path": name, "message": "was given several times: send one value"}
                    ]


async def test_query_parameter_unknown_is_refused_by_name_at_every_route_of_the_interface(
    api_without_worker: Api,
) -> None:
    batch = await api_without_worker.submit_batch({})
    known = {"batch_id": batch["batch_id"], "job_id": batch["job_ids"][0]}
    for route in ROUTES:
        for method in (route.methods or set()) - {"HEAD"}:
            answer = await api_without_worker.http.request(method, f"{address_of(route, **known)}?colour=red", json={})
            if route.endpoint in (
                webhook_echo.receive_webhook_echo,
                webhook_echo.list_webhook_echoes,
            ):  # off; the address of a webhook may have any
                assert answer.status_code == 404
                continue
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid_content"), (method, route.path)
            if OPERATIONS[route.endpoint].body is None:
                assert [it["path"] for it in answer.json()["details"]["errors"]] == ["colour"]


async def test_query_parameter_unknown_is_ignored_by_pages_of_the_dashboard(api_without_worker: Api) -> None:
    for route in dashboard.ROUTES:
        if route.path not in STREAM_PATHS and "GET" in (route.methods or ()):
            answer = await api_without_worker.get(f"{address_of(route)}?colour=red")
            assert answer.status_code in (200, 404), route.path


async def test_query_parameter_min_position_is_taken_by_every_route_that_reads_the_views(
    api_without_worker: Api,
) -> None:
    batch = await api_without_worker.submit_batch({})
    known = {"batch_id": batch["batch_id"], "job_id": batch["job_ids"][0]}
    for route in ROUTES:
        if OPERATIONS[route.endpoint].reads_views:
            method = "GET" if "GET" in (route.methods or ()) else "POST"
            address = f"{address_of(route, **known)}?min_position=far"
            answer = await api_without_worker.http.request(method, address, json=known if method == "POST" else None)
            assert (answer.status_code, answer.json()["code"]) == (400, "malformed_position"), route.path


async def test_sign_in_form_with_repeated_field_is_refused(api_without_worker: Api) -> None:
    form = {
        "Content-Type": "application/x-www-form-urlencoded",
        "Origin": str(api_without_worker.http.base_url).rstrip("/"),
    }
    answer = await api_without_worker.http.post(
        "/monitoring/events/sign-in", content="credential=a&credential=b", headers=form
    )
    assert answer.status_code == 400
    assert "Send each field once" in answer.text


async def test_compressed_body_is_refused_and_the_answer_says_what_is_accepted(api_without_worker: Api) -> None:
    body = json.dumps({"job_type": "echo", "parameters": {}}).encode()
    for encoding, sent in (("gzip", gzip.compress(body)), ("br", body), ("identity, gzip", body)):
        headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
        answer = await api_without_worker.http.post(JOBS, content=sent, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_content_encoding")
        assert answer.headers["accept-encoding"] == "identity"
    headers = {"Content-Type": "application/json", "Content-Encoding": "identity"}
    assert (await api_without_worker.http.post(JOBS, content=body, headers=headers)).status_code == 202


async def test_empty_last_event_id_is_none(api_without_worker: Api) -> None:
    await api_without_worker.submit()
    for query, first in (("", await api_without_worker.event_store.head_position()), ("?after=0", 0)):
        async with (
            asyncio.timeout(10),
            api_without_worker.http.stream(
                "GET", f"/api/ledger/stream{query}", headers={"Last-Event-ID": ""}
            ) as answer,
        ):
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("id:"):
                    assert int(line[3:]) == first
                    break


@pytest.mark.parametrize(
    "names",
    [
        "authorization,cache-control,last-event-id",
        "authorization,content-type,idempotency-key,prefer",
        "if-match,if-none-match,if-modified-since,if-unmodified-since,if-range,range",
        "ledger-position,pragma,x-request-id,x-requested-with,traceparent,tracestate",
    ],
)
async def test_preflight_allows_what_clients_send(mongodb_uri: str, db_name: str, tmp_path: Path, names: str) -> None:
    roles = frozenset({"api", "projector"})
    async for api in run_api(mongodb_uri, db_name, tmp_path, roles, api={"cors_origins": [FRIEND]}):  # type: ignore[arg-type]  # a literal set is a set of str
        asks = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": names}
        answer = await api.http.options("/api/ledger/stream", headers={"Origin": FRIEND, **asks})
        assert answer.status_code == 200, answer.text
        asks["Access-Control-Request-Headers"] = "x-unknown"
        answer = await api.http.options("/api/ledger/stream", headers={"Origin": FRIEND, **asks})
        assert answer.status_code == 400


async def test_every_address_answers_every_method(api_without_worker: Api) -> None:
    for address in {address_of(route) for route in ROUTES}:
        for method in ("HEAD", "OPTIONS", "PATCH", "TRACE"):
            answer = await api_without_worker.http.request(method, address)
            assert answer.status_code < 500, (method, address)
            if method != "HEAD":
                assert answer.status_code == 405, (method, address)
                assert answer.headers["allow"]
