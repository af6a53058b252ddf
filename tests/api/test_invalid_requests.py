"""Every invalid request gets an error document immediately. None writes an event or causes an internal error."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from pymongo import MongoClient

from tests.api.conftest import check_error
from tests.support.installation import Installation, RunningCommand

JSON = {"Content-Type": "application/json"}
JOBS, BATCHES = "/api/events/jobs", "/api/events/batches"
MAX_BODY_BYTES = 1_000_000


@pytest.fixture(scope="module")
def role(mongodb_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCommand]:
    """One API process for all tests of this module, because none of them may change anything.

    At the end, check that nothing was written and no fault was logged.
    """
    name = f"test_{uuid4().hex[:16]}"
    with Installation(
        tmp_path_factory.mktemp("refusals"),
        mongodb={"uri": mongodb_uri, "db_name": name},
        api={"port": 0, "max_body_bytes": MAX_BODY_BYTES},
    ) as installation:
        role = installation.start("api").wait_until_ready()
        yield role
        stopped = role.stop()
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        event_count = client[name].events.count_documents({})
        client.drop_database(name)
    assert event_count == 0
    assert stopped.exit_code == 0
    assert "Traceback" not in stopped.err, stopped.err
    assert "fault" not in stopped.err, stopped.err


@pytest.fixture(scope="module")
def client(role: RunningCommand) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=role.url, timeout=20, trust_env=False) as client:
        yield client


def build_job_json(parameters: str, more: str = "") -> str:
    return f'{{"job_type": "echo", "parameters": {parameters}{more}}}'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{'job_type': 'echo'}",
        build_job_json('{"a": NaN}').encode(),
        build_job_json('{"a": -Infinity}').encode(),
        build_job_json('{"a": "\\ud800"}').encode(),
        build_job_json('{"\\udc00": 1}').encode(),
        b'{"parameters": {"a": "\xff"}}',
        b"\xff\xfe{\x00}\x00",
        build_job_json(f'{{"a": {"[" * 100_000}{"]" * 100_000}}}').encode(),
        b"a=1&b=2",
        b"--- yaml: true",
        b'{"reason": "public", "reason": "real"}',
        build_job_json('{"a": [{"b": {"c": 1, "\\u0063": 2}}]}').encode(),
    ],
    ids=lambda body: ascii(body)[:40],
)
def test_body_that_is_not_json_returns_malformed_json(client: httpx.Client, body: bytes) -> None:
    for path in (JOBS, BATCHES):
        check_error(client.post(path, content=body, headers=JSON), 400, "malformed_json")


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ("[]", ""),
        ("null", ""),
        ('"job"', ""),
        ("3", ""),
        ("{}", "parameters"),
        ('{"parameters": []}', "parameters"),
        ('{"parameters": null}', "parameters"),
        (build_job_json("{}", ', "priority": "high"'), "priority"),
        (build_job_json("{}", ', "priority": 1.5'), "priority"),
        (build_job_json("{}", ', "priority": 1001'), "priority"),
        (build_job_json("{}", f', "priority": {2**60}'), "priority"),
        (build_job_json("{}", f', "priority": {10**30}'), "priority"),
        (build_job_json("{}", ', "max_attempts": 0'), "max_attempts"),
        (build_job_json("{}", ', "timeout_s": -1'), "timeout_s"),
        (build_job_json("{}", ', "timeout_s": 1e300'), "timeout_s"),
        (build_job_json("{}", ', "not_before": "tomorrow"'), "not_before"),
        (build_job_json("{}", ', "not_before": "9999-12-31T23:59:59-05:00"'), "not_before"),
        (build_job_json("{}", ', "not_before": "0001-01-01T00:00:00+05:00"'), "not_before"),
        (build_job_json("{}", ', "not_before": 1e18'), "not_before"),
        (build_job_json("{}", ', "webhook": "http://example.org"'), "webhook"),
        (build_job_json("{}", ', "webhook": {"url": "http://["}'), "webhook.url"),
        (build_job_json("{}", ', "webhook": {"url": "https://me:secret@example.org/"}'), "webhook.url"),
        (build_job_json("{}", ', "webhook": {"url": "javascript:alert(1)"}'), "webhook.url"),
        (build_job_json("{}", ', "access_control": {"visibility": "everyone"}'), "access_control.visibility"),
        (build_job_json("{}", ', "access_control": {"owner": "me"}'), "access_control.owner"),
        (build_job_json("{}", ', "colour": "red"'), "colour"),
        (build_job_json("{}", ', "user_id": ""'), "user_id"),
        (build_job_json('{"seconds": "soon"}'), "parameters.seconds"),
        (build_job_json('{"seconds": -1}'), "parameters.seconds"),
        (build_job_json('{"fail": 3}'), "parameters.fail"),
        ('{"event": "e", "session": "s", "url": "ftp://x", "filename": "f", "track": "t"}', "parameters.url"),
        ('{"event": "e", "session": " ", "url": "http://x/", "filename": "f", "track": "t"}', "parameters.session"),
        ('{"parameters": {"event": "e"}}', "parameters.session"),
    ],
    ids=lambda value: value[:60],
)
def test_invalid_field_is_rejected_by_name(client: httpx.Client, body: str, path: str) -> None:
    content = check_error(client.post(JOBS, content=body, headers=JSON), 422, "invalid_content")

    problems = content["details"]["errors"]
    assert path in [problem["path"] for problem in problems]
    assert all(problem.keys() == {"path", "message"} for problem in problems)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        (f'{{"a": {2**60}}}', "2^53"),
        (f'{{"a": {2**64 + 1}}}', "2^53"),
        (f'{{"a": [{{"b": {-(2**53)}}}]}}', "2^53"),
        ('{"a": 1e400}', "not a JSON number"),
        ('{"a\\u0000b": 1}', "NUL"),
        ('{"$where": 1}', "$"),
        ('{"a": [{"$ref": "jobs", "$id": 1}]}', "$"),
        (f'{{"a": {"[" * 150}{"]" * 150}}}', "nested"),
    ],
    ids=lambda value: value[:30],
)
def test_parameters_that_cannot_be_stored_are_rejected_with_reason(
    client: httpx.Client, parameters: str, reason: str
) -> None:
    single = check_error(client.post(JOBS, content=build_job_json(parameters), headers=JSON), 422, "invalid_content")
    assert reason in single["message"]
    jobs = f'{{"jobs": [{build_job_json("{}")}, {build_job_json(parameters)}]}}'
    in_batch = check_error(client.post(BATCHES, content=jobs, headers=JSON), 422, "invalid_content")
    assert in_batch["message"].startswith("jobs[1].parameters: ")
    assert reason in in_batch["message"]
    defaults = f'{{"jobs": [{build_job_json("{}")}], "parameters": {parameters}}}'
    assert (
        reason in check_error(client.post(BATCHES, content=defaults, headers=JSON), 422, "invalid_content")["message"]
    )


def test_unknown_job_type_is_rejected_with_list_of_known_types(client: httpx.Client) -> None:
    response = client.post(JOBS, json={"job_type": "transcode", "parameters": {}})
    content = check_error(response, 422, "unknown_job_type")

    assert "echo, session" in content["message"]
    assert content["details"]["errors"][0]["path"] == "job_type"


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_body_without_json_content_type_is_rejected(client: httpx.Client, content_type: str) -> None:
    for path in (JOBS, BATCHES):
        response = client.post(
            path, content=build_job_json("{}"), headers={"Content-Type": content_type} if content_type else {}
        )
        check_error(response, 415, "unsupported_media_type")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_content_type_is_accepted_in_any_spelling(client: httpx.Client, content_type: str) -> None:
    check_error(client.post(JOBS, content="{}", headers={"Content-Type": content_type}), 422, "invalid_content")


def test_too_large_body_is_rejected_with_and_without_content_length(client: httpx.Client) -> None:
    too_large = build_job_json(f'{{"a": "{"x" * MAX_BODY_BYTES}"}}').encode()
    content = check_error(client.post(JOBS, content=too_large, headers=JSON), 413, "content_too_large")
    assert str(MAX_BODY_BYTES) in content["message"]
    chunks = (too_large[start : start + 65_536] for start in range(0, len(too_large), 65_536))
    check_error(client.post(JOBS, content=chunks, headers=JSON), 413, "content_too_large")


def test_batch_defaults_that_expand_beyond_limit_are_rejected(client: httpx.Client) -> None:
    jobs = [{"job_type": "echo", "parameters": {}}] * 1000
    response = client.post(BATCHES, json={"parameters": {"a": "x" * 2000}, "jobs": jobs})
    check_error(response, 413, "content_too_large")


def test_thousands_of_invalid_fields_return_a_bounded_error(client: httpx.Client) -> None:
    body = {"job_type": "echo", "parameters": {}, **{f"unknown_{number}": 1 for number in range(50_000)}}
    response = client.post(JOBS, json=body)
    content = check_error(response, 422, "invalid_content")

    assert "at least 97 more" in content["message"]
    assert len(response.content) < 50_000


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nothing/here"),
        ("GET", "/api"),
        ("GET", "/api/events"),
        ("GET", "/favicon.ico"),
        ("POST", "/api/events/jobs/job-1/explode"),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd"),
        ("GET", "//evil.example/"),
    ],
)
def test_unknown_path_returns_404(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(method, httpx.URL(str(client.base_url)).copy_with(raw_path=path.encode()))
    check_error(response, 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", JOBS, {"GET", "HEAD", "POST"}),
        ("DELETE", JOBS, {"GET", "HEAD", "POST"}),
        ("PATCH", f"{JOBS}/job-1", {"GET", "HEAD", "PUT", "DELETE"}),
        ("GET", f"{JOBS}/job-1/cancel", {"POST"}),
        ("POST", "/api/events/files/x", {"GET", "HEAD"}),
        ("POST", "/healthz", {"GET", "HEAD"}),
        ("OPTIONS", BATCHES, {"GET", "HEAD", "POST"}),
        ("BREW", BATCHES, {"GET", "HEAD", "POST"}),
    ],
)
def test_wrong_method_returns_405_with_all_allowed_methods(
    client: httpx.Client, method: str, path: str, allowed: set[str]
) -> None:
    response = client.request(method, path)
    check_error(response, 405, "method_not_allowed")
    assert set(response.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize(
    ("query", "path"),
    [
        ("limit=x", "limit"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=", "limit"),
        ("limit=1e400", "limit"),
        (f"limit={2**70}", "limit"),
        (f"skip={2**70}", "skip"),
        ("skip=-1", "skip"),
        ("status=done", "status"),
        ("status[$ne]=pending", "status[$ne]"),
        ("$where=sleep(1000)", "$where"),
        ("colour=red", "colour"),
        ("archived=perhaps", "archived"),
        ("created_after=yesterday", "created_after"),
        ("created_after=9999-12-31T23:59:59-05:00", "created_after"),
        ("created_before=0001-01-01T00:00:00%2B05:00", "created_before"),
    ],
)
def test_invalid_query_parameter_is_rejected_by_name(client: httpx.Client, query: str, path: str) -> None:
    content = check_error(client.get(f"{JOBS}?{query}"), 422, "invalid_content")
    assert [problem["path"] for problem in content["details"]["errors"]] == [path]


@pytest.mark.parametrize("query", ["track=%00", "track=%ff%fe", "user_id=$ne", "batch_id=[$gt]", "track=" + "x" * 5000])
def test_filter_with_unusual_value_matches_no_job(client: httpx.Client, query: str) -> None:
    response = client.get(f"{JOBS}?{query}")
    assert response.status_code == 200, response.text
    assert response.json()["jobs"] == []


@pytest.mark.parametrize("position", ["x", "-1", "1.5", "1e3", "9" * 40, "٣", "1,2"])
def test_non_numeric_position_returns_malformed_position(client: httpx.Client, position: str) -> None:
    for path in (JOBS, BATCHES, "/api/monitoring/events/stats", f"{JOBS}/job-1", "/api/events/files/x"):
        if position.isascii():
            check_error(client.get(path, headers={"Ledger-Position": position}), 400, "malformed_position")
        check_error(
            client.get(path, params={"min_position": position}), 422 if path == "" else 400, "malformed_position"
        )


@pytest.mark.parametrize("position", ["1", "999999999999999999"])
def test_position_beyond_the_log_is_rejected_without_waiting(client: httpx.Client, position: str) -> None:
    for path in (JOBS, BATCHES, "/api/monitoring/events/stats", f"{JOBS}/job-1", "/api/events/files/x"):
        start = time.monotonic()
        check_error(client.get(path, headers={"Ledger-Position": position}), 422, "invalid_content")
        check_error(client.get(path, params={"min_position": position}), 422, "invalid_content")
        assert time.monotonic() - start < 9, "the server waited for the position"


@pytest.mark.parametrize("query", ["after=x", "after=-1", f"after={2**63}", f"after={2**53}", "follow=true"])
def test_stream_with_invalid_query_is_rejected(client: httpx.Client, query: str) -> None:
    check_error(client.get(f"/api/ledger/stream?{query}"), 422, "invalid_content")


def test_stream_with_unknown_event_type_is_rejected(client: httpx.Client) -> None:
    content = check_error(client.get("/api/ledger/stream?types=JobSubmitted,JobExploded"), 422, "unknown_event_type")
    assert "JobExploded" in content["message"]


@pytest.mark.parametrize("event_id", ["x", "-5", str(2**64)])
def test_invalid_last_event_id_is_rejected(client: httpx.Client, event_id: str) -> None:
    check_error(client.get("/api/ledger/stream", headers={"Last-Event-ID": event_id}), 422, "invalid_content")


@pytest.mark.parametrize("job_id", ["job-x", "job-%00", "batch-1", "x", "job-" + "0" * 5000, "%24where", "job-%ff"])
def test_unknown_job_or_batch_returns_404(client: httpx.Client, job_id: str) -> None:
    check_error(client.get(f"{JOBS}/{job_id}"), 404, "job_not_found")
    check_error(client.get(f"{JOBS}/{job_id}/history"), 404, "job_not_found")
    check_error(client.delete(f"{JOBS}/{job_id}"), 404, "job_not_found")
    check_error(client.get(f"{BATCHES}/{job_id}"), 404, "batch_not_found")


@pytest.mark.parametrize("body", ["[]", '{"reason": 3}', '{"why": "x"}', '{"reason": "%s"}' % ("x" * 3000)])
def test_action_with_invalid_body_is_rejected(client: httpx.Client, body: str) -> None:
    for action in ("cancel", "restart", "archive", "unarchive"):
        check_error(client.post(f"{JOBS}/job-1/{action}", content=body, headers=JSON), 422, "invalid_content")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:5001", "127.0.0.1.evil.example", "", "[", "localhost@evil"]
)
def test_unknown_host_header_is_rejected(client: httpx.Client, host: str) -> None:
    for path in ("/", JOBS, "/nothing"):
        check_error(client.get(path, headers={"Host": host}), 400, "unknown_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:5001"])
def test_loopback_host_headers_are_accepted(client: httpx.Client, host: str) -> None:
    assert client.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost.evil.example:5001",
        "x",
        "http://localhost:1",
        "http://127.0.0.1",
    ],
)
def test_changes_from_foreign_origins_are_rejected(client: httpx.Client, origin: str) -> None:
    check_error(client.post(f"{JOBS}/job-1/cancel", headers={"Origin": origin}), 403, "origin_not_allowed")
    check_error(client.delete(f"{JOBS}/job-1", headers={"Origin": origin}), 403, "origin_not_allowed")
    check_error(
        client.post(JOBS, content=build_job_json("{}"), headers=JSON | {"Origin": origin}), 403, "origin_not_allowed"
    )


def test_change_from_own_origin_is_accepted(client: httpx.Client) -> None:
    own_origin = {"Origin": str(client.base_url).rstrip("/")}
    check_error(client.post(f"{JOBS}/job-1/cancel", headers=own_origin), 404, "job_not_found")


def test_disconnect_during_body_causes_no_internal_error(client: httpx.Client) -> None:
    for _ in range(3):
        with socket.create_connection((client.base_url.host, client.base_url.port or 80), 10) as connection:
            head = (
                f"POST {JOBS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
            )
            connection.sendall(f"{head}\r\n{{".encode())
    assert client.get("/healthz").status_code == 200  # the fixture checks the log for faults at the end


def test_non_http_data_returns_400_and_server_keeps_running(client: httpx.Client) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), 10) as connection:
        connection.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert client.get("/healthz").status_code == 200


def test_error_message_quotes_a_bounded_part_of_the_input(client: httpx.Client) -> None:
    response = client.post(JOBS, content=json.dumps({"job_type": "x" * 90, "parameters": {}}), headers=JSON)
    check_error(response, 422, "unknown_job_type")
    response = client.post(JOBS, content=json.dumps({"job_type": "x" * 90_000, "parameters": {}}), headers=JSON)
    check_error(response, 422, "invalid_content")
    assert len(response.content) < 1000
