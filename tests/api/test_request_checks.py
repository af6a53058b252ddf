"""Checks of requests: time offsets, repeated and unknown query parameters, encodings, preflights and methods."""

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
from jobledger.cli.commands.options import parse_as_of, parse_time_option
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.domain.timestamps import parse_timestamp
from tests.api.conftest import WITHOUT_WORKER, Api, run_api
from tests.support.polling import DEADLINE_SECONDS

JOBS = "/api/events/jobs"
ALLOWED_ORIGIN = "https://conference.example.org"
TIMES_WITHOUT_OFFSET = ["2026-02-01T09:30", "2026-02-01T09:30:00.5", "2026-02-01", "2026-02-01 09:30"]


async def test_time_without_offset_is_rejected_and_error_shows_corrected_time(
    shared_api: Api,
) -> None:
    job_id = await shared_api.submit()
    for text in TIMES_WITHOUT_OFFSET:
        body = {"job_type": "echo", "parameters": {}, "not_before": text}
        responses = [
            await shared_api.post(JOBS, body),
            await shared_api.post("/api/events/batches", {"jobs": [body]}),
            await shared_api.http.put(f"{JOBS}/{job_id}", json={"not_before": text}),
            await shared_api.get(f"{JOBS}?created_after={text}"),
            await shared_api.get(f"{JOBS}?created_before={text}"),
            await shared_api.get(f"{JOBS}/{job_id}?as_of={text}"),
            await shared_api.get(f"/api/monitoring/events/webhooks?created_after={text}"),
            await shared_api.post("/api/monitoring/events/redeliver", {"created_before": text}),
        ]
        for response in responses:
            assert response.status_code == 422, (text, response.url)
            assert "has no offset" in response.json()["message"]
            assert "Z, or the local time with its offset" in response.json()["message"]
        for parse in (
            lambda time: parse_as_of(time, "--as-of"),
            lambda time: parse_time_option(time, "--created-after"),
        ):
            with pytest.raises(ConfigurationError, match=r"has no offset from UTC: write 2026-02-01T0\S+Z"):
                parse(text)


async def test_time_with_any_offset_is_accepted(shared_api: Api) -> None:
    for text in ("2026-02-01T09:30:00Z", "2026-02-01T10:30+01:00", "2026-02-01T02:00:00.000-07:30"):
        response = await shared_api.post(JOBS, {"job_type": "echo", "parameters": {}, "not_before": text})
        assert response.json()["job"]["due_at"] == "2026-02-01T09:30:00Z"
        assert (await shared_api.http.get(JOBS, params={"created_after": text})).status_code == 200
        assert parse_as_of(text, "--as-of") == parse_timestamp("2026-02-01T09:30Z")
    unencoded_plus = await shared_api.get(f"{JOBS}?created_after=2026-02-01T10:30+01:00")
    assert "2026-02-01T10:30%2B01:00" in unencoded_plus.json()["message"]


@pytest.mark.parametrize("text", ["", "x", "20260201", "1770000000", "0001-01-01T00:00+23:59", "2026-13-01T00:00Z"])
def test_invalid_time_is_rejected_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as 2026-02-01T09:30:00Z|years 1 to 9999"):
        parse_timestamp(text)


EVERY_ROUTE = [*ROUTES, *dashboard.ROUTES]


def build_path(route: Route, **ids: str) -> str:
    values = {"job_id": "job-none", "batch_id": "batch-none", "delivery_id": "delivery-none", "path": "none"}
    values |= {"endpoint_id": "none", "version": "1", "name": "none.js", **ids}
    return route.path.replace(":path}", "}").format(**values)


async def test_query_parameter_repeated_is_rejected_by_every_route(shared_api: Api) -> None:
    for route in EVERY_ROUTE:
        for method in route.methods or ():
            for name, query in (
                ("limit", "limit=1&limit=1"),
                ("x", "x=1&y=2&%78="),
                ("signature", "&signature&signature"),
            ):
                response = await shared_api.http.request(method, f"{build_path(route)}?{query}")
                assert response.status_code == 422, (method, route.path)
                if method != "HEAD":
                    assert response.json()["details"]["errors"] == [
                        {"path": name, "message": "was given several times: send one value"}
                    ]


