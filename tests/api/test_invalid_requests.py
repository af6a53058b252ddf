"""Everything a client can do wrong is answered at once, in one envelope; nothing is written or ends in a fault."""

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

from tests.support.installation import Installation, RunningCommand

JSON = {"Content-Type": "application/json"}
JOBS, BATCHES = "/api/events/jobs", "/api/events/batches"
LARGEST_BODY = 1_000_000


@pytest.fixture(scope="module")
def role(mongodb_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCommand]:
    """One installation for all tests here, which is fair because none of them may change anything.

    At the end nothing has been written, and no fault is in the log.
    """
    name = f"test_{uuid4().hex[:16]}"
    with Installation(
        tmp_path_factory.mktemp("refusals"),
        mongodb={"uri": mongodb_uri, "db_name": name},
        api={"port": 0, "max_body_bytes": LARGEST_BODY},
    ) as installation:
        role = installation.start("api").wait_until_ready()
        yield role
        ended = role.stop()
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        written = client[name].events.count_documents({})
        client.drop_database(name)
    assert written == 0
    assert ended.exit_code == 0
    assert "Traceback" not in ended.err, ended.err
    assert "fault" not in ended.err, ended.err


@pytest.fixture(scope="module")
def client(role: RunningCommand) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=role.url, timeout=20, trust_env=False) as client:
        yield client


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check the envelope and return it."""
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    content: dict[str, Any] = answer.json()
    assert content.keys() == {"status", "code", "message", "details"}
    assert content["status"] == "error"
    assert content["code"] == code
    assert content["message"]
    assert "Traceback" not in answer.text
    assert "pydantic" not in answer.text.lower()
    return content


def job(parameters: str, more: str = "") -> str:
    return f'{{"job_type": "echo", "parameters": {parameters}{more}}}'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{'job_type': 'echo'}",
        job('{"a": NaN}').encode(),
        job('{"a": -Infinity}').encode(),
        job('{"a": "\\ud800"}').encode(),
        job('{"\\udc00": 1}').encode(),
        b'{"parameters": {"a": "\xff"}}',
        b"\xff\xfe{\x00}\x00",
        job(f'{{"a": {"[" * 100_000}{"]" * 100_000}}}').encode(),
        b"a=1&b=2",
        b"--- yaml: true",
        b'{"reason": "public", "reason": "real"}',
        job('{"a": [{"b": {"c": 1, "\\u0063": 2}}]}').encode(),
    ],
    ids=lambda body: ascii(body)[:40],
)
def test_what_is_not_json_is_malformed(client: httpx.Client, body: bytes) -> None:
    for path in (JOBS, BATCHES):
        refused(client.post(path, content=body, headers=JSON), 400, "malformed_json")


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
        (job("{}", ', "priority": "high"'), "priority"),
        (job("{}", ', "priority": 1.5'), "priority"),
        (job("{}", ', "priority": 1001'), "priority"),
        (job("{}", f', "priority": {2**60}'), "priority"),
        (job("{}", f', "priority": {10**30}'), "priority"),
        (job("{}", ', "max_attempts": 0'), "max_attempts"),
        (job("{}", ', "timeout_s": -1'), "timeout_s"),
        (job("{}", ', "timeout_s": 1e300'), "timeout_s"),
        (job("{}", ', "not_before": "tomorrow"'), "not_before"),
        (job("{}", ', "not_before": "9999-12-31T23:59:59-05:00"'), "not_before"),
        (job("{}", ', "not_before": "0001-01-01T00:00:00+05:00"'), "not_before"),
        (job("{}", ', "not_before": 1e18'), "not_before"),
        (job("{}", ', "webhook": "http://example.org"'), "webhook"),
        (job("{}", ', "webhook": {"url": "http://["}'), "webhook.url"),
        (job("{}", ', "webhook": {"url": "https://me:secret@example.org/"}'), "webhook.url"),
        (job("{}", ', "webhook": {"url": "javascript:alert(1)"}'), "webhook.url"),
        (job("{}", ', "access_control": {"visibility": "everyone"}'), "access_control.visibility"),
        (job("{}", ', "access_control": {"owner": "me"}'), "access_control.owner"),
        (job("{}", ', "colour": "red"'), "colour"),
        (job("{}", ', "user_id": ""'), "user_id"),
        (job('{"seconds": "soon"}'), "parameters.seconds"),
        (job('{"seconds": -1}'), "parameters.seconds"),
        (job('{"fail": 3}'), "parameters.fail"),
        ('{"event": "e", "session": "s", "url": "ftp://x", "filename": "f", "track": "t"}', "parameters.url"),
        ('{"event": "e", "session": " ", "url": "http://x/", "filename": "f", "track": "t"}', "parameters.session"),
        ('{"parameters": {"event": "e"}}', "parameters.session"),
    ],
    ids=lambda value: value[:60],
)
def test_what_does_not_fit_is_invalid_and_the_field_is_named(client: httpx.Client, body: str, path: str) -> None:
    content = refused(client.post(JOBS, content=body, headers=JSON), 422, "invalid_content")

    problems = content["details"]["errors"]
    assert path in [problem["path"] for problem in problems]
    assert all(problem.keys() == {"path", "message"} for problem in problems)


@pytest.mark.parametrize(
    ("parameters", "word"),
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
def test_what_the_log_cannot_keep_is_invalid_and_says_why(client: httpx.Client, parameters: str, word: str) -> None:
    alone = refused(client.post(JOBS, content=job(parameters), headers=JSON), 422, "invalid_content")
    assert word in alone["message"]
    jobs = f'{{"jobs": [{job("{}")}, {job(parameters)}]}}'
    in_batch = refused(client.post(BATCHES, content=jobs, headers=JSON), 422, "invalid_content")
    assert in_batch["message"].startswith("jobs[1].parameters: ")
    assert word in in_batch["message"]
    defaults = f'{{"jobs": [{job("{}")}], "parameters": {parameters}}}'
    assert word in refused(client.post(BATCHES, content=defaults, headers=JSON), 422, "invalid_content")["message"]


def test_an_unknown_job_type_is_refused_with_the_known_ones(client: httpx.Client) -> None:
    answer = client.post(JOBS, json={"job_type": "transcode", "parameters": {}})
    content = refused(answer, 422, "unknown_job_type")

    assert "echo, session" in content["message"]
    assert content["details"]["errors"][0]["path"] == "job_type"


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_a_body_that_does_not_say_that_it_is_json_is_refused(client: httpx.Client, kind: str) -> None:
    for path in (JOBS, BATCHES):
        answer = client.post(path, content=job("{}"), headers={"Content-Type": kind} if kind else {})
        refused(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_the_type_json_may_be_written_in_any_way(client: httpx.Client, kind: str) -> None:
    refused(client.post(JOBS, content="{}", headers={"Content-Type": kind}), 422, "invalid_content")


def test_a_body_that_is_too_large_is_refused_with_or_without_a_length(client: httpx.Client) -> None:
    too_large = job(f'{{"a": "{"x" * LARGEST_BODY}"}}').encode()
    content = refused(client.post(JOBS, content=too_large, headers=JSON), 413, "content_too_large")
    assert str(LARGEST_BODY) in content["message"]
    parts = (too_large[start : start + 65_536] for start in range(0, len(too_large), 65_536))
    refused(client.post(JOBS, content=parts, headers=JSON), 413, "content_too_large")


def test_defaults_that_make_a_batch_too_large_are_refused_though_the_body_is_small(client: httpx.Client) -> None:
    jobs = [{"job_type": "echo", "parameters": {}}] * 1000
    answer = client.post(BATCHES, json={"parameters": {"a": "x" * 2000}, "jobs": jobs})
    refused(answer, 413, "content_too_large")


def test_thousands_of_wrong_fields_do_not_make_an_endless_answer(client: httpx.Client) -> None:
    wrong = {"job_type": "echo", "parameters": {}, **{f"unknown_{number}": 1 for number in range(50_000)}}
    answer = client.post(JOBS, json=wrong)
    content = refused(answer, 422, "invalid_content")

    assert "at least 97 more" in content["message"]
    assert len(answer.content) < 50_000


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
def test_an_address_that_does_not_exist_is_not_found(client: httpx.Client, method: str, path: str) -> None:
    answer = client.request(method, httpx.URL(str(client.base_url)).copy_with(raw_path=path.encode()))
    refused(answer, 404, "not_found")


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
def test_a_wrong_method_is_told_all_right_ones(client: httpx.Client, method: str, path: str, allowed: set[str]) -> None:
    answer = client.request(method, path)
    refused(answer, 405, "method_not_allowed")
    assert set(answer.headers["allow"].split(", ")) == allowed


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
def test_a_wrong_query_parameter_is_named(client: httpx.Client, query: str, path: str) -> None:
    content = refused(client.get(f"{JOBS}?{query}"), 422, "invalid_content")
    assert [problem["path"] for problem in content["details"]["errors"]] == [path]


@pytest.mark.parametrize("query", ["track=%00", "track=%ff%fe", "user_id=$ne", "batch_id=[$gt]", "track=" + "x" * 5000])
def test_a_strange_value_to_look_for_is_only_a_value_that_is_not_there(client: httpx.Client, query: str) -> None:
    answer = client.get(f"{JOBS}?{query}")
    assert answer.status_code == 200, answer.text
    assert answer.json()["jobs"] == []


@pytest.mark.parametrize("position", ["x", "-1", "1.5", "1e3", "9" * 40, "٣", "1,2"])
def test_a_position_that_is_no_number_is_malformed(client: httpx.Client, position: str) -> None:
    for path in (JOBS, BATCHES, "/api/monitoring/events/stats", f"{JOBS}/job-1", "/api/events/files/x"):
        if position.isascii():
            refused(client.get(path, headers={"Ledger-Position": position}), 400, "malformed_position")
        refused(client.get(path, params={"min_position": position}), 422 if path == "" else 400, "malformed_position")


@pytest.mark.parametrize("position", ["1", "999999999999999999"])
def test_position_beyond_the_log_is_refused_at_once(client: httpx.Client, position: str) -> None:
    for path in (JOBS, BATCHES, "/api/monitoring/events/stats", f"{JOBS}/job-1", "/api/events/files/x"):
        began = time.monotonic()
        refused(client.get(path, headers={"Ledger-Position": position}), 422, "invalid_content")
        refused(client.get(path, params={"min_position": position}), 422, "invalid_content")
        assert time.monotonic() - began < 9, "it was held"


@pytest.mark.parametrize("query", ["after=x", "after=-1", f"after={2**63}", f"after={2**53}", "follow=true"])
def test_a_stream_that_cannot_begin_is_refused_before_it_begins(client: httpx.Client, query: str) -> None:
    refused(client.get(f"/api/ledger/stream?{query}"), 422, "invalid_content")


def test_a_stream_of_unknown_events_is_refused(client: httpx.Client) -> None:
    content = refused(client.get("/api/ledger/stream?types=JobSubmitted,JobExploded"), 422, "unknown_event_type")
    assert "JobExploded" in content["message"]


@pytest.mark.parametrize("given", ["x", "-5", str(2**64)])
def test_a_wrong_last_event_id_is_refused(client: httpx.Client, given: str) -> None:
    refused(client.get("/api/ledger/stream", headers={"Last-Event-ID": given}), 422, "invalid_content")


@pytest.mark.parametrize("job_id", ["job-x", "job-%00", "batch-1", "x", "job-" + "0" * 5000, "%24where", "job-%ff"])
def test_a_job_or_batch_that_does_not_exist_is_not_found(client: httpx.Client, job_id: str) -> None:
    refused(client.get(f"{JOBS}/{job_id}"), 404, "job_not_found")
    refused(client.get(f"{JOBS}/{job_id}/history"), 404, "job_not_found")
    refused(client.delete(f"{JOBS}/{job_id}"), 404, "job_not_found")
    refused(client.get(f"{BATCHES}/{job_id}"), 404, "batch_not_found")


@pytest.mark.parametrize("body", ["[]", '{"reason": 3}', '{"why": "x"}', '{"reason": "%s"}' % ("x" * 3000)])
def test_an_action_with_a_wrong_body_is_refused(client: httpx.Client, body: str) -> None:
    for action in ("cancel", "restart", "archive", "unarchive"):
        refused(client.post(f"{JOBS}/job-1/{action}", content=body, headers=JSON), 422, "invalid_content")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:5001", "127.0.0.1.evil.example", "", "[", "localhost@evil"]
)
def test_a_name_that_is_not_ours_is_refused(client: httpx.Client, host: str) -> None:
    for path in ("/", JOBS, "/nothing"):
        refused(client.get(path, headers={"Host": host}), 400, "unknown_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:5001"])
def test_every_name_of_this_machine_is_ours(client: httpx.Client, host: str) -> None:
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
def test_a_page_of_another_site_may_not_change_anything(client: httpx.Client, origin: str) -> None:
    refused(client.post(f"{JOBS}/job-1/cancel", headers={"Origin": origin}), 403, "origin_not_allowed")
    refused(client.delete(f"{JOBS}/job-1", headers={"Origin": origin}), 403, "origin_not_allowed")
    refused(client.post(JOBS, content=job("{}"), headers=JSON | {"Origin": origin}), 403, "origin_not_allowed")


def test_a_page_of_our_own_may(client: httpx.Client) -> None:
    ours = {"Origin": str(client.base_url).rstrip("/")}
    refused(client.post(f"{JOBS}/job-1/cancel", headers=ours), 404, "job_not_found")


def test_a_client_that_goes_away_in_mid_body_is_no_fault(client: httpx.Client) -> None:
    for _ in range(3):
        with socket.create_connection((client.base_url.host, client.base_url.port or 80), 10) as connection:
            head = (
                f"POST {JOBS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
            )
            connection.sendall(f"{head}\r\n{{".encode())
    assert client.get("/healthz").status_code == 200  # the fixture looks for faults at the end


def test_what_is_not_http_is_answered_and_harms_nobody(client: httpx.Client) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), 10) as connection:
        connection.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert client.get("/healthz").status_code == 200


def test_error_messages_quote_no_more_of_the_input_than_helps(client: httpx.Client) -> None:
    answer = client.post(JOBS, content=json.dumps({"job_type": "x" * 90, "parameters": {}}), headers=JSON)
    refused(answer, 422, "unknown_job_type")
    answer = client.post(JOBS, content=json.dumps({"job_type": "x" * 90_000, "parameters": {}}), headers=JSON)
    refused(answer, 422, "invalid_content")
    assert len(answer.content) < 1000