async def test_query_parameter_unknown_is_rejected_by_every_api_route(
    shared_api: Api,
) -> None:
    batch = await shared_api.submit_batch({})
    ids = {"batch_id": batch["batch_id"], "job_id": batch["job_ids"][0]}
    for route in ROUTES:
        for method in (route.methods or set()) - {"HEAD"}:
            response = await shared_api.http.request(method, f"{build_path(route, **ids)}?colour=red", json={})
            # Webhook echo is disabled here. A webhook URL may have any query.
            if route.endpoint in (webhook_echo.receive_webhook_echo, webhook_echo.list_webhook_echoes):
                assert response.status_code == 404
                continue
            assert (response.status_code, response.json()["code"]) == (422, "invalid_content"), (method, route.path)
            if OPERATIONS[route.endpoint].body is None:
                assert [error["path"] for error in response.json()["details"]["errors"]] == ["colour"]


async def test_query_parameter_unknown_is_ignored_by_dashboard_pages(shared_api: Api) -> None:
    for route in dashboard.ROUTES:
        if route.path not in STREAM_PATHS and "GET" in (route.methods or ()):
            response = await shared_api.get(f"{build_path(route)}?colour=red")
            assert response.status_code in (200, 404), route.path


async def test_query_parameter_min_position_is_checked_by_every_view_route(
    shared_api: Api,
) -> None:
    batch = await shared_api.submit_batch({})
    ids = {"batch_id": batch["batch_id"], "job_id": batch["job_ids"][0]}
    for route in ROUTES:
        if OPERATIONS[route.endpoint].is_from_views:
            method = "GET" if "GET" in (route.methods or ()) else "POST"
            path = f"{build_path(route, **ids)}?min_position=far"
            body = {"action": "archive", "filters": {"batch_id": ids["batch_id"]}} if "bulk" in route.path else ids
            response = await shared_api.http.request(method, path, json=body if method == "POST" else None)
            assert (response.status_code, response.json()["code"]) == (400, "malformed_position"), route.path


async def test_sign_in_form_with_repeated_field_is_rejected(shared_api: Api) -> None:
    form = {
        "Content-Type": "application/x-www-form-urlencoded",
        **shared_api.origin_header,
    }
    response = await shared_api.http.post(
        "/monitoring/events/sign-in", content="credential=a&credential=b", headers=form
    )
    assert response.status_code == 400
    assert "Send each field once" in response.text


async def test_compressed_body_is_rejected_with_accept_encoding(shared_api: Api) -> None:
    body = json.dumps({"job_type": "echo", "parameters": {}}).encode()
    for encoding, content in (("gzip", gzip.compress(body)), ("br", body), ("identity, gzip", body)):
        headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
        response = await shared_api.http.post(JOBS, content=content, headers=headers)
        assert (response.status_code, response.json()["code"]) == (415, "unsupported_content_encoding")
        assert response.headers["accept-encoding"] == "identity"
    headers = {"Content-Type": "application/json", "Content-Encoding": "identity"}
    assert (await shared_api.http.post(JOBS, content=body, headers=headers)).status_code == 202


async def test_empty_last_event_id_is_treated_as_missing(shared_api: Api) -> None:
    await shared_api.submit()
    for query, first_id in (("", await shared_api.event_store.read_head_position()), ("?after=0", 0)):
        async with (
            asyncio.timeout(DEADLINE_SECONDS),
            shared_api.http.stream("GET", f"/api/ledger/stream{query}", headers={"Last-Event-ID": ""}) as response,
        ):
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("id:"):
                    assert int(line[3:]) == first_id
                    break


@pytest.mark.parametrize(
    "header_names",
    [
        "authorization,cache-control,last-event-id",
        "authorization,content-type,idempotency-key,prefer",
        "if-match,if-none-match,if-modified-since,if-unmodified-since,if-range,range",
        "ledger-position,pragma,x-request-id,x-requested-with,traceparent,tracestate",
    ],
)
async def test_preflight_allows_headers_that_clients_send(
    mongodb_uri: str, db_name: str, tmp_path: Path, header_names: str
) -> None:
    settings = {"cors_origins": [ALLOWED_ORIGIN]}
    async for api in run_api(mongodb_uri, db_name, tmp_path, WITHOUT_WORKER, api=settings):
        preflight = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": header_names}
        response = await api.http.options("/api/ledger/stream", headers={"Origin": ALLOWED_ORIGIN, **preflight})
        assert response.status_code == 200, response.text
        preflight["Access-Control-Request-Headers"] = "x-unknown"
        response = await api.http.options("/api/ledger/stream", headers={"Origin": ALLOWED_ORIGIN, **preflight})
        assert response.status_code == 400


async def test_every_route_responds_to_every_method(shared_api: Api) -> None:
    for path in {build_path(route) for route in ROUTES}:
        for method in ("HEAD", "OPTIONS", "PATCH", "TRACE"):
            response = await shared_api.http.request(method, path)
            assert response.status_code < 500, (method, path)
            if method != "HEAD":
                assert response.status_code == 405, (method, path)
                assert response.headers["allow"]
